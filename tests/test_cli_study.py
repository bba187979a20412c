from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest

from conftest import Outcome
from flatminima.protocols.study_files import SHIPPED
from flatminima.study.database import StudyDatabase, StudyError
from flatminima.study.export import run_table, write_table
from flatminima.study.grid import Grid
from flatminima.study.status import cautions
from study_fixture import GRID, TEXT, begin
from study_networks import record_of

Run = Callable[..., Outcome]

TINY = """\
schema = 1
name = "tiny"
[data]
name = "digits"
rows = 100
probes = 5
[model]
name = "mlp"
hidden = [8]
[stop]
rule = "accuracy"
[seeds]
count = 12
[[measures]]
name = "trace"
[[measures]]
name = "parameter_norm"
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """All runs but the last are recorded."""
    path = tmp_path / "s.sqlite"
    with begin(path) as database:
        for spec in GRID.runs()[:-1]:
            database.save(record_of(spec))
    return path


def test_a_study_from_its_template_to_its_page(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    made = run("study", "new", file)
    assert (made.status, made.out.strip()) == (0, str(file))
    grid = Grid.read(file)
    assert (grid.name, len(grid.runs())) == ("my-study", 80)
    assert run("study", "new", file).err.startswith(f"error: {file} is there already")
    file.write_text(TINY)
    trained = run("study", "run", file, "--workers", 1, "--rules", "weakness")
    assert (trained.status, trained.out.split("\n")[0]) == (0, "tiny: 12 finished")
    database = tmp_path / "mine.sqlite"
    again = run("study", "run", file, "--workers", 1, "--rules", "weakness")
    assert again.out == trained.out
    with StudyDatabase(database) as opened:
        assert opened.meta("rules")["study"] == "tiny"
        assert opened.meta("rules")["written"]
    status = run("study", "status", database)
    assert "tiny: 12 networks: 12 finished" in status.out
    written = ("--json", tmp_path / "r.json", "--table", tmp_path / "r.md")
    reported = run("study", "report", database, "--draws", 200, *written)
    assert reported.status == 0, reported.err
    assert "flatminima study report" in (tmp_path / "r.md").read_text()
    assert "<html" in (tmp_path / "mine.html").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["counts"]["finished"] == 12
    assert "H1 undecided" in reported.out
    other = run("study", "run", file, "--rules", "batch")
    assert (other.status, "holds other 'rules' already" in other.err) == (2, True)


def test_shipped_studies_are_listed_and_written(run: Run, tmp_path: Path) -> None:
    listed = run("study", "new", "--list").out
    assert all(f"{name}: " in listed for name in SHIPPED)
    assert run("study", "new", tmp_path / "e3.toml", "--from", "pair-proxy-mnist").status == 0
    assert len(Grid.read(tmp_path / "e3.toml").runs()) == 100
    assert "unknown shipped study 'pair-proxi-mnist': expected one of pair-proxy-mnist" in (
        run("study", "new", tmp_path / "x.toml", "--from", "pair-proxi-mnist").err
    )
    assert "expected flatminima study new FILE.toml" in run("study", "new").err


def test_a_mistake_in_the_file_is_told_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(TINY.replace("rows = 100", "rows = 0"))
    outcome = run("study", "run", file)
    assert outcome.status == 2
    assert outcome.err == f"error: {file}:5: data.rows: got 0, expected greater than or equal to 1\n"
    assert list(tmp_path.iterdir()) == [file]


def test_status_tells_cells_reasons_and_processes(run: Run, study: Path) -> None:
    with StudyDatabase(study) as database:
        database.claims.take([GRID.runs()[-1].id])
        text = run("study", "status", study, "--check").out
        found = json.loads(run("study", "status", study, "--json").out)
    assert "tiny: 24 networks: 1 waiting, 19 finished, 2 missed, 2 failed" in text
    assert "2 missed: loss 0.3 after 500 epochs" in text
    assert "2 failed: the loss is NaN from epoch 2 on" in text
    assert "works on 1 of them" in text
    assert found["cells"] == [
        {"factors": {"lr": 0.1}, "waiting": 0, "finished": 10, "missed": 1, "failed": 1},
        {"factors": {"lr": 0.5}, "waiting": 1, "finished": 9, "missed": 1, "failed": 1},
    ]
    assert (found["rules"], found["extended"], len(found["versions"])) == (None, [], 1)
    assert run("study", "status", study.parent / "none").status == 2


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_every_planned_run_is_a_row_of_the_export(run: Run, study: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"runs{suffix}"
    assert run("study", "export", study, "--out", path).status == 0
    table = pyarrow.csv.read_csv(path) if suffix == ".csv" else pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    assert [row["run"] for row in rows] == [spec.id for spec in GRID.runs()]
    assert [row["status"] for row in rows].count("waiting") == 1
    for row, spec in zip(rows, GRID.runs()[:-1], strict=False):
        record = record_of(spec)
        assert (row["status"], row["cell.lr"], row["seed"], row["data.rows"]) == (
            record.status,
            spec.factors["lr"],
            spec.seed,
            100,
        )
        assert {name: row[name] for name in record.values} == record.values
        assert row["version"] == 1
        if record.missing:
            assert json.loads(row["missing"]) == record.missing
    assert rows[-1]["test.accuracy"] is None


def test_artefacts_and_the_study_file_are_written(run: Run, study: Path, tmp_path: Path) -> None:
    assert run("study", "export", study, "--artefacts", tmp_path / "a", "--grid", tmp_path / "g.toml").status == 0
    assert (tmp_path / "g.toml").read_text() == TEXT
    spec = GRID.runs()[0]
    assert len(list((tmp_path / "a").iterdir())) == 19
    assert (tmp_path / "a" / f"{spec.id}.weights.safetensors").read_bytes() == record_of(spec).artefacts[
        "weights.safetensors"
    ]


def test_the_history_of_a_file_is_a_caution(run: Run, study: Path) -> None:
    more = Grid.parse(TEXT.replace("count = 12", "count = 13"))
    with StudyDatabase(study) as database:
        assert cautions(database) == []
        database.add_version({"packages": {"torch": "9"}})
        database.save(record_of(GRID.runs()[-1]))
        database.extend(more.runs(), {"extended": [{"added": 2, "recorded": 24}]})
    out = run("study", "report", study, "--draws", 100).out
    assert "careful: tiny: 2 networks were added when 24 had a record" in out
    assert "careful: tiny: the networks were made with 2 versions of code, packages or data" in out


def test_what_cannot_be_exported_or_reported_is_refused(run: Run, study: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("export", study), "nothing to write"),
        (("export", study, "--out", "a.xlsx"), "expected a name that ends in .csv or .parquet"),
        (("export", study, study, "--out", tmp_path / "a.csv"), "networks are given twice, first "),
        (("export", study, study, "--grid", "g.toml"), "--grid takes one database, got 2"),
        (("report", study, "--draws", 3), "--draws must be at least 100, got 3"),
        (
            ("report", study, "--outcome", "test.acuracy"),
            "unknown outcome 'test.acuracy': expected one of test.accuracy",
        ),
        (("run", tmp_path / "none.toml"), "cannot read the study"),
    ):
        outcome = run("study", *arguments)
        assert outcome.status == 2
        assert said in outcome.err
    (tmp_path / "file").write_text("")
    with StudyDatabase(study) as database, pytest.raises(StudyError, match=r"cannot write .*runs\.csv: "):
        write_table(run_table([database]), tmp_path / "file" / "runs.csv")


def test_levels_of_several_types_become_text(tmp_path: Path) -> None:
    text = TEXT.replace("lr = [0.1, 0.5]", 'batch_size = [10, "rows"]\nhidden = [[8], [8, 4]]')
    with begin(tmp_path / "m.sqlite", Grid.parse(text)) as database:
        table = run_table([database])
    assert set(table["cell.batch_size"].to_pylist()) == {"10", "rows"}
    assert set(table["cell.hidden"].to_pylist()) == {"[8]", "[8, 4]"}
