"""Exponential moving average (EMA) of the weights, with its memory given in steps and no memory of the initial weights."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from flatminima.averaging.average import WeightAverage
from flatminima.averaging.mean import Mean
from flatminima.averaging.parameters import BufferPolicy, ModelOrParameters
from flatminima.names import unknown

Warmup: TypeAlias = Literal["unbiased", "ratio", "none"]


class EMA(WeightAverage):
    r"""Exponentially weighted mean of the weights over the last ``timescale`` steps or so.

    With :math:`d = e^{-\mathrm{every} / \mathrm{timescale}}` per update that counts,

    .. math:: \bar\theta_n = \bar\theta_{n-1} + w_n (\theta_t - \bar\theta_{n-1})

    and the weight :math:`w_n` of the n-th one decided by ``warmup``:

    - "unbiased" (default): :math:`w_n = (1 - d) / (1 - d^n)`. The result is exactly the mean with weights
      :math:`d^{n-k}` divided by their sum, so it begins as the uniform mean and never overweights the first iterate;
    - "ratio": :math:`w_n = 1 - \min(d, n / (n + 9))` with the first iterate as n = 1: a short memory that grows with
      the training, as in many image recipes;
    - "none": :math:`w_n = 1 - d`, the textbook recursion begun at the first iterate, which keeps weight
      :math:`d^{n-1}` for it: stale for the first few timescales.

    A decay of 0.999 per step is ``timescale=999.5``, and the same timescale means the same memory when ``every`` or the
    batch size changes (scale it by the steps). One batch-size-free choice is a tenth of the training.

    Args:
        model_or_params: as in :class:`~flatminima.averaging.WeightAverage`, like the other arguments not listed here.
        timescale: steps after which an iterate's weight has fallen to 1/e. Positive; warns below 1, where a decay was
            probably meant.
        warmup: the weights of the first iterates, see above.

    Cost: no gradient evaluation; one pass over the parameters per step that counts; one copy of them in memory.

    Source: Ruppert, Cornell ORIE TR 781, 1988 (averaging); Kingma and Ba, arXiv:1412.6980, section 3 (the correction of
    the initial bias); Morales-Brotons et al., "Exponential Moving Average of Weights in Deep Learning", TMLR 2024.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> ema = EMA(model, timescale=1 / math.log(2))  # every step halves the weight of the ones before
        >>> for weight in (0.0, 3.0, 7.0):
        ...     _ = torch.nn.init.constant_(model.weight, weight)  # stands for optimizer.step()
        ...     ema.update()
        >>> round(ema.tensors()[0].item(), 5)  # (4 * 7 + 2 * 3 + 0) / 7
        4.85714
    """

    def __init__(
        self,
        model_or_params: ModelOrParameters,
        timescale: float = 1000.0,
        *,
        warmup: Warmup = "unbiased",
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        buffers: BufferPolicy = "keep",
    ) -> None:
        if isinstance(timescale, bool) or not isinstance(timescale, int | float):
            raise TypeError(f"timescale must be a number of steps; got {timescale!r}.")
        if not (math.isfinite(timescale) and timescale > 0):
            raise ValueError(
                f"timescale={timescale} must be a positive number of steps. A decay d per step is timescale=-1/log(d); "
                "for a mean without forgetting use SWA."
            )
        if warmup not in get_args(Warmup):
            raise ValueError(unknown("warmup", warmup, get_args(Warmup)))
        if timescale < 1:
            warnings.warn(
                f"timescale={timescale} remembers less than one step: it is a number of steps, not a decay. "
                f"A decay of {timescale} per step is timescale={-1 / math.log(timescale):.4g}.",
                stacklevel=2,
            )
        super().__init__(model_or_params, start=start, every=every, dtype=dtype, device=device, buffers=buffers)
        self.timescale = float(timescale)
        self.warmup: Warmup = warmup
        self._rate = every / self.timescale
        self._mean = self._like.empty()

    @property
    def n(self) -> int:
        """How many iterates have entered the average."""
        return self._mean.n

    @property
    def decay(self) -> float:
        """Factor by which an update that counts shrinks the weight of the earlier iterates, after the warm-up."""
        return math.exp(-self._rate)

    def _weight(self, n: int) -> float:
        new = -math.expm1(-self._rate)
        if self.warmup == "unbiased":
            return new / -math.expm1(-self._rate * n)  # expm1: 1 - d^n loses its digits for a long timescale
        if self.warmup == "ratio":
            return max(new, 9 / (n + 9))
        return new

    def _take(self, values: list[Tensor]) -> None:
        self._mean.add(values, self._weight(self._mean.n + 1))

    def _average(self) -> Mean:
        return self._mean

    def _state(self) -> dict[str, Any]:
        return {"mean": self._mean.state_dict()}

    def _restore(self, state: dict[str, Any], like: list[Tensor]) -> None:
        self._mean = self._like.restored(state["mean"], like)

    def _config(self) -> dict[str, Any]:
        return {"timescale": self.timescale, "warmup": self.warmup}
