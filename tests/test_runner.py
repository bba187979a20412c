from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flatminima.study.runner import run_jobs

SCRIPT = """
import sys, time
from pathlib import Path
from flatminima.study.runner import run_jobs

def work(job, report):
    Path(job).touch()
    time.sleep(600)

if __name__ == "__main__":
    try:
        print("ready", flush=True)
        run_jobs(work, sys.argv[1:], workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@dataclass(frozen=True)
class Job:
    """Writes the square of a number; the first ones take longest."""

    path: Path
    number: int


def square(job: Job, report: Callable[[float], None]) -> None:
    report(0.25)
    time.sleep(0.2 if job.number == 0 else 0.0)
    if job.number == 99:
        raise ValueError(f"job {job.number} cannot be squared")
    job.path.write_text(f"{job.number**2} {torch.get_num_threads()} {os.getpid()}")
    report(0.75)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_with_one_thread_whatever_the_workers(tmp_path: Path, workers: int) -> None:
    jobs = [Job(tmp_path / str(n), n) for n in range(5)]
    told: dict[int, list[float]] = {}
    run_jobs(square, jobs, workers=workers, progress=lambda index, f: told.setdefault(index, []).append(f))
    answers = [job.path.read_text().split() for job in jobs]
    assert [(square, threads) for square, threads, _ in answers] == [(str(n * n), "1") for n in range(5)]
    processes = {pid for _, _, pid in answers}
    assert str(os.getpid()) not in processes
    assert len(processes) == 1 if workers == 1 else len(processes) <= 2
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert all(1.0 in fractions for fractions in told.values())
    assert any(0.25 in fractions for fractions in told.values())


def test_an_error_of_a_job_is_passed_on_and_ends_the_rest(tmp_path: Path) -> None:
    jobs = [Job(tmp_path / "first", 2), Job(tmp_path / "bad", 99), *(Job(tmp_path / str(n), 0) for n in range(50))]
    with pytest.raises(ValueError, match="job 99 cannot be squared"):
        run_jobs(square, jobs, workers=1)
    time.sleep(0.5)
    begun = len(list(tmp_path.iterdir()))
    assert (tmp_path / "first").exists()
    assert begun < 20
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == begun


def digits(number: int, report: Callable[[float], None]) -> Iterator[bytes]:
    for digit in str(number):
        yield digit.encode() * 500_000  # more than a pipe takes at once
        time.sleep(0.3)


def test_what_a_generator_yields_comes_before_its_end_and_all_of_it_is_the_result() -> None:
    told: list[tuple[str, int, Any]] = []
    run_jobs(
        digits, [123, 45], workers=2, part=lambda index, item: told.append(("part", index, item[:1])),
        done=lambda index, result: told.append(("done", index, [item[:1] for item in result])),
    )  # fmt: skip
    for index, number in enumerate((b"123", b"45")):
        mine = [(kind, found) for kind, at, found in told if at == index]
        parts = [found for kind, found in mine if kind == "part"]
        assert ("done", [bytes([digit]) for digit in number]) in mine
        assert parts == [bytes([digit]) for digit in number][: len(parts)]
        assert mine[0][0] == "part"


def test_no_worker_is_refused_and_no_job_is_no_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run_jobs(square, [Job(tmp_path / "a", 1)], workers=0)
    run_jobs(square, [], workers=4)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    begun = [tmp_path / "a", tmp_path / "b"]
    process = subprocess.Popen([sys.executable, str(script), *map(str, begun)], stdout=subprocess.PIPE)
    while not all(path.exists() for path in begun):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    # The workers hold the other end of this pipe: it ends when the last of them has.
    process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)


def test_ctrl_c_while_the_workers_start_is_quiet(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "a")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # importing takes the worker longer
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
