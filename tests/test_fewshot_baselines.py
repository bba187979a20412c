"""The methods F2M is compared with, against their definitions written out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewshot_fixture import tiny  # noqa: F401
from flatminima.protocols.fewshot_exemplars import Icarl, Rebalance, herding
from flatminima.protocols.fewshot_fsll import Fsll, triplet_loss
from flatminima.protocols.fewshot_joint import Joint, Retrained
from flatminima.protocols.fewshot_learners import FineTune, classifier
from flatminima.protocols.fewshot_views import Stream
from flatminima.study.settings import SettingsError
from test_fewshot_sessions import Setup

pytestmark = pytest.mark.usefixtures("tiny", "one_thread")


def test_herding_is_the_greedy_choice() -> None:
    z = torch.rand(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = F.normalize(z, dim=1)
    chosen: list[int] = []
    for k in range(1, 5):
        distances = {
            i: float((unit.mean(0) - unit[[*chosen, i]].sum(0) / k).norm()) for i in range(9) if i not in chosen
        }
        chosen.append(min(distances, key=lambda i: distances[i]))
    assert herding(z, 4) == chosen
    assert sorted(herding(z, 99)) == list(range(9))


def test_triplets_by_brute_force() -> None:
    z = torch.rand(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
    terms = [
        max(float((z[a] - z[p]).square().sum() - (z[a] - z[n]).square().sum()), 0.0)
        for a in range(8) for p in range(8) for n in range(8)
        if a != p and y[a] == y[p] and y[a] != y[n]
    ]  # fmt: skip
    assert triplet_loss(z, y).item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert triplet_loss(z[:2], y[:2]).item() == 0.0


def test_a_wider_classifier_keeps_the_old_outputs() -> None:
    old = nn.Linear(4, 3)
    stream = torch.Generator().manual_seed(0)
    new = classifier(old, 5, stream)
    x = torch.randn(2, 4)
    torch.testing.assert_close(new(x)[:, :3], old(x))
    assert new.weight[3:].abs().max() <= 0.5
    fresh = classifier(old, 5, torch.Generator().manual_seed(0), keep=False)
    assert torch.equal(fresh.weight[3:], new.weight[3:])
    assert not torch.equal(fresh.weight[:3], old.weight)


def test_fine_tuning_is_softmax_on_all_parameters_and_the_shots_so_far() -> None:
    setup = Setup(arm="ft", session_augment=False)
    learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
    assert isinstance(learner, FineTune)
    twin = copy.deepcopy(learner.network)
    shots = stream.advance()
    learner.learn(shots)
    twin.tail.head = classifier(twin.tail.head, 5, copy.deepcopy(setup.learner()._stream))  # type: ignore[attr-defined]
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(6):
        sgd.zero_grad()
        outputs = twin.eval()(setup.view.clean(setup.data.train, shots.rows))[1]
        F.cross_entropy(outputs, torch.from_numpy(shots.classes)).backward()
        sgd.step()
    for ours, theirs in zip(learner.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert torch.equal(learner.prototypes[:3], setup.prototypes)


def test_the_loss_of_icarl() -> None:
    setup = Setup(arm="icarl")
    learner = setup.learner()
    assert isinstance(learner, Icarl)
    rows, numbers = learner._rows[0], learner._classes[0]
    assert numbers.tolist() == [0, 0, 1, 1, 2, 2]
    assert [setup.split.base.index(label) for label in setup.data.train.labels[rows].tolist()] == numbers.tolist()
    shots = Stream(setup.data, setup.split, 0).advance()
    learner._old = copy.deepcopy(learner.network)
    learner.begin(shots, 5)
    x, y = setup.view.clean(setup.data.train, shots.rows), torch.from_numpy(shots.classes)
    outputs = learner.network(x)[1].double()
    target = F.one_hot(y, 5).double()
    target[:, :3] = learner._old(x)[1].double().sigmoid()
    expected = -(target * outputs.sigmoid().log() + (1 - target) * (1 - outputs.sigmoid()).log()).sum(1).mean()
    assert learner.loss(x, y, 3, 5).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_rebalance() -> None:
    setup = Setup(arm="rebalance", margin_classes=1)
    learner = setup.learner()
    assert isinstance(learner, Rebalance)
    shots = Stream(setup.data, setup.split, 0).advance()
    learner.begin(shots, 5)
    own = F.normalize(learner.embed(setup.data.train, shots.rows), dim=1).view(2, 3, -1).mean(1)
    torch.testing.assert_close(F.normalize(learner._cosine.weight[3:], dim=1), F.normalize(own, dim=1))
    torch.testing.assert_close(F.normalize(learner._cosine.weight[:3], dim=1), F.normalize(setup.prototypes, dim=1))
    rows = np.concatenate([learner._rows[0][:2], shots.rows])
    y = torch.tensor([0, 0, 3, 3, 3, 4, 4, 4])
    learner._old = copy.deepcopy(learner.network)
    with torch.no_grad():
        for p in learner.network.region:
            p.mul_(1.1)  # so that embeddings turn
    x = setup.view.clean(setup.data.train, rows)
    z, before = learner.network.embed(x).double(), learner._old.embed(x).double()
    cosines = F.normalize(z, dim=1) @ F.normalize(learner._cosine.weight.double(), dim=1).T
    expected = F.cross_entropy(10.0 * cosines, y)
    expected = expected + 4.0 * (3 / 2) ** 0.5 * (1 - F.cosine_similarity(z, before)).mean()
    for row in range(2):
        expected = expected + max(0.5 - cosines[row, 0] + cosines[row, 3:].max(), torch.tensor(0.0)) / 2
    assert learner.loss(x, y, 3, 5).item() == pytest.approx(expected.item(), rel=1e-5)


def test_fsll_trains_small_tensors_under_a_penalty_that_has_a_gradient() -> None:
    moves = []
    for penalty in (0.0, 2.0):
        setup = Setup(arm="fsll", fsll_penalty=penalty, fsll_threshold=1.0, fsll_lr=1e-3)
        learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
        assert isinstance(learner, Fsll)
        before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
        for _ in range(2):
            learner.learn(stream.advance())
        for name, p in learner.network.named_parameters():
            small = float(before[name].abs().max()) <= 1.0 and not name.startswith("tail.head")
            assert small or torch.equal(p, before[name]), name
        moves.append(learner.facts()["moved"])
    assert 0 < moves[1] < moves[0]
    with torch.enable_grad():
        learner._chosen[0].data.add_(1.0)
        (gradient,) = torch.autograd.grad(learner.penalty(), learner._chosen[0])
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / gradient.numel()))
    with pytest.raises(SettingsError, match="--fsll-threshold 1e-06: every tensor has larger weights"):
        Setup(arm="fsll", fsll_threshold=1e-6).learner()


def test_joint_training_sees_all_images_and_crt_balances_them() -> None:
    setup = Setup(arm="joint")
    learner, stream = setup.learner(), Stream(setup.data, setup.split, 0)
    assert isinstance(learner, Joint)
    learner.learn(stream.advance())
    rows, classes = np.concatenate([setup.split.train, setup.split.shots[0][0]]), [12, 12, 12, 3, 3]
    z = learner.embed(setup.data.train, rows)
    labels = np.array([setup.split.order.index(label) for label in setup.data.train.labels[rows].tolist()])
    assert np.bincount(labels).tolist() == classes
    for c in range(5):
        torch.testing.assert_close(learner.prototypes[c], z[labels == c].mean(0), rtol=1e-4, atol=1e-5)
    assert learner.head is not None
    assert learner.head(z).shape == (len(rows), 5)
    # Without joint steps the features are those of the base network, and so are cRT's prototypes of base classes.
    bare = Setup(arm="crt", joint_iterations=0, rebalance_epochs=30)
    retrained, stream = bare.learner(), Stream(bare.data, bare.split, 0)
    assert isinstance(retrained, Retrained)
    for session in (1, 2):
        retrained.learn(stream.advance())
        torch.testing.assert_close(retrained.prototypes[:3], bare.prototypes, rtol=1e-5, atol=1e-6)
        assert retrained.head is not None
        own = np.concatenate(bare.split.shots[0][:session])
        y = torch.arange(3, 3 + 2 * session).repeat_interleave(3)
        assert (
            retrained.head(retrained.embed(bare.data.train, own)).argmax(1) == y
        ).double().mean() > 0.5  # chance is 1/5, 1/7
