"""The command line; the only place of the library that prints."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import flatminima
from flatminima import cli_audit, cli_f2m, cli_measure, cli_study, cli_swad, cli_symmetries
from flatminima.data import DATASETS, DOMAIN_DATASETS, INCREMENTAL_DATASETS, DataError
from flatminima.measures import GROUPS, MeasureOptions, resolve
from flatminima.models import MODELS
from flatminima.names import unknown
from flatminima.objective import SECOND_ORDER, NonFiniteLossError, Objective, ObjectiveError
from flatminima.protocols import (
    reproduce_convex,
    reproduce_factorization,
    reproduce_reparameterization,
    reproduce_vanishing,
    reproduce_weakness,
)
from flatminima.protocols.reparameterization import DATA as REPARAMETERIZATION_DATA
from flatminima.protocols.weakness import DATA as WEAKNESS_DATA
from flatminima.report import render
from flatminima.report.compare_markdown import compare_markdown
from flatminima.report.convex_page import render_convex, zoo_table
from flatminima.report.factorization_page import render_factorization
from flatminima.report.measure_list import invariance_table, kinds_table
from flatminima.report.reparameterization_page import render_reparameterization
from flatminima.report.terminal import audit_tables, compare_table, measurement_tables, reproduction_tables
from flatminima.report.vanishing_page import render_vanishing
from flatminima.report.weakness_page import render_weakness
from flatminima.study.audit_settings import AuditSettings
from flatminima.study.checkpoint import CheckpointError, load_weights
from flatminima.study.compare import compare as run_compare
from flatminima.study.measure_settings import MATRICES
from flatminima.study.methods import AVERAGES, OPTIMIZERS
from flatminima.study.settings import DEFAULT_EPOCHS, CompareSettings, SettingsError
from flatminima.study.store import StoreError, write_json, write_text
from flatminima.study.target import Target, TargetError, first_rows, load_target
from flatminima.study.user_code import in_a_line, user_line
from flatminima.symmetries import KINDS

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
_reproduce = typer.Typer(no_args_is_help=True, help="Run a published experiment again and compare.")
app.add_typer(_reproduce, name="reproduce")
app.add_typer(cli_study.app, name="study")
_out, _err = Console(), Console(stderr=True)

# What a user can mend: said in one line, without a traceback.
_USER_ERRORS = (
    SettingsError, DataError, StoreError, CheckpointError, TargetError, ObjectiveError, NonFiniteLossError, ValueError,
)  # fmt: skip


def main() -> None:
    """Entry point: exit status 0, 2 for a mistake the user can mend (in their own code: its line), 130 after Ctrl-C."""
    try:
        app()
    except Exception as error:
        where = user_line(error, called_by_us=True)
        if where is None and not isinstance(error, _USER_ERRORS):
            raise
        message = str(error) if where is None else f"{where}: {in_a_line(error)}"
        _err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        _out.print(f"flatminima {flatminima.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Seek flat minima, measure flatness with error bars, judge whether the number means anything."""


_DEFAULTS = CompareSettings()


