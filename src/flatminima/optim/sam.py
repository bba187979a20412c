r"""Sharpness-aware minimisation.

Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization" (2021).
One step evaluates the gradient twice: at the weights, and at the first-order maximiser of the loss in a ball around them,

.. math:: \hat\epsilon = \rho\, g / \lVert g \rVert_2, \qquad g = \nabla L(w), \qquad
          w \leftarrow \mathrm{base}\bigl(w, \nabla L(w + \hat\epsilon)\bigr).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flatminima.perturbation import Perturbation


class SAM(torch.optim.Optimizer):
    """Any optimiser, made sharpness-aware.

    It *is* an optimiser that shares its base's parameter groups, state and defaults: learning-rate schedulers work on
    it, and its checkpoint is the base's checkpoint. ``rho`` lives in each parameter group; the norm is global.

    Args:
        base_optimizer: an optimiser *instance*; it makes the update from the gradient at the perturbed weights.
        rho: radius of the ball, in units of the Euclidean norm of all parameters.
        model: when given, the running statistics of its normalisation layers come from the first pass only.
        replay_rng: both passes draw the same random numbers, hence the same dropout masks.

    Raises:
        TypeError: ``base_optimizer`` is not an optimiser instance.
        ValueError: ``rho`` is negative or not finite, or the base has a hyperparameter of that name.

    A zero gradient leaves the weights where they are for the second pass. A NaN or infinite gradient, in
    either pass, skips the update and is counted in :attr:`skipped`. The weights are restored by copy into their own
    storage, also when an exception passes through. Cost: 2 gradients a step. Memory: one copy of the parameters.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, 1)
        >>> loss = opt.step(lambda: nn.functional.mse_loss(model(x), y))
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        model: nn.Module | None = None,
        replay_rng: bool = True,
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            hint = " Build it first: SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)."
            given = base_optimizer.__name__ if isinstance(base_optimizer, type) else type(base_optimizer).__name__
            raise TypeError(f"SAM wraps an optimiser instance, got {given}.{hint}")
        if not (math.isfinite(rho) and rho >= 0):
            raise ValueError(f"rho is the radius of a ball and must be finite and >= 0, got {rho}")
        if "rho" in base_optimizer.defaults:
            raise ValueError(
                f"{type(base_optimizer).__name__} already has a hyperparameter named rho: either a SAM wraps it already, "
                "then build a fresh optimiser, or it means something else by it, as Adadelta does, then wrap another kind"
            )
        self.base = base_optimizer
        self.skipped = 0
        self._model = model
        self._replay_rng = replay_rng
        self._perturbation = Perturbation()
        base_optimizer.defaults["rho"] = rho
        # Optimizer.__init__ starts from empty groups and state; hand it the base's and put the originals back.
        state, groups = base_optimizer.state, base_optimizer.param_groups
        super().__init__(groups, base_optimizer.defaults)
        base_optimizer.state, base_optimizer.param_groups = state, groups

    # ----- one identity with the base ---------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimiser's groups, each with its own ``rho``."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimiser's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's ``state_dict``; it holds no copy of the weights."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimiser or of the bare base; groups without ``rho`` keep the present one."""
        present = [group["rho"] for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, rho in zip(self.param_groups, present, strict=True):
            group.setdefault("rho", rho)

    # ----- the step ---------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One sharpness-aware step.

        Args:
            closure: computes and returns the loss. An ordinary closure (``zero_grad``, loss, ``backward``, return) and one
                that only returns the loss both work; gradients are cleared before each pass.

        Returns:
            The loss at the clean weights.

        Raises:
            ValueError: no closure, or a closure that neither returns a loss nor computes gradients.
        """
        if closure is None:
            raise ValueError("SAM evaluates the loss twice: call step(closure) with a closure that returns the loss")
        self._remember_random_state()
        loss = self._evaluate(closure)
        with self.perturbed() as norm:
            if not math.isfinite(norm):
                self.skipped += 1
                return loss
            if norm > 0:
                self._replay_random_state()
                with self._statistics_kept():
                    self._evaluate(closure)
        if math.isfinite(self._gradient_norm()):
            self.base.step()
        else:
            self.skipped += 1
        return loss

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[float]:
        """Within the block the weights are at ``w + rho g / |g|``; yields ``|g|`` of the current gradients.

        Nothing moves when the norm is zero or not finite. Leaving the block restores every weight bit for bit.
        """
        norm = self._gradient_norm()
        with self._perturbation as away:
            if norm > 0 and math.isfinite(norm):
                moved = [(p, _dense(p.grad), group["rho"] / norm) for group, p in self._with_gradient()]
                away.move([p for p, _, _ in moved], [g for _, g, _ in moved], [scale for _, _, scale in moved])
            yield norm

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield group, p

    def _gradient_norm(self) -> float:
        gradients = [_dense(p.grad) for _, p in self._with_gradient()]
        if not gradients:
            return 0.0
        # Half-precision norms overflow above 65504 and underflow near zero: sum the squares in single precision.
        if any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients):
            gradients = [g.float() for g in gradients]
        device = gradients[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        norms = [n.to(device, wide) for n in torch._foreach_norm(gradients)]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def _evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        self.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = closure()
            has_gradient = any(True for _ in self._with_gradient())
            if not isinstance(loss, Tensor):
                raise ValueError(f"the closure must return the loss, got {type(loss).__name__}")
            if not has_gradient:
                if not loss.requires_grad:
                    raise ValueError(
                        "the closure returned a loss without gradient and computed none for the optimiser's parameters: "
                        "compute the loss inside the closure, from the model, with gradients enabled"
                    )
                loss.backward()
        return loss.detach()

    def _remember_random_state(self) -> None:
        if self._replay_rng:
            devices = {p.device for group in self.param_groups for p in group["params"] if p.device.type == "cuda"}
            self._random_state = (torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices})

    def _replay_random_state(self) -> None:
        if self._replay_rng:
            torch.set_rng_state(self._random_state[0])
            for device, state in self._random_state[1].items():
                torch.cuda.set_rng_state(state, device)

    @contextlib.contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        modules = [] if self._model is None else [m for m in self._model.modules() if isinstance(m, _NormBase)]
        buffers = [b for m in modules for b in m.buffers(recurse=False)]
        saved = [b.clone() for b in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def _dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient
