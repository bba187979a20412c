r"""An empirical minimum that SAM walks into and that generalises badly (Theorem 7).

Schliserman, Vansover-Hager and Koren, "Flat Minima and Generalization: Insights from Stochastic Convex Optimization"
(arXiv:2511.03548).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from flatminima.problems.convex_base import length, positive
from flatminima.problems.convex_columns import ColumnProblem
from flatminima.problems.convex_risk import Certificate, Check, Risk, expectation
from flatminima.problems.convex_sam_constants import Chain, Constants, Variant, constants, sam_chain
from flatminima.problems.convex_sample import Kind, Sample, event_probability

_NEGLIGIBLE = 1e-6  # of the risk: below, the bound on the trigger's share is the error


class SAMTrap(ColumnProblem):
    r"""The loss of Theorem 7: a trigger, and a chain in which every SAM step sets off the next link.

    .. math:: f(w, z) = \tfrac12 \sum_i \sum_{j \ge 2} z_i w_{ij}^2
              + \tfrac12 \sum_i \sum_{j\ge2} \bigl[w_{ij} - \delta_j (w_{i,j-1} + \lambda 1_{j=2})\bigr]_+^2
              + \tfrac\gamma2 \Bigl[\sum_i a_i(z) w_{i1} + w_a + \delta_1\Bigr]_+^2

    of fair bits, with :math:`a_i = 1` where the bit is 1 and :math:`-\varepsilon` where it is 0. With probability at least 1/e
    exactly one column is zero in all examples. The first SAM step from :math:`w_1 = 0` then touches that column's block
    alone, each further one fills its next slot with about :math:`-\eta r`, and the empirical risk ends at exactly zero while
    :math:`F(\hat w_\tau) \ge (\lfloor T/2\rfloor - 2)\,\eta^2 r^2 / 64` for every suffix average. Gradient descent stays
    below 1e-15.

    The loss depends on :math:`T, \eta` and :math:`r`: another step size or radius may be run, but no theorem speaks of it.

    Args:
        n: examples.
        steps: :math:`T`, iterates and slots of a block; at least 3.
        lr, radius: of the SAM that it is a trap for; the theorem asks for :math:`\eta r \le 1/(2\sqrt T)`.
        variant: of the constants: ``"conditioned"``, ``"corrected"`` or ``"paper"``; see
            :mod:`flatminima.problems.convex_sam_constants`. The printed ones fail for most instances.
        chain_delta: :math:`\delta_j, j \ge 4`; by default ``min(0.1, 0.4 / lr)``.
        delta_2: the first link.
        delta_3: the second: a number, or ``"sample"``: as large as this sample allows. By default as large as every sample
            allows, so that the loss does not depend on the sample.
        sample: one of ``n`` examples, or the representation of the canonical one (``"dense"`` or ``"classes"``).
        dtype: of points and losses.

    Raises:
        ValueError: a value out of range, constants that underflow (named), a sample of another size, too many columns to hold.

    Example:
        >>> f = SAMTrap(400, 64, lr=1 / 24, radius=1.5, sample="classes")
        >>> f.certify().covered, [round(f.closed_form().suffix_risk(tau), 8) for tau in (1, 32, 64)]
        (True, [0.01607552, 0.03270814, 0.05012146])
    """

    tie_breaks = ("power",)
    flatness_radius = 0.0
    smoothness = lipschitz = 6.0

    def __init__(
        self,
        n: int,
        steps: int,
        lr: float,
        radius: float,
        *,
        variant: Variant = "conditioned",
        chain_delta: float | None = None,
        delta_2: float = 0.5,
        delta_3: float | Literal["sample"] | None = None,
        sample: Sample | Kind = "dense",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(n, steps, sample, dtype)
        if self.sample.kind in ("spurious", "lazy"):
            raise ValueError(
                f"the trigger touches every column, which the {self.sample.kind} representation does not have: use 'dense' or "
                "'classes'"
            )
        n, steps = self.n, self.slots
        if steps < 3:
            raise ValueError(f"steps must be at least 3 for a chain, got {steps}")
        self.steps, self.lr, self.radius = steps, positive("lr", lr), positive("radius", radius)
        size = self._trigger_size(1.0 / (2 * n) if variant == "conditioned" else 0.5 / (steps * 2.0**n))
        bound = size if delta_3 == "sample" else math.sqrt(2.0 ** min(n, 1023) + 1.0)
        self.constants: Constants = constants(
            variant, n, steps, self.lr, self.radius, chain_delta=chain_delta, delta_2=delta_2,
            delta_3=None if delta_3 == "sample" else delta_3, size=bound, dtype=dtype,
        )  # fmt: skip
        first, second, *rest = self.constants.chain
        self._arguments = {
            "steps": steps, "lr": self.lr, "radius": self.radius, "variant": variant,
            "chain_delta": rest[0] if rest else chain_delta, "delta_2": first, "delta_3": second,
        }  # fmt: skip
        self._links = torch.tensor(self.constants.chain, dtype=dtype)
        self._shift = self.constants.chain[0] * self.constants.lam * self._root
        self._mean = self._weights @ self._share
        self._triggers = self._trigger(self.constants.epsilon)
        self.largest_loss = 0.5 * self._curvature() * (1.0 + 0.5 * self.constants.lam) ** 2

    @property
    def minimisers(self) -> dict[str, Tensor]:
        r"""``"zero risk"``: :math:`-\tfrac\lambda2 e_a`, where every loss is zero."""
        return {"zero risk": -0.5 * self.constants.lam * self.auxiliary_unit()}

    @property
    def event_probability(self) -> float:
        """That an i.i.d. sample has exactly one column of zeros; with more the run is the same, split evenly (ours)."""
        return event_probability(self.n, "one")

    # ----- the loss --------------------------------------------------------------------------------------------------

    def _trigger(self, epsilon: float) -> Tensor:
        """The coefficients of the trigger, ``(rows, classes)``."""
        return (self._share - epsilon * (1.0 - self._share)) * self._root

    def _trigger_size(self, epsilon: float) -> float:
        r""":math:`\lVert v_S\rVert`, with the auxiliary 1."""
        mean = self._weights.double() @ self._trigger(epsilon).double()
        return math.hypot(float(length(mean)), float(self._weights.sum()))

    def _loss(self) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
        k = self.constants
        loss = partial(_losses, epsilon=k.epsilon, gamma=k.gamma, delta_1=k.delta_1)
        return loss, {"links": self._links, "shift": self._shift, "root": self._root}

    def value_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`F_S` and its gradient, ``(..., d)`` to ``(...)`` and ``(..., d)``."""
        blocks, auxiliary = self.split(w)
        k, tail = self.constants, blocks[..., 1:]
        held = _links(blocks, self._links, self._shift)
        fired = (blocks[..., 0] @ self._triggers.T + auxiliary[..., None] + k.delta_1).clamp(min=0.0)
        pull = fired * self._weights
        whole = self._weights.sum(-1)
        gradient = torch.empty_like(blocks)
        gradient[..., 0] = k.gamma * (pull @ self._triggers)
        gradient[..., 1:] = self._mean[:, None] * tail + whole * held
        gradient[..., :-1] -= whole * self._links * held
        value = 0.5 * (
            (self._mean * tail.square().sum(-1)).sum(-1) + whole * held.square().sum((-1, -2))
            + k.gamma * (pull * fired).sum(-1)
        )  # fmt: skip
        return value, self.join(gradient, k.gamma * pull.sum(-1))

    def population_risk(self, w: Tensor | None = None, *, draws: int = 20_000, seed: int = 0) -> Risk:
        r""":math:`F(w)`: exact but for the trigger's share, which is bounded where that is enough, else sampled."""
        blocks, auxiliary = self.split(self._point(w).double())
        k = self.constants
        held = _links(blocks, self._links.double(), self._shift.double())
        value = float(0.25 * blocks[:, 1:].square().sum() + 0.5 * held.square().sum())
        first = blocks[:, 0] / self._root.double()
        on, off = first, -k.epsilon * first
        sizes = torch.tensor([float(size) for size in self.sample.sizes], dtype=torch.float64)
        most = float(auxiliary) + k.delta_1 + float((sizes * torch.maximum(on, off)).sum())
        bound = 0.5 * k.gamma * max(0.0, most) ** 2
        if bound == 0.0 or 0.0 < bound <= _NEGLIGIBLE * value:
            return Risk(value, bound, "bounded" if bound else "exact")
        found = expectation(
            lambda x: 0.5 * k.gamma * x.clamp(min=0.0).square(), float(auxiliary) + k.delta_1, self.sample.sizes,
            on, off, draws=draws, seed=seed,
        )  # fmt: skip
        return Risk(value + found.value, found.error, found.kind, found.draws)

    # ----- the theorem -----------------------------------------------------------------------------------------------

    @cached_property
    def second_iterate(self) -> Tensor:
        r""":math:`w_2`: the first SAM step, from real gradients."""
        gradient = self.gradient()
        ascended = self.start + gradient * (self.radius / length(gradient))
        return self.start - self.lr * self.gradient(ascended)

    def closed_form(self) -> Chain:
        """SAM's run in the block of the spurious column, if :meth:`certify` is ``ok``.

        Raises:
            ValueError: the sample has not exactly one column of zeros, or an example was left out.
        """
        if self.sample.counted < 1.0:
            raise ValueError(
                "the closed form is for a whole sample, and an example was left out of this one, which may have freed "
                "other columns: run sam(problem, lr=..., radius=..., steps=...)"
            )
        if len(self.sample.zeros) != 1:
            raise ValueError(f"the closed form is for one column of zeros, and the sample has {len(self.sample.zeros)}")
        return sam_chain(self.lr, self.radius, self.constants.chain, self._sigma())

    def _sigma(self) -> float:
        r""":math:`\sigma = \eta\delta_2 (r\varepsilon / \lVert v_S\rVert - \lambda)`, minus slot 2 of :math:`w_2`."""
        k = self.constants
        return self.lr * k.chain[0] * (self.radius * k.epsilon / self._trigger_size(k.epsilon) - k.lam)

    def floor(self) -> float:
        r"""The proved bound :math:`(\lfloor T/2\rfloor - 2)\,\eta^2 r^2 / 64` below the risk of every suffix average.

        If :meth:`certify` is ``ok``.
        """
        return (self.steps // 2 - 2) * (self.lr * self.radius) ** 2 / 64.0

    def certify(self, *, epsilon: float = 0.0) -> Certificate:
        r"""Whether the proof holds for this sample and these constants (Lemmas 7 and 8), and the theorem's hypotheses.

        Args:
            epsilon: added to the norm of the gradient by the SAM that is to be run, as many implementations do; it must not
                take more than a thousandth of the first perturbation.

        Cost: 3 gradients.
        """
        epsilon = positive("epsilon", epsilon, zero=True)
        k, w = self.constants, self.second_iterate
        blocks, auxiliary = self.split(w)
        zeros, reach = list(self.sample.zeros), self.lr * self.radius
        others = torch.ones(len(blocks), dtype=torch.bool)
        others[zeros] = False
        fired = float((blocks[:, 0] @ self._triggers.T + auxiliary + k.delta_1).max())
        first = float((blocks[others, 0] / self._root[others]).min()) if bool(others.any()) else 0.0
        rest = float(blocks[others][:, 1:].abs().max()) if bool(others.any()) else 0.0
        beyond = float(blocks[zeros][:, 2:].abs().max()) if zeros else 0.0
        start = float(blocks[zeros][:, :2].abs().max()) if zeros else math.nan
        size = float(length(self.gradient()))
        strongest, slack = self._sigma() / (2.0 * reach), 1.0 + 1e-12
        return Certificate(
            (
                Check("no example is left out", self.sample.counted == 1.0, self.sample.counted, 1.0),
                Check("exactly one column of zeros", len(zeros) == 1, len(zeros), 1),
                Check("the trigger is off", fired <= 0.0, fired, 0.0),
                Check("no other block passes -lambda", first > -k.lam, first / k.lam, -1.0),
                Check("no other block has begun", rest == 0.0, rest, 0.0),
                Check("no slot beyond the second is in use", beyond == 0.0, beyond, 0.0),
                Check("the first two slots are at most lr r", start <= reach, start, reach),
                Check("delta_3 <= sigma / (2 lr r)", k.chain[1] <= strongest * slack, k.chain[1], strongest),
                Check("the links are weak", max(k.chain[2:], default=0.0) <= min(0.25, 0.45 / self.lr),
                      max(k.chain[2:], default=0.0), min(0.25, 0.45 / self.lr)),
                Check("the gradient outweighs epsilon", epsilon <= 1e-3 * size, epsilon, 1e-3 * size),
                Check("n >= 6", self.n >= 6, self.n, 6, True),
                Check("T >= 6", self.steps >= 6, self.steps, 6, True),
                Check("lr r <= 1 / (2 sqrt T)", reach <= slack / (2 * math.sqrt(self.steps)), reach,
                      1 / (2 * math.sqrt(self.steps)), True),
            )
        )  # fmt: skip

    def _curvature(self) -> float:
        strongest = max(self.constants.chain)
        return min(self.smoothness, 1 + (1 + strongest) ** 2 + self.constants.gamma * (2.0 ** min(self.n, 1023) + 1))


def _links(blocks: Tensor, links: Tensor, shift: Tensor) -> Tensor:
    """The residuals of the chain, at least zero, ``(..., classes, slots - 1)``."""
    residual = blocks[..., 1:] - links * blocks[..., :-1]
    first = residual[..., :1] - shift[:, None]
    return torch.cat([first, residual[..., 1:]], -1).clamp(min=0.0)


def _losses(
    blocks: Tensor, auxiliary: Tensor, share: Tensor, links: Tensor, shift: Tensor, root: Tensor,
    *, epsilon: float, gamma: float, delta_1: float,
) -> Tensor:  # fmt: skip
    held = _links(blocks, links, shift)
    trigger = (share - epsilon * (1.0 - share)) * root
    fired = (blocks[..., 0] @ trigger.T + auxiliary[..., None] + delta_1).clamp(min=0.0)
    spread = blocks[..., 1:].square().sum(-1) @ share.T
    return 0.5 * (spread + held.square().sum((-1, -2))[..., None] + gamma * fired.square())
