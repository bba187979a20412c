r"""Local learning coefficient: how fast the volume around a minimum grows with the loss allowed, by Langevin sampling.

.. math:: \hat\lambda = n\beta \bigl(\mathbb{E}_{w \sim p}[L(w)] - L(w^*)\bigr), \qquad
    p(w) \propto \exp\bigl(-n\beta L(w) - \tfrac\gamma2 \lVert w - w^* \rVert^2\bigr), \qquad \beta = 1/\log n

For a regular minimum it tends to half the number of parameters, for a degenerate one to less. Lau, Furman, Wang, Murfet and
Wei, "The Local Learning Coefficient: A Singularity-Aware Complexity Measure" (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.curvature.diagonal import diagonal
from flatminima.curvature.probes import random_stream
from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.hessian import curvature_diagonal
from flatminima.measures.invariance import CHANGES_DISTANCES, KEEPS_DISTANCES
from flatminima.measures.mcmc import effective_draws, split_r_hat
from flatminima.objective import NonFiniteLossError, Objective

_ACCEPTED = 0.57  # of proposals: best for Langevin proposals (Roberts and Rosenthal 1998)
_AGREE = 1.05
_PROBES = 30


@dataclass(frozen=True)
class LocalLearningCoefficient:
    """The estimate and what its chains did.

    Attributes:
        value: the coefficient, for the given restoring force.
        error: standard error from the scatter within and between chains.
        r_hat: of the loss; above 1.05 the chains have not met and the error is not to be trusted.
        effective: independent draws that the chains are worth.
        accepted: share of proposals, 1 for plain SGLD.
        step: mean step size epsilon of the chains.
        beta: ``n * beta``.
        losses: ``(chains, draws)``.
    """

    value: float
    error: float
    r_hat: float
    effective: float
    accepted: float
    step: float
    beta: float
    losses: Tensor


def local_learning_coefficient_of(
    objective: Objective,
    *,
    chains: int = 4,
    burn_in: int = 200,
    draws: int = 400,
    localization: float = 100.0,
    step_size: float | None = None,
    curvature: Tensor | None = None,
    seed: int = 0,
) -> LocalLearningCoefficient:
    r"""Estimate the local learning coefficient at the present parameters.

    With ``step_size`` the chains are those of Lau et al., stochastic gradient Langevin dynamics with all data in every step:
    :math:`\Delta w = -\tfrac\epsilon2 \nabla U(w) + \sqrt\epsilon\, \xi`. Their stationary law is not :math:`p`: where
    :math:`U` has the curvature *k* its variance is :math:`1 / k(1 - \epsilon k/4)`, so the coefficient comes out too
    large, and for :math:`\epsilon k \ge 4` the chain diverges. Without it, steps are scaled by a fixed diagonal,
    :math:`(n\beta h + \gamma)^{-1}`, and accepted or rejected (Metropolis), which costs nothing more here and leaves *no*
    bias of the step; its size is tuned during the burn-in. What is left is the bias of :math:`\gamma`: a direction of
    curvature *h* counts :math:`\tfrac12 n\beta h / (n\beta h + \gamma)` instead of one half.

    Args:
        objective: of at least two rows; *n* is their number.
        chains, burn_in, draws: chains from the same point with different noise, and their steps.
        localization: the restoring force gamma.
        step_size: epsilon of plain SGLD, or ``None``.
        curvature: nonnegative ``(n,)``, roughly the diagonal of the Hessian, for the scaling; zero by default.
        seed: of the noise.

    Raises:
        NotApplicableError: fewer than two rows.
        ValueError: the chains diverged, with the step to blame.

    Cost: chains * (burn_in + draws) gradients.

    Example:
        >>> from flatminima.problems import Quadratic
        >>> f = Quadratic([1.0, 1.0], rows=100).objective()             # regular: two parameters, coefficient 1
        >>> found = local_learning_coefficient_of(f, localization=1e-3)
        >>> abs(found.value - 1) < 4 * found.error, found.r_hat < 1.05
        (True, True)
    """
    if objective.rows < 2:
        raise NotApplicableError(f"n * beta = n / log(n) needs at least two rows of data, got {objective.rows}")
    beta = objective.rows / math.log(objective.rows)
    scale = torch.ones(objective.n, dtype=torch.float64, device=objective.device)
    if step_size is None:
        h = torch.zeros_like(scale) if curvature is None else curvature.to(scale).clamp(min=0)
        scale = 1 / (beta * h + localization)
    start = objective.loss()
    runs = [
        _Chain(objective, beta, localization, scale, step_size, random_stream(seed, f"chain {i}")).run(burn_in, draws)
        for i in range(chains)
    ]
    losses = torch.stack([run[0] for run in runs])
    worth = effective_draws(losses)
    return LocalLearningCoefficient(
        value=beta * (float(losses.mean()) - start),
        error=beta * float(losses.std()) / math.sqrt(worth),
        r_hat=split_r_hat(losses),
        effective=worth,
        accepted=sum(run[1] for run in runs) / chains,
        step=sum(run[2] for run in runs) / chains,
        beta=beta,
        losses=losses,
    )


class _Chain:
    """One Langevin chain, with or without rejections."""

    def __init__(
        self,
        objective: Objective,
        beta: float,
        gamma: float,
        scale: Tensor,
        step: float | None,
        stream: torch.Generator,
    ) -> None:
        self.objective, self.beta, self.gamma, self.scale, self.stream = objective, beta, gamma, scale, stream
        self.exact = step is None
        # The scaled Hessian has trace n, so its top eigenvalue may be n; the cube root is the law of the best step.
        self.step = objective.n ** (-1 / 3) if step is None else step
        self.centre = objective.point().double()

    def run(self, burn_in: int, draws: int) -> tuple[Tensor, float, float]:
        """Losses of the draws, the share of proposals that were accepted, and the step size in the end."""
        at = self.centre
        energy, loss, slope = self._evaluate(at)
        losses, accepted = torch.empty(draws, dtype=torch.float64), 0.0
        for number in range(burn_in + draws):
            noise = torch.randn(len(at), dtype=torch.float64, generator=self.stream).to(at.device)
            drift = self.step / 2 * self.scale * slope
            proposal = at - drift + (self.step * self.scale).sqrt() * noise
            new_energy, new_loss, new_slope = self._evaluate(proposal)
            if not self.exact and not math.isfinite(new_energy):
                raise ValueError(
                    f"the chain diverged after {number} steps of size {self.step:g}: step_size times the curvature of "
                    "n * beta * L must stay below 4; lower it, or leave it out"
                )
            chance = self._acceptance(at, energy, slope, proposal, new_energy, new_slope) if self.exact else 1.0
            if not self.exact or float(torch.rand((), dtype=torch.float64, generator=self.stream)) < chance:
                at, energy, loss, slope = proposal, new_energy, new_loss, new_slope
            if number < burn_in:
                if self.exact:  # Robbins and Monro: the step settles while its changes shrink
                    self.step *= math.exp((chance - _ACCEPTED) / (1 + number) ** 0.6)
            else:
                losses[number - burn_in] = loss
                accepted += chance
        return losses, accepted / draws, self.step

    def _evaluate(self, at: Tensor) -> tuple[float, float, Tensor]:
        """``U``, the loss, and the gradient of ``U``."""
        try:
            loss, gradient = self.objective.loss_and_gradient(at.to(self.objective.dtype))
        except NonFiniteLossError:
            return math.inf, math.inf, torch.zeros_like(at)
        away = at - self.centre
        energy = self.beta * loss + self.gamma / 2 * float(away.square().sum())
        return energy, loss, self.beta * gradient.double() + self.gamma * away

    def _acceptance(
        self, at: Tensor, energy: float, slope: Tensor, to: Tensor, new_energy: float, new_slope: Tensor
    ) -> float:
        """Probability of the move: the ratio of the densities there and here, and of the proposals back and forth."""
        if not math.isfinite(new_energy):
            return 0.0
        metric = self.step * self.scale
        forth = float(((to - at + metric / 2 * slope).square() / metric).sum()) / 2
        back = float(((at - to + metric / 2 * new_slope).square() / metric).sum()) / 2
        return math.exp(min(0.0, energy - new_energy + forth - back))


@register(
    "local_learning_coefficient",
    "local learning coefficient",
    "Half the effective number of parameters around the minimum, by Langevin sampling; small where it is degenerate.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    cost_class="expensive",
)
def local_learning_coefficient(bench: Workbench) -> Measurement:
    """The coefficient for the restoring force ``localization``; see :func:`local_learning_coefficient_of`.

    The true coefficient (the real log canonical threshold) survives every reparameterisation; this estimate of it does not,
    because the restoring force measures distances. The error is the standard error of the chains. Cost: chains * (burn_in +
    chain_draws) gradients.
    """
    options = bench.options
    h = None
    if options.step_size is None:
        known = curvature_diagonal(bench)
        if isinstance(known, str):
            known = diagonal(bench.objective, rtol=1e-6, max_products=_PROBES, seed=bench.seed).values
        h = known
    found = local_learning_coefficient_of(
        bench.objective, chains=options.chains, burn_in=options.burn_in, draws=options.chain_draws,
        localization=options.localization, step_size=options.step_size, curvature=h, seed=bench.seed,
    )  # fmt: skip
    note = (
        f"{options.chains} chains, R-hat {found.r_hat:.3f}, worth {found.effective:.3g} draws; gamma {options.localization:g}, "
        f"n beta {found.beta:.4g}, "
        + (
            f"step {found.step:.2g} of SGLD, whose bias is not in the error"
            if options.step_size is not None
            else f"{100 * found.accepted:.3g} % of the proposals accepted, so no bias of the step"
        )
    )
    if found.value < 0:
        note += "; negative: on average the loss is lower around this point, which is no minimum"
    converged = found.r_hat < _AGREE and found.effective >= 25 * options.chains
    return Measurement("local_learning_coefficient", found.value, found.error, "standard error", converged, note=note)
