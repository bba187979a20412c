"""The orbit-minimal trace: one value on a whole orbit, below every trace on it, and refused where it is not exact."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatminima import MeasureOptions, Objective, find_symmetries, measure
from flatminima.curvature import exact_trace
from flatminima.measures import NotApplicableError
from flatminima.measures.orbit import orbit_minimum

pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(model: nn.Module) -> nn.Module:
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model


class Residual(nn.Module):
    """The units inside the branch can be rescaled, and those of the stream too: all that writes or reads one goes along."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(8, 5), nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        return self.head(h + self.down(torch.relu(self.up(h))))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    image = nn.Unflatten(1, (2, 4))
    models: dict[str, nn.Module] = {
        "deep": nn.Sequential(
            nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
        ),
        "conv": nn.Sequential(
            image, nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(8, 3),
        ),
        "batch norm": nn.Sequential(
            image, nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 3)
        ),
        "residual": Residual(),
    }  # fmt: skip
    return randomised(models[name])


RESCALINGS = ("relu-layer-rescaling", "relu-unit-rescaling")
NETS = ("deep", "conv", "batch norm", "residual")


def objective(model: nn.Module) -> Objective:
    generator = torch.Generator().manual_seed(1)
    return Objective(model, F.cross_entropy, (torch.randn(12, 8, generator=generator).double(), torch.arange(12) % 3))


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(NETS), st.integers(0, 10**6), st.floats(2, 20))
def test_one_value_on_the_orbit_and_no_trace_below_it(name: str, seed: int, max_scale: float) -> None:
    model = build(name)
    base = orbit_minimum(objective(model))
    assert base.gap <= 1e-10 * base.value
    x = objective(model)._pieces.first().inputs
    rescalings = find_symmetries(model, x, kinds=RESCALINGS).found
    assert rescalings
    for symmetry in rescalings:
        twin = objective(symmetry.member(torch.Generator().manual_seed(seed), max_scale).apply(model))
        found = orbit_minimum(twin)
        assert found.value == pytest.approx(base.value, rel=1e-9)
        assert found.trace == pytest.approx(exact_trace(twin).value, rel=1e-10)
        assert found.trace >= base.value * (1 - 1e-9)


@pytest.mark.parametrize("name", NETS)
def test_the_scales_that_are_returned_reach_the_value(name: str) -> None:
    model = build(name)
    found = orbit_minimum(objective(model))
    assert found.attained
    x = objective(model)._pieces.first().inputs
    (unit,) = find_symmetries(model, x, kinds=["relu-unit-rescaling"]).found
    twin = copy.deepcopy(model)
    with torch.no_grad():
        tensors = dict(twin.named_parameters())
        for place in unit.places:
            for action in place.actions(found.scales[place.name]):
                for key, value in action({n: tensors[n] for n in action.names}).items():
                    tensors[key].copy_(value)
    assert torch.allclose(twin(x), model(x))
    assert exact_trace(objective(twin)).value == pytest.approx(found.value, rel=1e-9)


