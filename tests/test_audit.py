"""The audit: which numbers survive, on networks where the answer is a theorem."""

from __future__ import annotations

import copy
import importlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Measurement, MeasureOptions, Objective, audit, find_symmetries
from flatminima.audit import AuditReport, Change
from flatminima.curvature import exact_trace
from flatminima.measures import resolve
from flatminima.objective import NonFiniteLossError, ObjectiveError
from flatminima.symmetries import Proof

audit_module = importlib.import_module("flatminima.audit")  # the package's attribute of that name is the function
QUICK = MeasureOptions(max_products=40, max_probes=20, rtol=0.05, ascent_steps=10)


def problem(activation: type[nn.Module] = nn.ReLU) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3))
    return model, torch.randn(40, 4), torch.randint(0, 3, (40,))


@pytest.fixture(scope="module")
def report() -> AuditReport:
    model, x, y = problem()
    return audit(model, F.cross_entropy, (x, y), members=4, options=QUICK)


# ----- verdicts -------------------------------------------------------------------------------------------------------


def test_what_is_invariant_by_theorem_survives_and_the_rest_changes(report: AuditReport) -> None:
    verdicts = report.verdicts
    assert {name for name, text in verdicts.items() if text == "survives"} == {"w_hessian_w", "adaptive_sharpness"}
    assert all(text.startswith("changes up to x") for name, text in verdicts.items() if name not in (
        "w_hessian_w", "adaptive_sharpness"))  # fmt: skip
    ratios = report.max_ratio()
    assert set(ratios) == {m.name for m in resolve()}
    for name, row in ratios.items():
        assert set(row) == {"relu-layer-rescaling", "relu-unit-rescaling"}
        for ratio in row.values():
            assert ratio < 1 + 1e-9 if name in ("w_hessian_w", "adaptive_sharpness") else ratio > 1.5


def test_every_member_is_proved(report: AuditReport) -> None:
    assert set(report.proofs) == {"relu-layer-rescaling", "relu-unit-rescaling"}
    assert all(0 < change < 1e-12 for change in report.proofs.values())
    assert report.members == 4
    assert all(len(c.values) == 4 for c in report.changes)


def test_the_audit_agrees_with_measuring_the_members_by_hand(report: AuditReport) -> None:
    model, x, _ = problem()
    model, x = model.double(), x.double()
    generator = torch.Generator().manual_seed(0)
    for symmetry in find_symmetries(model, x, kinds=list(report.proofs)).found:
        norms = []
        for _ in range(4):
            member = symmetry.member(generator, 20.0).apply(model)
            norms.append(math.sqrt(sum(float((p.detach() ** 2).sum()) for p in member.parameters())))
        (change,) = [c for c in report.changes if (c.measure, c.symmetry) == ("parameter_norm", symmetry.kind)]
        assert change.values == pytest.approx(norms, rel=1e-12)
        base = report.measurements["parameter_norm"].value
        assert change.max_ratio == pytest.approx(max(max(n / base, base / n) for n in norms))


def test_the_trace_along_a_layer_rescaling_follows_its_law() -> None:
    """tr H(T_beta) = a / beta^2 + b beta^2 + c: the blocks of the two layers that trade the scale, and the rest."""
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
        g = Objective(twin, F.cross_entropy, (x, y))
        exact = exact_trace(g)
        assert exact.error < 1e-9
        assert exact.value == pytest.approx(a / beta**2 + b * beta**2 + c, rel=1e-9)
        betas.append(beta)
    assert max(betas) / min(betas) > 10


def test_a_network_without_symmetries_is_not_tested() -> None:
    model, x, y = problem(nn.GELU)
    found = audit(model, F.cross_entropy, (x, y), measures=["w_hessian_w", "parameter_norm"], members=2)
    assert found.verdicts == {"w_hessian_w": "not tested", "parameter_norm": "not tested"}
    assert found.changes == ()
    assert found.proofs == {}
    assert "not tested" in str(found)


def test_a_residual_network_reports_what_was_refused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(x + self.outer(torch.relu(self.inner(x)))))
            return out

    torch.manual_seed(0)
    _, x, y = problem()
    found = audit(Residual(), F.cross_entropy, (x, y), measures=["w_hessian_w"], members=2)
    assert found.verdicts == {"w_hessian_w": "survives"}
    assert found.rejected
    assert all(reason for _, reason in found.rejected)


# ----- how changes are judged -----------------------------------------------------------------------------------------


def made(value: float, error: float | None = 0.0, kind: str = "standard error") -> Measurement:
    return Measurement("trace", value, error, kind, True)


@pytest.mark.parametrize(
    ("base", "moved", "ratio", "significant"),
    [
        (made(10, 1), [made(12, 1)], 1.2, False),  # 2 against 3 * sqrt(2)
        (made(10, 0.1), [made(12, 0.1)], 1.2, True),
        (made(10), [made(5), made(30), made(10)], 3.0, True),
        (made(10), [made(2), made(20)], 5.0, True),
        (made(10), [made(10 * (1 + 1e-7))], 1 + 1e-7, False),
        (made(10), [made(10 * (1 + 1e-5))], 1 + 1e-5, True),
        (made(10, 5, "lower bound, spread of starts"), [made(11, 5, "lower bound, spread of starts")], 1.1, True),
        (made(10, None), [made(11, None)], 1.1, True),
        (made(1.0), [made(-1.0)], math.inf, True),
        (made(1.0), [made(0.0)], math.inf, True),
        (made(0.0), [made(1.0)], math.inf, True),
        (made(0.0), [made(0.0)], 1.0, False),
        (made(math.inf), [made(math.inf)], 1.0, False),
        (made(1.0), [made(math.inf)], math.inf, True),
        (made(-2.0), [made(-4.0)], 2.0, True),
    ],
)
def test_a_change_counts_beyond_three_combined_errors(
    base: Measurement, moved: list[Measurement], ratio: float, significant: bool
) -> None:
    change = audit_module._change("trace", "relu-unit-rescaling", base, moved)
    assert change.max_ratio == pytest.approx(ratio)
    assert change.significant == significant
    assert change.values == tuple(m.value for m in moved)


