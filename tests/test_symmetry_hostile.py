"""Models that make it hard: shared, tied and computed weights, views, writes in place, code that decides by values."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatminima.symmetries import Rescaling, SymmetrySearch, find_symmetries, prove
from flatminima.symmetries.base import Findings, Symmetry
from flatminima.symmetries.network import Network
from flatminima.symmetries.sites import Permuting, Slices, log_uniform
from symmetry_models import generic, inputs

RELU = {"relu-layer-rescaling", "relu-unit-rescaling"}
LAST = {"softmax-shift", "temperature"}
PLAIN = RELU | LAST | {"unit-permutation"}


class Model(nn.Module):
    """Layers by name, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], /, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._function = function

    def forward(self, *args: Any) -> Any:
        return self._function(self, *args)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def rows() -> Tensor:
    return inputs(6, 5)


def linear(function: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> nn.Module:
    """`function` with layers f: 5 -> 4 and h: 4 -> 3."""
    return Model(function, f=nn.Linear(5, 4), h=nn.Linear(4, 3), **layers)


# ----- how models are written -----------------------------------------------------------------------------------------


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.f(x)
    y.mul_(2.0)
    y.relu_()
    y += 0.0
    return m.h(y)


def with_out(m: Any, x: Tensor) -> Tensor:
    """Results go to memory that the model made, by name."""
    y = torch.empty(len(x), 4)
    torch.mul(torch.addmm(m.f.bias, x, m.f.weight.T), 2.0, out=y)
    torch.clamp(y, min=0.0, out=y)
    return m.h(y)


def per_part(m: Any, x: Tensor) -> Tensor:
    """Each half of a fused layer is written in place through its own view."""
    a, b = m.f(x).view(-1, 2, 2).unbind(1)
    return m.h(torch.cat([torch.relu_(a), torch.relu_(b)], 1))


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.f(x)
    y[:, :2].mul_(2.0)
    return m.h(F.relu(y))


def rearranged(m: Any, x: Tensor) -> Tensor:
    """What einops would do: 'b (h w) -> h b w', back, rolled and gathered."""
    y = F.relu(m.f(x)).reshape(-1, 2, 2).permute(1, 0, 2).contiguous()
    y = y.permute(1, 0, 2).reshape(-1, 4).roll(1, 1).flip(1)
    return m.h(y[:, torch.tensor([2, 0, 3, 1])])


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.h(F.relu(m.f(x)))


def patched(x: Tensor, size: int = 2) -> Tensor:
    return F.unfold(x, size, stride=size).transpose(1, 2)


WRITTEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], set[str]]] = {
    "module list": (lambda: Model(
        lambda m, x: functools.reduce(lambda y, layer: F.relu(layer(y)), m.layers[:-1], x) @ m.layers[-1].weight.t(),
        layers=nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3, bias=False)])), rows, PLAIN),
    "flatten": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        lambda: inputs(4, 2, 6, 6), PLAIN),
    "grouped, depthwise, transposed": (lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.ReLU(), nn.Conv2d(6, 6, 1, groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3)),
        lambda: inputs(3, 2, 6, 6), PLAIN),
    "u-net": (lambda: Model(
        lambda m, x: (lambda a: m.out(torch.cat([a, F.interpolate(F.relu(m.down(a)), scale_factor=2)], 1)))(F.relu(m.up(x))),
        up=nn.Conv2d(2, 4, 3, padding=1), down=nn.Conv2d(4, 5, 2, stride=2), out=nn.Conv2d(9, 3, 1)),
        lambda: inputs(2, 2, 4, 4), PLAIN),
    "patches": (lambda: Model(lambda m, x: m.h(F.relu(m.f(patched(x))).mean(1)), f=nn.Linear(8, 4), h=nn.Linear(4, 3)),
        lambda: inputs(3, 2, 4, 4), PLAIN),
    "in place": (lambda: linear(in_place), rows, PLAIN),
    "out=": (lambda: linear(with_out), rows, PLAIN),
    "in place, part by part": (lambda: linear(per_part), rows, PLAIN),
    "rearranged": (lambda: linear(rearranged), rows, PLAIN),
    "einsum": (lambda: Model(lambda m, x: torch.einsum("bj,jk->bk", F.relu(torch.einsum("bi,ij->bj", x, m.a)), m.b),
        a=parameter(5, 4), b=parameter(4, 3)), rows, PLAIN),
    "functional": (lambda: linear(
        lambda m, x: torch.addmm(m.h.bias, F.linear(x, m.f.weight, m.f.bias).clamp(min=0), m.h.weight.T)), rows, PLAIN),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3)), rows, PLAIN),
    "autocast": (lambda: linear(autocast), rows, PLAIN),
    "checkpoint": (lambda: linear(lambda m, x: m.h(checkpoint(lambda y: F.relu(m.f(y)), x, use_reentrant=False))),
        rows, PLAIN),
    "dictionary out": (lambda: linear(lambda m, x: {"loss": x.sum(), "logits": m.h(F.relu(m.f(x)))}), rows, PLAIN),
    "two inputs": (lambda: linear(lambda m, x, scale: m.h(F.relu(m.f(x))) * scale[:, None]),
        lambda: (inputs(6, 5), inputs(6).abs()), PLAIN),
    "two outputs": (lambda: linear(lambda m, x: (m.h(F.relu(m.f(x))), m.g(F.relu(m.f(x)))), g=nn.Linear(4, 2)),
        rows, RELU | {"unit-permutation"}),
    "input normalised": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        rows, PLAIN | {"norm-gain-rescaling"}),
    "glu": (lambda: nn.Sequential(nn.Linear(5, 8), nn.GLU(), nn.Linear(4, 3)), rows,
        LAST | {"gated-rescaling", "unit-permutation"}),
    "maxout": (lambda: linear(lambda m, x: m.g(m.f(x).view(-1, 2, 2).amax(-1)), g=nn.Linear(2, 3)), rows, PLAIN),
    "squeeze and excite": (lambda: Model(
        lambda m, x: (lambda y: m.h((y * torch.sigmoid(m.b(F.relu(m.a(y.mean((2, 3))))))[:, :, None, None]).mean((2, 3))))(
            F.relu(m.n(m.c(x)))),
        c=nn.Conv2d(2, 4, 3), n=nn.BatchNorm2d(4), a=nn.Linear(4, 2), b=nn.Linear(2, 4), h=nn.Linear(4, 3)),
        lambda: inputs(4, 2, 6, 6), PLAIN | {"gated-rescaling", "pre-norm-rescaling", "layernorm-shift"}),
    "lora": (lambda: Model(lambda m, x: m.h(F.relu(m.f(x) + m.b(m.a(x)))), f=nn.Linear(5, 4), a=nn.Linear(5, 2, bias=False),
        b=nn.Linear(2, 4, bias=False), h=nn.Linear(4, 3)), rows, PLAIN | {"residual-stream"}),
    "heads of three axes": (lambda: Model(
        lambda m, x: torch.einsum("bhtd,hdo->bto", F.scaled_dot_product_attention(
            *(torch.einsum("bti,hid->bhtd", x, w) for w in (m.q, m.k, m.v))), m.o),
        q=parameter(2, 4, 3), k=parameter(2, 4, 3), v=parameter(2, 4, 3), o=parameter(2, 3, 4)), lambda: inputs(3, 5, 4),
        LAST | {"query-key", "query-key-diagonal", "value-output", "value-output-diagonal", "head-permutation"}),
    "shared branch": (lambda: Model(lambda m, a, b: m.h((m.t(a) - m.t(b)).abs()),
        t=nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)), h=nn.Linear(4, 3)),
        lambda: (inputs(6, 5), inputs(6, 5, seed=3)), PLAIN),
    "the same block twice": (lambda: Model(lambda m, x: m.h(m.b(m.b(m.e(x)))), e=nn.Linear(3, 4),
        b=nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=True), h=nn.Linear(4, 3)), lambda: inputs(4, 3, 3),
        PLAIN | {"norm-gain-rescaling", "query-key", "query-key-diagonal", "key-bias-shift", "value-output",
                 "value-output-diagonal", "value-bias-shift", "residual-stream", "head-permutation"}),
    "rnn": (lambda: Model(lambda m, x: m.h(m.r(x)[0][:, -1]), r=nn.RNN(5, 4, batch_first=True), h=nn.Linear(4, 3)),
        lambda: inputs(4, 3, 5), LAST | {"unit-permutation", "sign-flip"}),
    "lstm": (lambda: Model(lambda m, x: m.h(m.r(x)[0][:, -1]), r=nn.LSTM(5, 4, batch_first=True), h=nn.Linear(4, 3)),
        lambda: inputs(4, 3, 5), LAST | {"unit-permutation"}),
    "gru": (lambda: Model(lambda m, x: m.h(m.r(x)[0][:, -1]), r=nn.GRU(5, 4, batch_first=True), h=nn.Linear(4, 3)),
        lambda: inputs(4, 3, 5), LAST | {"unit-permutation", "sign-flip"}),
    "instance norm": (lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        lambda: inputs(3, 2, 6, 6), PLAIN | {"norm-gain-rescaling", "layernorm-shift"}),
    "mixer": (lambda: Model(
        lambda m, x: m.h((lambda y: y + m.d(F.gelu(m.c(y))))(x + m.b(F.gelu(m.a(x.transpose(1, 2)))).transpose(1, 2)).mean(1)),
        a=nn.Linear(3, 5), b=nn.Linear(5, 3), c=nn.Linear(4, 5), d=nn.Linear(5, 4), h=nn.Linear(4, 3)), lambda: inputs(4, 3, 4),
        LAST | {"unit-permutation"}),
    "attention with extra keys": (lambda: Model(lambda m, x: m.a(x, x, x)[0],
        a=nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)), lambda: inputs(3, 5, 4),
        LAST | {"query-key", "query-key-diagonal", "value-output", "value-output-diagonal", "head-permutation"}),
    "attention across": (lambda: Model(lambda m, x, y: m.a(x, y, y)[0],
        a=nn.MultiheadAttention(4, 2, batch_first=True, kdim=6, vdim=6)), lambda: (inputs(3, 5, 4), inputs(3, 2, 6)),
        LAST | {"query-key", "query-key-diagonal", "key-bias-shift", "value-output", "value-output-diagonal",
                "value-bias-shift", "head-permutation"}),
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", WRITTEN)
def test_however_it_is_written_the_symmetries_are_found(name: str) -> None:
    make, example, kinds = WRITTEN[name]
    model, x = generic(make()), example()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = find_symmetries(model, x)
    assert {s.kind for s in search.found} == kinds, search.rejected
    assert not any("was not analysed" in reason for _, reason in search.rejected)
    for symmetry in search.found:
        assert prove(model, symmetry.member(generator(4)), x).max_change <= 1e-10, symmetry


