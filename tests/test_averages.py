"""Which iterates an average of a run takes in, against the recipes written down from their documentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flatminima.study.averages import Averaging
from flatminima.study.methods import AVERAGES, parse
from flatminima.study.settings import CompareSettings

ROWS, BATCH = 40, 8  # an epoch is five steps
SETTINGS = CompareSettings(steps=40, batch_size=BATCH)


def fed(name: str, total: int = 40) -> tuple[nn.Module, Any]:
    """A model whose weight after step t is t, all the way; what the average makes of it and its record."""
    model = nn.Linear(1, 1, bias=False).double()
    average = Averaging(parse(name), SETTINGS, model, ROWS)
    for t in range(total):
        nn.init.constant_(model.weight, float(t))
        average.after_step((t + 1) / total)
        if average.after_evaluation(1.0 if t < 30 else 9.0):
            break
    return model, average.finish([])


@pytest.mark.parametrize(
    ("name", "iterates"),
    [
        ("swa", [29, 34, 39]),  # from three quarters of the budget on, one an epoch
        ("lawa", [19, 24, 29, 34, 39]),  # the ends of the five latest epochs
        ("tail", list(range(30, 40))),
    ],
)
def test_a_uniform_average_is_over_the_iterates_of_its_recipe(name: str, iterates: list[int]) -> None:
    model, (swad, record) = fed(name)
    assert model.weight.item() == pytest.approx(sum(iterates) / len(iterates), rel=0.03 if name == "tail" else 1e-12)
    assert swad is None
    if name != "tail":
        assert record["n"] == len(iterates)


def test_ema_remembers_a_tenth_of_the_run() -> None:
    model, (_, record) = fed("ema")
    decay = torch.exp(torch.tensor(-1 / 4.0, dtype=torch.float64))
    weights = decay ** torch.arange(39, -1, -1)
    assert model.weight.item() == pytest.approx(float((weights * torch.arange(40)).sum() / weights.sum()), rel=1e-6)
    assert record == {"n": 40, "timescale": 4.0}
    shorter = Averaging(parse("sam+ema"), SETTINGS, model, ROWS)  # half as many steps for the same gradients
    assert shorter.options == {"timescale": 2.0}


@pytest.mark.parametrize("name", ["swad", "swad-released"])
def test_swad_ends_with_its_valley_and_says_where_it_was(name: str) -> None:
    model, (swad, record) = fed(name)
    assert record is None
    assert swad["converged"]
    assert swad["end_step"] < 39
    assert swad["start_step"] <= model.weight.item() <= swad["end_step"]


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("optimizer", ["sgd", "sam", "ae-sam", "sa-gd"])
def test_the_shortest_run_has_an_average(name: str, optimizer: str) -> None:
    model = nn.Linear(1, 1, bias=False)
    settings = CompareSettings(steps=2, batch_size=BATCH)
    average = Averaging(parse(f"{optimizer}+{name}"), settings, model, ROWS)
    steps = 1 if optimizer in ("sam", "ae-sam") else 2
    for t in range(steps):
        nn.init.constant_(model.weight, 5.0)
        average.after_step((t + 1) / steps)
        average.after_evaluation(1.0)
    average.finish([])
    assert model.weight.item() == 5.0


def test_without_an_average_nothing_happens() -> None:
    model = nn.BatchNorm1d(2)
    average = Averaging(parse("sam"), SETTINGS, model, ROWS)
    average.after_step(1.0)
    assert not average.after_evaluation(1.0)
    assert average.finish([(torch.ones(3, 2), torch.zeros(3))]) == (None, None)
    assert torch.equal(model.running_mean, torch.zeros(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", AVERAGES)
def test_batchnorm_statistics_are_those_of_the_averaged_network(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Averaging(parse(name), CompareSettings(steps=2), model, ROWS)
    average.after_step(0.5)
    average.after_step(1.0)
    average.after_evaluation(1.0)
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    average.finish([(x[:10], torch.zeros(10)), (x[10:], torch.zeros(20))])
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0).detach())