@app.command()
def compare(
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(DATASETS)}.")] = _DEFAULTS.data,
    model: Annotated[str, typer.Option(help=f"Network: {', '.join(MODELS)}.")] = _DEFAULTS.model,
    methods: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated; the others are compared to the first. Optimisers: {', '.join(OPTIMIZERS)}. Averages: "
            f"{', '.join(AVERAGES)}. Both: OPTIMISER+AVERAGE, as in asam+ema. all: each optimiser and each average."
        ),
    ] = ",".join(_DEFAULTS.methods),
    seeds: Annotated[int, typer.Option(help="Runs per method.")] = _DEFAULTS.seeds,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes of SGD over the training set (default {DEFAULT_EPOCHS}).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of SGD, instead of --epochs.")] = None,
    budget: Annotated[
        str, typer.Option(help="What is equal across methods: gradients (SAM takes half the steps) or steps.")
    ] = _DEFAULTS.budget,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = _DEFAULTS.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = _DEFAULTS.lr,
    momentum: Annotated[float, typer.Option(help="Of SGD.")] = _DEFAULTS.momentum,
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = _DEFAULTS.weight_decay,
    schedule: Annotated[
        str, typer.Option(help="Learning rate: constant (as SWAD assumes) or cosine.")
    ] = _DEFAULTS.schedule,
    rho: Annotated[
        float, typer.Option(help="Radius of SAM and its variants (ASAM: ten times it), and of SAM sharpness.")
    ] = _DEFAULTS.rho,
    tolerance: Annotated[
        float, typer.Option(help="Rise of the validation loss that ends SWAD's valley.")
    ] = _DEFAULTS.tolerance,
    train_size: Annotated[int | None, typer.Option(help="Training rows to keep (default all).")] = None,
    data_seed: Annotated[int, typer.Option(help="Seed of the split, the same for all runs.")] = _DEFAULTS.data_seed,
    monitor_rows: Annotated[
        int | None, typer.Option(help="Validation rows behind the loss that SWAD watches (default 2000).")
    ] = None,
    measure_rows: Annotated[int, typer.Option(help="Training rows the measures see.")] = _DEFAULTS.measure_rows,
    audit_rows: Annotated[int, typer.Option(help="Training rows the audit sees.")] = _DEFAULTS.audit_rows,
    audit_members: Annotated[
        int, typer.Option(help="Random members per symmetry; 0: no audit.")
    ] = _DEFAULTS.audit_members,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = _DEFAULTS.device,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one per core, 1 on a GPU).")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results; the same command resumes there.")] = Path(
        "runs/compare"
    ),
) -> None:
    """Train with several methods, measure and audit the minima, and write a report."""
    settings = CompareSettings(
        data=data, model=model, methods=tuple(m.strip() for m in methods.split(",") if m.strip()), seeds=seeds,
        epochs=epochs, steps=steps, budget=budget, batch_size=batch_size, lr=lr, momentum=momentum,
        weight_decay=weight_decay, schedule=schedule, rho=rho, tolerance=tolerance, train_size=train_size,
        data_seed=data_seed, monitor_rows=monitor_rows, measure_rows=measure_rows, audit_rows=audit_rows,
        audit_members=audit_members, device=str(_device(device)),
    )  # fmt: skip
    if workers is not None and workers < 1:
        raise SettingsError(f"--workers must be at least 1, got {workers}")
    processes = workers if workers is not None else 1 if settings.device != "cpu" else os.cpu_count() or 1
    runs = len(settings.methods) * settings.seeds
    done: dict[str, float] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=_err)
    task = bar.add_task(f"{runs} runs", total=runs)

    def progress(run: str, fraction: float) -> None:
        bar.start()  # not before the first report: a refusal is one line
        done[run] = max(fraction, done.get(run, 0.0))
        finished = sum(f >= 1 for f in done.values())
        running = [name for name, f in done.items() if 0 < f < 1]
        bar.update(task, completed=sum(done.values()), description=f"{finished}/{runs} runs  {' '.join(running[:3])}")

    try:
        try:
            results = run_compare(settings, out, workers=processes, progress=progress)
        finally:
            if bar.live.is_started:
                bar.stop()
    except KeyboardInterrupt:
        _err.print(
            f"Stopped. What is finished is kept in {out}; the same command goes on from there.",
            highlight=False, markup=False,
        )  # fmt: skip
        sys.exit(130)
    page = out / "report.html"
    write_text(page, render(results))
    write_text(out / "table.md", compare_markdown(results))
    _out.print(compare_table(results))
    _out.print(str((out / "results.json").resolve()), highlight=False, markup=False, soft_wrap=True)
    _out.print(str(page.resolve()), highlight=False, markup=False, soft_wrap=True)


_Reference = Annotated[
    str, typer.Argument(metavar="FILE.py:FUNCTION", help="Returns (model, loss_fn, data); loss_fn may be None.")
]
_Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights: safetensors, or a state_dict from torch.save. Pickles are refused.")
]
_MEASURES_HELP = f"Comma-separated names (flatminima measures lists them) or {', '.join(GROUPS)}"
_Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Of the measures, such as micro_batch=64; repeat."),
]
_Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers there.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]


