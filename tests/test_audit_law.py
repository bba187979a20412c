"""The law of the Hessian trace: predicted from the network, measured at the members."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audit_fixture import QUICK, mlp, rows
from flatminima import Objective, audit, find_symmetries
from flatminima.audit import TraceLaw
from flatminima.audit.words import law as sentence
from flatminima.curvature import exact_trace

pytestmark = pytest.mark.usefixtures("one_thread")
RELU = ("relu-layer-rescaling", "relu-unit-rescaling")


def test_the_trace_along_a_layer_rescaling_is_a_over_beta_squared_plus_b_beta_squared_plus_c() -> None:
    """The blocks of the two layers that trade the scale, and the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
    f = Objective(model, F.cross_entropy, (x, y))
    parts = f.split(f.hvp(torch.eye(f.n, dtype=torch.float64)).diagonal())
    a = float(parts["0.weight"].sum() + parts["0.bias"].sum())
    b, c = float(parts["2.weight"].sum()), float(parts["2.bias"].sum())
    (layer,) = [s for s in find_symmetries(model, x).found if s.kind == "relu-layer-rescaling"]
    betas = []
    for seed in range(6):
        twin = layer.member(torch.Generator().manual_seed(seed), 20.0).apply(model)
        beta = (twin[0].bias[0] / model[0].bias[0]).item()
        exact = exact_trace(Objective(twin, F.cross_entropy, (x, y)))
        assert exact.value == pytest.approx(a / beta**2 + b * beta**2 + c, rel=1e-9)
        betas.append(beta)
    assert max(betas) / min(betas) > 10
    report = audit(model, F.cross_entropy, (x, y), measures=["trace"], kinds=RELU, members=6)
    law = next(law for law in report.laws if law.symmetry == "relu-layer-rescaling")
    (orbit,) = [o for o in report.orbits if o.kind == "relu-layer-rescaling"]
    for i, predicted in enumerate(law.predicted):
        beta = (orbit.member(i).apply(model)[0].bias[0] / model[0].bias[0]).item()
        assert predicted == pytest.approx(a / beta**2 + b * beta**2 + c, rel=1e-9)


def test_the_polynomial_of_the_specified_network() -> None:
    vectors = json.loads((Path(__file__).parent / "vectors" / "weakness_relu.json").read_text())
    setup = vectors["setup"]
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for name, key in (("0.weight", "W1"), ("0.bias", "b1"), ("2.weight", "W2"), ("2.bias", "b2")):
            model.get_parameter(name).copy_(torch.tensor(setup["params"][key], dtype=torch.float64))
    data = torch.tensor(setup["X"], dtype=torch.float64), torch.tensor(setup["y"])
    report = audit(model, F.cross_entropy, data, measures=["trace", "orbit_minimal_trace"], kinds=RELU, members=5)
    a, b, c = 0.9645358392063641, 0.48822186420502417, 0.4186595977472939
    (law,) = [law for law in report.laws if law.symmetry == "relu-layer-rescaling"]
    (orbit,) = [o for o in report.orbits if o.kind == law.symmetry]
    for i, (predicted, measured) in enumerate(zip(law.predicted, law.measured, strict=True)):
        beta = (orbit.member(i).apply(model)[0].bias[0] / model[0].bias[0]).item()
        assert predicted == pytest.approx(a / beta**2 + b * beta**2 + c, rel=1e-9)
        assert measured == pytest.approx(predicted, rel=1e-9)
    assert report.measurements["orbit_minimal_trace"].value == pytest.approx(1.688028051814845, rel=1e-9)
    assert report.verdicts == {"trace": "changes", "orbit_minimal_trace": "invariant"}


def test_prediction_and_measurement_agree_for_every_diagonal_kind() -> None:
    report = audit(mlp(), F.cross_entropy, rows(), measures=["trace"], members=4)
    assert {law.symmetry for law in report.laws} == set(RELU)
    for law in report.laws:
        assert law.exact
        assert law.agrees
        assert law.measured == pytest.approx(law.predicted, rel=1e-9)
        assert law.factor == pytest.approx(law.predicted[law.most] / law.trace)
        ratios = [max(p / law.trace, law.trace / p) for p in law.predicted]
        assert ratios[law.most] == max(ratios)
        assert sum(part.share for part in law.parts) <= 1 + 1e-12
        for part in law.parts:
            assert part.scale is None or part.factor == pytest.approx(part.scale**-2)
        gained = sum(part.share * (part.factor - 1) for part in law.parts)
        assert law.factor == pytest.approx(1 + gained, rel=1e-9)  # what the members leave alone is not listed


def test_a_sampled_law_holds_within_its_error() -> None:
    """A smooth loss behind a squared ReLU: no exact diagonal, all of it from probes."""

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.b(F.relu(self.a(x)).square())
            return out

    report = audit(Squared(), F.cross_entropy, rows(), measures=["trace"], members=3, options=QUICK)
    assert report.laws
    for law in report.laws:
        assert not law.exact
        assert law.agrees
        assert all(e > 0 for e in law.predicted_errors)


def test_a_wrong_law_is_said_and_not_hidden() -> None:
    report = audit(mlp(), F.cross_entropy, rows(), measures=["trace"], kinds=RELU[:1], members=2)
    (law,) = report.laws
    wrong = replace(law, measured=tuple(2 * m for m in law.measured))
    assert not wrong.agrees
    assert "PREDICTION AND MEASUREMENT DISAGREE" in sentence(wrong)
    said = replace(report, laws=(wrong,)).to_dict()
    assert any("the trace predicted from the network is not the one that was measured" in c for c in said["cautions"])


def test_a_factor_is_never_named_without_its_scale_and_its_share() -> None:
    report = audit(mlp(), F.cross_entropy, rows(), measures=["trace"], kinds=RELU[:1], members=3)
    (law,) = report.laws
    text = sentence(law)
    lead = law.parts[0]
    assert lead.name in text
    assert "% of it lies in" in text
    assert "the map multiplies it by" in text


def test_maps_that_mix_weights_have_no_law_of_the_diagonal() -> None:
    report = audit(mlp(nn.GELU), F.cross_entropy, rows(), measures=["trace"], members=1, options=QUICK)
    assert report.laws == ()


def test_laws_of_a_trace_of_zero() -> None:
    law = TraceLaw("relu-unit-rescaling", 0.0, (0.0,), (0.0,), (0.0,), (0.0,), True, 0, (), float("nan"))
    assert law.agrees
    assert "no curvature lies in the weights that it moves" in sentence(law)
    assert "the error of random probes hides the law" in sentence(replace(law, exact=False))
