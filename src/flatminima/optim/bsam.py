r"""bSAM: sharpness-aware minimisation as a relaxation of Bayes.

Möllenhoff and Khan, "SAM as an Optimal Relaxation of Bayes" (2023), in the order of the authors' code. A Gaussian
posterior with mean :math:`w` and diagonal precision :math:`N s`; with noise :math:`e \sim N(0, 1)` and damping :math:`\gamma`,

.. math:: g = \nabla L\bigl(w + e / \sqrt{N s}\bigr), \qquad g_\epsilon = \nabla L(w + \rho\, g / s),
.. math:: m \leftarrow \beta_1 m + (1-\beta_1)(g_\epsilon + \delta w), \qquad w \leftarrow w - \mathrm{lr}\; m / s, \qquad
          s \leftarrow \beta_2 s + (1-\beta_2)\bigl(\sqrt{s}\,|g| + \gamma + \delta\bigr).

The update uses the precision before it is renewed, and noise and perturbation both start from the mean. There is no bias
correction. Cost: 2 gradients a step and micro-batch. Memory: two copies of the parameters (m, s) and two in passing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.optim.closures import Work, evaluate, only_initialises, outside_inference_mode
from flatminima.optim.passes import Passes, weighted
from flatminima.perturbation import Perturbation, marked
from flatminima.sharding import is_sharded
from flatminima.vectors import dense, norm

Groups = list[tuple[dict[str, Any], Tensor]]  # each parameter with its group


class BSAM(torch.optim.Optimizer):
    """Mean and precision of the weights, learnt together.

    Args:
        params: as of any optimiser.
        rows: N, the number of training examples: the posterior narrows with it.
        lr, betas, weight_decay, rho, damping: see the module; ``weight_decay`` is the precision of the prior divided by N.
        initial_precision: s at the start.
        model: when given, running statistics come from the first pass only.
        replay_rng: both passes draw the same dropout masks.
        seed: with the number of steps it decides the noise.

    Raises:
        ValueError: a value outside of its range; parameters that are sharded, complex or of half precision.

    A gradient that is not finite skips the step and is counted in :attr:`skipped`. The learnt standard deviation of a weight
    is :math:`1 / \\sqrt{N s}`, with s in ``opt.state[p]["precision"]``.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> opt = BSAM(model.parameters(), rows=100, lr=0.1)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, 1)
        >>> opt.step(lambda: nn.functional.mse_loss(model(x), y)).shape
        torch.Size([])
    """

    def __init__(
        self,
        params: Iterable[Any],
        rows: int,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        rho: float = 0.05,
        damping: float = 0.1,
        initial_precision: float = 1.0,
        *,
        model: nn.Module | None = None,
        replay_rng: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "rho": rho, "damping": damping}
        super().__init__(params, {**defaults, "initial_precision": initial_precision, "rows": rows, "steps": 0})
        self.skipped = 0
        self._seed = seed
        self._passes = Passes(model, replay_rng)
        self._perturbation = Perturbation()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with values of its own where it brings any; raises as the constructor does and adds nothing then."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks and the patches of schedulers, which are functions of this process."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_") and k != "step"}

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | Sequence[Callable[[], Tensor]] | None = None,
        *,
        weights: Sequence[float] | None = None,
    ) -> Tensor:
        """One step; several closures are micro-batches, each with noise and perturbation of its own.

        Returns:
            The loss at the noisy weights.
        """
        groups = [(group, p) for group in self.param_groups for p in group["params"] if p.requires_grad]
        if only_initialises(closure, self.param_groups):
            self._initialise(groups)
            return torch.zeros(())
        work = Work.checked(closure, weights)
        why = next(filter(None, (marked(p) for _, p in groups)), None)
        if why is not None:
            raise RuntimeError(f"step() was called while {why}")
        with outside_inference_mode():
            return self._step(work, groups)

    def _initialise(self, groups: Groups) -> None:
        for group, p in groups:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                self.state[p]["precision"] = torch.full_like(p, group["initial_precision"])

    def _step(self, work: Work, groups: Groups) -> Tensor:
        parameters = [p for _, p in groups]
        self._initialise(groups)
        precision = [self.state[p]["precision"] for p in parameters]
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.param_groups[0]["steps"])
        losses: list[Tensor] = []
        slope = [torch.zeros_like(p) for p in parameters]
        curvature = [torch.zeros_like(p) for p in parameters]
        seen: list[bool] = [False] * len(parameters)
        for closure, share in zip(work.closures, work.weights, strict=True):
            self._passes.remember(parameters)
            noise = [
                torch.randn(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), generator=generator)
                for p in parameters
            ]
            with torch.no_grad():
                spread = [
                    e.to(p.device, p.dtype) / (g["rows"] * s).sqrt()
                    for e, (g, p), s in zip(noise, groups, precision, strict=True)
                ]
            with self._perturbation as away:
                away.move(parameters, spread)
                losses.append(evaluate(closure, parameters))
            # Data-parallel training may let gradients live in its buckets, which the second pass overwrites.
            noisy = [None if g is None else g.clone() if g._is_view() else g for g in _gradients(parameters)]
            with self._perturbation as away, self._passes.statistics_kept():
                if math.isfinite(norm([g for g in noisy if g is not None])):
                    moved = [i for i, g in enumerate(noisy) if g is not None]
                    with torch.no_grad():
                        ascent = [noisy[i] / precision[i] * groups[i][0]["rho"] for i in moved]
                    away.move([parameters[i] for i in moved], ascent)
                self._passes.replay()
                evaluate(closure, parameters)
            with torch.no_grad():
                for i, (g, there) in enumerate(zip(noisy, _gradients(parameters), strict=True)):
                    if g is not None:
                        curvature[i] += share * g.abs() * precision[i].sqrt()
                    if there is not None:
                        slope[i] += share * there
                        seen[i] = True
        self._update(groups, slope, curvature, seen)
        return weighted(losses, work.weights)

    @torch.no_grad()
    def _update(
        self,
        groups: Groups,
        slope: list[Tensor],
        curvature: list[Tensor],
        seen: list[bool],
    ) -> None:
        for group in self.param_groups:
            group["steps"] += 1
        if not math.isfinite(norm([*slope, *curvature])):
            self.skipped += 1
            return
        for (group, p), g, h, present in zip(groups, slope, curvature, seen, strict=True):
            if not present:
                continue
            m, s, (beta1, beta2) = self.state[p]["momentum"], self.state[p]["precision"], group["betas"]
            m.mul_(beta1).add_(g + group["weight_decay"] * p, alpha=1 - beta1)
            p.addcdiv_(m, s, value=-float(group["lr"]))
            s.mul_(beta2).add_(h + group["damping"] + group["weight_decay"], alpha=1 - beta2)


def _check(group: dict[str, Any]) -> None:
    """Refuse a group with a value outside of its range, or parameters whose precision cannot be learnt."""
    if not (isinstance(group["rows"], int) and group["rows"] >= 1):
        raise ValueError(f"rows is the number of training examples, an integer >= 1, got {group['rows']!r}")
    for name in ("lr", "weight_decay", "rho", "damping"):
        if not (math.isfinite(group[name]) and group[name] >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {group[name]}")
    if not (math.isfinite(group["initial_precision"]) and group["initial_precision"] > 0):
        raise ValueError(f"initial_precision must be finite and > 0, got {group['initial_precision']}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
    for p in group["params"]:
        if p.dtype.itemsize < 4 or p.is_complex() or is_sharded(p):
            raise ValueError(
                f"bSAM learns a precision for every weight, in the weight's own dtype: it takes whole real parameters of "
                f"single precision or more, got {p.dtype} {'sharded ' if is_sharded(p) else ''}of shape {tuple(p.shape)}. "
                "Keep float32 weights and use autocast"
            )


def _gradients(parameters: Sequence[Tensor]) -> list[Any]:
    return [None if p.grad is None else dense(p.grad) for p in parameters]
