from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from domains_fixture import NAMES, tiny_domains, tiny_settings
from flatminima.protocols import domains_summary, domains_verdict
from flatminima.protocols import domains_table as table
from flatminima.protocols.domains_cell import Cell
from flatminima.protocols.domains_summary import summarise

READERS = ("selected", "tail", "swa", "swad", "oracle")


def record(target: str, seed: int, accuracies: dict[str, float], **changes: Any) -> dict[str, Any]:
    """What a run leaves, with these target accuracies by reader."""
    swad = {
        "start_step": 8, "end_step": 40, "n": 33, "converged": True, "threshold": 0.9, "detected_at": 16, "stopped_at": None,
        "final_ratio": 0.8, "highest_ratio": 0.7, "evaluations": 11, "notes": [], "votes": None,
    }  # fmt: skip
    methods = {
        reader: {
            "target_accuracy": accuracy, "target_loss": 1.0, "validation_accuracy": 0.9, "validation_loss": 0.5 + seed / 10,
            "norm": 3.0, "weights": "x", **(swad if reader == "swad" else {}),
        }
        for reader, accuracy in accuracies.items()
    }  # fmt: skip
    rises = {"swad": 1.0, "swa": 2.0, "tail": 2.5, "selected": 4.0}
    flatness = {
        reader: {where: {"rise": [rise + seed / 10, 2 * rise, 3 * rise]} for where in ("source", "target")}
        for reader, rise in rises.items()
        if reader in accuracies
    }
    history = {
        "step": [0, 40], "train_loss": [1.0, 0.5], "validation_loss": [[1.0, 3.0], [0.5, 0.7]],
        "validation_accuracy": [[0.2, 0.4], [0.9, 0.9]], "sources": ["a", "b"],
    }  # fmt: skip
    return {
        "algorithm": "erm", "target": target, "seed": seed, "draw": 0, "hyperparameters": {"lr": 1e-3},
        "fingerprint": f"{target}{seed}", "failure": None, "methods": methods, "flatness": flatness, "plane": None,
        "oracle_curve": [0.3, 0.9], "history": history, "seconds": {"training": 1.0, "scoring": 1.0},
    } | changes  # fmt: skip


def grid(swad: np.ndarray, selected: np.ndarray, tail: np.ndarray) -> list[dict[str, Any]]:
    """Records of targets x seeds."""
    return [
        record(
            NAMES[i],
            j,
            {"swad": swad[i, j], "selected": selected[i, j], "tail": tail[i, j], "swa": 0.5, "oracle": 0.99},
        )
        for i in range(swad.shape[0])
        for j in range(swad.shape[1])
    ]


SWAD = np.array([[0.50, 0.52], [0.60, 0.61], [0.70, 0.74]])
SELECTED = np.array([[0.48, 0.51], [0.57, 0.60], [0.70, 0.70]])
TAIL = SWAD + 0.01


@pytest.fixture
def results() -> table.Results:
    return table.Results(grid(SWAD, SELECTED, TAIL), NAMES, range(2))


def test_a_row_has_means_over_seeds_and_the_average_over_targets_within_seeds(results: table.Results) -> None:
    row = table.accuracy_row(results, "erm/swad")
    assert row["label"] == "SWAD"
    for target, values in zip(NAMES, SWAD, strict=True):
        found = row["targets"][target]
        assert found["mean"] == pytest.approx(100 * values.mean())
        assert found["se"] == pytest.approx(100 * values.std(ddof=1) / 2**0.5)
        assert found["n"] == 2
    within = 100 * SWAD.mean(0)
    assert row["average"]["mean"] == pytest.approx(within.mean())
    assert row["average"]["se"] == pytest.approx(within.std(ddof=1) / 2**0.5)


