"""Groups, options and refusals of ``flatminima measure --measures``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Outcome
from flatminima.measures import MEASURES, resolve

Run = Callable[..., Outcome]
NEED_PROBES = {"probe_patterns", "free_patterns"}
TARGET = """
import torch
from torch import nn
from torch.nn import functional as F


def build(act=nn.ReLU):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    return model, F.cross_entropy, (x, (x[:, 0] > 0).long())


def smooth():
    return build(nn.GELU)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(TARGET)
    return path


def test_a_group_and_names(run: Run, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    outcome = run("measure", f"{target}:build", "--measures", "cheap,orbit_minimal_trace", "--json", path)
    assert outcome.status == 0, outcome.err
    found = json.loads(path.read_text(), parse_constant=pytest.fail)["measures"]
    assert list(found) == [m.name for m in resolve(["cheap", "orbit_minimal_trace"])]
    assert {name for name, m in found.items() if m["value"] is None} == NEED_PROBES
    assert all(m["converged"] for name, m in found.items() if name not in NEED_PROBES)
    assert found["orbit_minimal_trace"]["error_kind"] == "duality gap"
    assert sum(m["cost"] for m in found.values()) < 5


def test_what_does_not_apply_is_passed_over_in_a_group_and_refused_by_name(
    run: Run, target: Path, tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    outcome = run("measure", f"{target}:smooth", "--measures", "cheap", "--trace", "--json", path)
    assert outcome.status == 0, outcome.err
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    found = content["measures"]
    assert {name for name, m in found.items() if m["value"] is None} == {"path_norm", "path_norm_l1"} | NEED_PROBES
    assert found["path_norm"]["error_kind"] == "not applicable"
    assert found["path_norm"]["note"] == "GELU at '1' is not known to the path norm"
    said = "Measures that do not apply here: path norm, path L1 norm, activation patterns on probes and "
    assert any(line.startswith(said) for line in content["cautions"]), content["cautions"]
    named = run("measure", f"{target}:smooth", "--measures", "trace,orbit_minimal_trace")
    assert named.status == 2
    assert "--measures orbit_minimal_trace does not apply here: smooth activation: nn.GELU at '1'" in named.err
    assert named.out == ""


def test_options_of_the_measures(run: Run, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    arguments = (
        "--measures",
        "m_sharpness,margin_quantile",
        "--option",
        "micro_batch=8",
        "--option",
        "margin_quantile=0.5",
    )
    assert run("measure", f"{target}:build", *arguments, "--json", path).status == 0
    content = json.loads(path.read_text())
    assert "m = 8, 5 micro-batches" in content["measures"]["m_sharpness"]["note"]
    assert content["settings"]["measure_options"]["micro_batch"] == 8
    for wrong, message in (
        ("micro_batch", "expected name=value, got 'micro_batch'"),
        ("microbatch=8", "unknown option of the measures 'microbatch': expected one of micro_batch,"),
        ("micro_batch=many", "micro_batch takes a number of type int, got 'many'"),
        ("micro_batch=0", "micro_batch must be at least 1, got 0"),
    ):
        outcome = run("measure", f"{target}:build", "--option", wrong)
        assert outcome.status == 2
        assert message in outcome.err
    layer = run(
        "measure", f"{target}:build", "--measures", "relative_flatness", "--option", "relative_flatness_layer=first"
    )
    assert layer.status == 2
    assert "unknown linear layer 'first': expected one of" in layer.err


def test_the_list_of_measures(run: Run) -> None:
    outcome = run("measures")
    assert outcome.status == 0
    assert all(re.search(rf"\b{name}\b", outcome.out) for name in MEASURES)
    assert "sam_sharpness *" in outcome.out
