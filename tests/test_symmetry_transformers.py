"""Models of Hugging Face, tiny and with random weights: what is found in them, and what their ties forbid."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from flatminima.symmetries import SymmetrySearch, find_symmetries, prove
from symmetry_models import generic

TOKENS, WORDS = 6, 11
SMALL = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
    "max_position_embeddings": 16,
}  # fmt: skip
GPT2 = {"vocab_size": WORDS, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": TOKENS}
ATTENTION = {"query-key", "query-key-diagonal", "value-output", "value-output-diagonal"}
BIASES = {"key-bias-shift", "value-bias-shift"}
HEAD = {"softmax-shift", "temperature"}
PERMUTATIONS = {"unit-permutation", "head-permutation"}


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, WORDS, (3, TOKENS), generator=torch.Generator().manual_seed(seed))


def text(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": ids(seed), "attention_mask": torch.ones(3, TOKENS, dtype=torch.int64)}


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], set[str]]] = {
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), text,
        ATTENTION | BIASES | PERMUTATIONS | {"norm-gain-rescaling", "layernorm-shift"}),
    "gpt2, untied": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, tie_word_embeddings=False)), text,
        ATTENTION | BIASES | PERMUTATIONS | HEAD | {"norm-gain-rescaling", "layernorm-shift", "residual-stream"}),
    "gpt2, eager": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, attn_implementation="eager")), text,
        ATTENTION | BIASES | PERMUTATIONS | {"norm-gain-rescaling", "layernorm-shift"}),
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4)), pictures,
        ATTENTION | BIASES | PERMUTATIONS | HEAD | {"norm-gain-rescaling", "layernorm-shift", "residual-stream"}),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)), text,
        ATTENTION | PERMUTATIONS | HEAD | {"norm-gain-rescaling", "gated-rescaling", "residual-stream"}),
    "bert": (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3)), text,
        ATTENTION | BIASES | PERMUTATIONS | HEAD | {"norm-gain-rescaling", "layernorm-shift", "sign-flip"}),
    "qwen3": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=4)), text,
        {"norm-gain-rescaling", "gated-rescaling", "query-key-diagonal", "value-output", "value-output-diagonal",
         "residual-stream", "unit-permutation"} | HEAD),
    "gpt-neox": (lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**{**SMALL, "hidden_size": 32, "num_hidden_layers": 1}, rotary_pct=0.5)), text,
        ATTENTION | PERMUTATIONS | HEAD | {"norm-gain-rescaling", "layernorm-shift", "residual-stream", "value-bias-shift"}),
    "albert": (lambda: transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**SMALL, embedding_size=8)), text,
        ATTENTION | BIASES | PERMUTATIONS | HEAD
        | {"norm-gain-rescaling", "layernorm-shift", "residual-stream", "sign-flip"}),
}  # fmt: skip


@functools.cache
def searched(name: str) -> tuple[nn.Module, SymmetrySearch]:
    logging.disable(logging.WARNING)
    make, example, _ = MODELS[name]
    model = generic(make()).eval()
    return model, find_symmetries(model, example(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_catalogue_is_found_and_proved(name: str) -> None:
    model, search = searched(name)
    assert {s.kind for s in search.found} == MODELS[name][2], search.rejected
    assert [s.kind for s in search.approximate] == ["pre-norm-rescaling"]
    assert not any("was not analysed" in reason for _, reason in search.rejected)
    for symmetry in search.found:
        assert search.proofs[symmetry.kind].status == "proved"
        other = symmetry.member(torch.Generator().manual_seed(7))
        assert prove(model, other, MODELS[name][1](3)).max_change <= 1e-9, symmetry  # on other inputs


def sites(name: str) -> dict[str, tuple[str, ...]]:
    return {s.kind: s.sites for s in searched(name)[1].found}


def test_the_fused_projection_of_gpt2_is_taken_apart() -> None:
    found = sites("gpt2")
    blocks = [f"transformer.h.{i}" for i in (0, 1)]
    assert found["query-key"] == tuple(f"{b}.attn.c_attn (2 heads)" for b in blocks)
    assert found["value-output"] == tuple(f"{b}.attn.c_attn, {b}.attn.c_proj (2 heads)" for b in blocks)
    assert found["norm-gain-rescaling"] == tuple(
        site for b in blocks for site in (f"{b}.ln_1 -> {b}.attn.c_attn", f"{b}.ln_2 -> {b}.mlp.c_fc")
    )
    assert found["head-permutation"] == tuple(f"{b}.attn (2 heads)" for b in blocks)
    assert f"{blocks[0]}.mlp.c_fc -> {blocks[0]}.mlp.c_proj" in found["unit-permutation"]
    model, search = searched("gpt2")
    member = next(s for s in search.found if s.kind == "query-key").member(torch.Generator().manual_seed(0))
    weight = member.apply(model).transformer.h[0].attn.c_attn.weight - model.transformer.h[0].attn.c_attn.weight
    assert bool((weight[:, :16] != 0).all())
    assert bool((weight[:, 16:] == 0).all())  # the values stay


def test_the_tied_embedding_of_gpt2_allows_only_what_both_uses_allow() -> None:
    """The stream may be permuted (embedding and output head move alike), and scaled if the last gain shrinks. It may not be
    rotated, because the last gain is not constant, nor may the logits be shifted or scaled."""
    model, search = searched("gpt2")
    found, reasons = sites("gpt2"), [f"{site}: {reason}" for site, reason in search.rejected]
    assert any(site.startswith("transformer.wte, transformer.wpe") for site in found["unit-permutation"])
    assert not any("transformer.wte" in site for site in found["layernorm-shift"])
    assert {"residual-stream", "softmax-shift", "temperature"}.isdisjoint(found)
    for kind in ("residual-stream", "softmax-shift", "temperature"):
        assert any(kind in r and "transformer.wte.weight" in r and "(tied parameters)" in r for r in reasons)
    twin = search.approximate[0].member(torch.Generator().manual_seed(1)).apply(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    c = float((twin.transformer.wte.weight / model.transformer.wte.weight)[0, 0])
    assert abs(c - 1) > 0.1
    torch.testing.assert_close(twin.transformer.ln_f.weight, model.transformer.ln_f.weight / c)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1.3)
    again = find_symmetries(model, text(), kinds=["residual-stream"])
    assert [s.kind for s in again.found] == ["residual-stream"]  # now it may be rotated
    searched.cache_clear()


def test_grouped_queries_and_rotary_positions_of_llama() -> None:
    found = sites("llama")
    layers = [f"model.layers.{i}" for i in (0, 1)]
    assert found["query-key"] == tuple(f"{b}.self_attn.q_proj, {b}.self_attn.k_proj (4 heads)" for b in layers)
    assert found["gated-rescaling"] == tuple(f"{b}.mlp.up_proj -> {b}.mlp.down_proj" for b in layers)
    one = ("model.layers.0.self_attn (2 heads)", *["model.layers.0.self_attn (2 query heads of one key head)"] * 2)
    assert found["head-permutation"][:3] == one
    model, search = searched("llama")
    member = next(s for s in search.found if s.kind == "query-key").member(torch.Generator().manual_seed(0))
    twin = member.apply(model).model.layers[0].self_attn
    old = model.model.layers[0].self_attn
    for i in range(2):  # a scaled rotation of each pair of rows: what they are of length stays in proportion
        pair, before = twin.k_proj.weight[[i, i + 2]], old.k_proj.weight[[i, i + 2]]
        ratio = pair.norm() / before.norm()
        torch.testing.assert_close(pair @ pair.T, _turned(before @ before.T, pair, before) * ratio**2)


def _turned(gram: Tensor, pair: Tensor, before: Tensor) -> Tensor:
    turn = pair @ torch.linalg.pinv(before)
    turn = turn / turn.det().abs().sqrt()
    torch.testing.assert_close(turn.T @ turn, torch.eye(2, dtype=torch.float64))
    return turn @ gram @ turn.T


def test_rejections_speak_of_layers() -> None:
    _, search = searched("llama")
    reason = dict(search.rejected)["model.layers.0.mlp.gate_proj"]
    assert "model.layers.0.mlp.act_fn (SiLUActivation), which is not positively homogeneous: " in reason
    assert "changes the outputs by" in reason
    _, search = searched("gpt2, untied")
    assert "(NewGELUActivation)" in dict(search.rejected)["transformer.h.0.mlp.c_fc"]


def test_a_bias_that_differs_from_head_to_head_is_seen_by_the_proof() -> None:
    config = transformers.T5Config(vocab_size=WORDS, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4)
    model = generic(transformers.T5ForConditionalGeneration(config)).eval()
    search = find_symmetries(model, {"input_ids": ids(), "decoder_input_ids": ids(1)})
    found = {s.kind: s.sites for s in search.found}
    assert found["head-permutation"] == (
        "decoder.block.0.layer.1.EncDecAttention (4 heads)",
    )  # the one without such a bias
    refused = [why for site, why in search.rejected if site.endswith("SelfAttention (4 heads)")]
    assert len(refused) == 2
    assert all("head-permutation changes the outputs by" in why for why in refused)
