"""The whole matrix: every measure under every kind of symmetry, on networks that admit it.

Members are found, drawn and proved by :mod:`flatminima.symmetries`; nothing here knows how a map is made. A declared tick
has to hold on every network that admits the kind, a declared cross has to be found on at least one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from flatminima import MEASURES, Measurement, MeasureOptions, measure
from flatminima.measures.invariance import MARKS, SIGNED_PERMUTATIONS
from flatminima.measures.logit_normalised import logit_normalised
from flatminima.symmetries import KINDS, find_symmetries
from invariance_nets import NETS, build, data, objective, probes

pytestmark = pytest.mark.usefixtures("one_thread")

# Exact traces and eigenvalues; one start, because a random one is not carried along by a permutation.
OPTIONS = MeasureOptions(
    rtol=1e-10,
    max_products=200,
    max_probes=1000,
    ascent_starts=1,
    draws=4,
    adaptive_rho=0.05,
    compression_tolerance=0.03,
)
SCALE = 5.0
EXPENSIVE = {name for name, m in MEASURES.items() if m.cost_class == "expensive"}
PROMPT = [name for name in MEASURES if name not in EXPENSIVE]
#: Means over random draws: a change is found by many of them, in the slow test.
SAMPLED = {
    "average_sharpness",
    "linf_average_sharpness",
    "adaptive_average_sharpness",
    "logit_normalised_average_sharpness",
}


@cache
def members(name: str, scale: float = SCALE) -> dict[str, nn.Module]:
    """One member of each kind that the network admits, by kind; the network itself under ""."""
    model = build(name)
    search = find_symmetries(model, data(name)[0])
    found = {"": model}
    for symmetry in (*search.found, *search.approximate):
        found[symmetry.kind] = symmetry.member(torch.Generator().manual_seed(5), scale).apply(model)
    return found


@cache
def measured(name: str) -> dict[str, dict[str, Measurement]]:
    return {
        kind: measure(objective(name, model), PROMPT, options=OPTIONS, probes=probes(name))
        for kind, model in members(name).items()
    }


def known_error(a: Measurement, b: Measurement) -> float:
    errors = [m.error or 0.0 for m in (a, b) if not m.error_kind.startswith("lower bound")]
    return math.hypot(*errors)


def change(a: Measurement, b: Measurement) -> tuple[float, float]:
    """Of two values: relative to the larger, and in errors."""
    gap = abs(a.value - b.value)
    error = known_error(a, b)
    return gap / max(abs(a.value), abs(b.value), 1e-300), gap / error if error else math.inf if gap else 0.0


def cells(measure_name: str, kind: str) -> dict[str, tuple[float, float]]:
    """Network -> change."""
    found = {}
    for name in NETS:
        table = measured(name)
        if kind in table and table[""][measure_name].applies:
            found[name] = change(table[""][measure_name], table[kind][measure_name])
    return found


def test_the_networks_admit_every_kind() -> None:
    assert {kind for name in NETS for kind in members(name)} - {""} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_declared_tick_holds(kind: str) -> None:
    for name in PROMPT:
        if name in SAMPLED and kind in SIGNED_PERMUTATIONS:
            continue  # the draws are not permuted along: equal in law, not in value; see the slow test
        if MEASURES[name].invariance(kind) == "invariant":
            found = cells(name, kind)
            assert found, f"{name} is declared invariant under {kind}, and no network says so"
            for net, (relative, errors) in found.items():
                assert relative < 1e-7 or errors < 4, (name, net, relative)


@pytest.mark.parametrize("kind", KINDS)
def test_every_declared_cross_is_found(kind: str) -> None:
    for name in PROMPT:
        if MEASURES[name].invariance(kind) == "changes" and name not in SAMPLED:
            found = cells(name, kind)
            assert any(relative > 1e-6 and errors > 10 for relative, errors in found.values()), (name, found)


def test_what_holds_up_to_an_epsilon_holds_without_it() -> None:
    """Exactly through batch norm, whose running statistics go along, and through layer norm as its epsilon vanishes."""
    kind = "pre-norm-rescaling"
    names = [name for name in PROMPT if MEASURES[name].invariance(kind) == "almost"]
    tables = [tuple(measured("CNN + BN")[k] for k in ("", kind))]
    model = build("transformer")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-14
    (symmetry,) = find_symmetries(model, data("transformer")[0], kinds=[kind]).approximate
    twin = symmetry.member(torch.Generator().manual_seed(5), SCALE).apply(model)
    tables.append(tuple(measure(objective("transformer", m), names, options=OPTIONS) for m in (model, twin)))
    for before, after in tables:
        for name in names:
            if before[name].applies:
                relative, errors = change(before[name], after[name])
                assert relative < 1e-6 or errors < 4, (name, relative)


def test_nothing_is_left_open_that_the_networks_can_tell() -> None:
    """A dash means that the measure is not defined there, or that which layer comes last decides."""
    for name in PROMPT:
        for kind in KINDS:
            if MEASURES[name].invariance(kind) == "unknown" and cells(name, kind):
                assert name in ("relative_flatness", "participation_ratio", "probe_patterns", "free_patterns"), (
                    name,
                    kind,
                )
    assert set(MARKS) == {"invariant", "almost", "changes", "unknown"}


# ----- what is sampled or expensive -----------------------------------------------------------------------------------

#: Small radii, where the means are the second-order ones, which are known exactly.
SMALL = MeasureOptions(
    rtol=1e-10, max_probes=400, ascent_starts=1, micro_batch=4, radius=0.01, adaptive_rho=0.01, loss_rise=1e-7,
    localization=20.0, chains=2, burn_in=80, chain_draws=250, directions=48,
)  # fmt: skip
COUNTED = ("positive_eigenvalues", "negative_eigenvalues", "hutchinson_trace", "m_sharpness", "pair_proxy")
NOISY = (
    *sorted(SAMPLED),
    "pac_bayes_kl",
    "pac_bayes_flatness",
    "pac_bayes_magnitude_flatness",
    "local_learning_coefficient",
)
MOST_DRAWS, TRIES = 5000, 4


def test_every_measure_is_in_one_of_the_halves() -> None:
    assert {*COUNTED, *NOISY, "basin_volume"} == EXPENSIVE | SAMPLED


@cache
def drawn(net: str, kind: str, seed: int, scale: float = 20.0) -> nn.Module | None:
    """A member of a kind, where the network admits it."""
    search = find_symmetries(build(net), data(net)[0], kinds=[kind])
    for symmetry in (*search.found, *search.approximate):
        return symmetry.member(torch.Generator().manual_seed(seed), scale).apply(build(net))
    return None


@cache
def expected(name: str, net: str, kind: str = "", seed: int = 0) -> float:
    """What the mean of a sampled measure is, to second order, from the dense Hessian."""
    model = drawn(net, kind, seed) if kind else build(net)
    assert model is not None
    f = objective(net, model)
    if name.startswith("logit_normalised"):
        f = logit_normalised(f)
    hessian, w = f.hvp(torch.eye(f.n, dtype=torch.float64)), f.point()
    if name == "local_learning_coefficient":
        h = torch.linalg.eigvalsh(hessian).clamp(min=0) * f.rows / math.log(f.rows)
        return float((h / (h + SMALL.localization)).sum()) / 2
    relative = name in ("adaptive_average_sharpness", "pac_bayes_magnitude_flatness")
    total = float((hessian.diagonal() * (w**2 if relative else 1.0)).sum())
    if name.endswith("average_sharpness"):
        return SMALL.radius**2 * total / (2 * f.n)
    return total / (2 * SMALL.loss_rise) * (float(w @ w) / 2 if name == "pac_bayes_kl" else 1.0)


def one(name: str, net: str, model: nn.Module, draws: int = 200, seed: int = 0) -> Measurement:
    return measure(objective(net, model), [name], options=replace(SMALL, draws=draws), seed=seed)[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISY)
def test_sampled_measures_have_their_second_order_means_and_keep_their_ticks(name: str) -> None:
    for net in NETS:
        base = one(name, net, build(net))
        if name != "local_learning_coefficient":  # whose chains leave the quadratic
            assert abs(base.value - expected(name, net)) <= 5 * float(base.error or 0) + 0.02 * abs(base.value), net
        for kind in sorted(MEASURES[name].invariant_under):
            model = members(net).get(kind)
            if model is not None:
                relative, errors = change(base, one(name, net, model))
                assert relative < 1e-6 or errors < 4, (net, kind, relative, errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISY)
def test_sampled_measures_show_their_crosses(name: str) -> None:
    """On one of the members whose exact mean changes most, with as many draws as that takes."""
    for kind in sorted(MEASURES[name].changes_under):
        candidates = [(net, seed) for net in NETS for seed in range(3) if drawn(net, kind, seed) is not None]

        def gap(where: tuple[str, int], kind: str = kind) -> float:
            net, seed = where
            before, after = expected(name, net), expected(name, net, kind, seed)
            return abs(after - before) / (abs(after) + abs(before))

        tried = {}
        for net, seed in sorted(candidates, key=gap, reverse=True)[:TRIES]:
            model = drawn(net, kind, seed)
            assert model is not None
            draws = int(min(MOST_DRAWS, max(300, (12 / gap((net, seed))) ** 2)))
            _, tried[net, seed] = change(one(name, net, build(net), draws), one(name, net, model, draws))
            if tried[net, seed] > 4:
                break
        assert max(tried.values()) > 4, (kind, tried)


@pytest.mark.slow
def test_counts_and_micro_batches() -> None:
    """Exact, or without draws that a permutation could upset."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for net in NETS:
        table = {
            kind: measure(objective(net, model), COUNTED, options=SMALL, probes=probes(net))
            for kind, model in members(net).items()
        }
        for kind in table.keys() - {""}:
            for name in COUNTED:
                found.setdefault((name, kind), {})[net] = change(table[""][name], table[kind][name])[0]
    for (name, kind), seen in found.items():
        declared = MEASURES[name].invariance(kind)
        if declared == "invariant" or (declared == "almost" and "CNN + BN" in seen):
            assert all(relative < 1e-6 for net, relative in seen.items() if net != "transformer" or declared == "invariant"), (
                name, kind, seen,
            )  # fmt: skip
        if declared == "changes":
            assert max(seen.values()) > 1e-6, (name, kind, seen)


@pytest.mark.slow
def test_the_basin_volume_has_the_same_law_under_permutations_and_another_one_elsewhere() -> None:
    """Its mean is carried by few directions, so the scatter over seeds is the error."""

    def over_seeds(net: str, model: nn.Module) -> torch.Tensor:
        return torch.tensor([one("basin_volume", net, model, seed=seed).value for seed in range(6)]).double()

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs(float(a.mean() - b.mean())) / math.sqrt(float(a.var() + b.var()) / len(a))

    entry = MEASURES["basin_volume"]
    seen: dict[str, list[float]] = {}
    for net in NETS:
        base = over_seeds(net, build(net))
        for kind in members(net).keys() - {""}:
            moved = drawn(net, kind, 0)
            assert moved is not None
            seen.setdefault(kind, []).append(apart(base, over_seeds(net, moved)))
    for kind, values in seen.items():
        if kind in entry.invariant_under:
            assert max(values) < 5, (kind, values)
        if kind in entry.changes_under:
            assert max(values) > 5, (kind, values)
