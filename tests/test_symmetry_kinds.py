"""Every kind of the catalogue on small networks: where it is found; that it is proved, undone, needed whole; its law."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatminima.symmetries import KINDS, Member, Scale, Symmetry, SymmetrySearch, find_symmetries, prove
from flatminima.symmetries.kinds import HESSIAN_LAWS
from symmetry_models import (
    Case,
    ConvNorm,
    GroupNormed,
    Llama,
    Stream,
    Transformer,
    WithUnits,
    generic,
    inputs,
    mlp,
    tokens,
    with_units,
)

HEAD = {"softmax-shift": ("head.weight -> output", "head.bias -> output"), "temperature": ("head -> output",)}
LAST = {"softmax-shift": ("2.weight -> output", "2.bias -> output"), "temperature": ("2 -> output",)}
NORMS = "norm1, norm2, norm"


class GatedUnit(nn.Module):
    """down(gate(x) * up(x)), with a gate that is linear or not."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.activation = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3), gate

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def layer(norm: str) -> nn.Module:
    return nn.TransformerEncoderLayer(
        4, 2, 5, activation="relu", batch_first=True, norm_first=norm == "pre", dropout=0.0
    )


CASES: dict[str, Case] = {
    "relu": (lambda: mlp(nn.ReLU), lambda: inputs(7, 3), {
        "relu-layer-rescaling": ("0 -> 2",), "relu-unit-rescaling": ("0 -> 2",), "unit-permutation": ("0 -> 2",), **LAST,
    }),
    "prelu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 3)), lambda: inputs(7, 3), {
        "relu-layer-rescaling": ("0 -> 2",), "relu-unit-rescaling": ("0 -> 2",), "unit-permutation": ("0 -> 2",), **LAST,
    }),
    "gelu": (lambda: mlp(nn.GELU), lambda: inputs(7, 3), {"unit-permutation": ("0 -> 2",), **LAST}),
    "tanh": (lambda: mlp(nn.Tanh), lambda: inputs(7, 3), {
        "unit-permutation": ("0 -> 2",), "sign-flip": ("0 -> 2",), **LAST,
    }),
    "sigmoid": (lambda: mlp(nn.Sigmoid), lambda: inputs(7, 3), {
        "unit-permutation": ("0 -> 2",), "sigmoid-flip": ("0 -> 2",), **LAST,
    }),
    "batch norm": (ConvNorm, lambda: inputs(5, 2, 6, 6), {
        "relu-layer-rescaling": ("bn1 -> conv2", "bn2 -> head"), "relu-unit-rescaling": ("bn1 -> conv2", "bn2 -> head"),
        "norm-gain-rescaling": ("bn1 -> conv2", "bn2 -> head"), "pre-norm-rescaling": ("conv1 -> bn1", "conv2 -> bn2"),
        "layernorm-shift": ("conv1.bias -> bn1", "conv2.bias -> bn2"),
        "unit-permutation": ("conv1 -> conv2", "conv2 -> head"), **HEAD,
    }),
    "group norm": (GroupNormed, lambda: inputs(5, 2, 6, 6), {
        "relu-layer-rescaling": ("norm -> head",), "relu-unit-rescaling": ("norm -> head",),
        "norm-gain-rescaling": ("norm -> head",), "layernorm-shift": ("conv.bias -> norm", "conv.bias -> norm"),
        "unit-permutation": ("conv -> head", "conv -> head"), **HEAD,
    }),
    "stream": (Stream, lambda: inputs(6, 6), {
        "relu-layer-rescaling": ("embed, down -> up, head",), "relu-unit-rescaling": ("embed, down -> up, head",),
        "residual-stream": ("embed, down -> up, head",), "unit-permutation": ("embed, down -> up, head", "up -> down"),
        "sign-flip": ("up -> down",), **HEAD,
    }),
    "swiglu": (lambda: GatedUnit(F.silu), lambda: inputs(7, 3), {
        "gated-rescaling": ("up -> down",), "unit-permutation": ("gate, up -> down",),
        "softmax-shift": ("down.weight -> output", "down.bias -> output"), "temperature": ("down -> output",),
    }),
    "bilinear": (lambda: GatedUnit(nn.Identity()), lambda: inputs(7, 3), {
        "gated-rescaling": ("gate -> down", "gate, up"), "unit-permutation": ("gate, up -> down",),
        "softmax-shift": ("down.weight -> output", "down.bias -> output"), "temperature": ("down -> output",),
    }),
    **{f"transformer, {style}": (functools.partial(Transformer, style), lambda: inputs(5, 4, 6), {
        "norm-gain-rescaling": ("norm1 -> attention.qkv", "norm2 -> up", "norm -> head"),
        "layernorm-shift": tuple(f"{name} -> {NORMS}" for name in (
            "embed", "attention.out", "down", "embed.bias", "position", "attention.out.bias", "down.bias")),
        "query-key": ("attention.qkv (2 heads)",), "query-key-diagonal": ("attention.qkv (2 heads)",),
        "key-bias-shift": ("attention.qkv.bias (attention)",),
        "value-output": ("attention.qkv, attention.out (2 heads)",),
        "value-output-diagonal": ("attention.qkv -> attention.out",),
        "value-bias-shift": ("attention.qkv.bias (attention)",),
        "residual-stream": (f"embed, attention.out, down -> {NORMS}",),
        "unit-permutation": ("embed, attention.out, down -> attention.qkv, up, head", "up -> down"),
        "head-permutation": ("attention (2 heads)",), **HEAD,
    }) for style in ("sdpa", "einsum", "matmul")},
    "gainless": (
        lambda: Transformer("sdpa", lambda dim: nn.RMSNorm(dim, elementwise_affine=False), bias=False),
        lambda: inputs(5, 4, 6), {
        "query-key": ("attention.qkv (2 heads)",), "query-key-diagonal": ("attention.qkv (2 heads)",),
        "value-output": ("attention.qkv, attention.out (2 heads)",),
        "value-output-diagonal": ("attention.qkv -> attention.out",),
        "residual-stream": (f"embed, attention.out, down -> {NORMS}",),
        "unit-permutation": ("embed, attention.out, down -> attention.qkv, up, head", "up -> down"),
        "head-permutation": ("attention (2 heads)",), "softmax-shift": ("head.weight -> output",),
        "temperature": ("head -> output",),
    }),
    "llama": (Llama, tokens, {
        "norm-gain-rescaling": ("norm1 -> q, k, v", "norm2 -> gate, up", "norm -> head"), "gated-rescaling": ("up -> down",),
        "query-key": ("q, k (4 heads)",), "query-key-diagonal": ("q, k (4 heads)",),
        "value-output": ("v, o (2 heads)",), "value-output-diagonal": ("v -> o",),
        "residual-stream": (f"embed, o, down -> {NORMS}",),
        "unit-permutation": ("embed, o, down -> q, k, v and 3 more", "gate, up -> down"),
        "head-permutation": ("scaled_dot_product_attention (2 heads)",)
        + ("scaled_dot_product_attention (2 query heads of one key head)",) * 2,
        "softmax-shift": ("head.weight -> output",), "temperature": ("head -> output",),
    }),
    "encoder layer": (lambda: layer("pre"), lambda: inputs(5, 3, 4), {
        "relu-layer-rescaling": ("linear1 -> linear2",), "relu-unit-rescaling": ("linear1 -> linear2",),
        "norm-gain-rescaling": ("norm1 -> self_attn.in_proj_weight", "norm2 -> linear1"),
        "query-key": ("self_attn.in_proj_weight, self_attn.in_proj_bias (2 heads)",),
        "query-key-diagonal": ("self_attn.in_proj_weight, self_attn.in_proj_bias (2 heads)",),
        "key-bias-shift": ("self_attn.in_proj_bias (self_attn)",),
        "value-output": ("self_attn.in_proj_weight, self_attn.in_proj_bias, self_attn.out_proj (2 heads)",),
        "value-output-diagonal": ("self_attn.in_proj_weight -> self_attn.out_proj",),
        "value-bias-shift": ("self_attn.in_proj_bias (self_attn)",),
        "unit-permutation": ("linear1 -> linear2",), "head-permutation": ("self_attn (2 heads)",),
    }),
    "units": (with_units, lambda: inputs(6, 3), {
        "unit-permutation": ("fc -> head",), "dead-unit": ("fc -> head (units 1)",),
        "duplicate-unit": ("fc -> head (units 2, 3)",), **HEAD,
    }),
}  # fmt: skip


