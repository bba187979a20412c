from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flatminima.study import run_study as module
from flatminima.study.database import StudyDatabase, StudyError
from flatminima.study.executor import gathered
from flatminima.study.grid import Grid
from flatminima.study.run_spec import Record, RunSpec
from flatminima.study.run_study import Progress, run_study
from flatminima.study.versions import code_version, current_version, differences
from study_fixture import GRID, TEXT, begin, contents
from study_networks import FOLDER, record_of, run_batch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[object, ...]]]:
    """What an uninterrupted study leaves, written without workers."""
    path = tmp_path_factory.mktemp("whole") / "s.sqlite"
    with begin(path) as database:
        for spec in GRID.runs():
            assert database.save(record_of(spec))
    return contents(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in this process, for tests that are about something else."""

    def run(work: Any, jobs: Any, *, done: Any, part: Any, progress: Any, **_: object) -> None:
        for index in range(len(jobs)):
            result = gathered(work(jobs[index], partial(progress, index)), partial(part, index))
            done(index, result)
            progress(index, 1.0)

    monkeypatch.setattr(module, "run_jobs", run)


def test_a_study_runs_to_its_end_and_is_not_run_again(folder: Path, whole: object) -> None:
    path, told = folder / "s.sqlite", list[Progress]()
    counts = run_study(GRID, path, workers=2, batch=5, run_batch=run_batch, progress=told.append)
    assert counts == {"waiting": 0, "finished": 20, "missed": 2, "failed": 2}
    assert contents(path) == whole
    assert [p.recorded for p in told] == sorted(p.recorded for p in told)
    assert (told[0].recorded, told[-1].recorded, told[-1].total) == (0, 24, 24)
    assert any(0 < p.recorded < 5 for p in told), "records of a batch are kept before its end"
    run_study(GRID, path, run_batch=run_batch)
    assert {len(trace.read_text()) for trace in folder.glob("made-*")} == {1}
    assert [p.name for p in folder.iterdir() if p.name.startswith("s.sqlite")] == ["s.sqlite"]


BATCHES = """
schema = 1
name = "batches"
[data]
name = "digits"
rows = 1500
probes = 10
[model]
name = "mlp"
hidden = [8]
[stop]
rule = "never"
max_epochs = 1
[seeds]
count = 6
[factors]
batch_size = [64, 1500]
"""


@pytest.mark.parametrize(("batch", "sizes"), [(None, [6, 3, 3]), (5, [3, 3, 3, 3]), (100, [6, 6])])
def test_a_worker_is_given_no_more_than_is_trained_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int | None, sizes: list[int]
) -> None:
    """More would leave the others without work: full batches are trained a few at a time, whatever comes together."""
    given = []

    def run(work: Any, jobs: Any, *, done: Any, progress: Any, **_: object) -> None:
        for index in range(len(jobs)):
            given.append(len(job := jobs[index]))
            done(index, list(work(job, partial(progress, index))))

    monkeypatch.setattr(module, "run_jobs", run)
    run_study(Grid.parse(BATCHES), tmp_path / "s.sqlite", batch=batch)
    assert given == sizes


def kill_at(path: Path, seconds: float) -> int:
    """A study in a process of its own, killed with its workers so long after the first record."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "study_fixture.py"), "run", str(path), "2"], start_new_session=True
    )
    while process.poll() is None and not recorded(path):
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()  # its workers see that and end
    process.wait()
    return recorded(path)


def recorded(path: Path) -> int:
    if not path.exists() or not path.stat().st_size:
        return 0
    connection = sqlite3.connect(path, timeout=60)
    try:
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return 0
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return int(connection.execute("SELECT count(*) FROM runs WHERE status IS NOT NULL").fetchone()[0])
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("serial")  # of the process that goes on; the killed one has workers
def test_killed_at_twenty_random_moments_a_study_ends_as_if_it_had_not_been(folder: Path, whole: object) -> None:
    (folder / "slow").touch()
    generator = random.Random(0)
    found = []
    for number in range(20):
        path = folder / f"s{number}.sqlite"
        found.append(kill_at(path, generator.uniform(0.0, 0.9)))
        counts = run_study(GRID, path, batch=4, run_batch=run_batch)
        assert counts["waiting"] == 0
        assert contents(path) == whole
    assert len({n for n in found if 0 < n < 24}) >= 3, f"the moments were not spread: {found}"


