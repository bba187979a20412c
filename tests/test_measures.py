"""Every measure against its closed form on a quadratic, and against the theorems it claims."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatminima import MEASURES, Measurement, MeasureOptions, Objective, find_symmetries, measure
from flatminima.measures import NotApplicableError, Workbench, resolve, unseen
from flatminima.measures.base import MEASURES as REGISTRY
from flatminima.measures.base import arrange, register
from quadratic_fixture import Point, highest_in_ball, quadratic, with_spectrum

pytestmark = pytest.mark.usefixtures("one_thread")
SPECTRUM = torch.cat([torch.tensor([10.0, 4.0]), torch.linspace(2, 0, 18)]).double()
HESSIAN = with_spectrum(SPECTRUM)
N = len(SPECTRUM)


def at(start: Tensor, hessian: Tensor = HESSIAN, slope: Tensor | None = None) -> Objective:
    return quadratic(hessian, start, slope)


def randn(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one(f: Objective, name: str, seed: int = 0, **options: float) -> Measurement:
    return measure(f, [name], options=replace(MeasureOptions(), **options), seed=seed)[name]


# ----- closed forms ---------------------------------------------------------------------------------------------------


def test_top_eigenvalue_and_trace() -> None:
    f = at(randn(N))
    found = measure(f, ["lambda_max", "trace"])
    assert found["lambda_max"].value == pytest.approx(10.0, rel=0.02)
    assert abs(found["lambda_max"].value - 10.0) <= found["lambda_max"].error
    assert found["lambda_max"].error_kind == "residual bound"
    assert abs(found["trace"].value - float(SPECTRUM.sum())) <= 4 * found["trace"].error
    assert found["trace"].error <= 0.02 * float(SPECTRUM.sum()) * 1.01
    assert all(m.converged for m in found.values())


def test_the_quadratic_form_in_the_weights_and_their_norm() -> None:
    w = randn(N)
    found = measure(at(w), ["w_hessian_w", "parameter_norm"])
    assert found["w_hessian_w"].value == pytest.approx(float(w @ HESSIAN @ w), rel=1e-13)
    assert found["parameter_norm"].value == pytest.approx(math.sqrt(float((w**2).sum())), rel=1e-14)
    assert found["parameter_norm"].cost == 0
    assert found["w_hessian_w"].cost == 2


def test_sam_sharpness_at_a_minimum_is_half_rho_squared_lambda_max() -> None:
    for rho in (0.05, 2.0):
        found = one(at(torch.zeros(N, dtype=torch.float64)), "sam_sharpness", rho=rho)
        exact = rho**2 * 10 / 2
        assert 0.995 * exact <= found.value <= exact * (1 + 1e-12)
        assert found.error_kind.startswith("lower bound")
        assert found.converged


@pytest.mark.parametrize("seed", range(10))
def test_sam_sharpness_away_from_a_minimum(seed: int) -> None:
    w = randn(N, seed)
    exact = highest_in_ball(HESSIAN, HESSIAN @ w, 0.5)
    found = one(at(w), "sam_sharpness", rho=0.5, seed=seed).value
    assert 0.98 * exact <= found <= exact * (1 + 1e-10)
    # The upper estimate of the docstring.
    assert found <= 0.5 * float((HESSIAN @ w).norm()) + 0.25 * 10 / 2


def test_average_sharpness_is_the_trace_over_twice_the_dimension() -> None:
    w = randn(N)  # the gradient is large here: antithetic pairs cancel it exactly
    inside = 0
    for seed in range(60):
        found = one(at(w), "average_sharpness", radius=0.7, seed=seed)
        inside += abs(found.value - 0.7**2 * float(SPECTRUM.sum()) / (2 * N)) <= 2.131 * found.error  # t, 15 degrees
    assert 50 <= inside <= 60
    many = one(at(w), "average_sharpness", radius=0.7, draws=4000)
    assert many.value == pytest.approx(0.7**2 * float(SPECTRUM.sum()) / (2 * N), rel=0.03)
    assert many.cost == pytest.approx((2 * 4000 + 1) / 3)
    steep = one(at(w, slope=1e4 * randn(N, 1)), "average_sharpness", radius=0.7, draws=4000)
    assert steep.value == pytest.approx(many.value, rel=1e-6)


def test_adaptive_sharpness_moves_each_weight_in_its_own_unit() -> None:
    w = randn(N)
    scaled = torch.diag(w.abs()) @ HESSIAN @ torch.diag(w.abs())
    minimum = at(w, slope=-HESSIAN @ w)  # w is the minimiser
    exact = 0.3**2 * float(torch.linalg.eigvalsh(scaled)[-1]) / 2
    found = one(minimum, "adaptive_sharpness", adaptive_rho=0.3).value
    assert 0.98 * exact <= found <= exact * (1 + 1e-10)
    sloped = highest_in_ball(scaled, w.abs() * (HESSIAN @ w), 0.3)
    assert 0.98 * sloped <= one(at(w), "adaptive_sharpness", adaptive_rho=0.3).value <= sloped * (1 + 1e-10)


def test_adaptive_sharpness_never_moves_a_zero_weight() -> None:
    hessian = torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64))
    found = one(at(torch.tensor([2.0, 0.0], dtype=torch.float64), hessian), "adaptive_sharpness", adaptive_rho=0.5)
    assert found.value == pytest.approx((3**2 - 2**2) / 2)  # w1 from 2 to 2 + 0.5 * 2
    assert one(at(torch.zeros(2).double(), hessian), "adaptive_sharpness").value == 0.0


def test_a_maximum_of_the_loss_has_sharpness_zero() -> None:
    for name in ("sam_sharpness", "adaptive_sharpness"):
        found = one(at(torch.ones(N).double(), -HESSIAN, slope=HESSIAN @ torch.ones(N).double()), name)
        assert found.value == 0.0


# ----- lower bounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_lower_bound_is_never_above_the_maximum_found_by_brute_force(seed: int) -> None:
    """Two parameters, a loss that is far from quadratic, and every point of the disc on a fine grid."""
    start = randn(2, seed)
    f = Objective(
        Point(start),
        lambda out, y: (torch.sin(3 * out[:, 0]) * torch.cos(2 * out[:, 1]) + 0.3 * (out**2).sum(1)).mean(),
        (torch.zeros(1, 1), torch.zeros(1)),
    )
    angle, length = torch.linspace(0, 2 * math.pi, 721).double(), torch.linspace(0, 1, 201).double()
    disc = (length[:, None, None] * torch.stack([angle.cos(), angle.sin()], 1)).reshape(-1, 2)

    def values(w: Tensor) -> Tensor:
        return torch.sin(3 * w[:, 0]) * torch.cos(2 * w[:, 1]) + 0.3 * (w**2).sum(1)

    for name, unit, radius in (("sam_sharpness", torch.ones(2), 0.4), ("adaptive_sharpness", start.abs(), 0.6)):
        highest = float(values(start + radius * unit * disc).max() - values(start[None])[0])
        found = one(f, name, rho=0.4, adaptive_rho=0.6).value
        assert 0 <= found <= highest + 1e-3


def test_a_loss_that_diverges_within_the_ball_is_infinitely_sharp() -> None:
    def bounded(out: Tensor, y: Tensor) -> Tensor:
        return (1 / (1 - out.square().clamp(max=1))).mean()

    f = Objective(Point(torch.tensor([0.5]).double()), bounded, (torch.zeros(1, 1), torch.zeros(1)))
    found = one(f, "sam_sharpness", rho=5.0)
    assert found.value == math.inf
    assert found.error is None


# ----- invariance -----------------------------------------------------------------------------------------------------


def relu_net(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    return model, torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,))


RESCALINGS = ("relu-layer-rescaling", "relu-unit-rescaling")
NAMES = ["adaptive_sharpness", "w_hessian_w", "lambda_max", "parameter_norm", "sam_sharpness"]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(1.5, 20))
def test_declared_invariances_hold_and_undeclared_ones_do_not(seed: int, max_scale: float) -> None:
    model, x, y = relu_net(seed % 5)
    base = measure(Objective(model, F.cross_entropy, (x, y)), NAMES)
    for symmetry in find_symmetries(model, x, kinds=RESCALINGS).found:
        member = symmetry.member(torch.Generator().manual_seed(seed), max_scale)
        moved = measure(Objective(member.apply(model), F.cross_entropy, (x, y)), NAMES)
        for name in NAMES:
            change = abs(moved[name].value / base[name].value - 1)
            if symmetry.kind in MEASURES[name].invariant_under:
                assert change < 1e-9, (name, symmetry.kind)
        assert abs(moved["parameter_norm"].value / base["parameter_norm"].value - 1) > 1e-6


# ----- the registry ---------------------------------------------------------------------------------------------------


DEFAULT = (
    "sam_sharpness",
    "average_sharpness",
    "adaptive_sharpness",
    "lambda_max",
    "trace",
    "w_hessian_w",
    "parameter_norm",
)


def test_seven_measures_are_made_by_default_and_each_is_described() -> None:
    assert tuple(m.name for m in resolve()) == DEFAULT
    for name, entry in MEASURES.items():
        assert entry.name == name
        assert entry.meaning.endswith(".")
        assert entry.label
        assert entry.flatter_when in ("lower", "higher", None)
        assert all(repair in MEASURES and repair != name for repair in entry.repair)
    assert len({entry.label for entry in MEASURES.values()}) == len(MEASURES)


def test_groups_and_names_together() -> None:
    everything = [m.name for m in resolve(["all"])]
    cheap = [m.name for m in resolve(["cheap"])]
    assert everything == list(MEASURES)
    assert set(cheap) < set(everything)
    assert {"parameter_norm", "spectral_product", "path_norm", "minimum_margin", "live_units"} <= set(cheap)
    assert [m.name for m in resolve(["trace", "cheap"])] == [n for n in MEASURES if n in {*cheap, "trace"}]
    assert [m.name for m in resolve(["default", "trace"])] == list(DEFAULT)
    assert resolve([]) == []


def test_every_kind_is_declared_once_and_repairs_survive_more() -> None:
    for entry in MEASURES.values():
        sets = (entry.invariant_under, entry.changes_under, entry.almost_under)
        assert sum(map(len, sets)) == len(frozenset().union(*sets))
        assert {entry.invariance(kind) for kind in entry.invariant_under} <= {"invariant"}
        assert {entry.invariance(kind) for kind in entry.changes_under} <= {"changes"}
        for repair in entry.repair:
            kept = MEASURES[repair].invariant_under
            assert {"relu-layer-rescaling", "relu-unit-rescaling"} <= kept, (entry.name, repair)
    assert MEASURES["trace"].invariance("no such kind") == "unknown"


def test_a_measure_of_ones_own() -> None:
    """Registered, ordered behind those of the library, and refused where it does not apply."""
    try:

        @register("own", "own", "Own.", applies=lambda f: "too small" if f.n < 30 else None)
        def own(bench: Workbench) -> Measurement:
            raise NotApplicableError("not this time")

        assert list(REGISTRY)[-1] == "own"
        assert REGISTRY["own"].default is False
        found = measure(at(randn(N)), ["own"])["own"]
        assert (found.applies, found.note, found.error, found.converged) == (False, "too small", None, False)
        large = measure(at(randn(40), torch.eye(40).double()), ["own"])["own"]
        assert (large.applies, large.note, large.cost) == (False, "not this time", 0.0)
        arrange()
    finally:
        del REGISTRY["own"]


def test_a_wrong_declaration_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of symmetry 'relu-rescaling'"):
        register("x", "x", "X.", invariant_under=frozenset({"relu-rescaling"}))
    with pytest.raises(ValueError, match="temperature is declared twice"):
        register("x", "x", "X.", invariant_under=frozenset({"temperature"}), changes_under=frozenset({"temperature"}))


def test_the_defaults_at_once_in_registry_order_with_their_costs() -> None:
    f = at(randn(N))
    found = measure(f)
    assert tuple(found) == DEFAULT
    assert all(math.isfinite(m.value) and m.error is not None and m.name == name for name, m in found.items())
    assert sum(m.cost for m in found.values()) == pytest.approx(f.evaluations.gradient_equivalents)
    assert tuple(measure(f, reversed(DEFAULT))) == DEFAULT
    assert measure(f, []) == {}


def test_all_measures_give_a_number_or_a_reason() -> None:
    model, x, y = relu_net(0)
    quick = MeasureOptions(draws=2, directions=2, chains=2, burn_in=2, chain_draws=8, max_probes=10)
    for f in (
        Objective(model, F.cross_entropy, (x, y)),
        Objective(model, F.mse_loss, (x, torch.zeros(30, 3).double())),
    ):
        found = measure(f, ["all"], options=quick, probes=torch.randn(20, x.shape[1]))
        assert list(found) == list(MEASURES)
        for m in found.values():
            assert math.isfinite(m.value) if m.applies else (math.isnan(m.value) and m.note and not m.converged)
        absent = {name for name, m in found.items() if not m.applies}
        assert absent == (set() if f.loss_fn is F.cross_entropy else {*MARGINS, *unseen.NAMES})
    without = measure(f, unseen.NAMES)
    assert all("it needs probes" in m.note or "targets" in m.note for m in without.values())


MARGINS = {"minimum_margin", "margin_quantile", "median_margin", "normalised_margin"}


def test_a_loss_that_is_not_finite_stops_every_measure_by_name() -> None:
    model, x, y = relu_net(0)
    x[3] = math.nan
    f = Objective(model, F.cross_entropy, (x, y), check=False)
    for name in (
        "sam_sharpness",
        "trace",
        "orbit_minimal_trace",
        "compressed_size",
        "pac_bayes_kl",
        "basin_volume",
        "fisher_rao",
    ):
        with pytest.raises(FloatingPointError, match=r"batch 0|NaN or infinite"):
            measure(f, [name])


def test_an_unknown_name_lists_the_valid_ones_nearest_first() -> None:
    f = at(randn(N))
    with pytest.raises(ValueError, match="unknown measure 'lambdamax': expected one of lambda_max, "):
        measure(f, ["trace", "lambdamax"])
    assert f.evaluations.gradient_equivalents == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *itertools.product(["rho", "adaptive_rho", "radius", "rtol"], [0.0, -1.0, math.nan, math.inf]),
        *[("max_products", 1), ("max_probes", 9), ("ascent_steps", 0), ("draws", 1)],
        *[("ascent_starts", 3), ("micro_batch", 0), ("margin_quantile", 1.1), ("step_size", -1.0), ("chains", 1)],
    ],
)
def test_options_out_of_range_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be"):
        MeasureOptions(**{option: value})


def test_the_same_seed_gives_the_same_numbers() -> None:
    before = torch.get_rng_state()
    a, b, c = (measure(at(randn(N)), seed=seed) for seed in (3, 3, 4))
    assert a == b
    changed = {name for name in a if a[name].value != c[name].value}
    assert {"average_sharpness", "trace"} <= changed
    assert not {"w_hessian_w", "parameter_norm"} & changed
    assert torch.equal(torch.get_rng_state(), before)


def test_a_workbench_keeps_its_eigenpair_for_later() -> None:
    f = at(randn(N))
    bench = Workbench(f, MeasureOptions(), 0)
    measure(f, ["lambda_max"], workbench=bench)
    spent = f.evaluations.hvp
    assert float((HESSIAN @ bench.eigen.vector - 10 * bench.eigen.vector).norm()) < 0.5
    assert f.evaluations.hvp == spent


def test_the_model_is_left_alone() -> None:
    model, x, y = relu_net(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measure(Objective(model, F.cross_entropy, (x, y)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def classifier(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    return model, (torch.randn(60, 5).to(dtype), torch.randint(0, 3, (60,)))


def test_the_error_of_w_hessian_w_covers_single_precision_weights() -> None:
    model, (x, y) = classifier(torch.float32)
    found = measure(Objective(model, F.cross_entropy, (x, y)), ["w_hessian_w"])["w_hessian_w"]
    precise = Objective(model.double(), F.cross_entropy, (x.double(), y))
    w = precise.point()
    dense = precise.hvp(torch.eye(precise.n, dtype=torch.float64))
    assert abs(found.value - float(w @ dense @ w)) <= 10 * found.error
    assert found.error < 1e-12


def test_a_half_precision_model_is_measured_as_its_single_precision_copy() -> None:
    model, (x, y) = classifier(torch.bfloat16)
    before = model[0].weight.clone()
    half = measure(Objective(model, F.cross_entropy, (x, y)))
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.dtype == torch.bfloat16
    single = measure(Objective(model.float(), F.cross_entropy, (x.float(), y)))
    assert {name: m.value for name, m in half.items()} == {name: m.value for name, m in single.items()}
