"""The sessions: what moves and what stays, what is known when, and that scores are those of whole networks."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fewshot_fixture import tiny, tiny_settings  # noqa: F401
from flatminima.data import ClassData
from flatminima.data.splits import IntArray, LabelledImages, PixelArray
from flatminima.protocols import fewshot_learners, fewshot_views
from flatminima.protocols.fewshot_base import BaseCell, load_network, run_base
from flatminima.protocols.fewshot_cell import Scorer, SessionCell, make_learner, run_sessions
from flatminima.protocols.fewshot_flatness import ProbeCell, run_probe
from flatminima.protocols.fewshot_learners import Learner, Metric
from flatminima.protocols.fewshot_methods import ARMS, METHODS, arm_settings
from flatminima.protocols.fewshot_network import EmbeddingNetwork
from flatminima.protocols.fewshot_prototypes import metric_logits
from flatminima.protocols.fewshot_split import FewShotSplit
from flatminima.protocols.fewshot_table import Results, flatness
from flatminima.protocols.fewshot_views import Stream, View, data_and_split

pytestmark = pytest.mark.usefixtures("tiny", "one_thread")


class Setup:
    """A trained base network and what a learner is made of."""

    def __init__(self, base: str = "plain", arm: str = "clamp", **changes: Any) -> None:
        self.experiment = tiny_settings(**changes)
        self.settings = arm_settings(self.experiment, base, arm)
        self.base, self.arm = base, arm
        result = run_base(BaseCell(self.experiment, base, 0, 2))
        self.weights, self.digest = result.files[".safetensors"], str(result.record["weights"])
        self.data: ClassData
        self.split: FewShotSplit
        self.data, self.split = data_and_split(self.experiment, 0, 2)
        self.view = View(self.settings, self.data.train, self.split.train)
        self.network: EmbeddingNetwork
        self.network, self.prototypes = load_network(self.settings, self.data, self.split, self.view, self.weights)

    def learner(self) -> Learner:
        return make_learner(
            self.settings, self.arm, self.network, self.prototypes, self.view, 0, 0, self.data, self.split
        )

    def cell(self, draw: int = 0) -> SessionCell:
        return SessionCell(self.experiment, self.base, self.arm, 0, draw, 2, self.weights, self.digest)


def state(learner: Learner) -> list[torch.Tensor]:
    head = [] if learner.head is None else [p.detach().clone() for p in learner.head.parameters()]
    return [t.detach().clone() for t in learner.network.state_dict().values()] + [learner.prototypes.clone(), *head]


@pytest.mark.parametrize("arm", ["clamp", "no-clamp"])
@pytest.mark.parametrize("relative", [False, True])
def test_only_the_region_moves_and_stays_in_the_box(arm: str, relative: bool) -> None:
    setup = Setup(arm=arm, session_lr=0.5, relative=relative, bound=0.05 if relative else 0.005)
    learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
    assert isinstance(learner, Metric)
    start = {name: tensor.clone() for name, tensor in setup.network.state_dict().items()}
    region = {id(p) for p in learner.network.region}
    names = [name for name, p in learner.network.named_parameters() if id(p) in region]
    furthest = []
    for _ in range(2):
        learner.learn(stream.advance())
        for name, tensor in learner.network.state_dict().items():
            move = (tensor.double() - start[name].double()).abs().max()
            if name in names:
                size = start[name].double().square().mean().sqrt() if relative else 1.0
                furthest.append(float(move / (setup.settings.bound * size)))
            else:
                assert move == 0, name  # BatchNorm's buffers among them
        assert torch.equal(learner.prototypes[:3], setup.prototypes)
    assert max(furthest) > 0.99
    assert (max(furthest) <= 1 + 1e-6) == (arm == "clamp")
    facts = learner.facts()
    assert (facts["clamp_hits"] is None) == (arm == "no-clamp")
    assert facts["largest_move"] == pytest.approx(furthest[-2:], rel=1e-6)
    # The prototypes of all new classes are those of the stored shots under the present network.
    rows = np.concatenate(setup.split.shots[0])
    z = learner.embed(setup.data.train, rows).view(4, 3, -1).mean(1)
    torch.testing.assert_close(learner.prototypes[3:], z, rtol=1e-5, atol=1e-6)


def test_a_session_is_the_papers_algorithm() -> None:
    """Against the algorithm written out with autograd on the whole network."""
    setup = Setup(session_augment=False, session_lr=0.02)
    learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
    twin = load_network(setup.settings, setup.data, setup.split, setup.view, setup.weights)[0]
    centre = [p.detach().clone() for p in twin.region]
    for session in range(2):
        learner.learn(stream.advance())
        rows = np.concatenate(setup.split.shots[0][: session + 1])
        y = torch.arange(3, 5 + 2 * session).repeat_interleave(3)
        sgd = torch.optim.SGD(twin.region, lr=0.02, momentum=0.9, weight_decay=5e-4)
        for _ in range(6):
            z = twin.embed(setup.view.clean(setup.data.train, rows))
            own = torch.stack([z[y == c].mean(0) for c in y.unique()])
            logits = metric_logits(z, torch.cat([setup.prototypes, own]))
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(logits, y).backward()
            sgd.step()
            with torch.no_grad():
                for w, w0 in zip(twin.region, centre, strict=True):
                    w.copy_(torch.minimum(torch.maximum(w, w0 - 0.005), w0 + 0.005))
        for ours, theirs in zip(learner.network.region, twin.region, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_replay_earlier_prototypes_stay() -> None:
    setup = Setup(arm="clamp-no-replay")
    learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
    learner.learn(stream.advance())
    before = learner.prototypes.clone()
    learner.learn(stream.advance())
    assert torch.equal(learner.prototypes[:5], before)
    assert len(learner.prototypes) == 7


def test_replay_of_all_keeps_exemplars_of_base_classes() -> None:
    plain, rehearsed = Setup(replay="novel"), Setup(replay="all")
    states = []
    for setup in (plain, rehearsed):
        learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
        learner.learn(stream.advance())
        assert torch.equal(learner.prototypes[:3], setup.prototypes)
        states.append(learner.network.region[0].detach().clone())
    assert not torch.equal(*states)


@pytest.mark.parametrize("box", [{}, {"relative": True, "bound": 0.1}])
def test_the_released_step_moves_on_a_grid(box: dict[str, Any]) -> None:
    setup = Setup(arm="clamp-released", weight_decay=0.0, momentum=0.0, session_steps=1, **box)
    learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
    learner.learn(stream.advance())
    for now, before in zip(learner.network.region, setup.network.region, strict=True):
        size = float(before.detach().double().square().mean().sqrt()) if box else 1.0
        quantum = setup.settings.bound * size / 2
        steps = (now.double() - before.double()) / quantum
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=2e-3)
        assert steps.abs().max() > 0.5


@pytest.mark.parametrize(("arm", "joint"), [*((arm, "base") for arm in ARMS), ("joint", "scratch"), ("crt", "scratch")])
def test_scores_are_those_of_the_whole_network(arm: str, joint: str) -> None:
    setup = Setup(arm=arm, joint=joint)
    record = run_sessions(setup.cell())
    assert record["failure"] is None
    counts = record["counts"]
    assert counts == [24, 16, 16]
    learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
    place = {label: index for index, label in enumerate(setup.split.order)}
    for session in range(3):
        if session:
            learner.learn(stream.advance())
        for group in range(session + 1):
            rows = setup.split.test[group]
            y = torch.tensor([place[label] for label in setup.data.test.labels[rows].tolist()])
            with torch.no_grad():
                z = learner.network.eval().embed(setup.view.clean(setup.data.test, rows))
                p = learner.prototypes
                logits = {"euclidean": metric_logits(z, p), "cosine": metric_logits(z, p, distance="cosine")}
                if learner.head is not None:
                    logits["head"] = learner.head(z)
            for name, values in logits.items():
                assert values.shape == (len(rows), 3 + 2 * session)
                # Ties in rounding may fall either way, one image at most.
                assert abs(int((values.argmax(1) == y).sum()) - record["correct"][name][session][group]) <= 1
    assert METHODS["f2m"].classifier in record["correct"]
    assert (record["drift"] is None) == (arm == "frozen")


def test_scores_of_another_split_are_not_those_of_the_one_before() -> None:
    """The same network may be tested on other images in one process: with fewer of them, or sessions of other classes."""
    setup = Setup()
    run_sessions(setup.cell())
    fewer = replace(setup.cell(), settings=replace(setup.experiment, test_images=3))
    found = run_sessions(fewer)
    Scorer._cache = ("", {})
    assert found["counts"] == [9, 6, 6]
    assert found["correct"] == run_sessions(fewer)["correct"]


def test_a_session_that_diverges_is_recorded() -> None:
    record = run_sessions(Setup(arm="no-clamp", session_lr=1e30).cell())
    assert record["failure"]["session"] >= 1
    assert "the loss of a session became" in record["failure"]["reason"]


@pytest.mark.parametrize("arm", ["no-clamp", "ft", "fsll", "icarl", "rebalance", "joint", "crt"])
def test_a_last_step_that_diverges_is_no_accuracy(arm: str) -> None:
    """The largest of NaN outputs is the first class: without a look at the weights that would count as an accuracy."""
    rates = dict.fromkeys(("session_lr", "fsll_lr", "exemplar_lr", "rebalance_lr"), 1e38)
    once = dict.fromkeys(("session_steps", "fsll_epochs", "exemplar_epochs", "joint_iterations", "rebalance_epochs"), 1)
    setup = Setup(**once, joint="scratch")
    setup.arm, setup.experiment = arm, replace(setup.experiment, **rates, lr=1e38, joint_iterations=1)
    record = run_sessions(setup.cell())
    assert record["failure"]["session"] == 1
    assert re.search("after a session|after the last step", record["failure"]["reason"])
    assert all(len(rows) == 1 for rows in record["correct"].values())


def test_a_gradient_that_is_not_a_number_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()

    def undefined(z: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return (z - z).square().sum().sqrt()  # 0, with 0 / 0 for a gradient

    monkeypatch.setattr(fewshot_learners, "session_loss", undefined)
    failure = run_sessions(setup.cell())["failure"]
    assert (failure["session"], failure["step"]) == (1, 0)
    assert "a gradient of a session" in failure["reason"]


def test_a_network_whose_loss_is_not_finite_has_no_flatness() -> None:
    setup = Setup()
    tensors = load_tensors(setup.weights)
    tensors["tail.head.bias"] = torch.full_like(tensors["tail.head.bias"], torch.inf)
    record = run_probe(ProbeCell(setup.experiment, "plain", 0, 2, save_tensors(tensors), setup.digest))
    assert record["failure"] == {
        "step": None,
        "reason": "the loss on train images is nan: there is nothing to compare with",
    }
    found = Results([record], ["baseline"], 1, 1)
    assert flatness(found) == {"rows": [], "differences": [], "traces": []}


# ------------------------------------------------------------------------------------------------------------ leakage


def test_the_stream_refuses_what_is_not_open_yet() -> None:
    setup = Setup()
    stream = Stream(setup.data, setup.split, 1)
    with pytest.raises(RuntimeError, match="test images of session 2 were asked for in session 1: that is a leak"):
        stream.test(1)
    assert np.array_equal(stream.advance().rows, setup.split.shots[1][0])
    assert stream.classes == 5
    stream.test(1)
    stream.advance()
    with pytest.raises(RuntimeError, match="there are 2 sessions after the base session, and all are open"):
        stream.advance()


@pytest.mark.parametrize("arm", ARMS)
def test_images_are_read_in_their_session_and_not_before(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(arm=arm)
    data, split = setup.data, setup.split
    opened = {"session": 0}
    test_group = {int(row): t for t, rows in enumerate(split.test) for row in rows}
    train_session = {int(row): 0 for row in (*split.train, *split.held_out)}
    train_session |= {int(row): t + 1 for t, rows in enumerate(split.shots[0]) for row in rows}

    def train(rows: IntArray) -> PixelArray:
        assert all(train_session[int(row)] <= opened["session"] for row in rows)
        return data.train.pixels(rows)

    def test(rows: IntArray) -> PixelArray:
        assert all(test_group[int(row)] <= opened["session"] for row in rows)
        return data.test.pixels(rows)

    watched = replace(data, train=LabelledImages(data.train.labels, train), test=LabelledImages(data.test.labels, test))
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: watched)
    advance = Stream.advance

    def counting(stream: Stream) -> Any:
        opened["session"] += 1
        return advance(stream)

    monkeypatch.setattr(Stream, "advance", counting)
    Scorer._cache = ("", {})
    assert run_sessions(setup.cell())["failure"] is None
    assert opened["session"] == 2


@pytest.mark.parametrize("arm", ["frozen", "clamp", "ft", "crt", "icarl"])
def test_poisoned_test_images_change_no_learner(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every test image replaced by noise, weights, prototypes and classifiers are the same to the last bit."""
    setup = Setup(arm=arm)
    found = []
    for poison in (False, True):
        data = setup.data
        if poison:
            noise = np.random.default_rng(9).integers(0, 255, (len(data.test.labels), *data.shape)).astype(np.uint8)
            data = replace(data, test=LabelledImages(data.test.labels, lambda rows, noise=noise: noise[rows]))
        monkeypatch.setattr(fewshot_views, "loaded", lambda *_, data=data: data)
        base = run_base(BaseCell(setup.experiment, "plain", 0, 2))
        assert base.record["weights"] == setup.digest
        learner, stream = setup.learner(), Stream(data, setup.split, 0)
        Scorer._cache = ("", {})
        scorer = Scorer(setup.network, setup.view, data, stream, "poison" if poison else "clean")
        states, scores = [], []
        for session in range(3):
            if session:
                learner.learn(stream.advance())
            scores.append(scorer.correct(learner, session))
            states += state(learner)
        found.append((states, scores))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] != found[1][1]