@app.command()
def measure(
    reference: _Reference,
    checkpoint: _Checkpoint = None,
    measures: Annotated[str | None, typer.Option(help=f"{_MEASURES_HELP}, or none; 'default' by default.")] = None,
    option: _Option = None,
    rho: Annotated[float, typer.Option(help="Radius of SAM sharpness.")] = MeasureOptions.rho,
    adaptive_rho: Annotated[float, typer.Option(help="Radius of adaptive sharpness.")] = MeasureOptions.adaptive_rho,
    radius: Annotated[float, typer.Option(help="Length of random displacements.")] = MeasureOptions.radius,
    top: Annotated[int | None, typer.Option(help="So many of the largest eigenvalues.")] = None,
    smallest: Annotated[
        int | None, typer.Option(help="So many of the smallest eigenvalues; slow where many are 0.")
    ] = None,
    density: Annotated[bool, typer.Option("--density", help="Density of all eigenvalues, with a band.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="The trace, exact where the network allows it.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Top eigenvalue and trace of every layer.")] = False,
    matrix: Annotated[str, typer.Option(help=f"Of which matrix: {', '.join(MATRICES)}.")] = "hessian",
    rtol: Annotated[
        float | None, typer.Option(help="Relative error asked of eigenvalues (default 1e-3); of the measures, 0.02.")
    ] = None,
    trace_rtol: Annotated[
        float | None, typer.Option(help="Relative standard error asked of traces (default 0.01).")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Of the density (default 10).")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each run of the density (default 30).")] = None,
    rows: Annotated[int | None, typer.Option(help="Use the first so many rows of the data.")] = None,
    max_products: Annotated[
        int | None, typer.Option(help="Of the measured eigenvalue (default 60) and of --smallest, at most.")
    ] = None,
    max_probes: Annotated[int, typer.Option(help="Of the measured trace, at most.")] = MeasureOptions.max_probes,
    second_order: Annotated[str, typer.Option(help=f"How products are formed: {', '.join(SECOND_ORDER)}.")] = "auto",
    max_memory: Annotated[str, typer.Option(help="For kept graphs: bytes, or such as 512M or 2G.")] = "2G",
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    device: _Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Directory of measure.json and of the page, report.html.")] = None,
    json_path: _Json = None,
) -> None:
    """Measure one minimum: each number with its error and its cost; eigenvalues, trace, density and layers as asked for."""
    options = MeasureOptions(
        rho=rho, adaptive_rho=adaptive_rho, radius=radius, max_probes=max_probes,
        rtol=MeasureOptions.rtol if rtol is None else rtol,
        max_products=MeasureOptions.max_products if max_products is None else max_products,
    ).assigned(option or [])  # fmt: skip
    names = [] if measures == "none" else _names(measures)
    settings = cli_measure.settings(
        names=names, options=options, top=top, smallest=smallest, density=density,
        trace=trace, layers=layers, matrix=matrix, rtol=rtol, trace_rtol=trace_rtol, runs=runs, steps=steps,
        max_products=max_products, seed=seed,
    )  # fmt: skip
    memory = cli_measure.size(max_memory)
    _check_json(json_path)
    cli_measure.check_out(out)
    target = _target(reference, checkpoint, device)
    data = target.data if rows is None else first_rows(target.data, rows)
    objective = Objective(target.model, target.loss_fn, data, second_order=second_order, max_memory=memory)
    cli_measure.refuse_inapplicable(objective, names or [])
    command = shlex.join(["flatminima", *sys.argv[1:]])
    found = cli_measure.run(objective, settings, command, _err, target.probes)
    _out.print(measurement_tables(found))
    cli_measure.save(found, out, json_path, _out)


@app.command("measures")
def list_measures(
    markdown: Annotated[bool, typer.Option("--markdown", help="The tables of docs/measures.md instead.")] = False,
) -> None:
    """List the measures: what they cost, and what reparameterisations they survive."""
    if markdown:
        _out.print(f"{kinds_table()}\n\n{invariance_table()}", highlight=False, markup=False, soft_wrap=True)
    else:
        _out.print(cli_measure.listing())


@app.command()
def audit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE.py:FUNCTION] [WEIGHTS] [WEIGHTS]",
            help="FUNCTION returns (model, loss_fn, data). One checkpoint is audited, two are compared. Checkpoints of a "
            "comparison (DIR/runs/*.safetensors) need no FUNCTION.",
        ),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            help="The same as WEIGHTS: safetensors, or a state_dict from torch.save. Pickles are refused; repeat."
        ),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(help=f"{_MEASURES_HELP}; by default 'default' and what would be used instead of them."),
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(help="Comma-separated kinds of symmetry; by default all that are found.")
    ] = None,
    members: Annotated[
        int | None, typer.Option(help="Random reparameterisations per symmetry (default 5; 2 for each of two).")
    ] = None,
    checks: Annotated[
        int | None,
        typer.Option(help="How many of these check what is declared invariant (default 2; 1 for each of two)."),
    ] = None,
    max_scale: Annotated[float, typer.Option(help="Largest factor of a rescaling.")] = AuditSettings.max_scale,
    mode: Annotated[str, typer.Option(help="eval, or train for batch statistics.")] = AuditSettings.mode,
    option: _Option = None,
    rows: Annotated[int | None, typer.Option(help="Use the first so many rows of the data.")] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    device: _Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Directory of audit.json and of the page, audit.html.")] = None,
    json_path: _Json = None,
) -> None:
    """Judge which numbers survive a change of coordinates, and which of two minima is flatter, if either."""
    reference, paths = cli_audit.named(arguments or [], checkpoint or [])
    settings = AuditSettings(
        measures=_listed(measures), kinds=_listed(kinds), members=members, checks=checks, max_scale=max_scale, mode=mode,
        options=AuditSettings.options.assigned(option or []), seed=seed,
    )  # fmt: skip
    _check_json(json_path)
    cli_measure.check_out(out)
    found, target = cli_audit.minima(reference, paths, _device(device))
    data = cli_audit.rows(target, rows)
    results = cli_audit.run(found, target, data, settings, shlex.join(["flatminima", *sys.argv[1:]]), _err)
    _out.print(audit_tables(results))
    cli_audit.save(results, out, json_path, _out)