@functools.cache
def searched(name: str) -> tuple[nn.Module, Any, SymmetrySearch]:
    make, example, _ = CASES[name]
    model = make() if name == "units" else generic(make())
    return model, example(), find_symmetries(model, example())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_found_where_it_is_and_nowhere_else(name: str) -> None:
    _, _, search = searched(name)
    assert {s.kind: s.sites for s in search.found} == CASES[name][2], search.rejected
    assert [s.kind for s in search.found] == [kind for kind in KINDS if kind in CASES[name][2]]
    for symmetry in search.found:
        proof = search.proofs[symmetry.kind]
        assert (proof.status, proof.preserves) == ("proved", KINDS[symmetry.kind].preserves)
        assert symmetry.exact


@pytest.mark.parametrize("name", CASES)
def test_every_member_preserves_what_it_says_on_other_inputs(name: str) -> None:
    model, x, search = searched(name)
    fresh = x.flip(0).flip(-1) if not x.is_floating_point() else torch.randn(x.shape, generator=generator(9)).double()
    for symmetry in search.found:
        for seed in (1, 2):
            member = symmetry.member(generator(seed))
            assert prove(model, member, fresh).max_change <= 1e-10, symmetry
            assert not torch.equal(flat(member.apply(model)), flat(model)) or symmetry.kind == "pre-norm-rescaling"
        changed = model.eval()(fresh) - member.apply(model).eval()(fresh)
        assert (float(changed.abs().max()) > 1e-3) == (symmetry.preserves != "outputs")


