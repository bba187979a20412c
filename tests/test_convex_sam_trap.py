"""Theorem 7: SAM ends in a bad empirical minimum; the printed constants fail and the corrected ones hold."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import flatminima as fm
from convex_fixture import VECTORS, mean_over_everything, random_point, sam_loss, sample_of, vector
from flatminima.problems.convex import Constants, EpsilonWarning, Sample, SAMTrap, gd, mean_loss, sam, sam_chain

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = [key for key in VECTORS if re.match(r"sam_trap_(corrected|conditioned|paper_n6)", key)]
BROKEN = [key for key in VECTORS if "BROKEN" in key]


def recorded(key: str, sample: str = "classes") -> tuple[dict[str, Any], SAMTrap]:
    """The case and its problem; those numbers are of links chosen for the sample."""
    case, found = VECTORS[key], re.search(r"n(\d+)_T(\d+)", key)
    assert found is not None
    n, steps = map(int, found.groups())
    links = {"chain_delta": case["delta_j_ge_4"], "delta_2": case["delta_2"], "delta_3": "sample"}
    return case, SAMTrap(n, steps, case["eta"], case["r"], variant=case["variant"], sample=sample, **links)  # type: ignore[arg-type]


def run_of(f: SAMTrap) -> Any:
    return sam(f, lr=f.lr, radius=f.radius, steps=f.steps)


def test_evaluation_as_recorded() -> None:
    case = VECTORS["sam_trap_eval_n2_T3"]
    f = SAMTrap(2, 3, case["eta"], case["r"], delta_2=case["delta_2"], delta_3=case["delta_3"], sample=sample_of(case))
    k, w = f.constants, vector(case["w"])
    for name, value in {"epsilon": "neg_entry", "lam": "lam", "gamma": "gamma", "delta_1": "delta_1"}.items():
        assert getattr(k, name) == pytest.approx(case[value], rel=1e-12)
    assert f.losses(w).tolist() == pytest.approx(case["loss_per_sample"], abs=case["tol"])
    assert f.empirical_risk(w) == pytest.approx(case["empirical_loss"], abs=case["tol"])
    assert f.gradient(w).tolist() == pytest.approx(case["gradient"], abs=case["tol"])
    risk = f.population_risk(w)
    assert risk.exact
    assert risk.value == pytest.approx(case["population_loss"], abs=case["tol"])
    assert risk.value == pytest.approx(mean_over_everything(sam_loss(3, k), w, 4), rel=1e-13)


@pytest.mark.parametrize("key", RUNS)
def test_runs_as_recorded(key: str) -> None:
    case, f = recorded(key)
    tol, k, run = case["tol_rel"], f.constants, run_of(f)
    expected = {
        "neg_entry": k.epsilon, "lam": k.lam, "gamma": k.gamma, "delta_1": k.delta_1, "delta_3_value": k.chain[1],
        "norm_vS": f._trigger_size(k.epsilon), "sigma": f.closed_form().sigma,
        "grad_norm_w1": float(f.gradient().norm()) if f.n < 50 else case["grad_norm_w1"],
        "w2_first_coord_over_lambda_min": f.certify()["no other block passes -lambda"].value,
    }  # fmt: skip
    for name, value in expected.items():
        assert value == pytest.approx(case[name], rel=tol), name
    column = f.sample.zeros[0]
    second = f.split(run.iterate(2))[0][column]
    torch.testing.assert_close(second, f.split(f.second_iterate)[0][column])
    assert second[:2].tolist() == pytest.approx(case["w2_block_I_first_two"], rel=tol)
    assert not bool(second[2:].any())
    assert float(fm.problems.convex_base.length(f.gradient(run.iterate(2)))) == pytest.approx(
        case["grad_norm_w2"], rel=tol
    )  # type: ignore[attr-defined]
    final = (f.split(run.last)[0][column] / (f.lr * f.radius)).tolist()
    told = case["wT_block_I_over_eta_r"]
    if isinstance(told, list):
        assert final == pytest.approx(told, rel=tol)
    else:
        for name, values in told.items():
            slots = [int(s) for s in re.findall(r"\d+", name)]
            found = final[slots[0] - 1 : slots[1]] if slots else final[-1]
            assert found == pytest.approx(values, rel=tol)
    for tau, risk in case["suffix_population"].items():
        w = run.suffix_average(int(tau))
        assert f.population_risk(w).value == pytest.approx(risk, rel=tol)
        assert f.closed_form().suffix_risk(int(tau)) == pytest.approx(risk, rel=tol)
    assert f.empirical_risk(run.suffix_average(1)) == case["suffix_empirical_tau1"] == 0.0
    assert f.empirical_risk(run.last) == case["empirical_w_T"] == 0.0
    assert f.certify().ok


@pytest.mark.parametrize("key", BROKEN)
def test_the_printed_constants_fail_as_recorded(key: str) -> None:
    case, f = recorded(key)
    certificate = f.certify()
    assert not certificate.ok
    assert len(certificate.failed) == 1
    assert certificate.failed[0].startswith("no other block passes -lambda")
    expected = case["w2_first_coord_over_lambda_min"]
    assert certificate["no other block passes -lambda"].value == pytest.approx(expected, rel=case["tol_rel"])
    risk = f.population_risk(run_of(f).suffix_average(1)).value
    assert risk / ((f.lr * f.radius) ** 2 * f.steps) < 0.01


def test_the_limit_as_recorded() -> None:
    case = VECTORS["sam_trap_limit_closed_form"]
    for row in case["rows"]:
        links = (0.5, 1e-300, *(row["delta_j_ge_4"],) * (row["T"] - 3))
        limit = sam_chain(row["eta"], 1.0, links, 0.0)
        for tau, ratio in row["F_over_scale"].items():
            assert limit.suffix_risk(int(tau)) / (row["eta"] ** 2 * row["T"]) == pytest.approx(
                ratio, rel=case["tol_rel"]
            )


@pytest.mark.parametrize("variant", ["conditioned", "corrected"])
@pytest.mark.parametrize("lr", [1 / 24, 0.25, 1.0, 4.0])
def test_real_gradients_follow_the_chain_at_every_step(variant: Any, lr: float) -> None:
    """Lemma 8 with its invariants, on a drawn sample."""
    steps = 12
    f = SAMTrap(6, steps, lr, 1 / (2 * lr * math.sqrt(steps)), variant=variant, sample=Sample.draw(6, 4, "one"))
    run, form, reach = run_of(f), f.closed_form(), f.lr * f.radius
    column = f.sample.zeros[0]
    for t in range(3, steps + 1):
        blocks, _ = f.split(run.iterate(t))
        u = blocks[column].tolist()
        expected = [0.0 if t < j else form.fresh[j - 2] if t == j else form.settled[j - 2] for j in range(2, steps + 1)]
        assert u[1:] == pytest.approx(expected, rel=1e-9, abs=1e-15 * reach)
        assert -form.sigma <= u[1] <= 0.0
        assert -2 * reach <= u[t - 1] <= -reach
        assert t < 4 or -2 * reach <= u[t - 2] <= -reach / 2
        others = torch.cat([blocks[:column], blocks[column + 1 :]])
        assert not bool(others[:, 1:].any())
        if t < steps:
            pull = 0.5 * (f.constants.chain[t - 1] * lr * form.forces[t - 3]) ** 2
            assert f.empirical_risk(run.iterate(t)) == pytest.approx(pull, rel=1e-9)
    assert f.empirical_risk(run.last) == 0.0
    assert not bool(f.gradient(run.last).any())
    for tau in range(1, steps + 1):
        assert f.empirical_risk(run.suffix_average(tau)) == 0.0
        risk = f.population_risk(run.suffix_average(tau))
        assert risk.value >= f.floor()
        assert risk.kind == "bounded"
        assert risk.error < 1e-6 * risk.value
        assert form.suffix_risk(tau) == pytest.approx(risk.value, rel=1e-9)
    assert float(run.last.norm()) <= 1.0


@pytest.mark.parametrize("variant", ["conditioned", "corrected", "paper"])
def test_dense_and_classes_run_alike(variant: Any) -> None:
    runs = []
    for sample in ("dense", "classes"):
        f = SAMTrap(8, 16, 1 / 24, 3.0, variant=variant, sample=sample)  # type: ignore[arg-type]
        runs.append([f.expand(w) if sample == "classes" else w for w in map(run_of(f).iterate, (2, 5, 16))])
    for dense, classes in zip(*runs, strict=True):
        torch.testing.assert_close(dense, classes, rtol=0, atol=1e-14)


def test_several_spurious_columns_share_the_path() -> None:
    """K columns of zeros: each block is scaled by one over root K, and the risk is the same (ours)."""
    seed = next(s for s in range(99) if len(Sample.draw(6, s).zeros) == 2)
    two, one = (
        SAMTrap(6, 16, 1 / 24, 3.0, sample=s) for s in (Sample.draw(6, seed), Sample.draw(6, 4, "one"))
    )  # fmt: skip
    risks = [f.population_risk(run_of(f).last).value for f in (two, one)]
    assert risks[0] == pytest.approx(risks[1], rel=1e-5)
    blocks, _ = two.split(run_of(two).last)
    torch.testing.assert_close(blocks[two.sample.zeros[0]], blocks[two.sample.zeros[1]])
    assert not two.certify().covered
    with pytest.raises(ValueError, match="the sample has 2"):
        two.closed_form()


def test_gradient_descent_stays_harmless() -> None:
    f = SAMTrap(6, 64, 1 / 24, 1.5)
    run = gd(f, lr=f.lr, steps=64)
    assert f.population_risk(run.last).value + f.population_risk(run.last).error < 1e-15


def test_the_loss_does_not_depend_on_the_sample() -> None:
    f = SAMTrap(6, 16, 1 / 24, 3.0)
    assert f.on(Sample.draw(6, 1)).constants == f.constants
    assert SAMTrap(6, 16, 1 / 24, 3.0, delta_3="sample").constants != f.constants
    frozen = SAMTrap(6, 16, 1 / 24, 3.0, delta_3="sample")
    assert frozen.on(Sample.draw(6, 1)).constants == frozen.constants


# --- where numbers run out -------------------------------------------------------------------------------------------


def test_an_epsilon_in_the_denominator_is_not_silent() -> None:
    f = SAMTrap(6, 16, 1 / 24, 3.0, variant="paper", sample="classes")
    with pytest.warns(
        EpsilonWarning, match=r"epsilon = 1e-12 beside a gradient of norm 4\.9\de-16 leaves 0\.00049 of the radius 3"
    ):
        run = sam(f, lr=f.lr, radius=f.radius, steps=16, epsilon=1e-12)
    assert f.population_risk(run.last).value == 0.0
    assert f.certify(epsilon=1e-12).failed == ("the gradient outweighs epsilon (1e-12, limit 4.91e-19)",)


@pytest.mark.parametrize(
    ("variant", "n", "steps", "epsilon", "expected"),
    [
        ("paper", 6, 16, 1e-16, 0.01302), ("paper", 6, 16, 1e-12, 0.0), ("paper", 6, 128, 0.0, 0.01663),
        ("paper", 6, 128, 1e-16, 0.0), ("conditioned", 6, 16, 1e-12, 0.01302), ("conditioned", 6, 16, 1e-8, 0.0),
        ("conditioned", 8, 64, 1e-12, 0.01608), ("conditioned", 8, 64, 1e-8, 0.0),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::flatminima.problems.convex.EpsilonWarning")
def test_sensitivity_to_epsilon_as_recorded(variant: Any, n: int, steps: int, epsilon: float, expected: float) -> None:
    lr = 1 / 24
    f = SAMTrap(n, steps, lr, 1 / (2 * lr * math.sqrt(steps)), variant=variant, sample="classes")
    run = sam(f, lr=lr, radius=f.radius, steps=steps, epsilon=epsilon)
    assert f.population_risk(run.suffix_average(1)).value == pytest.approx(expected, abs=2e-5)


def test_single_precision_has_its_digits_or_is_refused() -> None:
    for n, steps in ((6, 16), (8, 64)):
        lr = 1 / 24
        exact, single = (
            SAMTrap(n, steps, lr, 1 / (2 * lr * math.sqrt(steps)), dtype=dtype)
            for dtype in (torch.float64, torch.float32)
        )
        risks = [f.population_risk(run_of(f).suffix_average(1)).value for f in (exact, single)]
        assert risks[1] == pytest.approx(risks[0], rel=5e-7)
    with pytest.raises(ValueError, match=r"n = 40: the gradient of the spurious column = .* underflows in float32"):
        SAMTrap(40, 64, lr, 1.5, sample="classes", dtype=torch.float32)
    with pytest.raises(ValueError, match="underflows in float16"):
        SAMTrap(6, 64, lr, 1.5, dtype=torch.float16)


@pytest.mark.parametrize(
    ("variant", "works", "refused"), [("conditioned", 400, 410), ("corrected", 150, 160), ("paper", 150, 200)]
)
def test_an_n_where_constants_underflow_is_refused_by_name(variant: Any, works: int, refused: int) -> None:
    f = SAMTrap(works, 64, 1 / 24, 1.5, variant=variant, sample="classes")
    assert f.certify().ok or variant == "paper"
    with pytest.raises(
        ValueError,
        match=f"n = {refused}: the gradient of the spurious column = .*underflows in float64 with the {variant}",
    ):
        SAMTrap(refused, 64, 1 / 24, 1.5, variant=variant, sample="classes")
    with pytest.raises(ValueError, match=r"n = 700: .* underflows"):
        SAMTrap(700, 64, 1 / 24, 1.5, variant=variant, sample="classes")


@pytest.mark.parametrize("n", [6, 100, 400])
def test_the_librarys_sam_takes_the_same_steps(n: int) -> None:
    f = SAMTrap(n, 16, 1 / 24, 3.0, sample="classes")
    objective = f.objective()
    x, y = f.data()
    optimiser = fm.SAM(torch.optim.SGD(objective.model.parameters(), lr=f.lr), rho=f.radius)
    run = run_of(f)
    for t in range(2, 17):
        optimiser.step(lambda: mean_loss(objective.model(x), y))
        torch.testing.assert_close(objective.point(), run.iterate(t), rtol=1e-9, atol=1e-15)
    assert f.population_risk(objective.point()).value >= f.floor()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 2}, "at least 3 for a chain, got 2"),
        ({"lr": 0.0}, "lr must be finite and > 0"),
        ({"radius": math.inf}, "radius must be finite and > 0"),
        ({"variant": "correct"}, "unknown variant of the constants 'correct': expected one of corrected"),
        ({"chain_delta": 1.5}, "chain_delta must be at most 1"),
        ({"delta_2": -1.0}, "delta_2 must be finite and > 0"),
        ({"delta_3": 0.0}, "delta_3 must be finite and > 0"),
        ({"sample": "spurious"}, "the trigger touches every column"),
        ({"sample": Sample.lazy(6, 0, columns=5)}, "the trigger touches every column"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMTrap(**{"n": 6, "steps": 16, "lr": 1 / 24, "radius": 3.0} | arguments)


def test_another_step_size_is_not_covered() -> None:
    f = SAMTrap(6, 16, 16.0, 0.1, chain_delta=0.1)
    assert not f.certify().ok
    assert "the links are weak (0.1, limit 0.02813)" in f.certify().failed
    assert [c.name for c in SAMTrap(5, 5, 0.25, 3.0).certify().checks if c.hypothesis and not c.holds] == [
        "n >= 6", "T >= 6", "lr r <= 1 / (2 sqrt T)",
    ]  # fmt: skip


def test_constants_are_those_of_the_table() -> None:
    n, steps, lr, r = 6, 16, 0.25, 0.5
    columns, d = 2**n, steps * 2**n + 1
    kappa = math.sqrt(columns + 1)
    found: dict[str, Constants] = {
        v: SAMTrap(n, steps, lr, r, variant=v).constants
        for v in ("paper", "corrected", "conditioned")  # type: ignore[arg-type]
    }
    lam = r / (4 * d * (d - 1))
    for name in ("paper", "corrected"):
        assert found[name].epsilon == pytest.approx(1 / (2 * (d - 1)))
        assert found[name].lam == pytest.approx(lam)
    k = found["paper"]
    assert k.gamma == pytest.approx(lam / (r + k.delta_1))
    assert k.delta_1 == pytest.approx(lr * k.gamma * r / (2 * math.sqrt(d) - lr * k.gamma))
    k = found["corrected"]
    assert k.gamma == pytest.approx(lam / (2 * r * kappa))
    assert k.delta_1 == pytest.approx(lr * k.gamma * r / (2 * math.sqrt(d)))
    k = found["conditioned"]
    assert (k.epsilon, k.lam) == (pytest.approx(1 / 12), pytest.approx(r / 12 / (2 * kappa)))
    assert k.gamma == pytest.approx(k.lam / (2 * r * kappa))
    assert k.delta_1 == pytest.approx(min(k.lam / 2, lr * k.gamma * r / (2 * kappa)))


def test_the_trigger_is_sampled_where_its_share_is_not_negligible() -> None:
    f = SAMTrap(5, 4, 0.25, 0.5, sample=Sample.draw(5, 0))
    w = 30.0 * random_point(f.d, 0)
    found = f.population_risk(w, draws=2000)
    assert found.kind == "sampled"
    more = f.population_risk(w, draws=100_000, seed=1)
    assert abs(found.value - more.value) <= 4 * math.hypot(found.error, more.error)


def test_a_second_link_that_is_too_strong_is_not_certified() -> None:
    """The proof needs delta_3 <= sigma / (2 lr r): above, slot 2 turns positive and the closed form is another run's."""
    f = SAMTrap(6, 32, 1 / 24, 2.0, delta_3=1.0)
    certificate = f.certify()
    assert not certificate.ok
    assert [c.name for c in certificate.checks if not c.holds] == ["delta_3 <= sigma / (2 lr r)"]
    assert float(run_of(f).last.reshape(-1)[1]) > 0.0
    for sample in ("dense", Sample.draw(6, 0, "one")):
        weakest = SAMTrap(6, 32, 1 / 24, 2.0, delta_3="sample", sample=sample)  # type: ignore[arg-type]
        assert weakest.certify().ok  # the largest that its sample allows
        check = weakest.certify()["delta_3 <= sigma / (2 lr r)"]
        assert check.value == pytest.approx(check.limit, rel=1e-12)


def test_no_theorem_speaks_of_a_sample_with_an_example_left_out() -> None:
    whole = SAMTrap(6, 12, 0.25, 0.5)
    f = whole.on(whole.sample.without(0))
    with pytest.raises(ValueError, match=r"closed form is for a whole sample.*run sam\("):
        f.closed_form()
    assert not f.certify()["no example is left out"].holds
    assert whole.certify()["no example is left out"].holds


@pytest.mark.parametrize("epsilon", [-1.0, math.nan])
def test_an_epsilon_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon must be finite and >= 0"):
        SAMTrap(6, 6, 0.25, 0.5).certify(epsilon=epsilon)
