"""The weakness reproductions: statistics on records made up here, and the smallest preset from end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from flatminima.cli import main
from flatminima.data import DataError
from flatminima.protocols.study_files import SHIPPED, Found, read_study, run_parts, shipped
from flatminima.protocols.vanishing import _claims as vanishing_claims
from flatminima.protocols.vanishing import (
    cells,
    matched,
    others_right,
    reproduce_vanishing,
    trace_correlations,
    vanishing_parts,
)
from flatminima.protocols.weakness import (
    _claims,
    _verdicts,
    correlations,
    network_columns,
    reproduce_weakness,
    weakness_parts,
)
from flatminima.protocols.weakness_words import study_cautions, summary
from flatminima.report.vanishing_page import render_vanishing
from flatminima.report.weakness_page import render_weakness
from flatminima.study.database import StudyDatabase, StudyError
from flatminima.study.preregister import differs, weakness_rules
from flatminima.study.run_spec import Record, RunSpec
from flatminima.study.run_table import RunTable


def made_up(run: RunSpec, rng: np.random.Generator, accuracy: float, **values: float) -> Record:
    given = {"test.accuracy": accuracy, "test.accuracy.a": accuracy, "test.accuracy.b": accuracy, "train.loss": 0.01}
    given |= {
        "train.epochs": 10.0,
        "measure.trace": float(rng.normal(50, 5)),
        "measure.parameter_norm": float(rng.normal()),
    }
    given |= {f"repeat.source_trace.{i}": float(rng.normal()) for i in (1, 2)}
    given |= {"measure.source_trace": float(rng.normal()), "measure.pair_proxy": float(rng.normal())}
    predictions = rng.integers(0, 2, 10_000, dtype=np.uint8).tobytes()
    return Record(
        run.id, run.to_dict(), "finished", values=given | values, artefacts={"predictions.uint8": predictions}
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_are_valid_and_have_what_they_promise(name):
    grid = shipped(name)
    runs = grid.runs()
    assert grid.name == name
    expected = {
        "pair-proxy-mnist": 100, "pair-proxy-fashion-mnist": 100, "model-selection": 300, "batch-rate-rows": 240,
        "vanishing": 600, "pair-proxy-digits": 20,
    }  # fmt: skip
    assert len(runs) == expected.get(name, 426)
    assert len({run.id for run in runs}) == len(runs)


def test_protocols_are_those_of_the_source():
    run = shipped("pair-proxy-fashion-mnist").runs()[7]
    assert (run.seed, run.data.rows, run.data.subset_seed, run.data.probe_seed, run.data.probes) == (
        7,
        250,
        42,
        99,
        100,
    )
    assert (run.optimiser.lr, run.optimiser.batch_size, run.model.keywords["hidden"]) == (0.1, 64, (64, 8))
    assert (run.stop.rule, run.stop.threshold, run.stop.check_every, run.stop.max_epochs) == ("accuracy", 1.0, 10, 500)
    large = {  # rows: batch size, learning rate, most epochs
        r.data.rows: (r.optimiser.batch_size, r.optimiser.lr, r.stop.max_epochs, r.optimiser.drops, r.stop.threshold)
        for r in shipped("vanishing").runs() if r.factors["batch"] == r.factors["rate"] == "large"
    }  # fmt: skip
    assert large == {
        500: (500, 0.5, 500, (), 0.9999), 2000: (2000, 0.5, 500, (), 0.9999), 6000: (4096, 0.5, 500, (), 0.9999),
        12_000: (4096, 0.5, 500, (0.8,), 1.0), 24_000: (4096, 0.3, 500, (0.8,), 1.0), 60_000: (4096, 0.3, 600, (0.8,), 1.0),
    }  # fmt: skip
    small = {
        r.data.rows: r.optimiser.lr
        for r in shipped("vanishing").runs()
        if r.factors["batch"] == r.factors["rate"] == "small"
    }
    assert small == {500: 0.05, 2000: 0.03, 6000: 0.01, 12_000: 0.01, 24_000: 0.01, 60_000: 0.01}
    seeds = {(r.factors["batch"], r.seed) for r in shipped("vanishing").runs()}
    assert seeds == {("small", s) for s in range(25)} | {("large", s) for s in range(100, 125)}


def test_head_to_head_studies_share_no_seed():
    seeds = [{r.seed for r in shipped(f"head-to-head-{name}").runs()} for name in ("mnist", "fashion-mnist", "digits")]
    seeds.append({r.seed for r in shipped("pair-proxy-mnist").runs()})
    assert sum(map(len, seeds)) == len(set.union(*seeds))
    assert all(
        len({r.data.subset_seed for r in shipped(f"head-to-head-{name}").runs()}) == 3 for name in ("mnist", "digits")
    )


def test_a_smaller_study_has_the_same_networks():
    few, all_ = shipped("pair-proxy-mnist", count=5).runs(), shipped("pair-proxy-mnist").runs()
    assert [run.id for run in few] == [run.id for run in all_[:5]]
    with pytest.raises(ValueError, match="nothing is left of study vanishing"):
        shipped("vanishing", rows=[700])
    with pytest.raises(ValueError, match="unknown shipped study 'pair-proxy-mnits'"):
        shipped("pair-proxy-mnits")


def made_up_proxies(slope: float) -> RunTable:
    """Pair proxies that follow accuracy, norms that do not, traces that fall with it."""
    rng, records = np.random.default_rng(0), []
    for run in shipped("pair-proxy-mnist").runs():
        skill = rng.normal()
        values = {
            "measure.pair_proxy": slope * skill + rng.normal(),
            "measure.source_trace": -0.25 * skill + rng.normal(),
        }
        records.append(made_up(run, rng, 0.75 + 0.01 * skill, **{k: float(v) for k, v in values.items()}))
    return RunTable(tuple(records))


def test_claims_are_reproduced_if_the_published_value_is_inside_and_a_correlation_is_shown():
    table = made_up_proxies(0.4)
    y = table.column("test.accuracy")
    proxy, trace, norm = _claims(table)
    assert proxy.measured["Spearman's ρ"] == pytest.approx(stats.spearmanr(table.column("pair_proxy"), y).statistic)
    assert [claim.verdict for claim in (proxy, norm)] == ["reproduced", "reproduced"]
    assert trace.expected["Spearman's ρ"] == -0.226
    strong = _claims(made_up_proxies(3.0))[0]
    assert "without the published +0.374" in strong.verdict
    none = _claims(made_up_proxies(0.0))[0]
    assert "no correlation is shown" in none.verdict


def test_seeds_that_were_trained_on_several_subsets_are_drawn_together():
    """The same networks three times say no more than once: the interval is that of one subset, and not narrower."""
    rng, first = np.random.default_rng(5), shipped("head-to-head-mnist").runs()
    by_seed, records = {}, []
    for run in first:
        skill, noise = by_seed.setdefault(run.seed, rng.normal(size=2))
        values = {"test.accuracy": 0.7 + 0.01 * skill, "measure.pair_proxy": 0.5 * skill + noise}
        records.append(Record(run.id, run.to_dict(), "finished", values={k: float(v) for k, v in values.items()}))
    subset = first[0].data.subset_seed
    alone = RunTable(tuple(r for r in records if r.spec["data"]["subset_seed"] == subset))
    (one,), (all_,) = correlations(alone), correlations(RunTable(tuple(records)))
    assert (one["raw"]["n"], all_["raw"]["n"], all_["raw"]["units"]) == (142, 426, 142)
    assert all_["raw"]["high"] - all_["raw"]["low"] == pytest.approx(one["raw"]["high"] - one["raw"]["low"], rel=0.1)


def test_every_study_has_the_cautions_of_its_networks(tmp_path, monkeypatch):
    monkeypatch.setattr("flatminima.protocols.weakness.load_subset", _no_pictures)
    table = made_up_proxies(0.4)
    for i, record in enumerate(table.records):
        norm = record.values["measure.trace"] + 1e-6 * i
        record.values.update(
            {"measure.parameter_norm": norm, "repeat.source_trace.1": float(i % 7), "train.epochs": norm}
        )
    found = study_cautions(table, correlations(table), "test.accuracy")
    text = "\n".join(found)
    assert "all networks share one training subset" in text
    assert "Hessian trace and parameter norm (+1.00)" in text or "parameter norm and Hessian trace (+1.00)" in text
    assert "Hessian trace goes with training epochs (+1.00), parameter norm (+1.00)" in text
    assert "measured again, Hessian trace as the source estimates it" in text
    assert not any(sentence.startswith("mnist: ") for sentence in found)
    assert study_cautions(RunTable(()), [], "test.accuracy") == []
    database(tmp_path, "pair-proxy-mnist", table)
    results = reproduce_weakness(tmp_path, data="mnist", run=False)
    assert "Hessian trace goes with training epochs" in render_weakness(results)
    assert results["answer"].startswith("Not complete; so far: ")
    assert not any("Both pair-proxy studies" in caution for caution in results["cautions"])  # there is one


def test_claims_do_without_networks_that_lack_a_measure():
    table = made_up_proxies(0.4)
    first = table.records[0]
    values = {k: v for k, v in first.values.items() if k != "measure.pair_proxy"}
    missed = Record(first.id, first.spec, "missed", "accuracy 0.996 at the cap", values)
    found = _claims(RunTable((missed, *table.records[1:])))
    assert [claim.parameters["networks"] for claim in found] == [99, 100, 100]


def test_rules_of_another_study_are_refused_and_changed_ones_said(tmp_path):
    rules, other = weakness_rules("head-to-head"), weakness_rules("head-to-head", data_sets=1)
    made = [
        Found(shipped(name), RunTable(made_up_proxies(0.4).records[:1]), given, (), tmp_path / name)
        for name, given in (("head-to-head-mnist", rules), ("head-to-head-fashion-mnist", other))
    ]
    with pytest.raises(StudyError, match="has other rules of decision than"):
        _verdicts(made)
    assert _verdicts(made[:1]) == ([], rules)
    assert differs(rules, weakness_rules("head-to-head")) == []
    assert "are not those of this version" in differs(other, rules)[0]


def test_missed_networks_stand_beside_the_abstract_and_nowhere_else():
    table = made_up_proxies(0.4)
    first = table.records[0]
    missed = Record(first.id, first.spec, "missed", "accuracy 0.996 at the cap", first.values)
    table = RunTable((missed, *table.records[1:]))
    assert _claims(table)[0].parameters == {"networks": 100}
    assert {entry["raw"]["n"] for entry in correlations(table)} == {99}
    assert network_columns(table)["status"][0] == "missed"


def vanishing_table() -> RunTable:
    """Accuracy rises by 1.6 points with the learning rate and by nothing with the batch."""
    rng, records = np.random.default_rng(1), []
    for run in shipped("vanishing", rows=(2000, 6000)).runs():
        high = run.factors["rate"] == "large"
        records.append(made_up(run, rng, 0.9 + 0.016 * high + 0.002 * rng.normal()))
    return RunTable(tuple(records))


def test_differences_are_split_into_batch_and_rate():
    table = vanishing_table()
    found = {(entry["rows"], entry["kind"]): entry for entry in matched(table)}
    source = found[2000, "as the source"]
    a = [
        r.values["test.accuracy"]
        for r in table.records
        if r.spec["data"]["rows"] == 2000 and r.spec["cell"] == {"rows": 2000, "batch": "large", "rate": "large"}
    ]
    b = [
        r.values["test.accuracy"]
        for r in table.records
        if r.spec["data"]["rows"] == 2000 and r.spec["cell"] == {"rows": 2000, "batch": "small", "rate": "small"}
    ]
    reference = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (source["n_large"], source["n_small"]) == (25, 25)
    assert (source["low"], source["high"]) == pytest.approx((100 * reference.low, 100 * reference.high))
    assert source["outcome"] == "different"
    assert found[2000, "small batches' rate"]["outcome"] == "equivalent"
    (claim,) = vanishing_claims(matched(table))
    assert claim.verdict == "reproduced"
    assert claim.expected["percentage points"] == 1.6


def test_what_did_not_finish_is_in_no_difference():
    table = vanishing_table()
    rows = [
        Record(r.id, r.spec, "missed", "cap", r.values) if r.spec["cell"]["batch"] == "large" else r
        for r in table.records
    ]
    found = matched(RunTable(tuple(rows)), [2000, 24_000])
    assert {entry["outcome"] for entry in found if entry["rows"] in (2000, 6000)} == {"missed"}
    assert {entry["missed_large"] for entry in found if entry["rows"] == 2000} == {25}
    assert {entry["outcome"] for entry in found if entry["rows"] == 24_000} == {"not run"}


def test_pooled_correlations_of_two_regimes_are_not_those_within():
    rng, records = np.random.default_rng(2), []
    for run in shipped("vanishing", rows=(2000,)).runs():
        high = run.factors["rate"] == "large"
        records.append(
            made_up(run, rng, 0.9 + 0.02 * high + 0.001 * rng.normal(), **{"measure.trace": -5.0 * high + rng.normal()})
        )
    found = {entry["name"]: entry for entry in trace_correlations(RunTable(tuple(records)))}
    assert found["trace"]["pooled"]["value"] < -0.6
    assert abs(found["trace"]["within"]["value"]) < 0.3
    assert abs(found["source_trace"]["reliability"]["value"]) < 0.35, (
        "two draws that have nothing to do with each other"
    )


def test_others_right_is_the_mean_over_own_errors():
    rng = np.random.default_rng(3)
    right = rng.random((6, 50)) < 0.7
    expected = [
        np.mean([np.mean([right[j, x] for j in range(6) if j != i]) for x in range(50) if not right[i, x]])
        for i in range(6)
    ]
    assert others_right(right) == pytest.approx(expected)


def database(folder: Path, name: str, table: RunTable) -> None:
    grid = shipped(name)
    with StudyDatabase(folder / f"{name}.sqlite", create=True) as study:
        study.begin(grid.runs(), {"study": name}, {"code": "made up"})
        for record in table.records:
            study.save(record)


def test_what_is_there_is_rendered_and_what_is_not_is_said(tmp_path):
    database(tmp_path, "pair-proxy-mnist", made_up_proxies(0.4))
    parts = weakness_parts("mnist", full=True)
    assert [part.rules is not None for part in parts] == [False] * 3 + [True] * 3
    found = run_parts(parts, tmp_path, run=False)
    assert found["pair-proxy-mnist"].counts == {
        "networks": 100,
        "finished": 100,
        "missed": 0,
        "failed": 0,
        "not run": 0,
    }
    assert found["head-to-head-digits"].counts["not run"] == 426
    assert read_study(shipped("model-selection"), tmp_path / "no.sqlite").counts["not run"] == 300


@pytest.mark.parametrize(
    ("made", "data"),
    [("pair-proxy-mnist", "mnist"), ("head-to-head-digits", "mnist"), ("pair-proxy-digits", "digits"), (None, "mnist")],
)
def test_reading_needs_no_pictures(tmp_path, monkeypatch, made, data):
    """Without files ``auto`` trains on digits; whoever only reads gets what is in the folder."""
    monkeypatch.setattr("flatminima.protocols.weakness.load_subset", _nothing)
    if made is not None:
        database(tmp_path, made, RunTable(()))
    assert reproduce_weakness(tmp_path, run=False)["settings"]["data"] == data
    assert reproduce_weakness(tmp_path, data="mnist", run=False)["settings"]["data"] == "mnist"


def _nothing(spec):
    raise DataError("no files")


def test_vanishing_page_says_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("flatminima.protocols.vanishing.load_subset", _no_pictures)
    database(tmp_path, "vanishing", RunTable(vanishing_table().records[:100]))
    results = reproduce_vanishing(tmp_path, full=True, run=False)
    assert [part.grid.name for part in vanishing_parts(full=True)] == ["batch-rate-rows", "vanishing"]
    matched = [e["difference"] for e in results["differences"] if "rate" in e["kind"] and e["low"] is not None]
    ends = " to ".join(f"{value:+.2f}".replace("-", "−") for value in (min(matched), max(matched)))
    assert results["answer"] == (
        "1 of the abstract's 2 differences reproduced, 0 not, 1 not run. With one learning rate for both, large minus small "
        f"batches is {ends} points."
    )
    assert any("500, 6,000, 12,000, 24,000, 60,000 rows" in caution for caution in results["cautions"])
    entry = next(cell for cell in results["cells"] if cell["rows"] == 60_000)
    assert entry["not run"] == 25
    page = render_vanishing(json.loads(json.dumps(results)))
    assert "NaN" not in json.dumps(results)
    assert "Both at the small batches" in page


def test_vanishing_tells_the_trend_and_only_what_applies(tmp_path, monkeypatch):
    """The rule is followed by a slope over rows; what is to be careful of is computed from the networks there are."""
    monkeypatch.setattr("flatminima.protocols.vanishing.load_subset", _no_pictures)
    rng, grid = np.random.default_rng(6), shipped("batch-rate-rows")
    with StudyDatabase(tmp_path / "batch-rate-rows.sqlite", create=True) as study:
        rules = weakness_rules(grid.name, batch=True)
        study.begin(grid.runs(), {"study": grid.name, "rules": rules.to_dict()}, {"code": "made up"})
        for run in grid.runs():
            gain = 0.02 * (run.optimiser.batch_size > 64) / run.data.rows * 250
            study.save(made_up(run, rng, 0.9 + gain + 0.0005 * rng.normal()))
    alone = reproduce_vanishing(tmp_path, full=True, run=False)
    (slope,) = alone["slopes"]
    assert slope["high"] < 0
    assert any("multiplied by e" in sentence for sentence in alone["details"])
    assert not any("source's" in caution for caution in alone["cautions"])
    assert not any("not those of this version" in caution for caution in alone["cautions"])
    assert alone["verdicts"][0]["outcome"] == "refuted"
    page = render_vanishing(alone)
    assert "n = 6,000 on mnist" in page
    database(tmp_path, "vanishing", RunTable(vanishing_table().records[:100]))
    both = reproduce_vanishing(tmp_path, full=True, run=False)
    cautions = "\n".join(both["cautions"])
    assert "The source's two regimes differ in learning rate" in cautions
    assert "so a trend over rows is not" not in cautions  # of one number of rows
    assert "the source's trace hardly repeats at 2,000 rows" in cautions
    assert "Hessian trace as the source estimates it" in render_vanishing(both)


def _no_pictures(spec):
    return SimpleNamespace(test_labels=torch.zeros(10_000, dtype=torch.int64))


def test_counts_of_a_cell(tmp_path):
    table = vanishing_table()
    database(tmp_path, "vanishing", RunTable(table.records[:10]))
    found = read_study(shipped("vanishing"), tmp_path / "vanishing.sqlite")
    first = next(entry for entry in cells(found) if entry["rows"] == 2000)
    assert (first["networks"], first["finished"], first["not run"]) == (25, 10, 15)


def test_unknown_data_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'mnits'"):
        reproduce_weakness(tmp_path, data="mnits")


def test_the_smoke_preset_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Twelve networks of the twenty: training, database, results and page, and the same again without any work."""
    small = shipped("pair-proxy-digits", count=12)
    small = dataclasses.replace(small, measures=small.measures[:3])
    monkeypatch.setattr("flatminima.protocols.weakness.shipped", lambda name, **given: small)
    for extra in ([], ["--render"]):
        monkeypatch.setattr(
            "sys.argv", ["flatminima", "reproduce", "weakness", "--data", "digits", "--out", str(tmp_path), *extra]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["studies"][0]["counts"]["finished"] == 12
    assert len(results["studies"][0]["networks"]["values"]["measure.pair_proxy"]) == 12
    assert "smoke run" in results["answer"]
    assert render_weakness(results) == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "smoke run" in capsys.readouterr().out


def test_the_answer_says_what_the_verdicts_say() -> None:
    def verdict(name: str, outcome: str) -> dict[str, str]:
        return {"name": name, "statement": f"Statement {name}.", "outcome": outcome, "reason": "Why."}

    answer = summary([], [], [verdict("H1", "undecided"), verdict("H2", "refuted"), verdict("H3", "undecided")])[
        "answer"
    ]
    assert answer.endswith(" Refuted: Statement H2 (H2). Undecided: Statement H1 (H1); Statement H3 (H3).")
