"""Statistics, verdicts and tables on records whose numbers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flatminima.protocols import fewshot_table as table
from flatminima.protocols import fewshot_verdict as verdict
from flatminima.protocols.fewshot_methods import ARMS, BASES, CLASSIFIERS, METHODS, chosen_methods, memory
from flatminima.protocols.fewshot_settings import DEFECTS, preset
from flatminima.protocols.fewshot_summary import comparable
from flatminima.study.resampling import nested_interval
from flatminima.study.settings import SettingsError

VECTORS = json.loads((Path(__file__).parent / "vectors" / "f2m.json").read_text(encoding="utf-8"))
COUNTS = [1000, 500]


def stream(method: str, seed: int, draw: int, base: tuple[int, int], novel: int, failure: Any = None) -> dict[str, Any]:
    known = METHODS[method]
    correct = [[base[0]], [base[1], novel]]
    return {
        "cell": "sessions", "base": known.base, "arm": known.arm, "seed": seed, "draw": draw, "failure": failure,
        "counts": COUNTS, "correct": {name: correct for name in CLASSIFIERS}, "sessions": [{}], "drift": None,
        "seconds": {"learning": 1.0, "total": 2.0},
    }  # fmt: skip


def results(shift: float = 50.0, seeds: int = 3, draws: int = 2, noise: int = 7) -> table.Results:
    """F2M keeps ``shift`` more of 1000 base images than without noise, and is exactly the Baseline otherwise."""
    records = []
    for seed in range(seeds):
        for draw in range(draws):
            wobble = noise * seed + draw
            records.append(stream("baseline", seed, draw, (900, 800 + wobble), 200))
            records.append(stream("f2m-no-noise", seed, draw, (900, 700), 300))
            records.append(stream("f2m", seed, draw, (900, 700 + int(shift) + wobble), 300))
    return table.Results(records, ["baseline", "f2m", "f2m-no-noise"], seeds, draws)


def test_the_nested_interval_is_student_over_row_means() -> None:
    cells = np.array([[1.0, 2.0, 6.0], [4.0, math.nan, 5.0], [7.0, 9.0, 8.0], [math.nan] * 3])
    means = [3.0, 4.5, 8.0]
    half = float(stats.t.ppf(0.975, 2)) * np.std(means, ddof=1) / math.sqrt(3)
    found = nested_interval(cells)
    assert (found["mean"], found["n"], found["cells"]) == (pytest.approx(np.mean(means)), 3, 8)
    assert found["high"] - found["mean"] == pytest.approx(half)
    within = (14.0 + 0.5 + 2.0) / (2 + 1 + 2)
    assert found["sd_draws"] == pytest.approx(math.sqrt(within))
    between = np.var(means, ddof=1) - within * (1 / 3 + 1 / 2 + 1 / 3) / 3
    assert found["sd_rows"] == pytest.approx(math.sqrt(between))
    one = nested_interval(cells[:1])
    assert (one["low"], one["high"], one["sd_rows"]) == (None, None, None)
    assert nested_interval(np.full((2, 2), math.nan))["mean"] is None


def test_the_nested_interval_covers_and_pooling_does_not() -> None:
    rng = np.random.default_rng(0)
    covered, pooled, trials = 0, 0, 1000
    for _ in range(trials):
        cells = rng.normal(0, 1, (4, 1)) + rng.normal(0, 0.5, (4, 5))
        found = nested_interval(cells)
        covered += found["low"] <= 0 <= found["high"]
        half = 1.96 * cells.std(ddof=1) / math.sqrt(cells.size)
        pooled += abs(cells.mean()) <= half
    assert abs(covered / trials - 0.95) < 0.025
    assert pooled / trials < 0.75


def test_numbers_of_a_stream() -> None:
    v = VECTORS["session_metrics"]
    counts = [10_000] * len(v["acc"])
    correct = [[round(100 * accuracy) for _ in range(t + 1)] for t, accuracy in enumerate(v["acc"])]
    record = {"counts": counts, "correct": {"cosine": correct}}
    found = table.numbers_of(record, "cosine")
    assert found["accuracy_curve"] == pytest.approx(v["acc"])
    assert found["drop"] == pytest.approx(v["PD"])
    assert found["average"] == pytest.approx(v["average"], abs=1e-9)
    assert found["relative_drop"] == pytest.approx(100 * v["PD"] / v["acc"][0])
    assert found["forgetting"] == pytest.approx(v["PD"])  # all groups have the same accuracy here
    assert found["floor"] == pytest.approx(v["acc"][0] / len(counts))


def test_differences_are_paired_by_seed_and_draw() -> None:
    found = results()
    rows = {(row["method"], row["baseline"]): row for row in table.comparisons(found)}
    assert list(rows) == [("f2m", "baseline"), ("f2m", "f2m-no-noise"), ("f2m-no-noise", "baseline")]
    base = rows["f2m", "f2m-no-noise"]["quantities"]["base"]
    means = [5.0 + 0.7 * seed + 0.05 for seed in range(3)]
    assert base["mean"] == pytest.approx(np.mean(means))
    assert base["high"] - base["mean"] == pytest.approx(float(stats.t.ppf(0.975, 2)) * np.std(means, ddof=1) / 3**0.5)
    assert (base["wins"], base["p"], base["smallest_p"], base["cells"]) == (3, 0.25, 0.25, 6)
    exact = rows["f2m", "baseline"]["quantities"]["average"]  # the scatter of seeds cancels in paired differences
    assert exact["low"] == pytest.approx(exact["high"], abs=1e-9)


def test_claims_follow_the_intervals() -> None:
    by_words = {c.statement: c for c in verdict.claims(table.comparisons(results()), {"differences": []})}
    kept = next(c for words, c in by_words.items() if words.startswith("after the same clamped fine-tuning"))
    assert kept.verdict == "reproduced"
    headline = next(c for words, c in by_words.items() if "over all sessions" in words)
    assert headline.verdict.startswith("not reproduced: ") is (headline.measured["difference (points)"] <= 0)
    worse = verdict.claims(table.comparisons(results(shift=-60.0)), {"differences": []})
    assert "lies on the other side of zero" in next(c for c in worse if "clamped fine-tuning" in c.statement).verdict
    none = verdict.claims(table.comparisons(results(seeds=1)), {"differences": []})
    assert all("one base seed has no interval" in c.verdict for c in none)
    flat = {"differences": [{"base": "flat", "part": "test", "quantity": "indicator", "mean": -1e-4, "low": -2e-4,
                             "high": 1e-5, "n": 3}]}  # fmt: skip
    indicator = verdict.claims([], flat)[0]
    assert indicator.verdict == "not reproduced: the interval [−0.0002, +1e−05] does not exclude zero"


def test_the_answer_says_effect_and_interval() -> None:
    text = verdict.answer(table.comparisons(results()))
    assert "F2M against the frozen Baseline, mean accuracy over sessions: " in text
    assert "the flat network keeps more" in text
    assert "one base seed says nothing about others" in verdict.answer(table.comparisons(results(seeds=1)))
    assert verdict.answer([]) == "No pair of F2M and a method to compare it with is finished yet."


def test_cautions_are_about_these_runs() -> None:
    settings = preset("cifar100", validate=True)
    found = results()
    found.bases = [
        {"seed": 0, "fingerprint": "a", "failure": None},
        {"seed": 0, "fingerprint": "b", "failure": {"reason": "the training loss became nan"}, "base": "flat"},
    ]
    text = " ".join(verdict.cautions(settings, found, 2, 9))
    for words in (
        "Partial: 7 of 9 tasks", "Base networks of seed 0 do not share", "1 tasks failed and are in no mean",
        "Reduced networks", "With 3 base seeds the sign-flip test cannot give a p below 0.25", "These are no results",
        "PD rewards a weak first session",
    ):  # fmt: skip
        assert words in text
    shared = " ".join(verdict.cautions(preset("cifar100", split="mine.json"), results(), 0, 9))
    assert "All seeds have the class order and the shots of one split" in shared
    assert "contain the scatter of the draws" not in shared
    found.unmeasured = [{"base": "sam", "failure": {"reason": "the loss on train images is nan"}}]
    assert "2 tasks failed" in " ".join(verdict.cautions(settings, found, 0, 9))
    quiet = " ".join(verdict.cautions(preset("cifar100", "paper"), results(seeds=6), 0, 9))
    assert "All seeds have" not in quiet
    assert "Partial" not in quiet
    assert "Reduced" not in quiet
    assert "With 6" not in quiet


def test_the_gap_to_crt_is_paired() -> None:
    """A partial experiment has other seeds of one method than of the other."""
    records = [stream("f2m", seed, 0, (900, 800), 100) for seed in (0, 1)]
    records += [stream("crt", 1, 0, (900, 850), 100), stream("crt", 2, 0, (900, 100), 100)]
    found = table.Results(records, ["crt", "f2m"], 3, 1)
    text = verdict.details(found, table.comparisons(found), [], {"differences": []})
    assert text == ["F2M ends −3.33 points from cRT, which sees all images in every session."]


def test_memory_is_what_the_settings_leave() -> None:
    assert memory(METHODS["f2m"], preset("cifar100")) == "novel shots"
    assert memory(METHODS["f2m"], preset("cifar100", replay="none")) == "none"
    assert memory(METHODS["sam-clamp"], preset("cifar100", replay="all")) == "novel shots, exemplars of base classes"
    assert memory(METHODS["f2m-no-replay"], preset("cifar100", replay="all")) == "none"
    assert memory(METHODS["icarl"], preset("cifar100", replay="none")) == "exemplars of all classes"


def test_published_rows_stand_beside_their_own_protocol() -> None:
    assert comparable(preset("cifar100"), 60, (5,) * 8, 5)
    assert not comparable(preset("cifar100"), 60, (5,) * 8, 1)
    assert not comparable(preset("cifar100"), 20, (10,) * 8, 5)
    assert not comparable(preset("cifar100", validate=True), 60, (5,) * 8, 5)
    assert not comparable(preset("digits"), 6, (1,) * 4, 5)


def test_failed_streams_are_in_no_mean() -> None:
    good, bad = stream("f2m", 0, 0, (900, 800), 100), stream("f2m", 0, 1, (0, 0), 0, {"step": 1, "reason": "nan"})
    found = table.Results([good, bad], ["f2m"], 1, 2)
    assert table.method_row(found, "f2m", preset("cifar100"))["numbers"]["last"]["cells"] == 1
    assert np.isnan(found.cells("f2m", "last")[0, 1])


def test_defects_say_where_they_are() -> None:
    small = {name: where for name, _, where in verdict.defects(preset("cifar100"), ["f2m", "f2m-released"])}
    assert small["constant_prototypes"] == "F2M as released"
    assert small["checkpoint"] == "not copied"
    released = {name: where for name, _, where in verdict.defects(preset("cifar100", "released"), ["f2m"])}
    assert released["std_weight"] == released["swap_weights"] == "all methods"
    assert len(small) == len(DEFECTS)


def test_the_registry_is_whole() -> None:
    for name, method in METHODS.items():
        assert method.base in BASES, name
        assert method.arm in ARMS, name
        assert method.classifier in CLASSIFIERS, name
    known = {name for pair in table.COMPARISONS for name in pair} | set(table.ABLATIONS)
    assert known <= METHODS.keys()
    assert len(set(table.COMPARISONS)) == len(table.COMPARISONS)
    assert chosen_methods(["f2m", "baseline"]) == ["baseline", "f2m"]
    assert chosen_methods(["all"]) == list(METHODS)
    for names, message in (
        (["f2n"], "unknown method 'f2n': expected one of f2m"),
        ([], "got none"),
        (["ft", "ft"], "twice"),
    ):
        with pytest.raises(SettingsError, match=message):
            chosen_methods(names)


@pytest.mark.parametrize(("data", "last"), [("cifar100", 44.67), ("mini-imagenet", 44.65), ("cub-200", 60.26)])
def test_published_rows(data: str, last: float) -> None:
    found = table.published(data)
    assert found["paper"]["f2m"]["accuracy"][-1] == last
    for source in found.values():
        for row in source.values():
            assert all(0 < value < 100 for value in row["accuracy"])
            assert row["check"]
            assert len(row["accuracy"]) == (11 if data == "cub-200" else 9)
    assert table.published("digits") == {}
