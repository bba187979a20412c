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

from flatminima.batches import count_rows, cut_rows, moved
from flatminima.names import nearest_first
from flatminima.objective import batches
from flatminima.study.user_code import in_a_line, user_line

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
        TargetError: not of that form, no such file or function, an exception in the file or the function (its line is given),
            another return value, NaN in the inputs, inputs or probes that the model does not take, or labels that a
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
    except Exception as error:
        raise TargetError(f"{reference} failed at {user_line(error) or path}: {in_a_line(error)}") from error
    fits = isinstance(built, tuple) and len(built) in (3, 4) and isinstance(built[0], nn.Module)
    if not (fits and (built[1] is None or callable(built[1]))):
        kinds = ", ".join(type(v).__name__ for v in built) if isinstance(built, tuple) else type(built).__name__
        raise TargetError(f"{reference} returned ({kinds}); expected a module, a loss function and data: {_EXAMPLE}")
    model = built[0].to(device)
    pairs = _checked(model, built[1], batches(built[2]))
    if len(built) == 4 and isinstance(built[3], Tensor | tuple | Mapping):
        _tried(model, built[3], "the probes")
    return Target(model, built[1], pairs, *built[3:])


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
    own_classes = _own_classes(model) if loss_fn is None else None
    for number, (x, y) in enumerate(pairs):
        for part in x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple) else (x,):
            if isinstance(part, Tensor) and part.is_floating_point() and part.isnan().any():
                raise TargetError(f"NaN in the inputs: batch {number}, row {int(part.isnan().nonzero()[0, 0])}")
        if own_classes is not None:  # such a model looks its labels up when it is tried
            _refuse_labels(y, own_classes, -100, number)
    widths: dict[Any, int | None] = {}
    for number, (x, y) in enumerate(pairs):
        form = _form(x)
        if form not in widths:  # batches of one form are tried once
            widths[form] = _tried(model, x, f"the inputs of batch {number}")
        classes = widths[form]
        if classes is not None and classifies and isinstance(x, Tensor) and isinstance(y, Tensor) and y.dim() == 1:
            _refuse_labels(y, classes, getattr(loss_fn, "ignore_index", -100), number)
    return pairs


def _refuse_labels(y: Any, classes: int, ignored: int, number: int) -> None:
    if not (isinstance(y, Tensor) and y.dtype == torch.int64):
        return
    outside = (y != ignored) & ((y < 0) | (y >= classes))
    if outside.any():
        raise TargetError(
            f"label out of range: batch {number}, row {int(outside.nonzero()[0, 0])}: got {int(y[outside][0])}, "
            f"expected 0..{classes - 1} (the model's outputs)"
        )


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


def _form(x: Any) -> Any:
    """Names, types and shapes of inputs, but for their rows."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape[1:]
    if isinstance(x, Mapping):
        return tuple((name, _form(part)) for name, part in x.items())
    return tuple(map(_form, x)) if isinstance(x, tuple) else type(x)


def _tried(model: nn.Module, x: Any, what: str) -> int | None:
    """Width of the model's output on two rows, or on all where the model wants them together; ``None``: not one tensor.

    Raises:
        TargetError: the model fails on them; its line is given, if it is in a file of the user's.
    """
    parameter = next(model.parameters(), None)
    x = x if parameter is None else moved(x, parameter.device)
    rows = count_rows(x)
    if not rows:
        return None
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            try:
                output = _called(model, cut_rows(x, rows, slice(0, 2)))
            except Exception:
                output = _called(model, x)
    except Exception as error:
        where = user_line(error, called_by_us=True)
        raise TargetError(
            f"the model fails on {what}, {_shapes(x)}" + (f", at {where}" if where else "") + f": {in_a_line(error)}"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    return int(output.shape[-1]) if isinstance(output, Tensor) and output.dim() else None


def _called(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _shapes(x: Any) -> str:
    if isinstance(x, Mapping):
        return ", ".join(f"{name} {_shapes(part)}" for name, part in x.items())
    if isinstance(x, tuple):
        return ", ".join(map(_shapes, x))
    return f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"of type {type(x).__name__}"


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
    except Exception as error:
        del sys.modules[path.stem]
        raise TargetError(f"{path} failed at {user_line(error) or path}: {in_a_line(error)}") from error
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
