"""What a study records of a network: against plain formulas, and the same whoever is in the batch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

from flatminima.models import build
from flatminima.study.network_runs import run_batch
from flatminima.study.run_spec import DataSpec, MeasureSpec, ModelSpec, OptimiserSpec, Record, RunSpec, StopSpec
from flatminima.study.study_measures import STUDY_MEASURES, wrong_options
from flatminima.study.subsets import load_subset

DATA = DataSpec("digits", 120, probes=6)
MEASURES = (
    *(
        MeasureSpec(name, orbit=True)
        for name in ("pair_proxy", "trace", "orbit_minimal_trace", "w_hessian_w", "parameter_norm", "unseen_patterns")
    ),
    MeasureSpec("source_trace", (("probes", 8), ("subset", 50)), repeats=2),
    MeasureSpec("unseen_patterns", (("layer", 1),), label="first"),
    MeasureSpec("unseen_free_patterns"),
    MeasureSpec("train_patterns"),
    MeasureSpec("free_parameters"),
)


def spec(seed: int = 0, **changes: object) -> RunSpec:
    made = RunSpec(
        "test", (("seed", seed),), DATA, ModelSpec("mlp", (("hidden", (12, 6)),)), OptimiserSpec(lr=0.2, batch_size=32),
        StopSpec("accuracy", 0.95, check_every=5, max_epochs=200, fixed_steps=30), seed, seed, MEASURES,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def run(*specs: RunSpec) -> dict[int, Record]:
    return {record.spec["seed"]: record for record in run_batch(specs, lambda fraction: None)}


@pytest.fixture(scope="module")
def records() -> dict[int, Record]:
    return run(*(spec(seed) for seed in range(3)))


def network(record: Record) -> nn.Sequential:
    model = build("mlp", (64,), 10, hidden=(12, 6))
    model.load_state_dict(load(record.artefacts["weights.safetensors"]))
    assert isinstance(model, nn.Sequential)
    return model


def preactivations(model: nn.Sequential, x: torch.Tensor, layer: int) -> np.ndarray:
    with torch.no_grad():
        return model.double()[: 2 * layer](x.double()).numpy()


def distinct(rows: np.ndarray) -> set[tuple[bool, ...]]:
    return {tuple(row) for row in (rows > 0).tolist()}


def test_the_record_is_the_same_in_any_company(records):
    alone = run(spec(1))[1]
    assert alone.values == records[1].values
    assert alone.artefacts == records[1].artefacts
    assert records[1].id == spec(1).id


def test_accuracies_are_those_of_the_stored_weights(records):
    data = load_subset(DATA)
    for record in records.values():
        with torch.no_grad():
            logits = network(record)(data.test)
        right = logits.argmax(1) == data.test_labels
        v = record.values
        assert v["test.accuracy"] == pytest.approx(float(right.double().mean()))
        assert v["test.accuracy.a"] == pytest.approx(float(right[data.half].double().mean()))
        assert v["test.accuracy.b"] == pytest.approx(float(right[~data.half].double().mean()))
        assert v["test.loss"] == pytest.approx(float(F.cross_entropy(logits, data.test_labels)), rel=1e-5)
        assert np.array_equal(np.frombuffer(record.artefacts["predictions.uint8"], np.uint8), logits.argmax(1).numpy())
        assert v["train.accuracy"] >= 0.95
        assert v["train.epochs"] % 5 == 0


def test_patterns_and_free_parameters_against_brute_force(records):
    data = load_subset(DATA)
    unseen = torch.cat([x for x, _ in data.unseen()])
    for record in records.values():
        model, v = network(record), record.values
        met = {layer: distinct(preactivations(model, unseen, layer)) for layer in (1, 2)}
        known = [tuple(row) for row in (preactivations(model, data.x, 2) > 0).tolist()]
        assert v["measure.first"] == len(met[1])
        assert v["measure.unseen_patterns"] == len(met[2])
        assert v["measure.unseen_free_patterns"] == len(met[2] - set(known))
        assert v["measure.train_patterns"] == len(set(known))
        own = 10 * 6 + 10
        assert v["measure.free_parameters"] == sum(max(0, own - known.count(region)) for region in set(known))


def test_curvature_is_that_of_the_dense_hessian(records):
    data, record = load_subset(DATA), records[0]
    model = network(record).double()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([s.numel() for s in shapes])
        weights = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (data.x.double(),)), data.y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    assert record.values["measure.trace"] == pytest.approx(float(hessian.trace()), rel=1e-9)
    assert record.values["measure.w_hessian_w"] == pytest.approx(float(flat @ hessian @ flat), rel=1e-9)
    assert record.values["covariate.parameter_norm"] == pytest.approx(float(flat.norm()), rel=1e-12)


def test_orbits_keep_what_is_of_the_function_and_nothing_else(records):
    for record in records.values():
        v = record.values
        assert v["orbit.change"] < 1e-9
        for name in ("orbit_minimal_trace", "w_hessian_w", "unseen_patterns", "pair_proxy"):
            assert v[f"orbit.{name}"] == pytest.approx(v[f"measure.{name}"], rel=1e-8)
        for name in ("trace", "parameter_norm"):
            assert v[f"orbit.{name}"] > 1.5 * v[f"measure.{name}"]
    moved = [r.values["orbit.trace"] / r.values["measure.trace"] for r in records.values()]
    assert len(set(moved)) == 3, "every network moves on its own"


def test_repetitions_are_independent_and_estimate_the_trace(records):
    v = records[0].values
    draws = [v["measure.source_trace"], v["repeat.source_trace.1"], v["repeat.source_trace.2"]]
    assert len(set(draws)) == 3
    many = MeasureSpec("source_trace", (("probes", 200), ("subset", 500)))
    found = run(spec(0, measures=(many, MeasureSpec("trace"))))[0].values
    assert found["measure.source_trace"] == pytest.approx(found["measure.trace"], rel=0.15)


def test_the_second_criterion_is_another_network_of_the_same_training(records):
    """After 30 steps: what a training that always stops there gives."""
    fixed = run(spec(2, stop=StopSpec("never", None, max_steps=30, max_epochs=200), measures=(MeasureSpec("trace"),)))[
        2
    ]
    assert fixed.status == "finished"
    for name in ("test.accuracy", "train.loss", "measure.trace", "covariate.parameter_norm"):
        assert records[2].values[f"fixed.{name}"] == fixed.values[name]


def test_covariates_are_always_logged(records):
    names = {
        "parameter_norm", "parameter_l1_norm", "spectral_product", "minimum_margin", "median_margin", "normalised_margin",
        "live_units", "live_units.1", "live_units.2", "participation_ratio", "lr", "batch_size",
        "pair_proxy.true_feasible", "pair_proxy.wrong_feasible",
    }  # fmt: skip
    for record in records.values():
        assert {f"covariate.{name}" for name in names} <= record.values.keys()
        v = record.values
        both = v["covariate.pair_proxy.true_feasible"] + v["covariate.pair_proxy.wrong_feasible"]
        assert both == v["measure.pair_proxy"]
        assert v["covariate.live_units.1"] + v["covariate.live_units.2"] == v["covariate.live_units"]


def test_a_missed_criterion_is_recorded_with_its_numbers():
    found = run(spec(0, stop=StopSpec("loss", 1e-9, max_epochs=3), measures=(MeasureSpec("trace"),)))[0]
    assert found.status == "missed"
    assert "after 3 epochs (12 steps), the cap: expected loss 1e-09" in found.reason
    assert {"measure.trace", "test.accuracy"} <= found.values.keys()


def test_a_training_that_diverges_fails_alone():
    found = run(spec(0, optimiser=OptimiserSpec(lr=1e30, batch_size=32)), spec(1))
    assert found[0].status == "failed"
    assert "the training loss is" in found[0].reason
    assert "test.accuracy" not in found[0].values
    assert found[1].status == "finished"


def test_what_does_not_apply_is_missing_with_its_reason():
    measures = (
        MeasureSpec("unseen_patterns", (("layer", 3),)),
        MeasureSpec("negative_eigenvalues"),
        MeasureSpec("trace"),
    )
    found = run(spec(0, measures=measures))[0]
    assert "2 hidden layers" in found.missing["measure.unseen_patterns"]
    assert "measure.trace" in found.values
    assert all(math.isfinite(value) for value in found.values.values())


def test_progress_rises_to_one():
    told: list[float] = []
    list(run_batch([spec(s, measures=()) for s in range(3)], told.append))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (MeasureSpec("unseen_patterns", (("layer", -1),)), "layer is -1: expected a whole number of at least 0"),
        (MeasureSpec("source_trace", (("probes", 0),)), "probes is 0: expected a whole number of at least 1"),
        (MeasureSpec("source_trace", (("probes", 2.5),)), "probes is 2.5"),
        (MeasureSpec("free_parameters", (("layer", 1),)), "unknown option 'layer' of free_parameters: it takes none"),
    ],
)
def test_options_that_a_measure_cannot_take(measure, message):
    found = wrong_options(measure)
    assert found is not None
    assert message in found[1]


def test_every_study_measure_says_what_it_is():
    for name, measure in STUDY_MEASURES.items():
        assert measure.label
        assert measure.meaning.endswith(".")
        assert wrong_options(MeasureSpec(name, tuple(measure.options.items()))) is None


def test_a_network_of_pictures_is_measured_too():
    """A convolutional network takes rows of another shape."""
    model = ModelSpec("convnet", (("channels", (3, 3)), ("hidden", 6)))
    measures = (MeasureSpec("trace", orbit=True), MeasureSpec("unseen_patterns"), MeasureSpec("pair_proxy"))
    stop = StopSpec("never", None, max_epochs=2)
    found = run(*(spec(seed, model=model, measures=measures, stop=stop) for seed in (0, 1)))
    for record in found.values():
        assert record.status == "finished"
        assert {"measure.trace", "measure.unseen_patterns", "measure.pair_proxy", "orbit.trace"} <= record.values.keys()
    assert run(spec(1, model=model, measures=measures, stop=stop))[1].values == found[1].values


def test_running_statistics_are_part_of_a_network():
    model = ModelSpec("convnet-bn", (("channels", (3, 3)), ("hidden", 6)))
    record = run(spec(0, model=model, measures=(), stop=StopSpec("never", None, max_epochs=3)))[0]
    network = build("convnet-bn", (1, 8, 8), 10, channels=(3, 3), hidden=6).eval()
    network.load_state_dict(load(record.artefacts["weights.safetensors"]))
    data = load_subset(DATA).pictures()
    with torch.no_grad():
        right = network(data.x).argmax(1) == data.y
    assert record.values["train.accuracy"] == pytest.approx(float(right.double().mean()))


def test_a_network_that_diverges_after_its_stop_criterion_is_kept_as_it_was():
    spec = RunSpec(
        "s", (), DataSpec("digits", 100, probes=0), ModelSpec("mlp", (("hidden", (8, 8)),)),
        OptimiserSpec(lr=1.0, weight_decay=1e3, batch_size=50), StopSpec("loss", 1e38, max_epochs=1, fixed_steps=60),
    )  # fmt: skip
    (record,) = run_batch([spec], lambda fraction: None)
    assert record.status == "finished"
    assert "test.accuracy" in record.values
    assert record.missing["fixed.test.accuracy"].startswith("the training loss is ")