@app.command()
def symmetries(
    reference: _Reference,
    checkpoint: _Checkpoint = None,
    kinds: Annotated[str | None, typer.Option(help=f"Comma-separated; default all: {', '.join(KINDS)}.")] = None,
    mode: Annotated[str, typer.Option(help="eval, or train for batch statistics.")] = "eval",
    rows: Annotated[int, typer.Option(help="Prove on the first so many rows of the first batch.")] = 64,
    device: _Device = "cpu",
    json_path: _Json = None,
) -> None:
    """List the maps of the parameters that change no prediction, layer by layer, and what was looked for and rejected."""
    cli_symmetries.check(kinds, mode, rows)
    _check_json(json_path)
    target = _target(reference, checkpoint, device)
    found = cli_symmetries.search(target, kinds, mode, rows)
    _out.print(cli_symmetries.listing(found, target.model))
    _save(json_path, found.to_dict())


@_reproduce.command("factorization")
def reproduce_factorization_command(
    out: Annotated[Path, typer.Option(help="Directory of results.json and report.html.")] = Path("runs/factorization"),
    seeds: Annotated[int, typer.Option(help="Starts of SAM and of the noisy methods.")] = 3,
) -> None:
    """Deep matrix factorisation: exact sharpness, flattest minima, the escape from a sharp one, and what each method seeks."""
    if seeds < 1:
        raise SettingsError(f"--seeds must be at least 1, got {seeds}")
    results = _reproduced(out, lambda report: reproduce_factorization(seeds, report), render_factorization)
    _out.print(results["answer"], highlight=False, markup=False)
    for group in results["groups"]:
        reproduced = sum(claim["reproduced"] for claim in group["claims"])
        _out.print(f"  {group['title']}: {reproduced} of {len(group['claims'])}", highlight=False, markup=False)
        for claim in group["claims"]:
            if not claim["reproduced"]:
                _out.print(f"    {claim['statement']}: {claim['verdict']}", highlight=False, markup=False)
    _show_files(out)


@_reproduce.command("convex")
def reproduce_convex_command(
    out: Annotated[Path, typer.Option(help="Directory of results.json and report.html.")] = Path("runs/convex"),
) -> None:
    """Convex counterexamples: bad flat minima, how SA-GD and SAM find them, what stability guarantees, and every optimiser."""
    results = _reproduced(out, reproduce_convex, render_convex)
    _out.print(reproduction_tables(results, zoo_table(results["zoo"])))
    _show_files(out)