@pytest.mark.parametrize("name", CASES)
def test_every_member_can_be_undone(name: str) -> None:
    model, _, search = searched(name)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for symmetry in search.found:
        member = symmetry.member(generator(3))
        twin = member.apply(model)
        member.inverse().apply_(twin)
        for key, tensor in twin.state_dict().items():
            torch.testing.assert_close(tensor, before[key], rtol=1e-10, atol=1e-12)


SINGLE = {"layernorm-shift", "softmax-shift", "key-bias-shift", "dead-unit"}
"""Kinds each action of which is a symmetry by itself; running statistics in front of batch normalisation excepted."""


@pytest.mark.parametrize("name", CASES)
def test_no_part_of_a_map_can_be_left_out(name: str) -> None:
    model, x, search = searched(name)
    for symmetry in search.found:
        if symmetry.kind in SINGLE:
            continue
        member = symmetry.member(generator(5))
        for left_out, action in enumerate(member.actions if len(member.actions) > 1 else ()):
            if symmetry.kind.startswith(("query-key", "head")) and "bias" in action.names[0]:
                continue  # the scores do not care about the bias of the keys
            wrong = Member(symmetry.kind, "wrong", member.actions[:left_out] + member.actions[left_out + 1 :])
            assert not prove(model, wrong, x).preserved, (symmetry, action.names)


# ----- the laws -------------------------------------------------------------------------------------------------------


