"""One measured minimum against dense float64 matrices, layer by layer, and what it says about itself."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from flatminima.measures import resolve
from flatminima.objective import Objective
from flatminima.study.layers import shares
from flatminima.study.measure_settings import MATRICES, MeasureSettings
from flatminima.study.measuring import measure_minimum
from flatminima.study.settings import SettingsError
from flatminima.study.stages import Stage
from flatminima.study.words import describe, pm

ROWS, CLASSES = 12, 3


def network(activation: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, CLASSES)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.arange(ROWS) % CLASSES


def objective(activation: nn.Module, **options: Any) -> Objective:
    return Objective(network(activation), F.cross_entropy, data(), **options)


def outputs(model: nn.Module) -> tuple[Any, Tensor]:
    """The logits as a function of one flat vector, and that vector."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    w = torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])

    def at(theta: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in shapes.values()])
        state = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return functional_call(model, state, (data()[0],))

    return at, w


def dense(model: nn.Module, matrix: str) -> Tensor:
    """The matrix itself, written out."""
    at, w = outputs(model)
    y = data()[1]
    if matrix == "hessian":
        return torch.autograd.functional.hessian(lambda theta: F.cross_entropy(at(theta), y), w)
    jacobian = torch.autograd.functional.jacobian(at, w)  # rows, classes, n
    p = F.softmax(at(w), 1)
    if matrix == "empirical-fisher":
        rows = torch.einsum("rc,rcn->rn", p - F.one_hot(y, CLASSES), jacobian)
        return rows.T @ rows / ROWS
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("rcn,rcd,rdm->nm", jacobian, inner, jacobian) / ROWS


BLOCKS = {"0": slice(0, 25), "2": slice(25, 49), "4": slice(49, 64)}


def at_most(found: dict[str, Any], truth: float, factor: float = 1.0) -> None:
    assert abs(found["value"] - truth) <= factor * found["error"] + 1e-12 * abs(truth), (found, truth)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()], ids=["gelu", "relu"])
@pytest.mark.parametrize("matrix", list(MATRICES))
def test_every_number_agrees_with_the_dense_matrix(matrix: str, activation: nn.Module) -> None:
    f = objective(activation)
    truth = dense(f.model, matrix)
    values = torch.linalg.eigvalsh(truth)
    asked = MeasureSettings(
        top=4, smallest=2, trace=True, density=True, layers=True, matrix=matrix, runs=4, steps=12, measures=()
    )
    found = measure_minimum(f, asked)
    largest = [pair for pair in found["eigenvalues"] if pair["end"] == "largest"]
    smallest = [pair for pair in found["eigenvalues"] if pair["end"] == "smallest"]
    assert [pair["rank"] for pair in found["eigenvalues"]] == [1, 2, 3, 4, 1, 2]
    for pair, value in zip(largest, values.flip(0), strict=False):
        assert pair["converged"]
        at_most(pair, float(value))
    for pair in smallest:
        assert float((values - pair["value"]).abs().min()) <= pair["error"] + 1e-12
    at_most(found["trace"], float(truth.trace()), 4.0)
    assert found["trace"]["low"] <= found["trace"]["value"] <= found["trace"]["high"]
    assert [row["name"] for row in found["layers"]] == list(BLOCKS)
    for row, (name, rows) in zip(found["layers"], BLOCKS.items(), strict=True):
        block = truth[rows, rows]
        assert row["parameters"] == len(block), name
        at_most(row["trace"], float(block.trace()), 4.0)
        at_most(row["top"], float(torch.linalg.eigvalsh(block)[-1]))
        assert row["top"]["value"] <= float(values[-1]) + row["top"]["error"]
    at_most(found["layers_trace"], float(truth.trace()), 4.0)
    density = found["density"]
    moment = sum(density["outliers"]) + len(values) * float(
        (torch.tensor(density["nodes"]) * torch.tensor(density["weights"])).sum(1).mean()
    )
    assert moment == pytest.approx(float(truth.trace()), rel=0.3)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_traces_are_exact_where_the_network_is_affine_in_each_weight(matrix: str) -> None:
    f = objective(nn.ReLU())
    truth = dense(f.model, matrix)
    found = measure_minimum(f, MeasureSettings(trace=True, layers=True, matrix=matrix, measures=()))
    assert found["trace"]["method"] == "exact"
    assert found["trace"]["value"] == pytest.approx(float(truth.trace()), rel=1e-12)
    for row, rows in zip(found["layers"], BLOCKS.values(), strict=True):
        assert row["trace"]["method"] == "exact"
        assert row["trace"]["value"] == pytest.approx(float(truth[rows, rows].trace()), rel=1e-12)
        assert row["trace"]["error"] <= 1e-13 * row["trace"]["value"]
    alone = measure_minimum(f, MeasureSettings(trace=True, matrix=matrix, measures=()))
    assert alone["trace"]["value"] == pytest.approx(found["trace"]["value"], rel=1e-13)
    assert found["cost"]["parts"]["layers"]["gradient_equivalents"] > 0
    assert "trace" not in found["cost"]["parts"]  # the pass over the layers gave it


