"""The document of the measures is that of the registry."""

from __future__ import annotations

import re
from pathlib import Path

from flatminima.measures import MEASURES
from flatminima.report.measure_list import SHORT, invariance_table, kinds_table
from flatminima.symmetries.kinds import KINDS

DOCUMENT = (Path(__file__).parent.parent / "docs" / "measures.md").read_text()


def test_the_tables_are_those_of_the_registry() -> None:
    assert f"{kinds_table()}\n\n{invariance_table()}\n" in DOCUMENT
    assert set(SHORT) == set(KINDS)
    assert len(set(SHORT.values())) == len(SHORT)


def test_every_measure_has_its_row_with_its_cost() -> None:
    seen: dict[str, str] = {}
    defaults = set()
    for line in DOCUMENT.split("## How to read them")[0].splitlines():
        cells = line.strip("|").split(" | ")
        names = re.findall(r"`(\w+)`", cells[0])
        if line.startswith("| `"):
            seen |= dict.fromkeys(names, cells[-1].strip())
            defaults |= set(re.findall(r"`(\w+)` \*", cells[0]))
    assert seen == {name: m.cost_class for name, m in MEASURES.items()}
    assert defaults == {name for name, m in MEASURES.items() if m.default}
