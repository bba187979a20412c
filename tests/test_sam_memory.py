"""Memory that a step takes besides weights, gradients and the base's state, in copies of the parameters."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatminima import SAM

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, WIDTH = 8, 160


class Alive(TorchDispatchMode):
    """The most bytes of floating-point storage made inside the block that were alive at once."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in known}
        self.found: dict[int, weakref.ref[Tensor]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.found[id(tensor)] = weakref.ref(tensor)  # an id may have been another's before
        alive = [tensor.untyped_storage() for ref in self.found.values() if (tensor := ref()) is not None]
        self.peak = max(self.peak, sum({storage._cdata: storage.nbytes() for storage in alive}.values()))
        return out


def test_the_probe_sees_what_is_made() -> None:
    known = torch.zeros(10)
    with Alive(known) as alive:
        known.add_(1)
        kept = [torch.zeros(100) for _ in range(3)]
        kept[0].view(10, 10).mul_(2)
        del kept[0]
        kept.append(torch.ones(100))
    assert alive.peak == 1200


@pytest.mark.parametrize(
    ("variant", "copies"),
    [
        ("sam", 1.0),  # the clean weights
        ("m-sam", 1.0),
        ("every-k", 1.0),
        ("msam", 1.0),
        ("asam", 1.0 + 1 / LAYERS),  # and one tensor at a time
        ("friendly-sam", 3.0),  # and the running mean, which is kept, and what is left of the gradient without it
        ("looksam", 3.0),  # and the direction, which is kept, and its successor
        ("gsam", 1.0),
        ("sam-on", 0.01),
    ],
)
def test_copies_of_the_parameters(variant: str, copies: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    given = {"model": model} if variant == "sam-on" else {}
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, variant=variant, **given)
    gradients, others = ([torch.randn_like(p, requires_grad=False) for p in model.parameters()] for _ in range(2))
    for p in model.parameters():  # what the base keeps is not the wrapper's
        opt.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)

    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(0)
        for p, g in zip(model.parameters(), gradients if len(calls) % 2 else others, strict=True):
            p.grad = g
        return torch.zeros(())

    state = [s["momentum_buffer"] for s in opt.state.values()]
    with Alive(*model.parameters(), *gradients, *others, *state) as alive:
        for _ in range(6):
            opt.step(closure)
    assert opt.skipped == 0
    assert copies - 0.02 <= alive.peak / size <= copies + 0.02
