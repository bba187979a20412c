"""Verdicts, caveats and figures of studies whose truth is known, because their records were drawn."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from playwright.sync_api import Browser
from scipy import stats

from analysis_fixture import WEAK, measured, record, seeds_study
from flatminima.report.study_page import render_study
from flatminima.report.study_tables import study_markdown, study_tables
from flatminima.study.along_axes import evaluation_rows
from flatminima.study.analysis import analyse
from flatminima.study.association import Association
from flatminima.study.batch_effect import matched_differences, slope_on_rows
from flatminima.study.caveats import of_data
from flatminima.study.preregister import Hypothesis, Preregistration, PreregistrationError, weakness_rules
from flatminima.study.resolution import resolution
from flatminima.study.run_spec import DataSpec, ModelSpec, Record, RunSpec
from flatminima.study.run_table import RunTable, resampling_units
from flatminima.study.subsets import load_subset
from flatminima.study.verdicts import decide


def quick(rules: Preregistration) -> Preregistration:
    return Preregistration(rules.study, rules.hypotheses, rules.outcome, rules.level, 600, rules.seed)


def outcomes(records: list[Record], rules: Preregistration) -> dict[str, str]:
    return {v["name"]: v["outcome"] for v in decide(RunTable(tuple(records)), quick(rules))}


def outcome(records: list[Record], name: str) -> str:
    """Of one hypothesis alone."""
    rules = weakness_rules("s")
    (only,) = (h for h in rules.hypotheses if h.name == name)
    return outcomes(records, Preregistration("s", (only,)))[name]


def both(effects: dict[str, float], n: int = 400) -> list[Record]:
    return seeds_study(n, effects, seed=1) + seeds_study(n, effects, data="fashion-mnist", seed=2, first=n)


@pytest.fixture(scope="module")
def simulated() -> list[Record]:
    return both(WEAK)


# --- verdicts ------------------------------------------------------------------------------------------------------


def test_true_hypotheses_are_supported_and_false_ones_refuted(simulated: list[Record]) -> None:
    assert outcome(simulated, "H1") == "supported"
    assert outcome(both(WEAK | {"measure.pair_proxy": 0.0}), "H1") == "refuted"
    assert outcome(both(WEAK | {"measure.pair_proxy": 0.2}), "H2") == "refuted"
    assert outcome(both(WEAK | {"measure.pair_proxy": 0.85}), "H2") == "supported"
    assert outcome(both(WEAK | {"orbit.trace": -0.5}), "H5") == "refuted"
    assert outcome(both(WEAK | {"measure.orbit_minimal_trace": -0.1}), "H5") == "refuted"


@pytest.mark.slow
def test_that_something_is_nothing_is_shown_with_many_networks_only(simulated: list[Record]) -> None:
    equal = WEAK | {"measure.pair_proxy": 0.5}
    assert outcome(both(equal, 3000), "H3") == "supported"
    assert outcome(both(equal, 60), "H3") == "undecided"
    assert outcome(both(WEAK | {"measure.pair_proxy": 0.9}), "H3") == "refuted"
    assert outcome(both(WEAK, 2000), "H5") == "supported"
    assert outcome(both(WEAK, 150), "H5") == "undecided"


def test_what_cannot_be_decided_says_why(simulated: list[Record]) -> None:
    one = decide(RunTable(tuple(r for r in simulated if r.spec["data"]["name"] == "mnist")), quick(weakness_rules("s")))
    assert {v["name"]: v["outcome"] for v in one}["H1"] == "undecided"
    assert "It asks for 2 data sets; here: mnist." in one[0]["reason"]
    less = [
        Record(r.id, r.spec, r.status, values={k: v for k, v in r.values.items() if "live" not in k}) for r in simulated
    ]
    (first, *_) = decide(RunTable(tuple(less)), quick(weakness_rules("s")))
    assert first["outcome"] == "undecided"
    assert "On mnist there is no live units." in first["reason"]
    assert decide(RunTable(()), quick(weakness_rules("s")))[0]["outcome"] == "undecided"
    few = decide(RunTable(tuple(simulated[:5])), quick(weakness_rules("s")))
    assert "On mnist only 5 networks have everything it needs." in few[0]["reason"]


def test_what_nobody_finished_leaves_its_hypothesis_open(simulated: list[Record]) -> None:
    """A data set or a number of rows that is missing because its networks missed is not one that the rule never asked about."""
    missed = [record(5000 + s, {}, data="digits", status="missed", reason="cap") for s in range(20)]
    (first, *_) = decide(RunTable((*simulated, *missed)), quick(weakness_rules("s")))
    assert (first["outcome"], first["reason"]) == ("undecided", "On digits no network has finished.")
    grid = grid_study({250: 0.0, 6000: 0.0}, 40, 0.0005)
    left = [Record(r.id, r.spec, "missed", "cap", {}) if r.spec["optimiser"]["batch_size"] == 6000 else r for r in grid]
    (batch,) = decide(RunTable(tuple(left)), weakness_rules("grid", batch=True))
    assert [part["outcome"] for part in batch["parts"]] == ["supported"]
    assert batch["outcome"] == "undecided"
    assert "At n = 6,000 on mnist fewer than two seeds have finished" in batch["reason"]
    # One rate of two: the others are compared, and it is said which is not.
    some = [
        Record(r.id, r.spec, "missed", "cap", {})
        if (r.spec["optimiser"]["batch_size"], r.spec["optimiser"]["lr"]) == (6000, 0.05) else r
        for r in grid
    ]  # fmt: skip
    (batch,) = decide(RunTable(tuple(some)), weakness_rules("grid", batch=True))
    assert batch["parts"][1]["note"] == "learning rate 0.5; nothing finished to compare at 0.05"
    assert batch["parts"][0]["note"] == "learning rate 0.05, 0.5"
    assert batch["outcome"] == "supported"
    assert "nothing finished at n = 6,000 on mnist, learning rate 0.05" in batch["reason"]


def test_the_large_batch_is_the_one_that_was_planned() -> None:
    records = [
        record(s, {"test.accuracy": 0.9}, batch=batch, cell={"batch": batch}, status=status, reason=reason)
        for s in range(3)
        for batch, status, reason in ((64, "finished", ""), (128, "finished", ""), (250, "missed", "cap"))
    ]
    assert matched_differences(RunTable(tuple(records)), "test.accuracy") == {}


def test_no_rule_is_decided_while_networks_wait(simulated: list[Record]) -> None:
    rules = quick(weakness_rules("s"))
    part = simulated[:40]
    found = analyse(part, rules, planned=60, draws=100)
    assert found["verdicts"] == []
    assert found["answer"].startswith("No verdict yet. ")
    assert "20 of 60 networks have not been tried yet, so no rule is decided." in found["cautions"][0]
    table = study_tables(found)["verdicts"]
    assert [cells[1].text for cells in table.rows] == ["not decided yet"] * 4
    assert "partial rank correlation of pair proxy with test accuracy given training loss" in table.rows[0][0].detail
    assert "not decided yet" in render_study(found)
    assert len(analyse(part, rules, planned=40, draws=100)["verdicts"]) == 4


def test_without_correlation_to_explain_h5_is_undecided() -> None:
    found = decide(RunTable(tuple(both(WEAK | {"measure.trace": 0.0}, 200))), quick(weakness_rules("s")))
    verdict = next(v for v in found if v["name"] == "H5")
    assert verdict["outcome"] == "undecided"
    assert "shows no correlation to explain" in verdict["reason"]


def test_holm_can_take_support_away() -> None:
    rules = Preregistration("s", weakness_rules("s").hypotheses[:1])
    names = [Hypothesis(f"H{i}", h.kind, h.statement, h.settings) for i, h in enumerate(rules.hypotheses * 40)]
    table = RunTable(
        tuple(seeds_study(100, {"measure.pair_proxy": 0.5}) + seeds_study(100, {"measure.pair_proxy": 0.5}, data="x"))
    )
    (alone,) = decide(table, quick(rules))
    family = decide(table, Preregistration("s", tuple(names), draws=200))
    assert alone["outcome"] == "supported"
    # With 200 resamples no p is below 1/200, and 40 times that is above the level.
    assert {v["outcome"] for v in family} == {"undecided"}
    assert "not after Holm's correction" in family[0]["reason"]


def test_a_true_null_is_supported_at_most_at_the_level() -> None:
    supported = 0
    for trial in range(200):
        effects = {"measure.pair_proxy": 0.0}
        records = seeds_study(60, effects, seed=trial)
        given = {"measure": "pair_proxy", "given": ["train.loss"], "margin": 0.1, "data_sets": 1}
        rules = Preregistration("s", (Hypothesis("H1", "predicts", "", given),), draws=300)
        (verdict,) = decide(RunTable(tuple(records)), rules)
        (part,) = verdict["parts"]
        assert (part["outcome"] == "supported") == (part["low"] > 0)
        supported += verdict["outcome"] == "supported"
    assert supported / 200 <= 0.05 + 0.02  # two-sided at 5 %: supported at 2.5 %


# --- batch and learning rate ---------------------------------------------------------------------------------------


def grid_study(effect: dict[int, float], seeds: int = 10, noise: float = 0.002) -> list[Record]:
    rng = np.random.default_rng(0)
    return [
        record(
            s, {"test.accuracy": 0.9 + 0.02 * lr + (effect[rows] if batch > 64 else 0) + noise * rng.normal()}, rows=rows,
            cell={"rows": rows, "lr": lr, "batch": batch}, lr=lr, batch=batch,
        )
        for rows in effect for lr in (0.05, 0.5) for batch in (64, rows) for s in range(seeds)
    ]  # fmt: skip


def test_batches_are_compared_at_matched_rates() -> None:
    rules = weakness_rules("grid", batch=True)
    assert outcomes(grid_study({250: 0.0005, 6000: 0.0}, 40, 0.001), rules) == {"H4": "supported"}
    assert outcomes(grid_study({250: 0.02, 6000: 0.0}), rules) == {"H4": "refuted"}
    assert outcomes(grid_study({250: 0.0, 6000: 0.0}, 3, 0.01), rules) == {"H4": "undecided"}
    (slope,) = slope_on_rows(RunTable(tuple(grid_study({250: 0.03, 500: 0.02, 2000: 0.0}, 10, 0.001))), "test.accuracy")
    expected = np.polyfit(np.log([250, 500, 2000]), [0.03, 0.02, 0.0], 1)[0]
    assert slope["low"] <= expected <= slope["high"]
    assert slope["p"] < 1e-6


def test_unmatched_cells_are_no_pairs() -> None:
    records = [
        r
        for r in grid_study({250: 0.0})
        if (r.spec["optimiser"]["lr"] > 0.1) == (r.spec["optimiser"]["batch_size"] > 64)
    ]
    assert matched_differences(RunTable(tuple(records)), "test.accuracy") == {}
    found = analyse(records, quick(weakness_rules("grid", batch=True)), draws=100)
    assert found["verdicts"][0]["outcome"] == "undecided"
    assert any("differ in learning rate too at 250 rows" in c for c in found["cautions"])


def test_interval_of_the_matched_difference_is_that_of_the_paired_t_test() -> None:
    records = grid_study({250: 0.01})
    part = decide(RunTable(tuple(records)), quick(weakness_rules("grid", batch=True)))[0]["parts"][0]
    by = {
        (r.spec["seed"], r.spec["optimiser"]["lr"], r.spec["optimiser"]["batch_size"]): r.values["test.accuracy"]
        for r in records
    }
    differences = [np.mean([by[s, lr, 250] - by[s, lr, 64] for lr in (0.05, 0.5)]) for s in range(10)]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (part["low"], part["high"]) == (pytest.approx(low), pytest.approx(high))


# --- rules ---------------------------------------------------------------------------------------------------------


def test_rules_are_hashed_and_cannot_be_changed_unnoticed() -> None:
    rules = weakness_rules("s", written="2026-01-01T00:00:00+00:00")
    assert Preregistration.from_json(rules.to_json()) == rules
    assert rules.digest == weakness_rules("s").digest  # when it was written is no part of it
    assert weakness_rules("s", data_sets=1).digest != rules.digest
    for old, new in (('"level": 0.95', '"level": 0.9'), ('"draws": 10000', '"draws": 100'), ("pair_proxy", "trace")):
        with pytest.raises(PreregistrationError, match="were changed after they were written"):
            Preregistration.from_json(rules.to_json().replace(old, new))
    with pytest.raises(PreregistrationError, match="not the rules of a study"):
        Preregistration.from_json("{}")
    with pytest.raises(PreregistrationError, match="schema 9"):
        Preregistration.from_json(rules.to_json().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(PreregistrationError, match="unknown kind of rule 'predict'"):
        Hypothesis("H1", "predict", "", {})
    with pytest.raises(PreregistrationError, match="rule H1 of kind batch is given nothing: expected margins"):
        Hypothesis("H1", "batch", "", {})
    one = Hypothesis("H1", "batch", "", {"margins": [[0, 0.1]]})
    with pytest.raises(PreregistrationError, match="two rules have one name"):
        Preregistration("s", (one, one))
    with pytest.raises(PreregistrationError, match=r"level is 1\.5"):
        Preregistration("s", (one,), level=1.5)
    assert all("{" not in rules.rule(hypothesis) for hypothesis in rules.hypotheses)
    # Everything that decides is said: a reader has no other place to find what is held fixed, and who the rivals are.
    said = " ".join(rules.rule(hypothesis) for hypothesis in rules.hypotheses)
    for name in ("live units", "w'Hw", "spectral product", "orbit-minimal trace", "Hessian trace with test accuracy"):
        assert name in said
    assert "0.1 points from 6,000 rows on" in weakness_rules("s", batch=True).rule(
        weakness_rules("s", batch=True).hypotheses[0]
    )


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("batch", {"margins": [[6000, 0.001]]}, "the first from 0 rows on"),
        ("batch", {"margins": "x"}, "margins is 'x'"),
        ("batch", {"margins": [[0, 0.1], [0, 0.2]]}, "ascending"),
        ("beats", {"measure": "trace", "rivals": [], "margin": 0.1, "data_sets": 1}, "a list of at least one measure"),
        (
            "beats",
            {"measure": "trace", "rivals": "w_hessian_w", "margin": 0.1, "data_sets": 1},
            "rivals is 'w_hessian_w'",
        ),
        ("predicts", {"measure": "trace", "given": [], "margin": "0.1", "data_sets": 1}, "margin is '0.1'"),
        ("predicts", {"measure": "trace", "given": [], "margin": 0.1, "data_sets": 0}, "data_sets is 0"),
    ],
)
def test_rules_that_could_not_be_applied_are_refused_before_training(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PreregistrationError, match=message):
        Hypothesis("H1", kind, "", settings)


def test_a_family_has_a_rule_and_enough_resamples() -> None:
    with pytest.raises(PreregistrationError, match="there is no rule"):
        Preregistration("s", ())
    with pytest.raises(PreregistrationError, match="draws is 10"):
        Preregistration("s", weakness_rules("s").hypotheses, draws=10)


def test_committed_rules_are_those_of_this_version() -> None:
    """Written before training: a change here would be a change of the rules after the fact."""
    folder = Path(__file__).parents[1] / "docs" / "reproductions"
    for name, rules in (
        ("weakness", weakness_rules("head-to-head")), ("vanishing", weakness_rules("batch-rate-rows", batch=True))
    ):  # fmt: skip
        text = (folder / name / "preregistration.json").read_text(encoding="utf-8")
        assert Preregistration.from_json(text).digest == rules.digest == json.loads(text)["digest"]


# --- figures and caveats -------------------------------------------------------------------------------------------


def test_figures_are_those_of_scipy_and_of_every_kind() -> None:
    simulated = both(WEAK, 120)
    found = analyse(simulated, draws=200)
    assert [part["name"] for part in found["data"]] == ["mnist", "fashion-mnist"]
    table = RunTable(tuple(simulated)).of_data("mnist")
    for row in found["data"][0]["correlations"]:
        expected = stats.spearmanr(table.column(f"measure.{row['measure']}"), table.column("test.accuracy")).statistic
        assert row["raw"]["value"] == pytest.approx(expected)
        assert row["within"] is None  # one cell
        assert row["raw"]["low"] < expected < row["raw"]["high"]
        assert 0 < row["p"] <= row["p_bh"] <= 1
    trace = next(row for row in found["data"][0]["correlations"] if row["measure"] == "trace")
    assert trace["orbit"]["low"] < 0 < trace["orbit"]["high"]
    assert abs(trace["corrected"]["value"]) > abs(trace["raw"]["value"])
    assert found["data"][0]["comparisons"][0]["first"] == "pair_proxy"
    assert all(c["r_first"] for c in found["data"][0]["comparisons"])
    json.dumps(found, allow_nan=False)
    assert found == analyse(simulated, draws=200)
    assert "No decision rule was written before training" in found["cautions"][0]


def test_selection_by_a_good_measure_loses_less(simulated: list[Record]) -> None:
    first = [r for r in simulated if r.spec["data"]["name"] == "mnist"]
    rows = {row["measure"]: row for row in analyse(first, draws=100)["data"][0]["selection"]}
    assert rows["pair_proxy"]["top_10"] < rows["adaptive_sharpness"]["top_10"]
    assert rows["pair_proxy"]["direction"] == "highest"
    assert rows["trace"]["direction"] == "lowest"


def test_simpson_and_its_caveat() -> None:
    rng = np.random.default_rng(0)
    records = []
    for cell, shift in (("small", 0.0), ("large", 3.0)):
        for s in range(60):
            values = measured(rng, rng.normal() + shift, {})
            inside = (values["test.accuracy"] - 0.8) / 0.03 - shift
            values |= {"measure.trace": 4 * shift - inside + rng.normal(), "measure.path_norm": shift + rng.normal()}
            records.append(record(s, values, cell={"batch": cell}, labels=("trace", "path_norm")))
    found = analyse(records, draws=400)
    rows = {row["measure"]: row for row in found["data"][0]["correlations"]}
    assert rows["trace"]["raw"]["low"] > 0
    assert rows["trace"]["within"]["high"] < 0
    cautions = "\n".join(found["cautions"])
    assert "within cells the correlation has the other sign for Hessian trace (Simpson's paradox)" in cautions
    assert "correlations that pool cells and are not seen within any: path norm" in cautions
    # Seeds that are in both cells are drawn together.
    assert rows["trace"]["units"] == 60
    axes = {row["measure"]: row for row in found["data"][0]["axes"]}
    assert axes["trace"]["psi"]["batch"] > 0.9
    assert axes["trace"]["sign_error"]["worst"] > 0.9  # it should fall with accuracy
    assert axes["trace"]["information"] < 0.5


def test_caveats_of_the_design() -> None:
    rng = np.random.default_rng(1)
    effects = {"measure.trace": -0.5, "measure.path_norm": 0.0}
    records = []
    for rows in (500, 2000):
        for batch, lr in ((64, 0.05), (rows, 0.5)):
            for s in range(12):
                values = measured(rng, rng.normal(), effects)
                values["measure.source_trace"] = values["measure.trace"] + 1e-6 * rng.normal()
                values["repeat.path_norm.1"] = rng.normal()
                made = record(
                    s, values, rows=rows, lr=lr, batch=batch, cell={"rows": rows, "batch": batch},
                    labels=("trace", "path_norm", "source_trace"),
                )  # fmt: skip
                made.spec["stop"]["threshold"] = 0.9999 if rows == 500 else 1.0
                records.append(made)
    for i, r in enumerate(records[:3]):
        spec = copy.deepcopy(r.spec) | {"seed": 99}
        records.append(
            Record(f"{i:064d}", spec, "missed", "the loss was 0.02 at the cap of 500 epochs", {"train.epochs": 500.0})
        )
    records.append(record(0, measured(rng, 0.0, effects), data="fashion-mnist", labels=("trace", "path_norm")))
    found = analyse(records, draws=200, planned=60)
    cautions = "\n".join(found["cautions"])
    assert "3 of 52 networks did not reach their stop criterion within the cap: rows 500, batch 64 (3)" in cautions
    assert "Batch sizes differ in learning rate too at 500 rows of mnist, 2,000 rows of mnist" in cautions
    assert "With the number of rows change also: stop rule" in cautions
    assert "mnist and fashion-mnist share seeds" in cautions
    assert "Hessian trace and Hessian trace as the source estimates it (+1.00)" in cautions
    assert "only 12 independent seeds are resampled" in cautions
    assert re.search(r"measured again, path norm \(−?-?0\.\d+\) hardly repeat", cautions)
    assert found["counts"] == {"networks": 60, "finished": 49, "missed": 3, "failed": 0, "not run": 8}
    assert next(cell["missed"] for cell in found["cells"]) == 3


def test_noise_of_the_test_set_is_named() -> None:
    rng = np.random.default_rng(2)
    records = [
        record(s, {k: v for k, v in measured(rng, 0.0, {"measure.trace": 0.0}).items()}, labels=("trace",)) for s in range(80)
    ]  # fmt: skip
    cautions = "\n".join(analyse(records, draws=200)["cautions"])
    assert "test rows alone can make 0.40: much of what is to be predicted is noise" in cautions
    assert "the reliability of accuracy within cells, from its two halves, is 0." in cautions
    assert evaluation_rows(RunTable(tuple(records)), "test.accuracy") == 10_000


def test_subsets_have_their_own_interval_and_are_strata() -> None:
    found = analyse(seeds_study(60, {"measure.pair_proxy": 0.5}, subsets=3), draws=300)
    (row,) = found["data"][0]["correlations"]
    assert row["units"] == 60  # the same seeds on every subset
    assert row["subsets"]["units"] == 3
    assert row["subsets"]["low"] < row["within"]["value"] < row["subsets"]["high"]
    assert any("there are 3 training subsets" in c for c in found["cautions"])
    units, words = resampling_units(RunTable(tuple(seeds_study(5, {}))))
    assert (len(set(units)), words) == (5, "networks")


def test_studies_on_one_data_set_are_cells_of_their_own() -> None:
    """Networks of two studies differ in what is no factor of either: within cells they are not compared."""
    rng = np.random.default_rng(0)
    records = []
    for shift, name in ((0.0, "narrow"), (4.0, "wide")):
        for s in range(40):
            values = measured(rng, rng.normal(), {}) | {"measure.trace": shift + rng.normal()}
            values["test.accuracy"] += 0.02 * shift
            made = record(s, values, labels=("trace",), cell={"lr": 0.1} if shift else {"width": 8})
            made.spec["study"] = name
            records.append(made)
    found = analyse([Record(f"{i:064d}", r.spec, r.status, values=r.values) for i, r in enumerate(records)], draws=200)
    (row,) = found["data"][0]["correlations"]
    assert row["raw"]["value"] > 0.6
    assert abs(row["within"]["value"]) < 0.3
    assert "narrow, wide are pooled on mnist" in "\n".join(found["cautions"])
    assert {cell["study"] for cell in found["cells"]} == {"narrow", "wide"}
    assert "narrow: mnist" in study_tables(found)["cells"].rows[0][0].detail
    assert all("study" not in axes["psi"] for axes in found["data"][0]["axes"])


def test_orders_of_rows_tell_networks_of_one_seed_apart() -> None:
    records = []
    for r in seeds_study(20, {"measure.trace": -0.5}):
        for order in (1, 2):
            spec = copy.deepcopy(r.spec) | {"order_seed": order, "cell": {"lr": r.spec["seed"] % 2}}
            records.append(Record(f"{len(records):064d}", spec, "finished", values=r.values))
    (axes,) = analyse(records, draws=100)["data"][0]["axes"]
    assert axes["psi"] == {}  # no two networks differ in the learning rate only


def test_a_database_that_is_given_twice_is_no_larger_study(simulated: list[Record]) -> None:
    with pytest.raises(ValueError, match="800 networks are given twice"):
        analyse([*simulated, *simulated], draws=100)


def test_networks_of_one_seed_are_no_independent_networks_to_meng() -> None:
    once = seeds_study(60, {"measure.pair_proxy": 0.6, "measure.trace": -0.3})
    again = [
        Record(
            r.id[::-1],
            copy.deepcopy(r.spec) | {"data": r.spec["data"] | {"subset_seed": 43}},
            "finished",
            values=r.values,
        )
        for r in once
    ]
    one, two = (analyse(records, draws=200)["data"][0]["comparisons"][0] for records in (once, once + again))
    assert two["meng_p"] == pytest.approx(one["meng_p"])  # the same networks again say nothing new
    assert "(if those of one seed said nothing new, " in "\n".join(
        analyse(once[:30] + again[:30], draws=200)["cautions"]
    )


def test_a_measure_that_does_not_choose_is_no_better_than_chance() -> None:
    records = seeds_study(40, {"measure.pair_proxy": 0.0, "measure.trace": -0.5})
    for r in records:
        r.values["measure.pair_proxy"] = 1000.0  # as where every class is feasible everywhere
    records[7].values["measure.pair_proxy"] = 999.0
    records[7].values.update({"test.accuracy.a": 0.0, "test.accuracy.b": 0.0})
    rows = {row["measure"]: row for row in analyse(records, draws=100)["data"][0]["selection"]}
    b = np.array([r.values["test.accuracy.b"] for r in records])
    assert rows["pair_proxy"]["direction"] == "highest"
    assert rows["pair_proxy"]["top_1"] == pytest.approx(b.max() - np.delete(b, 7).mean())
    assert rows["pair_proxy"]["top_10"] == pytest.approx(np.sort(b)[-4:].mean() - np.delete(b, 7).mean())
    shuffled = {row["measure"]: row for row in analyse(records[::-1], draws=100)["data"][0]["selection"]}
    assert shuffled["pair_proxy"]["top_1"] == pytest.approx(rows["pair_proxy"]["top_1"])


def test_a_matching_cell_that_nobody_finished_matches_nothing() -> None:
    records = [
        Record(r.id, r.spec, "missed", "cap", {})
        if (r.spec["optimiser"]["lr"] > 0.1) != (r.spec["optimiser"]["batch_size"] > 64) else r
        for r in grid_study({250: 0.0})
    ]  # fmt: skip
    assert "Batch sizes differ in learning rate too at 250 rows" in "\n".join(analyse(records, draws=100)["cautions"])


def test_measures_without_a_row_are_named() -> None:
    """A measure that is the same for all, or that few networks have, has no correlation: that is said, not passed over."""
    records = seeds_study(40, {"measure.trace": -0.5, "measure.pair_proxy": 0.0, "measure.path_norm": 0.0})
    for i, r in enumerate(records):
        r.values["measure.pair_proxy"] = 1000.0
        if i >= 4:
            del r.values["measure.path_norm"]
        if i >= 38:
            del r.values["measure.trace"]
        r.spec["measures"].append({"name": "llc", "label": "llc"})
    cautions = "\n".join(analyse(records, draws=100)["cautions"])
    assert "mnist: the same for all networks, and so without a correlation: pair proxy (1000)." in cautions
    assert "numbers of fewer than 10 networks, and so without a correlation: path norm (4), " in cautions
    assert "2 of 40 finished networks lack a number" in cautions


def test_what_random_moves_take_away_is_named(simulated: list[Record]) -> None:
    cautions = "\n".join(analyse(simulated, draws=300)["cautions"])
    assert "mnist: correlations that random moves, which change no prediction, take away: Hessian trace." in cautions
    assert "rest on the coordinates" not in "\n".join(analyse(both({"measure.trace": -0.5}, 60), draws=100)["cautions"])


def test_significant_beside_not_significant_is_no_difference() -> None:
    """A correlation whose interval just reaches 0 within cells, or after random moves, has not gone."""
    nothing: dict[str, Any] = {"within": None, "raw": None, "orbit": None, "label": "trace", "n": 100, "units": 100}
    nothing |= {"reliability": None, "p": None}
    association = Association(RunTable(tuple(seeds_study(20, {}))), "test.accuracy", 100, 0, 0.95)
    own, nearly, gone = ({"value": value, "low": value - 0.19, "high": value + 0.21} for value in (-0.23, -0.20, 0.05))
    for kind, start in (("within", "correlations that pool cells"), ("orbit", "correlations that random moves")):
        kept = of_data(association, [nothing | {"raw": own, kind: nearly}], [])
        assert not any(start in sentence for sentence in kept)
    assert any("that pool cells" in s for s in of_data(association, [nothing | {"raw": own, "within": gone}], []))
    far = {"value": -0.7, "low": -0.8, "high": -0.6}
    assert any("that random moves" in s for s in of_data(association, [nothing | {"raw": far, "orbit": gone}], []))


def test_another_outcome_is_called_by_its_name() -> None:
    records = seeds_study(40, {"measure.trace": -0.5})
    for r in records:
        r.values["test.loss"] = 2.0 - r.values["test.accuracy"]
    found = analyse(records, outcome="test.loss", draws=100)
    assert "correlates most with test loss" in found["answer"]
    assert found["slopes"] == []
    page = render_study(found)
    own = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert "Which measures predict test loss" in own
    assert "accuracy" not in re.sub(r"<details>.*?</details>", "", own, flags=re.S).replace(
        "that it predicts accuracy", ""
    )
    cells = study_tables(found)["cells"]
    assert cells.columns[4].text == "Test loss"
    assert cells.rows[0][4].text == "1.199"


def test_few_finished_networks_are_not_none() -> None:
    page = render_study(analyse(seeds_study(5, WEAK), draws=100))
    assert "No network has finished" not in page
    assert "5 networks are too few for a correlation" in page


def test_few_subsets_are_said_in_a_grid_too() -> None:
    rng = np.random.default_rng(3)
    records = [
        record(s, measured(rng, rng.normal(), {"measure.trace": 0.3}), subset=subset, cell={"lr": lr})
        for s in range(20) for subset in (42, 43) for lr in (0.1, 0.5)
    ]  # fmt: skip
    cautions = [c for c in analyse(records, draws=100)["cautions"] if "there are 2 training subsets" in c]
    assert cautions == ["mnist: there are 2 training subsets; intervals are about other seeds on these."]


def test_measures_that_some_networks_lack_are_analysed_on_those_that_have_them() -> None:
    records = seeds_study(60, {"measure.trace": -0.5, "measure.pair_proxy": 0.5})
    for r in records[:30]:
        del r.values["measure.pair_proxy"]
    for r in records[40:]:
        r.values["measure.path_norm"] = 1.0  # constant
    rows = {row["measure"]: row["n"] for row in analyse(records, draws=200)["data"][0]["correlations"]}
    assert rows == {"trace": 60, "pair_proxy": 30}


@pytest.mark.parametrize("n", [0, 1, 2, 5, 11])
def test_few_networks_make_a_report_too(n: int) -> None:
    found = analyse(seeds_study(n, WEAK), quick(weakness_rules("s")), draws=200, name="tiny", planned=12)
    json.dumps(found, allow_nan=False)
    page = render_study(found)
    assert "Partial: " in page
    assert study_markdown(found).startswith("    ")


def test_only_failures_make_a_report_too() -> None:
    failed = [record(s, {}, status="failed", reason="the loss is NaN from epoch 3 on") for s in range(3)]
    found = analyse(failed, draws=200)
    assert found["answer"] == "No network has finished."
    assert "3 of 3 networks failed" in "\n".join(found["cautions"])
    assert "the loss is NaN from epoch 3 on" in render_study(found)


# --- page ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    effects = {name: WEAK[name] for name in ("measure.pair_proxy", "measure.trace", "orbit.trace")}
    records = seeds_study(40, effects, subsets=2) + seeds_study(40, effects, data="fashion-mnist", first=40)
    return analyse(records, quick(weakness_rules("s")), draws=200, command="flatminima study report s.sqlite")


def test_tables_keep_the_exact_numbers(results: dict[str, Any]) -> None:
    tables = study_tables(results)
    rows = results["data"][0]["correlations"]
    first = tables["correlations"].rows[0]
    row = next(r for r in rows if r["label"] == first[0].text)
    assert first[1].values == (row["raw"]["value"], row["raw"]["low"], row["raw"]["high"])
    assert [cells[1].text for cells in tables["verdicts"].rows] == [v["outcome"] for v in results["verdicts"]]
    assert len(tables["parts"].rows) > 0
    assert len(tables["parts"].rows) == sum(len(v["parts"]) for v in results["verdicts"])
    assert len(tables["comparisons"].rows) == sum(len(part["comparisons"]) for part in results["data"])
    text = study_markdown(results)
    assert "flatminima study report s.sqlite" in text
    assert all(v["statement"] in text for v in results["verdicts"])


def test_the_page_needs_no_network_and_escapes_text(results: dict[str, Any]) -> None:
    hostile = copy.deepcopy(results)
    evil = "<script>alert(1)</script>"
    hostile["study"] = hostile["command"] = evil
    hostile["cautions"].append(evil)
    for row in hostile["data"][0]["correlations"]:
        row["label"] = evil
    hostile["data"][0]["networks"][0]["cell"] = {evil: evil}
    page = render_study(hostile)
    own = page[: page.index("<footer>")]
    assert "<script>alert" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)", own)
    with pytest.raises(ValueError, match="schema 7"):
        render_study(results | {"schema": 7})


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_draws_everything(
    browser: Browser, results: dict[str, Any], tmp_path: Any, width: int, scheme: Literal["light", "dark"]
) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_study(results), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    plots = page.locator(".plot").count()
    page.wait_for_function(f"document.querySelectorAll('.plot .main-svg').length >= {plots}")
    assert plots == 2 + sum(len(part["correlations"]) for part in results["data"])
    assert page.locator(".plot:has(.main-svg)").count() == plots
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert complaints == []
    page.close()


def test_pairs_of_networks_that_the_test_set_tells_apart() -> None:
    data = DataSpec("digits", 250, probes=0)
    labels = load_subset(data).test_labels.numpy().astype(np.uint8)
    wrong = labels.copy()
    wrong[:100] = (wrong[:100] + 1) % 10
    other = DataSpec("digits", 300, probes=0)
    specs = [RunSpec("s", (), spec, ModelSpec("mlp"), seed=seed) for spec in (data, other) for seed in range(3)]
    answers = [labels, labels, wrong, labels[:10], labels, labels]  # the second subset has other test rows
    said = {spec.id: answer.tobytes() for spec, answer in zip(specs, answers, strict=True)}
    records = [Record(spec.id, spec.to_dict(), "finished") for spec in specs]
    (found,) = resolution(records, said.get)
    assert (found.data, found.pairs, found.caution) == ("digits", 3, "")
    assert found.share == pytest.approx(2 / 3)
    assert resolution(records[:2], said.get)[0].caution.startswith(
        "digits: McNemar's test at 5 % tells 0% of the 1 pairs"
    )
    assert resolution([replace(record, status="missed", reason="the cap") for record in records], said.get) == []
    assert resolution(records, lambda run: None) == []
