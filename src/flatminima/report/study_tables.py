"""The tables of a study, for the page, the terminal and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatminima.report.markdown import escaped, markdown
from flatminima.report.numbers import MISSING, as_finite, integer, plain
from flatminima.report.study_plots import KINDS, kinds_shown, ordered, signed
from flatminima.report.tables import Cell, Column, Table
from flatminima.study.value_names import is_share, outcome_word

Results = Mapping[str, Any]
_TONES = {"supported": "good", "refuted": "bad", "undecided": ""}


def study_tables(results: Results) -> dict[str, Table]:
    """All of them by name; one that has nothing to say is empty."""
    return {
        "verdicts": verdict_table(results),
        "parts": part_table(results),
        "correlations": correlation_table(results),
        "more": reliability_table(results),
        "comparisons": comparison_table(results),
        "axes": axes_table(results),
        "errors": sign_error_table(results),
        "selection": selection_table(results),
        "cells": cell_table(results),
    }


def study_markdown(results: Results) -> str:
    """Answer, what to be careful of and the tables, with the command that made them."""
    lists = [results["details"], [f"Careful: {sentence}" for sentence in results["cautions"]]]
    parts = [f"    {results['command']}", escaped(results["answer"])]
    parts += ["\n".join(f"- {escaped(sentence)}" for sentence in sentences) for sentences in lists if sentences]
    parts += [f"**{table.title}**\n\n{markdown(table)}" for table in study_tables(results).values() if table]
    return "\n\n".join(parts) + "\n"


def _estimate(found: Mapping[str, Any] | None) -> Cell:
    """A correlation with its interval below."""
    if not found or as_finite(found.get("value")) is None:
        return Cell(MISSING, str((found or {}).get("note") or ""))
    low, high = as_finite(found["low"]), as_finite(found["high"])
    detail = str(found.get("note") or "") if low is None or high is None else f"[{signed(low)}, {signed(high)}]"
    return Cell(signed(found["value"]), detail, (found["value"], low, high))


def _p(value: object) -> str:
    number = as_finite(value)
    return MISSING if number is None else f"{number:.3f}" if number >= 0.001 else plain(number, 2)


def verdict_table(results: Results) -> Table:
    """Each hypothesis, its verdict, and the reason."""
    columns = (
        Column("Hypothesis", "rule, written before training", False), Column("Verdict", "", False), Column("Why", "", False),
        Column("p", "after Holm's correction"),
    )  # fmt: skip
    rows = [
        (
            Cell(f"{v['name']}: {v['statement']}", v["rule"]), Cell(v["outcome"], tone=_TONES[v["outcome"]]), Cell(v["reason"]),
            Cell(_p(v["p_holm"]), f"alone {_p(v['p'])}", (v["p_holm"], v["p"])),
        )
        for v in results["verdicts"]
    ]  # fmt: skip
    if not rows and results["rules"] is not None:
        rows = [
            (
                Cell(f"{h['name']}: {h['statement']}", results["rules"]["words"][h["name"]]), Cell("not decided yet"),
                Cell("Rules are decided once every network has been tried."), Cell(MISSING),
            )
            for h in results["rules"]["hypotheses"]
        ]  # fmt: skip
    return Table("verdicts", "Verdicts", columns, tuple(rows))


def part_table(results: Results) -> Table:
    """Every comparison behind the verdicts."""
    columns = (
        Column("Comparison", "", False), Column("Estimate", "95 % interval"), Column("90 % interval"), Column("Margin"),
        Column("n", "independent units"), Column("p"), Column("Outcome", "", False),
    )  # fmt: skip
    rows = []
    for verdict in results["verdicts"]:
        for part in verdict["parts"]:
            number = plain if verdict["kind"] == "batch" else lambda value, digits: signed(value)
            value, low, high = (as_finite(part[name]) for name in ("value", "low", "high"))
            inner = [as_finite(part[name]) for name in ("inner_low", "inner_high")]
            margin = as_finite(part["margin"])
            rows.append(
                (
                    Cell(f"{verdict['name']}: {part['what']}", str(part.get("note") or "")),
                    Cell(number(value, 2), f"[{number(low, 2)}, {number(high, 2)}]", (value, low, high)),
                    Cell(f"[{number(inner[0], 2)}, {number(inner[1], 2)}]", "", tuple(inner)),
                    Cell(MISSING if margin is None or margin < 1e-6 else f"±{margin:g}", "", (margin,)),
                    Cell(integer(part["n"]), integer(part["units"]), (part["n"], part["units"])),
                    Cell(_p(part["p"]), "", (part["p"],)),
                    Cell(part["outcome"], tone=_TONES[part["outcome"]]),
                )
            )
    return Table("parts", "What the verdicts are made of", columns, tuple(rows))


def correlation_table(results: Results) -> Table:
    """Every measure, every kind of correlation."""
    shown = kinds_shown(results)
    columns = (
        Column("Measure", "data set, networks", False), *(Column(KINDS[kind].capitalize(), "95 % interval") for kind in shown),
        Column("p", "permutation; after Benjamini and Hochberg"),
    )  # fmt: skip
    rows = []
    for part in results["data"]:
        for row in ordered(part["correlations"]):
            corrected = as_finite(row.get("p_bh"))
            rows.append(
                (
                    Cell(row["label"], f"{part['name']}, {row['n']}"),
                    *(_estimate(row[kind]) for kind in shown),
                    Cell(_p(row["p"]), _p(corrected), (row["p"], corrected)),
                )
            )
    title = f"Rank correlations with {outcome_word(results['outcome'])}"
    return Table("correlations", title, columns, tuple(rows))


def reliability_table(results: Results) -> Table:
    """Kendall's tau, reliability, and the interval over training subsets."""
    columns = (
        Column("Measure", "data set", False), Column("Kendall's τ", "95 % interval"),
        Column("Reliability", "measured again, within cells"),
        Column("ρ over training subsets", "95 % interval, t over subsets"),
    )  # fmt: skip
    rows = [
        (
            Cell(row["label"], part["name"]), _estimate(row["kendall"]),
            Cell(MISSING if row["reliability"] is None else f"{row['reliability']:.2f}", "", (row["reliability"],)),
            _estimate(row["subsets"]),
        )
        for part in results["data"]
        for row in ordered(part["correlations"])
    ]  # fmt: skip
    return Table("more", "Kendall's τ, reliability and subsets", columns, tuple(rows))


