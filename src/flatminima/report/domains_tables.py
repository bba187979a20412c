"""The tables of the SWAD reproduction, for the page and for the terminal."""

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


def label(results: Results, method: str) -> str:
    """The name of a method as the tables have it."""
    return next((str(row["label"]) for row in results["methods"] if row["name"] == method), method)


def _percent(stat: Mapping[str, Any] | None) -> Cell:
    """An accuracy: one decimal, its standard error below, n where seeds are missing."""
    mean = as_finite((stat or {}).get("mean"))
    if stat is None or mean is None:
        return Cell(MISSING)
    se = as_finite(stat.get("se"))
    return Cell(f"{mean:.1f}", "" if se is None else f"± {se:.1f}", (mean, se))


def accuracy_table(results: Results) -> Table:
    """Targets x methods: mean and standard error over seeds, and what the paper printed."""
    targets, printed = results["plan"]["targets"], results["published"]
    columns = [
        Column("Method", "accuracy on the target, %", False), *(Column(t, "± s.e.") for t in targets),
        Column("Average", "± s.e."),
    ]  # fmt: skip
    if printed:
        columns.append(Column("Published average", "pretrained ResNet-50"))
    rows = []
    for row in results["methods"]:
        cells = [
            Cell(row["label"]),
            *(_percent(row["targets"].get(target)) for target in targets),
            _percent(row["average"]),
        ]
        if printed:
            cells.append(_published(printed.get(row["name"])))
        rows.append(tuple(cells))
    return Table("accuracy", "Accuracy on the domain left out", tuple(columns), tuple(rows))


def _published(found: Mapping[str, Any] | None) -> Cell:
    if found is None:
        return Cell(MISSING)
    cell = _percent({"mean": found["average"], "se": found["se"]})
    return Cell(cell.text, f"{cell.detail}{', ' if cell.detail else ''}{found['label']}", cell.values)


def published_table(results: Results) -> Table:
    """The paper's numbers per target, where it prints them."""
    rows = []
    targets = results["plan"]["targets"]
    for found in results["published"].values():
        if found["targets"]:
            cells = [_percent(found["targets"].get(target)) for target in targets]
            rows.append((Cell(found["label"]), *cells, _percent({"mean": found["average"], "se": found["se"]})))
    columns = (
        Column("Published", "ResNet-50, pretrained on ImageNet", False),
        *map(Column, targets),
        Column("Average"),
    )
    return Table("published", "Published accuracies", columns, tuple(rows))


def comparison_table(results: Results) -> Table:
    """Paired differences with interval, per-target extremes and tests."""
    rows = []
    for row in results["comparisons"]:
        low, high = as_finite(row["low"]), as_finite(row["high"])
        word, tone = "", ""
        if low is not None and high is not None:
            word, tone = ("better", "good") if low > 0 else ("worse", "bad") if high < 0 else ("", "")
        worst, seeds = row["worst_target"], row["seeds"]
        rows.append(
            (
                Cell(label(results, row["method"]), f"against {label(results, row['baseline'])}"),
                Cell(_difference(row["difference"], low, high), "", (row["difference"], low, high), word, tone),
                Cell(
                    f"{row['wins']} of {row['targets']}",
                    f"worst: {worst}, {_difference(row['per_target'][worst], None, None)}",
                ),
                Cell(_p(row["p"]), f"smallest possible {_p(row['smallest_p'])}", (row["p"],)),
                Cell(_p(row["p_holm"]), "", (row["p_holm"],)),
                Cell(_difference(row["difference"], seeds["low"], seeds["high"]), _seed_test(seeds)),
            )
        )
    columns = (
        Column("Method", "", False),
        Column("Difference", "points, 95 % interval over targets and seeds"),
        Column("Targets better", "", False),
        Column("p", "sign-flip over targets, exact"),
        Column("p, Holm", f"for {len(rows)} comparisons"),
        Column("These targets, new seeds", "95 % interval, t over seeds"),
    )
    return Table("comparisons", "Paired differences", columns, tuple(rows))


def _difference(value: Any, low: Any, high: Any) -> str:
    number, lower, upper = as_finite(value), as_finite(low), as_finite(high)
    if number is None:
        return MISSING
    text = f"{number:+.2f}".replace("-", "−")
    if lower is None or upper is None:
        return text
    return text + f" [{lower:+.2f}, {upper:+.2f}]".replace("-", "−")


