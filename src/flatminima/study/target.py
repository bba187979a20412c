"""A user's own minimum: a function in their own file that returns model, loss and data."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.batches import count_rows, cut_rows
from flatminima.names import nearest_first
from flatminima.objective import batches

_EXAMPLE = (
    "def build(): return model, loss_fn, (x, y), or these and unlabelled probes; loss_fn may be None where the model computes "
    "its own loss"
)


class TargetError(ValueError):
    """``file.py:function`` does not lead to a model, a loss and data; the message says why."""


@dataclass(frozen=True)
class Target:
    """What is measured: ``loss_fn(model(x), y)`` averaged over the data; without ``loss_fn`` the ``.loss`` of the output.

    ``probes`` are inputs without targets, for the measures that look at some.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor] | None
    data: Any
    probes: Any = None


def load_target(reference: str, device: torch.device | str = "cpu") -> Target:
    """Import ``path/to/file.py:function`` and call the function.

    The function takes no argument and returns ``(model, loss_fn, data)`` where data are ``(x, y)`` tensors, a dictionary for
    ``model(**batch)``, or an iterable of such batches. A model that computes its own loss, as those of Hugging Face do when
    the batch holds ``labels``, comes with ``None`` for ``loss_fn``. A fourth value, if there is one, are probes: inputs without
    targets. The file runs as if it were imported from its own folder.

    Raises:
        TargetError: not of that form, no such file or function, another return value, NaN in the inputs, or labels that a
            cross-entropy cannot take (batch and row are given).
    """
    path_text, colon, name = reference.rpartition(":")
    if not colon or not path_text or not name:
        raise TargetError(f"expected path/to/file.py:function, got {reference!r}")
    path = Path(path_text)
    if not path.is_file():
        raise TargetError(f"no file {path}; expected path/to/file.py:function")
    function = getattr(_module(path), name, None)
    if not callable(function):
        names = [n for n, v in vars(_module(path)).items() if callable(v) and getattr(v, "__module__", "") == path.stem]
        raise TargetError(
            f"{path} has no function {name!r}" + (f"; it has {', '.join(nearest_first(name, names))}" if names else "")
        )
    try:
        built = function()
    except ValueError as error:  # not one of ours: the user needs the traceback into their own code
        raise RuntimeError(f"{reference} raised {type(error).__name__}: {error}") from error
    fits = isinstance(built, tuple) and len(built) in (3, 4) and isinstance(built[0], nn.Module)
    if not (fits and (built[1] is None or callable(built[1]))):
        kinds = ", ".join(type(v).__name__ for v in built) if isinstance(built, tuple) else type(built).__name__
        raise TargetError(f"{reference} returned ({kinds}); expected a module, a loss function and data: {_EXAMPLE}")
    return Target(built[0].to(device), built[1], _checked(built[0], built[1], batches(built[2])), *built[3:])


def first_rows(data: list[tuple[Any, Any]], rows: int) -> list[tuple[Any, Any]]:
    """The first so many rows of a list of batches, in their order.

    Raises:
        TargetError: fewer than one row, or fewer there than asked for.

    Example:
        >>> (x, y), = first_rows([(torch.arange(4.0), torch.arange(4))], 3)
        >>> x.tolist(), y.tolist()
        ([0.0, 1.0, 2.0], [0, 1, 2])
    """
    if rows < 1:
        raise TargetError(f"--rows must be at least 1, got {rows}")
    chosen: list[tuple[Any, Any]] = []
    left = rows
    for x, y in data:
        if left <= 0:
            break
        count = count_rows(y if isinstance(y, Tensor) and y.dim() else x)
        if left >= count:
            chosen.append((x, y))
        else:
            chosen.append((cut_rows(x, count, slice(0, left)), cut_rows(y, count, slice(0, left))))
        left -= count
    if left > 0:
        raise TargetError(f"--rows {rows}: the data have {rows - left} rows")
    return chosen


def _checked(model: nn.Module, loss_fn: Any, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Refuse, by batch and row, what would only show as a NaN or as an index error of the loss."""
    classifies = loss_fn in (F.cross_entropy, F.nll_loss) or isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
    ignored = getattr(loss_fn, "ignore_index", -100)
    for number, (x, y) in enumerate(pairs):
        for part in x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple) else (x,):
            if isinstance(part, Tensor) and part.is_floating_point() and part.isnan().any():
                raise TargetError(f"NaN in the inputs: batch {number}, row {int(part.isnan().nonzero()[0, 0])}")
        classes = None
        if isinstance(y, Tensor) and y.dtype == torch.int64:
            if classifies and isinstance(x, Tensor) and y.dim() == 1:
                classes = _classes(model, x[:1])
            elif loss_fn is None:
                classes = _own_classes(model)
        if isinstance(y, Tensor) and classes is not None:
            outside = (y != ignored) & ((y < 0) | (y >= classes))
            if outside.any():
                row = int(outside.nonzero()[0, 0])
                raise TargetError(
                    f"label out of range: batch {number}, row {row}: got {int(y[outside][0])}, "
                    f"expected 0..{classes - 1} (the model's outputs)"
                )
    return pairs


def _own_classes(model: nn.Module) -> int | None:
    """Width of the output of a Hugging Face model, as its configuration and the name of its class say; ``None``: unknown."""
    config, name = getattr(model, "config", None), type(model).__name__
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return None
    if name.endswith(("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")):
        labels = getattr(config, "num_labels", None)
        return labels if labels != 1 else None  # one label is a regression
    if name.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM")):
        width = getattr(config, "vocab_size", None)
        return None if width is None else int(width)
    return None


def _classes(model: nn.Module, x: Tensor) -> int:
    """Width of the model's output."""
    parameter = next(model.parameters(), x)
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        width = model.eval()(x.to(parameter.device)).shape[-1]
    for module, mode in modes:
        module.training = mode
    return int(width)


def _module(path: Path) -> Any:
    if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) == str(path.resolve()):
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} cannot be imported as Python; expected path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
