"""What a cell of a study must satisfy beyond the types of its fields."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flatminima.measures import MEASURES, MeasureOptions
from flatminima.models import MODELS, build, options_of
from flatminima.names import unknown
from flatminima.study.grid_errors import Problems
from flatminima.study.run_spec import (
    OPTIMISERS,
    SCALES,
    SCHEDULES,
    STOP_RULES,
    SUBSET_RULES,
    DataSpec,
    MeasureSpec,
    ModelSpec,
    OptimiserSpec,
    StopSpec,
)
from flatminima.study.study_measures import STUDY_MEASURES, hidden_layers, wrong_options
from flatminima.study.toml_lines import Path

# Data sets that studies know: shape of a picture, most rows for training, classes, rows in all. Digits have no test rows of
# their own.
DATA = {
    "digits": ((1, 8, 8), 1796, 10, 1797),
    "mnist": ((1, 28, 28), 60_000, 10, 70_000),
    "fashion-mnist": ((1, 28, 28), 60_000, 10, 70_000),
}


def check_cell(
    data: DataSpec,
    model: ModelSpec,
    optimiser: OptimiserSpec,
    stop: StopSpec,
    places: Mapping[tuple[str, str], Path],
    problems: Problems,
) -> bool:
    """Add what is wrong with a cell; whether nothing is. ``places`` says where each field was set."""
    wrong = False

    def add(table: str, field: str, message: str) -> None:
        nonlocal wrong
        wrong = True
        problems.add(places.get((table, field), (table, field)), message, field=f"{table}.{field}")

    for table, field, given, known, kind in (
        ("data", "name", data.name, DATA, "data set"),
        ("data", "subset_rule", data.subset_rule, SUBSET_RULES, "rule"),
        ("data", "scale", data.scale, SCALES, "scale"),
        ("model", "name", model.name, MODELS, "model"),
        ("optimiser", "name", optimiser.name, OPTIMISERS, "optimiser"),
        ("optimiser", "schedule", optimiser.schedule, SCHEDULES, "schedule"),
        ("stop", "rule", stop.rule, STOP_RULES, "rule"),
    ):
        if given not in known:
            add(table, field, unknown(kind, given, known))
    if wrong:
        return False

    _, most, _, all_rows = DATA[data.name]
    if data.rows > most:
        add("data", "rows", f"got {data.rows}, expected at most {most} of {data.name}")
    elif data.probes > all_rows - data.rows:
        unseen = all_rows - data.rows
        add("data", "probes", f"got {data.probes}, expected at most the {unseen} unseen rows of {data.name}")
    for table, field, rows in (("data", "measure_rows", data.measure_rows), ("stop", "rows", stop.rows)):
        if rows is not None and rows > data.rows:
            add(table, field, f"got {rows}, expected at most the {data.rows} rows of training")
    if optimiser.batch_size > data.rows:
        size = optimiser.batch_size
        add("optimiser", "batch_size", f"got {size}, more than the {data.rows} rows: expected 'min(rows, {size})'")
    if (optimiser.schedule == "step") != bool(optimiser.drops):
        add(
            "optimiser",
            "drops",
            f"got {list(optimiser.drops)} with schedule {optimiser.schedule!r}: 'step' needs them alone",
        )
    if list(optimiser.drops) != sorted(set(optimiser.drops)):
        add("optimiser", "drops", f"got {list(optimiser.drops)}, expected rising fractions")
    if stop.rule == "never" and stop.threshold is not None:
        add("stop", "threshold", f"got {stop.threshold}, expected none with rule 'never'")
    if stop.rule == "accuracy" and not 0 < (stop.threshold or 0) <= 1:
        add("stop", "threshold", f"got {stop.threshold}, expected a fraction above 0 and at most 1")
    if stop.rule == "loss" and not stop.threshold:
        add("stop", "threshold", f"got {stop.threshold}, expected a loss above 0")
    for option in model.keywords:
        if option not in options_of(model.name):
            add("model", option, unknown(f"option of {model.name}", option, options_of(model.name)))
    if not wrong and (reason := _cannot_be_built(model, data.name)):
        first = next(iter(model.keywords), "name")
        add("model", first, reason)
    return not wrong


@functools.cache
def _cannot_be_built(model: ModelSpec, data: str) -> str:
    try:
        _built(model, data)
    except (ValueError, RuntimeError) as error:
        return str(error)
    except TypeError as error:  # Python's own words do not say about what
        options = ", ".join(f"{name} = {value!r}" for name, value in model.options)
        return f"cannot be built with {options}: {error}"
    return ""


@functools.cache
def _built(model: ModelSpec, data: str) -> nn.Module:
    """The network without its numbers."""
    shape, _, classes, _ = DATA[data]
    with torch.device("meta"):
        options: dict[str, Any] = {**model.keywords}
        return build(model.name, shape, classes, **options)


def check_layers(
    measures: Sequence[MeasureSpec], networks: Iterable[tuple[ModelSpec, str]], problems: Problems
) -> None:
    """Add measures of a hidden layer that some network, of a model and a data set, does not have."""
    networks = list(dict.fromkeys(networks))
    for index, measure in enumerate(measures):
        layer = dict(measure.options).get("layer") if measure.name in STUDY_MEASURES else None
        if not isinstance(layer, int):
            continue
        for model, data in networks:
            layers = len(hidden_layers(_built(model, data)))
            if layer > layers:
                problems.add(
                    ("measures", index, "options", "layer"),
                    f"got {layer}, expected at most {layers}, the hidden layers with ReLU of {model.name}",
                )
                break


def check_measures(measures: Sequence[MeasureSpec], path: Path, problems: Problems) -> None:
    """Add what is wrong with the last of these measures, which stands at ``path``."""
    measure = measures[-1]
    if measure.name in STUDY_MEASURES:
        if (wrong := wrong_options(measure)) is not None:
            problems.add((*path, "options", wrong[0]), wrong[1])
        _check_label(measures, path, problems)
        return
    if measure.name not in MEASURES:
        problems.add((*path, "name"), unknown("measure", measure.name, (*MEASURES, *STUDY_MEASURES)))
    known = tuple(field.name for field in dataclasses.fields(MeasureOptions))
    if measure.name == "pair_proxy" and measure.options:  # its probes are those of the data, and it is exact
        problems.add(
            (*path, "options", measure.options[0][0]), "pair_proxy takes no options here: data.probes counts probes"
        )
        return
    for option in dict(measure.options):
        if option not in known:
            problems.add((*path, "options", option), unknown("option of the measures", option, known))
            return
    for option, value in measure.options:
        if (expected := _other_type(option, value)) is not None:
            problems.add((*path, "options", option), f"got {value!r}, expected {expected}")
            return
    try:
        options: dict[str, Any] = dict(measure.options)
        MeasureOptions(**options)
    except (ValueError, TypeError) as error:
        problems.add((*path, "options"), str(error))
    _check_label(measures, path, problems)


def _other_type(option: str, value: object) -> str | None:
    """What the option of a measure would have to be, if it is not."""
    kind = str(next(field.type for field in dataclasses.fields(MeasureOptions) if field.name == option))
    types, words = {
        "int": ((int,), "a whole number"), "str | None": ((str,), "a text"),
    }.get(kind, ((int, float), "a number"))  # fmt: skip
    return None if isinstance(value, types) and not isinstance(value, bool) else words


def _check_label(measures: Sequence[MeasureSpec], path: Path, problems: Problems) -> None:
    measure = measures[-1]
    if not measure.label.strip() or not measure.label.isprintable():
        problems.add((*path, "label"), f"got {measure.label!r}, expected a name that can be printed in one line")
    if any(other.label == measure.label for other in measures[:-1]):
        where = "label" if measure.label != measure.name else "name"
        problems.add((*path, where), f"{measure.label!r} is the second of this name: expected a label of its own")