@_reproduce.command("reparameterization")
def reproduce_reparameterization_command(
    out: Annotated[Path, typer.Option(help="Directory of results.json and report.html.")] = Path(
        "runs/reparameterization"
    ),
    data: Annotated[
        str, typer.Option(help=f"{', '.join(REPARAMETERIZATION_DATA)}; auto: MNIST where it is found.")
    ] = "auto",
) -> None:
    """Rescaled networks: which measures of flatness change while no prediction does, and whether weakness does."""
    if data not in REPARAMETERIZATION_DATA:
        raise SettingsError(unknown("data set", data, REPARAMETERIZATION_DATA))
    results = _reproduced(out, lambda report: reproduce_reparameterization(data, report), render_reparameterization)
    _out.print(reproduction_tables(results))
    _show_files(out)


_Full = Annotated[bool, typer.Option("--full", help="Everything, not a preset: hours, or as far as you let it go.")]
_OnlyRender = Annotated[bool, typer.Option("--render", help="Run nothing: results and page of what is there.")]
_Workers = Annotated[int | None, typer.Option(help="Batches of networks at once (default 1).")]
_Ray = Annotated[str | None, typer.Option(help="Run on a Ray cluster: host:port, auto or local.")]


@_reproduce.command("weakness")
def reproduce_weakness_command(
    out: Annotated[Path, typer.Option(help="Directory; the same command resumes.")] = Path("runs/weakness"),
    data: Annotated[
        str, typer.Option(help=f"{', '.join(WEAKNESS_DATA)}; digits is a smoke run; auto: MNIST where it is found.")
    ] = "auto",
    full: _Full = False,
    workers: _Workers = None,
    ray: _Ray = None,
    only_render: _OnlyRender = False,
) -> None:
    """Weakness and test accuracy: the pair proxy's correlation, beside those of sharpness, margins and norms."""
    if data not in WEAKNESS_DATA:
        raise SettingsError(unknown("data set", data, WEAKNESS_DATA))
    results = _reproduced(
        out,
        lambda report: reproduce_weakness(
            out,
            data=data,
            full=full,
            workers=workers,
            ray=ray,
            run=not only_render,
            command=_study_command(),
            progress=report,
        ),
        render_weakness,
        indent=None,
    )
    _show_study(results, out)


@_reproduce.command("vanishing")
def reproduce_vanishing_command(
    out: Annotated[Path, typer.Option(help="Directory; the same command resumes.")] = Path("runs/vanishing"),
    full: _Full = False,
    workers: _Workers = None,
    ray: _Ray = None,
    only_render: _OnlyRender = False,
) -> None:
    """The vanishing advantage of large batches, with the cells that split batch size from learning rate."""
    results = _reproduced(
        out,
        lambda report: reproduce_vanishing(
            out, full=full, workers=workers, ray=ray, run=not only_render, command=_study_command(), progress=report
        ),
        render_vanishing,
        indent=None,
    )
    _show_study(results, out)


def _study_command() -> str:
    return shlex.join(["flatminima", *(word for word in sys.argv[1:] if word != "--render")])


def _show_study(results: dict[str, Any], out: Path) -> None:
    _out.print(reproduction_tables(results))
    for caution in results["cautions"]:
        _out.print(f"careful: {caution}", highlight=False, markup=False)
    _show_files(out)


_Report = Callable[[str, float], None]


