"""Moving tensors away and bringing them back bit for bit.

Every sharpness-aware method moves the weights, looks, and comes back. Subtracting the perturbation does not come back: in
bfloat16 it drifts by half a percent in 200 steps, and data-parallel replicas drift apart. So the clean values are copied
before the move and copied back, into the same storage, whatever happens in between.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from flatminima.vectors import SMALL, dot, norm

_MARK = "_flatminima_elsewhere"
_LARGEST_HALF = torch.finfo(torch.float16).max


class Perturbation:
    """Move a set of tensors in place; restore exactly that set, exactly.

    Used as a context manager it restores on leaving, also when an exception passes through. The buffers that hold the clean
    values are kept and reused by the next move (memory: one copy of what is moved).

    Example:
        >>> w = torch.ones(3)
        >>> with Perturbation() as away:
        ...     away.move([w], [torch.tensor([1.0, 2.0, 3.0])], 0.1)
        ...     print(w.tolist()[0] > 1)
        True
        >>> w.tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._moved: list[Tensor] = []
        self._clean: list[Tensor] = []
        self._known: list[Tensor] = []
        self._places: list[int] = []
        self._shapes: list[torch.Size] = []
        self._flat: Tensor | None = None
        self._views: list[Tensor] = []

    def __getstate__(self) -> dict[str, object]:
        """Nothing: buffers are made anew, and what is displaced stays with the original."""
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._forget()

    @property
    def active(self) -> bool:
        """Whether tensors are displaced at this moment."""
        return bool(self._moved)

    @property
    def clean(self) -> list[Tensor]:
        """The values that will be restored, in the order of the move; empty when nothing is displaced."""
        return self._clean if self._moved else []

    def move(
        self, tensors: Sequence[Tensor], directions: Sequence[Tensor], scale: float | Sequence[float] = 1.0
    ) -> None:
        """``tensor += scale * direction``, in place, remembering the clean values.

        Args:
            tensors: what to move; the storage stays the same.
            directions: one per tensor, of its shape (any floating dtype; the sum is rounded once). A sequence with a method
                ``add_to(i, tensor, factor)`` adds its items itself, in order, after the clean values are safe.
            scale: one factor, or one per tensor.

        Raises:
            RuntimeError: a move is still active (restore it first), so that a clean value is never overwritten.
            ValueError: the numbers of tensors, directions and scales differ.
        """
        if self._moved:
            raise RuntimeError("these tensors are already displaced: call restore() before the next move")
        scales = list(scale) if isinstance(scale, Sequence) else [float(scale)] * len(tensors)
        if not len(tensors) == len(directions) == len(scales):
            raise ValueError(
                f"got {len(tensors)} tensors, {len(directions)} directions and {len(scales)} scales; expected equal"
            )
        if not tensors:
            return
        targets = list(tensors)
        self._require_buffers(targets)
        # Dispatch below autograd is a seventh cheaper; version counters are kept up all the same.
        with torch.inference_mode():
            if self._flat is not None:
                torch.cat(self._views, out=self._flat)
            else:
                torch._foreach_copy_(self._clean, targets)
            self._moved = targets
            if hasattr(directions, "add_to"):
                for i, (target, factor) in enumerate(zip(targets, scales, strict=True)):
                    directions.add_to(i, target, factor)
            elif len(set(scales)) == 1:
                add(targets, list(directions), scales[0])
            else:
                for factor in dict.fromkeys(scales):
                    chosen = [i for i, s in enumerate(scales) if s == factor]
                    add([targets[i] for i in chosen], [directions[i] for i in chosen], factor)
        # Within one autocast block a pass would find the weights of the pass before, cast and kept.
        torch.clear_autocast_cache()

    def _require_buffers(self, targets: list[Tensor]) -> None:
        known = len(targets) == len(self._known) and all(map(operator.is_, targets, self._known))
        if not (
            known and [t.data_ptr() for t in targets] == self._places and [t.shape for t in targets] == self._shapes
        ):
            with torch.inference_mode(False), torch.no_grad():
                self._prepare(targets)

    def _prepare(self, targets: list[Tensor]) -> None:
        """Allocate for targets that are not those of the last move."""
        self._forget()
        self._known, self._places, self._shapes = targets, [t.data_ptr() for t in targets], [t.shape for t in targets]
        if _packable(targets):
            sizes = [t.numel() for t in targets]
            self._flat = torch.empty(sum(sizes), dtype=targets[0].dtype, device=targets[0].device)
            self._views = [t.detach().view(-1) for t in targets]
            self._clean = [piece.view(t.shape) for piece, t in zip(self._flat.split(sizes), targets, strict=True)]
        else:
            self._clean = [torch.empty_like(t, requires_grad=False) for t in targets]

    def restore(self) -> None:
        """Copy the clean values back; nothing happens when nothing is displaced."""
        if self._moved:
            with torch.inference_mode():
                torch._foreach_copy_(self._moved, self._clean)
            self._moved = []
            torch.clear_autocast_cache()

    @torch.no_grad()
    def realised(
        self, directions: Sequence[Tensor], scales: Sequence[float], whole: Sequence[Tensor] | None = None
    ) -> tuple[float, float]:
        r"""How much of an intended move :math:`e_i = s_i d_i` survived rounding.

        Returns:
            The length of the move that was made, and its cosine with the intended one (NaN when either is zero). In bfloat16 a
            perturbation below half a unit in the last place vanishes coordinate by coordinate.

        Example:
            >>> w, away = torch.ones(2, dtype=torch.bfloat16), Perturbation()
            >>> away.move([w], [torch.tensor([1.0, 1e-3])], 1.0)
            >>> away.realised([torch.tensor([1.0, 1e-3])], [1.0])[0]
            1.0
            >>> away.restore()
        """
        made = [
            t.detach().float() - c.float() if t.dtype.itemsize < 4 else t.detach() - c
            for t, c in zip(self._moved, self._clean, strict=True)
        ]
        meant = [d.to(m.dtype) * s for d, m, s in zip(directions, made, scales, strict=True)]
        length, intended = norm(made, whole), norm(meant, whole)
        cosine = dot(made, meant, whole) / (length * intended) if length > 0 and intended > 0 else math.nan
        return length, cosine

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def add(targets: list[Tensor], directions: list[Tensor], factor: float) -> None:
    """``target += factor * direction``, in single precision where the factor is too large for half precision."""
    if abs(factor) > _LARGEST_HALF and torch.float16 in {t.dtype for t in targets}:
        for target, direction in zip(targets, directions, strict=True):
            wide = torch.promote_types(target.dtype, torch.float32)
            target.copy_(target.to(wide).add_(direction, alpha=factor))
    else:
        torch._foreach_add_(targets, directions, alpha=factor)


def mark(tensors: Iterable[Tensor], why: str | None) -> None:
    """Say that these tensors do not hold the weights being trained, and why; None when they do again."""
    for tensor in tensors:
        if why is None:
            vars(tensor).pop(_MARK, None)
        else:
            setattr(tensor, _MARK, why)


def marked(tensor: Tensor) -> str | None:
    """Why this tensor does not hold the weight being trained, as :func:`mark` has it."""
    return getattr(tensor, _MARK, None)


def _packable(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return (
        len(tensors) > 1
        and all(t.dtype == first.dtype and t.device == first.device and t.is_contiguous() for t in tensors)
        and sum(t.numel() for t in tensors) < SMALL * len(tensors)
    )
