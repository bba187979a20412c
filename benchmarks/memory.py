"""Claim: SAM holds one more copy of the parameters; SWAD at most three, and two after convergence.

    make bench      # or: python benchmarks/memory.py

Counted, not estimated: the bytes of every tensor that an operation makes and that is still alive, storage by storage, in units
of the parameters. The model is twenty wide layers on one row, so that activations are a hundredth of it. What the base
optimiser itself holds (gradients, momentum, temporaries) is taken off: a row is what a method costs on top.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from flatminima.averaging import EMA, LAWA, SWA, SWAD, TailAverage
from flatminima.optim import BSAM, SAM, VARIANTS

WIDTH, LAYERS, STEPS, PARTS = 256, 20, 12, 4


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations return and that are alive, now and at most; the model's own are left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self._own:
                self._storages.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, self.now())
        return out

    def now(self) -> int:
        """A storage that is gone is forgotten: its address may be given to another."""
        self._storages = {at: kept for at, kept in self._storages.items() if not kept[0].expired()}
        return sum(size for _, size in self._storages.values())


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU())]
    return nn.Sequential(*layers)


def size_of(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def training(build: Callable[[nn.Module], torch.optim.Optimizer], parts: int = 1) -> tuple[float, float]:
    """Copies of the parameters alive at most, and between steps with the gradients cleared."""
    model = network()
    x = torch.randn(parts, WIDTH)
    with Alive(model) as alive:
        optimizer = build(model)

        def closure(x: Tensor) -> Callable[[], Tensor]:
            def call() -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            return call

        calls: Any = [closure(part) for part in x.chunk(parts)]
        for _ in range(STEPS):
            optimizer.step(calls if parts > 1 else calls[0])
        optimizer.zero_grad()
        rest = alive.now()
    return alive.most / size_of(model), rest / size_of(model)


def averaging(build: Callable[[nn.Module], Any], evaluate: bool = False) -> tuple[float, float, float]:
    """Copies alive at most while updating, between updates, and at most while the average is in use.

    SWAD sees a loss that falls for eight evaluations and stays in its valley for the rest.
    """
    model = network()
    with Alive(model) as alive:
        average = build(model)
        for evaluation in range(30):
            for _ in range(5):
                average.update()
            if evaluate:
                average.evaluate(2.0 - 0.1 * min(evaluation, 8) + 0.001 * evaluation)
        average.update()  # the first iterate of a new segment
        most, rest = alive.most, alive.now()
        alive.most = 0
        if isinstance(average, SWAD):
            average.finalize()
        if not isinstance(average, Averaged):
            with average.swapped(model):
                pass
    return most / size_of(model), rest / size_of(model), alive.most / size_of(model)


class Averaged:
    """torch.optim.swa_utils.AveragedModel, for comparison; it is a second model, so that using it costs nothing more."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.average = model, AveragedModel(model, **options)

    def update(self) -> None:
        self.average.update_parameters(self.model)


def check() -> None:
    """Two copies, then one of them let go, then its memory taken by another."""
    model = network()
    with Alive(model) as alive, torch.no_grad():
        kept = [p.clone() for p in model.parameters()]
        other = [p.clone() for p in model.parameters()]
        assert alive.now() == alive.most == 2 * size_of(model)
        del other
        assert alive.now() == size_of(model)
        views = [k.view(-1)[1:] for k in kept]
        del kept
        torch._foreach_mul_(list(model.parameters()), 1.0)
        assert alive.now() == size_of(model) == alive.most / 2, "a view keeps what it looks at"
        del views
        assert alive.now() == 0


def main() -> None:
    check()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}; {size_of(network()) / 2**20:.1f} MiB of parameters\n")
    most, rest = training(sgd)
    print(f"SGD with momentum: {most:.2f} copies at most (gradient and momentum), {rest:.2f} between steps\n")
    print("| optimiser, copies of the parameters on top of SGD's | at most | between steps |\n| --- | --- | --- |")
    for variant in VARIANTS:

        def sam(model: nn.Module, variant: str = variant) -> torch.optim.Optimizer:
            return SAM(sgd(model), variant=variant, model=model)

        found = training(sam, parts=PARTS if variant == "m-sam" else 1)
        print(f"| {variant} | {found[0] - most:.2f} | {found[1] - rest:.2f} |")
    found = training(lambda model: BSAM(model.parameters(), 1000, lr=1e-3, model=model))
    print(f"| bsam (instead of SGD) | {found[0] - most:.2f} | {found[1] - rest:.2f} |")
    adam = training(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
    print(f"| AdamW (instead of SGD) | {adam[0] - most:.2f} | {adam[1] - rest:.2f} |")
    print("\n| average, copies of the parameters | at most in updates | between updates | more in use |")
    print("| --- | --- | --- | --- |")
    averages: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
        "swa": (SWA, False),
        "ema": (EMA, False),
        "lawa, k = 5": (lambda model: LAWA(model, every=1), False),
        "tail, at most 8 blocks": (TailAverage, False),
        "swad": (SWAD, True),
        "swad-released": (lambda model: SWAD(model, variant="released"), True),
        "AveragedModel": (lambda model: Averaged(model, multi_avg_fn=get_ema_multi_avg_fn()), False),
    }
    for name, (build, evaluate) in averages.items():
        updating, between, using = averaging(build, evaluate)
        more = "0" if name == "AveragedModel" else f"{max(0.0, using - between):.2f}"
        print(f"| {name} | {updating:.2f} | {between:.2f} | {more} |")


if __name__ == "__main__":
    main()