def _reproduced(
    out: Path,
    run: Callable[[_Report], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
    *,
    indent: int | None = 1,
) -> dict[str, Any]:
    """Run with a progress bar and write results and page; a directory that cannot be used is refused before any work.

    Results with hundreds of networks are written without indentation, which would double the file.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot use {out} for results: {error.strerror or error}") from error
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=_err
    ) as bar:
        task = bar.add_task("reproducing", total=1.0)
        results = run(lambda part, fraction: bar.update(task, completed=fraction, description=part))
    write_json(out / "results.json", results, indent=indent)
    write_text(out / "report.html", render(results))
    return results


def _show_files(out: Path) -> None:
    for name in ("results.json", "report.html"):
        _out.print(str((out / name).resolve()), highlight=False, markup=False, soft_wrap=True)


@_reproduce.command("swad")
def reproduce_swad_command(
    data: Annotated[str, typer.Option(help=f"{', '.join(DOMAIN_DATASETS)}, or a folder <domain>/<class>/<file>.")] = (
        "rotated-mnist"
    ),
    targets: Annotated[str, typer.Option(help="Domains to leave out, comma-separated, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="Splits, initial weights and batches of every target.")] = 3,
    algorithms: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(cli_swad.ALGORITHMS)}; averages are read off each.")
    ] = ",".join(cli_swad.ALGORITHMS),
    protocol: Annotated[str, typer.Option(help=f"Named settings: {', '.join(cli_swad.PROTOCOLS)}.")] = "scratch",
    draws: Annotated[int, typer.Option(help="Of DomainBed's random hyper-parameter search; 1: defaults only.")] = 1,
    model: Annotated[
        str | None, typer.Option(help=f"{', '.join(MODELS)} or resnet50 (default: the protocol's).")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Of mnist-cnn, resnet-gn and resnet18.")] = None,
    freeze_batchnorm: Annotated[
        bool | None,
        typer.Option("--freeze-batchnorm/--train-batchnorm", help="Of resnet50: keep BatchNorm's statistics, or not."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of resnet50: a file, torchvision:NAME, transformers:NAME, or none.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of a run.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images of every source domain in a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of Adam, constant.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Rise of the validation loss that ends SWAD's valley.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side, for pictures.")] = None,
    rows: Annotated[int | None, typer.Option(help="Images of each domain to keep (default all).")] = None,
    data_seed: Annotated[int | None, typer.Option(help="Of MNIST's environments; the same for all runs.")] = None,
    device: _Device = "cpu",
    workers: Annotated[int | None, typer.Option(help="Runs at once (default 1; on a cluster as many as fit).")] = None,
    ray: Annotated[str | None, typer.Option(help="Run on a Ray cluster: host:port, auto or local.")] = None,
    beside: Annotated[
        str | None, typer.Option(help="results.json of other data sets, comma-separated: one sign-flip test over all.")
    ] = None,
    only_render: Annotated[
        bool, typer.Option("--render", help="Run nothing: results and page of the runs that are finished.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory (default runs/swad-DATA); the same command resumes.")
    ] = None,
) -> None:
    """SWAD and domain generalisation: leave one domain out, compare averages of the same trainings on it."""
    settings = cli_swad.settings(
        data, protocol, model=model, width=width, freeze_batchnorm=freeze_batchnorm, weights=weights, steps=steps,
        every=every, batch=batch, lr=lr, tolerance=tolerance, size=size, rows=rows, data_seed=data_seed,
        device=str(_device(device)),
    )  # fmt: skip
    cli_swad.run(
        settings, targets=targets, seeds=seeds, algorithms=algorithms, draws=draws, workers=workers, ray=ray, beside=beside,
        run=not only_render, out=out, consoles=(_out, _err),
    )  # fmt: skip


@_reproduce.command("f2m")
def reproduce_f2m_command(
    data: Annotated[
        str,
        typer.Option(help=f"{', '.join(INCREMENTAL_DATASETS)}, or a folder train/<class>/<file>, test/<class>/<file>."),
    ] = "fashion-mnist",
    methods: Annotated[str, typer.Option(help=f"Comma-separated, or all: {', '.join(cli_f2m.METHODS)}.")] = ",".join(
        cli_f2m.DEFAULT_METHODS
    ),
    seeds: Annotated[
        int, typer.Option(help="Base networks of every kind; a seed decides class order and shots too.")
    ] = 3,
    draws: Annotated[int, typer.Option(help="Of shots, within every seed.")] = 5,
    protocol: Annotated[str, typer.Option(help=f"Named settings: {', '.join(cli_f2m.PROTOCOLS)}.")] = "small",
    split: Annotated[
        str | None, typer.Option(help="JSON file with class order, shots and test rows, for all seeds.")
    ] = None,
    validate: Annotated[
        bool | None, typer.Option("--validate", help="Base images alone, to choose settings on: no test image is read.")
    ] = None,
    base_classes: Annotated[int | None, typer.Option(help="Classes of the first session.")] = None,
    way: Annotated[int | None, typer.Option(help="New classes of every later session.")] = None,
    shot: Annotated[int | None, typer.Option(help="Images of every new class.")] = None,
    sessions: Annotated[int | None, typer.Option(help="After the first (default: as the classes allow).")] = None,
    order: Annotated[str | None, typer.Option(help="Of the classes: random by seed, or sorted.")] = None,
    base_images: Annotated[int | None, typer.Option(help="Of every base class, at most.")] = None,
    test_images: Annotated[int | None, typer.Option(help="Of every class, at most.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Part of the base images that validates (f2m-swad).")] = None,
    model: Annotated[str | None, typer.Option(help=f"{', '.join(MODELS)} (default: the protocol's).")] = None,
    width: Annotated[int | None, typer.Option(help="Of resnet20 and resnet18.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side of stored pictures, for pictures in files.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimiser steps of base training.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of base training.")] = None,
    layers: Annotated[int | None, typer.Option(help="Last convolutions with noise, which the sessions train.")] = None,
    layer_names: Annotated[
        str | None, typer.Option(help="Patterns of parameter names instead, comma-separated.")
    ] = None,
    bound: Annotated[float | None, typer.Option(help="Half width b of the box.")] = None,
    relative: Annotated[
        bool | None, typer.Option("--relative/--absolute", help="b as a part of each tensor's root mean square.")
    ] = None,
    clamp_bound: Annotated[
        float | None, typer.Option(help="Half width that sessions are clamped to, if not b.")
    ] = None,
    noise: Annotated[str | None, typer.Option(help="uniform, beta_grid or beta_grid_released.")] = None,
    draws_per_step: Annotated[int | None, typer.Option(help="M, noise draws of a base training step.")] = None,
    antithetic: Annotated[
        bool | None, typer.Option("--antithetic", help="Draw noise in pairs of opposite signs.")
    ] = None,
    prototype_weight: Annotated[float | None, typer.Option(help="Of prototype fixing.")] = None,
    std_weight: Annotated[float | None, typer.Option(help="Of the deviation over draws (released code: 2).")] = None,
    rho: Annotated[float | None, typer.Option(help="Of SAM.")] = None,
    session_steps: Annotated[int | None, typer.Option(help="Full-batch steps of a session.")] = None,
    session_lr: Annotated[float | None, typer.Option(help="Of these steps.")] = None,
    replay: Annotated[str | None, typer.Option(help="What F2M's sessions see again: none, novel or all.")] = None,
    joint: Annotated[
        str | None, typer.Option(help="Joint networks begin from scratch or from the base network.")
    ] = None,
    joint_iterations: Annotated[int | None, typer.Option(help="Joint steps of a session.")] = None,
    probe_rows: Annotated[int | None, typer.Option(help="Images that flatness is measured on; 0: not at all.")] = None,
    device: _Device = "cpu",
    workers: Annotated[int | None, typer.Option(help="Tasks at once (default 1; on a cluster as many as fit).")] = None,
    ray: Annotated[str | None, typer.Option(help="Run on a Ray cluster: host:port, auto or local.")] = None,
    only_render: Annotated[
        bool, typer.Option("--render", help="Run nothing: results and page of the tasks that are finished.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory (default runs/f2m-DATA); the same command resumes.")
    ] = None,
) -> None:
    """F2M and incremental few-shot learning: train base classes in a flat region, then learn new ones from a few images."""
    settings = cli_f2m.settings(
        data, protocol, split=split, validate=validate, base=base_classes, way=way, shot=shot, sessions=sessions, order=order,
        base_images=base_images, test_images=test_images, held_out=held_out, model=model, width=width, size=size,
        iterations=iterations, lr=lr, layers=layers, layer_names=layer_names, bound=bound, relative=relative,
        clamp_bound=clamp_bound, noise=noise, draws=draws_per_step, antithetic=antithetic, prototype_weight=prototype_weight,
        std_weight=std_weight, rho=rho, session_steps=session_steps, session_lr=session_lr, replay=replay, joint=joint,
        joint_iterations=joint_iterations, probe_rows=probe_rows, device=str(_device(device)),
    )  # fmt: skip
    cli_f2m.run(
        settings, methods=methods, seeds=seeds, draws=draws, workers=workers, ray=ray, run=not only_render, out=out,
        consoles=(_out, _err),
    )  # fmt: skip


def _names(measures: str | None) -> list[str] | None:
    names = _listed(measures)
    resolve(names)
    return None if names is None else list(names)


def _listed(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _target(reference: str, checkpoint: Path | None, device: str) -> Target:
    target = load_target(reference, _device(device))
    if checkpoint is not None:
        load_weights(target.model, checkpoint)
    return target


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _check_json(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        reason = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise StoreError(f"--json {path} cannot be written: {reason}")


def _save(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, json.loads(json.dumps(content), parse_constant=lambda _: None))
        _out.print(str(path.resolve()), highlight=False, markup=False, soft_wrap=True)
