"""Networks of a study, trained together and measured one after the other."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from flatminima.models import build
from flatminima.study.course import Snapshot, Trained, Training
from flatminima.study.ensemble import most_at_once, train_together, turns
from flatminima.study.network_values import NetworkValues
from flatminima.study.run_spec import PREDICTIONS, Record, RunSpec
from flatminima.study.subsets import Subset, load_subset
from flatminima.study.together import one_thread

_TRAINING_SHARE = 0.5  # of a batch's progress


def run_batch(specs: Sequence[RunSpec], report: Callable[[float], None]) -> Iterator[Record]:
    """Make and measure networks; each record as soon as it is complete.

    Networks that can share an ensemble (:attr:`~flatminima.study.run_spec.RunSpec.ensemble`) do. The records do not depend on
    which specifications come together: training gives the same bits, and random draws come from a network's own id.

    Args:
        specs: of the networks.
        report: called with the fraction done.

    Yields:
        One record for each, in an order of its own.

    Raises:
        DataError: the data are not there, or there are fewer rows than asked for.

    Example:
        >>> from flatminima.study.run_spec import DataSpec, ModelSpec, StopSpec
        >>> data, model = DataSpec("digits", 100, probes=5), ModelSpec("mlp", (("hidden", (8,)),))
        >>> specs = [RunSpec("tiny", (), data, model, stop=StopSpec("accuracy", 1.0), seed=seed) for seed in range(2)]
        >>> [(record.status, record.values["train.accuracy"]) for record in run_batch(specs, lambda fraction: None)]
        [('finished', 1.0), ('finished', 1.0)]
    """
    groups: dict[Any, list[RunSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.ensemble, []).append(spec)
    done = 0
    for group in groups.values():
        trainings = [_training(spec) for spec in group]
        start = 0
        for turn in turns(trainings):
            part = group[start : start + len(turn)]
            start += len(turn)
            low, share = done / len(specs), len(turn) / len(specs)

            def told(fraction: float, low: float = low, share: float = share) -> None:
                report(low + _TRAINING_SHARE * share * fraction)

            began = time.process_time()
            trained = train_together(turn, told)
            each = (time.process_time() - began) / len(turn)
            for number, (spec, training, found) in enumerate(zip(part, turn, trained, strict=True), start=1):
                began = time.process_time()
                with one_thread():
                    record = _record(spec, training, found)
                yield dataclasses.replace(record, seconds=each + time.process_time() - began)
                report(low + share * (_TRAINING_SHARE + (1 - _TRAINING_SHARE) * number / len(turn)))
            done += len(turn)


def members_at_once(spec: RunSpec) -> int:
    """Most networks like this one that are trained at once: a larger batch of them takes as long as several small ones.

    Raises:
        DataError: as of :func:`run_batch`.

    Example:
        >>> from flatminima.study.run_spec import DataSpec, ModelSpec, OptimiserSpec
        >>> spec = RunSpec("tiny", (), DataSpec("digits", 1000), ModelSpec("mlp", (("hidden", (8,)),)))
        >>> members_at_once(spec), members_at_once(dataclasses.replace(spec, optimiser=OptimiserSpec(batch_size=1000)))
        (97, 6)
    """
    return most_at_once(_training(spec))


def _training(spec: RunSpec) -> Training:
    data = _rows(spec)
    options: dict[str, Any] = spec.model.keywords
    model = build(spec.model.name, data.x.shape[1:], data.classes, seed=spec.seed, **options)
    return Training(model, data.x, data.y, spec.optimiser, spec.stop, spec.order_seed)


def _rows(spec: RunSpec) -> Subset:
    """The rows as the network takes them."""
    data = load_subset(spec.data)
    return data if spec.model.name == "mlp" else data.pictures()


def _record(spec: RunSpec, training: Training, found: Trained) -> Record:
    data = _rows(spec)
    stopped = found.stopped
    ends = {"train.epochs": float(stopped.epochs), "train.steps": float(stopped.steps)}
    if found.failure:
        return Record(spec.id, spec.to_dict(), "failed", found.failure, ends)
    values = _values(spec, training.model, stopped, data)
    values.measures()
    values.orbit()
    numbers, missing = {**ends, **_training_values(stopped), **values.values}, dict(values.missing)
    if found.fixed is not None:
        fixed = _values(spec, training.model, found.fixed, data, prefix="fixed.")
        fixed.measures()
        numbers |= {f"fixed.{name}": value for name, value in _training_values(found.fixed).items()} | fixed.values
        missing |= fixed.missing
    elif found.diverged:
        missing["fixed.test.accuracy"] = found.diverged
    assert values.predictions is not None
    artefacts = {
        "weights.safetensors": save({name: w.contiguous() for name, w in stopped.weights.items()}),
        PREDICTIONS: values.predictions.to(torch.uint8).numpy().tobytes(),
    }
    reason = "" if found.met else _missed(spec, stopped)
    status = "finished" if found.met else "missed"
    return Record(spec.id, spec.to_dict(), status, reason, numbers, missing, artefacts)


def _values(spec: RunSpec, initial: nn.Module, at: Snapshot, data: Subset, prefix: str = "") -> NetworkValues:
    """Accuracies and covariates at a snapshot."""
    model = copy.deepcopy(initial).eval()
    model.load_state_dict(at.weights)
    values = NetworkValues(spec, model, data, prefix)
    values.accuracies()
    values.covariates()
    return values


def _training_values(at: Snapshot) -> dict[str, float]:
    return {"train.loss": at.loss, "train.accuracy": at.accuracy}


def _missed(spec: RunSpec, at: Snapshot) -> str:
    stop = spec.stop
    reached = f"loss {at.loss:.3g}" if stop.rule == "loss" else f"accuracy {at.accuracy:.4g}"
    return f"{reached} after {at.epochs} epochs ({at.steps} steps), the cap: expected {stop.rule} {stop.threshold}"
