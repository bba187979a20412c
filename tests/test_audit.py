"""The audit of one minimum: which numbers survive, on networks where the answer is a theorem."""

from __future__ import annotations

import copy
import importlib
import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit_fixture import QUICK, mlp, rows
from flatminima import Objective, audit, find_symmetries
from flatminima.audit import AuditReport, Change
from flatminima.audit.judge import MEANING
from flatminima.measures import MEASURES, Measurement, resolve
from flatminima.objective import NonFiniteLossError, ObjectiveError
from flatminima.symmetries import Member, Proof, Symmetry
from flatminima.symmetries.proof import Prover

single = importlib.import_module("flatminima.audit.single")
RELU = ("relu-layer-rescaling", "relu-unit-rescaling")
INVARIANT = {"adaptive_sharpness", "w_hessian_w", "adaptive_trace", "orbit_minimal_trace", "fisher_rao", "path_norm"}
COORDINATES = {"sam_sharpness", "average_sharpness", "lambda_max", "trace", "parameter_norm"}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def audited() -> AuditReport:
    return audit(mlp(), F.cross_entropy, rows(), members=4, options=QUICK)


@pytest.fixture
def report(one_thread: None) -> AuditReport:
    return audited()


# ----- verdicts -------------------------------------------------------------------------------------------------------


def test_what_is_invariant_by_theorem_survives_and_the_rest_changes(report: AuditReport) -> None:
    assert set(report.by_verdict("invariant")) == INVARIANT
    assert set(report.by_verdict("changes")) == COORDINATES
    assert set(report.verdicts) - INVARIANT - COORDINATES <= {"adaptive_average_sharpness"}
    assert not report.by_verdict("broken")
    for name, row in report.max_ratio().items():
        for kind in RELU:
            if name in INVARIANT:
                assert row[kind] < 1 + 1e-9
            elif name in COORDINATES:
                assert row[kind] > 1.5
        if name in ("trace", "parameter_norm"):
            assert row["unit-permutation"] < 1 + 1e-9


def test_the_default_measures_come_with_their_repairs(report: AuditReport) -> None:
    assert {m.name for m in resolve()} < set(report.measurements)
    instead = {"trace": "orbit_minimal_trace", "sam_sharpness": "adaptive_sharpness", "parameter_norm": "path_norm"}
    for name, repair in instead.items():
        found = report.repair(name)
        assert found is not None
        assert found.name == repair
        assert found.moves_under == ()
        assert found.measurement == report.measurements[repair]
        assert f"Use {MEASURES[repair].label}" in report.sentences[name]
    assert all(report.repair(name) is None for name in INVARIANT)


def test_every_member_is_proved_and_only_changes_of_coordinates_decide(report: AuditReport) -> None:
    assert report.coordinates == (*RELU, "unit-permutation")
    assert set(report.proofs) == {*RELU, "unit-permutation", "softmax-shift", "temperature"}
    exact = [o for o in report.orbits if o.function_preserving]
    assert all(0 < o.max_change < 1e-12 or o.kind == "unit-permutation" for o in exact)
    assert all(o.loss_change < 1e-12 for o in exact)
    (temperature,) = [o for o in report.orbits if o.preserves == "predictions"]
    assert temperature.loss_change > 0.01
    moved = [c for c in report.changes if c.symmetry == "temperature" and c.significant]
    assert "w_hessian_w" in {c.measure for c in moved}  # and yet it counts as invariant
    assert any("temperature keeps every predicted class" in line for line in report.to_dict()["cautions"])


def test_the_audit_agrees_with_measuring_the_members_by_hand(report: AuditReport) -> None:
    model, (x, y) = mlp().double(), rows()
    for orbit in report.orbits:
        (change,) = [c for c in report.changes if (c.measure, c.symmetry) == ("parameter_norm", orbit.kind)]
        norms, losses = [], []
        for index in range(len(change.values)):
            twin = orbit.member(index).apply(model)
            norms.append(math.sqrt(sum(float((p.detach() ** 2).sum()) for p in twin.parameters())))
            losses.append(F.cross_entropy(twin(x.double()), y).item())
        assert change.values == pytest.approx(norms, rel=1e-12)
        if orbit.function_preserving:
            assert losses == pytest.approx([report.loss] * len(losses), rel=1e-12)
        base = report.measurements["parameter_norm"].value
        assert change.max_ratio == pytest.approx(max(max(n / base, base / n) for n in norms))
        logs = torch.tensor([base, *norms]).double().log()
        assert change.spread == pytest.approx(float(logs.std(correction=0).exp()))
        assert report.range("parameter_norm")[1] >= max(norms) or not orbit.function_preserving


