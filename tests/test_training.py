"""Trainings of the comparison against loops written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from flatminima import data, models
from flatminima.data import Splits, TensorSplit
from flatminima.study.methods import METHODS, parse
from flatminima.study.settings import CompareSettings
from flatminima.study.training import TrainingRecord, evaluate, train

SETTINGS = CompareSettings(steps=40, train_size=150, batch_size=32, budget="steps")
EVERY = (*METHODS, "sam+swad", "asam+ema", "bsam+lawa", "looksam+swa")


@pytest.fixture(scope="module")
def splits() -> Splits:
    return data.load("digits", train_size=150)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def run(settings: CompareSettings, method: str, splits: Splits, seed: int = 0) -> tuple[nn.Module, TrainingRecord]:
    # SAM-ON moves normalisation layers, which the perceptron does not have.
    return train(replace(settings, model="convnet-bn") if "sam-on" in method else settings, method, seed, splits)


def by_hand(
    settings: CompareSettings,
    splits: Splits,
    steps: int,
    *,
    seed: int = 0,
    sharpness_aware: bool = False,
    rate: Callable[[int], float] | None = None,
) -> list[Tensor]:
    """Weights after every step of SGD with momentum and weight decay, from the formulas, without optimiser classes."""
    model = models.build(settings.model, splits.input_shape, splits.classes, seed=seed)
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    order = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    iterates = []
    for step in range(steps):
        if not rows:
            rows = list(torch.randperm(len(splits.train), generator=order).split(settings.batch_size))
        batch = rows.pop(0)
        x, y = splits.train.x[batch], splits.train.y[batch]
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        with torch.no_grad():
            if sharpness_aware:
                norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
                here = [p.clone() for p in parameters]
                for p, g in zip(parameters, gradients, strict=True):
                    p += settings.rho * g / norm
                with torch.enable_grad():
                    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
                for p, old in zip(parameters, here, strict=True):
                    p.copy_(old)
            for p, g, v in zip(parameters, gradients, velocity, strict=True):
                v.copy_(settings.momentum * v + g + settings.weight_decay * p)
                p -= (rate(step) if rate else settings.lr) * v
        iterates.append(flat(model))
    return iterates


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_the_trajectory_is_the_written_out_loop(splits: Splits, method: str) -> None:
    model, record = run(SETTINGS, method, splits, seed=3)
    expected = by_hand(SETTINGS, splits, 40, seed=3, sharpness_aware=method == "sam")
    torch.testing.assert_close(flat(model), expected[-1], rtol=1e-4, atol=1e-5)
    assert (expected[-1] - expected[-2]).abs().max() > 1e-3  # a step more or less would be seen
    assert record.steps == 40
    assert record.swad is None
    assert record.failure is None
    assert not model.training


def test_the_two_trajectories_differ(splits: Splits) -> None:
    plain, aware = (by_hand(SETTINGS, splits, 40, sharpness_aware=s) for s in (False, True))
    assert (plain[-1] - aware[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["swad", "sam+swad"])
def test_swad_leaves_the_trajectory_alone_and_averages_it(splits: Splits, method: str) -> None:
    model, record = run(SETTINGS, method, splits)
    iterates = by_hand(SETTINGS, splits, record.steps, sharpness_aware=method == "sam+swad")
    torch.testing.assert_close(flat(model), window_mean(record, iterates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["swad", "sam+swad"])
@pytest.mark.parametrize("steps", [2, 220])
def test_swad_is_the_mean_of_the_iterates_of_its_window(splits: Splits, method: str, steps: int) -> None:
    iterates: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, torch.optim.SGD):
            iterates.append(torch.cat([p.detach().reshape(-1) for p in optimizer.param_groups[0]["params"]]).clone())

    hook = register_optimizer_step_post_hook(keep)
    try:
        model, record = run(replace(SETTINGS, steps=steps, lr=0.2), method, splits)
    finally:
        hook.remove()
    assert len(iterates) == record.steps
    torch.testing.assert_close(flat(model), window_mean(record, iterates), rtol=1e-5, atol=1e-6)
    if steps == 220:
        assert record.swad is not None
        assert record.swad["n"] > 10
        assert (flat(model) - iterates[-1]).abs().max() > 0.01  # an average, not the last iterate


def window_mean(record: TrainingRecord, iterates: list[Tensor]) -> Tensor:
    assert record.swad is not None
    window = iterates[record.swad["start_step"] : record.swad["end_step"] + 1]
    assert record.swad["n"] == len(window) >= 1
    return torch.stack(window).double().mean(0).float()


def test_swad_reads_the_validation_split_and_nothing_else_does(splits: Splits) -> None:
    settings = replace(SETTINGS, steps=200, lr=0.2)
    x = splits.validation.x
    other = replace(splits, validation=TensorSplit(x.flip(0), splits.validation.y))
    assert torch.equal(flat(run(settings, "sgd", splits)[0]), flat(run(settings, "sgd", other)[0]))
    assert not torch.equal(flat(run(settings, "swad", splits)[0]), flat(run(settings, "swad", other)[0]))


def test_the_monitored_rows_are_the_first_of_the_validation_split(splits: Splits) -> None:
    model, record = run(replace(SETTINGS, monitor_rows=10), "sgd", splits)
    few = TensorSplit(splits.validation.x[:10], splits.validation.y[:10])
    value, accuracy = evaluate(model, few, torch.device("cpu"))
    assert (record.history["validation_loss"][-1], record.history["validation_accuracy"][-1]) == (value, accuracy)
    assert record.history["validation_loss"] != run(SETTINGS, "sgd", splits)[1].history["validation_loss"]


def test_the_test_split_is_never_read(splits: Splits) -> None:
    blind = replace(splits, test=TensorSplit(torch.full_like(splits.test.x, math.nan), splits.test.y))
    settings = replace(SETTINGS, steps=12)
    for method in EVERY:
        assert torch.equal(flat(run(settings, method, splits)[0]), flat(run(settings, method, blind)[0]))


def test_the_methods_of_a_seed_share_initial_weights_and_data_order(splits: Splits) -> None:
    # A rate of 1e-30 and a radius of 0 move nothing: the training losses are those of the initial weights on the batches, in
    # order. bSAM has a rate and noise of its own.
    still = replace(SETTINGS, lr=1e-30, rho=0.0)
    methods = [method for method in EVERY if parse(method).optimizer not in ("bsam", "sam-on")]
    curves = {
        (method, seed): run(still, method, splits, seed)[1].history["train_loss"]
        for method in methods
        for seed in (0, 1)
    }
    for (method, seed), curve in curves.items():
        # The mean of four micro-batches is that of the batch up to rounding.
        assert curve == (pytest.approx(curves["sgd", seed], rel=1e-6) if method == "m-sam" else curves["sgd", seed])
        assert len(set(curve)) > 30
    assert all(a != b for a, b in zip(curves["sgd", 0], curves["sgd", 1], strict=True))
    with_layers = replace(still, model="convnet-bn")
    assert run(still, "sam-on", splits)[1].history == run(with_layers, "sgd", splits)[1].history


@pytest.mark.parametrize("budget", ["gradients", "steps"])
def test_budgets_count_the_gradients_that_are_evaluated(
    splits: Splits, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Tensor.backward
    evaluated = 0

    def counted(*arguments: Any, **keywords: Any) -> None:
        nonlocal evaluated
        evaluated += 1
        backward(*arguments, **keywords)

    monkeypatch.setattr(Tensor, "backward", counted)
    spent = {}
    for method in EVERY:
        evaluated = 0
        record = run(replace(SETTINGS, budget=budget), method, splits)[1]
        if not method.startswith(("m-sam", "bsam")):  # several passes of parts of a batch; test_steps.py counts rows
            assert record.gradient_evaluations == evaluated
        spent[method] = (record.gradient_evaluations, record.steps)
    if budget == "gradients":
        assert {method: evaluations for method, (evaluations, _) in spent.items()} == dict.fromkeys(EVERY, 40)
    else:
        assert {method: steps for method, (_, steps) in spent.items()} == dict.fromkeys(EVERY, 40)
    sharpness_aware = (40, 20) if budget == "gradients" else (80, 40)
    for method in ("sam", "sam+swad", "asam+ema", "gsam", "m-sam", "bsam", "sam-on"):
        assert spent[method] == sharpness_aware
    for method in ("sgd", "msam", "random", "swa", "ema", "lawa", "tail", "swad", "swad-released"):
        assert spent[method] == (40, 40)


@pytest.mark.parametrize("method", EVERY)
def test_every_method_learns_in_a_few_epochs(splits: Splits, method: str) -> None:
    settings = CompareSettings(epochs=12, train_size=150, batch_size=16)
    model, record = run(settings, method, splits)
    assert record.failure is None
    assert record.gradient_evaluations == 120
    start = models.build(
        "convnet-bn" if method == "sam-on" else "mlp", splits.input_shape, splits.classes, seed=0
    ).eval()
    assert evaluate(model, splits.train, torch.device("cpu"))[0] < evaluate(start, splits.train, torch.device("cpu"))[0]
    average = parse(method).average
    assert (record.swad is not None) == (average in ("swad", "swad-released"))
    assert (record.average is not None) == (average in ("swa", "ema", "lawa", "tail"))
    assert len(record.history["step"]) == len(set(record.history["step"])) >= 20
    assert record.history["step"][-1] == record.steps - 1


@pytest.mark.parametrize("method", ["ema", "swa", "lawa", "tail", "asam+ema", "msam+tail"])
def test_an_average_leaves_the_trajectory_alone(splits: Splits, method: str) -> None:
    alone, record = run(replace(SETTINGS, steps=60), parse(method).optimizer, splits)
    averaged, other = run(replace(SETTINGS, steps=60), method, splits)
    assert other.history == record.history
    assert not torch.equal(flat(averaged), flat(alone))


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_the_cosine_schedule_ends_at_zero(splits: Splits, method: str) -> None:
    settings = replace(SETTINGS, schedule="cosine")
    model, _ = run(settings, method, splits)

    def rate(step: int) -> float:
        return settings.lr * (1 + math.cos(math.pi * step / 40)) / 2

    expected = by_hand(settings, splits, 40, sharpness_aware=method == "sam", rate=rate)[-1]
    torch.testing.assert_close(flat(model), expected, rtol=1e-4, atol=1e-5)
    assert (expected - flat(run(SETTINGS, method, splits)[0])).abs().max() > 1e-3


def test_the_history_is_the_training(splits: Splits) -> None:
    settings = replace(SETTINGS, steps=130)
    _, record = run(settings, "sgd", splits)
    assert record.history["step"] == [*range(0, 130, 2), 129]
    iterates = by_hand(settings, splits, 130)
    model = models.build(settings.model, splits.input_shape, splits.classes)
    for entry in (0, 20, -1):
        nn.utils.vector_to_parameters(iterates[record.history["step"][entry]], model.parameters())
        loss, accuracy = evaluate(model, splits.validation, torch.device("cpu"))
        assert record.history["validation_loss"][entry] == pytest.approx(loss, rel=1e-3)
        assert record.history["validation_accuracy"][entry] == pytest.approx(accuracy, abs=0.01)


@pytest.mark.parametrize("method", [m for m in EVERY if parse(m).optimizer not in ("bsam", "sam-on")])
def test_divergence_ends_the_run_and_is_recorded(splits: Splits, method: str) -> None:
    _, record = run(replace(SETTINGS, lr=1e6), method, splits)
    assert record.failure is not None
    assert record.failure["step"] == record.steps - 1 < 39
    assert "loss became" in record.failure["reason"] or record.failure["reason"] == "a gradient became NaN or infinite"
    assert all(math.isfinite(v) for values in record.history.values() for v in values)


def test_a_sam_that_never_moves_has_failed(splits: Splits) -> None:
    # The loss at the clean weights stays finite; only the perturbed gradient is not.
    _, record = run(replace(SETTINGS, rho=1e30), "sam", splits)
    assert record.failure == {"step": 0, "reason": "a gradient became NaN or infinite"}


def test_evaluation_is_the_mean_over_all_rows() -> None:
    torch.manual_seed(0)
    rows = 2100  # more than two pieces
    split = TensorSplit(torch.randn(rows, 5), torch.randint(0, 3, (rows,)))
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))
    loss, accuracy = evaluate(model.train(), split, torch.device("cpu"))
    logits = model[0](split.x).detach().double()
    chosen = logits.gather(1, split.y[:, None]).squeeze(1)
    assert loss == pytest.approx(float((logits.logsumexp(1) - chosen).mean()), rel=1e-6)
    assert accuracy == float((logits.argmax(1) == split.y).double().mean())
    assert model.training


def test_training_is_repeatable_whatever_was_drawn_before(splits: Splits) -> None:
    for method, model in (("sam", "vit"), *((method, "mlp") for method in EVERY)):
        settings = replace(SETTINGS, model=model, steps=4)
        torch.manual_seed(1)
        first, record = run(settings, method, splits)
        torch.randn(7)
        second, again = run(settings, method, splits)
        assert torch.equal(flat(first), flat(second))
        assert record == again