def test_the_last_layer_of_a_smooth_network_is_exact() -> None:
    found = measure_minimum(objective(nn.GELU()), MeasureSettings(layers=True, measures=()))
    assert [row["trace"]["method"] == "exact" for row in found["layers"]] == [False, False, True]


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()], ids=["gelu", "relu"])
@pytest.mark.parametrize("seed", range(3))
def test_the_layers_add_up_to_the_whole(activation: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 30), activation, nn.Linear(30, 20), activation, nn.Linear(20, 4)).double()
    x, y = torch.randn(40, 6).double(), torch.randint(0, 4, (40,))
    f = Objective(model, F.cross_entropy, (x, y))
    found = measure_minimum(f, MeasureSettings(trace=True, layers=True, trace_rtol=0.03, seed=seed, measures=()))
    total, parts = found["trace"], found["layers_trace"]
    assert parts["value"] == pytest.approx(math.fsum(row["trace"]["value"] for row in found["layers"]))
    assert abs(parts["value"] - total["value"]) <= 5 * math.hypot(parts["error"], total["error"])
    assert sum(row["share"]["value"] for row in found["layers"]) == pytest.approx(1.0)
    assert not any("add up" in caution for caution in found["cautions"])


@given(st.lists(st.tuples(st.floats(0.5, 50), st.floats(0, 0.5)), min_size=1, max_size=6), st.floats(0.1, 10))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_shares_add_up_and_do_not_depend_on_the_unit(pairs: list[tuple[float, float]], unit: float) -> None:
    found = shares(pairs)
    scaled = shares([(unit * value, unit * error) for value, error in pairs])
    if found[0] is None:
        return
    assert math.fsum(s["value"] for s in found if s) == pytest.approx(1.0)
    for a, b in zip(found, scaled, strict=True):
        assert a is not None
        assert b is not None
        assert a["value"] == pytest.approx(b["value"])
        assert a["error"] == pytest.approx(b["error"], abs=1e-12)


def test_the_error_of_a_share_is_the_scatter_of_shares() -> None:
    means, errors = torch.tensor([5.0, 2.0, 1.0]).double(), torch.tensor([0.05, 0.1, 0.02]).double()
    generator = torch.Generator().manual_seed(0)
    draws = means + errors * torch.randn(200_000, 3, dtype=torch.float64, generator=generator)
    scatter = (draws / draws.sum(1, keepdim=True)).std(0).tolist()
    found = shares(list(zip(means.tolist(), errors.tolist(), strict=True)))
    assert [s["error"] for s in found if s] == pytest.approx(scatter, rel=0.02)
    assert shares([(1.0, 3.0), (-1.0, 3.0)]) == [None, None]