def test_the_members_are_log_uniform_up_to_the_largest_scale() -> None:
    model, (x, y) = mlp().double(), rows()
    found = audit(
        model, F.cross_entropy, (x, y), measures=["parameter_norm"], kinds=["relu-unit-rescaling"], members=60
    )
    (orbit,) = found.orbits
    first = [orbit.member(i).apply(model)[0] for i in range(60)]
    scales = torch.cat([layer.bias / model[0].bias for layer in first]).detach().log() / math.log(20)
    assert scales.abs().max() <= 1
    assert float(scales.abs().mean()) == pytest.approx(0.5, abs=0.05)  # of a uniform variable on [-1, 1]
    assert float(scales.mean()) == pytest.approx(0.0, abs=0.1)
    assert len(found.changes[0].values) == 60


def test_what_is_declared_invariant_is_only_checked(report: AuditReport) -> None:
    assert report.members == 4
    assert report.checks == 2
    for change in report.changes:
        if change.symmetry in report.coordinates:
            assert len(change.values) == (2 if change.declared in ("invariant", "almost") else 4), change
    few = audit(mlp(), F.cross_entropy, rows(), measures=["trace"], members=5, budget=4, laws=False)
    assert sum(o.members for o in few.orbits) <= 5  # one each of five kinds is the least


def test_a_network_without_symmetries_is_not_tested() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.7, 0.1]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * self.w + x.square()).sum(1)

    x, _ = rows()
    found = audit(Squared(), F.mse_loss, (x, torch.ones(40)), measures=["w_hessian_w", "parameter_norm"], members=2)
    assert found.verdicts == {"w_hessian_w": "not tested", "parameter_norm": "not tested"}
    assert found.changes == ()
    assert found.proofs == {}
    assert "No number was put to the test" in str(found)
    assert all("Not tested" in sentence for sentence in found.sentences.values())


def test_gelu_admits_permutations_but_no_rescaling() -> None:
    found = audit(mlp(nn.GELU), F.cross_entropy, rows(), measures=["trace", "parameter_norm"], members=2, options=QUICK)
    assert found.coordinates == ("unit-permutation",)
    assert found.verdicts["parameter_norm"] == "invariant"
    assert found.max_ratio()["parameter_norm"]["unit-permutation"] == pytest.approx(1)
    assert any("GELU" in reason or "gelu" in reason for _, reason in found.rejected)


# ----- the report as text and as data ---------------------------------------------------------------------------------


def test_the_report_prints_a_table_and_sentences(report: AuditReport) -> None:
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["measure", "value", "error"]
    table = lines[2 : 2 + len(report.measurements)]
    assert [line.split()[0] for line in table] == list(report.measurements)
    (row,) = [line for line in table if line.startswith("w_hessian_w")]
    assert row.split()[-2:] == ["×1", "invariant"]
    assert "6 survive every change of coordinates found" in str(report)
    assert "5 depend on coordinates" in str(report)


def test_the_report_is_plain_data(report: AuditReport) -> None:
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["measures"]["trace"]["value"] == report.measurements["trace"].value
    assert plain["measures"]["trace"]["verdict"] == "changes"
    assert plain["measures"]["trace"]["repair"]["name"] == "orbit_minimal_trace"
    for name, row in report.max_ratio().items():
        assert {kind: cell["max_ratio"] for kind, cell in plain["changes"][name].items()} == row
    assert [s["kind"] for s in plain["symmetries"]] == [o.kind for o in report.orbits]
    assert all(s["law"] and s["hessian_law"] and s["sites"] for s in plain["symmetries"])


def test_every_status_has_a_meaning_and_every_verdict_a_sentence(report: AuditReport) -> None:
    statuses = {c.status for c in report.changes}
    assert statuses <= set(MEANING)
    assert all(sentence.endswith((".", "?")) for sentence in report.sentences.values())


def test_a_broken_promise_is_said_before_anything_else(report: AuditReport) -> None:
    bad = Change("w_hessian_w", "relu-unit-rescaling", "invariant", "broken", (2.0,), 2.0, 2.0, 0.0)
    kept = [c for c in report.changes if (c.measure, c.symmetry) != (bad.measure, bad.symmetry)]
    found = replace(report, changes=(*kept, bad))
    assert found.verdicts["w_hessian_w"] == "broken"
    assert "BROKEN: w'Hw moved although declared invariant" in found.to_dict()["answer"]
    assert any("BROKEN" in line for line in found.to_dict()["cautions"])


# ----- manners --------------------------------------------------------------------------------------------------------


def test_the_model_and_the_random_state_are_untouched() -> None:
    model, (x, y) = mlp(), rows()
    model[0].eval()
    before, state, given = copy.deepcopy(model.state_dict()), torch.get_rng_state(), x.clone()
    audit(model, F.cross_entropy, (x, y), measures=["parameter_norm", "trace"], members=1, options=QUICK)
    assert all(torch.equal(before[k], v) and before[k].dtype == v.dtype for k, v in model.state_dict().items())
    assert [m.training for m in model] == [False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)


