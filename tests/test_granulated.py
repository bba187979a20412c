"""Granulated Kendall, conditional information, sign errors and McNemar: vectors and plain counting."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from flatminima.study.granulated import conditional_information, granulated_kendall
from flatminima.study.sign_error import hoeffding_weight, mcnemar, resolved_pairs, sign_error

VECTORS = json.loads((Path(__file__).parent / "vectors" / "statistics.json").read_text())
GRID = [{"lr": a, "width": b, "depth": c} for a in (0.1, 0.2, 0.4) for b in (8, 16) for c in (1, 2)]


def test_granulated_vector() -> None:
    v = VECTORS["granulated"]
    settings = [{"A": int(key[0]), "B": int(key[1])} for key in v["mu"]]
    mu, g = list(v["mu"].values()), [v["g"][key] for key in v["mu"]]
    found = granulated_kendall(settings, mu, g)
    assert found.psi == {"A": pytest.approx(v["psi_A"], rel=1e-9), "B": pytest.approx(v["psi_B"], rel=1e-9)}
    assert found.mean == pytest.approx(v["Psi"], rel=1e-9)
    assert found.lines == {"A": 2, "B": 3}
    assert stats.kendalltau(mu, g).statistic == pytest.approx(v["tau_all"], rel=1e-9)


def test_a_measure_that_only_tracks_one_axis_is_found_out() -> None:
    outcome = [s["lr"] + 0.01 * s["width"] for s in GRID]
    found = granulated_kendall(GRID, [s["lr"] for s in GRID], outcome)
    assert found.psi == {"lr": 1.0, "width": 0.0, "depth": 0.0}
    assert found.mean == pytest.approx(1 / 3)


def test_seeds_are_held_and_missing_networks_shorten_lines() -> None:
    settings = [{"lr": lr, "seed": s} for lr in (1, 2, 3) for s in range(4)]
    measure = np.arange(12.0)
    measure[0] = math.nan
    found = granulated_kendall(settings, measure, np.arange(12.0), held=["seed"])
    assert found.psi == {"lr": 1.0}
    assert found.lines == {"lr": 4}
    with pytest.raises(ValueError, match="two networks have the settings"):
        granulated_kendall([{"lr": 1}, {"lr": 1}, {"lr": 2}], [1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match=r"settings name \['b'\] and \['a'\]"):
        granulated_kendall([{"a": 1}, {"b": 1}], [1, 2], [1, 2])
    with pytest.raises(ValueError, match="got 1 settings, 2 values and 2 outcomes"):
        granulated_kendall([{"a": 1}], [1, 2], [1, 2])
    assert math.isnan(granulated_kendall([{"a": 1}, {"a": 1}], [1, 2], [1, 2]).mean)


def counted_information(mu: np.ndarray, g: np.ndarray, fixed: tuple[str, ...]) -> float:
    """I(V_mu; V_g | U) / H(V_g | U) by writing out the joint distribution over ordered pairs."""
    joint: Counter[tuple[Any, int, int]] = Counter()
    for i, j in itertools.permutations(range(len(mu)), 2):
        u = tuple(GRID[i][name] for name in fixed)
        if u == tuple(GRID[j][name] for name in fixed) and mu[i] != mu[j] and g[i] != g[j]:
            joint[u, int(np.sign(mu[i] - mu[j])), int(np.sign(g[i] - g[j]))] += 1
    total = sum(joint.values())
    of_u: Counter[Any] = Counter()
    of_mu: Counter[Any] = Counter()
    of_g: Counter[Any] = Counter()
    for (u, a, b), count in joint.items():
        of_u[u] += count
        of_mu[u, a] += count
        of_g[u, b] += count
    information = sum(n / total * math.log2(n * of_u[u] / (of_mu[u, a] * of_g[u, b])) for (u, a, b), n in joint.items())
    entropy = -sum(n / total * math.log2(n / of_u[u]) for (u, _), n in of_g.items())
    return information / entropy


def test_conditional_information_by_counting() -> None:
    rng = np.random.default_rng(0)
    g = rng.normal(size=12)
    mu = np.round(g + rng.normal(size=12), 1)
    found = conditional_information(GRID, mu, g)
    names = ("lr", "width", "depth")
    sets = [s for size in range(3) for s in itertools.combinations(names, size)]
    assert set(found.by_set) == set(sets)
    for fixed in sets:
        assert found.by_set[fixed] == pytest.approx(counted_information(mu, g, fixed), abs=1e-12)
    assert found.score == min(found.by_set.values())
    assert conditional_information(GRID, g, g).score == 1.0
    assert conditional_information(GRID, -g, g).score == 1.0
    # All that it knows is the learning rate: with that held fixed there is not a pair left that it tells apart.
    only = conditional_information(GRID, [s["lr"] + 1e-3 * (s["width"] * s["depth"] % 3) for s in GRID], g)
    assert only.score < 0.5


def test_weights_of_the_vector() -> None:
    v = VECTORS["hoeffding_weight_m10000"]
    assert hoeffding_weight([float(d) for d in v], 10_000) == pytest.approx(list(v.values()), rel=1e-7, abs=1e-12)
    with pytest.raises(ValueError, match="points is 0"):
        hoeffding_weight(0.1, 0)


def test_sign_errors_by_counting() -> None:
    rng = np.random.default_rng(1)
    settings = [s | {"seed": seed} for s in GRID for seed in (0, 1)]
    mu, g = rng.normal(size=24), 0.5 + 0.1 * rng.normal(size=24)
    found = sign_error(settings, mu, g, 2000, held=["seed"])
    assert len(found.environments) == 3 + 1 + 1
    for environment in found.environments:
        total = wrong = pairs = 0.0
        for i, j in itertools.combinations(range(24), 2):
            differing = {name for name in settings[i] if settings[i][name] != settings[j][name]}
            if differing == {environment.axis} and {settings[k][environment.axis] for k in (i, j)} == set(
                environment.values
            ):
                w = max(0.0, 1 - 2 * math.exp(-2 * 2000 * (abs(g[i] - g[j]) / 2) ** 2)) ** 2
                total += w
                pairs += 1
                wrong += w * ((mu[i] > mu[j]) != (g[i] > g[j]))
        assert environment.pairs == pairs
        assert environment.weight == pytest.approx(total)
        assert environment.error == pytest.approx(wrong / total)
    errors = [e.error for e in found.environments]
    assert (found.mean, found.worst) == (pytest.approx(np.mean(errors)), max(errors))
    assert found.percentile_90 == pytest.approx(np.quantile(errors, 0.9))
    opposite = sign_error(settings, mu, g, 2000, held=["seed"], direction=-1)
    assert opposite.mean == pytest.approx(1 - found.mean)


def test_differences_within_noise_count_nothing_and_ties_half() -> None:
    settings = [{"lr": 1}, {"lr": 2}]
    quiet = sign_error(settings, [1, 2], [0.900, 0.901], 1000)
    assert math.isnan(quiet.worst)
    assert quiet.counted == 0
    assert sign_error(settings, [1, 1], [0.5, 0.9], 1000).worst == 0.5
    with pytest.raises(ValueError, match="direction is 0"):
        sign_error(settings, [1, 2], [0.5, 0.9], 1000, direction=0)


def test_mcnemar_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(2)
    correct = rng.random((4, 200)) < np.array([[0.9], [0.85], [0.7], [0.7]])
    for a, b in itertools.combinations(correct, 2):
        found = mcnemar(a, b)
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert found.p == pytest.approx(reference_mcnemar(table, exact=True).pvalue, rel=1e-9)
    resolved = np.mean([mcnemar(a, b).p <= 0.05 for a, b in itertools.combinations(correct, 2)])
    assert resolved_pairs(correct) == pytest.approx(resolved)
    assert mcnemar([True], [True]).p == 1
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(1,\)"):
        mcnemar([1, 0], [1])
    with pytest.raises(ValueError, match="at least two networks"):
        resolved_pairs([[1, 0]])


def test_mcnemar_errs_at_most_at_its_level() -> None:
    rng = np.random.default_rng(3)
    p = [mcnemar(*(rng.random((2, 300)) < 0.8)).p for _ in range(2000)]
    assert 0.02 < np.mean(np.array(p) <= 0.05) <= 0.05 + 0.015
