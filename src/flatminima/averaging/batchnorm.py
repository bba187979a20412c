"""BatchNorm statistics for weights that no training step has visited, such as an average.

The usual recipe runs the training loop's forward pass: dropout changes the variance, a short last batch counts as much
as a full one, and averaging the batches' variances loses the variance between batches. Here only the BatchNorm layers
train, and mean and variance are those of all rows pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Pooled:
    """Mean and sum of squared deviations per channel, pooled over batches (Chan, Golub and LeVeque 1979)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        count = x.numel() // x.shape[1] if x.ndim > 1 and x.shape[1] else 0
        if count < 2:
            raise ValueError(
                f"BatchNorm layer {self.name!r} got an input of shape {tuple(x.shape)}: {count} value(s) per channel "
                "have no variance. Use a batch size that leaves no single row at the end, or drop_last=True."
            )
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=[0, *range(2, x.ndim)], correction=0)
        # Metal has no float64; everywhere else these short vectors cost nothing.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        mean, squares = mean.to(dtype), variance.to(dtype) * count
        total = self.count + count
        if self.mean is None or self.squares is None:
            self.mean, self.squares = mean, squares
        else:
            delta = mean - self.mean
            self.mean = self.mean + delta * (count / total)
            self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total
        self.calls += 1

    def write(self, layer: _BatchNorm) -> None:
        if self.mean is None or self.squares is None:
            return
        variance = self.squares / (self.count - 1)
        if not bool((self.mean.isfinite() & variance.isfinite()).all()):
            raise ValueError(
                f"The inputs of BatchNorm layer {self.name!r} hold a NaN or an infinity, so it has no statistics. "
                "Look for it in the batches and in the weights before this layer."
            )
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(variance)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(self.calls)


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
) -> int:
    """Replace the running statistics of every BatchNorm layer by those of ``batches``, pooled over all rows.

    Per channel, over batches ``b`` of ``n_b`` values each (rows, times positions in an image; ``N = sum n_b``)::

        mean = sum_b n_b mean_b / N
        var  = (sum_b n_b var_b + sum_b n_b (mean_b - mean)^2) / (N - 1)      # within and between batches

    so a short last batch counts by its rows and the result does not depend on how the rows were cut, for a layer whose
    inputs do not. (A layer behind another BatchNorm sees inputs normalised by batch, as in training.) During the pass
    BatchNorm layers are in train mode and everything else, dropout included, is in eval mode; afterwards every module
    is in the mode it was in. ``num_batches_tracked`` becomes the number of batches. If anything fails, the old
    statistics are back. A BatchNorm layer in eval mode inside a model in train mode is taken as frozen and left alone.

    Args:
        model: any module. Layers without running statistics are ignored.
        batches: an iterable of batches: tensors, ``(input, ...)`` sequences, or mappings of keyword arguments; moved to
            the model's device. Bound an endless loader with ``itertools.islice``. Use training inputs.
        forward: runs one batch through the model, for any other kind of batch or an autocast context; it is given the
            batch as it comes and its result is ignored.

    Returns:
        the number of batches used; 0, with no batch drawn, if there is no BatchNorm layer to re-estimate.

    Raises:
        TypeError: ``batches`` is a tensor or an ``(x, y)`` pair instead of an iterable of batches.
        ValueError: no batch, no BatchNorm layer reached, one value per channel, or a statistic that is not finite.

    Cost: one forward pass per batch, no gradient. Statistics are taken in float32 or wider and pooled in float64.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, section 3.2
    (that statistics must be recomputed); the pooling is the law of total variance.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> reestimate_batchnorm(layer, [torch.tensor([[0.0], [5.0]]), torch.tensor([[5.0], [5.0], [5.0], [10.0]])])
        2
        >>> layer.running_mean, layer.running_var
        (tensor([5.]), tensor([10.]))
    """
    if isinstance(batches, Tensor) or (isinstance(batches, tuple) and all(isinstance(x, Tensor) for x in batches)):
        raise TypeError(
            "batches must be an iterable of batches, such as a DataLoader, but one batch was given. "
            "Wrap it in a list: [x] or [(x, y)]."
        )
    layers = _live_layers(model)
    if not layers:
        return 0
    run = forward if forward is not None else _Forward(model, _device(layers))
    modes = {module: module.training for module in model.modules()}
    old = [(buffer, buffer.clone()) for layer in layers.values() for buffer in layer.buffers()]
    pooled = {name: _Pooled(name) for name in layers}
    hooks = [layer.register_forward_pre_hook(pooled[name], with_kwargs=True) for name, layer in layers.items()]
    try:
        # The flag itself, not module.train(): models override train() to keep layers frozen.
        for module in modes:
            module.training = False
        for layer in layers.values():
            layer.training = True
        used = 0
        for batch in batches:
            run(batch)
            used += 1
        if used == 0:
            raise ValueError("There is no data: batches is empty, so BatchNorm statistics cannot be estimated.")
        if not any(statistic.calls for statistic in pooled.values()):
            raise ValueError(
                f"No BatchNorm layer of the model ({', '.join(map(repr, list(layers)[:3]))}) was reached in {used} "
                "batches. Check that forward calls this very model, not a copy or an earlier compiled version of it."
            )
        for name, layer in layers.items():
            pooled[name].write(layer)
    except BaseException:
        for buffer, value in old:
            buffer.copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return used


class _Forward:
    """One batch through the model: its first element if it is a sequence, as keywords if it is a mapping."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device

    def __call__(self, batch: Any) -> object:
        if isinstance(batch, Mapping):
            moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            return self.model(**moved)
        x = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(
                f"A batch is a {type(batch).__name__} that does not begin with a tensor. "
                "Pass forward=lambda batch: model(...) to say how to run it."
            )
        return self.model(x.to(self.device))


def _live_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers whose running statistics are in use and not frozen, by name."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if model.training:
        return {name: layer for name, layer in layers.items() if layer.training}
    return layers


def _device(layers: Mapping[str, _BatchNorm]) -> torch.device:
    return next(buffer.device for layer in layers.values() for buffer in layer.buffers())