def _seed_test(seeds: Mapping[str, Any]) -> str:
    if as_finite(seeds.get("p")) is None:
        return "no seed has all targets"
    return f"n = {seeds['n']}, sign-flip p {_p(seeds['p'])} (smallest {_p(seeds['smallest_p'])})"


def _p(value: Any) -> str:
    number = as_finite(value)
    return MISSING if number is None else f"{number:.3f}" if number >= 0.001 else plain(number, 2)


def pooled_table(results: Results) -> Table:
    """The sign-flip test over the targets of several data sets."""
    rows = [
        (
            Cell(label(results, row["method"]), f"against {label(results, row['baseline'])}"),
            Cell(", ".join(row["data"])),
            Cell(integer(row["targets"])),
            Cell(f"{row['difference']:+.2f}".replace("-", "−"), "", (row["difference"],)),
            Cell(_p(row["p"]), f"smallest possible {_p(row['smallest_p'])}", (row["p"],)),
        )
        for row in results["pooled"]
    ]
    columns = (
        Column("Method", "", False), Column("Data sets", "strata", False), Column("Targets"),
        Column("Difference", "points, mean of the data sets"), Column("p", "sign-flip, exact"),
    )  # fmt: skip
    return Table("pooled", "Over several data sets", columns, tuple(rows))


def valley_table(results: Results) -> Table:
    """How often SWAD's rule found the start and the end of a valley."""
    rows = []
    for method, row in results["valley"]["summary"].items():
        share, ratio = as_finite(row["start_share"]), as_finite(row["final_ratio"])
        rows.append(
            (
                Cell(label(results, method)),
                Cell(
                    f"{row['converged']} of {row['runs']}",
                    "" if share is None else f"at {share:.0%} of the run, median",
                ),
                Cell(f"{row['ended']} of {row['runs']}", _highest(row["highest_ratio"])),
                Cell(
                    f"{row['still_falling']} of {row['converged']}",
                    ""
                    if ratio is None
                    else f"last / start: median {ratio:.2f}, smallest {row['smallest_final_ratio']:.2f}",
                ),
                Cell(integer(row["iterates"])),
            )
        )
    columns = (
        Column("Method", "", False),
        Column("Start found", "runs"),
        Column("End found", "runs; highest loss / threshold"),
        Column("Loss still fell by 5 %", "after the start"),
        Column("Iterates", "median"),
    )
    return Table("valleys", "The valley", columns, tuple(rows))


def _highest(ratio: Any) -> str:
    number = as_finite(ratio)
    return "" if number is None else f"highest {number:.2f}"


def valley_runs_table(results: Results) -> Table:
    """Every run of SWAD's rule."""
    rows = []
    for row in results["valley"]["runs"]:
        window = f"{row['start_step']} to {row['end_step']}"
        votes = (
            "" if not row["votes"] else f"{len(row['votes'])} segments, most votes {max(v[2] for v in row['votes'])}"
        )
        notes = [str(note) for note in row["notes"]]
        rows.append(
            (
                Cell(label(results, row["method"])), Cell(str(row["target"])), Cell(str(row["seed"])),
                Cell("yes" if row["converged"] else "no", tone="" if row["converged"] else "bad"), Cell(window, votes),
                Cell(integer(row["n"])), Cell(plain(row["threshold"])), Cell(_step(row["detected_at"])),
                Cell(_step(row["stopped_at"])), Cell("; ".join(notes)),
            )
        )  # fmt: skip
    columns = (
        Column("Method", "", False), Column("Target", "", False), Column("Seed"), Column("Start found", "", False),
        Column("Averaged", "steps", False), Column("Iterates"), Column("Threshold", "loss"), Column("Detected at", "step"),
        Column("Ended at", "step"), Column("Notes", "", False),
    )  # fmt: skip
    return Table("valley-runs", "Every valley", columns, tuple(rows))


def _step(value: Any) -> str:
    return MISSING if value is None else integer(value)


