"""One training of the protocol, with everything that is read off it: one algorithm, target, seed and draw."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima import models
from flatminima.averaging import reestimate_batchnorm
from flatminima.data.domain_splits import seed_hash
from flatminima.measures import local_flatness, loss_plane
from flatminima.objective import Objective
from flatminima.optim import SAM
from flatminima.protocols.claims import finite
from flatminima.protocols.domains_algorithms import batch_loss
from flatminima.protocols.domains_hyperparameters import hyperparameters
from flatminima.protocols.domains_readers import Evaluation, Reader, digest, make_readers
from flatminima.protocols.domains_settings import NO_WEIGHTS, DomainSettings
from flatminima.protocols.domains_views import Domain, View, divided, domain_data, score, training_batches, without
from flatminima.vectors import norm

FLATNESS = ("selected", "last", "swa", "tail", "swad")  # readers whose weights are probed
_PROBED = ("erm", "sam")  # of these algorithms
_CORNERS = (0.5, 0.7, 0.9)  # of the run: the iterates that span the loss plane
_BATCHNORM_BATCHES = 500  # at most, as SWAD's code; a pass over as many images as there are is enough
_MICRO_BATCH = 256
_TRAINING_SHARE = 0.8  # of a cell's progress


@dataclass(frozen=True)
class Cell:
    """One task of the protocol, for a worker."""

    settings: DomainSettings
    algorithm: str
    target: str
    seed: int
    draw: int = 0

    @property
    def name(self) -> str:
        """Of the task and its files."""
        return f"{self.algorithm}-{self.target}-seed{self.seed}" + (f"-draw{self.draw}" if self.draw else "")


class Diverged(Exception):
    """The loss or a gradient became NaN or infinite."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


def run_cell(cell: Cell, report: Callable[[float], None] = lambda fraction: None) -> dict[str, Any]:
    """Train once, read every method off the trajectory, score them on the target, probe flatness.

    The target is seen twice: for the scores, after the training, and by the oracle, whose choice nothing else reads.

    Returns:
        The record: what decided the run, the history on the source domains, and per reader its accuracy and how it came about.
        JSON-ready; the same bits every time on one machine, apart from ``seconds``.
    """
    started = time.perf_counter()
    values = hyperparameters(cell.settings, cell.algorithm, cell.draw)
    settings = replace(cell.settings, **values)
    data = domain_data(settings)
    sources, target = without(divided(data, settings.held_out, cell.seed), cell.target)
    view = View(settings, data.natural)
    seed = 0 if settings.fixed_seed else cell.seed
    model = build(settings, view, data.shape, len(data.classes), seed)
    record: dict[str, Any] = {
        "algorithm": cell.algorithm, "target": cell.target, "seed": cell.seed, "draw": cell.draw, "hyperparameters": values,
        "fingerprint": fingerprint(model, [*sources, target]), "failure": None, "methods": {}, "flatness": {}, "plane": None,
        "oracle_curve": [],
    }  # fmt: skip

    def target_accuracy() -> float:
        accuracy = score(model, target.images, target.held_out, view)[1]
        record["oracle_curve"].append(accuracy)
        return accuracy

    readers = make_readers(settings, model, target_accuracy)
    corners: list[Tensor] = []
    history = new_history(sources)
    record["history"] = history
    try:
        train(
            model, sources, settings, cell.algorithm, seed, view, readers, history, corners,
            lambda fraction: report(_TRAINING_SHARE * fraction),
        )  # fmt: skip
    except Diverged as diverged:
        record["failure"] = {"step": diverged.step, "reason": diverged.reason}
    record["seconds"] = {"training": time.perf_counter() - started}
    if record["failure"] is None:
        started = time.perf_counter()
        found = _read_off(cell, settings, model, sources, target, view, readers, seed, corners)
        record |= found
        record["seconds"]["scoring"] = time.perf_counter() - started
    result: dict[str, Any] = finite(record)
    return result


