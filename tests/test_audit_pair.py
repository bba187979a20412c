"""Two minima: flatter is said where an invariant measure says so beyond its error, and nowhere else."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit_fixture import QUICK, fitted, mlp, rows
from flatminima import MinimaComparison, compare_minima, find_symmetries
from flatminima.audit import Difference
from flatminima.audit.function import compare_functions
from flatminima.measures import MEASURES
from flatminima.objective import ObjectiveError

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("trace", "sam_sharpness", "w_hessian_w", "orbit_minimal_trace", "parameter_norm")


def compared(first: nn.Module, second: nn.Module, measures: Iterable[str] = NAMES, **more: object) -> MinimaComparison:
    return compare_minima(first, second, F.cross_entropy, rows(), measures=measures, options=QUICK, **more)  # type: ignore[arg-type]


def rescaled(model: nn.Module, seed: int = 0, kind: str = "relu-unit-rescaling") -> nn.Module:
    """The same function in other coordinates, in the model's own precision."""
    wide = copy.deepcopy(model).double()
    (symmetry,) = find_symmetries(wide, rows()[0].double(), kinds=[kind]).found
    return symmetry.member(torch.Generator().manual_seed(seed), 20.0).apply(wide).to(next(model.parameters()).dtype)


@cache
def trained(steps: int = 150, seed: int = 0) -> nn.Module:
    return fitted(mlp(seed=seed), *rows(), steps=steps)


@cache
def unlike() -> MinimaComparison:
    return compared(trained(60), trained(400))


# ----- one function ---------------------------------------------------------------------------------------------------


def test_the_same_function_in_other_coordinates_is_recognised() -> None:
    model = copy.deepcopy(trained()).double()
    found = compared(model, rescaled(model))
    assert found.function.relation == "same"
    assert found.flatter is None
    assert found.votes == ()
    assert found.verdict.startswith("the first and the second are the same function on these rows")
    by = {d.measure: d for d in found.differences}
    assert by["trace"].resolved
    assert by["trace"].basis == "coordinates"
    assert by["w_hessian_w"].basis == "invariant"
    assert not by["w_hessian_w"].resolved


def test_rounding_of_the_weights_is_no_difference_of_functions() -> None:
    model = trained()
    found = compared(model, rescaled(model))
    assert found.function.relation in ("same", "same within rounding")
    assert found.function.max_change > 1e-9
    assert found.flatter is None
    half = compared(copy.deepcopy(model).to(torch.bfloat16), rescaled(copy.deepcopy(model).to(torch.bfloat16)))
    assert half.flatter is None
    assert half.function.relation == "same within rounding"


def test_a_small_change_of_the_function_is_no_rounding() -> None:
    model = trained()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight += 1e-3 * torch.randn(other[0].weight.shape, generator=torch.Generator().manual_seed(0))
    assert compare_functions(model, other, [rows()], mode="eval", classes=True).relation == "different"


def test_other_probabilities_and_other_temperatures() -> None:
    model = copy.deepcopy(trained()).double()
    shifted, hotter = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        shifted[4].weight += torch.ones(3, 1, dtype=torch.float64) * torch.randn(1, 5, dtype=torch.float64)
        hotter[4].weight *= 3
        hotter[4].bias *= 3
    same = compared(model, shifted, ["trace"])
    assert same.function.relation == "same probabilities"
    assert same.function.same_loss
    assert same.flatter is None
    hot = compared(model, hotter)
    assert hot.function.relation == "same up to temperature"
    assert hot.function.factor == pytest.approx(3.0)
    assert hot.flatter is None
    assert "3 times those of the first" in hot.verdict
    assert "what differs is confidence" in hot.verdict
    assert hot.function.agreement == 1.0
    for outcome in (same, hot):
        assert all("counts" not in row["sentence"] for row in outcome.to_dict()["differences"] if row["resolved"])