def test_comparisons_are_paired_by_cell(results: table.Results) -> None:
    row = next(r for r in table.comparisons(results) if r["baseline"] == "erm/selected" and r["method"] == "erm/swad")
    differences = 100 * (SWAD - SELECTED)
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["per_target"] == pytest.approx(dict(zip(NAMES, differences.mean(1), strict=True)))
    assert (row["wins"], row["targets"], row["worst_target"], row["cells"]) == (3, 3, "left", 6)
    assert (row["p"], row["smallest_p"]) == (0.25, 0.25)
    assert row["seeds"]["n"] == 2
    assert row["low"] < row["difference"] < row["high"]
    tail = next(r for r in table.comparisons(results) if r["baseline"] == "erm/tail" and r["method"] == "erm/swad")
    assert (tail["difference"], tail["low"], tail["high"]) == (pytest.approx(-1.0),) * 3
    assert tail["wins"] == 0
    made = [(r["method"], r["baseline"]) for r in table.comparisons(results)]
    assert made == [pair for pair in table.COMPARISONS if pair in made]
    assert all(r["p_holm"] >= r["p"] for r in table.comparisons(results))


def test_missing_cells_are_left_out_and_never_filled(results: table.Results) -> None:
    records = [r for r in grid(SWAD, SELECTED, TAIL) if (r["target"], r["seed"]) != ("right", 1)]
    partial = table.Results(records, NAMES, range(2))
    row = table.accuracy_row(partial, "erm/swad")
    assert row["targets"]["right"] == {"mean": pytest.approx(70.0), "se": None, "n": 1}
    assert row["average"] == {
        "mean": pytest.approx(100 * SWAD[:, 0].mean()),
        "se": None,
        "n": 1,
    }  # seed 1 lacks a target
    found = table.comparisons(partial)[0]
    assert (found["cells"], found["seeds"]["n"]) == (5, 1)
    failed = [record("left", 0, {}, failure={"step": 3, "reason": "nan"})]
    assert table.comparisons(table.Results(failed, NAMES, range(2))) == []


def test_every_method_takes_the_draw_that_is_best_on_the_sources() -> None:
    first = record("left", 0, {"selected": 0.4, "swad": 0.4, "oracle": 0.5})
    second = record("left", 0, {"selected": 0.6, "swad": 0.6, "oracle": 0.7}, draw=1, oracle_curve=[0.3, 0.95])
    first["methods"]["selected"]["validation_accuracy"] = 0.95
    second["methods"]["swad"]["validation_accuracy"] = 0.97
    results = table.Results([first, second], ["left"], [0])
    assert results.table("erm/selected")[0, 0] == pytest.approx(40)  # worse on the target, better on the sources
    assert results.table("erm/swad")[0, 0] == pytest.approx(60)
    assert results.table("erm/oracle")[0, 0] == pytest.approx(70)


def test_flatness_is_compared_along_the_papers_order(results: table.Results) -> None:
    flat = table.flatness(results, [1.0, 2.0, 5.0])
    row = next(r for r in flat["rows"] if (r["method"], r["where"], r["radius"]) == ("erm/swad", "source", 1.0))
    assert row["mean"] == pytest.approx(1.05)
    assert row["versus_erm"]["difference"] == pytest.approx(-3.0)
    pair = next(
        r for r in flat["order"] if (r["flatter"], r["sharper"], r["radius"]) == ("erm/swad", "erm/selected", 1.0)
    )
    assert (pair["difference"], pair["low"], pair["high"]) == (pytest.approx(-3.0),) * 3
    assert {r["method"] for r in flat["beside"]} >= {"erm/swad", "erm/selected"}
    claims = {c.statement.split(" (")[0]: c.verdict for c in domains_verdict.claims(table.comparisons(results), flat)}
    assert claims["SWAD ends in a flatter minimum than SWA"] == "reproduced"
    assert claims["SWAD ends in a flatter minimum than ERM"] == "reproduced"
    assert "SWA ends in a flatter minimum than SAM" not in claims  # no SAM run
    verdict = claims["SWAD is more accurate than the mean of the last 20 % of the iterates: the valley matters"]
    assert verdict == "not reproduced: the interval [−1.00, −1.00] lies on the other side of zero"


