"""One stream of sessions: a base network, an arm, a seed, a draw of shots. After each, all classes so far are tested."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatminima.data.incremental import ClassData
from flatminima.data.splits import IntArray
from flatminima.protocols.claims import finite
from flatminima.protocols.fewshot_base import Diverged, all_finite, base_classes, embeddings, load_network, pieces
from flatminima.protocols.fewshot_exemplars import Icarl, Rebalance, base_exemplars
from flatminima.protocols.fewshot_fsll import Fsll
from flatminima.protocols.fewshot_joint import Joint, Retrained
from flatminima.protocols.fewshot_learners import FineTune, Frozen, Learner, Metric
from flatminima.protocols.fewshot_methods import ARMS, arm_settings
from flatminima.protocols.fewshot_network import EmbeddingNetwork
from flatminima.protocols.fewshot_prototypes import class_means, predict
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_split import FewShotSplit
from flatminima.protocols.fewshot_views import Stream, View, data_and_split, stream_seed

_CACHE = 2**29  # bytes of trunk activations that are kept between cells


@dataclass(frozen=True)
class SessionCell:
    """One task of the second stage, for a worker.

    Attributes:
        settings: of the experiment.
        base, arm, seed, draw: what is run.
        draws: how many there are.
        weights: what :func:`~flatminima.protocols.fewshot_base.run_base` left, with ``digest``, its name.
    """

    settings: FewShotSettings
    base: str
    arm: str
    seed: int
    draw: int
    draws: int
    weights: bytes
    digest: str

    @property
    def name(self) -> str:
        """Of the task and its files."""
        return cell_name(self.base, self.arm, self.seed, self.draw)


def cell_name(base: str, arm: str, seed: int, draw: int) -> str:
    """The name of a stream of sessions."""
    return f"{base}+{arm}-seed{seed}-draw{draw}"


def run_sessions(cell: SessionCell, report: Callable[[float], None] = lambda fraction: None) -> dict[str, Any]:
    """Run all sessions of an arm on a base network.

    A session is learned from its shots, then all test images of all classes so far are classified. Nothing is chosen by any of
    it: the number of steps is fixed, and the state after the last step is what counts.

    Returns:
        The record: correct predictions per session, group of classes and classifier, and what happened in the sessions.
    """
    started = time.perf_counter()
    settings = arm_settings(cell.settings, cell.base, cell.arm)
    data, split = data_and_split(cell.settings, cell.seed, cell.draws)
    view = View(settings, data.train, split.train)
    network, prototypes = load_network(settings, data, split, view, cell.weights)
    learner = make_learner(settings, cell.arm, network, prototypes, view, cell.seed, cell.draw, data, split)
    stream = Stream(data, split, cell.draw)
    scorer = Scorer(network, view, data, stream, cell.digest)
    scores: dict[str, list[list[int]]] = {}
    record: dict[str, Any] = {
        "cell": "sessions", "base": cell.base, "arm": cell.arm, "seed": cell.seed, "draw": cell.draw, "weights": cell.digest,
        "failure": None, "counts": [len(rows) for rows in split.test], "correct": scores, "sessions": [],
    }  # fmt: skip
    learning = 0.0
    try:
        for session in range(len(split.sessions) + 1):
            if session:
                shots = stream.advance()
                begun = time.perf_counter()
                learner.learn(shots)
                learning += time.perf_counter() - begun
                head = [] if learner.head is None else learner.head.parameters()
                if not all_finite([*learner.network.state_dict().values(), learner.prototypes, *head]):
                    # Predictions would all be the first class, which is an accuracy.
                    raise Diverged(None, "weights or prototypes are not finite after a session")
                record["sessions"].append(learner.facts())
            for classifier, row in scorer.correct(learner, session).items():
                scores.setdefault(classifier, []).append(row)
            report((session + 1) / (len(split.sessions) + 1))
        record["drift"] = drift(learner, network, view, settings, data, split)
    except Diverged as error:
        record["failure"] = {"session": stream.session, "step": error.step, "reason": error.reason}
    record["seconds"] = {"learning": learning, "total": time.perf_counter() - started}
    plain: dict[str, Any] = finite(record)
    return plain


def make_learner(
    settings: FewShotSettings,
    arm: str,
    network: EmbeddingNetwork,
    prototypes: Tensor,
    view: View,
    seed: int,
    draw: int,
    data: ClassData,
    split: FewShotSplit,
) -> Learner:
    """The learner of an arm. Only those whose definition needs base images are given any."""
    procedure = ARMS[arm][0]
    own = stream_seed("learner", seed, draw)  # the same for all arms: the same augmentation of the same shots
    if procedure == "frozen":
        return Frozen(settings, network, prototypes, view, own)
    if procedure == "metric":
        exemplars = base_exemplars(settings, network, view, data, split) if settings.replay == "all" else None
        return Metric(settings, network, prototypes, view, own, clamp=arm != "no-clamp", exemplars=exemplars)
    if procedure == "ft":
        return FineTune(settings, network, prototypes, view, own)
    if procedure == "fsll":
        return Fsll(settings, network, prototypes, view, own)
    kinds: dict[str, type[Joint] | type[Icarl] | type[Rebalance]] = {
        "joint": Joint, "crt": Retrained, "icarl": Icarl, "rebalance": Rebalance,
    }  # fmt: skip
    return kinds[procedure](settings, network, prototypes, view, own, data, split)


class Scorer:
    """Counts correct predictions. Activations of the trunk, which most arms leave alone, are computed once a base network.

    Args:
        network: of the base training.
        view, data, stream: test images come through the stream, which refuses those of later sessions.
        digest: name of the network's weights.
    """

    _cache: tuple[str, dict[int, tuple[IntArray, list[Tensor]]]] = ("", {})

    def __init__(self, network: EmbeddingNetwork, view: View, data: ClassData, stream: Stream, digest: str) -> None:
        self._network, self._view, self._data, self._stream = network, view, data, stream
        if Scorer._cache[0] != digest:
            Scorer._cache = (digest, {})

    @torch.no_grad()
    def correct(self, learner: Learner, session: int) -> dict[str, list[int]]:
        """For each classifier, the correct predictions in every group of classes up to the session."""
        found: dict[str, list[int]] = {}
        for group in range(session + 1):
            rows, labels = self._stream.test(group)
            y = torch.from_numpy(labels).to(self._view.device)
            z = torch.cat([learner.network.tail.layers(h) for h in self._activations(learner, group, rows)])
            predictions = {name: predict(z, learner.prototypes, name) for name in ("cosine", "euclidean")}
            if learner.head is not None:
                predictions["head"] = learner.head(z).argmax(1)
            for name, predicted in predictions.items():
                found.setdefault(name, []).append(int((predicted == y).sum()))
        return found

    def _activations(self, learner: Learner, group: int, rows: Any) -> Any:
        if learner.trunk_moved:
            return (learner.network.trunk(x) for x in pieces(self._view, self._data.test, rows))
        kept = Scorer._cache[1]
        if group in kept and np.array_equal(kept[group][0], rows):  # another experiment may test other images
            return kept[group][1]
        made = [self._network.trunk(x) for x in pieces(self._view, self._data.test, rows)]
        held = sum(h.numel() * h.element_size() for hs in (*(old for _, old in kept.values()), made) for h in hs)
        if held <= _CACHE:
            kept[group] = rows, made
        return made


@torch.no_grad()
def drift(
    learner: Learner,
    network: EmbeddingNetwork,
    view: View,
    settings: FewShotSettings,
    data: ClassData,
    split: FewShotSplit,
) -> float | None:
    r"""How far the class means of base images have moved since base training, ``probe_rows`` base train images together.

    The mean over classes of :math:`|p_c(\theta_T) - p_c(\theta^*)| / |p_c(\theta^*)|` after the last session. Measured by the
    runner; no method sees it.
    """
    if not settings.probe_rows or isinstance(learner, Frozen):
        return None
    rows = split.train[:: max(1, len(split.train) // settings.probe_rows)]
    classes = base_classes(data.train, split, rows).to(view.device)
    present = classes.unique()
    place = torch.searchsorted(present, classes)
    before, after = (
        class_means(embeddings(one, view, data.train, rows), place, len(present)) for one in (network, learner.network)
    )
    return float(((after - before).norm(dim=1) / before.norm(dim=1)).mean())
