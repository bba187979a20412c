"""PAC-Bayes noise on quadratics, where it is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flatminima import Measurement, MeasureOptions, Objective, measure
from flatminima.measures import NotApplicableError, scales
from flatminima.measures.pac_bayes import tolerated_noise
from quadratic_fixture import Point, quadratic, with_spectrum

pytestmark = pytest.mark.usefixtures("one_thread")
SPECTRUM = torch.linspace(0, 3, 12).double()
HESSIAN = with_spectrum(SPECTRUM)
W = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
NAMES = ("pac_bayes_kl", "pac_bayes_flatness", "pac_bayes_magnitude_flatness")


def all_terms(f: Objective, seed: int = 0, **options: float) -> dict[str, Measurement]:
    return measure(f, NAMES, options=MeasureOptions(**options), seed=seed)


def truth(rise: float) -> dict[str, float]:
    """On a quadratic the mean rise is sigma^2 tr(THT) / 2, whatever the slope."""
    flatness = float(SPECTRUM.sum()) / (2 * rise)
    relative = float((W**2 * HESSIAN.diagonal()).sum()) / (2 * rise)
    return dict(zip(NAMES, (float(W @ W) / 2 * flatness, flatness, relative), strict=True))


@pytest.mark.slow
def test_standard_errors_hold_what_they_say() -> None:
    inside = dict.fromkeys(NAMES, 0)
    for seed in range(60):
        found = all_terms(quadratic(HESSIAN, W), seed, loss_rise=0.2)
        for name, exact in truth(0.2).items():
            inside[name] += abs(found[name].value - exact) <= 2.131 * float(found[name].error or 0)
            assert found[name].error_kind == "standard error"
    assert all(count >= 51 for count in inside.values()), inside


@pytest.mark.parametrize("rise", [0.01, 1.0, 1e4])
def test_many_draws_come_close(rise: float) -> None:
    found = all_terms(quadratic(HESSIAN, W, slope=100 * W), draws=100, loss_rise=rise)
    for name, exact in truth(rise).items():
        assert abs(found[name].value - exact) <= 3 * float(found[name].error or 0), name
        assert float(found[name].error or 0) < 0.15 * exact
        assert found[name].error_kind == "standard error"
    assert found["pac_bayes_flatness"].cost == 0  # shared
    assert f"for a rise of {rise:g}" in found["pac_bayes_kl"].note


def test_the_complexity_term_of_mcallester() -> None:
    found = all_terms(quadratic(HESSIAN, W, rows=50), loss_rise=0.2)["pac_bayes_kl"]
    term = math.sqrt((found.value + math.log(2 * math.sqrt(50) / 0.05)) / 100)
    assert f"McAllester's term is {term:.4g} for 50 rows" in found.note


def test_a_loss_that_no_noise_raises_is_refused() -> None:
    f = quadratic(torch.zeros(3, 3).double(), torch.ones(3).double())
    for m in all_terms(f).values():
        assert not m.applies
        assert "it stays below" in m.note
    with pytest.raises(NotApplicableError, match="no Gaussian noise"):
        tolerated_noise(f, scales.plain(f), 0.1, draws=2)


def test_a_loss_that_is_infinite_nearby_still_has_a_noise() -> None:
    """|w| < 1: beyond it the loss is infinite."""

    def wall(out: Tensor, y: Tensor) -> Tensor:
        return (1 / (1 - out.square().clamp(max=1))).mean() - 1

    f = Objective(Point(torch.zeros(1).double()), wall, (torch.zeros(1, 1), torch.zeros(1)))
    found = tolerated_noise(f, scales.plain(f), 0.05, draws=8)
    assert 0.05 < found.sigma < 0.5
    assert math.isfinite(found.relative_error)
