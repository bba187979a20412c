"""Whole models audited end to end: what is found in them, and that no theorem is contradicted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from audit_fixture import QUICK
from flatminima import AuditReport, audit, compare_minima
from invariance_nets import NETS, build, data

pytestmark = pytest.mark.usefixtures("one_thread")
MEASURES = ("w_hessian_w", "parameter_norm", "lambda_max")
TOKENS, WORDS = 6, 11


def gpt2(seed: int = 0) -> nn.Module:
    logging.disable(logging.WARNING)
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=TOKENS, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def text() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, WORDS, (4, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def audited(model: nn.Module, loss_fn: Any, rows: Any) -> AuditReport:
    return audit(model, loss_fn, rows, measures=MEASURES, members=1, checks=1, laws=False, options=QUICK)


def test_a_gpt2_is_audited() -> None:
    report = audited(gpt2(), None, text())
    assert {
        "query-key", "query-key-diagonal", "value-output", "value-output-diagonal", "norm-gain-rescaling", "layernorm-shift",
        "key-bias-shift", "value-bias-shift", "unit-permutation", "head-permutation",
    } <= set(report.coordinates)  # fmt: skip
    assert not {"softmax-shift", "temperature", "relu-unit-rescaling"} & set(report.proofs)  # tied embeddings, GELU
    assert all(change < 1e-9 for change in report.proofs.values())
    assert not report.by_verdict("broken")
    assert not report.unanalysed
    status = {(c.measure, c.symmetry): c.status for c in report.changes}
    for kind in ("query-key", "value-output", "norm-gain-rescaling", "unit-permutation", "head-permutation"):
        assert status["w_hessian_w", kind] == "invariant"
    for kind in ("query-key", "value-output", "norm-gain-rescaling"):
        assert status["parameter_norm", kind] == "changes"
    for kind in ("unit-permutation", "head-permutation"):
        assert status["parameter_norm", kind] == status["lambda_max", kind] == "invariant"


def test_two_gpt2_are_compared() -> None:
    found = compare_minima(
        gpt2(), gpt2(1), None, text(), measures=["w_hessian_w", "parameter_norm"], members=1, options=QUICK
    )
    assert found.function.relation == "different"
    assert found.function.agreement is not None
    assert found.flatter is None  # values with biases: w'Hw depends on coordinates, and the norm is none of flatness
    assert "Refused" in found.verdict


@pytest.mark.parametrize("name", NETS)
def test_no_theorem_is_contradicted(name: str) -> None:
    report = audited(build(name), F.cross_entropy, data(name))
    assert not report.by_verdict("broken")
    assert report.verdicts["parameter_norm"] == "changes"
    assert all(o.max_change < 1e-9 for o in report.orbits if o.symmetry.exact)


CHANNELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "frozen": lambda m: _frozen(m),
}


def _frozen(model: nn.Module) -> nn.Module:
    next(model.children()).requires_grad_(False)
    return model


@pytest.mark.parametrize("how", CHANNELS)
def test_a_convolutional_network_as_people_keep_it(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 3),
    )  # fmt: skip
    x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    report = audited(CHANNELS[how](model), F.cross_entropy, (x, y))
    assert {"relu-unit-rescaling", "norm-gain-rescaling", "unit-permutation"} <= set(report.coordinates)
    assert not report.by_verdict("broken")