# ----- what must be refused, and what is said -------------------------------------------------------------------------


class Sharp(nn.Module):
    """Decides by values in front of a part whose inside is sound."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(5, 4), nn.Linear(4, 3)
        self.block = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(x))
        steps = 0
        while x.norm() > 1 and steps < 3:
            x = 0.5 * F.relu(self.block(x))
            steps += 1
        return self.after(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str, str]] = {
    "called in a loop": (lambda: Model(lambda m, x: m.h(F.relu(m.f(F.relu(m.f(x))))), f=nn.Linear(4, 4), h=nn.Linear(4, 3)),
        lambda: inputs(6, 4), "f", "'f.weight' is used 2 times"),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)),
        rows, "0", "is computed"),
    "spectral norm": (lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)), rows, "0", "is computed"),
    "merged weights": (lambda: linear(lambda m, x: m.h(F.relu(F.linear(x, m.f.weight + m.b @ m.a, m.f.bias))),
        a=parameter(2, 5), b=parameter(4, 2)), rows, "linear", "is computed"),
    "write through a view": (lambda: linear(through_a_view), rows, "f", "mul_"),
    "unknown operation": (lambda: linear(lambda m, x: m.h(torch.cumprod(F.relu(m.f(x)), 1))), rows, "f", "cumprod"),
    "normalised to length 1": (lambda: linear(lambda m, x: m.h(F.normalize(F.relu(m.f(x)), dim=1))), rows,
        "f", "normalize"),
    "added to a constant": (lambda: linear(lambda m, x: m.h(F.relu(m.f(x)) + 1.0)), rows, "f", "add"),
    "penalised": (lambda: linear(lambda m, x: m.h(F.relu(m.f(x))) * m.f.weight.norm()), rows, "f",
        "'f.weight' is used 2 times"),
    "value read out": (lambda: linear(lambda m, x: m.h(F.relu(m.f(x))) * m.f.weight[0, 0].item()), rows,
        "model", "control flow depends on values"),
    "through numpy": (lambda: linear(lambda m, x: m.h(torch.from_numpy(F.relu(m.f(x)).detach().numpy()))), rows,
        "model", "control flow depends on values"),
    "shared queries and keys": (lambda: Model(lambda m, x: m.o(F.scaled_dot_product_attention(m.k(x), m.k(x), m.v(x))),
        k=nn.Linear(4, 4), v=nn.Linear(4, 4), o=nn.Linear(4, 4)), lambda: inputs(3, 5, 4),
        "scaled_dot_product_attention (query-key)", "queries and keys share their weights"),
    "unused layer": (lambda: linear(lambda m, x: m.h(F.relu(m.f(x))), g=nn.Linear(5, 4)), rows, "g.weight",
        "does not reach the outputs"),
    "bilinear layer": (lambda: Model(lambda m, x: m.h(F.relu(m.b(x, x))), b=nn.Bilinear(5, 5, 4), h=nn.Linear(4, 3)),
        rows, "b.weight", "is used by b (Bilinear), which is not analysed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_with_the_reason(name: str) -> None:
    make, example, site, reason = REFUSED[name]
    search = find_symmetries(generic(make()), example())
    assert any(where == site and reason in why for where, why in search.rejected), search.rejected
    assert not any(s.startswith(f"{site} ->") for found in search.found if found.kind in RELU for s in found.sites)


def test_code_that_decides_by_values_hides_only_what_passes_through_it() -> None:
    model, x = generic(Sharp()), 3 * inputs(6, 5)
    search = find_symmetries(model, x)
    found = {s.kind: s.sites for s in search.found}
    assert found["relu-unit-rescaling"] == ("block.0 -> block.2",)
    assert found["unit-permutation"] == ("block.0 -> block.2",)
    reasons = dict(search.rejected)
    assert "while x.norm() > 1 and steps < 3:" in reasons["model"]
    for layer in (
        "before",
        "block.2",
        "after",
    ):  # `before` is rescaled at one's peril: another scale takes another branch
        assert "decides by values" in reasons[layer]
    member = next(s for s in search.found if s.kind == "relu-unit-rescaling").member(generator())
    for scale in (0.01, 1.0, 100.0):
        assert prove(model, member, scale * x).preserved


def test_a_decision_by_integers_is_a_note() -> None:
    def masked(m: Any, tokens: Tensor) -> Tensor:
        h = m.e(tokens)
        if (tokens == 0).any():
            h = h * (tokens != 0)[..., None]
        return m.h(F.relu(m.f(h.mean(1))))

    model = generic(Model(masked, e=nn.Embedding(7, 5), f=nn.Linear(5, 4), h=nn.Linear(4, 3)))
    search = find_symmetries(model, torch.arange(12).reshape(3, 4) % 7)
    assert "f -> h" in next(s for s in search.found if s.kind == "relu-unit-rescaling").sites
    assert "depends on integer inputs: analysed for inputs like the example" in dict(search.rejected)["model"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: linear(lambda m, x: torch.func.vmap(lambda r: m.h(F.relu(m.f(r))))(x)),
            "cannot be followed in float64",
        ),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.LazyLinear(3)), "lazy layers that were never run"),
        (lambda: linear(lambda m, x: "no tensor"), "without a floating-point tensor"),
        (lambda: linear(lambda m, x: m.h(F.relu(m.f(x))) / 0.0), "not finite"),
    ],
)
def test_models_that_cannot_be_analysed_give_one_reason(make: Callable[[], nn.Module], reason: str) -> None:
    search = find_symmetries(make(), torch.randn(4, 5))
    assert search.found == search.approximate == ()
    ((site, why),) = search.rejected
    assert site == "model"
    assert reason in why


def test_wrappers_are_taken_off() -> None:
    plain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(6, 5)
    for wrapped in (nn.DataParallel(plain), torch.compile(plain, backend="eager")):
        search = find_symmetries(wrapped, x)
        assert {s.kind for s in search.found} == PLAIN
        for symmetry in search.found:
            twin = symmetry.member(generator()).apply(wrapped)
            assert type(twin) is type(wrapped)
            assert prove(wrapped, symmetry.member(generator()), x).preserved


def test_half_precision_frozen_parameters_and_train_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3))
    model = generic(model).bfloat16().train()
    model[0].requires_grad_(False)
    x = torch.randn(16, 5, dtype=torch.bfloat16)
    for mode in ("eval", "train"):
        search = find_symmetries(model, x, mode=mode)
        found = {s.kind: s for s in search.found}
        assert {*RELU, "norm-gain-rescaling", "layernorm-shift", *LAST} <= found.keys()
        # Dropout has drawn for each unit what it has drawn: they cannot change places while it does.
        assert ("unit-permutation" in found) == (mode == "eval")
        twin = found["layernorm-shift"].member(generator()).apply(model)
        assert not torch.equal(twin[0].bias, model[0].bias)
        assert twin[0].bias.dtype == torch.bfloat16
        assert not twin[0].bias.requires_grad
    assert all(module.training for module in model.modules())


def test_nothing_is_left_behind() -> None:
    model = generic(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    ).train()
    before = copy.deepcopy(model.state_dict())
    state, default, fast = torch.get_rng_state(), torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    find_symmetries(model, inputs(5, 2, 6, 6), mode="train")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert (default, fast) == (torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


# ----- wrong finders --------------------------------------------------------------------------------------------------


def planted(monkeypatch: pytest.MonkeyPatch, find: Callable[[Network], Findings], kind: str) -> SymmetrySearch:
    from flatminima.symmetries import search

    monkeypatch.setattr(search, "FINDERS", (search.Finder((kind,), find),))
    return find_symmetries(generic(nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))), inputs(6, 5))


def test_a_finder_that_rescales_gelu_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: Network) -> Findings:
        groups = [g for g in network.suspects.groups if g.writers == ("0",)]
        return Findings((Symmetry.of("relu-unit-rescaling", [g.rescaling(log_uniform) for g in groups]),))

    search = planted(monkeypatch, wrong, "relu-unit-rescaling")
    assert search.found == ()
    assert search.rejected[0][0] == "0 -> 2"
    assert search.rejected[0][1].startswith("not function preserving: relu-unit-rescaling changes the outputs by")


def test_a_finder_that_forgets_a_column_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: Network) -> Findings:
        rows = Slices("0.weight", (4, 5), torch.arange(20).reshape(4, 5))
        return Findings((Symmetry.of("unit-permutation", [Permuting("0", 4, (rows,))]),))

    assert planted(monkeypatch, wrong, "unit-permutation").found == ()


def test_a_finder_that_fails_is_reported_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(network: Network) -> Findings:
        raise KeyError("lost")

    search = planted(monkeypatch, broken, "unit-permutation")
    site, reason = search.rejected[-1]
    assert site == "unit-permutation"
    assert reason.startswith("was not analysed, because of KeyError: 'lost'")


def test_a_map_that_cannot_be_applied_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: Network) -> Findings:
        rows = Slices("1.weight", (4, 5), torch.arange(20).reshape(4, 5))
        return Findings((Symmetry.of("unit-permutation", [Permuting("1", 4, (rows,))]),))

    search = planted(monkeypatch, wrong, "unit-permutation")
    assert search.found == ()
    assert (
        "could not be proved: ValueError: this unit-permutation changes '1.weight', unknown to" in search.rejected[0][1]
    )


# ----- hints ----------------------------------------------------------------------------------------------------------


def test_hints_are_proved_like_everything_else() -> None:
    """A squashed unit of the user's own, homogeneous though nothing says so."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.special.xlogy(x, math.e)  # x log e = x, in a way that nobody recognises

    model = generic(linear(lambda m, x: m.h(F.relu(Own.apply(m.f(x))))))
    x = inputs(6, 5)
    assert RELU.isdisjoint(s.kind for s in find_symmetries(model, x).found)
    from flatminima.symmetries import Entries

    def hint(power: float) -> Symmetry:
        unit = torch.arange(4)
        entries = (Entries("f.weight", unit[:, None], 1), Entries("f.bias", unit, 1), Entries("h.weight", unit, power))
        return Symmetry.of("relu-unit-rescaling", [Rescaling("f -> h", 4, entries, log_uniform)])

    search = find_symmetries(model, x, hints=[hint(-1)])
    assert next(s for s in search.found if s.kind == "relu-unit-rescaling").sites == ("f -> h",)
    assert search.proofs["relu-unit-rescaling"].status == "proved"
    wrong = find_symmetries(model, x, hints=[hint(+1)])
    assert RELU.isdisjoint(s.kind for s in wrong.found)
    assert "not function preserving" in dict(wrong.rejected)["f -> h"]


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"unknown kind of symmetry 'head-permutations': expected one of head-permutation"
    ):
        find_symmetries(nn.Linear(5, 3), inputs(2, 5), kinds=["head-permutations"])