def test_batches_count_as_one_data_set_and_the_seed_decides() -> None:
    model, (x, y) = mlp(), rows()
    asked: dict[str, Any] = {"measures": ["w_hessian_w", "lambda_max"], "kinds": RELU, "members": 2, "checks": 1}
    whole = audit(model, F.cross_entropy, (x, y), **asked)
    parts = [(x[:16], y[:16]), (x[16:32], y[16:32]), (x[32:], y[32:])]
    for data in (parts, iter(parts)):
        cut = audit(model, F.cross_entropy, data, **asked)
        for a, b in zip(whole.changes, cut.changes, strict=True):
            assert a.values == pytest.approx(b.values, rel=1e-9)
    assert audit(model, F.cross_entropy, (x, y), **asked).to_dict() == whole.to_dict()
    other = audit(model, F.cross_entropy, (x, y), **asked, seed=1)
    assert other.changes[1].values != whole.changes[1].values
    alone = audit(model, F.cross_entropy, (x, y), **{**asked, "kinds": RELU[1:], "measures": ["lambda_max"]})
    (again,) = alone.changes  # a member depends on the seed, its kind and its number alone
    assert again.values == next(c.values for c in whole.changes if (c.measure, c.symmetry) == ("lambda_max", RELU[1]))


def test_bad_arguments_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp(), rows()
    monkeypatch.setattr(single, "Bench", lambda *a: pytest.fail("work was done"))
    for arguments, message in (
        ({"members": 0}, "members must be at least 1, got 0"),
        ({"checks": 0}, "checks must be at least 1, got 0"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"measures": ["tracee"]}, "unknown measure 'tracee': expected one of"),
        ({"kinds": ["relu"]}, "unknown kind of symmetry 'relu': expected one of"),
        *(({"max_scale": s}, "max_scale must be finite and above 1") for s in (1.0, 0.5, math.nan, math.inf)),
    ):
        with pytest.raises(ValueError, match=message):
            audit(model, F.cross_entropy, data, **arguments)


def test_data_without_targets_or_without_rows_are_refused() -> None:
    x, _ = rows()
    with pytest.raises(ObjectiveError, match="empty"):
        audit(mlp(), F.cross_entropy, [])
    with pytest.raises(ObjectiveError, match="the data have no targets"):
        audit(mlp(), F.cross_entropy, [(x, None)])


def test_nan_is_named() -> None:
    model, (x, y) = mlp(), rows()
    bad = x.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(NonFiniteLossError, match="loss of batch 1 is nan"):
        audit(model, F.cross_entropy, [(x, y), (bad, y)])
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"2\.weight hold NaN"):
        audit(model, F.cross_entropy, (x, y))


def test_a_member_that_fails_its_proof_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlucky(Prover):
        def prove(self, member: Member) -> Proof:
            proof = super().prove(member)
            return replace(proof, max_change=1e-3) if member.kind == "relu-unit-rescaling" else proof

    monkeypatch.setattr(importlib.import_module("flatminima.audit.orbit"), "Prover", Unlucky)
    found = audit(mlp(), F.cross_entropy, rows(), measures=["parameter_norm"], kinds=RELU, members=2)
    assert found.coordinates == ("relu-layer-rescaling",)
    (reason,) = [why for site, why in found.rejected if site == "relu-unit-rescaling"]
    assert "found, but member 0 changes the outputs by 1.0e-03" in reason


def test_rows_that_take_another_path_are_noticed_on_the_whole_loss() -> None:
    """A map is proved on the first batch; a batch on which the model reads the weights otherwise shows in the loss."""

    class TwoPaths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out + self.body[0].weight[:3, 0] if bool((x == 0.125).any()) else out

    x, y = rows()
    second = x.clone()
    second[5, 0] = 0.125
    found = audit(TwoPaths(), F.cross_entropy, [(x, y), (second, y)], measures=["parameter_norm"], members=2)
    assert found.coordinates == ()
    (reason,) = [why for site, why in found.rejected if site == "relu-unit-rescaling"]
    assert "keeps the outputs on the rows of the proof, but a member changes the loss over all rows" in reason
    assert found.verdicts["parameter_norm"] == "not tested"


class Flow(nn.Module):
    """Decides by values what it runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if h.sum() > 0:
            h = torch.relu(self.b(h))
        out: Tensor = self.c(h)
        return out


def test_what_was_not_analysed_is_named() -> None:
    found = audit(Flow(), F.cross_entropy, rows(), measures=["trace"], members=1)
    assert found.partial
    assert found.unanalysed
    assert any("Not analysed at model: control flow depends on values at" in c for c in found.to_dict()["cautions"])
    assert not audit(mlp(), F.cross_entropy, rows(), measures=["parameter_norm"], members=1).partial


class Decaying(nn.Module):
    """Its loss has a penalty on the weights, which the outputs do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        penalty = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return {"loss": F.cross_entropy(logits, labels) + 0.01 * penalty, "logits": logits}


