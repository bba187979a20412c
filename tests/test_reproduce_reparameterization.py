"""The reproduction of the reparameterisation experiment: its laws, its verdicts, the command and its page."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser
from torch.nn import functional as F

from conftest import Outcome
from flatminima import cli
from flatminima.data import DataError
from flatminima.models import build
from flatminima.protocols import reparameterization as protocol
from flatminima.protocols import reproduce_reparameterization, rescaled_networks
from flatminima.protocols.rescaled_networks import Regime, layer_rescalings, layer_sites, predicted_trace
from flatminima.protocols.small_data import PROBE_SEED, SUBSET_SEED, small_data, train_small
from flatminima.report.reparameterization_page import (
    measure_table,
    network_table,
    pair_table,
    render_reparameterization,
)

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Outcome]
KEPT = Path(__file__).parents[1] / "docs" / "reproductions" / "reparameterization.json"


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """Everything, on one small network and two values of each scale."""
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        for module in (protocol, rescaled_networks):
            patch.setattr(module, "BETAS", (1.0, 20.0))
            patch.setattr(module, "GAMMAS", (1.0, 5.0))
            patch.setattr(module, "HIDDEN", (24, 16))
            patch.setattr(module, "NARROW", (16, 6))
        patch.setattr(protocol, "REGIMES", (Regime("one", 0, 64, 0.1),))
        patch.setattr(protocol, "ROWS", 120)
        patch.setattr(protocol, "NARROW_ROWS", 80)
        patch.setattr(protocol, "PROBES", 10)
        patch.setattr(protocol, "_unseen", lambda name: 200)
        seen: list[float] = []
        found = reproduce_reparameterization("digits", lambda part, done: seen.append(done))
        assert seen == sorted(seen)
        assert seen[-1] == pytest.approx(1.0)
        return found


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    if not KEPT.exists():
        pytest.skip(f"{KEPT} is part of the repository, not of the source distribution")
    content: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return content


# --- the laws ------------------------------------------------------------------------------------------------------


def test_the_law_of_the_trace_against_a_dense_hessian() -> None:
    model = build("mlp", (3,), 2, seed=0, hidden=(4, 3)).double()
    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 2

    def dense(net: torch.nn.Module) -> dict[str, float]:
        names = [name for name, _ in net.named_parameters()]
        values = tuple(p.detach() for p in net.parameters())

        def loss(*parts: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (x,)), y)

        blocks = torch.autograd.functional.hessian(loss, values)
        return {n: float(blocks[i][i].reshape(values[i].numel(), -1).trace()) for i, n in enumerate(names)}

    blocks, sites = dense(model), layer_sites(model, x)
    assert len(sites) == 2
    for beta, gamma in ((1.0, 1.0), (3.0, 1.0), (1.0, 0.5), (20.0, 7.0)):
        image = layer_rescalings(sites, (beta, gamma)).apply(model)
        torch.testing.assert_close(image(x), model(x), rtol=1e-12, atol=1e-13)
        assert sum(dense(image).values()) == pytest.approx(predicted_trace(blocks, beta, gamma), rel=1e-10)


def test_data_follow_the_recorded_protocol() -> None:
    data = small_data("digits", rows=50, probes=30)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(SUBSET_SEED))[:50]
    rest = sorted(set(range(1797)) - set(order.tolist()))
    drawn = torch.randperm(1747, generator=torch.Generator().manual_seed(PROBE_SEED))[:30]
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert data.y.tolist() == bunch.target[order].tolist()
    assert data.probe_labels.tolist() == [int(bunch.target[rest[i]]) for i in drawn]
    torch.testing.assert_close(data.x[0].double() * 16, torch.from_numpy(bunch.data[order[0]]), rtol=1e-6, atol=0)
    with pytest.raises(DataError, match="unknown data set 'mnst': expected one of mnist"):
        small_data("mnst")
    with pytest.raises(DataError, match="rows is 1797"):
        small_data("digits", rows=1797)
    with pytest.raises(DataError, match="probes is 1700: expected 1 to 1697"):
        small_data("digits", rows=100, probes=1700)


@pytest.mark.parametrize(("name", "first"), [("mnist", [5, 1, 1]), ("fashion-mnist", [3, 8, 9])])
def test_probes_are_those_of_the_notebooks(name: str, first: list[int]) -> None:
    try:
        data = small_data(name, rows=250, probes=3)
    except DataError as error:
        pytest.skip(str(error))
    assert data.probe_labels.tolist() == first


def test_training_is_repeatable_and_leaves_the_global_random_state_alone() -> None:
    data = small_data("digits", rows=60, probes=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (train_small(data, (8,), seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.accuracy == 1.0
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert train_small(data, (8,), seed=1, most_epochs=3).epochs == 3


# --- everything ----------------------------------------------------------------------------------------------------


def test_everything_but_the_size_of_the_effect_is_the_same_on_a_small_network(small: dict[str, Any]) -> None:
    assert [group["name"] for group in small["groups"]] == ["function", "trace", "invariant", "limits"]
    claims = [claim for group in small["groups"] for claim in group["claims"]]
    for claim in claims:
        if not claim["statement"].startswith("rescaling inflates"):
            assert claim["verdict"] == "reproduced", claim
    json.dumps(small, allow_nan=False)
    assert len(small["networks"][0]["copies"]) == 4
    assert {copy["name"] for copy in small["narrow"][0]["copies"]} >= {
        "β = 20, γ = 5",
        "relu-unit-rescaling",
        "unit-permutation",
    }
    unchanged = {name for name, entry in small["measures"].items() if entry["unchanged"]}
    assert unchanged == {"w_hessian_w", "adaptive_sharpness", "adaptive_trace", "fisher_rao", "orbit_minimal_trace"}
    assert not small["measures"]["trace"]["unchanged"]
    assert [(row["pair_proxy"], row["extension"]) for row in small["rewired"]] == [(5, 16), (6, 24), (6, 22)]


def test_what_moves_is_said_to(small: dict[str, Any]) -> None:
    record = copy.deepcopy(small["networks"][0])
    record["copies"][2]["measures"]["w_hessian_w"]["value"] *= 1.0001
    record["copies"][1]["predictions_changed"] = 1
    record["copies"][3]["measures"]["trace"]["value"] *= 1.001
    record["copies"][3]["patterns"][0] += 1
    failed = {claim.statement for claim in protocol._measure_claims([record]) if claim.failures}
    assert failed == {"w'Hw does not change"}
    assert "predictions changed is 1, expected 0" in protocol._function_claim(record, 200).verdict
    assert "trace at β = 20, γ = 5" in protocol._trace_claims(record)[0].verdict
    assert "patterns (one)" in protocol._count_claims([record], small["narrow"])[0].verdict


def test_unknown_data_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown data set 'digit': expected one of digits, "):
        reproduce_reparameterization("digit")


def test_without_mnist_the_digits_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, rows: int, probes: int) -> Any:
        if name == "mnist":
            raise DataError("missing")
        return small_data(name, rows, probes)

    monkeypatch.setattr(protocol, "small_data", absent)
    assert protocol._load("auto")[0] == "digits"
    with pytest.raises(DataError, match="missing"):
        protocol._load("mnist")


def test_what_is_kept_was_reproduced(kept: dict[str, Any]) -> None:
    claims = [claim for group in kept["groups"] for claim in group["claims"]]
    assert len(claims) == 26
    assert all(claim["verdict"] == "reproduced" for claim in claims)
    assert kept["answer"] == "All 26 statements were reproduced."
    assert kept["settings"]["data"] == "mnist"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_is_reproduced_and_is_what_is_kept(kept: dict[str, Any]) -> None:
    try:
        found = reproduce_reparameterization("mnist")
    except DataError as error:
        pytest.skip(str(error))
    assert found["answer"] == kept["answer"]
    statements = [[claim["statement"] for claim in group["claims"]] for group in found["groups"]]
    assert statements == [[claim["statement"] for claim in group["claims"]] for group in kept["groups"]]


# --- the command and its page --------------------------------------------------------------------------------------


def test_the_command_writes_results_and_page(
    run: Run, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(data: str, progress: Callable[[str, float], None]) -> dict[str, Any]:
        progress("one", 0.5)
        return small | {"settings": small["settings"] | {"data": data}}

    monkeypatch.setattr(cli, "reproduce_reparameterization", fake)
    outcome = run("reproduce", "reparameterization", "--out", tmp_path / "new", "--data", "digits")
    assert outcome.status == 0
    assert small["answer"] in outcome.out
    assert "What stays with the function" in outcome.out
    assert outcome.out.splitlines()[-1].endswith("report.html")
    assert json.loads((tmp_path / "new" / "results.json").read_text())["settings"]["data"] == "digits"
    refused = run("reproduce", "reparameterization", "--data", "cifar")
    assert refused.status == 2
    assert refused.err.startswith("error: unknown data set 'cifar'")


def test_tables_keep_the_exact_numbers(small: dict[str, Any]) -> None:
    (row,) = network_table(small["networks"], small["settings"]).rows
    assert row[2].values[0] == small["networks"][0]["trace"]
    for row, (name, entry) in zip(
        measure_table(small["networks"], small["measures"]).rows, small["measures"].items(), strict=True
    ):
        assert row[0].text == entry["label"]
        assert row[1].values[0] == small["networks"][0]["copies"][0]["measures"][name]["value"]
        assert row[1].verdict == ("stays" if entry["unchanged"] else "moves")
        assert row[1].tone == "good"
    rows = pair_table(small["narrow"]).rows
    assert [cell.values[0] for cell in rows[0][1:]] == [record["value"] for record in small["narrow"]]


def test_the_page_needs_no_network_and_escapes_text(small: dict[str, Any]) -> None:
    hostile = copy.deepcopy(small)
    hostile["networks"][0]["name"] = "<script>alert(1)</script>"
    page = render_reparameterization(hostile)
    own = page[: page.index("<footer>")]  # what follows is plotly.js, which names addresses it does not ask for
    assert "<script>alert" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)", own)
    with pytest.raises(ValueError, match="schema 7"):
        render_reparameterization(small | {"schema": 7})


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_draws_every_plot_and_does_not_overflow(
    browser: Browser, small: dict[str, Any], tmp_path: Path, width: int, scheme: Any
) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_reparameterization(small), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    plots = page.locator(".plot").count()
    assert plots == 2
    assert page.locator(".plot:has(.main-svg)").count() == plots
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert complaints == []
    page.close()
