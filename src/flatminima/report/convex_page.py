"""The page of the convex reproduction: self-contained, like every report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatminima.report import convex_plots as plots
from flatminima.report.numbers import MISSING, plain, with_error
from flatminima.report.page import Key
from flatminima.report.reproduction import check_schema, render_reproduction
from flatminima.report.tables import Cell, Column, Table

_QUESTION = "Can a flat minimum be bad, can SAM walk into it, and what does stability still guarantee?"
_TONES = {"in the trap": "bad", "out": "good", "partly": "", "at no minimum": ""}


def render_convex(results: Mapping[str, Any]) -> str:
    """Render the results of ``flatminima reproduce convex`` as one HTML page.

    Args:
        results: what :func:`flatminima.protocols.reproduce_convex` returns.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_convex({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    check_schema(results)
    curves, bounds = results["curves"], results["bounds"]
    cells = [cell for row in bounds for cell in row["cells"]]
    return render_reproduction(
        "convex.html",
        results,
        question=_QUESTION,
        source="Schliserman, Vansover-Hager and Koren (arXiv:2511.03548)",
        contents=[
            ("minima", "Flat and sharp"),
            ("sagd", "The trap of SA-GD"),
            ("sharp", "The sharpest minimum"),
            ("sam", "The trap of SAM"),
            ("bounds", "What is guaranteed"),
            ("zoo", "Who falls"),
            ("errata", "Errata"),
            ("setup", "Setup"),
        ],
        facts=[
            ("Samples", str(results["settings"]["runs_per_variant"]), "of each variant of the constants"),
            ("Bounds", str(len(cells)), f"hold; {sum(cell['vacuous'] for cell in cells)} of them vacuous"),
            ("Methods", str(len(results["zoo"]["rows"])), "on four problems"),
        ],
        keys={
            "ties": [
                Key(label, plots.TIE_COLOURS[rule], "circle")
                for rule, label in {
                    "adversarial": "the adversary", "auxiliary": "the auxiliary axis", "uniform": "uniform, exact",
                    "power": "power iteration",
                }.items()
            ],
            "suffixes": [
                Key("adversarial SA-GD, SAM", plots.FALLS, "circle"), Key("uniform ties", plots.UNIFORM, "circle"),
                Key("auxiliary ties, gradient descent", plots.HARMLESS, "circle"),
                Key("SAM with the printed constants", plots.PRINTED, "circle"),
            ],
            "run": [
                Key("iterate", plots.FALLS, "circle"), Key("mean of all so far", plots.UNIFORM, "circle"),
                *(
                    Key(f"mean from {share} of the run on", index, "circle")
                    for share, index in zip("¾½¼", plots.SUFFIX_COLOURS.values(), strict=True)
                ),
            ],
            "axis": [
                Key("gradient descent", plots.HARMLESS, "circle"), Key("SAM", plots.FALLS, "circle"),
                Key("SA-GD", plots.UNIFORM, "circle"),
            ],
            "variants": [Key(name, index, "circle") for name, index in plots.VARIANT_COLOURS.items()],
            "bounds": [
                Key("measured", 3, "triangle-up"), Key("bound, our constants", 1, "square"),
                Key("bound, the paper's constants", 4, "circle"),
            ],
        },
        tables={
            "ties": tie_table(results["ties"]),
            "epsilons": epsilon_table(results["constants"]["epsilons"]),
            "grid": grid_table(results["constants"]["grid"]),
            "bounds": bound_table(bounds),
            "zoo": zoo_table(results["zoo"]),
        },
        plots={
            "planes": plots.planes(curves["planes"]),
            "suffixes": plots.suffix_risks(curves["suffixes"]),
            "run": plots.along_the_run(curves["suffixes"]),
            "every": plots.every_suffix(curves["suffixes"]),
            "ties": plots.tie_breaking(results["ties"]),
            "oscillation": plots.oscillation(curves["oscillation"]),
            "axis": plots.one_dimension(curves["one_dimension"]),
            "chain": plots.chain(curves["chain"]),
            "margins": plots.margins(curves["margins"]),
            "bounds": plots.bounds(bounds),
        },
    )  # fmt: skip


def tie_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Theorem 3 with every rule of breaking ties."""
    columns = (
        Column("Ties are broken by", "start", False), Column("τ = 1", "population risk"), Column("τ = T/2"),
        Column("τ = T"), Column("Largest risk in the ball", "first step → last"),
    )  # fmt: skip
    body = []
    for row in rows:
        steps = len(row["risks"])
        cells = [
            Cell(with_error(row["risks"][tau - 1], row["errors"][tau - 1]), "", (row["risks"][tau - 1],))
            for tau in (1, steps // 2, steps)
        ]
        seen = Cell(f"{plain(row['first'], 4)} → {plain(row['last'], 4)}", "", (row["first"], row["last"]))
        body.append((Cell(row["label"], f"start {row['start']}"), *cells, seen))
    return Table("ties", "Theorem 3 rests on tie-breaking", columns, tuple(body))


def epsilon_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What an epsilon in SAM's denominator does."""
    columns = (
        Column("Constants", "n, T", False), Column("First gradient"),
        *(Column(f"ε = {cell['epsilon']:g}", "F(ŵ₁)") for cell in rows[0]["values"]),
    )  # fmt: skip
    body = []
    for row in rows:
        cells = [
            Cell(_small(v["risk"], 4), "", (v["risk"],), "warned" if v["warned"] else "", "bad" if v["warned"] else "")
            for v in row["values"]
        ]
        body.append(
            (Cell(row["variant"], f"n = {row['n']}, T = {row['steps']}"), Cell(plain(row["gradient"], 2)), *cells)
        )
    return Table("epsilons", "An epsilon in SAM's denominator", columns, tuple(body))


def grid_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The failures of every variant of the constants, by size and step size."""
    rates = list(dict.fromkeys(row["lr"] for row in rows))
    columns = (
        Column("Constants", "examples", False), *(Column(f"η = {rate:.4g}", "failures of runs") for rate in rates)
    )  # fmt: skip
    found: dict[tuple[str, int], list[Cell]] = {}
    for row in rows:
        failed = max(row["certificate"], row["run"])
        cell = Cell(f"{failed} of {row['runs']}", "", (failed, row["runs"]), tone="bad" if failed else "good")
        found.setdefault((row["variant"], row["n"]), []).append(cell)
    body = [(Cell(variant, f"n = {n}"), *cells) for (variant, n), cells in found.items()]
    return Table("grid", "Which constants hold on which samples", columns, tuple(body))


def bound_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every measured quantity beside its bound."""
    columns = (
        Column("Experiment", "", False), Column("Quantity", "constants", False), Column("Measured"), Column("Bound"),
        Column("Verdict", "", False),
    )  # fmt: skip
    body = []
    for row in rows:
        problem = {"DeadZoneRegression": "dead-zone regression"}.get(row["problem"], row["problem"])
        settings = f"{problem}, η = {row['lr']:.4g}, r = {row['radius']:g}, ρ = {row['flatness_radius']:g}"
        name = Cell(f"{row['method']}, n = {row['n']}, T = {row['steps']}", settings)
        for cell in row["cells"]:
            holds = cell["measured"] <= cell["bound"]
            word = ("holds, vacuous" if cell["vacuous"] else "holds") if holds else "violated"
            body.append(
                (
                    name, Cell(cell["quantity"], {"paper": "the paper's", "tight": "ours"}[cell["kind"]]),
                    Cell(with_error(cell["measured"], cell["error"]) if cell["measured"] else "0", "", (cell["measured"],)),
                    Cell(plain(cell["bound"], 3), "", (cell["bound"],)),
                    Cell(word, tone="bad" if not holds else "" if cell["vacuous"] else "good"),
                )
            )  # fmt: skip
            name = Cell("″")
    return Table("bounds", "Every bound", columns, tuple(body))


def zoo_table(zoo: Mapping[str, Any]) -> Table:
    """Who falls into which trap: the quantity at the end, the verdict, and what decides it."""
    heads = [
        Column(trap["title"][0].upper() + trap["title"][1:], f"{trap['name']}; {_QUANTITY[trap['quantity']]}")
        for trap in zoo["traps"]
    ]
    body = []
    for row in zoo["rows"]:
        cells = []
        for cell in row["cells"]:
            if cell is None:
                cells.append(Cell(MISSING, "no such rule here"))
                continue
            value = _small(cell["value"], 3)
            why = "measured" if cell["why"] == "measurement" else "covered"
            cells.append(Cell(value, why, (cell["value"],), cell["verdict"], _TONES[cell["verdict"]]))
        body.append((Cell(row["label"]), *cells))
    return Table("zoo", "Who falls into which trap", (Column("Method", "", False), *heads), tuple(body))


def _small(value: float, digits: int) -> str:
    return "0" if value < 1e-12 else plain(value, digits)


_QUANTITY = {"risk": "population risk", "sharpness": "excess of the sharpness-aware risk"}
