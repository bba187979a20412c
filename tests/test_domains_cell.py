from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from domains_fixture import NAMES, tiny, tiny_domains, tiny_settings  # noqa: F401
from flatminima.data import DataError, MultiDomain
from flatminima.data.domain_splits import DomainSampler, seed_hash
from flatminima.data.formats import in_memory
from flatminima.protocols import domains_cell, domains_views
from flatminima.protocols.domains import cells
from flatminima.protocols.domains_cell import Cell, build, new_history, run_cell, train
from flatminima.protocols.domains_readers import Evaluation, Reader, make_readers
from flatminima.protocols.domains_views import View, divided, score, training_batches, without
from flatminima.study.settings import SettingsError

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(Reader):
    """Keeps everything, to be averaged by hand."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.iterates, self.evaluations = model, [], []  # type: ignore[var-annotated]

    def after_step(self) -> None:
        self.iterates.append(torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().double().clone())

    def after_evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)

    def swapped(self) -> Any:
        raise NotImplementedError


def followed(algorithm: str = "erm", seed: int = 0, **changes: object) -> tuple[Recorder, dict[str, Reader], Any]:
    """One training on the tiny data with all readers and a recorder."""
    settings = tiny_settings(**changes)
    data = domains_views.domain_data(settings)
    sources, target = without(divided(data, 0.2, seed), "middle")
    view = View(settings, data.natural)
    model = build(settings, view, data.shape, 3, seed)
    recorder = Recorder(model)
    readers = make_readers(settings, model, lambda: score(model, target.images, target.held_out, view)[1])
    history, corners = new_history(sources), []  # type: ignore[var-annotated]
    train(
        model,
        sources,
        settings,
        algorithm,
        seed,
        view,
        {"recorder": recorder, **readers},
        history,
        corners,
        lambda f: None,
    )
    return recorder, readers, (model, sources, target, view, settings, history, corners)


def weights(reader: Reader, model: torch.nn.Module) -> torch.Tensor:
    with reader.swapped():
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach().double().clone()


@pytest.mark.usefixtures("tiny")
def test_every_method_is_read_off_one_trajectory() -> None:
    recorder, readers, (model, sources, _, view, settings, history, corners) = followed(tolerance=0.05, lr=1e-2)
    iterates = torch.stack(recorder.iterates)
    assert len(iterates) == 41
    assert [e.step for e in recorder.evaluations] == list(range(0, 41, 4)) == history["step"]
    before = iterates[-1]

    def close(name: str, expected: torch.Tensor) -> None:
        assert torch.allclose(weights(readers[name], model), expected, atol=2e-6), name
        assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()).detach().double(), before), name

    close("last", iterates[-1])
    close("tail", iterates[32:].mean(0))
    close("swa", iterates[32::4].mean(0))
    decayed = 0.99 ** torch.arange(40, -1, -1, dtype=torch.float64)
    close("ema", (decayed[:, None] * iterates).sum(0) / decayed.sum())
    accuracies = [np.mean(e.accuracies) for e in recorder.evaluations]
    close("selected", iterates[4 * int(np.argmax(accuracies))])
    losses = [np.mean(e.losses) for e in recorder.evaluations]
    close("lowest", iterates[4 * int(np.argmin(losses))])
    swad = readers["swad"].facts()
    assert swad["converged"]
    close("swad", iterates[swad["start_step"] : swad["end_step"] + 1].mean(0))
    at = swad["start_step"] // 4
    assert swad["threshold"] == pytest.approx(1.05 * np.mean(losses[at : at + 3]))
    assert swad["final_ratio"] == pytest.approx(losses[-1] / losses[at])
    later = [loss for loss, step in zip(losses, history["step"], strict=True) if step > swad["detected_at"]]
    assert swad["highest_ratio"] == pytest.approx(max(later) / swad["threshold"])
    assert [readers[name].facts()["evaluations"] for name in ("swad", "swad-2f", "swad-4f")] == [11, 6, 3]
    assert [torch.equal(c.double(), iterates[k]) for c, k in zip(corners, (20, 28, 36), strict=True)] == [True] * 3
    # What the readers were told is what the model scored on the held-out rows, domains weighted equally.
    assert np.array(history["validation_loss"])[-1] == pytest.approx(
        [score(model, s.images, s.held_out, view)[0] for s in sources], rel=1e-6
    )
    assert settings.run_steps == 41


@pytest.mark.usefixtures("tiny")
def test_a_valley_that_ends_does_not_end_the_training() -> None:
    """A rising loss, given by hand: the rule stops and the other readers go on."""
    settings = tiny_settings()
    model = torch.nn.Linear(2, 1)
    readers = make_readers(settings, model, None)
    losses = [2.0, 1.0, 1.1, 1.2, *[9.0] * 7]
    for step in range(41):
        torch.nn.init.constant_(model.weight, step)
        for reader in readers.values():
            reader.after_step()
        if step % 4 == 0:
            for reader in readers.values():
                reader.after_evaluation(Evaluation(step, (losses[step // 4],), (0.5,)))
    facts = readers["swad"].facts()
    assert (facts["start_step"], facts["end_step"], facts["stopped_at"]) == (4, 12, 36)
    assert facts["highest_ratio"] == pytest.approx(9.0 / (1.3 * 1.1))
    assert facts["final_ratio"] == pytest.approx(9.0)
    with readers["swad"].swapped():
        assert model.weight[0, 0].item() == pytest.approx(8.0)
    with readers["tail"].swapped():
        assert model.weight[0, 0].item() == pytest.approx(36.0)
    assert readers["selected"].facts() == {"step": 0}  # the earliest of equals
    assert "oracle" not in readers
    assert readers["swad-released"].facts()["votes"]


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """All of a record that must not know the target."""
    kept = {
        name: value for name, value in record.items() if name not in ("seconds", "oracle_curve", "flatness", "plane")
    }
    kept["methods"] = {
        reader: {name: value for name, value in found.items() if not name.startswith("target_")}
        for reader, found in record["methods"].items()
        if reader != "oracle"
    }
    kept["flatness"] = {reader: found["source"] for reader, found in record["flatness"].items()}
    kept["plane"] = None if record["plane"] is None else record["plane"]["source"]
    return kept


@pytest.mark.parametrize("algorithm", ["erm", "sam", "coral", "mixup"])
def test_a_poisoned_target_changes_no_training_no_validation_and_no_selection(
    monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    cell = Cell(tiny_settings(steps=16), algorithm, "middle", 1)
    records = []
    for flip in (None, "middle"):
        data = tiny_domains(flip=flip)
        monkeypatch.setattr(domains_cell, "domain_data", lambda settings, data=data: data)
        records.append(run_cell(cell))
    clean, poisoned = records
    assert comparable(clean) == comparable(poisoned)
    assert clean["methods"]["last"]["target_accuracy"] != poisoned["methods"]["last"]["target_accuracy"]
    assert clean["methods"]["last"]["weights"] == poisoned["methods"]["last"]["weights"]
    # The test can fail: poison in a source is seen everywhere.
    monkeypatch.setattr(domains_cell, "domain_data", lambda settings: tiny_domains(flip="left"))
    assert comparable(run_cell(cell))["history"] != comparable(clean)["history"]
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean


@pytest.mark.usefixtures("tiny")
def test_runs_of_a_cell_are_paired_and_repeat_to_the_bit() -> None:
    settings = tiny_settings(steps=8)
    first = run_cell(Cell(settings, "erm", "right", 0))
    again = run_cell(Cell(settings, "erm", "right", 0))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    other = run_cell(Cell(settings, "mixup", "right", 0))
    assert first["fingerprint"] == other["fingerprint"]
    assert first["history"]["train_loss"] != other["history"]["train_loss"]
    assert run_cell(Cell(settings, "erm", "right", 1))["fingerprint"] != first["fingerprint"]
    data = domains_views.domain_data(settings)
    sources, _ = without(divided(data, 0.2, 0), "right")
    view = View(settings, False)
    a, b = (next(training_batches(sources, settings, view, 0)) for _ in range(2))
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))
    for source, (x, y) in zip(sources, a, strict=True):  # every domain from its own stream
        rows = next(DomainSampler(source.kept, 6, seed=seed_hash("training", 0), domain=source.index))
        assert torch.equal(x, view(source.images, rows))
        assert torch.equal(y, view.labels(source.images, rows))
    fewer, _ = without(divided(data, 0.2, 0), "left")
    shared = next(training_batches(fewer, settings, view, 0))[0]
    assert torch.equal(shared[1], a[1][1])  # the domain "middle" is drawn alike whoever the target is


@pytest.mark.usefixtures("tiny")
def test_a_fixed_seed_changes_the_split_alone() -> None:
    settings = tiny_settings(steps=4, fixed_seed=True)
    data = domains_views.domain_data(settings)
    view = View(settings, False)
    models = [build(settings, view, data.shape, 3, 0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    records = [run_cell(Cell(settings, "erm", "left", seed)) for seed in (0, 1)]
    assert records[0]["fingerprint"] != records[1]["fingerprint"]


@pytest.mark.usefixtures("tiny")
def test_a_divergence_is_a_record_and_not_a_crash() -> None:
    record = run_cell(Cell(tiny_settings(lr=1e30), "erm", "left", 0))
    assert record["failure"]["reason"].startswith(("the training loss became", "the validation loss became"))
    assert record["methods"] == {}
    json.dumps(record, allow_nan=False)


@pytest.mark.usefixtures("tiny")
def test_batchnorm_is_re_estimated_for_averages_and_left_alone_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    batchnorm = {"model": "convnet", "model_options": {"channels": (4, 8), "norm": "batch"}, "plane": 0, "pairs": 0}
    calls: list[int] = []
    estimate = domains_cell.reestimate_batchnorm
    monkeypatch.setattr(domains_cell, "reestimate_batchnorm", lambda *args: calls.append(estimate(*args)))
    record = run_cell(Cell(tiny_settings(steps=12, **batchnorm), "erm", "middle", 0))
    assert record["failure"] is None
    assert calls == [8] * 7  # SWA, tail, EMA and four of SWAD; 96 images, 12 a batch
    assert math.isfinite(record["methods"]["swad"]["validation_loss"])
    calls.clear()
    monkeypatch.setattr(domains_cell, "_BATCHNORM_BATCHES", 3)
    run_cell(Cell(tiny_settings(steps=4, **batchnorm), "erm", "middle", 0))
    assert calls == [3] * 7
    calls.clear()
    run_cell(Cell(tiny_settings(steps=4), "erm", "middle", 0))
    assert calls == [0] * 7  # GroupNorm: nothing is drawn


def test_the_view_augments_in_training_only_and_validation_where_told(tiny: MultiDomain) -> None:  # noqa: F811
    settings = tiny_settings()
    images = tiny.domains["left"]
    rows = np.arange(5)
    plain = View(settings, False)(images, rows)
    pooled = images.pixels(rows).reshape(5, 1, 14, 2, 14, 2).mean((3, 5)) / 255
    assert np.allclose(plain.numpy(), pooled, atol=1e-6)
    natural = in_memory(np.repeat(images.pixels(np.arange(60)), 3, axis=1), images.labels)
    view = View(tiny_settings(pool=1, augment=True), True)
    still, moved = view(natural, rows), view(natural, rows, torch.Generator().manual_seed(0))
    assert not torch.equal(still, moved)
    assert torch.equal(still, view(natural, rows))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 784, 3))
    loss, accuracy = score(model, natural, np.arange(60), view)
    logits = model(view(natural, np.arange(60))).double()
    labels = torch.from_numpy(natural.labels)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.usefixtures("tiny")
def test_validation_sees_the_same_crops_at_every_evaluation_where_it_is_augmented() -> None:
    data = tiny_domains()
    tripled = {
        name: in_memory(np.repeat(images.pixels(np.arange(60)), 3, axis=1), images.labels)
        for name, images in data.domains.items()
    }
    settings = tiny_settings(pool=1, augment=True, augment_validation=True, model="mlp", model_options={"hidden": ()})
    found = replace(data, domains=tripled, shape=(3, 28, 28), natural=True)
    sources, _ = without(divided(found, 0.2, 0), "left")
    view = View(settings, True)
    model = build(settings, view, found.shape, 3, 0)
    first, second = (domains_cell._evaluate(model, sources, view, step, settings) for step in (0, 4))
    assert first.losses == second.losses
    plain = domains_cell._evaluate(model, sources, view, 0, replace(settings, augment_validation=False))
    assert first.losses != plain.losses


@pytest.mark.usefixtures("tiny")
def test_the_plan_is_checked_before_anything_is_trained() -> None:
    settings = tiny_settings()
    plan = cells(settings, seeds=2, algorithms=("erm", "sam"), draws=2)
    assert list(plan)[:3] == ["erm-left-seed0", "erm-middle-seed0", "erm-right-seed0"]
    assert len(plan) == 2 * 2 * 2 * 3
    assert "sam-right-seed1-draw1" in plan
    assert [c.target for c in cells(settings, ["right"], seeds=1, algorithms=("erm",)).values()] == ["right"]
    for arguments, error, message in (
        ({"targets": ["rigth"]}, DataError, "unknown target domain 'rigth': expected one of right"),
        ({"targets": []}, SettingsError, "--targets must name at least one domain"),
        ({"targets": ["left", "left"]}, SettingsError, "none twice, got left, left"),
        ({"seeds": 0}, SettingsError, "--seeds must be at least 1, got 0"),
        ({"draws": 0}, SettingsError, "--draws must be at least 1"),
        ({"algorithms": ("erm", "corl")}, SettingsError, "unknown algorithm 'corl': expected one of coral"),
        ({"algorithms": ()}, SettingsError, "--algorithms must name at least one"),
    ):
        with pytest.raises(error, match=message):
            cells(settings, **arguments)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="coral needs the features"):
        cells(tiny_settings(model="vit", model_options={}), algorithms=("coral",))
    assert NAMES == ("left", "middle", "right")