def comparison_table(results: Results) -> Table:
    """The reference measure against every other."""
    columns = (
        Column("Against", "data set", False), Column("ρ of the first", "of the other"),
        Column("Difference in size", "95 % interval, paired bootstrap"), Column("p", "bootstrap; Meng's z"),
        Column("ρ between the two"),
    )  # fmt: skip
    rows = [
        (
            Cell(f"{c['first_label']} against {c['second_label']}", part["name"]),
            Cell(signed(c["r_first"]), signed(c["r_second"]), (c["r_first"], c["r_second"])),
            _estimate(c["difference"]), Cell(_p(c["difference"]["p"]), _p(c["meng_p"]), (c["difference"]["p"], c["meng_p"])),
            Cell(signed(c["between"]), "", (c["between"],)),
        )
        for part in results["data"]
        for c in part["comparisons"]
    ]  # fmt: skip
    return Table("comparisons", "Does one measure predict better?", columns, tuple(rows))


def axes_table(results: Results) -> Table:
    """Granulated Kendall coefficients and the conditional information score."""
    names = list(dict.fromkeys(axis for part in results["data"] for row in part["axes"] for axis in row["psi"]))
    columns = (
        Column("Measure", "data set", False), *(Column(f"ψ, {name}") for name in names), Column("Ψ", "mean"),
        Column("Conditional information", "held fixed where least"),
    )  # fmt: skip
    rows = [
        (
            Cell(row["label"], part["name"]),
            *(Cell(signed(row["psi"].get(name)), "", (row["psi"].get(name),)) for name in names),
            Cell(signed(row["mean_psi"]), "", (row["mean_psi"],)),
            Cell(
                MISSING if row["information"] is None else f"{row['information']:.3f}", ", ".join(row["held"]) or "nothing",
                (row["information"],),
            ),
        )
        for part in results["data"]
        for row in part["axes"]
    ]  # fmt: skip
    return Table("axes", "Along single hyper-parameters: granulated Kendall's τ", columns, tuple(rows))


