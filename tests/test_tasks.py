from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flatminima.study.ray_executor import ClusterError, RayExecutor
from flatminima.study.runner import WorkerLostError, run_jobs
from flatminima.study.store import ResultStore, StoreError
from flatminima.study.tasks import Result, run_tasks

SETTINGS = {"power": 2}
SCRIPT = """
import sys, time
from pathlib import Path
from flatminima.study.store import ResultStore
from flatminima.study.tasks import Result, run_tasks

def work(number, report):
    time.sleep(0.1)
    report(0.5)
    with open(sys.argv[2], "a") as log:
        log.write(f"{number}\\n")
    return Result({"square": number**2}, {".txt": b"%d" % number})

if __name__ == "__main__":
    store = ResultStore(Path(sys.argv[1]), {"power": 2})
    run_tasks(work, {f"n{n}": n for n in range(12)}, store, workers=2)
"""


@dataclass(frozen=True)
class Task:
    """Squares a number; dies at its first ``deaths`` attempts, each of which leaves a mark in ``directory``."""

    number: int
    directory: Path
    deaths: int = 0


def square(task: Task, report: Callable[[float], None]) -> Result | dict[str, int]:
    report(0.25)
    marks = task.directory / f"attempts-{task.number}"
    with marks.open("a") as stream:
        stream.write("x")
    if len(marks.read_text()) <= task.deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    if task.number == 99:
        raise ValueError("99 cannot be squared")
    if task.number == 98:
        return {}
    record = {"square": task.number**2, "threads": torch.get_num_threads()}
    return Result(record, {".txt": str(task.number).encode()})


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "runs").iterdir()}


def test_records_and_files_are_kept_and_not_made_again(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "out", SETTINGS)
    tasks = {f"domain {n}/α": Task(n, tmp_path) for n in range(3)}
    told: list[tuple[str, float]] = []
    found = run_tasks(square, tasks, store, workers=2, progress=lambda *args: told.append(args))
    assert found == {name: {"square": task.number**2, "threads": 1} for name, task in tasks.items()}
    assert [store.file(name, ".txt").read_text() for name in tasks] == ["0", "1", "2"]
    assert {name for name, fraction in told if fraction == 0.25} == set(tasks)
    more = tasks | {"fourth": Task(3, tmp_path)}
    again = run_tasks(square, more, ResultStore(tmp_path / "out", SETTINGS))
    assert again == found | {"fourth": {"square": 9, "threads": 1}}
    assert [(tmp_path / f"attempts-{n}").read_text() for n in range(4)] == ["x"] * 4
    with pytest.raises(TypeError, match=r"task 'empty' returned \{\}: expected a record"):
        run_tasks(square, {"empty": Task(98, tmp_path)}, store)


def test_the_record_comes_after_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatminima.study import store as module

    store = ResultStore(tmp_path, SETTINGS)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save("a", {"square": 1}, {".txt": b"1"})
    assert store.file("a", ".txt").exists()
    assert store.result("a") is None


def test_other_settings_are_refused(tmp_path: Path) -> None:
    ResultStore(tmp_path, SETTINGS)
    with pytest.raises(StoreError, match=r"holds an experiment with other settings \(power: 2 there, 3 now\)"):
        ResultStore(tmp_path, {"power": 3})
    (tmp_path / "runs" / "a.json").write_text("{}")
    assert ResultStore(tmp_path, SETTINGS).result("a") is None


def test_a_killed_worker_costs_one_more_attempt_and_a_hopeless_task_ends_what_is_finished_is_kept(
    tmp_path: Path,
) -> None:
    store = ResultStore(tmp_path / "out", SETTINGS)
    tasks = {"dies once": Task(2, tmp_path, deaths=1), "n3": Task(3, tmp_path), "always": Task(50, tmp_path, deaths=9)}
    with pytest.raises(WorkerLostError, match=r"job 2 .* ended 3 times: its process was killed, or ran out of memory"):
        run_tasks(square, tasks, store)
    assert [store.result(name) for name in tasks] == [{"square": n, "threads": 1} for n in (4, 9)] + [None]
    assert [(tmp_path / f"attempts-{n}").read_text() for n in (2, 3, 50)] == ["xx", "x", "xxx"]


def test_kill_9_loses_nothing_finished_and_the_end_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    script, log, out = tmp_path / "script.py", tmp_path / "log", tmp_path / "out"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(out), str(log)]
    process = subprocess.Popen(command)
    while len(list((out / "runs").glob("*.json"))) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    before = contents(out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {name: content for name, content in contents(out).items() if name in before} == before
    subprocess.run(command, check=True)
    expected = {f"n{n}.txt": str(n).encode() for n in range(12)}
    expected |= {f"n{n}.json": f'{{\n "square": {n * n}\n}}\n'.encode() for n in range(12)}
    assert {name: content for name, content in contents(out).items() if not name.startswith(".")} == expected
    # Two workers were interrupted once: at most two tasks were begun again.
    assert 12 <= len(log.read_text().splitlines()) <= 14


def test_the_same_path_serves_both_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"--ray needs the package ray: install flatminima\[ray\]"):
        run_jobs(square, [Task(1, tmp_path)], ray="auto")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head and a second node of a real cluster, one core each, on this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the nodes find this module
    from ray.cluster_utils import Cluster

    size = 100 * 2**20
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": size})
    made.add_node(num_cpus=1, object_store_memory=size)
    yield made.address
    made.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_store_also_when_its_workers_are_killed(cluster: str, tmp_path: Path) -> None:
    tasks = {f"n{n}": Task(n, tmp_path / "ray", deaths=n % 3 == 1) for n in range(8)}
    (tmp_path / "ray").mkdir()
    told: set[str] = set()
    store = ResultStore(tmp_path / "ray" / "out", SETTINGS)
    run_tasks(square, tasks, store, ray=cluster, progress=lambda name, f: told.add(name) if 0 < f < 1 else None)
    (tmp_path / "local").mkdir()
    local = {name: Task(task.number, tmp_path / "local") for name, task in tasks.items()}
    run_tasks(square, local, ResultStore(tmp_path / "local" / "out", SETTINGS), workers=2)
    assert contents(tmp_path / "ray" / "out") == contents(tmp_path / "local" / "out")
    assert json.loads(contents(tmp_path / "ray" / "out")["n1.json"]) == {"square": 1, "threads": 1}
    assert [len((tmp_path / "ray" / f"attempts-{n}").read_text()) for n in range(8)] == [1, 2, 1, 1, 2, 1, 1, 2]
    assert told  # reports are a courtesy: the last ones may come after the end
    assert told <= set(tasks)
    with pytest.raises(ValueError, match="99 cannot be squared"):
        run_tasks(square, {"bad": Task(99, tmp_path)}, store, ray=cluster, workers=1)
    with pytest.raises(WorkerLostError, match="ended 3 times"):
        run_tasks(square, {"always": Task(50, tmp_path, deaths=9)}, store, ray=cluster)


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}", "127.0.0.1:99999999"])
def test_an_address_where_nothing_listens_is_an_error_at_once(address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match=r"--ray \S+: .+; give HOST:PORT of a cluster that is up"):
        RayExecutor(square, address.format(port), None)


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(ClusterError, match=r"--ray auto: .*give HOST:PORT of a cluster that is up"):
        RayExecutor(square, "auto", None)