def test_valleys_are_counted_and_told(results: table.Results) -> None:
    found = table.valleys(results)
    summary = table.valley_summary(found, "erm/swad", steps=41)
    assert summary is not None
    assert (summary["runs"], summary["converged"], summary["ended"], summary["still_falling"]) == (6, 6, 0, 6)
    assert (summary["start_share"], summary["highest_ratio"], summary["iterates"]) == (0.2, 0.7, 33)
    told = domains_verdict.cautions(tiny_settings(), results, summary, 2, 8)
    text = " ".join(told)
    for sentence in (
        "Partial: 6 of 8 runs are finished",
        "begin with random weights",
        "With 3 targets the sign-flip test cannot give a p below 0.25",
        "The end of the valley was found in none of 6 runs, the highest validation loss being 0.70 of the threshold",
        "In 6 of 6 runs with a start the validation loss still fell by more than 5% afterwards",
        "a bound, not a method",
    ):
        assert sentence in text
    four = table.Results(grid(SWAD, SELECTED, TAIL), [*NAMES, "fourth"], range(2))
    assert "cannot give a p below 0.125: it can never be significant" in " ".join(
        domains_verdict.cautions(tiny_settings(), four, None, 0, 8)
    )
    assert table.valley_summary(found, "sam/swad", 41) is None


def test_the_answer_says_what_was_found_and_no_more(results: table.Results) -> None:
    text = domains_verdict.answer(table.comparisons(results))
    assert "against ERM selected on the source domains: +1.83 points [" in text
    assert "more accurate" in text
    assert "against the plain average of the last 20 % of the run: −1.00 points [−1.00, −1.00], less accurate" in text
    assert domains_verdict.answer([]) == "No pair of runs is finished yet."
    one = table.comparisons(table.Results(grid(SWAD, SELECTED, TAIL), ["left"], range(2)))
    assert "one target says nothing about others" in domains_verdict.answer(one)


def test_the_published_numbers_are_the_papers() -> None:
    pacs = table.published("pacs")
    assert (pacs["erm/swad"]["average"], pacs["erm/selected"]["average"], pacs["sam/swad"]["average"]) == (
        88.1,
        84.2,
        87.1,
    )
    for data in ("pacs", "vlcs", "office-home", "terra-incognita", "domainnet"):
        found = table.published(data)
        for method in ("erm/swad", "erm/selected"):
            targets = [value["mean"] for value in found[method]["targets"].values()]
            assert np.mean(targets) == pytest.approx(found[method]["average"], abs=0.06)
    means = [
        table.published(d)["erm/swad"]["average"]
        for d in ("pacs", "vlcs", "office-home", "terra-incognita", "domainnet")
    ]
    assert np.mean(means) == pytest.approx(66.9, abs=0.05)
    assert table.published("rotated-mnist") == {}


def test_the_summary_is_whole_json_and_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains_summary, "domain_data", lambda settings: tiny_domains())
    settings = tiny_settings()
    made = {f"erm-{t}-seed{s}": Cell(settings, "erm", t, s) for t in NAMES for s in range(2)}
    records = {f"erm-{r['target']}-seed{r['seed']}": r for r in grid(SWAD, SELECTED, TAIL)}
    del records["erm-left-seed1"]
    found = summarise(settings, made, records, "flatminima reproduce swad")
    assert found["finished"] == {"runs": 5, "planned": 6, "missing": ["erm-left-seed1"], "partial": True}
    assert found["cautions"][0].startswith("Partial: 5 of 6 runs")
    assert found["runs"][0]["history"]["validation_loss"] == [2.0, 0.6]
    assert found["unpaired"] == []
    stranger = record("left", 1, {"selected": 0.5}, algorithm="sam", fingerprint="other")
    records |= {"erm-left-seed1": record("left", 1, {"selected": 0.5}), "sam-left-seed1": stranger}
    found = summarise(settings, made | {"sam-left-seed1": Cell(settings, "sam", "left", 1)}, records, "")
    assert found["unpaired"] == ["left, seed 1"]
    assert "do not share split and initial weights" in found["cautions"][0]


def test_data_sets_are_pooled_as_strata(results: table.Results) -> None:
    compared = table.comparisons(results)
    other = {
        "data": {"name": "pacs"},
        "comparisons": [{"method": "erm/swad", "baseline": "erm/selected", "per_target": {"a": 4.0, "b": 2.0}}],
    }
    row = domains_summary.pooled("rotated", compared, [other])[0]
    ours = 100 * (SWAD - SELECTED).mean()
    assert row["difference"] == pytest.approx((ours + 3.0) / 2)
    assert (row["targets"], row["smallest_p"], row["p"]) == (5, 2 / 32, 2 / 32)
    assert domains_summary.pooled("rotated", compared, []) == []
    assert math.isfinite(row["p"])
