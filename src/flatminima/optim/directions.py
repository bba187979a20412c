r"""Where to look: directions in which the weights are perturbed.

A direction turns what is known at the weights into vectors :math:`d_i` and a length :math:`\ell`; the perturbation of tensor
:math:`i` is :math:`\epsilon_i = \rho_i\, d_i / \ell`, with the group's own :math:`\rho_i` and one length for all tensors.
A zero or non-finite length means: stay; a negative one looks the other way without a copy of the vectors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatminima.names import unknown
from flatminima.perturbation import add
from flatminima.sharding import is_sharded, shard_like
from flatminima.vectors import SMALL, Kind, dot, length, local, norm, plain, real


@dataclass
class Point:
    """The weights of one step and what was found there; shards only, where parameters are sharded.

    Attributes:
        parameters: the optimiser's parameters that are looked at.
        values: what this rank holds of them.
        gradients: the same for their gradients, in the dense layout; empty for directions that need none.
        rho: the radius of each parameter's group.
        decay: its weight decay, where the direction follows the penalised loss.
        unit: what a gradient has to be multiplied by to be one of the loss (1, or one over the scale of a ``GradScaler``).
        step: how many steps were made before.
        draw: which of several perturbations of this step.
        memory: vectors that a policy keeps between steps, by name and parameter.
        state: the state of the base optimiser.
        kind: what the values are like, if it is known.
    """

    parameters: list[Tensor]
    values: list[Tensor]
    gradients: list[Tensor]
    rho: list[float]
    decay: list[float] = field(default_factory=list)
    unit: float = 1.0
    step: int = 0
    draw: int = 0
    memory: dict[str, dict[Tensor, Tensor]] = field(default_factory=dict)
    state: Any = None
    kind: Kind | None = None

    @functools.cached_property
    def length(self) -> float:
        """Norm of the gradients, before anything changes them."""
        return self.norm(self.gradients)

    def norm(self, vectors: Sequence[Tensor]) -> float:
        """Euclidean norm of vectors that belong to the parameters, over all shards."""
        return norm(vectors, self.parameters, self.kind)

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        """Inner product of vectors that belong to the parameters, over all shards."""
        return dot(a, b, self.parameters)


class Gradient:
    r"""SAM: :math:`\epsilon = \rho\, g / \lVert g \rVert`. Foret et al. (2021). Memory: nothing.

    Example:
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> vectors, length = Gradient()(Point([w], [w], [g], [0.05]))
        >>> length
        5.0
    """

    needs_gradient = True
    remembers = False
    remembers_in_base = False

    def __call__(self, at: Point) -> tuple[Sequence[Tensor], float]:
        """The gradient and its norm."""
        return at.gradients, at.length


class Adaptive:
    r"""ASAM: :math:`\epsilon = \rho\, T^2 g / \lVert T g \rVert` with :math:`T = |w| + \eta`, and :math:`T = 1` on biases.

    Kwon, Kim, Park and Choi, "ASAM: Adaptive Sharpness-Aware Minimization" (2021), and the authors' code. The ball then
    does not depend on the scale of the weights, and a customary radius is ten times that of SAM (0.5). Memory: on a CPU one
    tensor at a time, and one more copy of the small ones; elsewhere two copies of the gradient in passing.

    Args:
        eta: keeps tensors that start at zero movable.
        bias: ``"identity"`` takes :math:`T = 1` for tensors with fewer than two dimensions, as the authors do for everything
            whose name does not contain "weight" (they then scale the gain of a normalisation layer and we do not);
            ``"adaptive"`` treats all tensors alike.
    """

    needs_gradient = True
    remembers = False
    remembers_in_base = False

    def __init__(self, eta: float = 0.01, bias: str = "identity") -> None:
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta is added to |w| and must be finite and >= 0, got {eta}")
        if bias not in ("identity", "adaptive"):
            raise ValueError(unknown("bias policy", bias, ["identity", "adaptive"]))
        self.eta, self.bias = eta, bias

    def __call__(self, at: Point) -> tuple[Sequence[Tensor], float]:
        """The gradient scaled twice, and the norm of the gradient scaled once."""
        scaled = [i for i, p in enumerate(at.parameters) if self.bias == "adaptive" or p.dim() >= 2]
        if not scaled:
            return at.gradients, at.norm(at.gradients)
        twice = Scaled(at.values, at.gradients, self.eta, scaled, packed=plain(at.parameters))
        return twice if twice.later else list(twice), norm(twice.lengths, at.parameters)


class Scaled(Sequence[Tensor]):
    """T²g with T = |w| + eta for the chosen tensors and g for the others.

    Small tensors are scaled together, in one flat vector. On a CPU the large ones are scaled when they are asked for,
    each while it is in the cache, instead of being kept.

    Attributes:
        lengths: tensors whose common norm is that of Tg.
        later: which tensors are scaled when they are asked for.
    """

    def __init__(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], eta: float, chosen: Sequence[int], packed: bool
    ) -> None:
        self._values, self._gradients, self._eta = values, gradients, eta
        self._ready = dict(enumerate(gradients))
        parts: dict[int, Tensor] = dict(enumerate(gradients))
        kind = values[chosen[0]].dtype
        small = [i for i in chosen if packed and values[i].numel() < SMALL and values[i].dtype == kind]
        if len(small) > 1:
            w, g = (torch._C._nn.flatten_dense_tensors([each[i] for i in small]) for each in (values, gradients))
            scale = w.abs_().add_(eta)
            once = g.mul_(scale)
            for i in small:
                del parts[i]
            parts[small[0]] = length(once)
            pieces = torch._C._nn.unflatten_dense_tensors(once.mul_(scale), [values[i] for i in small])
            self._ready.update(zip(small, pieces, strict=True))
            chosen = sorted(set(chosen) - set(small))
        self.later: frozenset[int] = frozenset()
        if not chosen:
            pass
        elif values[chosen[0]].is_cpu:
            self.later = frozenset(chosen)
            for i in chosen:
                parts[i] = length(self._scale(i).mul_(gradients[i]))
        else:  # one kernel for all of them, at the price of their memory
            scales = torch._foreach_abs([values[i] for i in chosen])
            torch._foreach_add_(scales, eta)
            ones = torch._foreach_mul(scales, [gradients[i] for i in chosen])
            parts.update(zip(chosen, ones, strict=True))
            torch._foreach_mul_(scales, ones)
            self._ready.update(zip(chosen, scales, strict=True))
        self.lengths = list(parts.values())

    def _scale(self, i: int) -> Tensor:
        return self._values[i].abs().add_(self._eta)

    def __len__(self) -> int:
        return len(self._gradients)

    def __getitem__(self, i: Any) -> Any:
        """The vector of tensor i."""
        return self._scale(i).square_().mul_(self._gradients[i]) if i in self.later else self._ready[i]

    def __iter__(self) -> Iterator[Tensor]:
        """One after the other."""
        return (self[i] for i in range(len(self)))

    def add_to(self, i: int, tensor: Tensor, factor: float) -> None:
        """``tensor += factor * vector i``."""
        if i in self.later and tensor.dtype is not torch.float16:
            tensor.addcmul_(self._scale(i).square_(), self._gradients[i], value=factor)
        else:
            add([tensor], [self[i]], factor)

    def over(self, values: Sequence[Tensor]) -> Scaled:
        """The same vectors, when the weights they were made from lie elsewhere now."""
        self._values = values
        return self


class Friendly:
    r"""Friendly-SAM: the gradient without the part that all batches share.

    .. math:: d_t = g_t - \sigma\, m_{t-1}, \qquad m_t = \lambda\, m_{t-1} + (1 - \lambda)\, g_t, \qquad d_0 = m_0 = g_0

    Li, Zhou, He, Cheng and Huang, "Friendly Sharpness-Aware Minimization" (2024), in the order of the authors'
    code. Memory: one more copy of the parameters, kept between steps and saved, and one in passing.
    """

    needs_gradient = True
    remembers = True
    remembers_in_base = False
    keeps = ("mean",)

    def __init__(self, sigma: float = 1.0, decay: float = 0.9) -> None:
        if not math.isfinite(sigma):
            raise ValueError(f"sigma must be finite, got {sigma}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay of the running mean must be in [0, 1), got {decay}")
        self.sigma, self.decay = sigma, decay

    def __call__(self, at: Point) -> tuple[Sequence[Tensor], float]:
        """The residual of the running mean; a gradient that is not finite does not enter the mean."""
        means = at.memory.setdefault("mean", {})
        g = list(at.gradients) if at.unit == 1.0 else list(torch._foreach_mul(at.gradients, at.unit))
        seen = [i for i, p in enumerate(at.parameters) if p in means]
        m = [means[at.parameters[i]] for i in seen]
        d = list(g)
        if seen:
            for i, x in zip(seen, torch._foreach_sub([g[i] for i in seen], m, alpha=self.sigma), strict=True):
                d[i] = x
        size = at.norm(d)
        if math.isfinite(size):
            if seen:
                torch._foreach_lerp_(m, [g[i] for i in seen], 1 - self.decay)
            for p, x in zip(at.parameters, g, strict=True):
                if p not in means:
                    means[p] = x.clone()
        return d, size


class Momentum:
    r"""MSAM: along the coming update, :math:`\epsilon = -\rho\, v / \lVert v \rVert`, with the momentum of the base.

    Becker, Altrock and Risse, "Momentum-SAM" (2024). It needs no gradient at the weights, so a step costs one
    gradient. The first step, without momentum yet, is the base's. Memory: nothing.
    """

    needs_gradient = False
    remembers = False
    remembers_in_base = True
    names = ("momentum_buffer", "exp_avg")

    def __call__(self, at: Point) -> tuple[Sequence[Tensor], float]:
        """Minus the momentum; tensors without one stay."""
        if not at.parameters:
            return [], 0.0
        found = [self._of(at.state.get(p)) for p in at.parameters]
        vectors = [torch.zeros_like(v) if f is None else f for f, v in zip(found, at.values, strict=True)]
        return vectors, -at.norm(vectors)

    def _of(self, state: Any) -> Tensor | None:
        for name in self.names if state else ():
            if state.get(name) is not None:
                return real(local(state[name]))
        return None


class Noise:
    r"""Random perturbations, drawn anew each time.

    Args:
        kind: what ``rho`` means. ``"sphere"``: :math:`\lVert\epsilon\rVert = \rho`, comparable with SAM. ``"gaussian"``: the
            standard deviation of each coordinate. ``"uniform"``: each coordinate is uniform on :math:`[-\rho, \rho]`, the box
            of flat regions (Shi et al., "F2M", 2021; their released files state the full width :math:`2\rho`).
        seed: with the step and the draw it decides the noise; nothing else is drawn from or needs to be saved.

    Memory: one draw.
    """

    needs_gradient = False
    remembers = True
    remembers_in_base = False

    def __init__(self, kind: str = "sphere", seed: int = 0) -> None:
        if kind not in ("sphere", "gaussian", "uniform"):
            raise ValueError(unknown("kind of noise", kind, ["sphere", "gaussian", "uniform"]))
        self.kind, self.seed = kind, seed

    def __call__(self, at: Point) -> tuple[Sequence[Tensor], float]:
        """One draw for each tensor."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + at.step) * 1_009 + at.draw)
        vectors = []
        for p, v in zip(at.parameters, at.values, strict=True):
            shape = p.shape if is_sharded(p) else v.shape  # every rank draws the whole, and takes its shard of it
            wide = torch.promote_types(v.dtype, torch.float32)
            d = (
                torch.randn(shape, dtype=wide, generator=generator)
                if self.kind != "uniform"
                else 2 * torch.rand(shape, dtype=wide, generator=generator) - 1
            )
            vectors.append(shard_like(d, p).to(v.device))
        return vectors, at.norm(vectors) if self.kind == "sphere" else 1.0
