"""Averages in odd company: parameters of every kind, copies, inference mode, a named device."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatminima.averaging import EMA, LAWA, SWA, SWAD, TailAverage

pytestmark = pytest.mark.usefixtures("one_thread")


class Odd(nn.Module):
    """Parameters of every kind, one of them empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)
        self.nothing = nn.Parameter(torch.zeros(0, 2))
        self.number = nn.Parameter(torch.tensor(1.0))
        self.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(4).bfloat16())


def every_average(model: nn.Module, **options: Any) -> dict[str, Any]:
    return {
        "SWA": SWA(model, **options),
        "EMA": EMA(model, 5.0, **options),
        "LAWA": LAWA(model, 3, every=1, **options),
        "TailAverage": TailAverage(model, 0.5, copies=3, **options),
        "SWAD": SWAD(model, n_converge=1, n_tolerance=2, **options),
    }


def go_on(model: nn.Module, averages: dict[str, Any], steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_((0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype))
        for average in averages.values():
            average.update()
        averages["SWAD"].evaluate(1.0)


def outcome(averages: dict[str, Any]) -> dict[str, tuple[Tensor, ...]]:
    return {name: a.finalize().tensors if isinstance(a, SWAD) else a.tensors() for name, a in averages.items()}


def equal(a: dict[str, tuple[Tensor, ...]], b: dict[str, tuple[Tensor, ...]]) -> bool:
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def test_parameters_of_every_kind() -> None:
    model = Odd()
    averages = every_average(model)
    exact = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float64)) for p in model.parameters()]
    for step in range(6):
        go_on(model, averages, 1, step)
        with torch.no_grad():
            for total, p in zip(exact, model.parameters(), strict=True):
                total.add_(p.to(total.dtype) / 6)
    for mean, total in zip(averages["SWA"].tensors(), exact, strict=True):
        torch.testing.assert_close(mean.to(total.dtype), total, rtol=1e-6, atol=1e-6)
    averages["SWA"].copy_to(model)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_as_the_original_would(way: Any) -> None:
    model = Odd()
    averages = every_average(model)
    go_on(model, averages, 5, 0)
    twin, others = way((model, averages))
    go_on(model, averages, 5, 1)
    go_on(twin, others, 5, 1)
    assert equal(outcome(averages), outcome(others))


def test_inference_mode_makes_no_difference() -> None:
    model, twin = Odd(), Odd()
    averages, others = every_average(model), every_average(twin)
    with torch.inference_mode():
        go_on(model, averages, 3, 0)
    go_on(model, averages, 3, 1)
    for seed in (0, 1):
        go_on(twin, others, 3, seed)
    with torch.inference_mode():
        found = outcome(averages)
    assert equal(found, outcome(others))
    with averages["SWA"].swapped():
        pass


def test_an_average_kept_on_the_cpu_of_a_model_that_is_there() -> None:
    model, twin = Odd(), Odd()
    averages, others = every_average(model, device="cpu"), every_average(twin)
    go_on(model, averages, 6, 0)
    go_on(twin, others, 6, 0)
    assert equal(outcome(averages), outcome(others))
    again = every_average(model, device="cpu")
    for name, average in again.items():
        average.load_state_dict(averages[name].state_dict())
    assert equal(outcome(averages), outcome(again))


@pytest.mark.parametrize("make", [SWA, lambda m: EMA(m, 10.0), lambda m: LAWA(m, 2, every=1), TailAverage])
@pytest.mark.parametrize("given", ["module", "named"])
def test_an_average_whose_parameters_were_replaced_is_not_handed_out(make: Any, given: str) -> None:
    model = nn.Linear(2, 2)
    average = make(model if given == "module" else list(model.named_parameters()))
    average.update()
    model.weight = nn.Parameter(torch.zeros(2, 2))
    average.update()
    with pytest.raises(ValueError, match="'weight' was replaced or removed after the average was made"):
        average.copy_to(model)
    assert not bool(model.weight.any())
    if given == "module":
        for use in (average.tensors, lambda: average.swapped().__enter__()):
            with pytest.raises(ValueError, match="'weight' was replaced"):
                use()
        average.copy_to(nn.Linear(2, 2))
        for _ in range(998):
            average.update()
        with pytest.raises(ValueError, match="'weight' was replaced"):
            average.update()


def test_a_parameter_that_is_unfrozen_later_keeps_its_value_as_documented() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    average = SWA(model)
    average.update()
    model.bias.requires_grad_(True)
    for value in (1.0, 3.0):
        for p in model.parameters():
            nn.init.constant_(p, value)
        average.update()
    average.copy_to(model)
    assert average.names == ("weight",)
    assert model.bias.tolist() == [3.0, 3.0]