def test_work_is_shared_and_paid_once() -> None:
    f = objective(nn.GELU())
    asked = MeasureSettings(top=3, trace=True, density=True, runs=3, steps=10)
    found = measure_minimum(f, asked)
    parts = found["cost"]["parts"]
    assert found["cost"]["products"] == sum(part["products"] for part in parts.values())
    assert found["cost"]["gradient_equivalents"] == pytest.approx(
        sum(part["gradient_equivalents"] for part in parts.values())
    )
    assert list(found["measures"]) == [m.name for m in resolve()]
    measured, top, total = found["measures"], found["eigenvalues"][0], found["trace"]
    assert (measured["lambda_max"]["value"], measured["lambda_max"]["error"]) == (top["value"], top["error"])
    assert (measured["trace"]["value"], measured["trace"]["error"]) == (total["value"], total["error"])
    assert measured["lambda_max"]["cost"] == measured["trace"]["cost"] == 0.0
    assert parts["measures"]["gradient_equivalents"] == sum(m["cost"] for m in measured.values())
    other = measure_minimum(f, MeasureSettings(top=3, matrix="ggn", measures=("lambda_max",)))
    assert other["measures"]["lambda_max"]["value"] == pytest.approx(top["value"], rel=0.03)  # still of the Hessian
    assert other["eigenvalues"][0]["value"] != pytest.approx(top["value"], rel=1e-6)


def test_without_curvature_there_are_the_measures_alone() -> None:
    found = measure_minimum(objective(nn.ReLU()), MeasureSettings(measures=("trace", "parameter_norm")))
    assert list(found["measures"]) == ["trace", "parameter_norm"]
    assert found["eigenvalues"] == found["layers"] == []
    assert [found[key] for key in ("trace", "density", "smallest", "gradient")] == [None] * 4
    assert found["loss"] == pytest.approx(float(F.cross_entropy(network(nn.ReLU())(data()[0]), data()[1]).detach()))
    assert found["answer"].endswith("2 of 2 measures reached the accuracy asked for.")


def test_the_result_is_json_and_the_same_every_time() -> None:
    asked = MeasureSettings(top=2, trace=True, density=True, layers=True, runs=3, steps=8)
    runs = [measure_minimum(objective(nn.GELU()), asked, command="flatminima measure") for _ in range(2)]
    for found in runs:
        assert set(found.pop("times")) == set(found["cost"]["parts"])
    first, second = (json.dumps(found, allow_nan=False) for found in runs)
    assert first == second
    assert json.loads(first) == runs[0]


def test_the_gradient_and_the_loss_have_the_rounding_of_their_precision() -> None:
    f = Objective(network(nn.GELU(), torch.float32), F.cross_entropy, data(torch.float32))
    at, w = outputs(network(nn.GELU()))
    w = torch.cat([p.detach().double().reshape(-1) for p in f.model.parameters()]).requires_grad_()
    value = F.cross_entropy(at(w), data()[1])
    slope = torch.autograd.grad(value, w)[0]
    found = measure_minimum(f, MeasureSettings(top=1, measures=()))
    assert abs(found["loss"] - float(value.detach())) <= 3 * found["loss_error"] + 1e-7
    assert abs(found["gradient"]["norm"] - float(slope.norm())) <= 3 * found["gradient"]["error"]
    assert 0 < found["gradient"]["error"] < 1e-5 * found["gradient"]["norm"] + 1e-6


def test_the_smallest_eigenvalue_seen_holds_an_eigenvalue_within_its_error() -> None:
    f = objective(nn.GELU())
    values = torch.linalg.eigvalsh(dense(f.model, "hessian"))
    found = measure_minimum(f, MeasureSettings(top=1, rtol=0.1, measures=()))
    smallest = found["smallest"]
    assert smallest["converged"] is None
    assert float((values - smallest["value"]).abs().min()) <= smallest["error"] + 1e-12
    assert smallest["value"] >= float(values[0]) - 1e-12
    assert any("was not iterated" in caution for caution in found["cautions"])


def test_what_did_not_converge_is_said() -> None:
    found = measure_minimum(objective(nn.GELU()), MeasureSettings(smallest=3, max_products=8, measures=()))
    assert not any(pair["converged"] for pair in found["eigenvalues"])
    assert any("3 of the smallest eigenvalues did not converge" in caution for caution in found["cautions"])
    assert "0 of 3 smallest eigenvalues reached" in found["details"][0]
    assert "(not converged)" in found["answer"]