def test_killed_again_and_again_a_study_ends_as_if_it_had_not_been(folder: Path, whole: object) -> None:
    (folder / "slow").touch()
    path = folder / "s.sqlite"
    before = kill_at(path, 0.1)
    assert 0 < before < 24
    run_study(GRID, path, workers=2, batch=4, run_batch=run_batch)
    assert contents(path) == whole


def test_killed_at_twenty_random_moments_of_writing_nothing_recorded_is_lost_or_torn(
    tmp_path: Path, whole: object
) -> None:
    # In a process that can fork: it has no threads yet.
    command = [sys.executable, str(HERE / "study_fixture.py"), "kill", str(tmp_path)]
    killer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killer.returncode == 0, killer.stderr
    killed = int(killer.stdout)
    assert killed >= 5
    for number in range(4):
        assert contents(tmp_path / f"s{number}.sqlite") == whole


def test_a_killed_worker_costs_no_record(folder: Path, whole: object) -> None:
    (folder / "deadly").touch()
    run_study(GRID, folder / "s.sqlite", workers=2, batch=12, run_batch=run_batch)
    assert contents(folder / "s.sqlite") == whole
    assert len(list(folder.glob("died-*"))) == 2
    again = {trace.name[5:] for trace in folder.glob("made-*") if len(trace.read_text()) > 1}
    assert 2 <= len(again) <= 4, "what had come before the death is not made again"


@pytest.mark.slow
def test_a_worker_that_always_dies_ends_the_study_and_keeps_the_rest(folder: Path) -> None:
    path = folder / "s.sqlite"
    with pytest.raises(StudyError, match="a worker died three times on the same batch of at most 24 networks"):
        run_study(GRID, path, workers=1, batch=24, run_batch=always_dying)
    with StudyDatabase(path) as database:
        assert 0 < database.counts()["finished"] < 24
        assert database.claims.living() == {}


def always_dying(specs: Sequence[RunSpec], report: Callable[[float], None]) -> Iterator[Record]:
    for spec in specs:
        if spec.seed == 2:
            time.sleep(0.5)  # what was made travels
            os.kill(os.getpid(), signal.SIGKILL)
        yield record_of(spec)


@pytest.fixture
def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head and a second node of a real cluster, one core each, on this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # where the nodes find the networks
    from ray.cluster_utils import Cluster

    size = 100 * 2**20
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": size})
    made.add_node(num_cpus=1, object_store_memory=size)
    yield made.address
    made.shutdown()


@pytest.mark.slow
def test_a_killed_ray_worker_costs_no_record(folder: Path, cluster: str, whole: object) -> None:
    (folder / "deadly").touch()
    told: list[Progress] = []
    run_study(GRID, folder / "s.sqlite", ray=cluster, batch=6, run_batch=run_batch, progress=told.append)
    assert contents(folder / "s.sqlite") == whole
    assert len(list(folder.glob("died-*"))) == 2
    assert told[-1].recorded == 24


