"""Networks that cost nothing: the numbers of a run come from its identity, and its artefact is large enough to tear."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flatminima.study.run_spec import Record, RunSpec

FOLDER = "STUDY_FIXTURE_FOLDER"  # environment variable: where workers leave traces, and find what they are to do


def run_batch(specs: Sequence[RunSpec], report: Callable[[float], None]) -> Iterator[Record]:
    """Slow where the folder holds a file ``slow``; dies at the first attempt at seed 7 where it holds a file ``deadly``."""
    folder = Path(os.environ.get(FOLDER, "."))
    for number, spec in enumerate(specs):
        report(number / len(specs))
        if os.environ.get(FOLDER):
            with (folder / f"made-{spec.id}").open("a") as file:
                file.write("x")
            if (folder / "slow").exists():
                time.sleep(0.1)
            if (folder / "deadly").exists() and spec.seed == 7 and not (folder / f"died-{spec.id}").exists():
                (folder / f"died-{spec.id}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        yield record_of(spec)


def record_of(spec: RunSpec) -> Record:
    """What :func:`run_batch` finds on a network."""
    noise = hashlib.sha256(f"{spec.id}".encode()).digest()
    values = {
        "test.accuracy": 0.9 + noise[0] / 2560,
        "measure.trace": noise[1] + spec.factors["lr"] / 3,
        "train.epochs": 20.0,
    }
    if spec.seed == 3:
        return Record(spec.id, spec.to_dict(), "missed", "loss 0.3 after 500 epochs", values, seconds=0.5)
    if spec.seed == 4:
        return Record(spec.id, spec.to_dict(), "failed", "the loss is NaN from epoch 2 on", {"train.epochs": 2.0})
    missing = {"measure.other": "not a network of ReLUs"}
    return Record(spec.id, spec.to_dict(), "finished", "", values, missing, {"weights.safetensors": noise * 3000}, 0.25)