def sign_error_table(results: Results) -> Table:
    """How often the claimed direction is wrong, in the mean and at worst."""
    columns = (
        Column("Measure", "claimed direction; data set", False), Column("Mean"), Column("90th percentile"),
        Column("Worst", "environment"), Column("Environments", "with differences beyond noise"),
    )  # fmt: skip
    rows = []
    for part in results["data"]:
        for row in part["axes"]:
            found = row["sign_error"]
            if found is None:
                continue
            direction = "rises" if found["direction"] > 0 else "falls"
            claimed = f"{direction} with {outcome_word(results['outcome'])}"
            numbers = (found["mean"], found["percentile_90"], found["worst"])
            shown = [MISSING if n is None else f"{n:.2f}" for n in numbers]
            rows.append(
                (
                    Cell(row["label"], f"{claimed}; {part['name']}"), Cell(shown[0], "", numbers[:1]),
                    Cell(shown[1], "", numbers[1:2]), Cell(shown[2], found["worst_at"], numbers[2:]),
                    Cell(integer(found["counted"]), f"of {found['environments']}"),
                )
            )  # fmt: skip
    return Table("errors", "Robust sign errors: 0 is never wrong, 0.5 a coin", columns, tuple(rows))


def selection_table(results: Results) -> Table:
    """What is lost by choosing networks by a measure."""
    columns = (
        Column("Measure", "chosen; data set", False), Column("Best network", "accuracy points below"),
        Column("Best tenth", "points below"), Column("A random network", "points below the best"),
    )  # fmt: skip
    rows = [
        (
            Cell(row["label"], f"{row['direction']}; {part['name']}"),
            *(Cell(f"{100 * row[name]:.2f}", "", (row[name],)) for name in ("top_1", "top_10", "random")),
        )
        for part in results["data"]
        for row in sorted(part["selection"], key=lambda row: float(row["top_10"]))
    ]  # fmt: skip
    return Table("selection", "Regret of selection", columns, tuple(rows))


def cell_table(results: Results) -> Table:
    """Every cell, also those that nobody finished."""
    percent, name = is_share(results["outcome"]), outcome_word(results["outcome"])
    predicted = f"{name[0].upper()}{name[1:]}{', %' if percent else ''}"
    columns = (
        Column("Cell", "data, rows, subset", False), Column("Finished"), Column("Missed", "the stop criterion"),
        Column("Failed"), Column(predicted, "standard deviation"), Column("Epochs", "median"), Column("Reasons", "", False),
    )  # fmt: skip
    rows = []
    several = len({cell["study"] for cell in results["cells"]}) > 1
    for cell in results["cells"]:
        mean, sd = as_finite(cell["mean"]), as_finite(cell["sd"])
        name = ", ".join(f"{factor} {value}" for factor, value in cell["factors"].items()) or "all"
        rows.append(
            (
                Cell(
                    name,
                    f"{cell['study'] + ': ' if several else ''}{cell['data']}, {integer(cell['rows'])}, {cell['subset']}",
                ),
                *(
                    Cell(integer(cell[status]), "", (cell[status],), tone="bad" if bad and cell[status] else "")
                    for status, bad in (("finished", False), ("missed", True), ("failed", True))
                ),
                Cell(
                    MISSING if mean is None else f"{100 * mean:.2f}" if percent else plain(mean),
                    "" if sd is None else f"± {100 * sd:.2f}" if percent else f"± {plain(sd, 2)}", (mean, sd),
                ),
                Cell(plain(cell["epochs"], 3), "", (as_finite(cell["epochs"]),)),
                Cell("; ".join(cell["reasons"])),
            )
        )  # fmt: skip
    return Table("cells", "Cells of the study", columns, tuple(rows))
