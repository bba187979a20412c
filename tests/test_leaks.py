"""What is measured is forgotten: no tensor of a network outlives its objective, its measures and its symmetries."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatminima import Objective
from flatminima.measures import MEASURES, measure
from flatminima.measures.base import NotApplicableError
from flatminima.symmetries import find_symmetries

ROWS, INPUTS, UNITS = 12, 33, 9  # a shape that nothing else in the process has
QUICK = {"trace", "w_hessian_w", "fisher_rao", "relative_flatness"}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, UNITS), nn.ReLU(), nn.Linear(UNITS, 3)).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, INPUTS, dtype=torch.float64), torch.arange(ROWS) % 3


def alive() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules of torch warn when somebody looks at them
        return sum(isinstance(o, torch.Tensor) and tuple(o.shape) == (UNITS, INPUTS) for o in gc.get_objects())


def test_an_objective_leaves_nothing() -> None:
    before = alive()
    f = Objective(network(), F.cross_entropy, data())
    f.hvp(torch.ones(f.n, dtype=torch.float64))
    f.ggnvp(torch.ones(f.n, 2, dtype=torch.float64))
    assert alive() > before  # the count sees what lives
    del f
    assert alive() == before


def test_symmetries_and_their_members_leave_nothing() -> None:
    before = alive()
    model = network()
    for symmetry in find_symmetries(model, data()[0]).found:
        symmetry.member(torch.Generator().manual_seed(0)).apply(model)
    del model, symmetry
    assert alive() == before


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(MEASURES)]
)
def test_a_measure_leaves_nothing(name: str) -> None:
    def once() -> None:
        try:
            measure(Objective(network(), F.cross_entropy, data()), (name,))
        except (NotApplicableError, ValueError):
            pytest.skip("needs more than a network and rows")

    once()  # what is kept once, such as a compiled function, is no leak
    before = alive()
    once()
    assert alive() == before
