"""The claims of a paper beside what an experiment found: one table for all experiments that resume by tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatminima.report.numbers import plain
from flatminima.report.tables import Cell, Column, Table


def verdicts_table(results: Mapping[str, Any]) -> Table:
    """What the paper says, what these runs say, and the verdict; a row for each of ``results["claims"]``."""
    rows = []
    for claim in results["claims"]:
        measured = "; ".join(f"{name}: {_value(value)}" for name, value in claim["measured"].items())
        given = "; ".join(f"{name} {_value(value)}" for name, value in claim["parameters"].items())
        tone = "good" if claim["reproduced"] else "bad"
        rows.append((Cell(claim["statement"], given), Cell(measured), Cell(claim["verdict"], tone=tone)))
    columns = (Column("The paper", "", False), Column("These runs", "", False), Column("Verdict", "", False))
    return Table("claims", "Claims", columns, tuple(rows))


def _value(value: Any) -> str:
    return plain(value, 3) if isinstance(value, float) else str(value)
