from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatminima.study.grid import Grid, GridError
from flatminima.study.run_spec import RunSpec

TEXT = """\
schema = 1
name = "batch-and-rate"
description = "Is it batch or rate?"

[data]
name = "digits"
rows = 250

[model]
name = "mlp"
hidden = [64, 16]

[optimiser]
lr = 0.1

[stop]
rule = "loss"
threshold = 0.01

[seeds]
first = 5
count = 3
subsets = [42, 43]

[factors]
lr = [0.05, 0.5]

[factors.batch]
small = { batch_size = 32 }
large = { batch_size = "min(rows, 4096)", stop.max_epochs = 900 }

[[when]]
where = { batch = "large", lr = 0.05 }
set = { max_epochs = 2000 }

[[when]]
where = { batch = "small", lr = [0.5] }
skip = true

[[measures]]
name = "trace"
orbit = true

[[measures]]
name = "hutchinson_trace"
label = "hutchinson-30"
repeats = 2
options = { max_probes = 30 }
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(GridError) as caught:
        Grid.parse(text, "s.toml")
    return str(caught.value).split("\n")


def test_a_grid_becomes_its_networks() -> None:
    grid = Grid.parse(TEXT)
    assert grid.factors == {"lr": (0.05, 0.5), "batch": ("small", "large")}
    assert [dict(cell.levels) for cell in grid.cells] == [
        {"lr": 0.05, "batch": "small"}, {"lr": 0.05, "batch": "large"}, {"lr": 0.5, "batch": "large"},
    ]  # fmt: skip
    runs = grid.runs()
    assert len(runs) == 3 * 2 * 3
    assert [(r.data.subset_seed, r.seed, r.order_seed) for r in runs[:6]] == [
        (42, 5, 5), (42, 6, 6), (42, 7, 7), (43, 5, 5), (43, 6, 6), (43, 7, 7),
    ]  # fmt: skip
    assert [(c.optimiser.lr, c.optimiser.batch_size, c.stop.max_epochs) for c in grid.cells] == [
        (0.05, 32, 500), (0.05, 250, 2000), (0.5, 250, 900),
    ]  # fmt: skip
    assert runs[0].model.keywords == {"hidden": (64, 16)}
    trace, hutchinson = runs[0].measures
    assert (trace.label, trace.orbit, trace.repeats) == ("trace", True, 1)
    assert (hutchinson.label, dict(hutchinson.options)) == ("hutchinson-30", {"max_probes": 30})
    assert len({run.id for run in runs}) == len(runs)


def test_ids_hold_in_another_process_and_after_json() -> None:
    script = f"from flatminima.study.grid import Grid; print(Grid.parse({TEXT!r}).digest)"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == Grid.parse(TEXT).digest
    for run in Grid.parse(TEXT).runs():
        again = RunSpec.from_dict(json.loads(json.dumps(run.to_dict())))
        assert (again, again.id) == (run, run.id)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_more_seeds_and_levels_leave_the_other_networks_as_they_are(count: int, more: int) -> None:
    small = Grid.parse(TEXT.replace("count = 3", f"count = {count}"))
    large = Grid.parse(TEXT.replace("count = 3", f"count = {count + more}").replace("[0.05, 0.5]", "[0.05, 0.5, 0.7]"))
    assert {run.id for run in small.runs()} < {run.id for run in large.runs()}


def test_the_digest_is_of_what_is_computed() -> None:
    assert Grid.parse(f"# a comment\n{TEXT}").digest == Grid.parse(TEXT).digest
    assert Grid.parse(TEXT.replace("threshold = 0.01", "threshold = 0.02")).digest != Grid.parse(TEXT).digest


def test_cells_may_have_seeds_of_their_own() -> None:
    text = TEXT.replace("small = { batch_size = 32 }", "small = { batch_size = 32, seeds.first = 100, subsets = [7] }")
    small = [run for run in Grid.parse(text).runs() if run.factors["batch"] == "small"]
    assert [(run.seed, run.data.subset_seed) for run in small] == [(100, 7), (101, 7), (102, 7)]
    fixed = Grid.parse(TEXT.replace("first = 5", "first = 5\norder = 3"))
    assert {run.order_seed for run in fixed.runs()} == {3}


def test_networks_of_one_ensemble() -> None:
    grid = Grid.parse(TEXT)
    by_cell = {cell.levels: {r.ensemble for r in grid.runs() if r.cell == cell.levels} for cell in grid.cells}
    assert [len(keys) for keys in by_cell.values()] == [1, 1, 1]
    small, large, fast = by_cell.values()
    assert small != large
    assert large == fast  # the rate may differ within an ensemble


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("schema = 1", "schema = 2", 1, "schema: got 2, expected schema = 1"),
        ('name = "batch-and-rate"', "name = 3", 2, "name: got 3, expected a name of letters"),
        ('description = "Is', 'descripton = "Is', 3, "descripton: unknown table or field 'descripton': expected one of d"),
        ('name = "digits"', 'name = "digit"', 6, "data.name: unknown data set 'digit': expected one of digits"),
        ("rows = 250", "rows = 0", 7, "data.rows: got 0, expected greater than or equal to 1"),
        ("rows = 250", "rows = 2.5", 7, "data.rows: got 2.5, expected a valid integer"),
        ("rows = 250", "rows = true", 7, "data.rows: got True, expected a valid integer"),
        ("rows = 250", "rows = 1797", 7, "data.rows: got 1797, expected at most 1796 of digits"),
        ("rows = 250", "", 5, "data.rows: not given: expected a value"),
        ("rows = 250", "rows = 250\nprobs = 3", 8, "data.probs: unknown field 'probs': expected one of probes"),
        ("rows = 250", "rows = 2020-01-01", 7, "data.rows: got '2020-01-01', expected a valid integer"),
        ('name = "mlp"', 'name = "mpl"', 10, "model.name: unknown model 'mpl': expected one of mlp"),
        ("hidden = [64, 16]", "width = 8", 11, "model.width: unknown option of mlp 'width': expected one of hidden"),
        ("hidden = [64, 16]", "hidden = [64, 0]", 11, "model.hidden: "),
        ("hidden = [64, 16]", 'hidden = "64"', 11, "model.hidden: "),
        ("hidden = [64, 16]", "hidden = [[64], [16]]", 11, "model.hidden: got [[64], [16]], expected a number, a text, or"),
        ("hidden = [64, 16]", "hidden = 64", 11, "model.hidden: cannot be built with hidden = 64: "),
        ("hidden = [64, 16]", "hidden = { a = 1 }", 11, "model.hidden: got {'a': 1}, expected a number, a text, or a list"),
        ("{ batch_size = 32 }", "{ hidden = [[8]] }", 29, "model.hidden (set by factors.batch.small.hidden): got [[8]], "),
        ("rows = 250", "rows = 250\nprobes = 1548", 8, "data.probes: got 1548, expected at most the 1547 unseen rows"),
        ("subsets = [42, 43]", "subsets = [42, 42]", 23, "seeds.subsets[1]: 42 is given twice: expected each once"),
        ("subsets = [42, 43]", "subsets = []", 23, "seeds.subsets: got [], expected at least 1 entry"),
        ('rule = "loss"', "max_epochs = 9223372036854775808", 17, "stop.max_epochs: got 9223372036854775808, expected less"),
        ("max_probes = 30", "max_probes = [30]", 48, "measures[1].options.max_probes: got (30,), expected a whole number"),
        ("max_probes = 30", 'max_probes = "30"', 48, "measures[1].options.max_probes: got '30', expected"),
        ('label = "hutchinson-30"', 'label = "a\\nb"', 46, "measures[1].label: got 'a\\nb', expected a name that can be"),
        ('name = "trace"', 'name = "unseen_patterns"\noptions = { layer = 3 }', 42, "measures[0].options.layer: got 3, "),
        ("schema = 1", "schema = true", 1, "schema: got True, expected schema = 1"),
        ("lr = 0.1", "lr = -1", 14, "optimiser.lr: got -1, expected greater than 0"),
        ("lr = 0.1", "lr = nan", 14, "optimiser.lr: got nan, expected a finite number"),
        ("lr = 0.1", "drops = [0.8]", 14, "optimiser.drops: got [0.8] with schedule 'constant': 'step' needs them"),
        ("lr = 0.1", "drops = [0.8, 3]", 14, "optimiser.drops[1]: got 3, expected less than 1"),
        ('rule = "loss"', 'rule = "los"', 17, "stop.rule: unknown rule 'los': expected one of loss"),
        ('rule = "loss"', 'rule = "never"', 18, "stop.threshold: got 0.01, expected none with rule 'never'"),
        ("threshold = 0.01", "threshold = 0", 18, "stop.threshold: got 0.0, expected a loss above 0"),
        ("count = 3", "count = 0", 22, "seeds.count: got 0, expected greater than or equal to 1"),
        ("subsets = [42, 43]", "subsets = [42, -1]", 23, "seeds.subsets[1]: got -1, expected greater than or equal to 0"),
        ("lr = [0.05, 0.5]", "lr = []", 26, "factors.lr: has no level"),
        ("lr = [0.05, 0.5]", "lr = 3", 26, "factors.lr: got 3, expected a list of levels"),
        ("lr = [0.05, 0.5]", "lr = [0.05, 0.05]", 26, "factors.lr[1]: level 0.05 is given twice"),
        ("lr = [0.05, 0.5]", "lr = [0.05, 0.5]\nwidth = [3, 4]", 27, "factors.width: 'width' is a field of no table, and no"),
        ("lr = [0.05, 0.5]", "lr = [0.05, 0.5]\nname = ['a']", 27, "factors.name: 'name' is ambiguous: expected one of data."),
        ("{ batch_size = 32 }", "{ batch_size = 320 }", 29, "optimiser.batch_size (set by factors.batch.small.batch_size)"),
        ("{ batch_size = 32 }", '{ batch_size = "max(rows, 3)" }', 29, "optimiser.batch_size (set by factors.batch.small."),
        ("{ batch_size = 32 }", "32", 29, "factors.batch.small: got 32, expected a table of fields"),
        ("stop.max_epochs = 900", "stop.max_epoch = 900", 30, "factors.batch.large.stop.max_epoch: unknown field 'max_epoch'"),
        ("lr = 0.05 }", "lr = 0.06 }", 33, "when[0].where.lr: 0.06 is no level of it: expected one of 0.05, 0.5"),
        ("lr = 0.05 }", "rate = 0.05 }", 33, "when[0].where.rate: unknown factor 'rate'"),
        ("skip = true", "skip = false", 36, "when[1]: expected either set = { ... } or skip = true"),
        ('name = "trace"', 'name = "trase"', 41, "measures[0].name: unknown measure 'trase': expected one of trace"),
        ("orbit = true", "orbit = 1", 42, "measures[0].orbit: got 1, expected a valid boolean"),
        ('label = "hutchinson-30"', 'label = "trace"', 46, "measures[1].label: 'trace' is the second of this name"),
        ("max_probes = 30", "probes = 30", 48, "measures[1].options.probes: unknown option of the measures 'probes'"),
        ("max_probes = 30", "max_probes = 3", 48, "measures[1].options: max_probes must be at least 10, got 3"),
        ('name = "hutchinson_trace"', 'name = "pair_proxy"', 48, "measures[1].options.max_probes: pair_proxy takes no options"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_line_and_field(old: str, new: str, line: int, said: str) -> None:
    assert old in TEXT
    first = mistakes(TEXT.replace(old, new, 1))[0]
    assert first.startswith(f"s.toml:{line}: {said}")


def test_all_mistakes_are_told_at_once_and_each_once() -> None:
    text = TEXT.replace("rows = 250", "rows = -1").replace("lr = [0.05, 0.5]", "lr = [0.05, 0.5, 'fast']")
    assert [line.split(" ")[0] for line in mistakes(text)] == ["s.toml:7:", "s.toml:26:"]


def test_not_toml_and_not_a_file(tmp_path: Path) -> None:
    assert "s.toml: not TOML: " in mistakes("name = \n")[0]
    assert "line 1" in mistakes("name = \n")[0]
    with pytest.raises(GridError, match=r"cannot read the study .*none\.toml: No such file"):
        Grid.read(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(GridError, match="not UTF-8 text"):
        Grid.read(tmp_path / "latin.toml")


def test_what_is_not_given_is_told() -> None:
    assert [line.split(": ")[1] for line in mistakes("")] == ["file", "file", "name", "schema"]


def test_a_factor_without_effect_is_refused() -> None:
    text = TEXT.replace('batch_size = "min(rows, 4096)", stop.max_epochs = 900', "batch_size = 32")
    text = text[: text.index("[[when]]")] + text[text.index("[[measures]]") :]
    assert mistakes(text)[0].startswith("s.toml:28: factors.batch: has no effect: the cells lr = 0.05, batch = 'small'")


def test_a_condition_that_is_never_met_and_an_empty_study_are_refused() -> None:
    text = TEXT.replace('where = { batch = "small", lr = [0.5] }', 'where = { batch = ["small", "large"] }')
    assert "every cell is skipped" in mistakes(text)[0]
    assert "more than 1,000,000" in mistakes(TEXT.replace("count = 3", "count = 900000"))[0]


def test_factors_without_one_are_one_cell() -> None:
    text = TEXT[: TEXT.index("[factors]")]
    assert [cell.levels for cell in Grid.parse(text).cells] == [()]


def test_no_network_is_in_two_cells() -> None:
    """Seeds and subsets may be factors too, and then overlap: the networks that are in both cells would count twice."""
    text = TEXT[: TEXT.index("[factors]")]
    for levels in ("first = [0, 1]", "count = [2, 3]", "subsets = [[1, 2], [2, 3]]"):
        assert mistakes(f"{text}[factors]\n{levels}")[0].startswith("s.toml:26: factors."), levels
        assert "the same networks" in mistakes(f"{text}[factors]\n{levels}")[0]
    assert len(Grid.parse(f"{text}[factors]\nfirst = [0, 3]").runs()) == 12


def test_a_factor_that_its_schedule_does_not_read_is_refused() -> None:
    text = TEXT[: TEXT.index("[factors]")]
    assert "factors.drop_factor: has no effect" in mistakes(f"{text}[factors]\ndrop_factor = [0.1, 0.5]")[0]


def test_conditions_that_contradict_each_other_are_refused() -> None:
    other = 'where = { batch = "large" }\nset = { stop.max_epochs = 700 }'
    text = TEXT.replace('where = { batch = "small", lr = [0.5] }\nskip = true', other)
    assert mistakes(text)[0].startswith(
        "s.toml:38: when[1].set.stop.max_epochs: sets stop.max_epochs to 700, and when[0].set.max_epochs to 2000, where"
    )
    Grid.parse(text.replace("700", "2000"))


def test_a_list_over_thousands_of_lines_is_read_in_a_moment() -> None:
    lines = "".join(f"    {seed},\n" for seed in range(4000))
    start = time.perf_counter()
    grid = Grid.parse(TEXT.replace("subsets = [42, 43]", f"subsets = [\n{lines}]"))
    assert time.perf_counter() - start < 5
    assert len(grid.cells[0].subsets()) == 4000


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert Grid.read(tmp_path / "s.toml").digest == Grid.parse(TEXT).digest
