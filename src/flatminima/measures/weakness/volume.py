r"""How large the version space is: the share of all directions of a last layer that give every training point its label.

That share is far too small to be hit by chance (e^-100 and less), so it is a product of conditional shares,

.. math:: P(M \ge 0) = P(M \ge -\gamma_1) \prod_t P(M \ge -\gamma_{t+1} \mid M \ge -\gamma_t), \qquad \gamma_1 >
\gamma_2 > \dots > 0,

M the smallest margin of weights that are uniform in a ball, with levels chosen so that each factor is about a quarter,
and particles that walk inside each level (multilevel splitting; Kahn and Harris, 1951; for linear constraints Gessner,
Kanjilal and Hennig, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flatminima.measures.weakness.cone import PATH, Cone, covariance, uniform_ball
from flatminima.measures.weakness.decisions import Decider, one_thread
from flatminima.measures.weakness.features import ArrayLike, FeatureError, FloatArray
from flatminima.measures.weakness.frame import FeatureProblem

_SHARE = 0.25  # of the particles that a level keeps
_MOST_LEVELS = 2000


@dataclass(frozen=True)
class VersionSpaceVolume:
    """Log of the share of directions, with its error.

    Attributes:
        log_volume: mean over the runs of the logarithm, in nats; ``-inf`` where the training labels contradict each
            other.
        error: standard error over the runs. A logarithm of an unbiased estimate is biased downwards (Jensen), by about
            half its variance: read the value as a lower bound in the mean.
        runs: the value of each run.
        levels: number of factors.
    """

    log_volume: float
    error: float
    runs: tuple[float, ...]
    levels: int


def version_space_volume(
    train: ArrayLike,
    labels: ArrayLike,
    probes: ArrayLike | None = None,
    *,
    classes: int | None = None,
    particles: int = 256,
    paths: int = 1,
    runs: int = 4,
    seed: int = 0,
) -> VersionSpaceVolume:
    """Log of the share of random last layers that give every training point its label.

    Unchanged by invertible affine maps of feature space: "random" means isotropic in the coordinates in which the
    points have mean 0 and covariance 1. A first pass chooses the levels; the runs then use them as fixed, so that each
    is an unbiased estimate of the share once the particles have mixed. Whether they have is seen by raising ``paths``:
    the value must not move.

    Args:
        train: features of the training points, ``(n, d)``.
        labels: their classes.
        probes: further points that define the coordinates; the training points alone by default.
        classes: K; by default the largest label plus one.
        particles: at least 16.
        paths: walks of each particle in a level.
        runs: independent passes, at least 2.
        seed: the same seed gives the same bits on the same machine.

    Raises:
        FeatureError: as :func:`flatminima.measures.weakness.pair_proxy`; too few particles, paths or runs.

    Cost: no gradients; a minute or two for n = 250, K = 10, d = 8.

    Example:
        >>> import math
        >>> found = version_space_volume([[-1.0], [1.0]], [0, 1], seed=1)          # a quarter of all lines
        >>> abs(found.log_volume - math.log(0.25)) < 4 * found.error + 0.02
        True
    """
    if particles < 16 or paths < 1 or runs < 2:
        raise FeatureError(f"expected particles >= 16, paths >= 1 and runs >= 2, got {particles}, {paths} and {runs}")
    problem = FeatureProblem.of(train, labels, train if probes is None else probes, classes)
    with one_thread():
        decider = Decider(problem, search=False)
        if not decider.train():
            if decider.conflict is None:
                raise FeatureError(decider.trouble)
            return VersionSpaceVolume(-np.inf, 0.0, (-np.inf,) * runs, 0)
        cone = Cone(problem.whiten(problem.z_train), problem.labels, problem.classes)
        streams = np.random.default_rng(seed).spawn(runs + 1)
        levels, shapes, _ = _descend(cone, particles, paths, streams[0])
        passes = [_descend(cone, particles, paths, rng, levels, shapes)[2] for rng in streams[1:]]
    error = float(np.std(passes, ddof=1) / np.sqrt(runs)) if np.isfinite(passes).all() else float("inf")
    return VersionSpaceVolume(float(np.mean(passes)), error, tuple(passes), len(levels))


def _descend(
    cone: Cone,
    particles: int,
    paths: int,
    rng: np.random.Generator,
    given: list[float] | None = None,
    shapes: list[FloatArray] | None = None,
) -> tuple[list[float], list[FloatArray], float]:
    """From the whole ball to the version space: levels, the shape of the body at each, and the log of its share.

    Without given levels and shapes they are chosen on the way.
    """
    u = uniform_ball(particles, cone.size, rng)
    shape = np.eye(cone.size) / (cone.size + 2.0)  # covariance of the ball
    levels: list[float] = []
    used: list[FloatArray] = []
    total = 0.0
    for t in range(_MOST_LEVELS):
        violation = -cone.margins(u).min((1, 2))
        level = given[t] if given is not None else max(float(np.quantile(violation, _SHARE)), 0.0)
        inside = u[violation <= level]
        if not len(inside):
            return levels, used, -np.inf
        total += float(np.log(len(inside) / particles))
        # The particles before the cut: four times as many, and of nearly the same shape.
        shape = shapes[t] if shapes is not None else covariance(u, shape)
        levels.append(level)
        used.append(shape)
        if level == 0.0:
            return levels, used, total
        u = inside[rng.integers(len(inside), size=particles)]
        for _ in range(paths):
            u, _ = cone.walk(u, level, PATH * np.sqrt(cone.size), shape, rng)
    raise FeatureError(f"the version space is not reached after {_MOST_LEVELS} levels: it is too thin to be measured")