def test_a_broken_promise_of_invariance_is_said() -> None:
    changes = (
        Change("w_hessian_w", "relu-layer-rescaling", (1.0,), 1.0, False),
        Change("w_hessian_w", "relu-unit-rescaling", (2.0,), 2.0, True),
        Change("trace", "relu-layer-rescaling", (-1.0,), math.inf, True),
    )
    found = AuditReport({"w_hessian_w": made(1.0), "trace": made(1.0)}, changes, {}, (), 1)
    assert found.verdicts["w_hessian_w"] == "changes up to x2 although declared invariant under relu-unit-rescaling"
    assert found.verdicts["trace"] == "sign changes"


def test_an_error_that_hides_a_large_change_decides_nothing() -> None:
    changes = (Change("trace", "relu-unit-rescaling", (7.0,), 7.0, False),)
    found = AuditReport({"trace": made(1.0, 3.0)}, changes, {}, (), 1)
    assert found.verdicts["trace"] == "undecided: x7 is within its error"


# ----- the report as text and as data ---------------------------------------------------------------------------------


def test_the_report_prints_a_table(report: AuditReport) -> None:
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(resolve())
    assert lines[0].split()[:3] == ["measure", "value", "error"]
    (row,) = [line for line in lines if line.startswith("w_hessian_w")]
    assert row.split()[-3:] == ["x1", "x1", "survives"]


def test_the_report_is_plain_data(report: AuditReport) -> None:
    plain = json.loads(json.dumps(report.to_dict()))
    assert set(plain) == {"measurements", "changes", "verdict", "proofs", "rejected", "members"}
    assert plain["verdict"] == report.verdicts
    assert plain["measurements"]["trace"]["value"] == report.measurements["trace"].value
    assert {k: {s: c["max_ratio"] for s, c in v.items()} for k, v in plain["changes"].items()} == report.max_ratio()


# ----- manners --------------------------------------------------------------------------------------------------------


def test_the_model_and_the_random_state_are_untouched() -> None:
    model, x, y = problem()
    model[0].eval()
    before, state, given = copy.deepcopy(model.state_dict()), torch.get_rng_state(), x.clone()
    audit(model, F.cross_entropy, (x, y), measures=["parameter_norm", "trace"], members=2, options=QUICK)
    assert all(torch.equal(before[k], v) and before[k].dtype == v.dtype for k, v in model.state_dict().items())
    assert [m.training for m in model] == [False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)


def test_batches_count_as_one_data_set_and_the_seed_decides() -> None:
    model, x, y = problem()
    names = ["w_hessian_w", "lambda_max"]
    whole = audit(model, F.cross_entropy, (x, y), measures=names, members=2)
    parts = [(x[:16], y[:16]), (x[16:32], y[16:32]), (x[32:], y[32:])]
    for data in (parts, iter(parts)):
        cut = audit(model, F.cross_entropy, data, measures=names, members=2)
        for a, b in zip(whole.changes, cut.changes, strict=True):
            assert a.values == pytest.approx(b.values, rel=1e-9)
    assert audit(model, F.cross_entropy, (x, y), measures=names, members=2).to_dict() == whole.to_dict()
    other = audit(model, F.cross_entropy, (x, y), measures=names, members=2, seed=1)
    assert other.changes[1].values != whole.changes[1].values


def test_bad_arguments_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem()
    monkeypatch.setattr(audit_module, "Objective", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        audit(model, F.cross_entropy, (x, y), members=0)
    for scale in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_scale must be finite and above 1"):
            audit(model, F.cross_entropy, (x, y), max_scale=scale)
    with pytest.raises(ValueError, match="unknown measure 'tracee': expected one of trace"):
        audit(model, F.cross_entropy, (x, y), measures=["tracee"])
    with pytest.raises(ObjectiveError, match="got a dict"):
        audit(model, F.cross_entropy, [({"x": x}, y)])


def test_empty_data_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="empty"):
        audit(problem()[0], F.cross_entropy, [])


def test_nan_is_named() -> None:
    model, x, y = problem()
    bad = x.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(NonFiniteLossError, match="loss of batch 1 is nan"):
        audit(model, F.cross_entropy, [(x, y), (bad, y)])
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"2\.weight hold NaN"):
        audit(model, F.cross_entropy, (x, y))


def test_a_symmetry_that_changes_outputs_stops_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem()
    monkeypatch.setattr(audit_module, "prove", lambda *a: Proof("relu-layer-rescaling", 1e-3))
    with pytest.raises(RuntimeError, match=r"changes its outputs by 0\.001"):
        audit(model, F.cross_entropy, (x, y), measures=["parameter_norm"])