def build(settings: DomainSettings, view: View, shape: Sequence[int], classes: int, seed: int) -> nn.Module:
    """The network, initialised by ``seed`` alone, on the device and in train mode."""
    shape = (shape[0], shape[1] // settings.pool, shape[2] // settings.pool)
    if settings.model != "resnet50":
        return models.build(settings.model, shape, classes, seed=seed, **settings.model_options).to(view.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = None if settings.weights == NO_WEIGHTS else settings.weights
        model = models.resnet50(
            classes, weights=weights, dropout=settings.dropout, freeze_batchnorm=settings.freeze_batchnorm
        )
    return model.to(view.device)


def fingerprint(model: nn.Module, domains: Sequence[Domain]) -> str:
    """Initial weights and division of all domains: what paired runs must share."""
    hasher = hashlib.sha256(digest(model).encode())
    for domain in sorted(domains, key=lambda domain: domain.index):
        hasher.update(domain.kept.tobytes() + domain.held_out.tobytes())
    return hasher.hexdigest()[:16]


def new_history(sources: Sequence[Domain]) -> dict[str, Any]:
    """Lists for :func:`train` to fill, one entry per evaluation."""
    return {
        "step": [],
        "train_loss": [],
        "validation_loss": [],
        "validation_accuracy": [],
        "sources": [s.name for s in sources],
    }


def train(
    model: nn.Module,
    sources: Sequence[Domain],
    settings: DomainSettings,
    algorithm: str,
    seed: int,
    view: View,
    readers: Mapping[str, Reader],
    history: dict[str, list[Any]],
    corners: list[Tensor],
    report: Callable[[float], None],
) -> None:
    """Train on the source domains; readers follow, ``history`` and ``corners`` (parameter vectors) are filled.

    Raises:
        Diverged: a loss or a gradient became NaN or infinite.
    """
    base = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    optimizer = SAM(base, settings.rho, model=model) if algorithm == "sam" else base
    rng = np.random.default_rng(seed_hash("mixup", seed))
    marks = {round(share * (settings.run_steps - 1)) for share in _CORNERS}
    torch.manual_seed(seed_hash("dropout", seed))
    model.train()
    window: list[float] = []
    for step, parts in zip(range(settings.run_steps), training_batches(sources, settings, view, seed), strict=False):
        value = batch_loss(algorithm, settings, model, parts, rng)

        def closure(value: Callable[[], Tensor] = value) -> Tensor:
            optimizer.zero_grad()
            loss = value()
            loss.backward()
            return loss

        loss = float(optimizer.step(closure).detach())
        if not math.isfinite(loss):
            raise Diverged(step, f"the training loss became {loss}")
        if isinstance(optimizer, SAM) and optimizer.skipped:
            raise Diverged(step, optimizer.skip_reason or "a gradient became NaN or infinite")
        window.append(loss)
        for reader in readers.values():
            reader.after_step()
        if step in marks:
            corners.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        if settings.evaluated(step):
            evaluation = _evaluate(model, sources, view, step, settings)
            if not math.isfinite(evaluation.loss):
                raise Diverged(step, f"the validation loss became {evaluation.loss}")
            for name, entry in (
                ("step", step),
                ("train_loss", math.fsum(window) / len(window)),
                ("validation_loss", list(evaluation.losses)),
                ("validation_accuracy", list(evaluation.accuracies)),
            ):
                history[name].append(entry)
            window.clear()
            for reader in readers.values():
                reader.after_evaluation(evaluation)
            report((step + 1) / settings.run_steps)


def _evaluate(
    model: nn.Module, sources: Sequence[Domain], view: View, step: int, settings: DomainSettings
) -> Evaluation:
    scores = [
        score(model, source.images, source.held_out, view, _validation_generator(settings, source))
        for source in sources
    ]
    return Evaluation(step, tuple(loss for loss, _ in scores), tuple(accuracy for _, accuracy in scores))


def _validation_generator(settings: DomainSettings, source: Domain) -> torch.Generator | None:
    """The same crops at every evaluation, where validation images are augmented at all."""
    if not settings.augment_validation:
        return None
    return torch.Generator().manual_seed(seed_hash("validation", source.index))


def _read_off(
    cell: Cell,
    settings: DomainSettings,
    model: nn.Module,
    sources: Sequence[Domain],
    target: Domain,
    view: View,
    readers: Mapping[str, Reader],
    seed: int,
    corners: Sequence[Tensor],
) -> dict[str, Any]:
    """The scores of every reader's weights, and the probes of some."""
    found: dict[str, Any] = {"methods": {}, "flatness": {}, "plane": None}
    images = sum(len(source.kept) for source in sources)
    passes = min(_BATCHNORM_BATCHES, math.ceil(images / (settings.batch * len(sources))))
    probes = _Probes(model, sources, target, view, settings) if cell.algorithm in _PROBED else None
    for name, reader in readers.items():
        with reader.swapped():
            if reader.averages:
                # Nothing is drawn for a network without BatchNorm, or with frozen statistics.
                batches = islice(training_batches(sources, settings, view, seed, "batchnorm"), passes)
                reestimate_batchnorm(model.train(), (torch.cat([x for x, _ in parts]) for parts in batches))
            evaluation = _evaluate(model, sources, view, settings.run_steps - 1, settings)
            loss, accuracy = score(model, target.images, target.kept, view)
            found["methods"][name] = {
                "target_accuracy": accuracy, "target_loss": loss, "validation_accuracy": evaluation.accuracy,
                "validation_loss": evaluation.loss, "norm": norm([p.detach() for p in model.parameters()]),
                "weights": digest(model), **reader.facts(),
            }  # fmt: skip
            if probes is not None and settings.pairs and name in FLATNESS:
                found["flatness"][name] = probes.flatness(seed)
            if probes is not None:
                probes.remember(name)
    if probes is not None and settings.plane and cell.algorithm == "erm" and cell.seed == 0 and len(corners) == 3:
        shares = {f"{share:.0%} of the run": corner for share, corner in zip(_CORNERS, corners, strict=True)}
        found["plane"] = probes.plane(shares)
    return found


class _Probes:
    """Flatness and loss plane on rows of the sources and of the target, unaugmented."""

    def __init__(
        self, model: nn.Module, sources: Sequence[Domain], target: Domain, view: View, settings: DomainSettings
    ) -> None:
        share = max(1, settings.flatness_rows // len(sources))
        self._settings = settings
        self._model = model
        chosen = {
            "source": [(s.images, s.kept[:share]) for s in sources],
            "target": [(target.images, target.kept[: settings.flatness_rows])],
        }
        self._tensors = {
            name: (
                torch.cat([view(images, rows) for images, rows in parts]),
                torch.cat([view.labels(images, rows) for images, rows in parts]),
            )
            for name, parts in chosen.items()
        }
        self._points: dict[str, Tensor] = {}

    def _objective(self, name: str) -> Objective:
        return Objective(self._model, F.cross_entropy, self._tensors[name], micro_batch=_MICRO_BATCH, check=False)

    def remember(self, name: str) -> None:
        """Keep the model's parameters as a point for the plane."""
        self._points[name] = torch.nn.utils.parameters_to_vector(self._model.parameters()).detach().clone()

    def flatness(self, seed: int) -> dict[str, Any]:
        """Local flatness of the weights in the model; the directions are the same for all methods of a seed."""
        return {
            name: local_flatness(
                self._objective(name),
                self._settings.radii,
                pairs=self._settings.pairs,
                seed=seed_hash("directions", seed),
            ).to_dict()
            for name in self._tensors
        }

    def plane(self, corners: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The loss over the plane of three iterates, with the methods projected on it."""
        shown = ("selected", "tail", "swad")
        others = {name: point for name, point in self._points.items() if name in shown}
        try:
            return {
                name: loss_plane(
                    self._objective(name), corners, others=others, resolution=self._settings.plane
                ).to_dict()
                for name in self._tensors
            }
        except ValueError:  # the iterates lie on one line: nothing has moved
            return None
