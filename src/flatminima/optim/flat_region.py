"""F2M: train inside a box in which the loss is flat, and stay inside it afterwards.

The perturbed forward passes go through ``torch.func.functional_call`` and never change a parameter. (Swapping ``.data``
and restoring it before the backward pass gives the layers below a perturbed convolution gradients of the wrong weights.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatminima.averaging.average import require_state
from flatminima.names import unknown
from flatminima.optim.flat_region_noise import Noise, draw
from flatminima.optim.flat_region_parts import call_arguments, names_in, prototypes, towards, unique_parameters

if TYPE_CHECKING:
    from flatminima.optim.flat_region_probe import BoxProbe

Criterion: TypeAlias = Callable[[Any, Tensor], Tensor]


class Clamped(NamedTuple):
    """How many coordinates one projection moved, at the lower and at the upper face of the box."""

    low: int
    high: int


@dataclass(frozen=True)
class FlatLoss:
    """The objective and its parts.

    Attributes:
        value: what to call ``backward()`` on.
        losses: per draw, the criterion of the perturbed outputs (detached).
        shifts: per draw, the squared shift of the class prototypes (detached); zeros without ``prototype_weight``.
    """

    value: Tensor
    losses: Tensor
    shifts: Tensor


class FlatRegion:
    r"""A box around the weights of some parameters, ``|theta - centre| <= b`` in every coordinate.

    Base training minimises the loss averaged over noise :math:`\epsilon_j` in the box (:meth:`loss`),

    .. math:: \frac{1}{M} \sum_{j=1}^M \Big[ L(\theta + \epsilon_j) + \lambda \frac{1}{|C|} \sum_{c \in C}
        \lVert p_c(\theta + \epsilon_j) - p_c(\theta) \rVert^2 \Big]

    with :math:`p_c` the mean embedding of class c in the batch. Then :meth:`recenter` fixes the centre, and in later
    sessions :meth:`project_` after every ``optimizer.step()`` keeps the parameters in the box. The noise controls an
    average, a penalty on the trace of the Hessian; :meth:`probe` looks for the worst point of the box as well, which may be
    far above every draw.

    Args:
        params: the parameters that get noise and a box: an iterable of them, ``named_parameters()``, or a module. The
            paper takes the last 4 or 8 convolution weights: no BatchNorm, no classifier.
        bound: half width b of the box (F2M's code writes the full width). With ``relative=True`` a fraction of each
            tensor's root mean square, which has the same meaning for layers of any scale.
        noise: "uniform", "beta_grid" or "beta_grid_released", see :func:`~flatminima.optim.flat_region_noise.draw`.
        antithetic: draw in pairs, noise and its negative: without a first-order error, for an even number of draws.
        seed: of the noise.

    Attributes:
        clamped: low and high hits of all projections so far.

    Raises:
        TypeError, ValueError: no parameters, a bound that is not positive and finite, unknown noise, or a relative
            bound for a tensor of zeros.

    Memory: one copy of ``params`` for the centre and, in a draw, one for the noise.

    Source: Shi et al., "Overcoming Catastrophic Forgetting in Incremental Few-Shot Learning by Finding Flat Minima",
    NeurIPS 2021, arXiv:2111.01549, section 4; its prototype term has a gradient here, which the released code loses.

    Example:
        >>> embed = nn.Linear(2, 2)
        >>> region = FlatRegion([embed.weight], bound=0.01)
        >>> x, y = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> region.loss(embed, x, y, nn.functional.cross_entropy, draws=2, prototype_weight=1.0).value.backward()
        >>> with torch.no_grad():
        ...     _ = embed.weight[0].add_(1.0)
        >>> region.project_()
        Clamped(low=0, high=2)
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        bound: float,
        *,
        relative: bool = False,
        noise: Noise = "uniform",
        antithetic: bool = False,
        seed: int = 0,
    ) -> None:
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise TypeError(f"bound must be a number, the half width of the box; got {bound!r}.")
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"bound={bound} must be positive and finite: the half width of the box.")
        if noise not in get_args(Noise):
            raise ValueError(unknown("noise", noise, get_args(Noise)))
        if antithetic and noise == "beta_grid_released":
            raise ValueError("noise='beta_grid_released' is not symmetric; antithetic draws would change it.")
        self.params = unique_parameters(params)
        self.bound = float(bound)
        self.relative = relative
        self.noise: Noise = noise
        self.antithetic = antithetic
        self.clamped = Clamped(0, 0)
        self._generator = torch.Generator().manual_seed(seed)
        self.recenter()

    @torch.no_grad()
    def recenter(self) -> None:
        """Make the present weights the centre of the box. Once, after base training: a box moved later drifts.

        Raises:
            ValueError: a tensor that is not finite, or a relative bound and a tensor that is zero.
        """
        for index, parameter in enumerate(self.params):
            if not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"Parameter number {index} of shape {tuple(parameter.shape)} is not finite, and a box around it would hold "
                    "nothing else. Go back to weights from before training diverged."
                )
        half = self.half_widths()
        self.center = [parameter.detach().clone() for parameter in self.params]
        pairs = list(zip(self.center, half, strict=True))
        self._low = [towards(center, center.double() - b.double()) for center, b in pairs]
        self._high = [towards(center, center.double() + b.double()) for center, b in pairs]
        self._half = half

    @torch.no_grad()
    def half_widths(self) -> list[Tensor]:
        """b of every tensor (float64 scalars): for a relative bound, of the weights as they are now."""
        if not self.relative:
            return [torch.tensor(self.bound, dtype=torch.float64, device=p.device) for p in self.params]
        half = [self.bound * p.double().square().mean().sqrt() for p in self.params]
        for index, b in enumerate(half):
            if not bool(b.isfinite() & (b > 0)):
                raise ValueError(
                    f"Parameter number {index} of shape {tuple(self.params[index].shape)} is zero or not finite, so a "
                    "bound relative to its size means nothing. Leave it out, or use relative=False."
                )
        return half

    def sample(self, draws: int = 1) -> list[list[Tensor]]:
        """``draws`` draws of noise, each a list of tensors like ``params``; the next call goes on in the stream."""
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws={draws!r} must be a whole number of at least 1.")
        if self.antithetic and draws % 2:
            raise ValueError(f"draws={draws} must be even with antithetic=True: noise comes in pairs.")
        half = self.half_widths() if self.relative else self._half
        drawn: list[list[Tensor]] = []
        while len(drawn) < draws:
            drawn.append(draw(self.noise, self.params, half, self._generator))
            if self.antithetic:
                drawn.append([-tensor for tensor in drawn[-1]])
        return drawn

    def forward(self, model: nn.Module, x: Any, noise: list[Tensor], *, keep_buffers: bool = True) -> Any:
        """``model(x)`` with ``noise`` added to the parameters, differentiable, the model left as it is.

        Args:
            model: holds all of ``params``.
            x: its input: a tensor, a tuple of arguments, or a mapping of keyword arguments.
            noise: one tensor per parameter, as from :meth:`sample`.
            keep_buffers: leave BatchNorm's running statistics alone.
        """
        names = names_in(model, self.params)
        swapped = {name: p + e for name, p, e in zip(names, self.params, noise, strict=True)}
        if keep_buffers:
            swapped |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, swapped, *call_arguments(x))

    def loss(
        self,
        model: nn.Module,
        x: Any,
        y: Tensor,
        criterion: Criterion,
        *,
        draws: int = 2,
        prototype_weight: float = 0.0,
        std_weight: float = 0.0,
        embedding: Callable[[Any], Tensor] | None = None,
        detach_clean: bool = False,
        noise: list[list[Tensor]] | None = None,
    ) -> FlatLoss:
        """The base objective on one batch.

        BatchNorm's running statistics are those of the pass without noise, or of the first draw where there is none;
        re-estimate them before evaluating (:func:`~flatminima.averaging.reestimate_batchnorm`).

        Args:
            model: its outputs go to the criterion and, through ``embedding``, into the prototypes.
            x: the input, as in :meth:`forward`.
            y: class of every row; the criterion's targets.
            criterion: ``criterion(outputs, y)``, a scalar. A classifier that gets no noise may be part of it.
            draws: M.
            prototype_weight: lambda. Above 0 it costs the pass without noise, and a batch needs rows of every class.
            std_weight: weight of the unbiased standard deviation over the draws; F2M's code has 2.0, the paper none.
            embedding: from the model's output to (rows, dimensions); the output itself if None.
            detach_clean: no gradient through the prototypes without noise.
            noise: draws to use instead of sampling.

        Raises:
            ValueError: ``std_weight`` with fewer than 2 draws, negative weights, or parameters the model does not hold.

        Cost: ``draws`` (+ 1 with prototypes) forward and backward passes, all graphs alive at once; see :meth:`backward`.
        """
        count = draws if noise is None else len(noise)
        if std_weight and count < 2:
            raise ValueError(f"std_weight={std_weight} needs at least 2 draws, got {count}.")
        parts = list(
            self._terms(model, x, y, criterion, draws, prototype_weight, std_weight, embedding, detach_clean, noise)
        )
        totals = torch.stack([loss + prototype_weight * shift for loss, shift in parts])
        value = totals.mean() + (std_weight * totals.std() if std_weight else 0.0)
        return FlatLoss(value, *(torch.stack([part[i].detach() for part in parts]) for i in (0, 1)))

    def backward(
        self,
        model: nn.Module,
        x: Any,
        y: Tensor,
        criterion: Criterion,
        *,
        draws: int = 2,
        prototype_weight: float = 0.0,
        embedding: Callable[[Any], Tensor] | None = None,
        noise: list[list[Tensor]] | None = None,
    ) -> FlatLoss:
        """As ``loss(..., detach_clean=True).value.backward()`` with one graph alive at a time; arguments as there."""
        count = draws if noise is None else len(noise)
        kept = []
        for loss, shift in self._terms(model, x, y, criterion, draws, prototype_weight, 0.0, embedding, True, noise):
            ((loss + prototype_weight * shift) / count).backward()
            kept.append((loss.detach(), shift.detach()))
        losses, shifts = (torch.stack([part[i] for part in kept]) for i in (0, 1))
        return FlatLoss((losses + prototype_weight * shifts).mean(), losses, shifts)

    @torch.no_grad()
    def project_(self) -> Clamped:
        """Clamp the parameters into the box, in place. After every ``optimizer.step()``; momentum is left alone.

        Returns:
            how many coordinates were outside; added to ``clamped``. Waits for the device once.

        Raises:
            ValueError: a parameter is NaN, which no box can hold.
        """
        low = torch.stack([(p < at).sum() for p, at in zip(self.params, self._low, strict=True)]).sum()
        high = torch.stack([(p > at).sum() for p, at in zip(self.params, self._high, strict=True)]).sum()
        bad = torch.stack([p.isnan().sum() for p in self.params]).sum()
        below, above, nan = (int(count) for count in torch.stack([low, high, bad]).tolist())
        if nan:
            raise ValueError(f"{nan} coordinates of the parameters are NaN. Lower the learning rate.")
        for parameter, lower, upper in zip(self.params, self._low, self._high, strict=True):
            parameter.clamp_(lower, upper)
        self.clamped = Clamped(self.clamped.low + below, self.clamped.high + above)
        return Clamped(below, above)

    @torch.no_grad()
    def saturation(self) -> list[tuple[float, float]]:
        """Per parameter: the share of its coordinates at a face of the box, and the largest ``|theta - centre| / b``."""
        found = []
        for p, center, low, high, b in zip(self.params, self.center, self._low, self._high, self._half, strict=True):
            share = ((p <= low) | (p >= high)).double().mean()
            found.append((float(share), float((p.double() - center.double()).abs().max() / b)))
        return found

    def probe(
        self, model: nn.Module, batches: Iterable[tuple[Any, Tensor]], criterion: Criterion, **options: Any
    ) -> BoxProbe:
        """Random and worst points of the box around the present weights; see :mod:`flatminima.optim.flat_region_probe`."""
        from flatminima.optim.flat_region_probe import probe  # which is about regions

        return probe(self, model, batches, criterion, **options)

    def state_dict(self) -> dict[str, Any]:
        """The box, the hits and the state of the noise, readable by ``torch.load(weights_only=True)``."""
        return {
            "center": [tensor.clone() for tensor in self.center],
            "half": [tensor.clone() for tensor in self._half],
            "low": [tensor.clone() for tensor in self._low],
            "high": [tensor.clone() for tensor in self._high],
            "config": self._config(),
            "clamped": list(self.clamped),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the saved box.

        Raises:
            ValueError: the box is of other shapes or settings, or this is no state of a region. Nothing is changed then.
        """
        require_state("FlatRegion", state, self.state_dict(), self._config())
        generator = torch.Generator()
        try:
            generator.set_state(state["generator"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"The saved state of the noise cannot be restored: {error}") from error
        here = [tuple(p.shape) for p in self.params]
        for name in ("center", "low", "high"):
            saved = [tuple(t.shape) for t in state[name]]
            if saved != here:
                raise ValueError(f"The saved box is of parameters of shapes {saved[:4]}; these have {here[:4]}.")
        if len(state["half"]) != len(here) or len(state["clamped"]) != 2:
            raise ValueError(
                "This is not a state saved by FlatRegion: its half widths or its counts are not all there."
            )
        for name in ("center", "low", "high"):
            pairs = zip(state[name], self.params, strict=True)
            setattr(self, name if name == "center" else f"_{name}", [t.to(p.device, p.dtype) for t, p in pairs])
        self._half = [tensor.to(p.device) for tensor, p in zip(state["half"], self.params, strict=True)]
        self.clamped = Clamped(*state["clamped"])
        self._generator = generator

    def _config(self) -> dict[str, Any]:
        return {"bound": self.bound, "relative": self.relative, "noise": self.noise, "antithetic": self.antithetic}

    def _terms(
        self,
        model: nn.Module,
        x: Any,
        y: Tensor,
        criterion: Criterion,
        draws: int,
        prototype_weight: float,
        std_weight: float,
        embedding: Callable[[Any], Tensor] | None,
        detach_clean: bool,
        noise: list[list[Tensor]] | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Loss and prototype shift of every draw."""
        if not (0 <= prototype_weight < math.inf and 0 <= std_weight < math.inf):
            raise ValueError(
                f"prototype_weight={prototype_weight} and std_weight={std_weight} must be finite and >= 0."
            )
        names_in(model, self.params)
        if noise is None:
            noise = self.sample(draws)
        if not noise:
            raise ValueError("noise=[] has no draw to average over. Give at least one, or None to sample.")
        embed = embedding if embedding is not None else lambda output: output
        clean: Tensor | None = None
        if prototype_weight:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_clean):
                args, kwargs = call_arguments(x)
                clean = prototypes(embed(model(*args, **kwargs)), y)
        for index, eps in enumerate(noise):
            output = self.forward(model, x, eps, keep_buffers=index > 0 or clean is not None)
            loss = criterion(output, y)
            if loss.numel() != 1:
                raise ValueError(f"The criterion gave a tensor of shape {tuple(loss.shape)}; expected one number.")
            shift = torch.zeros_like(loss)
            if clean is not None:
                shift = (prototypes(embed(output), y) - clean).square().sum(1).mean()
            yield loss, shift
