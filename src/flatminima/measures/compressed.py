r"""Compressed size: how few bits the weights need if the loss may change by a little.

The definition, which is exact and needs no compressor:

1. Each tensor is rounded to multiples of its own step :math:`\Delta_l = 2^{-k/4} \max|w_l|`, one *k* for all tensors; *k* is
   the smallest for which the loss changes by at most the tolerance, sought octave by octave and then within the first
   octave that holds.
2. A tensor of integers :math:`q` costs :math:`\sum` of: the sizes :math:`|q|` by the sequential estimator of Krichevsky and
   Trofimov on the alphabet :math:`\{0, ..., \max|q|\}` (what an adaptive arithmetic coder produces, to two bits), a bit
   for every sign, and 32 bits for the step.

The code length of step 2 depends on how often each size occurs, not on the order, so permuting units or flipping their
signs leaves it; scaling a whole layer scales its steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.special import gammaln
from torch import Tensor

from flatminima.measures.base import Measurement, Workbench, register
from flatminima.measures.invariance import ALL, SIGNED_PERMUTATIONS
from flatminima.objective import NonFiniteLossError, Objective

_OCTAVE = 4  # steps a factor of two
_FINEST = 24 * _OCTAVE  # beyond, single precision does not tell the weights from their rounding
_SCALE_BITS = 32


@dataclass(frozen=True)
class Compressed:
    """The shortest description found.

    Attributes:
        bits: of the code.
        grid: the *k* of the definition.
        change: of the loss, absolute.
        reached: whether the tolerance was met; otherwise the finest grid is described.
    """

    bits: float
    grid: int
    change: float
    reached: bool


def compressed_size_of(objective: Objective, tolerance: float = 0.01) -> Compressed:
    """Quantise the selected parameters to the coarsest grid that the loss tolerates, and count the bits of the code.

    Args:
        objective: any.
        tolerance: largest absolute change of the loss.

    Cost: a third of a gradient for each grid that is tried, at most 27.

    Example:
        >>> w = torch.nn.Linear(4, 1, bias=False)
        >>> _ = w.weight.data.copy_(torch.tensor([[1.0, -1.0, 0.0, 1.0]]))       # is on the coarsest grid
        >>> f = Objective(w, torch.nn.functional.mse_loss, (torch.ones(1, 4), torch.zeros(1, 1)))
        >>> found = compressed_size_of(f)
        >>> found.grid, round(found.bits - code_length(torch.tensor([1, -1, 0, 1])), 9)
        (0, 32.0)
    """
    point = objective.point().double()
    start = objective.loss()

    def change(k: int) -> float:
        rounded = torch.cat([_rounded(part, k)[1].reshape(-1) for part in objective.split(point).values()])
        try:
            return abs(objective.loss(rounded.to(objective.dtype)) - start)
        except NonFiniteLossError:
            return math.inf

    seen: dict[int, float] = {}

    def tolerable(k: int) -> bool:
        seen[k] = change(k)
        return seen[k] <= tolerance

    coarse = next((k for k in range(0, _FINEST + 1, _OCTAVE) if tolerable(k)), None)
    best = _FINEST if coarse is None else coarse
    if coarse is not None and coarse > 0:
        best = next((k for k in range(coarse - _OCTAVE + 1, coarse) if tolerable(k)), coarse)
    codes = [_rounded(part, best)[0] for part in objective.split(point).values()]
    bits = math.fsum(code_length(code) + _SCALE_BITS for code in codes)
    return Compressed(bits, best, seen[best], coarse is not None)


def _rounded(part: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The integers and the values they stand for."""
    step = float(part.abs().max()) * 2.0 ** (-k / _OCTAVE) if part.numel() else 0.0
    if step == 0.0:
        return torch.zeros_like(part, dtype=torch.int64), torch.zeros_like(part)
    code = (part / step).round()
    return code.to(torch.int64), code * step


def code_length(code: Tensor) -> float:
    r"""Bits of a tensor of integers: sizes by the Krichevsky-Trofimov estimator, and a bit for each sign.

    With :math:`n_a` entries of size *a*, *n* in all and an alphabet of *m* sizes,

    .. math:: -\log_2 \frac{\Gamma(m/2)}{\Gamma(n + m/2)} \prod_a \frac{\Gamma(n_a + 1/2)}{\Gamma(1/2)} .

    Source: Krichevsky and Trofimov (1981).

    Example:
        >>> code_length(torch.tensor([0, 0, 0])), round(code_length(torch.tensor([1, -1])), 3)   # 1/2 * 3/4, and two signs
        (0.0, 3.415)
    """
    sizes = code.reshape(-1).abs()
    if not len(sizes):
        return 0.0
    counts = torch.bincount(sizes).double().numpy()
    m, n = len(counts), len(sizes)
    occurring = counts[counts > 0]
    log = float(gammaln(m / 2) - gammaln(n + m / 2)) + math.fsum(_per_size(occurring.tolist()))
    return max(0.0, -log / math.log(2)) + float((sizes > 0).sum())


def _per_size(counts: Sequence[float]) -> list[float]:
    half = float(gammaln(0.5))
    return [float(gammaln(c + 0.5)) - half for c in counts]


@register(
    "compressed_size",
    "compressed size",
    "Bytes that describe the weights after rounding them as coarsely as the loss tolerates.",
    flatter_when=None,
    invariant_under=SIGNED_PERMUTATIONS | {"relu-layer-rescaling"},
    changes_under=ALL - SIGNED_PERMUTATIONS - {"relu-layer-rescaling"},
    cost_class="moderate",
)
def compressed_size(bench: Workbench) -> Measurement:
    """Bytes of the code of :func:`compressed_size_of` at ``compression_tolerance``. Exact for that definition; cost up to 9."""
    found = compressed_size_of(bench.objective, bench.options.compression_tolerance)
    note = f"steps of 2^-{found.grid / _OCTAVE:g} of the largest weight of each tensor; the loss changes by {found.change:.2g}"
    return Measurement("compressed_size", found.bits / 8, 0.0, "exact", found.reached, note=note)
