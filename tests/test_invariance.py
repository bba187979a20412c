"""The whole matrix: every measure under every kind of symmetry, on networks that admit it.

Members are found, drawn and proved by :mod:`flatminima.symmetries`; nothing here knows how a map is made. A declared tick
has to hold on every network that admits the kind, a declared cross has to be found on at least one.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import nn

from flatminima import MEASURES, Measurement, MeasureOptions, measure
from flatminima.measures.invariance import MARKS, SIGNED_PERMUTATIONS
from flatminima.symmetries import KINDS, find_symmetries
from invariance_nets import NETS, build, data, objective

pytestmark = pytest.mark.usefixtures("one_thread")

# Exact traces and eigenvalues; one start, because a random one is not carried along by a permutation.
OPTIONS = MeasureOptions(
    rtol=1e-10, max_products=200, max_probes=1000, ascent_starts=1, draws=4, compression_tolerance=0.03
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
    return {kind: measure(objective(name, model), PROMPT, options=OPTIONS) for kind, model in members(name).items()}


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


def test_what_holds_up_to_an_epsilon_holds_to_about_that() -> None:
    """Exactly through batch norm with its running statistics, to a fraction of a percent through layer norm."""
    for name in PROMPT:
        if MEASURES[name].invariance("pre-norm-rescaling") == "almost":
            found = cells(name, "pre-norm-rescaling")
            assert found["CNN + BN"][0] < 1e-7 or found["CNN + BN"][1] < 4, name
            assert "transformer" not in found or found["transformer"][0] < 0.02 or found["transformer"][1] < 4, name


def test_nothing_is_left_open_that_the_networks_can_tell() -> None:
    """A dash means that the measure is not defined there, or that which layer comes last decides."""
    for name in PROMPT:
        for kind in KINDS:
            if MEASURES[name].invariance(kind) == "unknown" and cells(name, kind):
                assert name in ("relative_flatness", "participation_ratio"), (name, kind)
    assert set(MARKS) == {"invariant", "almost", "changes", "unknown"}


# ----- what is sampled or expensive -----------------------------------------------------------------------------------

SEEDS = 8
COSTLY = MeasureOptions(
    rtol=1e-10, max_probes=400, ascent_starts=1, draws=24, micro_batch=4, directions=48, chains=2, burn_in=60, chain_draws=120,
    localization=3.0, loss_rise=1e-3, radius=0.01, adaptive_rho=0.01,
)  # fmt: skip
GROUPS = {
    "averages": sorted(SAMPLED),
    "counts": ["positive_eigenvalues", "negative_eigenvalues", "hutchinson_trace", "m_sharpness"],
    "PAC-Bayes": ["pac_bayes_kl", "pac_bayes_flatness", "pac_bayes_magnitude_flatness"],
    "volume": ["basin_volume"],
    "learning coefficient": ["local_learning_coefficient"],
}
DETERMINISTIC = {"positive_eigenvalues", "negative_eigenvalues", "hutchinson_trace", "m_sharpness"}


def over_seeds(name: str, model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    seeds = range(1 if set(names) <= DETERMINISTIC else SEEDS)
    runs = [measure(objective(name, model), names, options=COSTLY, seed=seed) for seed in seeds]
    return {n: torch.tensor([run[n].value for run in runs], dtype=torch.float64) for n in names}


def welch(a: torch.Tensor, b: torch.Tensor) -> float:
    """The difference of two means in standard errors; seeds that give the same value to rounding agree."""
    gap = abs(float(a.mean() - b.mean()))
    if gap <= 1e-7 * max(abs(float(a.mean())), abs(float(b.mean()))):
        return 0.0
    if len(a) == 1:
        return math.inf
    return gap / math.sqrt(float(a.var() + b.var()) / len(a))


def test_every_measure_is_in_one_of_the_two_halves() -> None:
    slow = [name for names in GROUPS.values() for name in names]
    assert len(slow) == len(set(slow))
    assert set(slow) == EXPENSIVE | SAMPLED


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_other_half_of_the_matrix(group: str) -> None:
    """The scatter over seeds is the error: equal laws have equal means, whatever the draws do under a permutation."""
    names = GROUPS[group]
    found: dict[tuple[str, str], dict[str, float]] = {}
    for net in NETS:
        base = over_seeds(net, build(net), names)
        for kind, model in members(net, 20.0 if group != "counts" else SCALE).items():
            if kind:
                moved = over_seeds(net, model, names)
                for name in names:
                    found.setdefault((name, kind), {})[net] = welch(base[name], moved[name])
    broken, missing = [], []
    for name in names:
        for kind in KINDS:
            declared, seen = MEASURES[name].invariance(kind), found[name, kind]
            if declared == "invariant" and max(seen.values()) > 5:
                broken.append((name, kind, seen))
            if declared == "changes" and max(seen.values()) < 5:
                missing.append((name, kind, seen))
            if declared == "almost" and seen["CNN + BN"] > 5:
                broken.append((name, kind, seen))
    assert not broken, broken
    assert not missing, missing
