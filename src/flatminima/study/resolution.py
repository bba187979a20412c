"""Which networks of a study the test set can tell apart at all: McNemar's test on their predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flatminima.data.splits import DataError
from flatminima.study.run_spec import DataSpec, Record
from flatminima.study.sign_error import resolved_pairs
from flatminima.study.subsets import load_subset

_LEVEL = 0.05
_ENOUGH = 0.5


@dataclass(frozen=True)
class Resolution:
    """Pairs of networks on one data set.

    Attributes:
        data: its name.
        pairs: of finished networks that were tested on the same rows.
        share: of these, how many differ in accuracy by McNemar's exact test at 5 %.
    """

    data: str
    pairs: int
    share: float

    @property
    def caution(self) -> str:
        """A sentence where most pairs cannot be told apart; empty otherwise."""
        if self.share >= _ENOUGH:
            return ""
        return (
            f"{self.data}: McNemar's test at 5 % tells {self.share:.0%} of the {self.pairs:,} pairs of networks apart; of the "
            "others the test set does not say which is better."
        )


def resolution(records: Sequence[Record], predictions: Callable[[str], bytes | None]) -> list[Resolution]:
    """One entry for each data set that is there and on which two finished networks predicted the same rows.

    Args:
        records: of a study.
        predictions: of a run's id: one byte for each test row, or ``None``.

    Cost: one product of (networks x rows) matrices and one binomial probability for each pair.
    """
    groups: dict[str, list[str]] = {}
    for record in records:
        if record.status == "finished":
            groups.setdefault(json.dumps(record.spec["data"], sort_keys=True), []).append(record.id)
    counts: dict[str, list[tuple[int, float]]] = {}
    for key, runs in groups.items():
        kept = [content for run in runs if (content := predictions(run)) is not None]
        spec = DataSpec(**json.loads(key))
        try:
            labels = load_subset(spec).test_labels.numpy()
        except DataError:  # a report can be made where the data are not
            continue
        right = [np.frombuffer(content, dtype=np.uint8) == labels for content in kept if len(content) == len(labels)]
        if len(right) > 1:
            pairs = len(right) * (len(right) - 1) // 2
            counts.setdefault(spec.name, []).append((pairs, pairs * resolved_pairs(np.stack(right), level=_LEVEL)))
    return [
        Resolution(name, pairs := sum(n for n, _ in parts), sum(told for _, told in parts) / pairs)
        for name, parts in counts.items()
    ]
