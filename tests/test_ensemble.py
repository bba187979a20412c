"""Ensembles: training one by one is the truth, and every member must have its bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flatminima.models import build
from flatminima.study import ensemble
from flatminima.study.course import Course, Trained, Training, learning_rate
from flatminima.study.dense_step import dense_gradients, dense_layers, dense_outputs
from flatminima.study.ensemble import train_alone, train_together, turns
from flatminima.study.run_spec import OptimiserSpec, StopSpec
from flatminima.study.together import gradients_alone, member, same_bits, stacked_gradients

ACCURATE = StopSpec("accuracy", 0.8, check_every=3, max_epochs=60)


def rows(seed: int = 0, n: int = 70, pixels: int = 20, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, pixels, generator=generator)
    return x, (x[:, :classes]).argmax(1)


def trainings(
    count: int, hidden: tuple[int, ...] = (16, 8), stop: StopSpec = ACCURATE, **options: float
) -> list[Training]:
    x, y = rows()
    optimiser = dataclasses.replace(OptimiserSpec(lr=0.5, batch_size=32), **options)
    return [
        Training(build("mlp", (20,), 4, seed=seed, hidden=hidden), x, y, optimiser, stop, seed) for seed in range(count)
    ]


def plain_loop(training: Training) -> tuple[dict[str, torch.Tensor], int]:
    """The loop that a user would write, with nothing of the library in it."""
    model = build("mlp", (20,), 4, hidden=(16, 8))
    model.load_state_dict(training.model.state_dict())
    o, stop = training.optimiser, training.stop
    optimiser = torch.optim.SGD(model.parameters(), lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    generator = torch.Generator().manual_seed(training.order_seed)
    for epoch in range(1, stop.max_epochs + 1):
        for batch in torch.randperm(len(training.y), generator=generator).split(o.batch_size):
            optimiser.zero_grad()
            F.cross_entropy(model(training.x[batch]), training.y[batch]).backward()
            optimiser.step()
        if epoch % stop.check_every == 0:
            with torch.no_grad():
                right = (model(training.x).argmax(1) == training.y).double().mean()
            if float(right) >= 0.8:
                break
    return dict(model.named_parameters()), epoch


def equal(a: Trained, b: Trained) -> bool:
    pairs = [(a.stopped, b.stopped)] + ([(a.fixed, b.fixed)] if a.fixed and b.fixed else [])
    same = (a.met, a.failure, a.fixed is None) == (b.met, b.failure, b.fixed is None)
    return same and all(
        (p.epochs, p.steps, p.loss, p.accuracy) == (q.epochs, q.steps, q.loss, q.accuracy)
        and all(torch.equal(p.weights[name], q.weights[name]) for name in p.weights)
        for p, q in pairs
    )


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "lr": 0.1}, {"weight_decay": 0.001}])
def test_alone_is_the_loop_that_a_user_would_write(one_thread, options):
    for training in trainings(3, **options):
        found, (weights, epochs) = train_alone(training), plain_loop(training)
        assert found.stopped.epochs == epochs
        assert all(torch.equal(found.stopped.weights[name], p) for name, p in weights.items())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "lr": 0.1}, {"weight_decay": 0.001}])
@pytest.mark.parametrize("numbers", [1_000_000, 2_000])
def test_every_member_has_the_bits_of_a_training_of_its_own(monkeypatch, options, numbers):
    monkeypatch.setattr(ensemble, "DENSE_NUMBERS", numbers)
    some = trainings(7, **options)
    together = train_together(some)
    assert len({found.stopped.epochs for found in together}) > 1, "members should leave at different times"
    assert all(equal(found, train_alone(training)) for found, training in zip(together, some, strict=True))


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_bits_do_not_depend_on_who_else_is_in_the_ensemble(data):
    some = trainings(6, stop=StopSpec("accuracy", 0.6, check_every=3, max_epochs=12))
    truth = [train_alone(training) for training in some]
    chosen = data.draw(st.permutations(range(6)))[: data.draw(st.integers(1, 6))]
    found = train_together([some[i] for i in chosen])
    assert all(equal(one, truth[i]) for one, i in zip(found, chosen, strict=True))


def test_members_have_their_own_rows_rates_schedules_and_stop_criteria():
    first, second, third, fourth = trainings(4)
    x, y = rows(seed=9)
    some = [
        first,
        dataclasses.replace(second, x=x, y=y, stop=StopSpec("loss", 0.2, max_epochs=60)),
        dataclasses.replace(
            third, optimiser=OptimiserSpec(lr=0.4, batch_size=32, schedule="step", drops=(0.5,)),
            stop=StopSpec("never", None, max_epochs=6),
        ),
        dataclasses.replace(
            fourth, optimiser=OptimiserSpec(lr=0.4, batch_size=32, momentum=0.5, weight_decay=0.01),
            stop=StopSpec("accuracy", 1.0, max_epochs=50, max_steps=20, fixed_steps=31),
        ),
    ]  # fmt: skip
    together = train_together(some)
    assert all(equal(found, train_alone(training)) for found, training in zip(together, some, strict=True))
    assert together[2].met
    assert together[2].stopped.steps == 6 * 3
    assert (together[3].stopped.steps, together[3].fixed.steps) == (20, 31)
    assert not together[3].met


@pytest.mark.parametrize(
    "model",
    [
        lambda seed: build("convnet", (1, 8, 8), 3, seed=seed, channels=(4, 4), hidden=8),
        lambda seed: build("convnet-bn", (1, 8, 8), 3, seed=seed, channels=(4, 4), hidden=8),
        lambda seed: build("vit", (1, 8, 8), 3, seed=seed, patch=4, dim=8, depth=1, heads=2),
        lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)),
    ],
    ids=["convnet", "batch norm", "transformer", "tanh", "no bias"],
)
def test_any_network_has_its_bits_whether_it_can_be_stacked_or_not(model):
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 3
    some = [
        Training(model(seed), x, y, OptimiserSpec(batch_size=20), StopSpec("never", None, max_epochs=2), seed)
        for seed in range(3)
    ]
    found = train_together(some)
    assert all(equal(one, train_alone(training)) for one, training in zip(found, some, strict=True))


@pytest.mark.parametrize("batch", [69, 35])
def test_batches_of_few_rows_are_made_member_by_member(batch):
    """Of 70 rows, a batch size of 69 leaves one: products of one row take another path through the BLAS."""
    some = trainings(4, batch_size=batch)
    assert all(equal(one, train_alone(t)) for one, t in zip(train_together(some), some, strict=True))


def test_bits_do_not_depend_on_the_threads_of_the_process():
    """Two threads share some products otherwise than one; trainings have one, and give the process its own back."""
    x, y = rows(pixels=64, classes=10, n=120)
    some = [
        Training(
            build("mlp", (64,), 10, seed=seed, hidden=(12, 6)),
            x,
            y,
            OptimiserSpec(lr=0.2),
            StopSpec("never", None, max_epochs=20),
            seed,
        )
        for seed in range(3)
    ]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [train_together(some), [train_alone(training) for training in some]]
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


def test_a_stack_that_rounds_otherwise_is_not_used(monkeypatch):
    """What the trial is for: were the batched products of this machine other ones, members would be trained by themselves."""
    used = []

    def inexact(*given):
        used.append(1)
        return {name: g * (1 + 1e-6) for name, g in dense_gradients(*given).items()}

    monkeypatch.setattr(ensemble, "dense_gradients", inexact)
    some = trainings(4)
    assert all(equal(one, train_alone(t)) for one, t in zip(train_together(some), some, strict=True))
    assert len(used) == 1, "one trial, of batches of 32; six rows are few anyway"


def test_outputs_are_tried_again_for_more_members_than_before(monkeypatch):
    """The first to be looked at may be one network alone, and one is no stack: its address is that of a tensor of its own."""

    def inexact(*given):
        found = dense_outputs(*given)
        return found * torch.tensor([1.0] + [1 + 1e-6] * (len(found) - 1)).view(-1, 1, 1)

    monkeypatch.setattr(ensemble, "dense_outputs", inexact)
    first, *others = trainings(4)
    some = [dataclasses.replace(first, stop=dataclasses.replace(ACCURATE, fixed_steps=1)), *others]
    assert all(equal(one, train_alone(t)) for one, t in zip(train_together(some), some, strict=True))


def test_a_trial_sees_what_dead_units_hide():
    model = build("mlp", (20,), 4, seed=0, hidden=(16, 8))
    stack = {name: torch.zeros(2, *p.shape) for name, p in model.named_parameters()}
    x, y = (torch.stack([part[:32]] * 2) for part in rows())
    layers = dense_layers(model)

    def inexact(stack, x):
        found = dense_gradients(layers, stack, x, y)
        return found | {"3.weight": found["3.weight"] * (1 + 1e-6)}  # nothing, where nothing comes through

    assert same_bits(model, stack, x, y, lambda stack, x: dense_gradients(layers, stack, x, y))
    assert not same_bits(model, stack, x, y, inexact)


@pytest.mark.parametrize(("hidden", "trials"), [((16, 8), 2), ((5, 3), 101)])
def test_members_at_odd_addresses_are_tried_more_often(hidden, trials):
    """Products of matrices that begin between multiples of 64 bytes may have other bits in one step of ten."""
    model = build("mlp", (32,), 4, seed=0, hidden=hidden)
    stack = {name: torch.zeros(5, *p.shape) for name, p in model.named_parameters()}
    x, y = (torch.stack([part[:32]] * 5) for part in rows(pixels=32))
    tried = []

    def exact(stack, x):
        tried.append(1)
        single = [gradients_alone(model, {n: p[i].clone() for n, p in stack.items()}, x[i], y[i]) for i in range(5)]
        return {name: torch.stack([g[name] for g in single]) for name in stack}

    assert same_bits(model, stack, x, y, exact)
    assert len(tried) == trials


@pytest.mark.parametrize("hidden", [(), (5,), (16, 8), (8, 8, 8)])
def test_written_out_gradients_are_autograds(hidden):
    models = [build("mlp", (20,), 4, seed=seed, hidden=hidden).double() for seed in range(3)]
    stack = {
        name: torch.stack([dict(m.named_parameters())[name].detach() for m in models])
        for name, _ in models[0].named_parameters()
    }
    x, y = rows(n=90)
    x, y = x.double().view(3, 30, 20), y.view(3, 30)
    layers = dense_layers(models[0])
    assert layers is not None
    for found in (dense_gradients(layers, stack, x, y), stacked_gradients(models[0], stack, x, y)):
        for at in range(3):
            for name, alone in gradients_alone(models[0], member(stack, at), x[at], y[at]).items():
                torch.testing.assert_close(found[name][at], alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 2),
        nn.Sequential(nn.Linear(4, 3), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)),
        nn.Sequential(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_only_perceptrons_are_written_out(model):
    assert dense_layers(model) is None


def test_a_hook_is_not_passed_over():
    model = build("mlp", (4,), 2, hidden=(3,))
    model[1].register_forward_hook(lambda *given: None)
    assert dense_layers(model) is None


def test_a_loss_that_is_not_finite_fails_that_member_alone():
    some = trainings(3)
    some[1] = dataclasses.replace(some[1], optimiser=OptimiserSpec(lr=1e30, batch_size=32))
    found = train_together(some)
    assert "nan at epoch 3" in found[1].failure or "inf at epoch 3" in found[1].failure
    assert not found[1].met
    assert equal(found[0], train_alone(some[0]))
    assert equal(found[2], train_alone(some[2]))


def test_what_diverges_after_its_stop_criterion_keeps_the_network_of_then():
    stop, growing = (
        StopSpec("loss", 1e38, max_epochs=1, fixed_steps=60),
        OptimiserSpec(lr=1.0, weight_decay=1e3, batch_size=32),
    )
    some = [dataclasses.replace(t, optimiser=growing) for t in trainings(2, stop=stop)]
    for found in (*train_together(some), train_alone(some[0])):
        assert (found.met, found.failure, found.fixed) == (True, "", None)
        assert found.diverged.startswith("the training loss is ")
        assert found.stopped.epochs == 1


def test_a_missed_criterion_is_told_from_a_met_one():
    found = train_alone(trainings(1, stop=StopSpec("loss", 1e-9, max_epochs=2))[0])
    assert not found.met
    assert not found.failure
    assert found.stopped.epochs == 2


def test_the_given_model_and_the_global_random_state_are_left_alone():
    some = trainings(2)
    before = [{name: p.clone() for name, p in t.model.state_dict().items()} for t in some]
    state = torch.get_rng_state()
    train_together(some)
    train_alone(some[0])
    assert torch.equal(torch.get_rng_state(), state)
    for training, weights in zip(some, before, strict=True):
        assert all(torch.equal(p, weights[name]) for name, p in training.model.state_dict().items())


def test_the_criterion_looks_at_the_rows_it_is_told_to():
    training = trainings(1, stop=StopSpec("accuracy", 1.0, max_epochs=300, rows=10), momentum=0.9, lr=0.1)[0]
    found = train_alone(training)
    logits = torch.func.functional_call(training.model, found.stopped.weights, (training.x,))
    assert bool((logits.argmax(1) == training.y)[:10].all())
    assert found.stopped.accuracy < 1.0


def test_rates():
    assert [learning_rate(OptimiserSpec(lr=1.0, schedule="cosine"), epoch, 4) for epoch in (0, 2, 4)] == pytest.approx(
        [1, 0.5, 0]
    )
    twice = OptimiserSpec(lr=1.0, schedule="step", drops=(0.5, 0.8), drop_factor=0.1)
    assert [learning_rate(twice, epoch, 600) for epoch in (299, 300, 479, 480)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_progress_rises_to_one():
    told: list[float] = []
    train_together(trainings(5), told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert all(0 < fraction <= 1 for fraction in told)


def test_turns_are_of_equal_length(monkeypatch):
    monkeypatch.setattr(ensemble, "DENSE_NUMBERS", 4 * 32 * 20)
    assert [len(turn) for turn in turns(trainings(10))] == [4, 4, 2]
    assert [len(turn) for turn in turns(trainings(3))] == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dataclasses.replace(t, optimiser=OptimiserSpec(batch_size=16)), "batch size 16, network 0 32"),
        (lambda t: dataclasses.replace(t, x=t.x[:50], y=t.y[:50]), "rows 50, network 0 70"),
        (lambda t: dataclasses.replace(t, y=t.y[:50]), "70 rows and 50 labels"),
        (lambda t: dataclasses.replace(t, x=t.x[:0], y=t.y[:0]), "0 rows"),
        (lambda t: dataclasses.replace(t, model=build("mlp", (20,), 4, hidden=(9,))), "architecture"),
        (lambda t: dataclasses.replace(t, optimiser=OptimiserSpec(name="adam")), "'adam': expected 'sgd'"),
    ],
)
def test_members_that_do_not_fit_are_refused(change, message):
    some = trainings(2)
    with pytest.raises(ValueError, match="network 1") as caught:
        train_together([some[0], change(some[1])])
    assert message in str(caught.value)


def test_no_member_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        train_together([])


def test_a_course_is_over_when_both_criteria_are():
    course = Course(trainings(1, stop=StopSpec("never", None, max_epochs=1, fixed_steps=5))[0])
    logits = torch.zeros(70, 4)
    course.order()
    looks = [course.stepped(last) for last in (False, False, True)]
    assert looks == [False, False, True]
    course.look(logits, {})
    assert not course.over
    course.order()
    assert [course.stepped(last) for last in (False, False)] == [False, True]
    course.look(logits, {})
    assert course.over
    assert (course.result().stopped.steps, course.result().fixed.steps) == (3, 5)
