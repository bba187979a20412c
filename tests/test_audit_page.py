"""The page of an audit and its JSON against the numbers: parsed, and drawn in a browser."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from playwright.sync_api import Browser
from rich.console import Console
from torch import nn

from audit_fixture import QUICK, fitted, mlp, rows
from flatminima.report.audit_page import render_audit
from flatminima.report.terminal import audit_tables
from flatminima.study.audit_settings import AuditSettings
from flatminima.study.auditing import Minimum, audit_minima
from flatminima.study.settings import SettingsError

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = "flatminima audit my.py:build w.safetensors"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> %{x} $&amp; [bold]"
SETTINGS = AuditSettings(
    measures=("trace", "lambda_max", "w_hessian_w", "orbit_minimal_trace", "parameter_norm"), members=2, options=QUICK
)


@cache
def one() -> dict[str, Any]:
    """Not to be changed: copy it first."""
    model = fitted(mlp(), *rows())
    return audit_minima([Minimum("w", model)], F.cross_entropy, rows(), SETTINGS, command=COMMAND)


@cache
def two() -> dict[str, Any]:
    minima = [Minimum(name, fitted(mlp(), *rows(), steps=steps)) for name, steps in (("early", 60), ("late", 400))]
    return audit_minima(minima, F.cross_entropy, rows(), SETTINGS, command=COMMAND)


@cache
def untested() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    return audit_minima([Minimum("linear", model)], F.cross_entropy, rows(), SETTINGS, command=COMMAND)


def hostile(found: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(found)
    found["model"]["name"] = found["command"] = found["answer"] = HOSTILE
    found["cautions"], found["notes"] = [HOSTILE], [HOSTILE]
    for audit in found["audits"]:
        audit["name"] = HOSTILE
        audit["rejected"] = [[HOSTILE, HOSTILE]]
    return found


def words(page: str) -> str:
    text = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    for code, sign in (("&#39;", "'"), ("&#34;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(code, sign)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


# ----- the JSON -------------------------------------------------------------------------------------------------------


def test_the_record_is_json_and_holds_what_was_asked() -> None:
    for found in (one(), two(), untested()):
        plain = json.loads(json.dumps(found, allow_nan=False))
        assert plain == found
        assert plain["settings"]["measure_options"]["draws"] == QUICK.draws
        assert plain["command"] == COMMAND
    assert one()["settings"]["members"] == 2
    assert one()["comparison"] is None
    assert two()["comparison"]["names"] == ["early", "late"]


def test_every_field_is_documented() -> None:
    document = (Path(__file__).parents[1] / "docs" / "audit.md").read_text()
    named = set(re.findall(r"`([\w.\[\]]+)`", document))

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value)) if value else set()
        return set(value) | set().union(*map(keys, value.values())) if isinstance(value, dict) else set()

    skip = {"settings", "times", "changes", "measures"}  # whose keys are names of options, parts, measures and kinds
    fields = set(two()) | keys({k: v for k, v in two().items() if k not in skip | {"audits"}})
    for audit in two()["audits"]:
        fields |= keys({k: v for k, v in audit.items() if k not in skip})
        for cell in (*audit["measures"].values(), *audit["changes"]["trace"].values()):
            fields |= set(cell)
    assert fields <= named | {n.removesuffix("[]") for n in named}, sorted(fields - named)


def test_the_same_command_gives_the_same_bytes_apart_from_times() -> None:
    again = audit_minima([Minimum("w", fitted(mlp(), *rows()))], F.cross_entropy, rows(), SETTINGS, command=COMMAND)
    assert {k: v for k, v in again.items() if k != "times"} == {k: v for k, v in one().items() if k != "times"}


def test_settings_and_counts_are_checked() -> None:
    assert AuditSettings().counts(1) == {"members": 5, "checks": 2}
    assert AuditSettings().counts(2) == {"members": 2, "checks": 1}
    with pytest.raises(SettingsError, match="--members must be at least 1, got 0"):
        AuditSettings(members=0)
    with pytest.raises(ValueError, match="expected one minimum to audit or two to compare, got 0"):
        audit_minima([], F.cross_entropy, rows())


# ----- the page as HTML -----------------------------------------------------------------------------------------------


def test_sentences_and_numbers_are_on_the_page() -> None:
    for found in (one(), two(), untested()):
        text = words(render_audit(found))
        for sentence in (found["answer"], *found["details"], *found["cautions"]):
            assert " ".join(sentence.split()) in text
        for audit in found["audits"]:
            for m in audit["measures"].values():
                assert m["label"] in text
                assert " ".join(m["sentence"].split()) in text
            for site, reason in audit["rejected"]:
                assert reason in text or site in text
        assert "None" not in text
        assert not re.search(r"\bnan\b", text)


def test_every_figure_names_its_command_and_its_field() -> None:
    page = render_audit(one())
    captions = "".join(re.findall(r"<figcaption.*?</figcaption>", page, flags=re.DOTALL))
    assert captions.count(COMMAND) == captions.count("audit.json → ") == len(re.findall(r"<figure", page))


def test_rendering_changes_nothing_and_another_schema_is_refused() -> None:
    before = copy.deepcopy(two())
    assert render_audit(two()) == render_audit(json.loads(json.dumps(two())))
    assert two() == before
    with pytest.raises(ValueError, match="schema 3, but this version reads schema 1"):
        render_audit({"schema": 3})


# ----- the terminal ---------------------------------------------------------------------------------------------------


def test_the_terminal_says_what_the_page_says() -> None:
    for found in (one(), two(), untested(), hostile(two())):
        console = Console(width=400, color_system=None)
        with console.capture() as capture:
            console.print(audit_tables(found))
        text = capture.get()
        assert found["answer"] in text
        assert all(line in text for line in (*found["details"], *found["cautions"]))
    console = Console(width=80, color_system=None)
    with console.capture():
        console.print(audit_tables(two()))


# ----- the page in a browser ------------------------------------------------------------------------------------------

CASES = {"one": one, "two": two, "untested": untested, "hostile": lambda: hostile(two())}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [1400, 390])
def test_the_browser_draws_everything_and_asks_for_nothing(
    browser: Browser, tmp_path: Path, case: str, width: int
) -> None:
    path = tmp_path / "audit.html"
    path.write_text(render_audit(CASES[case]()), encoding="utf-8")
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if width < 400 else "light"
    )
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("() => document.querySelectorAll('details').forEach(part => part.open = true)")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg.main-svg'))"
    )
    outside = page.evaluate(
        "() => [...document.querySelectorAll('h1, h2, h3, p, li, figcaption, .plot, .plot svg, .scroll, dd')]"
        ".filter(e => !e.closest('table') && e.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= width
    cut_off = page.evaluate(
        "() => [...document.querySelectorAll('.xtitle, .ytitle')].filter(title => {"
        "const t = title.getBoundingClientRect(), p = title.closest('.plot').getBoundingClientRect();"
        "return t.left < p.left - 1 || t.right > p.right + 1 || t.bottom > p.bottom + 1}).map(t => t.textContent)"
    )
    assert cut_off == []
    over_each_other = page.evaluate(  # on a telephone a cell is its label and its value, side by side
        "() => innerWidth > 640 ? [] : [...document.querySelectorAll('.matrix td')].filter(cell =>"
        "parseFloat(getComputedStyle(cell).gridTemplateColumns) < 80).map(cell => cell.dataset.label)"
    )
    assert over_each_other == []
    assert page.evaluate("() => document.querySelectorAll('img').length") == 0
    assert requests == [path.as_uri()]
    assert complaints == []
    context.close()
