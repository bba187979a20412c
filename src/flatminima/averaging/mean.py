"""The running mean of a list of tensors, on which every way of averaging weights is built.

Three choices carry the file. The mean is kept in float32 or wider, because a bfloat16 mean stops moving once 1/n drops
below its resolution. It is kept as a flat list of tensors, never as a deep copy of the module, because the module may
not be copyable. The counter is a Python int, because a counter on the device costs a synchronisation per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_BYTES = attrgetter("nbytes")


def accumulator_dtype(dtype: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """The dtype a mean of tensors of ``dtype`` is kept in: the widest of ``dtype``, float32 and ``wanted``."""
    wide = torch.promote_types(dtype, torch.float32)
    return wide if wanted is None else torch.promote_types(wide, wanted)


class Looks:
    """Whether tensors still look as they did the last time.

    Sizes in bytes stand for shapes and dtypes: they take a fifth of the time, and what they miss, torch refuses. Without this a
    parameter that changed its shape would be broadcast, and averaged silently.
    """

    def __init__(self) -> None:
        self._sizes: list[int] | None = None
        self._source: torch.device | None = None

    def same(self, values: Sequence[Tensor]) -> bool:
        """Whether sizes and the first device are those that were accepted last."""
        return list(map(_BYTES, values)) == self._sizes and (not values or values[0].device == self._source)

    def accept(self, values: Sequence[Tensor]) -> None:
        """These are right."""
        self._sizes = list(map(_BYTES, values))
        self._source = values[0].device if values else None


class Mean:
    """Running mean of a list of tensors, ``m_n = m_{n-1} + (x_n - m_{n-1}) / n``.

    The first ``add`` fixes the shapes, devices and number of tensors; buffers are allocated then, one per tensor, in
    float32 or the tensor's own dtype if that is wider. A constant sequence is reproduced to the bit.

    Args:
        dtype: keep the mean at least this wide, for example ``torch.float64`` for a float32 model.
        device: keep the mean there instead of beside the tensors; every ``add`` then moves one tensor at a time.

    Attributes:
        n: how many values the mean holds (a Python int).
        tensors: the mean itself. Live buffers, meaningless while ``n == 0``.

    Example:
        >>> mean = Mean()
        >>> for value in (1.0, 2.0, 6.0):
        ...     mean.add([torch.tensor([value])])
        >>> mean.n, mean.tensors
        (3, [tensor([3.])])
    """

    def __init__(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype} cannot hold a mean; expected torch.float32 or torch.float64.")
        self.n = 0
        self.tensors: list[Tensor] = []
        self.dtype = dtype
        self.device = None if device is None else torch.device(device)
        self._shapes: list[torch.Size] = []  # what values have to look like, known before the first one if inherited
        self._looks = Looks()
        self._alike = False  # whether the values have the mean's own dtype and device, so that one foreach call does

    def empty(self) -> Mean:
        """A new mean kept in the same way, with nothing in it, for values of the same shapes."""
        mean = Mean(dtype=self.dtype, device=self.device)
        mean._shapes = self._shapes
        return mean

    def add(self, values: Sequence[Tensor], weight: float | None = None) -> None:
        """Take one more value of every tensor into the mean.

        Args:
            values: one tensor per tensor of the mean.
            weight: share of the new value in the mean, instead of ``1 / (n + 1)``. The first value has all of it.

        Raises:
            ValueError: the number, a shape, a device or a dtype no longer fits the mean. Nothing is changed then.
        """
        if not self._looks.same(values):
            self._accept(values)
            self._looks.accept(values)
        try:
            with torch.inference_mode():  # below autograd a call costs a seventh less than without gradients
                if self.n == 0:
                    torch._foreach_copy_(self.tensors, list(values))
                elif self._alike:
                    share = 1.0 / (self.n + 1) if weight is None else weight
                    torch._foreach_lerp_(self.tensors, values if isinstance(values, list) else list(values), share)
                else:
                    self._lerp(values, 1.0 / (self.n + 1) if weight is None else weight)
        except RuntimeError:
            self._require_same(values)  # says which tensor it was
            raise
        self.n += 1

    def merge(self, other: Mean) -> None:
        """Become the mean of both sets of values: ``m + (o - m) * n_o / (n + n_o)``. ``other`` is left as it was."""
        if other.n == 0:
            return
        with torch.inference_mode(False):
            if not self.tensors:
                self.tensors = [torch.empty_like(tensor) for tensor in other.tensors]
        self._require_same(other.tensors)
        with torch.inference_mode():
            if self.n == 0:
                torch._foreach_copy_(self.tensors, other.tensors)
            else:
                torch._foreach_lerp_(self.tensors, other.tensors, other.n / (self.n + other.n))
        self.n += other.n

    def reset(self) -> None:
        """Forget the values and keep the buffers for the next ones."""
        self.n = 0

    def finite(self) -> list[Tensor]:
        """One boolean tensor per tensor of the mean: whether it is free of NaN and infinities."""
        return [tensor.isfinite().all() for tensor in self.tensors] if self.n else []

    def first_nonfinite(self) -> int | None:
        """Index of the first tensor that holds a NaN or an infinity, or None. Waits for the device once."""
        return next((index for index, flag in enumerate(self.finite()) if not flag), None)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the mean: ``{"n": int, "tensors": list of tensors}``; without tensors while the mean is empty."""
        return {"n": self.n, "tensors": [tensor.clone() for tensor in self.tensors] if self.n else []}

    def restored(self, state: dict[str, Any], like: Sequence[Tensor]) -> Mean:
        """The mean that ``state`` describes, kept as this one is; ``like`` are the tensors whose mean it is.

        Raises:
            ValueError: the saved tensors are not means of tensors shaped and typed like ``like``.
        """
        mean = self.empty()
        if not state["n"]:
            return mean
        saved = state["tensors"]
        if len(saved) != len(like):
            raise ValueError(f"The saved mean has {len(saved)} tensors, the parameters to average are {len(like)}.")
        for index, (tensor, parameter) in enumerate(zip(saved, like, strict=True)):
            expected = (tuple(parameter.shape), accumulator_dtype(parameter.dtype, self.dtype))
            if (tuple(tensor.shape), tensor.dtype) != expected:
                raise ValueError(
                    f"Saved mean {index} is {tensor.dtype} of shape {tuple(tensor.shape)}; this parameter needs "
                    f"{expected[1]} of shape {expected[0]}. Load the state into the same model that was averaged."
                )
        mean.n = int(state["n"])
        mean.tensors = [
            tensor.detach().to(p.device if self.device is None else self.device, copy=True)
            for tensor, p in zip(saved, like, strict=True)
        ]
        return mean

    def _lerp(self, values: Sequence[Tensor], weight: float) -> None:
        same = [(m, v) for m, v in zip(self.tensors, values, strict=True) if (m.dtype, m.device) == (v.dtype, v.device)]
        if same:
            torch._foreach_lerp_([m for m, _ in same], [v for _, v in same], weight)
        # One tensor at a time: the widened copy of a narrow tensor is then never more than one tensor of memory.
        for m, v in zip(self.tensors, values, strict=True):
            if (m.dtype, m.device) != (v.dtype, v.device):
                m.lerp_(v.to(m.device, m.dtype), weight)

    def _accept(self, values: Sequence[Tensor]) -> None:
        """Allocate for, or check, values that do not look like the ones before."""
        if not self.tensors:
            for index, (was, value) in enumerate(zip(self._shapes, values, strict=False)):
                self._require_shape(index, was, value.shape)
            self._shapes = [value.shape for value in values]
            with torch.inference_mode(False):  # an inference tensor could be written to nowhere else
                self.tensors = [
                    torch.empty_like(
                        value,
                        dtype=accumulator_dtype(value.dtype, self.dtype),
                        device=value.device if self.device is None else self.device,
                        requires_grad=False,
                    )
                    for value in values
                ]
        self._require_same(values)
        pairs = zip(self.tensors, values, strict=True)
        self._alike = all((m.dtype, m.device) == (v.dtype, v.device) for m, v in pairs)

    def _require_same(self, values: Sequence[Tensor]) -> None:
        if len(values) != len(self.tensors):
            raise ValueError(f"The mean is of {len(self.tensors)} tensors, but {len(values)} were given.")
        for index, (mean, value) in enumerate(zip(self.tensors, values, strict=True)):
            self._require_shape(index, mean.shape, value.shape)
            if self.device is None and mean.device != value.device:
                raise ValueError(
                    f"Tensor {index} moved from {mean.device} to {value.device} after its mean began. "
                    "Move the model before the first update, or resume from a state_dict."
                )
            if mean.dtype != value.dtype and mean.dtype != accumulator_dtype(value.dtype, self.dtype):
                raise ValueError(
                    f"Tensor {index} is now {value.dtype}, too wide for the mean begun in {mean.dtype}. "
                    "Change the model's dtype before the first update."
                )

    @staticmethod
    def _require_shape(index: int, was: torch.Size, now: torch.Size) -> None:
        if was != now:
            raise ValueError(
                f"Tensor {index} had shape {tuple(was)} when its mean began and now has shape {tuple(now)}. "
                "A mean cannot change shape: start a new average after changing the model."
            )