def test_a_penalty_on_the_weights_leaves_no_rescaling() -> None:
    x, y = rows()
    found = audit(
        Decaying(), None, [{"x": x, "labels": y}], measures=["trace", "parameter_norm"], members=1, options=QUICK
    )
    assert found.coordinates == ("unit-permutation",)
    reasons = dict(found.rejected)
    assert "the loss sees more than the outputs (a penalty on the weights, say)" in reasons["relu-unit-rescaling"]
    assert any("keep distances: that a number survives them says little" in c for c in found.to_dict()["cautions"])


def test_tied_weights_admit_no_untied_formula() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(torch.relu(x @ self.w) @ self.w.T))
            return out

    found = audit(Tied(), F.cross_entropy, rows(), measures=["trace", "parameter_norm"], members=1, options=QUICK)
    assert not set(found.coordinates) & set(RELU)
    assert any("'w' is used 2 times in the forward pass (tied parameters)" in reason for _, reason in found.rejected)


def test_where_the_gradient_is_long_there_is_no_minimum() -> None:
    data = rows()
    start = audit(mlp(), F.cross_entropy, data, measures=["parameter_norm"], kinds=RELU[:1], members=1)
    f = Objective(mlp(), F.cross_entropy, data)
    g = f.gradient().double()
    step = float(g @ g) / float(g @ f.hvp(g.float()).double())
    lower = copy.deepcopy(mlp())
    torch.nn.utils.vector_to_parameters(f.point() - step * g.float(), lower.parameters())
    won = (start.loss - float(F.cross_entropy(lower(data[0]), data[1]).detach())) / start.loss
    assert start.descent == pytest.approx(won, rel=0.3)  # to second order
    assert any("This is no minimum: a step along the gradient" in c for c in start.to_dict()["cautions"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_in_both_modes(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    found = audit(
        model, F.cross_entropy, rows(), measures=["trace", "w_hessian_w"], members=2, mode=mode, options=QUICK,
        kinds=["norm-gain-rescaling", "pre-norm-rescaling"],
    )  # fmt: skip
    exact = {o.kind: o.symmetry.exact for o in found.orbits}
    assert exact == {"norm-gain-rescaling": True, "pre-norm-rescaling": mode == "eval"}
    assert found.verdicts["trace"] == "changes"
    assert found.verdicts["w_hessian_w"] in ("invariant", "nearly")
    assert int(model[1].num_batches_tracked) == 0


def test_hints_are_proved_like_all_others() -> None:
    model, (x, y) = mlp().double(), rows()
    found = find_symmetries(model, x, kinds=["relu-layer-rescaling"]).found
    hint: Symmetry = found[0]
    report = audit(
        model, F.cross_entropy, (x, y), measures=["parameter_norm"], kinds=["softmax-shift"], hints=[hint], members=2
    )
    assert "relu-layer-rescaling" in report.coordinates
    other = find_symmetries(mlp(nn.Tanh).double(), x, kinds=["sign-flip"]).found[0]
    wrong = audit(model, F.cross_entropy, (x, y), measures=["parameter_norm"], kinds=["softmax-shift"], hints=[other])
    assert "sign-flip" not in wrong.coordinates


def test_a_failing_measure_at_a_member_is_a_number_that_vanishes() -> None:
    found = AuditReport(
        measurements={"trace": Measurement("trace", 2.0, 0.0, "rounding", True)}, changes=(), orbits=(), laws=(), rejected=(),
        loss=1.0, gradient_norm=0.0, descent=0.0, parameters=3, rows=2, classifies=True, members=1, checks=1,
    )  # fmt: skip
    assert found.verdicts == {"trace": "not tested"}
    assert math.isclose(found.range("trace")[0], 2.0)


def test_no_number_of_the_audit_depends_on_the_precision_of_the_model() -> None:
    data = rows()
    half = audit(mlp(), F.cross_entropy, data, measures=["trace"], kinds=RELU, members=1)
    whole = audit(mlp().double(), F.cross_entropy, data, measures=["trace"], kinds=RELU, members=1)
    assert half.measurements["trace"].value == pytest.approx(whole.measurements["trace"].value, rel=1e-12)
    f = Objective(mlp().double(), F.cross_entropy, tuple(t.double() if t.is_floating_point() else t for t in data))
    trace = f.hvp(torch.eye(f.n, dtype=torch.float64)).trace()
    assert whole.measurements["trace"].value == pytest.approx(float(trace), rel=1e-9)
