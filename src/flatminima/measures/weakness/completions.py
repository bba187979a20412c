r"""What random completions say about the probes: label frequencies, their entropy, and how many labelings were met.

A completion is drawn uniformly from the directions of the version space (:mod:`.cone`). Everything counted from a
sample is bounded from one side only, and said to be: a labeling that was not met may exist, so the number of distinct
labelings and Chao's estimate from it are *lower* bounds of the number of labelings (Chao, 1984, in expectation), and
the plug-in entropy of whole labelings is a lower bound of theirs, which the sum of the entropies of single probes
bounds from above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from flatminima.measures.mcmc import effective_draws, split_r_hat
from flatminima.measures.weakness.cone import PATH, Cone, covariance
from flatminima.measures.weakness.decisions import Decider, one_thread
from flatminima.measures.weakness.features import ArrayLike, FeatureError, FloatArray, IntArray
from flatminima.measures.weakness.frame import FeatureProblem

_WARMUP = (80, 40)  # paths of each chain in the rounds in which the shape of the version space is learned
_AGREE = 1.01
_ENOUGH = 400.0


@dataclass(frozen=True, eq=False)
class Completions:
    """A sample of completions, looked at from the probes.

    Attributes:
        frequencies: share of completions in which each class wins at each probe, ``(m, K)``.
        entropies: of each row, in nats, ``(m,)``.
        errors: standard error of each entropy, over chains.
        mean_entropy: over the probes.
        mean_entropy_error: its standard error, over chains.
        joint_entropy: plug-in entropy of whole labelings: a lower bound, at most the log of the number of draws.
        joint_entropy_bound: sum of the entropies of the probes, an upper bound up to sampling error.
        distinct: labelings met; a lower bound of their number.
        chao1: Chao's estimate of their number; a lower bound in expectation, up to the dependence of successive draws.
        rhat: largest split R-hat over the scores of all probes.
        ess: smallest effective sample size over the same.
        draws: completions drawn, all chains together.
        given_up: paths that were reflected too often to be followed, and counted as no move.
    """

    frequencies: FloatArray
    entropies: FloatArray
    errors: FloatArray
    mean_entropy: float
    mean_entropy_error: float
    joint_entropy: float
    joint_entropy_bound: float
    distinct: int
    chao1: float
    rhat: float
    ess: float
    draws: int
    given_up: int

    @property
    def converged(self) -> bool:
        """Whether the chains agree (R-hat below 1.01) and are worth 400 independent draws."""
        return self.rhat < _AGREE and self.ess > _ENOUGH


def sample_completions(
    train: ArrayLike,
    labels: ArrayLike,
    probes: ArrayLike,
    *,
    classes: int | None = None,
    chains: int = 8,
    draws: int = 250,
    paths: int = 1,
    seed: int = 0,
) -> Completions:
    """Draw completions of the training labels and record which class each gives to the probes.

    Unchanged by invertible affine maps of feature space, up to the random draws.

    Args:
        train: features of the training points, ``(n, d)``.
        labels: their classes.
        probes: features of the probes, ``(m, d)``.
        classes: K; by default the largest label plus one.
        chains: at least 4, from different starts.
        draws: kept from each chain, at least 4.
        paths: walks between kept draws.
        seed: the same seed gives the same bits on the same machine.

    Raises:
        FeatureError: as :func:`flatminima.measures.weakness.pair_proxy`; too few chains or draws; training labels that
            contradict each other (there is no completion).

    Cost: no gradients; ten seconds for n = 250, K = 10, d = 8.

    Example:
        >>> found = sample_completions([[-1.0], [1.0]], [0, 1], [[-3.0], [0.0], [3.0]], seed=0)
        >>> found.frequencies[2].tolist(), float(found.entropies[2]), found.distinct      # beyond 1 there is no choice
        ([0.0, 1.0], 0.0, 2)
        >>> bool(abs(found.frequencies[1, 0] - 0.5) < 0.05)                               # half way it is even
        True
    """
    if chains < 4 or draws < 4:
        raise FeatureError(f"expected at least 4 chains and 4 draws of each, got {chains} and {draws}")
    if paths < 1:
        raise FeatureError(f"paths must be at least 1, got {paths}")
    problem = FeatureProblem.of(train, labels, probes, classes)
    with one_thread():
        decider = Decider(problem)
        if not decider.train():
            reason = decider.conflict.explain() if decider.conflict is not None else decider.trouble
            raise FeatureError(f"there is no completion to draw: {reason}")
        cone = Cone(problem.whiten(problem.z_train), problem.labels, problem.classes)
        rng = np.random.default_rng(seed)
        u, shape = _warm_up(cone, _starts(cone, decider.centre, chains, rng), rng)
        x = problem.whiten(problem.z_probes)
        series = np.empty((chains, draws, len(x), problem.classes))
        given_up = 0
        for i in range(draws):
            for _ in range(paths):
                u, lost = cone.walk(u, 0.0, PATH * math.sqrt(cone.size), shape, rng)
                given_up += lost
            scores = np.matmul(x, cone.weights(u).transpose(0, 2, 1))
            series[:, i] = scores / np.linalg.norm(u, axis=1)[:, None, None]
    return _summary(series, given_up)


def _starts(cone: Cone, centre: FloatArray, chains: int, rng: np.random.Generator) -> FloatArray:
    """Points spread over the version space: from its centre half the way to a wall in random directions."""
    middle = cone.coordinates(centre)
    middle *= 0.5 / np.linalg.norm(middle)
    lines = rng.standard_normal((chains, cone.size))
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    fall = (-cone.margins(lines, own=0.0) / cone.margins(middle[None])).max((1, 2))
    reach = np.minimum(0.5, 1.0 / np.maximum(fall, 1e-300))  # 0.5: to the sphere
    starts: FloatArray = middle + 0.5 * reach[:, None] * lines
    return starts


def _warm_up(cone: Cone, u: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Chains that have forgotten their starts, and the covariance of the body."""
    shape = cone.barrier_shape(u.mean(0))
    length = 2.0  # in the metric of the barrier, whose ellipsoid is much larger than one deviation
    for draws in _WARMUP:
        seen = []
        for _ in range(draws):
            u, _ = cone.walk(u, 0.0, length, shape, rng)
            seen.append(u)
        seen = seen[len(seen) // 4 :]
        found = np.concatenate(seen)
        scale = np.trace(np.cov(found.T)) / np.trace(shape)
        shape, length = covariance(found, shape * scale), PATH * math.sqrt(cone.size)
    return u, shape


def _summary(series: FloatArray, given_up: int) -> Completions:
    chains, draws, m, classes = series.shape
    winner = series.argmax(3)
    each = np.stack([_frequencies(winner[i], classes) for i in range(chains)])
    frequencies = each.mean(0)
    entropies = _entropy(frequencies)
    per_chain = _entropy(each)
    flat = winner.reshape(chains * draws, m)
    counts = np.unique(flat, axis=0, return_counts=True)[1]
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    shares = counts / len(flat)
    centred = (series - series.mean(3, keepdims=True)).reshape(chains, draws, m * classes)
    quantities = torch.from_numpy(centred).permute(2, 0, 1)
    return Completions(
        frequencies=frequencies,
        entropies=entropies,
        errors=per_chain.std(0, ddof=1) / math.sqrt(chains),
        mean_entropy=float(entropies.mean()),
        mean_entropy_error=float(per_chain.mean(1).std(ddof=1) / math.sqrt(chains)),
        joint_entropy=float(-(shares * np.log(shares)).sum()),
        joint_entropy_bound=float(entropies.sum()),
        distinct=len(counts),
        chao1=len(counts) + once * (once - 1) / (2.0 * (twice + 1)),
        rhat=max(split_r_hat(q) for q in quantities),
        ess=min(effective_draws(q) for q in quantities),
        draws=len(flat),
        given_up=given_up,
    )


def _frequencies(winner: IntArray, classes: int) -> FloatArray:
    shares: FloatArray = np.stack([(winner == k).mean(0) for k in range(classes)], axis=1)
    return shares


def _entropy(frequencies: FloatArray) -> FloatArray:
    positive = np.where(frequencies > 0, frequencies, 1.0)
    entropy: FloatArray = (positive * -np.log(positive)).sum(-1)
    return entropy
