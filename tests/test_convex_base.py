"""What holds for every convex problem: the loss written out, gradients, convexity, smoothness, sharpness, the objective."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_fixture import Loss, flat_sharp_loss, random_point, sagd_loss, sam_loss
from flatminima import Objective, eigenpairs
from flatminima.problems.convex import (
    ColumnProblem,
    ConvexProblem,
    DeadZoneRegression,
    FlatSharpERM,
    RadialDeadZone,
    SAGDTrap,
    Sample,
    SAMTrap,
    SharpSAM1D,
    mean_loss,
)
from flatminima.problems.convex_base import length

pytestmark = pytest.mark.usefixtures("one_thread")

TRAP = {"lr": 1 / 24, "radius": 2.0}
DRAWN = Sample.draw(4, 2, "some")
PROBLEMS: dict[str, Callable[[], ConvexProblem]] = {
    "flat sharp": lambda: FlatSharpERM(4, 0.2, sample=DRAWN),
    "flat sharp, no dead zone": lambda: FlatSharpERM(4, 0.0, sample=DRAWN),
    "flat sharp, classes": lambda: FlatSharpERM(5, 0.2, sample="classes"),
    "flat sharp, beta 3": lambda: FlatSharpERM(4, 0.2, smoothness=3.0, sample=DRAWN),
    "sagd": lambda: SAGDTrap(4, 3, 0.1, sample=DRAWN),
    "sagd, classes": lambda: SAGDTrap(5, 3, 0.1, sample="classes"),
    "sagd, weight": lambda: SAGDTrap(4, 3, 0.1, auxiliary_weight=0.5, sample=DRAWN),
    "sagd, lazy": lambda: SAGDTrap(60, 3, 0.1, sample=Sample.lazy(60, 0, columns=6, event="some")),
    "one dimension": lambda: SharpSAM1D(0.3),
    "sam": lambda: SAMTrap(4, 6, **TRAP, sample=DRAWN),
    "sam, classes": lambda: SAMTrap(30, 6, **TRAP, sample="classes"),
    "sam, strong links": lambda: SAMTrap(4, 6, **TRAP, chain_delta=1.0, delta_2=1.0, sample=DRAWN),
    "dead zone": lambda: DeadZoneRegression(12, 7, 0.05),
    "radial": lambda: RadialDeadZone(0.1),
}
each = pytest.mark.parametrize("name", list(PROBLEMS))
LITERAL: dict[str, tuple[Callable[[], ColumnProblem], Callable[[ColumnProblem], Loss]]] = {
    "flat sharp": (lambda: FlatSharpERM(3, 0.2, sample=Sample.draw(3, 1)), lambda f: flat_sharp_loss(0.2)),
    "sagd": (
        lambda: SAGDTrap(3, 2, 0.1, auxiliary_weight=0.7, sample=Sample.draw(3, 1)),
        lambda f: sagd_loss(2, 0.1, 0.7),
    ),
    "sam": (lambda: SAMTrap(3, 5, **TRAP, sample=Sample.draw(3, 1)), lambda f: sam_loss(5, f.constants)),  # type: ignore[attr-defined]
    "sam, paper": (
        lambda: SAMTrap(3, 5, **TRAP, variant="paper", sample=Sample.draw(3, 1)),
        lambda f: sam_loss(5, f.constants),  # type: ignore[attr-defined]
    ),
}


@pytest.mark.parametrize("name", list(LITERAL))
def test_losses_are_the_formula_coin_by_coin(name: str) -> None:
    make, literal = LITERAL[name]
    f = make()
    for seed in range(4):
        w = random_point(f.d, seed)
        expected = [literal(f)(w.tolist(), z) for z in f.sample.share.long().tolist()]
        assert f.losses(w).tolist() == pytest.approx(expected, rel=1e-13)
        assert f.empirical_risk(w) == pytest.approx(math.fsum(expected) / len(expected), rel=1e-13)


@each
def test_gradients_against_autograd(name: str) -> None:
    f = PROBLEMS[name]()
    objective = f.objective()
    for seed in range(5):
        w = random_point(f.d, seed, 1.0 if f.d > 1 else 0.5)
        leaf = w.clone().requires_grad_()
        (expected,) = torch.autograd.grad(f.losses(leaf).mean(), leaf)
        torch.testing.assert_close(f.gradient(w), expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(objective.gradient(w), expected, rtol=1e-12, atol=1e-14)
        assert objective.loss(w) == pytest.approx(f.empirical_risk(w), rel=1e-12)


@each
def test_the_gradient_is_finite_at_the_origin_and_inside_the_dead_zone(name: str) -> None:
    f = PROBLEMS[name]()
    objective = f.objective()
    for w in (torch.zeros(f.d, dtype=torch.float64), 1e-170 * torch.ones(f.d, dtype=torch.float64)):
        assert bool(objective.gradient(w).isfinite().all())
        assert bool(objective.hvp(torch.ones(f.d, dtype=torch.float64), w).isfinite().all())
        torch.testing.assert_close(objective.gradient(w), f.gradient(w), rtol=1e-12, atol=1e-300)


@each
def test_many_points_at_once(name: str) -> None:
    f = PROBLEMS[name]()
    w = torch.stack([random_point(f.d, seed) for seed in range(6)]).reshape(2, 3, f.d)
    values, gradients = f.value_and_gradient(w)
    for i in range(2):
        for j in range(3):
            assert float(values[i, j]) == pytest.approx(f.empirical_risk(w[i, j]), rel=1e-13, abs=1e-300)
            torch.testing.assert_close(gradients[i, j], f.gradient(w[i, j]), rtol=1e-12, atol=1e-15)


@each
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
def test_convex_smooth_non_negative_and_flat(name: str, seed: int, scale: float) -> None:
    f = PROBLEMS[name]()
    x, y = random_point(f.d, seed, scale), random_point(f.d, seed + 1, scale)
    low, high = f.losses(x), f.losses(y)
    assert bool((low >= 0).all())
    assert bool((f.losses((x + y) / 2) <= (low + high) / 2 + 1e-14 * (1 + low + high)).all())
    gap = float((f.gradient(x) - f.gradient(y)).norm())
    assert gap <= f.smoothness * float((x - y).norm()) * (1 + 1e-12)
    assert float(f.gradient(x).norm()) ** 2 <= 2 * f.smoothness * f.empirical_risk(x) + 1e-14  # Lemma 3
    inside = x / max(1.0, float(x.norm()))
    assert float(f.losses(inside).max()) <= f.largest_loss * (1 + 1e-12)
    for minimiser in f.minimisers.values():
        assert f.empirical_risk(minimiser) == 0.0
    centre = f.minimisers.get("flat", f.minimisers.get("origin", f.minimisers.get("zero risk")))
    assert centre is not None
    near = centre + f.flatness_radius * (1 - 1e-9) * x / float(x.norm())
    assert float(f.losses(near).max()) <= 1e-20


@each
def test_sharpness_lies_between_its_bounds(name: str) -> None:
    f = PROBLEMS[name]()
    generator = torch.Generator().manual_seed(0)
    for seed, radius in ((0, 0.3), (1, 0.05), (2, 1.0)):
        w = random_point(f.d, seed, 0.2)
        found = f.sharpness(radius, w)
        assert float(found.direction.norm()) <= radius * (1 + 1e-12)
        rise = f.empirical_risk(w + found.direction) - f.empirical_risk(w)
        assert rise == pytest.approx(found.lower, abs=1e-12)
        assert found.lower <= found.upper
        random = torch.randn(300, f.d, generator=generator, dtype=torch.float64)
        there = f.value_and_gradient(w + radius * random / random.norm(dim=-1, keepdim=True))[0]
        assert float(there.max()) - f.empirical_risk(w) <= found.lower + 1e-9
        smooth = radius * float(f.gradient(w).norm()) + 0.5 * f.smoothness * radius**2
        assert found.upper <= smooth * (1 + 1e-12) + 1e-15


def test_the_search_finds_what_the_closed_form_says() -> None:
    """Power iteration against the closed form, at points whose gradient is zero and whose surroundings are flat."""
    f = FlatSharpERM(6, 0.25)
    for w in f.minimisers.values():
        exact, found = f.sharpness(0.3, w), f.sharpness(0.3, w, closed_form=False)
        assert exact.exact
        assert not found.exact
        assert found.lower == pytest.approx(exact.lower, rel=1e-9)
        assert found.upper == pytest.approx(exact.lower, rel=1e-9)


@pytest.mark.parametrize("name", ["flat sharp", "sagd", "sagd, weight"])
@pytest.mark.parametrize("radius", [0.05, 0.6])
def test_sharpness_is_exact_with_an_example_left_out(name: str, radius: float) -> None:
    """Less than the whole weight rises: the rise at the direction itself, and no search finds more."""
    whole = PROBLEMS[name]()
    assert isinstance(whole, ColumnProblem)
    f = whole.on(whole.sample.without(0))
    for w in (f.start, 0.3 * f.unit(f.sample.zeros[0]), -0.3 * f.unit(f.sample.zeros[0])):
        exact, found = f.sharpness(radius, w), f.sharpness(radius, w, closed_form=False)
        assert exact.exact
        assert exact.lower == pytest.approx(f.empirical_risk(w + exact.direction) - f.empirical_risk(w), rel=1e-12)
        assert exact.lower == pytest.approx(found.lower, rel=1e-9, abs=1e-15)


@each
def test_ordinary_optimisers_run_on_the_objective(name: str) -> None:
    f = PROBLEMS[name]()
    objective = f.objective(random_point(f.d, 3, 0.8))
    assert isinstance(objective, Objective)
    x, y = f.data()
    before = objective.loss()
    for make in (torch.optim.SGD, torch.optim.AdamW):
        optimiser = make(objective.model.parameters(), lr=0.05)
        for _ in range(20):
            optimiser.zero_grad()
            mean_loss(objective.model(x), y).backward()
            optimiser.step()
    assert objective.loss() < before


@pytest.mark.parametrize("name", ["sam", "sam, strong links", "sam, classes", "sagd", "flat sharp", "dead zone"])
def test_the_estimators_see_no_more_curvature_than_is_certified(name: str) -> None:
    f = PROBLEMS[name]()
    for seed in range(2):
        top = eigenpairs(f.objective(random_point(f.d, seed, 2.0)), 1).values[0]
        assert float(top) <= f._curvature() * (1 + 1e-9) <= f.smoothness * (1 + 2e-9)


@each
def test_smoothness_scales_everything(name: str) -> None:
    """beta f at eta / beta has the iterates of f at eta."""
    f = PROBLEMS[name]()
    if not isinstance(f, ColumnProblem) or isinstance(f, SAMTrap):
        return
    g = type(f)(f.n, sample=f.sample, **f._arguments | {"smoothness": 2.5 * f.smoothness})
    w = random_point(f.d, 0)
    assert g.empirical_risk(w) == pytest.approx(2.5 * f.empirical_risk(w), rel=1e-13)
    torch.testing.assert_close(g.gradient(w), 2.5 * f.gradient(w))
    assert g.population_risk(w).value == pytest.approx(2.5 * f.population_risk(w).value, rel=1e-12)


# --- representations -----------------------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[int, str], ColumnProblem]] = {
    "flat sharp": lambda n, kind: FlatSharpERM(n, 0.2, sample=kind),  # type: ignore[arg-type]
    "sagd": lambda n, kind: SAGDTrap(n, 4, 0.1, sample=kind),  # type: ignore[arg-type]
    "sam": lambda n, kind: SAMTrap(n, 6, 0.25, 0.7, sample=kind),  # type: ignore[arg-type]
    "sam, corrected": lambda n, kind: SAMTrap(n, 6, 0.25, 0.7, variant="corrected", sample=kind),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", list(PAIRS))
@pytest.mark.parametrize("n", [3, 6, 8])
def test_classes_are_the_dense_problem_in_isometric_coordinates(name: str, n: int) -> None:
    dense, reduced = PAIRS[name](n, "dense"), PAIRS[name](n, "classes")
    for seed in range(3):
        w = random_point(reduced.d, seed, 0.7)
        whole = reduced.expand(w)
        assert float(length(whole)) == pytest.approx(float(length(w)), rel=1e-14)
        assert dense.empirical_risk(whole) == pytest.approx(reduced.empirical_risk(w), rel=1e-12)
        torch.testing.assert_close(reduced.expand(reduced.gradient(w)), dense.gradient(whole), rtol=1e-12, atol=1e-14)
        few = torch.where(w.abs() > 0.6, w, torch.zeros_like(w))
        if n == 3:
            pair = [f.population_risk(v).value for f, v in ((dense, reduced.expand(few)), (reduced, few))]
            assert pair[0] == pytest.approx(pair[1], rel=1e-12)


@pytest.mark.parametrize("name", ["flat sharp", "sagd"])
def test_the_spurious_span_is_the_dense_problem(name: str) -> None:
    dense, reduced = PAIRS[name](6, "dense"), PAIRS[name](6, "spurious")
    for seed in range(5):
        w = random_point(reduced.d, seed, 0.7)
        whole = reduced.expand(w)
        assert dense.empirical_risk(whole) == pytest.approx(reduced.empirical_risk(w), rel=1e-12)
        torch.testing.assert_close(reduced.expand(reduced.gradient(w)), dense.gradient(whole), rtol=1e-12, atol=1e-14)
        assert dense.population_risk(whole).value == pytest.approx(reduced.population_risk(w).value, rel=1e-12)
        a, b = dense.sharpness(0.4, whole), reduced.sharpness(0.4, w)
        assert a.exact
        assert b.exact
        assert a.lower == pytest.approx(b.lower, rel=1e-12)


def test_lazy_columns_are_those_of_a_dense_sample() -> None:
    """The lazy sample put into a dense one at any places: what is not touched changes nothing."""
    lazy = Sample.lazy(5, 7, columns=4, event="some", bit=1)
    bits = Sample.draw(5, 1).share.clone()
    places = [3, 8, 9, 14, 20, 21, 25, 30][: len(lazy)]
    bits[:, places] = lazy.share
    few = SAGDTrap(5, 3, 0.1, sample=lazy)
    full = SAGDTrap(5, 3, 0.1, sample=Sample.from_bits(bits))
    w = random_point(few.d, 0)
    blocks, auxiliary = few.split(w)
    whole = torch.zeros(32, 3, dtype=torch.float64)
    whole[places] = blocks
    point = full.join(whole, auxiliary)
    assert full.empirical_risk(point) == pytest.approx(few.empirical_risk(w), rel=1e-13)
    assert full.population_risk(point).value == pytest.approx(few.population_risk(w).value, rel=1e-12)
    gradient, _ = full.split(full.gradient(point))
    torch.testing.assert_close(gradient[places], few.split(few.gradient(w))[0], rtol=1e-12, atol=1e-15)
    gradient[places] = 0.0
    assert not bool(gradient.any())


# --- bad input -----------------------------------------------------------------------------------------------------


def test_lengths_do_not_overflow() -> None:
    w = torch.tensor([[3e-200, 4e-200], [3e200, 4e200], [0.0, 0.0]], dtype=torch.float64)
    assert length(w).tolist() == pytest.approx([5e-200, 5e200, 0.0])
    assert not bool(length(torch.tensor([math.nan, 1.0])).isfinite())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.empirical_risk(torch.zeros(3)), r"expected a point of shape \(49,\)"),
        (lambda f: f.population_risk(torch.full((49,), math.nan)), "NaN or infinite"),
        (lambda f: f.sharpness(-1.0), "radius must be finite and >= 0, got -1.0"),
        (lambda f: f.sharpness(math.inf), "radius must be finite"),
        (lambda f: f.sharpness(1e300), r"radius = 1e\+300 has a square that is no number"),
        (lambda f: f.sharpness(0.1, starts=-1), "starts must be an integer >= 0, got -1"),
        (lambda f: f.suffix_risk(1.5, lr=0.1, radius=1.0), "tau must be an integer >= 1, got 1.5"),
        (lambda f: f.sharpness("0.1"), "radius must be finite and >= 0, got '0.1'"),
        (lambda f: f.unit(16), "no slot 1 of class 16"),
        (lambda f: f.unit(0, 4), "no slot 4 of class 0"),
        (lambda f: f.on(Sample.canonical(3)), "3 examples and the problem n = 4"),
        (lambda f: f.maximiser(f.start, 0.1, "adverserial", 1, None), "unknown tie-breaking rule.*adversarial"),
        (lambda f: f.on(f.sample.without(0)).objective(), "an example was left out"),
        (
            lambda f: f.empirical_risk([0.0] * 49),
            "the point must be a tensor, got a list: convert it with torch.as_tensor",
        ),
        (lambda f: f.sharpness(0.1, np.zeros(49)), "the point must be a tensor, got a ndarray"),
        (lambda f: f.gradient(1j * torch.ones(49)), "the point must be real, got torch.complex64"),
        (lambda f: f.maximiser(f.start, -0.1, "uniform", 1, None), "radius must be finite and >= 0, got -0.1"),
        (lambda f: f.expand(f.start), "the columns of this dense sample are not those of the canonical one"),
        (lambda f: SAGDTrap(4, 3, dtype="float64"), "dtype must be a floating one of torch, got 'float64'"),  # type: ignore[arg-type]
        (lambda f: SharpSAM1D(dtype="float64"), "dtype must be a floating one of torch, got 'float64'"),  # type: ignore[arg-type]
        (lambda f: DeadZoneRegression(3, dtype=torch.int64), "dtype must be a floating one of torch, got torch.int64"),
    ],
)
def test_bad_points(call: Callable[[ColumnProblem], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(SAGDTrap(4, 3, 0.1, sample=DRAWN))


def test_numbers_of_numpy_are_numbers() -> None:
    """And are worked with in double precision, whatever their own."""
    for make in (
        lambda n, x: FlatSharpERM(n, x, smoothness=x), lambda n, x: SAGDTrap(n, n, x, auxiliary_weight=x, smoothness=x),
        lambda n, x: SAMTrap(n, n, x, x, chain_delta=x, delta_2=x, delta_3=x), lambda n, x: SharpSAM1D(x, smoothness=x),
        lambda n, x: DeadZoneRegression(n, n, x, smoothness=x), lambda n, x: RadialDeadZone(x, start=x, smoothness=x),
    ):  # fmt: skip
        f, g = make(4, 0.1 + 2**-30), make(np.int64(4), np.float64(0.1 + 2**-30))
        assert {type(value) for value in vars(g).values()} == {type(value) for value in vars(f).values()}
        for key, value in vars(f).items():
            if isinstance(value, int | float | dict):
                assert vars(g)[key] == value
        assert type(make(np.int32(4), np.float32(0.1)).largest_loss) is float


def test_a_condition_that_no_certificate_has_is_named() -> None:
    with pytest.raises(KeyError, match="unknown condition 'n >= 5': expected one of n >= 6, "):
        SAMTrap(4, 6, **TRAP).certify()["n >= 5"]


def test_a_search_without_any_direction_finds_nothing() -> None:
    f = DeadZoneRegression(3, 2, 5.0)
    found = f.sharpness(0.1, starts=0)
    assert (found.lower, found.exact) == (0.0, False)
    assert f.sharpness(0.0).upper == 0.0


def test_the_population_risk_of_many_columns_is_sampled_with_an_error() -> None:
    f = FlatSharpERM(5, 0.1, sample=Sample.draw(5, 0))
    w = random_point(f.d, 0, 0.3)
    found = f.population_risk(w, draws=4000)
    assert found.kind == "sampled"
    assert found.draws == 4000
    many = f.population_risk(w, draws=200_000, seed=1)
    assert many.error < 0.2 * found.error
    assert abs(found.value - many.value) < 4 * math.hypot(found.error, many.error)
    with pytest.raises(ValueError, match="at least 2"):
        f.population_risk(w, draws=1)
