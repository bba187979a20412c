"""The reproduction as a whole: what each method seeks, the verdicts, the command and its page."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser

from conftest import Outcome
from flatminima import cli
from flatminima.protocols import reproduce_factorization
from flatminima.protocols.claims import DERIVED, Claim, finite
from flatminima.protocols.instances import _interval, counterexamples, dense_hessian, exact_and_estimated, instances
from flatminima.protocols.optimisers import METHODS, Ending, Method, problem, run_method
from flatminima.report.factorization_page import instance_table, method_table, render_factorization, run_table

Run = Callable[..., Outcome]
VECTORS = json.loads((Path(__file__).parent / "vectors" / "escape.json").read_text())
KEPT = Path(__file__).parents[1] / "docs" / "reproductions" / "factorization.json"
BY_NAME = {method.name: method for method in METHODS}


# --- verdicts ------------------------------------------------------------------------------------------------------


def test_a_verdict_says_what_was_measured_and_what_was_expected() -> None:
    claim = Claim("s", {}, DERIVED)
    claim.close("a", 2.0, 2.0 + 1e-9, rtol=1e-8)
    claim.same("b", "settles", "settles")
    claim.at_most("c", 1.0, 1.0)
    claim.at_least("d", 1.0, 1.0)
    assert claim.verdict == "reproduced"
    claim.close("a", 2.0, 2.1, rtol=1e-8, atol=1e-3)
    claim.close("missing", 1.0, None)
    claim.same("b", "settles", "diverges")
    claim.at_most("c", 1.0, float("nan"))
    claim.at_least("d", 1.0, None)
    assert claim.verdict == (
        "not reproduced: a is 2.1, expected 2 to 1e-08 relative and 0.001; missing is missing, expected 1 to the last bit; "
        "b is diverges, expected settles; c is nan, expected at most 1; d is missing, expected at least 1"
    )
    content = claim.to_dict()
    assert content["reproduced"] is False
    assert content["measured"]["c"] is None  # no NaN in JSON


def test_json_has_no_nan() -> None:
    assert finite({"a": np.array([1.0, np.inf]), 2: (float("nan"), {"b": np.float64(3.0)})}) == {
        "a": [1.0, None],
        "2": [None, {"b": 3.0}],
    }


# --- exact expressions ---------------------------------------------------------------------------------------------


def test_instances_have_the_tabulated_sharpness() -> None:
    found = instances()
    assert len(found) == 24
    for case in found[:20]:
        assert case.sharpness is not None
        top = float(np.linalg.eigvalsh(dense_hessian(case.problem).numpy())[-1])
        assert top == pytest.approx(case.sharpness, rel=1e-11)
        assert case.problem.sharpness().value == pytest.approx(case.sharpness, rel=1e-12)


def test_estimates_stand_beside_the_truth() -> None:
    cases = [case for case in instances() if case.name in ("d3-rect", "d3-underparameterised", "random 8-8-8-8")]
    rows, claims = exact_and_estimated(seed=0, cases=cases)
    assert [claim.verdict for claim in claims] == ["reproduced"] * 4
    for case, row in zip(cases, rows, strict=True):
        eigenvalues = np.linalg.eigvalsh(dense_hessian(case.problem).numpy())
        truths = {e["name"]: e["truth"] for e in row["estimates"]}
        assert truths["sharpness"] == pytest.approx(eigenvalues[-1])
        assert truths["trace"] == pytest.approx(eigenvalues.sum())
        assert truths["frobenius_norm"] == pytest.approx(np.sqrt((eigenvalues**2).sum()))
        assert truths["moment 3"] == pytest.approx((eigenvalues**3).mean())
        for estimate in row["estimates"]:
            inside = estimate["low"] <= estimate["truth"] <= estimate["high"]
            assert estimate["inside"] or not inside


@pytest.mark.parametrize(
    ("low", "high", "inside"),
    [(0.9, 1.1, True), (1.0 + 1e-13, 1.1, True), (1.001, 1.1, False), (0.9, 0.999, False), (math.nan, 1.1, False)],
)
def test_a_truth_outside_an_interval_is_called_outside(low: float, high: float, inside: bool) -> None:
    assert _interval("trace", "95% interval", 1.0, 1.05, low, high, 1.0)["inside"] is inside


def test_numbers_do_not_depend_on_the_number_of_threads() -> None:
    cases = [case for case in instances() if case.name == "random 12-16-16-10"]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(exact_and_estimated(cases=cases)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_counterexamples_separate_flatness_from_balance() -> None:
    found = {claim.statement: claim for claim in counterexamples()}
    assert len(found) == 6
    assert all(claim.verdict == "reproduced" for claim in found.values())
    first = found["flat and not Frobenius-balanced"]
    assert first.measured["flat"] is True
    assert first.measured["squared Frobenius norms, 1"] != first.measured["squared Frobenius norms, 2"]
    assert found["equal spectral norms and not flat"].measured["flat"] is False


# --- what each method seeks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gd", "label_noise", "weight_noise", "gd_1.1", "gd_1.3", "gd_1.6"])
def test_methods_end_as_recorded(name: str) -> None:
    check(name, run_method(BY_NAME[name], 3))


@pytest.mark.slow
def test_sam_ends_as_recorded() -> None:
    check("sam", run_method(BY_NAME["sam"], 3))


def check(name: str, endings: list[Ending]) -> None:
    expected, (low, high) = VECTORS["methods"][name], VECTORS["traces"][name]
    assert len(endings) == len(expected)
    chain, _ = problem()
    for ending, sharpness in zip(endings, expected, strict=True):
        assert ending.sharpness == pytest.approx(sharpness, rel=2e-3)
        assert low * 0.998 <= ending.trace <= high * 1.002
        assert ending.sharpness >= chain.flattest_sharpness() * (1 - 1e-9)
        assert ending.trace >= chain.smallest_trace() * (1 - 1e-9)
        assert ending.sharpnesses[-1] == ending.sharpness
        assert len(ending.steps) == len(ending.sharpnesses) == len(ending.traces)


def test_sam_lowers_the_sharpness_and_is_the_formula() -> None:
    """The library's optimiser against the update written out: g at w + rho g / |g|."""
    chain, minimiser = problem()
    method = Method("sam", "", 400)
    (ending,) = run_method(method, 1)
    w = minimiser + 1e-3 * np.random.default_rng(0).standard_normal(chain.n)
    for _ in range(400):
        gradient = chain.loss_and_gradient(w[None])[1][0]
        ascended = w + 0.1 * gradient / np.linalg.norm(gradient)
        w = w - 0.1 * chain.loss_and_gradient(ascended[None])[1][0]
    settled = chain.project(w[None], 0.01)
    assert ending.sharpness == pytest.approx(float(chain.sharpness(settled)[0]), rel=1e-9)
    assert ending.trace == pytest.approx(float(chain.trace(settled)[0]), rel=1e-9)
    assert ending.sharpness < 7.0


