"""Latest weight averaging (LAWA): the uniform mean of the last few checkpoints, for training that is still going on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatminima.averaging.average import WeightAverage, require_count
from flatminima.averaging.mean import Looks, Mean
from flatminima.averaging.parameters import BufferPolicy, ModelOrParameters


class LAWA(WeightAverage):
    r"""Uniform mean of the weights at the ``k`` latest of the steps ``start``, ``start + every``, ...

    .. math:: \bar\theta = \frac{1}{k} \sum_{i=0}^{k-1} \theta_{t - i \cdot \mathrm{every}}

    (of all of them while they are fewer than ``k``). Unlike a sliding sum it neither drifts nor keeps a NaN: the
    checkpoints are kept as they were, in their own dtype, and added up in float32 or wider when the average is wanted.

    Args:
        model_or_params: as in :class:`~flatminima.averaging.WeightAverage`, like the other arguments not listed here.
        k: how many checkpoints.
        every: steps between checkpoints; the paper takes one per epoch.

    Cost: no gradient evaluation; one copy of the parameters per step that counts, ``k`` copies of them in memory
    (``device="cpu"`` spares the accelerator) and one more while the average is in use.

    Source: Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging",
    arXiv:2209.14981, Algorithm 1; Sanyal et al., arXiv:2306.03241.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> lawa = LAWA(model, k=2, every=1)
        >>> for weight in (100.0, 1.0, 3.0):
        ...     _ = torch.nn.init.constant_(model.weight, weight)  # stands for an epoch
        ...     lawa.update()
        >>> lawa.n, lawa.tensors()[0].item()
        (2, 2.0)
    """

    def __init__(
        self,
        model_or_params: ModelOrParameters,
        k: int = 5,
        *,
        every: int,
        start: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        buffers: BufferPolicy = "keep",
    ) -> None:
        require_count("k", k, 1, "a number of checkpoints")
        super().__init__(model_or_params, start=start, every=every, dtype=dtype, device=device, buffers=buffers)
        self.k = k
        self._kept: list[list[Tensor]] = []  # oldest first
        self._looks = Looks()
        self._stale = 0  # how many of them have another dtype or device than the parameters have now

    @property
    def n(self) -> int:
        """How many checkpoints the average holds: at most ``k``."""
        return len(self._kept)

    def _take(self, values: list[Tensor]) -> None:
        if not self._looks.same(values):
            self._check(values)
            self._looks.accept(values)
            self._stale = len(self._kept)
        oldest = self._kept.pop(0) if len(self._kept) == self.k else None
        if oldest is None or self._stale:
            with torch.inference_mode(False):
                oldest = [torch.empty_like(v, device=self._like.device, requires_grad=False) for v in values]
            self._stale = max(0, self._stale - 1)
        self._kept.append(oldest)
        with torch.inference_mode():
            torch._foreach_copy_(self._kept[-1], values)

    def _check(self, values: list[Tensor]) -> None:
        if self._kept and [t.shape for t in self._kept[-1]] != [v.shape for v in values]:
            pairs = zip(self._kept[-1], values, strict=True)
            at, was, now = next((i, a.shape, b.shape) for i, (a, b) in enumerate(pairs) if a.shape != b.shape)
            raise ValueError(
                f"Parameter {self._parameters.label(at)} had shape {tuple(was)} at the last checkpoint and now has "
                f"shape {tuple(now)}. A mean cannot change shape: start a new average after changing the model."
            )

    def _average(self) -> Mean:
        mean = self._like.empty()
        for checkpoint in self._kept:
            mean.add(checkpoint)
        return mean

    def _state(self) -> dict[str, Any]:
        return {"checkpoints": [[tensor.clone() for tensor in checkpoint] for checkpoint in self._kept]}

    def _restore(self, state: dict[str, Any], like: list[Tensor]) -> None:
        for checkpoint in state["checkpoints"]:
            if [(t.shape, t.dtype) for t in checkpoint] != [(p.shape, p.dtype) for p in like]:
                raise ValueError(
                    "A saved checkpoint does not have the shapes and dtypes of these parameters. "
                    "Load the state into the same model that was averaged."
                )
        device = self._like.device
        self._kept = [
            [t.to(p.device if device is None else device, copy=True) for t, p in zip(checkpoint, like, strict=True)]
            for checkpoint in state["checkpoints"]
        ]

    def _config(self) -> dict[str, Any]:
        return {"k": self.k}