def test_layers_that_do_not_add_up_are_reported() -> None:
    found = measure_minimum(objective(nn.GELU()), MeasureSettings(trace=True, layers=True, measures=()))
    total = found["trace"]
    total["value"] += 20 * math.hypot(total["error"], found["layers_trace"]["error"])
    (caution,) = [line for line in describe(found)["cautions"] if "add up" in line]
    assert "standard errors apart" in caution


# ----- models that are not a plain network ----------------------------------------------------------------------------


class OwnLoss(nn.Module):
    """Takes a dictionary and returns an object with a loss, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(nn.GELU())

    def forward(self, pixels: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.body(pixels)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def test_a_model_with_its_own_loss_and_dictionaries() -> None:
    x, y = data()
    own = Objective(OwnLoss(), None, [{"pixels": x[:8], "labels": y[:8]}, {"pixels": x[8:], "labels": y[8:]}])
    asked = MeasureSettings(top=2, trace=True, density=True, layers=True, runs=3, steps=8)
    found, plain = measure_minimum(own, asked), measure_minimum(objective(nn.GELU()), asked)
    assert found["model"]["name"] == "OwnLoss"
    assert [row["name"] for row in found["layers"]] == ["body.0", "body.2", "body.4"]
    assert found["loss"] == pytest.approx(plain["loss"])
    for key in ("value", "error"):
        for a, b in zip(found["eigenvalues"], plain["eigenvalues"], strict=True):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-9)
    assert found["trace"]["value"] == pytest.approx(plain["trace"]["value"], abs=5 * plain["trace"]["error"])


class SinglePrecisionLoss(nn.Module):
    """An attention block whose loss is computed in single precision whatever the weights are in, as in Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(31, 16), nn.LayerNorm(16)
        self.mixed, self.head = nn.Linear(16, 48), nn.Linear(16, 31)
        for p in self.parameters():
            p.data.mul_(0.02 if p.dim() > 1 else 1.0)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        q, k, v = self.mixed(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = self.head(x).float()
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def test_layers_of_a_model_whose_loss_is_in_single_precision() -> None:
    ids = torch.randint(0, 31, (8, 12), generator=torch.Generator().manual_seed(0))
    f = Objective(SinglePrecisionLoss(), None, {"input_ids": ids, "labels": ids})
    found = measure_minimum(f, MeasureSettings(top=1, layers=True, trace_rtol=0.2, measures=()))
    assert [row["name"] for row in found["layers"]] == ["embedding", "norm", "mixed", "head"]
    assert all(row["top"]["value"] <= found["eigenvalues"][0]["value"] * 1.001 for row in found["layers"])


def test_how_the_products_are_formed_and_how_batches_count_is_noted() -> None:
    f = objective(nn.GELU(), second_order="finite-difference")
    found = measure_minimum(f, MeasureSettings(top=2, layers=True, measures=()))
    assert any("finite differences" in note for note in found["notes"])
    truth = torch.linalg.eigvalsh(dense(f.model, "hessian"))
    at_most(found["eigenvalues"][0], float(truth[-1]))

    x, y = data()
    y = y.clone()
    y[:5] = -100
    masked = Objective(network(nn.GELU()), F.cross_entropy, [(x[:6], y[:6]), (x[6:], y[6:])])
    found = measure_minimum(masked, MeasureSettings(top=1, measures=()))
    assert found["data"]["weighting"] == "targets other than -100"
    assert any("targets other than -100" in note for note in found["notes"])


def test_half_precision_is_computed_in_single_and_says_so() -> None:
    f = Objective(network(nn.GELU(), torch.bfloat16), F.cross_entropy, data(torch.bfloat16))
    found = measure_minimum(f, MeasureSettings(top=1, measures=()))
    assert found["model"]["dtype"] == "float32"
    assert any("computed in torch.float32" in note for note in found["notes"])
    assert found["eigenvalues"][0]["converged"]


# ----- progress -------------------------------------------------------------------------------------------------------


def test_progress_names_each_part_with_its_error() -> None:
    stages: list[Stage] = []
    asked = MeasureSettings(top=3, smallest=1, trace=True, density=True, layers=True, runs=3, steps=8, rtol=0.01)
    found = measure_minimum(objective(nn.GELU()), asked, progress=stages.append)
    done = [stage for stage in stages if stage.done]
    assert [stage.part for stage in done] == [
        "top 3", "density", "trace", "smallest 1", *(f"layer {i} of 3 ({name}), {what}" for i, name in
        ((1, "0"), (2, "2"), (3, "4")) for what in ("top", "trace")), "loss and gradient", "measures",
    ]  # fmt: skip
    assert sum(stage.products for stage in done) == found["cost"]["products"]
    for stage in done:
        if stage.asked is not None and stage.products:
            assert stage.error <= stage.asked, stage
    running = [
        str(stage) for stage in stages if stage.part == "top 3" and not stage.done and math.isfinite(stage.error)
    ]
    assert all(
        re.fullmatch(r"top 3: \d+ products, residual \d\.\de[+-]\d\d \(asked 1\.0e-02\)", line) for line in running
    )
    assert running
    assert "of 24 products" in str(next(stage for stage in stages if stage.part == "density" and stage.products == 5))


# ----- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix": "hesian"}, "unknown matrix 'hesian': expected one of hessian, "),
        ({"matrix": "ggn"}, "--matrix ggn says of which matrix, not what; add --top"),
        ({"top": 0}, "--top must be at least 1, got 0"),
        ({"smallest": -1}, "--smallest must be at least 1, got -1"),
        ({"density": True, "runs": 1}, "--runs must be at least 2 (one run has no error band), got 1"),
        ({"density": True, "steps": 0}, "--steps must be at least 1, got 0"),
        ({"top": 1, "rtol": 0.0}, "--rtol must be positive and finite, got 0.0"),
        ({"trace": True, "trace_rtol": math.nan}, "--trace-rtol must be positive and finite, got nan"),
        ({"smallest": 5, "max_products": 3}, "--max-products must be at least 5 for 5 eigenvalues, got 3"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        MeasureSettings(**options)


@pytest.mark.parametrize("name", ["top", "smallest"])
def test_more_eigenvalues_than_parameters_are_refused_before_any_work(name: str) -> None:
    f = objective(nn.GELU())
    with pytest.raises(SettingsError, match=f"--{name} 65: the Hessian has only 64 eigenvalues"):
        measure_minimum(f, MeasureSettings(**{name: 65}))
    assert f.evaluations.gradient_equivalents == 0
    assert len(measure_minimum(f, MeasureSettings(top=64, measures=()))["eigenvalues"]) == 64


# ----- words ----------------------------------------------------------------------------------------------------------


@given(st.floats(-1e8, 1e8).filter(lambda v: v == 0 or abs(v) > 1e-8), st.floats(1e-9, 1e6))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_number_with_its_error_reads_back_within_the_error(value: float, error: float) -> None:
    text = pm(value, error).replace("−", "-").replace("(± ", "± ").replace(")", "")
    text = re.sub(
        r" × 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: "e" + m[1].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")), text
    )
    shown, _, spread = text.partition(" ± ")
    assert abs(float(shown) - value) <= max(0.06 * error, 6e-7 * abs(value))
    assert float(spread) == pytest.approx(error, rel=0.51 if error < 1e-6 * abs(value) else 0.06)


def test_the_point_is_called_no_minimum_only_where_the_bound_allows_it() -> None:
    found = measure_minimum(objective(nn.GELU()), MeasureSettings(top=1, measures=()))
    for smallest, words in (
        ({"value": -1.0, "error": 0.5}, "not exactly a minimum"),
        ({"value": -1.0, "error": 1.5}, "no negative eigenvalue is told from zero"),
        ({"value": 2.0, "error": 0.5}, "no negative eigenvalue was seen"),
    ):
        assert words in describe(found | {"smallest": smallest | {"converged": None}})["answer"]