def test_two_processes_share_one_study(folder: Path, whole: object) -> None:
    (folder / "slow").touch()
    path = folder / "s.sqlite"
    command = [sys.executable, str(HERE / "study_fixture.py"), "run", str(path), "1"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert contents(path) == whole
    assert {len(trace.read_text()) for trace in folder.glob("made-*")} == {1}


def test_claims_of_the_dead_are_void_and_those_of_the_living_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs = tmp_path / "s.sqlite", [spec.id for spec in GRID.runs()]
    with begin(path) as mine, StudyDatabase(path) as theirs:
        assert mine.claims.take(runs[:3]) == runs[:3]
        assert theirs.claims.take(runs[:5]) == runs[3:5]
        assert mine.claims.take(runs[:6]) == [*runs[:3], runs[5]]
        assert mine.claims.living() == {mine.claims.owner: 4, theirs.claims.owner: 2}
        # A process elsewhere that was not heard of for longer than a lease.
        theirs.claims.owner = "elsewhere:1:abc"
        assert theirs.claims.take(runs[6:7]) == runs[6:7]
        assert mine.claims.free(runs[6:8]) == runs[7:8]
        later = time.time() + 121
        monkeypatch.setattr("flatminima.study.claims.time.time", lambda: later)
        assert mine.claims.free(runs[6:8]) == runs[6:8]
        theirs.claims.renew()
        assert mine.claims.free(runs[6:8]) == runs[7:8]
        theirs.claims.release()
        assert mine.claims.free(runs[6:8]) == runs[6:8]
        monkeypatch.undo()
        # A process of this machine that is gone.
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        theirs.claims.owner = f"{mine.claims.owner.split(':')[0]}:{gone.pid}:abc"
        assert theirs.claims.take(runs[8:9]) == runs[8:9]
        assert mine.claims.free(runs[8:9]) == runs[8:9]


def test_a_study_waits_for_what_others_have_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL", 0.05)
    path, runs = tmp_path / "s.sqlite", GRID.runs()
    told: list[Progress] = []
    with begin(path) as theirs:
        for spec in runs[:-1]:
            theirs.save(record_of(spec))
        assert theirs.claims.take([runs[-1].id])
        thread = threading.Thread(target=lambda: run_study(GRID, path, run_batch=run_batch, progress=told.append))
        thread.start()
        while not any(p.elsewhere for p in told):
            time.sleep(0.01)
        assert theirs.save(record_of(runs[-1]))
        thread.join(30)
        assert not thread.is_alive()
    assert told[-1] == Progress(24, 24)


def test_the_first_record_of_a_run_is_kept(tmp_path: Path) -> None:
    spec = GRID.runs()[0]
    with begin(tmp_path / "s.sqlite") as database:
        assert database.save(record_of(spec))
        assert not database.save(dataclasses.replace(record_of(spec), values={"test.accuracy": 0.0}))
        assert database.records(artefacts=True) == [record_of(spec)]
        assert database.artefact(spec.id, "weights.safetensors") == record_of(spec).artefacts["weights.safetensors"]
        with pytest.raises(StudyError, match="run 000000000000 is none of this study"):
            database.save(dataclasses.replace(record_of(spec), id="0" * 64))


def test_a_full_database_is_a_clear_stop_and_stays_whole(tmp_path: Path, whole: object) -> None:
    path, specs = tmp_path / "s.sqlite", GRID.runs()
    with begin(path) as database:
        assert database.save(record_of(specs[0]))
        pages = database._one("PRAGMA page_count")
        database._one(f"PRAGMA max_page_count = {pages + 3}")
        with pytest.raises(
            StudyError, match=r"s\.sqlite: database or disk is full; every finished run is kept: free some"
        ):
            database.save(record_of(specs[1]))
        assert database.records(artefacts=True) == [record_of(specs[0])]
        assert database.check() == []
        database._one("PRAGMA max_page_count = 1000000")
        for spec in specs[1:]:
            database.save(record_of(spec))
    assert contents(path) == whole


@pytest.mark.usefixtures("serial")
def test_a_file_that_may_not_grow_is_a_clear_stop_and_the_study_goes_on_later(folder: Path, whole: object) -> None:
    # The system refuses to write beyond a size, as a full disk does, but with another error.
    resource = pytest.importorskip("resource")
    path = folder / "s.sqlite"
    begin(path).close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 400_000, limits[1]))
        with pytest.raises(StudyError, match="every finished run is kept"):
            run_study(GRID, path, batch=4, run_batch=run_batch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert 0 < recorded(path) < 24
    run_study(GRID, path, run_batch=run_batch)
    assert contents(path) == whole


def full_disk() -> Path | None:
    """A file system of 1 MiB, where this process may mount one."""
    place = Path("/tmp") / f"flatminima-full-{os.getpid()}"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True)
    return place if mounted.returncode == 0 else None


@pytest.mark.skipif(shutil.which("mount") is None or os.getuid() != 0, reason="only root may mount a file system")
@pytest.mark.usefixtures("serial")
def test_a_full_disk_is_a_clear_stop_and_the_study_goes_on_later(folder: Path, whole: object) -> None:
    place = full_disk()
    if place is None:
        pytest.skip("this system lets nobody mount a file system")
    try:
        path = place / "s.sqlite"
        with pytest.raises(StudyError, match="every finished run is kept"):
            run_study(GRID, path, batch=4, run_batch=run_batch)
        assert 0 < recorded(path) < 24
        shutil.copy(path, folder / "s.sqlite")
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()
    run_study(GRID, folder / "s.sqlite", run_batch=run_batch)
    assert contents(folder / "s.sqlite") == whole