def derivatives(model: nn.Module, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the mean cross-entropy, and Hessian times each column, by double backward."""
    named = [(name, p.shape) for name, p in model.named_parameters()]
    theta = flat(model).requires_grad_()
    pieces = theta.split([math.prod(shape) for _, shape in named])
    values = {n: piece.reshape(shape) for (n, shape), piece in zip(named, pieces, strict=True)}
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        logits = functional_call(model, values, (x,))
        loss = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), torch.arange(logits.numel() // logits.shape[-1]) % 3
        )
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        products = [torch.autograd.grad(gradient @ v, theta, retain_graph=True)[0] for v in vectors.unbind(1)]
    return gradient.detach(), torch.stack(products, 1)


LAW_CASES = [name for name in CASES if name not in ("llama", "units", "transformer, sdpa", "transformer, einsum")]


@pytest.mark.parametrize("name", LAW_CASES)
def test_gradient_and_hessian_obey_the_law(name: str) -> None:
    """``g = D^T g'`` and ``H v = D^T H' D v`` for every linear or affine kind, D being read off the map itself."""
    model, x, search = searched(name)
    model = copy.deepcopy(model).eval()
    n = len(flat(model))
    eye = torch.eye(n, dtype=torch.float64)
    v = torch.randn(n, 3, generator=generator(4), dtype=torch.float64)
    gradient, products = derivatives(model, x, v)
    for symmetry in search.found:
        if symmetry.preserves == "predictions":
            continue
        member = symmetry.member(generator(7), max_scale=3.0)
        if symmetry.form not in ("linear", "affine"):
            with pytest.raises(ValueError, match="has no linear part"):
                member.linear_part(model, eye)
            continue
        d = member.linear_part(model, eye)
        image = member.apply(model)
        offset = flat(image) - d @ flat(model)
        assert (float(offset.abs().max()) > 1e-6) == (symmetry.form == "affine"), symmetry
        assert torch.allclose(d.T @ d, eye, atol=1e-10) == symmetry.orthogonal, symmetry
        gradient_image, products_image = derivatives(image, x, d @ v)
        torch.testing.assert_close(d.T @ gradient_image, gradient, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(d.T @ products_image, products, rtol=1e-7, atol=1e-8)


def test_linear_part_of_vectors_is_that_of_the_matrix() -> None:
    model, _, search = searched("transformer, sdpa")
    for symmetry in search.found:
        if symmetry.form in ("linear", "affine"):
            member = symmetry.member(generator(2))
            d = member.linear_part(model, torch.eye(len(flat(model))))
            v = torch.randn(len(d), 2, generator=generator(), dtype=torch.float64)
            torch.testing.assert_close(member.linear_part(model, v), d @ v)
            torch.testing.assert_close(member.linear_part(model, v[:, 0]), d @ v[:, 0])
    with pytest.raises(ValueError, match=r"vectors have shape \(3,\); expected"):
        member.linear_part(model, torch.ones(3))


def test_kinds_say_what_follows_from_them() -> None:
    for kind in KINDS.values():
        assert (kind.form, kind.orthogonal) in HESSIAN_LAWS
        law = Symmetry.of(kind.name, ()).hessian_law
        assert law.startswith(HESSIAN_LAWS[kind.form, kind.orthogonal]) == (kind.preserves != "predictions")
    assert Symmetry.of("query-key", ()).linear
    assert not Symmetry.of("value-bias-shift", ()).linear
    assert not Symmetry.of("pre-norm-rescaling", ()).exact


def test_streams_are_orthogonal_only_where_they_must_be() -> None:
    def stream(name: str) -> Symmetry:
        return next(s for s in searched(name)[2].found if s.kind == "residual-stream")

    assert (stream("stream").form, stream("stream").orthogonal) == ("linear", False)
    assert (stream("gainless").form, stream("gainless").orthogonal) == ("linear", True)
    assert (stream("llama").form, stream("llama").orthogonal) == ("nonlinear", False)


# ----- normalisations -------------------------------------------------------------------------------------------------


def test_scale_before_a_normalisation_is_approximate_and_says_how_much() -> None:
    for name in ("transformer, sdpa", "llama", "group norm"):
        _, _, search = searched(name)
        (symmetry,) = search.approximate
        proof = search.changes["pre-norm-rescaling"]
        assert symmetry.kind == "pre-norm-rescaling"
        assert not symmetry.exact
        assert proof.status == "approximate"
        assert 1e-9 < proof.max_change < proof.tolerance == 1e-2


def test_scale_before_a_normalisation_without_eps_is_exact() -> None:
    model = generic(Transformer("sdpa", lambda dim: nn.LayerNorm(dim, eps=0.0)))
    search = find_symmetries(model, inputs(5, 4, 6), kinds=["pre-norm-rescaling"])
    assert [s.sites for s in search.found] == [(f"embed, attention.out, down -> {NORMS}",)]
    assert search.approximate == ()
    assert search.proofs["pre-norm-rescaling"].status == "proved"


def test_running_statistics_follow_the_scale() -> None:
    model, _, search = searched("batch norm")
    symmetry = next(s for s in search.found if s.kind == "pre-norm-rescaling")
    twin = symmetry.member(generator()).apply(model)
    c = (twin.conv1.weight / model.conv1.weight)[:, 0, 0, 0]
    assert len(c.unique()) == 3
    torch.testing.assert_close(twin.bn1.running_mean, c * model.bn1.running_mean)
    torch.testing.assert_close(twin.bn1.running_var + 1e-5, c**2 * (model.bn1.running_var + 1e-5))
    small = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, eps=0.1), nn.Linear(2, 2)).double()
    small[1].running_var.fill_(0.01)
    (tight,) = find_symmetries(small, inputs(4, 3), kinds=["pre-norm-rescaling"]).found
    for seed in range(20):  # a variance stays one
        assert (tight.member(generator(seed)).apply(small)[1].running_var >= -1e-15).all()


def test_batch_statistics_in_train_mode() -> None:
    model, x = generic(ConvNorm()), inputs(8, 2, 6, 6)
    search = find_symmetries(model, x, mode="train")
    found = {s.kind: s.sites for s in search.found}
    assert found["layernorm-shift"] == ("conv1.bias -> bn1", "conv2.bias -> bn2")
    assert found["norm-gain-rescaling"] == ("bn1 -> conv2", "bn2 -> head")
    assert [s.kind for s in search.approximate] == ["pre-norm-rescaling"]
    assert 1e-9 < search.changes["pre-norm-rescaling"].max_change < 1e-3
    member = search.approximate[0].member(generator())
    assert prove(model, member, x, mode="train").status == "approximate"
    assert prove(model, member, x).status == "refuted"  # the running statistics stayed behind
    with pytest.raises(ValueError, match="mode must be 'eval' or 'train', got 'test'"):
        find_symmetries(model, x, mode="test")


def test_layernorm_shift_adds_a_function_to_all_units_and_moves_no_output() -> None:
    model, x, search = searched("transformer, sdpa")
    symmetry = next(s for s in search.found if s.kind == "layernorm-shift")
    twin = symmetry.member(generator()).apply(model)
    shift = twin.down.weight - model.down.weight
    assert float(shift.std(0).max()) < 1e-12  # the same for every unit of the stream
    assert float(shift[0].std()) > 0.1  # another for every unit that is read
    torch.testing.assert_close(twin(x), model(x))


# ----- predictions and probabilities ----------------------------------------------------------------------------------


def test_temperature_keeps_the_order_and_nothing_else() -> None:
    model, x, search = searched("relu")
    symmetry = next(s for s in search.found if s.kind == "temperature")
    assert symmetry.preserves == "predictions"
    before, after = model(x), symmetry.member(generator()).apply(model)(x)
    torch.testing.assert_close(after / before, (after / before)[:1, :1].expand_as(after))
    assert torch.equal(after.argmax(1), before.argmax(1))
    wrong = Member("temperature", "", symmetry.member(generator()).actions[:1], "predictions")
    assert prove(model, wrong, x).status == "refuted"  # the bias was left behind
    actions = symmetry.member(generator()).actions
    flipped = tuple(Scale(a.name, -a.factor) for a in actions if isinstance(a, Scale))
    negative = Member("temperature", "", flipped, "predictions")
    assert prove(model, negative, x).max_change == math.inf


def test_softmax_shift_along_the_axis_of_the_classes() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model, x = generic(Pixels()), inputs(2, 2, 4, 4)
    (symmetry,) = find_symmetries(model, x, kinds=["softmax-shift"]).found
    assert symmetry.class_axis == -3
    twin = symmetry.member(generator()).apply(model)
    torch.testing.assert_close(twin(x).softmax(1), model(x).softmax(1))
    assert float((twin(x) - model(x)).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (nn.LogSoftmax(-1), "temperature: no layer scales all outputs alike"),
        (nn.Tanh(), "softmax-shift: no layer writes the logits and nothing else"),
    ],
)
def test_outputs_behind_a_nonlinearity_admit_neither(end: nn.Module, reason: str) -> None:
    search = find_symmetries(nn.Sequential(nn.Linear(3, 3), end), inputs(4, 3), kinds=["softmax-shift", "temperature"])
    assert search.found == ()
    assert any(reason in text for _, text in search.rejected)


# ----- units ----------------------------------------------------------------------------------------------------------


def test_a_dead_unit_takes_any_incoming_weights_and_duplicates_trade_their_outgoing_ones() -> None:
    model, _, search = searched("units")
    found = {s.kind: s.member(generator()).apply(model) for s in search.found}
    dead, traded = found["dead-unit"], found["duplicate-unit"]
    assert [row for row in range(5) if not torch.equal(dead.fc.weight[row], model.fc.weight[row])] == [1]
    assert torch.equal(dead.head.weight, model.head.weight)
    assert torch.equal(traded.fc.weight, model.fc.weight)
    torch.testing.assert_close(traded.head.weight[:, 2:4].sum(1), model.head.weight[:, 2:4].sum(1))
    assert not torch.allclose(traded.head.weight[:, 2], model.head.weight[:, 2])


def test_units_that_are_nearly_dead_or_nearly_equal_are_neither() -> None:
    model = with_units()
    with torch.no_grad():
        model.head.weight[0, 1] = 1e-12
        model.fc.bias[3] += 1e-12
    assert {"dead-unit", "duplicate-unit"}.isdisjoint(s.kind for s in find_symmetries(model, inputs(6, 3)).found)


def test_a_dead_unit_that_a_normalisation_sees_is_not_dead() -> None:
    model = generic(WithUnits(lambda z: F.layer_norm(z, (5,))))
    with torch.no_grad():
        model.head.weight[:, 1] = 0
    assert find_symmetries(model, inputs(6, 3), kinds=["dead-unit"]).found == ()


# ----- false friends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation", [nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.Mish, nn.Hardswish, nn.ReLU6, nn.Tanh]
)
def test_rescaling_across_a_smooth_activation_is_refused_with_a_number(activation: type[nn.Module]) -> None:
    search = find_symmetries(generic(mlp(activation)), inputs(20, 3) * 3)
    assert {"relu-layer-rescaling", "relu-unit-rescaling"}.isdisjoint(s.kind for s in search.found)
    reason = dict(search.rejected)["0"]
    assert reason.startswith(f"its units reach 1 ({activation.__name__}), which is not positively homogeneous: ")
    measured = float(reason.split("changes the outputs by ")[1].split()[0])
    assert 1e-3 < measured < 1e3


def test_the_gated_branch_is_refused_with_a_number() -> None:
    _, _, search = searched("swiglu")
    assert "relu-unit-rescaling changes the outputs by" in dict(search.rejected)["gate"]
    assert "silu" in dict(search.rejected)["gate"]


def test_a_common_gain_for_queries_with_rotary_positions_is_no_key_bias_shift() -> None:
    class Biased(Llama):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Linear(8, 4)

    search = find_symmetries(generic(Biased()), tokens())
    assert "key-bias-shift" not in {s.kind for s in search.found}
    assert any("position to position, such as rotary ones" in reason for _, reason in search.rejected)
