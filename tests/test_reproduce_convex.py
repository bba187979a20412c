"""The reproduction of the convex counterexamples: its claims, the zoo, the command and its page."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from conftest import Outcome
from flatminima import cli
from flatminima.problems.convex import Sample, SAMTrap
from flatminima.protocols import (
    convex_constants,
    convex_generalisation,
    convex_theorems,
    convex_traps,
    reproduce_convex,
)
from flatminima.protocols.claims import Claim
from flatminima.protocols.convex_errata import errata
from flatminima.protocols.convex_traps import saturated
from flatminima.protocols.convex_zoo import IN, METHODS, OUT, covered, traps, zoo
from flatminima.protocols.convex_zoo import Method as ZooMethod
from flatminima.report.convex_page import bound_table, grid_table, render_convex, tie_table, zoo_table
from flatminima.report.reproduction import claims_table

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Outcome]
KEPT = Path(__file__).parents[1] / "docs" / "reproductions" / "convex.json"


def check(claims: list[Claim]) -> None:
    assert claims
    for claim in claims:
        assert claim.verdict == "reproduced", (claim.statement, claim.verdict)


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    if not KEPT.exists():
        pytest.skip(f"{KEPT} is part of the repository, not of the source distribution")
    content: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return content


# --- the parts -----------------------------------------------------------------------------------------------------


def test_theorem_1_is_reproduced() -> None:
    check(convex_theorems.flat_and_sharp())


def test_theorem_6_is_reproduced() -> None:
    check(convex_theorems.sam_ends_sharp())


def test_theorem_7_is_reproduced() -> None:
    check(convex_traps.sam_is_trapped())


def test_errata_are_measured() -> None:
    claims = errata()
    check(claims)
    numbers = [re.match(r"E(\d+)", claim.statement) for claim in claims]
    assert [int(n.group(1)) for n in numbers if n] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_the_printed_constants_and_epsilons() -> None:
    check(convex_constants.printed())
    rows, claims = convex_constants.epsilons()
    check(claims)
    assert [[v["warned"] for v in row["values"]] for row in rows] == [
        [False, True, True, True], [False, True, True, True], [False, False, False, True], [False, False, True, True],
    ]  # fmt: skip


def test_a_small_grid_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convex_constants, "SIZES", (4, 6))
    monkeypatch.setattr(convex_constants, "DRAWS", 3)
    seen: list[float] = []
    rows, claims = convex_constants.grid(seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(rows) == 3 * 2 * 4
    assert sum(row["certificate"] for row in rows if row["variant"] == "paper") > 12
    assert all(row["certificate"] == row["run"] for row in rows)
    assert not any(row["certificate"] for row in rows if row["variant"] != "paper")
    assert all(
        "runs is 48, expected 704" in claim.verdict for claim in claims
    )  # a smaller protocol does not pass for the larger


def test_invariants_notice_a_wrong_run() -> None:
    f = SAMTrap(6, 12, 0.25, saturated(0.25, 12), sample=Sample.draw(6, 4, "one"))
    run = convex_traps.sam_run(f)
    assert convex_constants.invariants(f, run) == []
    other = f.on(Sample.draw(6, 5, "one"))
    assert len(convex_constants.invariants(other, run)) >= 3


def test_bounds_hold_and_say_where_they_are_vacuous(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [c for c in convex_generalisation.DEAD_ZONES if c.n == 20 and c.steps == 20]
    monkeypatch.setattr(convex_generalisation, "DEAD_ZONES", chosen)
    rows, claims = convex_generalisation.generalisation()
    check(claims)
    assert len(rows) == len(chosen) + 2
    for row in rows:
        for cell in row["cells"]:
            assert cell["measured"] <= cell["bound"]
            ceiling = 4.0 if cell["quantity"] == "stability" else row["largest_loss"]
            assert cell["vacuous"] == (cell["bound"] >= ceiling)
    assert all(cell["vacuous"] for row in rows[-2:] for cell in row["cells"])
    plain = next(cell for cell in rows[0]["cells"] if cell["quantity"] == "gap" and cell["kind"] == "tight")
    assert not plain["vacuous"]


def test_a_violated_bound_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convex_generalisation, "risk_bound", lambda **known: 1e-3)
    _, claim = convex_generalisation._dead_zone(convex_generalisation.DEAD_ZONES[0])
    assert "not reproduced: population risk" in claim.verdict


def test_the_zoo_has_every_optimiser_and_average(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatminima.averaging import __all__ as averages
    from flatminima.optim import VARIANTS

    labels = " ".join(method.label for method in METHODS).lower().replace("sa-gd, projected", "sa-gd")
    for name in [*VARIANTS, "bSAM", "F2M", "SWA", "EMA", "LAWA", "SWAD", "tail average"]:
        known = {"every-k": "every 2", "probability": "with probability", "sam-on": "sam"}
        assert known.get(name, name).lower() in labels, name
    assert {"SWA", "EMA", "LAWA", "SWAD", "TailAverage"} <= set(averages)


def test_covered_cells_of_the_zoo_are_as_a_theorem_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatminima.protocols import convex_zoo

    few = [
        m
        for m in METHODS
        if m.label in ("gradient descent", "SAM", "SWA of SAM", "ASAM", "SWAD of SAM, with fresh examples")
    ]
    monkeypatch.setattr(convex_zoo, "METHODS", tuple(few))
    found = zoo()
    assert len(found["rows"]) == len(few) + 5
    for row in found["rows"]:
        for cell in row["cells"]:
            assert cell is None or cell["expected"] in (None, cell["verdict"]), (row["label"], cell)
    by = {row["label"]: [None if c is None else c["verdict"] for c in row["cells"]] for row in found["rows"]}
    assert by["SAM"] == [IN, OUT, IN, IN]
    assert by["gradient descent"] == [IN, OUT, IN, OUT]
    assert by["SA-GD, exact maximum, ties: adversarial"] == [None, IN, None, None]
    assert by["ASAM"][3] == OUT
    value = {row["label"]: row["cells"][3]["value"] for row in found["rows"] if row["cells"][3]}
    assert value["SWAD of SAM, with fresh examples"] < value["SWA of SAM"] < value["SAM"]


def test_what_decides_a_cell_is_said() -> None:
    assert covered("theorem 7", "SAM")[0] == "Theorem 7"
    assert covered("theorem 7", "ASAM") == ("measurement", None)
    assert covered("theorem 3", "bSAM") == ("measurement", None)
    assert all(covered("theorem 1", m.label)[1] == IN for m in METHODS)
    assert [trap.depth > 0.01 for trap in traps()] == [True] * 4
    assert isinstance(METHODS[0], ZooMethod)


# --- everything ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_is_reproduced_and_is_what_is_kept(kept: dict[str, Any]) -> None:
    seen: list[float] = []
    found = reproduce_convex(lambda part, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    for group in found["groups"]:
        for claim in group["claims"]:
            assert claim["verdict"] == "reproduced", claim
    assert found["answer"] == kept["answer"]
    statements = [[claim["statement"] for claim in group["claims"]] for group in found["groups"]]
    assert statements == [[claim["statement"] for claim in group["claims"]] for group in kept["groups"]]
    verdicts = [[c and c["verdict"] for c in row["cells"]] for row in found["zoo"]["rows"]]
    assert verdicts == [[c and c["verdict"] for c in row["cells"]] for row in kept["zoo"]["rows"]]


def test_what_is_kept_was_reproduced(kept: dict[str, Any]) -> None:
    claims = [claim for group in kept["groups"] for claim in group["claims"]]
    assert len(claims) > 70
    assert all(claim["verdict"] == "reproduced" for claim in claims)
    assert kept["answer"] == f"All {len(claims)} statements were reproduced."
    text = " ".join(claim["statement"] for claim in claims)
    for number in range(1, 9):
        assert re.search(rf"Theorems? (?:\d (?:and|,) )*{number}\b", text), number
    assert all(f"E{number}:" in text for number in range(1, 13))


def test_the_command_writes_results_and_page(
    run: Run, kept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy.deepcopy(kept)
    broken["groups"][0]["claims"][0] |= {"verdict": "not reproduced: a is 1, expected 2", "reproduced": False}

    def fake(progress: Callable[[str, float], None]) -> dict[str, Any]:
        progress("Theorem 3", 0.5)
        return broken

    monkeypatch.setattr(cli, "reproduce_convex", fake)
    outcome = run("reproduce", "convex", "--out", tmp_path / "new" / "here")
    assert outcome.status == 0
    text = " ".join(outcome.out.split())
    assert kept["answer"] in text
    assert "Who falls into which trap" in text
    assert outcome.out.splitlines()[-1].endswith("report.html")
    assert json.loads((tmp_path / "new" / "here" / "results.json").read_text())["schema"] == 1
    assert "not reproduced: a is 1" in (tmp_path / "new" / "here" / "report.html").read_text(encoding="utf-8")


def test_a_directory_that_cannot_be_used_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "reproduce_convex", lambda progress: pytest.fail("work was done"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        outcome = run("reproduce", "convex", "--out", out)
        assert outcome.status == 2
        assert outcome.out == ""
        assert len(outcome.err.strip().splitlines()) == 1
        assert "cannot use" in outcome.err


def test_the_examples_of_the_documentation_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[1] / "docs" / "flatness-can-lie.md"
    if not page.exists():
        pytest.skip(f"{page} is part of the repository, not of the source distribution")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})
        expected = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == len(expected)
        for line, pattern in zip(printed, expected, strict=True):
            assert re.fullmatch(re.escape(pattern).replace(r"\.\.\.", ".*"), line), (line, pattern)


def test_pictures_of_the_documentation_are_there_and_small() -> None:
    docs = Path(__file__).parents[1] / "docs"
    if not docs.exists():
        pytest.skip(f"{docs} is part of the repository, not of the source distribution")
    named = re.findall(r"\]\((flatness-can-lie/\w+\.png)\)", (docs / "flatness-can-lie.md").read_text(encoding="utf-8"))
    assert len(named) == 7
    for name in named:
        assert (docs / name).stat().st_size < 200 * 1024


# --- the page ------------------------------------------------------------------------------------------------------


def test_tables_keep_the_exact_numbers(kept: dict[str, Any]) -> None:
    for row, source in zip(tie_table(kept["ties"]).rows, kept["ties"], strict=True):
        assert [cell.values[0] for cell in row[1:4]] == [source["risks"][i] for i in (0, 31, 63)]
    cells = [cell for row in kept["bounds"] for cell in row["cells"]]
    for row, cell in zip(bound_table(kept["bounds"]).rows, cells, strict=True):
        assert (row[2].values[0], row[3].values[0]) == (cell["measured"], cell["bound"])
        assert row[4].text == ("holds, vacuous" if cell["vacuous"] else "holds")
    for row, source in zip(zoo_table(kept["zoo"]).rows, kept["zoo"]["rows"], strict=True):
        for shown, cell in zip(row[1:], source["cells"], strict=True):
            assert shown.text == "–" if cell is None else shown.verdict == cell["verdict"]
            assert cell is None or (shown.detail == "measured") == (cell["why"] == "measurement")
    counts = [cell.values for row in grid_table(kept["constants"]["grid"]).rows for cell in row[1:]]
    assert counts == [(max(r["certificate"], r["run"]), r["runs"]) for r in kept["constants"]["grid"]]


def test_every_claim_is_a_row_in_the_terminal(kept: dict[str, Any]) -> None:
    for group in kept["groups"]:
        rows = claims_table(group).rows
        assert len(rows) == len(group["claims"])
        for row, claim in zip(rows, group["claims"], strict=True):
            assert row[0].text in (claim["statement"], "as above")
            assert row[1].detail == next(iter(claim["expected"]))
            assert row[3].text == claim["verdict"]


def test_the_page_needs_no_network_and_escapes_text(kept: dict[str, Any]) -> None:
    hostile = copy.deepcopy(kept)
    hostile["zoo"]["rows"][0]["label"] = "<script>alert(1)</script>"
    hostile["ties"][0]["label"] = "<b>bold</b>"
    page = render_convex(hostile)
    own = page[: page.index("<footer>")]  # what follows is plotly.js, which names addresses it does not ask for
    assert "<script>alert" not in page
    assert "<b>bold" not in own
    assert not re.search(r"(?:src|href)=\"(?!#)", own)
    assert "default-src 'none'" in own
    with pytest.raises(ValueError, match="schema 7"):
        render_convex(kept | {"schema": 7})


def test_every_colour_along_the_run_has_its_line_in_the_legend(kept: dict[str, Any]) -> None:
    page = render_convex(kept)
    figure = page[page.index('id="plots-run"') : page.index('id="plots-every"')]
    explained = {
        int(index): label
        for index, label in re.findall(r"fill: var\(--method-(\d)\).*?</svg>(.*?)</li>", figure, re.DOTALL)
    }
    drawn = {int(index) for index in re.findall(r'"color":"var\(--method-(\d)\)"', figure)}
    assert drawn == set(explained)
    for share, steps in (("¾", 48), ("½", 32), ("¼", 16)):
        (index,) = (index for index, label in explained.items() if share in label)
        assert re.search(
            rf'"color":"var\(--method-{index}\)"[^{{}}]*}},"mode":"lines","name":"mean of w_{steps} ', figure
        )


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_draws_every_plot_and_does_not_overflow(
    browser: Browser, kept: dict[str, Any], tmp_path: Path, width: int, scheme: Any
) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_convex(kept), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    plots = page.locator(".plot").count()
    assert plots == 20
    assert page.locator(".plot:has(.main-svg)").count() == plots
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert complaints == []
    page.close()