@pytest.mark.usefixtures("serial")
def test_another_version_of_code_packages_or_data_is_refused_and_shown(folder: Path) -> None:
    path = folder / "s.sqlite"
    now = current_version("study_networks", ["digits"])
    other = {
        "packages": {**now["packages"], "torch": "1.0"},
        "code": {**now["code"], "flatminima.objective": "0", "flatminima.gone": "0"},
        "data": {"digits": "0"},
    }
    with StudyDatabase(path, create=True) as database:
        about = {"study": GRID.name, "digest": GRID.digest, "grid": GRID.text}
        database.begin(GRID.runs(), about, other)
        assert database.save(record_of(GRID.runs()[0]))
    with pytest.raises(StudyError) as caught:
        run_study(GRID, path, run_batch=run_batch)
    said = str(caught.value)
    assert "has 1 runs made with another version" in said
    assert f"packages: torch was 1.0 and is {now['packages']['torch']}" in said
    assert "code: flatminima.gone is gone" in said
    assert "data: digits changed" in said
    assert "--other-version" in said
    run_study(GRID, path, other_version=True, run_batch=run_batch)
    with StudyDatabase(path) as database:
        assert len(database.versions()) == 2
        assert sorted(set(database.run_versions().values())) == [1, 2]
        assert list(database.run_versions().values()).count(1) == 1
        # Where nothing is left to do, nothing can differ.
        database.add_version(other)
        versions = database.versions()
    run_study(GRID, path, run_batch=run_batch)
    with StudyDatabase(path) as database:
        assert database.versions() == versions


@pytest.mark.usefixtures("serial")
def test_a_version_without_a_run_is_replaced(folder: Path) -> None:
    path = folder / "s.sqlite"
    with StudyDatabase(path, create=True) as database:
        database.begin(GRID.runs(), {"study": GRID.name, "digest": GRID.digest}, {"packages": {"torch": "1.0"}})
    run_study(GRID, path, run_batch=run_batch)
    with StudyDatabase(path) as database:
        assert database.versions() == [current_version("study_networks", ["digits"])]


@pytest.mark.usefixtures("serial")
def test_a_version_that_a_living_process_works_with_is_not_replaced(folder: Path) -> None:
    """It has claimed runs and recorded none: what it records later is made with its own version, and so it is written."""
    path = folder / "s.sqlite"
    old = {"packages": {"torch": "1.0"}}
    with StudyDatabase(path, create=True) as database:
        database.begin(GRID.runs(), {"study": GRID.name, "digest": GRID.digest}, old)
        first, second = GRID.runs()[:2]
        database.claims.take([first.id, second.id])
        with pytest.raises(StudyError, match=r"another process makes runs with another version .*--other-version"):
            run_study(GRID, path, run_batch=run_batch)
        assert database.versions() == [old]
        with StudyDatabase(path) as other:
            other.add_version({"packages": {"torch": "2.0"}})
            other.save(record_of(GRID.runs()[2]))
        database.save(record_of(first))
        versions = database.versions()
        made = {run: versions[number - 1] for run, number in database.run_versions().items()}
    assert made == {first.id: old, GRID.runs()[2].id: {"packages": {"torch": "2.0"}}}


def test_a_script_has_the_same_version_in_the_processes_that_it_starts() -> None:
    assert code_version("__main__") == code_version("__mp_main__") == {}


@pytest.mark.usefixtures("serial")
def test_levels_in_another_order_are_the_same_study(folder: Path) -> None:
    path = folder / "s.sqlite"
    begin(path).close()
    run_study(Grid.parse(TEXT.replace("[0.1, 0.5]", "[0.5, 0.1]")), path, run_batch=run_batch)
    assert recorded(path) == 24


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_a_damaged_specification_is_told_with_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.sqlite"
    begin(path).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE runs SET spec = ? WHERE position = 3", (text,))
    connection.commit()
    connection.close()
    with StudyDatabase(path) as database:
        for read in (database.specs, database.waiting):
            with pytest.raises(StudyError, match=r"s\.sqlite: .*the file is damaged; restore a copy of it"):
                read()


