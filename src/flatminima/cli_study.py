"""``flatminima study``: write a study file, run it, look at it, report it, and hand its numbers to other programs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from flatminima.names import unknown
from flatminima.protocols.study_files import SHIPPED, shipped
from flatminima.report.study_page import render_study
from flatminima.report.study_status import status_tables
from flatminima.report.study_tables import study_markdown
from flatminima.study.analysis import analyse
from flatminima.study.bootstrap import DRAWS
from flatminima.study.database import StudyDatabase, StudyError
from flatminima.study.export import check_suffix, run_table, write_artefacts, write_file, write_table
from flatminima.study.grid import Grid
from flatminima.study.preregister import Preregistration, weakness_rules
from flatminima.study.resolution import resolution
from flatminima.study.run_spec import PREDICTIONS
from flatminima.study.run_study import Progress, run_study
from flatminima.study.status import cautions, study_status

app = typer.Typer(
    no_args_is_help=True, help="Grids of trainings: which numbers predict generalisation, and which do not."
)
_out, _err = Console(), Console(stderr=True)
_RULES = ("weakness", "batch")

_Databases = Annotated[list[Path], typer.Argument(metavar="DATABASE...", help="Files of studies, judged together.")]


@app.command()
def new(
    path: Annotated[Path | None, typer.Argument(metavar="FILE.toml", help="To be written.")] = None,
    source: Annotated[str | None, typer.Option("--from", help="A shipped study instead of the template.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the shipped studies.")] = False,
) -> None:
    """Write a study file to start from."""
    if source is not None and source not in SHIPPED:
        raise StudyError(unknown("shipped study", source, SHIPPED))
    if listing:
        for name in SHIPPED:
            grid = shipped(name)
            _out.print(f"{name}: {grid.description} ({len(grid.runs())} networks)", highlight=False, markup=False)
        return
    if path is None:
        raise StudyError("no file to write: expected flatminima study new FILE.toml, or --list")
    if path.exists():
        raise StudyError(f"{path} is there already: expected a new file")
    template = resources.files("flatminima.study") / "template.toml"
    text = template.read_text(encoding="utf-8") if source is None else shipped(source).text
    write_file(path, text.encode())
    _show(path)


@app.command()
def run(
    study: Annotated[str, typer.Argument(metavar="FILE.toml", help="Or the name of a shipped study.")],
    database: Annotated[Path | None, typer.Option(help="The study's one file (default: FILE.sqlite).")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: one per core; on Ray: as many as fit).")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Run on a Ray cluster: host:port, auto or local.")] = None,
    batch: Annotated[int | None, typer.Option(help="Most networks that a worker is given at a time.")] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            help=f"Rules of decision, written down before the first result: {' or '.join(_RULES)}, or a file of them."
        ),
    ] = None,
    extend: Annotated[bool, typer.Option("--extend", help="The file has more networks than the database.")] = False,
    other_version: Annotated[
        bool,
        typer.Option("--other-version", help="Go on with code, packages or data that differ; recorded run by run."),
    ] = False,
) -> None:
    """Train and measure every network of a study; the same command goes on where it was stopped."""
    grid = _grid(study)
    path = database or Path(f"{study}.sqlite" if study in SHIPPED else study).with_suffix(".sqlite")
    meta = {} if rules is None else {"rules": _rules(rules, grid).to_dict()}
    if workers is None and ray is None:
        workers = os.cpu_count() or 1
    try:
        with _bar(grid.name) as progress:
            counts = run_study(
                grid, path, workers=workers, ray=ray, batch=batch, other_version=other_version, extend=extend, meta=meta,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        _err.print(
            f"Stopped. What is finished is kept in {path}; the same command goes on from there.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        sys.exit(130)
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    _out.print(f"{grid.name}: {said}", highlight=False, markup=False)
    _show(path)


@app.command()
def status(
    path: Annotated[Path, typer.Argument(metavar="DATABASE", help="File of a study, which may be running.")],
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Also read the whole file for damage.")] = False,
) -> None:
    """How far a study is: cell by cell, what missed its criterion and why, who works on it, and with which versions."""
    with StudyDatabase(path) as database:
        if check and (damage := database.check()):
            raise StudyError(f"{path} is damaged ({'; '.join(damage[:3])}): restore a copy of it")
        found = study_status(database)
    if as_json:
        _out.print(json.dumps(found, indent=1), highlight=False, markup=False, soft_wrap=True)
    else:
        _out.print(status_tables(found))


@app.command()
def report(
    paths: _Databases,
    out: Annotated[Path | None, typer.Option(help="The page (default: beside the first database, as .html).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all figures there.")] = None,
    table: Annotated[Path | None, typer.Option(help="Also write answer and tables there, as Markdown.")] = None,
    outcome: Annotated[str, typer.Option(help="The value to be predicted; export lists the names.")] = "test.accuracy",
    draws: Annotated[int, typer.Option(help="Resamples of intervals and permutations.")] = DRAWS,
    seed: Annotated[int, typer.Option(help="Of these.")] = 0,
) -> None:
    """Correlations with intervals, verdicts on the rules, caveats: from what the databases hold now, finished or not."""
    if draws < 100:
        raise StudyError(f"--draws must be at least 100, got {draws}")
    with _opened(paths) as databases:
        records = [record for database in databases for record in database.records()]
        planned = sum(sum(database.counts().values()) for database in databases)
        name = ", ".join(str(database.meta("study")) for database in databases)
        rules = _written(databases)
        history = [said for database in databases for said in cautions(database)]
        kept = {
            run: database for database in databases for run, name_ in database.artefact_names() if name_ == PREDICTIONS
        }
        told = resolution(records, lambda run: kept[run].artefact(run, PREDICTIONS) if run in kept else None)
    known = {name for record in records for name in record.values}
    if not records:
        raise StudyError(
            f"{name} has no record yet: expected some finished networks; flatminima study status shows them"
        )
    if outcome not in known:
        raise StudyError(unknown("outcome", outcome, sorted(known)))
    found = analyse(
        records, rules, name=name, planned=planned, outcome=outcome, draws=draws, seed=seed, command=_command()
    )
    found["cautions"] += [entry.caution for entry in told if entry.caution] + history
    for part in found["data"]:
        part["resolved"] = next(({"pairs": e.pairs, "share": e.share} for e in told if e.data == part["name"]), None)
    page = out or paths[0].with_suffix(".html")
    write_file(page, render_study(found).encode())
    if json_path is not None:
        write_file(json_path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    if table is not None:
        write_file(table, study_markdown(found).encode())
    _out.print(found["answer"], highlight=False, markup=False)
    for verdict in found["verdicts"]:
        _out.print(f"{verdict['name']} {verdict['outcome']}: {verdict['reason']}", highlight=False, markup=False)
    for caution in found["cautions"]:
        _out.print(f"careful: {caution}", highlight=False, markup=False)
    for path in (page, json_path, table):
        if path is not None:
            _show(path)


def _written(databases: list[StudyDatabase]) -> Preregistration | None:
    """The rules that were written before the results; studies that are judged together have the same."""
    found = [database.meta("rules") for database in databases]
    read = [None if rules is None else Preregistration.from_json(json.dumps(rules)) for rules in found]
    if len({None if rules is None else rules.digest for rules in read}) > 1:
        raise StudyError("the studies were begun with different rules of decision: report them one by one")
    return read[0]


@app.command()
def export(
    paths: _Databases,
    out: Annotated[Path | None, typer.Option(help="Table of all runs: FILE.csv or FILE.parquet.")] = None,
    artefacts: Annotated[Path | None, typer.Option(help="Folder for weights and predictions, as RUN.NAME.")] = None,
    grid: Annotated[Path | None, typer.Option(help="The study file that the database was made with.")] = None,
) -> None:
    """Write the numbers as CSV or Parquet, the artefacts, or the study file."""
    if out is None and artefacts is None and grid is None:
        raise StudyError(
            "nothing to write: expected --out FILE.csv or FILE.parquet, --artefacts FOLDER or --grid FILE.toml"
        )
    if out is not None:
        check_suffix(out)
    if grid is not None and len(paths) > 1:
        raise StudyError(f"--grid takes one database, got {len(paths)}")
    with _opened(paths) as databases:
        if out is not None:
            write_table(run_table(databases), out)
            _show(out)
        if artefacts is not None:
            for database in databases:
                write_artefacts(database, artefacts)
            _show(artefacts)
        if grid is not None:
            write_file(grid, str(databases[0].meta("grid")).encode())
            _show(grid)


def _grid(study: str) -> Grid:
    return shipped(study) if study in SHIPPED and not Path(study).exists() else Grid.read(Path(study))


def _rules(given: str, grid: Grid) -> Preregistration:
    if given in _RULES:
        data_sets = len({run.data.name for run in grid.runs()})
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return weakness_rules(grid.name, data_sets=data_sets, batch=given == "batch", written=now)
    try:
        return Preregistration.from_json(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(
            f"--rules {given}: {error.strerror or error}; expected {', '.join(_RULES)} or a file of rules"
        ) from error


@contextmanager
def _opened(paths: list[Path]) -> Iterator[list[StudyDatabase]]:
    with ExitStack() as stack:
        yield [stack.enter_context(StudyDatabase(path)) for path in paths]


@contextmanager
def _bar(name: str) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    bar = Bar(*columns, console=_err)
    task = bar.add_task(name, total=None)

    def progress(now: Progress) -> None:
        bar.start()  # not before the first report: a refusal is one line
        waits = "  waiting for another process" if now.elsewhere else ""
        bar.update(
            task, total=now.total, completed=now.recorded + now.underway,
            description=f"{name}  {now.recorded}/{now.total} networks{waits}",
        )  # fmt: skip

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def _show(path: Path) -> None:
    _out.print(str(path.resolve()), highlight=False, markup=False, soft_wrap=True)


def _command() -> str:
    return shlex.join(["flatminima", *sys.argv[1:]])
