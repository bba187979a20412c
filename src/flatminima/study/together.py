"""The arithmetic of one step of many networks at once, equal in every bit to the step of each network by itself.

``torch.func.vmap`` turns the matrix products of a stack of networks into batched ones. Three places round differently from
what PyTorch does for one network, and are put right here: a linear layer adds its bias inside the product (``addmm``; batched:
``baddbmm``), its weight gradient is one product of a fixed orientation, and an SGD step is one fused multiply-add.
What remains is up to the BLAS at hand, and is tried out rather than assumed: :func:`same_bits` compares before a stack is
trusted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Stack: TypeAlias = "dict[str, Tensor]"
"""Parameters by name, each with the members along a first axis."""

_ALIGNMENT = 64  # bytes; of every tensor that PyTorch allocates on the CPU
_COMPARED = 500  # members that a trial of unaligned ones looks at, in all


class _Linear(torch.autograd.Function):
    """``F.linear`` with the rounding that it has for one network, batched or not."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.wants_input = ctx.needs_input_grad[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (out,) = gradients
        return (out @ weight if ctx.wants_input else None), out.t() @ x, out.sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, int]:
        x, weight, bias = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((x, weight, bias), in_dims, strict=True)
        )
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2)), 0


class _ExactLinear(TorchFunctionMode):
    """Within it, linear layers on matrices are :class:`_Linear`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) == 3 and not kwargs and args[2] is not None and args[0].dim() == 2:
            return _Linear.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def stacked_outputs(model: nn.Module, stack: Stack, x: Tensor) -> Tensor:
    """Outputs of every member, ``(members, rows, classes)``, at its own rows ``(members, rows, ...)`` or at shared ones.

    Args:
        model: the network whose parameters the stack replaces; its own are not looked at.
        stack: parameters.
        x: inputs; with one axis more than the model takes, members have their own.
    """

    def one(parameters: Stack, rows: Tensor) -> Tensor:
        with _ExactLinear():
            out: Tensor = functional_call(model, parameters, (rows,))
        return out

    found: Tensor = vmap(one, randomness="error")(stack, x)
    return found


def stacked_gradients(model: nn.Module, stack: Stack, x: Tensor, y: Tensor) -> Stack:
    """Gradients of the mean cross entropy of every member at its rows ``(members, rows, ...)``."""

    def loss(parameters: Stack, rows: Tensor, labels: Tensor) -> Tensor:
        with _ExactLinear():
            return F.cross_entropy(functional_call(model, parameters, (rows,)), labels)

    found: Stack = vmap(grad(loss), randomness="error")(stack, x, y)
    return found


def gradients_alone(model: nn.Module, parameters: Stack, x: Tensor, y: Tensor) -> Stack:
    """Gradients of one network, as ``backward`` computes them."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    loss = F.cross_entropy(functional_call(model, leaves, (x,)), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it PyTorch computes with one thread: how threads share a product decides how it rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def member(stack: Stack, index: int) -> Stack:
    """The parameters of one member; views."""
    return {name: p[index] for name, p in stack.items()}


def same_bits(model: nn.Module, stack: Stack, x: Tensor, y: Tensor, together: Callable[[Stack, Tensor], Stack]) -> bool:
    """Whether gradients taken together are, of every member, those that it has by itself, to the last bit.

    Tried at what is at hand and at noise of its shape: pictures are mostly zeros, which hide the order of a sum, and so do
    dead units.
    """
    for parameters, rows in _trials(stack, x):
        found = together(parameters, rows)
        for index in range(len(x)):
            own = {name: p.clone() for name, p in member(parameters, index).items()}  # at an address of its own
            alone = gradients_alone(model, own, rows[index].clone(), y[index])
            if not all(torch.equal(g, found[name][index]) for name, g in alone.items()):
                return False
    return True


def same_outputs(model: nn.Module, stack: Stack, x: Tensor, together: Callable[[Stack, Tensor], Tensor]) -> bool:
    """Whether outputs taken together are, of every member, those that it has by itself; tried as by :func:`same_bits`."""
    for parameters, rows in _trials(stack, x):
        found = together(parameters, rows)
        for index in range(len(x)):
            own = {name: p.clone() for name, p in member(parameters, index).items()}
            if not torch.equal(outputs_alone(model, own, rows[index].clone()), found[index]):
                return False
    return True


def _trials(stack: Stack, x: Tensor) -> Iterator[tuple[Stack, Tensor]]:
    """Parameters and rows to try a stack at.

    A tensor of its own begins at a multiple of 64 bytes. Where the matrices of members do not, products take other paths, whose
    sums come out differently now and then only: one trial may miss then what hundreds of steps will not.
    """
    yield stack, x
    aligned = all(p[0].numel() * p.element_size() % _ALIGNMENT == 0 for p in stack.values() if p.dim() > 2)
    for seed in range(1 if aligned else math.ceil(_COMPARED / len(x))):
        generator = torch.Generator().manual_seed(seed)
        yield (
            {
                name: torch.randn(p.shape, generator=generator).to(p) / math.sqrt(p.shape[-1])
                for name, p in stack.items()
            },
            torch.randn(x.shape, generator=generator).to(x),
        )


def outputs_alone(model: nn.Module, parameters: Stack, x: Tensor) -> Tensor:
    """Outputs of one network."""
    with torch.no_grad():
        found: Tensor = functional_call(model, parameters, (x,))
    return found