def test_later_shots_change_no_earlier_score(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()
    before = run_sessions(setup.cell())["correct"]
    later = {int(row) for row in setup.split.shots[0][1]}
    data = setup.data

    def train(rows: IntArray) -> PixelArray:
        pixels = data.train.pixels(rows).copy()
        pixels[[int(row) in later for row in rows]] = 0
        return pixels

    poisoned = replace(data, train=LabelledImages(data.train.labels, train))
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: poisoned)
    after = run_sessions(setup.cell())["correct"]
    assert {name: rows[:2] for name, rows in after.items()} == {name: rows[:2] for name, rows in before.items()}
    assert after != before


# ----------------------------------------------------------------------------------------------------------- flatness


def test_the_probe_of_a_base_network() -> None:
    setup = Setup(base="flat")
    record = run_probe(ProbeCell(setup.experiment, "flat", 0, 2, setup.weights, setup.digest))
    for part in record["parts"].values():
        assert part["worst"] >= part["largest"] >= part["loss"]
        assert part["indicator"] == pytest.approx(part["variance"] + part["mean_rise"] ** 2, rel=1e-6)
        assert part["worst_drift"] > part["drift"] > 0
    assert record["trace"]["method"] == "exact"
    assert len(record["half_over_rms"]) == len(record["region"]) == 2
    again = run_probe(ProbeCell(setup.experiment, "flat", 0, 2, setup.weights, setup.digest))
    assert again | {"seconds": 0} == record | {"seconds": 0}
