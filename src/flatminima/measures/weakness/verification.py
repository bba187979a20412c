"""Check the proofs of a pair proxy again, from the features alone, in double precision or without any rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flatminima.measures.weakness.decisions import FEASIBLE, INFEASIBLE
from flatminima.measures.weakness.proofs import (
    Certificate,
    check_certificate,
    check_witnesses,
    exact_certificate,
    wins,
)
from flatminima.measures.weakness.rational import exact_margins_positive

if TYPE_CHECKING:
    from flatminima.measures.weakness.pair_proxy import PairProxy


@dataclass(frozen=True)
class Verification:
    """What a second look at the proofs found.

    Attributes:
        pairs: decisions looked at.
        feasible: of them, feasible ones whose witness holds.
        infeasible: of them, infeasible ones whose certificate holds exactly.
        limited: infeasible ones proved up to a resolution only.
        failed: (probe, class) of the decisions whose proof does not hold; empty, unless there is a defect.
        rational: whether the arithmetic was exact.
    """

    pairs: int
    feasible: int
    infeasible: int
    limited: int
    failed: tuple[tuple[int, int], ...]
    rational: bool

    @property
    def ok(self) -> bool:
        """Whether every proof looked at holds."""
        return not self.failed


def verify(result: PairProxy, *, rational: bool = False, sample: int | None = None, seed: int = 0) -> Verification:
    """Check the witness or the certificate of every decided pair, or of a random sample of them.

    Args:
        result: of :func:`flatminima.measures.weakness.pair_proxy`.
        rational: exact arithmetic. A witness's margins are computed as integers. The multipliers of a certificate,
            which are rounded, are replaced by rational ones that satisfy the equations exactly; a certificate that has
            none is counted in ``limited``, since what it proves is its resolution. Milliseconds a proof, seconds for
            certificates with about a hundred multipliers.
        sample: look at so many pairs, drawn without replacement; all by default.
        seed: of the sample.

    Raises:
        ValueError: a sample of less than one pair.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    pairs = [(int(j), int(c)) for j, c in zip(*np.nonzero(result.feasible >= 0), strict=True)]
    if sample is not None and sample < len(pairs):
        chosen = np.random.default_rng(seed).choice(len(pairs), sample, replace=False)
        pairs = [pairs[i] for i in sorted(chosen)]
    problem = result.problem
    trained: dict[int, bool] = {}
    excluded: dict[int, str] = {}
    counts = {"feasible": 0, "exact": 0, "resolution": 0}
    failed = []
    for j, c in pairs:
        index = int(result.proof[j, c])
        if result.feasible[j, c] == FEASIBLE:
            weights = result.witnesses[index]
            if rational:
                if index not in trained:
                    trained[index] = exact_margins_positive(weights, problem.frame, problem.train, problem.labels)
                good = trained[index] and exact_margins_positive(
                    weights, problem.frame, problem.probes[j : j + 1], np.array([c])
                )
            else:
                if index not in trained:
                    trained[index] = bool(check_witnesses(problem, weights[None])[0])
                good = trained[index] and bool(wins(problem, weights, np.array([j]), np.array([c]))[0])
            kind = "feasible" if good else ""
        else:
            assert result.feasible[j, c] == INFEASIBLE
            certificate = result.conflict if result.conflict is not None else result.certificates[index]
            if index not in excluded:
                excluded[index] = _kind(result, certificate, rational)
            kind = excluded[index]
            if result.conflict is None and not _about(result, certificate, j, c):
                kind = ""
        if kind:
            counts[kind] += 1
        else:
            failed.append((j, c))
    return Verification(len(pairs), counts["feasible"], counts["exact"], counts["resolution"], tuple(failed), rational)


def _kind(result: PairProxy, certificate: Certificate, rational: bool) -> str:
    """ "exact", "resolution", or "" where the certificate proves nothing."""
    problem = result.problem
    here = certificate.points < 0
    labels = problem.labels[np.where(here, 0, certificate.points)]
    wanted = np.where(here, -1 if certificate.target is None else certificate.target, labels)
    if not (np.array_equal(certificate.winners, wanted) and (certificate.losers != certificate.winners).all()):
        return ""  # an inequality that nobody asked for
    if rational and exact_certificate(problem, certificate) is not None:
        return "exact"
    checked = check_certificate(problem, certificate)
    if checked is None:
        return ""
    return "resolution" if rational else checked.proof


def _about(result: PairProxy, certificate: Certificate, probe: int, target: int) -> bool:
    """Whether the certificate speaks of this pair, or of a probe with the same features."""
    if certificate.target != target or certificate.probe is None:
        return False
    features = result.problem.probes
    return bool(np.array_equal(features[certificate.probe], features[probe]))