def test_a_worker_with_another_version_is_refused() -> None:
    version = current_version("study_networks", ["digits"])
    work = module._Work(run_batch, {**version, "packages": {**version["packages"], "torch": "1.0"}})
    with pytest.raises(StudyError, match=r"a worker differs from the driver \(packages: torch was 1\.0 and is"):
        list(work(GRID.runs()[:1], lambda fraction: None))


def test_differences_of_equal_versions_are_none() -> None:
    version = current_version("study_networks", ["digits"])
    assert differences(version, version) == []
    assert "flatminima.study.run_spec" in version["code"]
    assert "study_networks" in version["code"]


@pytest.mark.usefixtures("serial")
def test_another_grid_is_refused_and_shown_and_more_seeds_only_on_purpose(folder: Path) -> None:
    path = folder / "s.sqlite"
    begin(path).close()
    with pytest.raises(
        StudyError, match=r"24 networks of this file are not in it and 24 of its 24 .*data\.rows 100 there and 99 now"
    ):
        run_study(Grid.parse(TEXT.replace("rows = 100", "rows = 99")), path, run_batch=run_batch)
    more = Grid.parse(TEXT.replace("count = 12", "count = 13"))
    with pytest.raises(
        StudyError, match=r"2 networks of this file are not in it and 0 of its 24 .*first .*seed 12\).*--extend"
    ):
        run_study(more, path, run_batch=run_batch)
    run_study(more, path, extend=True, run_batch=run_batch)
    with StudyDatabase(path) as database:
        assert database.counts()["waiting"] == 0
        assert len(database.records()) == 26
        assert database.meta("extended") == [{"added": 2, "recorded": 0}]
    with pytest.raises(StudyError, match=r"0 networks of this file are not in it and 2 of its 26"):
        run_study(GRID, path, extend=True, run_batch=run_batch)


def test_a_file_that_is_no_study_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, other, newer = tmp_path / "text", tmp_path / "other.sqlite", tmp_path / "newer.sqlite"
    text.write_text("not a database, but longer than the header of one would be" * 10)
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE runs (id)")
    connection.commit()
    connection.close()
    begin(newer).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    for path, said in (
        (text, "file is not a database: expected the file of a study"), (other, "is not the file of a study"),
        (newer, "is a study of schema 9, and this is flatminima for schema 1"), (tmp_path / "none", "is not there"),
        (tmp_path, "is not there"),
    ):  # fmt: skip
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(StudyError, match=said):
            StudyDatabase(path)
        if before is not None:
            with pytest.raises(StudyError, match=said):
                run_study(GRID, path, run_batch=run_batch)
            assert path.read_bytes() == before
    with pytest.raises(StudyError, match="unable to open database file: expected a file that can be read and written"):
        run_study(GRID, tmp_path / "no" / "folder.sqlite", run_batch=run_batch)


def test_meta_data_are_written_once(tmp_path: Path) -> None:
    with begin(tmp_path / "s.sqlite") as database:
        database.set_meta("rules", {"H1": "rho > 0"})
        database.set_meta("rules", {"H1": "rho > 0"})
        with pytest.raises(StudyError, match="holds other 'rules' already"):
            database.set_meta("rules", {"H1": "rho > 0.1"})
        assert database.meta("rules") == {"H1": "rho > 0"}
        assert database.meta("none") is None


@pytest.mark.usefixtures("serial")
def test_an_error_of_a_network_ends_the_study_and_keeps_the_rest(folder: Path) -> None:
    path = folder / "s.sqlite"
    with pytest.raises(ZeroDivisionError):
        run_study(GRID, path, batch=4, run_batch=raising)
    assert 0 < recorded(path) < 24
    with pytest.raises(StudyError, match="gave no record of the runs"):
        run_study(GRID, folder / "t.sqlite", batch=4, run_batch=forgetful)
    for workers, batch in ((0, None), (1, 0)):
        with pytest.raises(StudyError, match="must be at least 1, got 0"):
            run_study(GRID, folder / "u.sqlite", workers=workers, batch=batch, run_batch=run_batch)
    assert not (folder / "u.sqlite").exists()


def raising(specs: Sequence[RunSpec], report: Callable[[float], None]) -> Iterator[Record]:
    for spec in specs:
        yield record_of(spec)
        if spec.seed == 5:
            raise ZeroDivisionError("a bug")


def forgetful(specs: Sequence[RunSpec], report: Callable[[float], None]) -> list[Record]:
    return [record_of(spec) for spec in specs[:-1]]