def flatness_table(results: Results) -> Table:
    """Local flatness per method with the norm and the losses that have to stand beside it."""
    flat = results["flatness"]
    beside = {row["method"]: row for row in flat["beside"]}
    methods = list(dict.fromkeys(row["method"] for row in flat["rows"]))
    keys = [(where, radius) for where in ("source", "target") for radius in flat["radii"]]
    found = {(row["method"], row["where"], row["radius"]): row for row in flat["rows"]}
    rows = []
    for method in methods:
        cells = [Cell(label(results, method))]
        for key in keys:
            row = found.get((method, *key))
            cells.append(
                Cell(MISSING) if row is None else Cell(with_error(row["mean"], row["se"]), "", (row["mean"], row["se"]))
            )
        for quantity in ("norm", "validation_loss", "target_loss"):
            stat = beside[method][quantity]
            cells.append(
                Cell(with_error(stat["mean"], stat["se"]), "", (as_finite(stat["mean"]), as_finite(stat["se"])))
            )
        rows.append(tuple(cells))
    columns = (
        Column("Method", "", False), *(Column(f"{where}, γ = {radius:g}", "rise of the loss") for where, radius in keys),
        Column("Norm", "of the parameters"), Column("Source loss", "held out"), Column("Target loss"),
    )  # fmt: skip
    return Table("flatness", "Local flatness", columns, tuple(rows))


def order_table(results: Results) -> Table:
    """Differences of local flatness along the paper's order."""
    rows = []
    for row in results["flatness"]["order"]:
        low, high = as_finite(row["low"]), as_finite(row["high"])
        word, tone = "", ""
        if low is not None and high is not None:
            word, tone = ("flatter", "good") if high < 0 else ("sharper", "bad") if low > 0 else ("", "")
        rows.append(
            (
                Cell(label(results, row["flatter"]), f"minus {label(results, row['sharper'])}"),
                Cell(f"{row['where']}, γ = {row['radius']:g}"),
                Cell(difference(row["difference"], low, high), "", (row["difference"], low, high), word, tone),
                Cell(f"{row['targets'] - row['wins']} of {row['targets']}"),
                Cell(_p(row["p"]), f"smallest possible {_p(row['smallest_p'])}"),
            )
        )
    columns = (
        Column("Method", "", False), Column("Where", "", False), Column("Difference of F", "95 % interval"),
        Column("Targets flatter"), Column("p", "sign-flip over targets"),
    )  # fmt: skip
    return Table("order", "Who is flatter?", columns, tuple(rows))


def data_table(results: Results) -> Table:
    """Images of each class in each domain, and how many are held out."""
    data = results["data"]
    rows = [
        (
            Cell(name),
            *(Cell(integer(count)) for count in counts),
            Cell(integer(sum(counts))),
            Cell(integer(data["held_out"][name])),
        )
        for name, counts in data["counts"].items()
    ]
    classes = data["classes"] if len(data["classes"]) <= 12 else ()
    if not classes:
        rows = [(row[0], *row[-2:]) for row in rows]
    columns = (Column("Domain", "", False), *(Column(str(c)) for c in classes), Column("Images"), Column("Held out"))
    return Table("data", "Domains", columns, tuple(rows))


def protocol_table(results: Results) -> Table:
    """What SWAD's DomainBed and today's do differently."""
    rows = [(Cell(name, meaning), Cell(first), Cell(second)) for name, first, second, meaning in results["differences"]]
    columns = (Column("Setting", "", False), Column("swad-2021", "", False), Column("domainbed", "today", False))
    return Table("protocols", "Two protocols", columns, tuple(rows))


def settings_table(results: Results) -> Table:
    """The settings of these runs."""
    rows = []
    for name, value in results["settings"].items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else _setting(value)
        rows.append((Cell(name), Cell(shown or MISSING)))
    return Table("settings", "Settings", (Column("Setting", "", False), Column("Value", "", False)), tuple(rows))


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else MISSING if value is None else str(value)


def failures_table(results: Results) -> Table:
    """The runs that diverged."""
    rows = [
        (
            Cell(r["algorithm"]), Cell(r["target"]), Cell(str(r["seed"])), Cell(integer(r["failure"]["step"])),
            Cell(r["failure"]["reason"]),
        )
        for r in results["runs"]
        if r["failure"] is not None
    ]  # fmt: skip
    heads = (("Algorithm", False), ("Target", False), ("Seed", True), ("Step", True), ("Reason", False))
    return Table("failures", "Failed runs", tuple(Column(head, "", numeric) for head, numeric in heads), tuple(rows))


def terminal_tables(results: Results) -> Sequence[RenderableType]:
    """Accuracies, differences and valleys."""
    tables = (accuracy_table(results), comparison_table(results), valley_table(results), failures_table(results))
    return [rendered(table) for table in tables if table]
