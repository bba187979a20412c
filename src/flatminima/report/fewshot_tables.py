"""The tables of the F2M reproduction, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from flatminima.report.numbers import MISSING, as_finite, difference, integer, plain, with_error
from flatminima.report.tables import Cell, Column, Table
from flatminima.report.terminal import rendered
from flatminima.report.verdicts_table import verdicts_table

Results = Mapping[str, Any]

claims_table = verdicts_table  # pages look tables up here by name
_SUMMARY = ("first", "last", "average", "drop", "relative_drop", "base", "novel", "harmonic", "forgetting")
_HEADS = {
    "first": "First", "last": "Last", "average": "Mean", "drop": "PD", "relative_drop": "PD / first", "base": "Base",
    "novel": "Novel", "harmonic": "Harmonic", "forgetting": "Forgetting",
}  # fmt: skip


def label(results: Results, name: str) -> str:
    """The name of a method as the tables have it."""
    return next((str(row["label"]) for row in results["methods"] if row["name"] == name), name)


def _half(stat: Mapping[str, Any]) -> float | None:
    low, high = as_finite(stat.get("low")), as_finite(stat.get("high"))
    return None if low is None or high is None else (high - low) / 2


def percent(stat: Mapping[str, Any], n: int | None = None) -> Cell:
    """A percentage with two decimals, half its 95 % interval below; n where seeds are missing."""
    mean, half = as_finite(stat.get("mean")), _half(stat)
    if mean is None:
        return Cell(MISSING)
    notes = [f"± {half:.1f}"] if half is not None else []
    if n is not None and stat["n"] != n:
        notes.append(f"n = {stat['n']}")
    return Cell(f"{mean:.2f}".replace("-", "−"), ", ".join(notes), (mean, half))


def session_table(results: Results) -> Table:
    """Accuracy on all classes so far after every session, with PD and mean, and what was published below each method."""
    count, seeds = results["plan"]["sessions"], results["plan"]["seeds"]
    rows = []
    for row in results["methods"]:
        cells = [Cell(row["label"], "here" if results["published"] else "")]
        cells += [percent(stat, seeds) for stat in row["sessions"]["accuracy"]]
        cells += [percent(row["numbers"]["drop"]), percent(row["numbers"]["average"])]
        rows.append(tuple(cells))
        for source, title in (("paper", "published"), ("rerun", "re-run by others")):
            found = results["published"].get(source, {}).get(row["name"])
            if found is not None and len(found["accuracy"]) == count:
                rows.append(_published(found, title))
    columns = (
        Column("Method", "accuracy, %", False), *(Column(str(t + 1), "± 95 %") for t in range(count)), Column("PD", "points"),
        Column("Mean", "± 95 %"),
    )  # fmt: skip
    return Table("sessions", "Accuracy on all classes so far", columns, tuple(rows))


def _published(found: Mapping[str, Any], title: str) -> tuple[Cell, ...]:
    accuracy = found["accuracy"]
    values = [*accuracy, accuracy[0] - accuracy[-1], sum(accuracy) / len(accuracy)]
    return (
        Cell(found["label"], f"{title}: {found['check']}"),
        *(Cell(f"{value:.2f}", "", (value,)) for value in values),
    )


def published_table(results: Results) -> Table:
    """Published rows of methods that were not run here."""
    present = {row["name"] for row in results["methods"]}
    rows = [
        _published(found, title)
        for source, title in (("paper", "published"), ("rerun", "re-run by others"))
        for name, found in results["published"].get(source, {}).items()
        if name not in present
    ]
    width = max((len(row) for row in rows), default=3)
    columns = (
        Column("Method", "", False),
        *(Column(str(t + 1)) for t in range(width - 3)),
        Column("PD"),
        Column("Mean"),
    )
    return Table("published", "Published, not run here", columns, tuple(row for row in rows if len(row) == width))


def summary_table(results: Results) -> Table:
    """Every summary of every method, and what it cost."""
    rows = []
    for row in results["methods"]:
        cells = [Cell(row["label"], f"memory: {row['memory']}")]
        cells += [percent(row["numbers"][name]) for name in _SUMMARY]
        cells.append(_seconds(results, row))
        rows.append(tuple(cells))
    details = {name: results["quantities"][name]["label"] for name in _SUMMARY}
    columns = (
        Column("Method", "", False), *(Column(_HEADS[name], details[name]) for name in _SUMMARY),
        Column("Time", "base training; sessions of a stream"),
    )  # fmt: skip
    return Table("summary", "Summaries", columns, tuple(rows))


def _seconds(results: Results, row: Mapping[str, Any]) -> Cell:
    base = [b["seconds"] for b in results["bases"] if b["base"] == row["base"]]
    learning = [
        s["seconds"]["learning"] for s in results["streams"] if (s["base"], s["arm"]) == (row["base"], row["arm"])
    ]
    if not base or not learning:
        return Cell(MISSING)
    return Cell(f"{sum(base) / len(base):.0f} s", f"{sum(learning) / len(learning):.1f} s")


_COMPARED = ("average", "last", "base", "novel", "harmonic", "drop")


def comparison_table(results: Results) -> Table:
    """Paired differences with nested intervals, and the sign-flip test over base seeds on the mean accuracy."""
    rows = []
    for row in results["comparisons"]:
        cells = [Cell(label(results, row["method"]), f"against {label(results, row['baseline'])}")]
        cells += [
            _difference(row["quantities"][name], results["quantities"][name]["more_is_better"]) for name in _COMPARED
        ]
        average = row["quantities"]["average"]
        cells.append(Cell(_p(average["p"]), f"smallest possible {_p(average['smallest_p'])}", (average["p"],)))
        cells.append(Cell(_p(row["p_holm"]), "", (row["p_holm"],)))
        rows.append(tuple(cells))
    columns = (
        Column("Method", "", False), *(Column(_HEADS[name], "points, 95 % interval") for name in _COMPARED),
        Column("p of the mean", "sign-flip over base seeds"), Column("p, Holm", f"for {len(rows)} comparisons"),
    )  # fmt: skip
    return Table("comparisons", "Paired differences", columns, tuple(rows))


def _difference(stat: Mapping[str, Any], more_is_better: bool) -> Cell:
    mean, low, high = (as_finite(stat.get(name)) for name in ("mean", "low", "high"))
    if mean is None:
        return Cell(MISSING)
    text, word, tone = f"{mean:+.2f}", "", ""
    if low is not None and high is not None:
        text += f" [{low:+.2f}, {high:+.2f}]"
        if low > 0 or high < 0:
            word, tone = ("better", "good") if (low > 0) == more_is_better else ("worse", "bad")
    return Cell(text.replace("-", "−"), "", (mean, low, high), word, tone)


def _p(value: Any) -> str:
    number = as_finite(value)
    return MISSING if number is None else f"{number:.3f}" if number >= 0.001 else plain(number, 2)


def ablation_table(results: Results) -> Table:
    """F2M with one part changed: what it is, and where it ends."""
    rows = []
    for row in results["methods"]:
        if row["name"] in results["ablations"]:
            cells = [Cell(row["label"]), Cell(row["parts"], f"prototypes: {row['classifier']}")]
            cells += [
                percent(row["numbers"][name]) for name in ("average", "last", "base", "novel", "harmonic", "drop")
            ]
            rows.append(tuple(cells))
    heads = [Column(_HEADS[name], "%, ± 95 %") for name in ("average", "last", "base", "novel", "harmonic", "drop")]
    columns = (Column("Method", "", False), Column("Parts", "", False), *heads)
    return Table("ablation", "F2M, one part changed", columns, tuple(rows) if len(rows) > 1 else ())


def _stat(stat: Mapping[str, Any], scale: float = 1.0) -> Cell:
    mean, half = as_finite(stat.get("mean")), _half(stat)
    if mean is None:
        return Cell(MISSING)
    return Cell(with_error(scale * mean, None if half is None else scale * half), "", (mean, half))


def flatness_table(results: Results) -> Table:
    """The loss in the box per base and part."""
    names = ("loss", "indicator", "mean_rise", "largest", "worst", "drift", "worst_drift")
    rows = []
    for row in results["flatness"]["rows"]:
        cells = [Cell(row["base"], f"{row['part']} images")]
        cells += [_stat(row[name], 100.0 if "drift" in name else 1.0) for name in names]
        rows.append(tuple(cells))
    columns = (
        Column("Base network", "", False), Column("Loss", "centre of the box"), Column("I", "mean (L − L*)²"),
        Column("Rise", "mean over draws"), Column("Largest", "loss over draws"), Column("Worst", "loss found by ascent"),
        Column("Drift", "class means, %, mean over draws"), Column("Worst drift", "at the worst point, %"),
    )  # fmt: skip
    return Table("flatness", "The loss in the box", columns, tuple(rows))


def flatness_differences_table(results: Results) -> Table:
    """Bases against the plain one."""
    rows = []
    for row in results["flatness"]["differences"]:
        if row["quantity"] in ("indicator", "mean_rise", "worst", "worst_drift"):
            low, high = as_finite(row["low"]), as_finite(row["high"])
            word, tone = "", ""
            if low is not None and high is not None:
                word, tone = ("flatter", "good") if high < 0 else ("sharper", "bad") if low > 0 else ("", "")
            name = row["quantity"].replace("_", " ")
            cell = Cell(difference(row["mean"], low, high), "", (row["mean"], low, high), word, tone)
            rows.append((Cell(row["base"], "minus plain"), Cell(name, f"{row['part']} images"), cell))
    columns = (Column("Base network", "", False), Column("Quantity", "", False), Column("Difference", "95 % interval"))
    return Table("flatness-differences", "Who is flatter?", columns, tuple(rows))


def trace_table(results: Results) -> Table:
    """Trace of the Hessian on the noised layers, and what the half width means for each of them."""
    rows = []
    for row in results["flatness"]["traces"]:
        sizes = ", ".join(f"{value:.3f}" for value in row["half_over_rms"])
        rows.append(
            (
                Cell(row["base"]),
                _stat(row["trace"]),
                Cell(", ".join(row["methods"])),
                Cell(sizes, ", ".join(row["region"])),
            )
        )
    columns = (
        Column("Base network", "", False), Column("Trace", "of the Hessian, train images"), Column("Method", "", False),
        Column("b / RMS(w)", "per tensor, mean over seeds", False),
    )  # fmt: skip
    return Table("trace", "Curvature on the noised layers", columns, tuple(rows))


def movement_table(results: Results) -> Table:
    """What the sessions did to the weights."""
    rows = []
    for row in results["movement"]:
        cells = [Cell(label(results, row["name"]))]
        cells += [_stat(row["clamp_hits"], 100.0), _stat(row["at_bound"], 100.0), _stat(row["largest_move"])]
        rows.append((*cells, _stat(row["drift"], 100.0)))
    columns = (
        Column("Method", "", False), Column("Clamp hits", "% of coordinates a step, last session"),
        Column("At the bound", "% of coordinates, at the end"), Column("Largest move", "in half widths"),
        Column("Drift", "of base class means, %"),
    )  # fmt: skip
    return Table("movement", "What the sessions moved", columns, tuple(rows))


def defects_table(results: Results) -> Table:
    """What the released code does differently."""
    rows = [(Cell(name), Cell(text), Cell(where)) for name, text, where in results["defects"]]
    columns = (Column("Setting", "", False), Column("The released code", "", False), Column("In these runs", "", False))
    return Table("defects", "Defects of the released code", columns, tuple(rows))


def settings_table(results: Results) -> Table:
    """The settings of these runs."""
    rows = []
    for name, value in results["settings"].items():
        if isinstance(value, Mapping):
            shown = ", ".join(f"{k} {v}" for k, v in value.items())
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else MISSING if value is None else str(value)
        rows.append((Cell(name), Cell(shown or MISSING)))
    return Table("settings", "Settings", (Column("Setting", "", False), Column("Value", "", False)), tuple(rows))


def failures_table(results: Results) -> Table:
    """The tasks that diverged."""
    rows = [
        (Cell(r["base"]), Cell(str(r.get("arm", what))), Cell(str(r["seed"])), Cell(integer(r["failure"]["step"])),
         Cell(r["failure"]["reason"]))
        for what, records in (
            ("base training", results["bases"]), ("", results["streams"]), ("flatness", results.get("unmeasured", ())),
        )
        for r in records
        if r["failure"] is not None
    ]  # fmt: skip
    heads = (("Base", False), ("Arm", False), ("Seed", True), ("Step", True), ("Reason", False))
    return Table("failures", "Failed tasks", tuple(Column(head, "", numeric) for head, numeric in heads), tuple(rows))


def terminal_tables(results: Results) -> Sequence[RenderableType]:
    """Sessions, summaries and differences."""
    tables = (session_table(results), summary_table(results), comparison_table(results), failures_table(results))
    return [rendered(table) for table in tables if table]