def test_seeds_are_paired_and_repeatable() -> None:
    short = Method("label_noise", "", 600)
    three, one = run_method(short, 3), run_method(short, 1)
    assert three[0] == one[0] == run_method(short, 1)[0]
    assert three[0].sharpness != three[1].sharpness


# --- everything ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    if not KEPT.exists():
        pytest.skip(f"{KEPT} is part of the repository, not of the source distribution")
    content: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return content


def test_no_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        reproduce_factorization(0)


@pytest.mark.slow
def test_everything_is_reproduced_and_is_what_is_kept(kept: dict[str, Any]) -> None:
    seen: list[float] = []
    found = reproduce_factorization(progress=lambda part, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    for group in found["groups"]:
        for claim in group["claims"]:
            assert claim["verdict"] == "reproduced", claim
    statements = [[claim["statement"] for claim in group["claims"]] for group in found["groups"]]
    assert statements == [[claim["statement"] for claim in group["claims"]] for group in kept["groups"]]
    assert found["answer"] == kept["answer"]


def test_what_is_kept_was_reproduced(kept: dict[str, Any]) -> None:
    claims = [claim for group in kept["groups"] for claim in group["claims"]]
    assert len(claims) > 60
    assert all(claim["verdict"] == "reproduced" for claim in claims)
    assert kept["answer"] == f"All {len(claims)} statements were reproduced."


def test_the_command_writes_results_and_page(
    run: Run, kept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy.deepcopy(kept)
    broken["groups"][1]["claims"][0] |= {"verdict": "not reproduced: a is 1, expected 2", "reproduced": False}

    def fake(seeds: int, progress: Callable[[str, float], None]) -> dict[str, Any]:
        progress("escape E1", 0.5)
        return broken | {"settings": broken["settings"] | {"seeds": seeds}}

    monkeypatch.setattr(cli, "reproduce_factorization", fake)
    outcome = run("reproduce", "factorization", "--out", tmp_path / "new" / "here", "--seeds", 2)
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[0] == kept["answer"]
    assert any(line.strip().startswith("flat and not Frobenius-balanced: not reproduced: a is 1") for line in lines)
    assert lines[-1].endswith("report.html")
    assert json.loads((tmp_path / "new" / "here" / "results.json").read_text())["settings"]["seeds"] == 2
    assert "not reproduced: a is 1" in (tmp_path / "new" / "here" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", ["seeds", "file"])
def test_bad_options_are_refused_in_one_line(run: Run, tmp_path: Path, case: str) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("--seeds", 0) if case == "seeds" else ("--out", tmp_path / "file")
    outcome = run("reproduce", "factorization", *arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert len(outcome.err.strip().splitlines()) == 1
    assert ("--seeds must be at least 1, got 0" if case == "seeds" else "cannot use") in outcome.err


# --- the page ------------------------------------------------------------------------------------------------------


def test_tables_keep_the_exact_numbers(kept: dict[str, Any]) -> None:
    rows = instance_table(kept["instances"]).rows
    for row, source in zip(rows, kept["instances"], strict=True):
        assert row[1].values == (source["sharpness"],)
        for cell, estimate in zip(row[4:], source["estimates"], strict=True):
            assert cell.values[0] == estimate["value"]
            assert cell.verdict == ("inside" if estimate["inside"] else "outside")
    runs = [run for record in kept["escape"]["recipes"] for run in record["runs"]]
    table = run_table(kept).rows
    assert len(table) * 2 == len(runs)
    assert [cell for row in table for cell in row[1].values] == [run["growth"] for run in runs]
    for row, claim in zip(method_table(kept).rows, kept["groups"][-1]["claims"], strict=True):
        assert row[-1].text == claim["verdict"]


def test_the_page_needs_no_network_and_escapes_text(kept: dict[str, Any]) -> None:
    hostile = copy.deepcopy(kept)
    hostile["instances"][0]["name"] = "<script>alert(1)</script>"
    hostile["groups"][0]["claims"][0]["statement"] = "<b>bold</b>"
    page = render_factorization(hostile)
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    own = page[: page.index("<footer>")]  # what follows is plotly.js, which names addresses it does not ask for
    assert not re.search(r"(?:src|href)=\"(?!#)", own)
    assert "default-src 'none'" in own
    with pytest.raises(ValueError, match="schema 7"):
        render_factorization(kept | {"schema": 7})


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_draws_every_plot_and_does_not_overflow(
    browser: Browser, kept: dict[str, Any], tmp_path: Path, width: int, scheme: Any
) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_factorization(kept), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    plots = page.locator(".plot").count()
    assert plots == 2 + 7 * 4
    assert page.locator(".plot:has(.main-svg)").count() == plots
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert complaints == []
    page.close()