def test_a_loss_that_sees_more_than_probabilities_or_outputs_is_not_overlooked() -> None:
    model = copy.deepcopy(trained()).double()
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted[4].bias += 1.0
    raw = compare_minima(model, shifted, F.nll_loss, rows(), measures=["w_hessian_w"], members=1, options=QUICK)
    assert raw.function.relation == "different"  # without a softmax, this loss sees the shift

    class Decaying(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.body(x)
            penalty = torch.stack([p.square().sum() for p in self.parameters()]).sum()
            return {"loss": F.cross_entropy(logits, labels) + 0.01 * penalty, "logits": logits}

    x, y = rows()
    two = [Decaying(copy.deepcopy(m)) for m in (model, rescaled(model))]
    found = compare_minima(*two, None, [{"x": x, "labels": y}], measures=["w_hessian_w"], members=1, options=QUICK)
    assert found.function.relation == "same"
    assert found.flatter is None
    assert any("the losses are not" in caution for caution in found.to_dict()["cautions"])


def test_without_classes_neither_shift_nor_factor_is_forgiven() -> None:
    model = mlp()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[4].bias += 1.0
    found = compare_functions(model, other, [rows()], mode="eval", classes=False)
    assert found.relation == "different"
    assert found.agreement is None


# ----- two functions --------------------------------------------------------------------------------------------------


def test_a_flatter_minimum_is_called_flatter_by_invariant_measures_alone() -> None:
    found = unlike()
    assert found.function.relation == "different"
    votes = {d.measure: d.flatter for d in found.votes}
    assert set(votes) <= {"w_hessian_w", "orbit_minimal_trace"}
    assert all(d.trusted and d.resolved and d.basis == "invariant" for d in found.votes)
    if len(set(votes.values())) == 1:
        assert found.flatter == next(iter(votes.values()))
        assert f"{found.names[found.flatter]} may be called flatter than" in found.verdict
    else:
        assert found.flatter is None
        assert found.verdict.startswith("Refused")
    assert any("under cross-entropy a better fit alone makes" in line for line in found.to_dict()["cautions"])


def test_the_verdict_does_not_depend_on_coordinates_or_order() -> None:
    """Both networks are moved along their orbits; what depends on coordinates turns round, the verdict does not."""
    base = unlike()
    first, second = rescaled(trained(60), 1), rescaled(trained(400), 2)
    moved = compared(first, second)
    assert moved.flatter == base.flatter
    raw = {d.measure: d.difference for d in base.differences}
    other = {d.measure: d.difference for d in moved.differences}
    assert other["orbit_minimal_trace"] == pytest.approx(raw["orbit_minimal_trace"], rel=1e-3)
    assert other["w_hessian_w"] == pytest.approx(raw["w_hessian_w"], rel=1e-3)
    assert other["trace"] != pytest.approx(raw["trace"], rel=0.5)
    swapped = compared(trained(400), trained(60))
    assert swapped.flatter == (None if base.flatter is None else 1 - base.flatter)


def test_coordinates_alone_convince_nobody() -> None:
    found = compared(trained(60), trained(400), ["trace", "parameter_norm", "sam_sharpness"])
    assert found.flatter is None
    assert found.verdict.startswith("Refused to call one of them flatter: no measure of flatness here is invariant")
    assert any(d.resolved and d.flatter is not None for d in found.differences)
    assert any("changing the coordinates of the first alone goes as far" in line for line in found.to_dict()["details"])


def test_where_symmetries_may_have_been_missed_only_what_none_can_move_counts() -> None:
    """Both are judged by permutations alone, which leave the trace alone; ReLU rescalings are not looked for."""
    found = compared(trained(60), trained(400), ["trace", "w_hessian_w"], kinds=["unit-permutation"])
    by = {d.measure: d for d in found.differences}
    assert by["trace"].basis == "survived"
    assert by["w_hessian_w"].basis == "invariant"
    assert {d.measure for d in found.votes} <= {"w_hessian_w"}
    assert any("only measures that no linear one can move count" in line for line in found.to_dict()["cautions"])


def difference(measure: str, gap: float, error: float, basis: str = "invariant") -> Difference:
    resolved = abs(gap) > 3 * error
    flatter = (int(gap < 0) if MEASURES[measure].flatter_when == "lower" else int(gap > 0)) if resolved else None
    return Difference(measure, 1.0, 1.0 + gap, gap, error, resolved, flatter, basis, False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("differences", "flatter", "text"),
    [
        ([("w_hessian_w", 0.5, 0.01)], 0, "by the one invariant measure"),
        ([("w_hessian_w", -0.5, 0.01), ("fisher_rao", -0.1, 0.01)], 1, "by all 2 invariant measures"),
        ([("w_hessian_w", 0.5, 0.2)], None, "no invariant measure of flatness differs by more than its error"),
        ([("w_hessian_w", 0.5, 0.01), ("fisher_rao", -0.5, 0.01)], None, "invariant measures contradict each other"),
        ([("w_hessian_w", 0.5, 0.01), ("fisher_rao", -0.5, 0.4)], 0, "cannot tell"),
        (
            [("w_hessian_w", 0.5, 0.01), ("trace", -0.5, 0.01, "coordinates")],
            0,
            "would say the opposite, which is coordin",
        ),
        ([("trace", -0.5, 0.01, "coordinates")], None, "no measure of flatness here is invariant"),
        ([("w_hessian_w", 0.5, 0.01, "undecided")], None, "Refused"),
        ([("w_hessian_w", 0.5, 0.01, "survived")], None, "Refused"),
        ([("w_hessian_w", 0.5, 0.01, "broken")], None, "Refused"),
    ],
)
def test_who_votes(differences: list[tuple[str, float, float]], flatter: int | None, text: str) -> None:
    found = replace(unlike(), differences=tuple(difference(*d) for d in differences))
    assert found.flatter == flatter
    assert text in found.verdict


def test_an_invariant_measure_that_differs_over_one_function_is_pointed_out() -> None:
    """A unit that nobody reads: no symmetry of the first leads to the second, and its curvature is another one."""
    model = copy.deepcopy(trained()).double()
    with torch.no_grad():
        model = copy.deepcopy(model)
        model[2].weight[:, 1] = 0
        other = copy.deepcopy(model)
        other[0].weight[1] *= -3
        other[0].bias[1] += 1
    found = compared(model, other, ["orbit_minimal_trace", "trace"])
    assert found.function.relation == "same"
    assert found.flatter is None


def test_dead_networks_are_compared_without_an_error() -> None:
    dead = mlp()
    with torch.no_grad():
        for p in dead.parameters():
            p.zero_()
    found = compared(dead, mlp())
    assert found.flatter in (None, 0, 1)
    assert json.dumps(found.to_dict())


# ----- the comparison as text and as data -----------------------------------------------------------------------------


def test_the_comparison_prints_and_is_plain_data() -> None:
    found = replace(unlike(), names=("a", "b"))
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["measure", "a", "b"]
    assert [line.split()[0] for line in lines[2 : 2 + len(found.differences)]] == [d.measure for d in found.differences]
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["verdict"] == found.verdict
    assert plain["flatter"] in ("a", "b", None)
    assert {row["measure"] for row in plain["differences"]} == {d.measure for d in found.differences}
    assert all(row["sentence"] for row in plain["differences"])


def test_different_architectures_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("flatminima.audit.pair"), "audit", lambda *a, **k: pytest.fail("work"))
    wide = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ObjectiveError, match=r"different architectures \(0\.weight: \(6, 4\) and \(7, 4\)"):
        compared(mlp(), wide)
    with pytest.raises(ObjectiveError, match=r"4.weight: \(3, 5\) and absent"):
        compared(mlp(), mlp()[:3])


def test_neither_model_is_touched_and_the_seed_decides() -> None:
    a, b = copy.deepcopy(trained(60)), copy.deepcopy(trained(400))
    before: list[dict[str, Tensor]] = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    found = compared(a, b, ["trace", "w_hessian_w"])
    assert found.to_dict() == compared(a, b, ["trace", "w_hessian_w"]).to_dict()
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