def test_two_hidden_layers_against_a_search_over_scales() -> None:
    model = nn.Sequential(*build("deep")[:4], nn.Linear(5, 3).double())
    f = objective(model)
    best = exact_trace(f).value
    log = torch.zeros(11, dtype=torch.float64, requires_grad=True)
    h = {name: part for name, part in f.split(torch.as_tensor(_diagonal(f))).items()}

    def trace_at(x: Tensor) -> Tensor:
        d, e = (2 * x[:6]).exp(), (2 * x[6:]).exp()
        first = ((h["0.weight"].sum(1) + h["0.bias"]) / d).sum()
        second = (h["2.weight"] * d / e[:, None]).sum() + (h["2.bias"] / e).sum()
        return first + second + (h["4.weight"] * e).sum() + h["4.bias"].sum()

    optimiser = torch.optim.LBFGS([log], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = trace_at(log)
        loss.backward()
        return loss

    assert float(trace_at(log).detach()) == pytest.approx(best, rel=1e-12)
    optimiser.step(closure)
    assert orbit_minimum(f).value == pytest.approx(float(trace_at(log).detach()), rel=1e-9)


def _diagonal(f: Objective) -> Tensor:
    return f.hvp(torch.eye(f.n, dtype=torch.float64)).diagonal()


def test_a_dead_unit_costs_nothing_and_its_weights_do_not_matter() -> None:
    model = build("deep")
    with torch.no_grad():
        model[2].weight[:, 1] = 0.0  # nothing reads unit 1 of the first layer
    before = orbit_minimum(objective(model))
    assert not before.attained
    assert math.isfinite(before.gap)
    with torch.no_grad():
        model[0].weight[1] *= 30
        model[0].bias[1] = 5.0
    after = orbit_minimum(objective(model))
    assert after.trace > before.trace * 1.01
    assert after.value == pytest.approx(before.value, rel=1e-9)
    with torch.no_grad():  # and it is what remains without the unit
        for key, keep in (("weight", [0, 2, 3, 4, 5]), ("bias", [0, 2, 3, 4, 5])):
            setattr(model[0], key, nn.Parameter(getattr(model[0], key)[keep]))
        model[2].weight = nn.Parameter(model[2].weight[:, [0, 2, 3, 4, 5]])
    model[0].out_features = model[2].in_features = 5
    assert orbit_minimum(objective(model)).value == pytest.approx(before.value, rel=1e-9)


def test_softmax_regression_has_nothing_to_rescale() -> None:
    f = objective(nn.Sequential(nn.Linear(8, 3)).double())
    found = orbit_minimum(f)
    assert found.value == pytest.approx(exact_trace(f).value, rel=1e-12)
    assert found.scales == {}


def test_only_selected_parameters_count() -> None:
    model = build("deep")
    f = objective(model).restricted(["0.weight", "2.weight"])
    found = orbit_minimum(f)
    assert not found.attained  # the frozen last layer does not hold the second scale back
    assert 0 <= found.value < found.trace


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 3)), "smooth activation: nn.GELU at '1'"),
        (nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 3)), "layer norm: nn.LayerNorm at '1'"),
        (Tied(), "the weight of 'first' is also the weight of 'second'"),
    ],
    ids=["gelu", "layer norm", "tied"],
)
def test_what_is_not_affine_in_each_weight_is_refused(model: nn.Module, reason: str) -> None:
    f = objective(model.double())
    with pytest.raises(NotApplicableError, match=reason):
        orbit_minimum(f)
    found = measure(f, ["orbit_minimal_trace"])["orbit_minimal_trace"]
    assert not found.applies
    assert reason in found.note
    assert found.cost == 0


def test_a_loss_that_is_not_convex_in_the_outputs_is_refused() -> None:
    model = build("deep")
    f = Objective(model, lambda out, y: -out.square().mean(), (torch.randn(12, 8).double(), torch.zeros(12)))
    assert "not convex" in measure(f, ["orbit_minimal_trace"])["orbit_minimal_trace"].note


def test_the_measurement_says_what_was_rescaled() -> None:
    torch.manual_seed(0)
    capped = nn.Sequential(nn.Linear(8, 6), nn.ReLU6(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    found = measure(objective(capped.double()), ["orbit_minimal_trace"])["orbit_minimal_trace"]
    assert found.error_kind == "duality gap"
    assert "over the scales of 4 units" in found.note
    assert "not rescaled: 0 (" in found.note
    assert found.converged
    single = measure(objective(build("deep")), ["orbit_minimal_trace"])["orbit_minimal_trace"]
    f32 = copy.deepcopy(build("deep")).float()
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    low = measure(
        Objective(f32, F.cross_entropy, (x, torch.arange(12) % 3)), ["orbit_minimal_trace"], options=MeasureOptions()
    )
    assert low["orbit_minimal_trace"].value == pytest.approx(single.value, rel=1e-4)
