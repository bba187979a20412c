from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatminima.models import MODELS, build
from flatminima.models.resnet import ResidualBlock
from flatminima.models.vit import SelfAttention

SMALL: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("mlp", (1, 8, 8), {"hidden": (5, 4)}),
    ("convnet", (1, 8, 8), {"channels": (3, 4), "hidden": 5}),
    ("convnet", (2, 9, 12), {"channels": (3, 4), "hidden": 5, "norm": "batch"}),
    ("convnet-bn", (1, 8, 8), {"channels": (3, 4), "hidden": 5}),
    ("resnet18", (3, 8, 8), {"width": 2}),
    ("mnist-cnn", (2, 8, 8), {"width": 8}),
    ("resnet-gn", (3, 8, 8), {"width": 8, "stem_stride": 2}),
    ("vit", (1, 8, 8), {"dim": 8, "depth": 2, "heads": 2}),
]


def batch(shape: tuple[int, ...], rows: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_the_registry_describes_every_name() -> None:
    assert list(MODELS) == ["mlp", "convnet", "convnet-bn", "resnet18", "resnet20", "mnist-cnn", "resnet-gn", "vit"]
    assert all(MODELS.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_every_model_takes_every_data_set(name: str, shape: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"width": 4} if name in ("resnet18", "resnet20") else {}
    model = build(name, shape, ("a", "b", "c"), **options)
    out = model(batch(shape, 2, torch.float32))
    assert out.shape == (2, 3)
    assert torch.isfinite(out).all()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


@given(st.lists(st.integers(1, 9), max_size=3), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_mlp_is_the_formula(hidden: list[int], shape: list[int], classes: int) -> None:
    model = build("mlp", shape, classes, hidden=hidden).double()
    widths = [math.prod(shape), *hidden, classes]
    assert sum(p.numel() for p in model.parameters()) == sum(map(linear, widths[:-1], widths[1:]))
    x = batch(tuple(shape))
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    expected = x.reshape(4, -1)
    for index, layer in enumerate(layers):
        expected = expected @ layer.weight.T + layer.bias
        if index < len(layers) - 1:
            expected = expected.clamp(min=0)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_convnet_is_the_formula() -> None:
    model = build("convnet", (2, 9, 12), 3, channels=(3, 4), hidden=5, seed=0).double()
    w1, b1, w2, b2, w3, b3, w4, b4 = model.parameters()
    x = batch((2, 9, 12))
    h = F.max_pool2d(F.conv2d(x, w1, b1, padding=1).clamp(min=0), 2)
    h = F.max_pool2d(F.conv2d(h, w2, b2, padding=1).clamp(min=0), 2)
    h = (h.flatten(1) @ w3.T + b3).clamp(min=0)
    torch.testing.assert_close(model(x), h @ w4.T + b4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "count"),
    [
        ("mlp", (1, 8, 8), 10, {}, linear(64, 64) * 2 + linear(64, 10)),
        ("convnet", (1, 28, 28), 10, {}, linear(9, 16) + linear(144, 32) + linear(1568, 64) + linear(64, 10)),
        # Larger pictures are pooled to 4x4 before the hidden layer.
        ("convnet", (3, 64, 64), 10, {}, linear(27, 16) + linear(144, 32) + linear(512, 64) + linear(64, 10)),
        # BatchNorm brings a scale and a shift per channel, in place of the bias.
        ("convnet", (1, 8, 8), 10, {"norm": "batch"}, 9 * 16 + 32 + 144 * 32 + 64 + linear(128, 64) + linear(64, 10)),
        # The published count of ResNet-18 with a 3x3 stem.
        ("resnet18", (3, 32, 32), 10, {}, 11_173_962),
        # That of ImageNet's network with its 1000 classes: 11,689,512.
        ("resnet18", (3, 84, 84), 1000, {"stem": "imagenet"}, 11_689_512),
        # He et al. count 0.27 million with shortcuts that have no weights; the two projections have 2,752.
        ("resnet20", (3, 32, 32), 10, {}, 269_722 + 16 * 32 + 64 + 32 * 64 + 128),
        ("resnet20", (3, 32, 32), 10, {"blocks": 1}, 78_042),
        (
            "vit",
            (3, 32, 32),
            10,
            {},
            linear(48, 64)
            + 64 * 64
            + 4 * (4 * 64 + linear(64, 192) + linear(64, 64) + linear(64, 128) + linear(128, 64))
            + 128
            + linear(64, 10),
        ),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, ...], classes: int, options: dict[str, Any], count: int) -> None:
    assert sum(p.numel() for p in build(name, shape, classes, **options).parameters()) == count


def test_resnet18_has_eighteen_layers_on_four_sizes() -> None:
    model = build("resnet18", (3, 32, 32), 10, width=4)
    main = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(main) == 18
    seen: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda _module, _inputs, out: seen.append(tuple(out.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    expected = [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert seen == [shape for shape in expected for _ in range(2)]


def test_resnet20_has_twenty_layers_on_three_sizes() -> None:
    model = build("resnet20", (3, 32, 32), 10, width=4)
    main = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(main) == 20
    seen: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda _module, _inputs, out: seen.append(tuple(out.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    assert seen == [shape for shape in [(4, 32, 32), (8, 16, 16), (16, 8, 8)] for _ in range(3)]
    with pytest.raises(ValueError, match="option stem of model 'resnet18' is 'large': expected 'small' or 'imagenet'"):
        build("resnet18", (3, 32, 32), 10, stem="large")


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(3, 3, 1), (3, 5, 2), (4, 4, 2)])
def test_residual_block_is_the_formula(inputs: int, outputs: int, stride: int) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(inputs, outputs, stride).double().eval()
    x = batch((inputs, 7, 6))
    residual = F.conv2d(x, block.conv1.weight, stride=stride, padding=1) / math.sqrt(1 + block.norm1.eps)
    residual = F.conv2d(residual.clamp(min=0), block.conv2.weight, padding=1) / math.sqrt(1 + block.norm2.eps)
    shortcut = x
    if isinstance(block.shortcut, nn.Sequential):
        shortcut = F.conv2d(x, block.shortcut[0].weight, stride=stride) / math.sqrt(1 + block.norm1.eps)
    torch.testing.assert_close(block(x), (residual + shortcut).clamp(min=0), rtol=1e-12, atol=1e-12)


def test_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(6, 2).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    expected = torch.empty_like(x)
    for row in range(3):
        q, k, v = (x[row] @ attention.qkv.weight.T + attention.qkv.bias).split(6, dim=-1)
        mixed = [
            torch.softmax(q[:, s] @ k[:, s].T / math.sqrt(3), dim=-1) @ v[:, s] for s in (slice(0, 3), slice(3, 6))
        ]
        expected[row] = torch.cat(mixed, dim=-1) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "tokens"), [((1, 8, 8), 16), ((1, 28, 28), 49), ((3, 32, 32), 64), ((3, 64, 64), 64)]
)
def test_vit_patches(shape: tuple[int, ...], tokens: int) -> None:
    assert build("vit", shape, 2).position.shape == (1, tokens, 64)


def test_vit_sees_where_a_patch_is() -> None:
    model = build("vit", (1, 8, 8), 3, seed=0).double()
    x = batch((1, 8, 8))
    assert not torch.allclose(model(x), model(x.flip(-1)), atol=1e-6)
    model.position.data.zero_()
    blocks = x.unflatten(-1, (4, 2)).flip(-2).flatten(-2)  # whole patches change places
    torch.testing.assert_close(model(x), model(blocks), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "shape", "options"), SMALL)
def test_fx_traces_every_model(name: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    model = build(name, shape, 3, seed=0, **options).double().eval()
    traced = torch.fx.symbolic_trace(model)
    for rows in (1, 4):
        x = batch(shape, rows)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "shape", "options"), SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_model_is_twice_differentiable(
    name: str, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """A Hessian-vector product by double backward equals the central difference of the gradient."""
    model = build(name, shape, 3, seed=0, **options).to(dtype).eval()
    parameters = list(model.parameters())
    with torch.no_grad():  # away from the kinks, where units that are zero for every row sit at initialisation
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=dtype))
    x, y = batch(shape, dtype=dtype), torch.tensor([0, 1, 2, 1])
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in parameters]

    def gradient(create_graph: bool = False) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=create_graph)

    product = torch.autograd.grad(gradient(create_graph=True), parameters, direction)
    assert all(torch.isfinite(p).all() for p in product)
    if dtype == torch.float32:  # that the kernels of the everyday dtype have a second derivative is all there is to see
        return
    ends = []
    step = 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
        ends.append(gradient())
    difference = [(after - before) / (2 * step) for after, before in zip(*ends, strict=True)]
    scale = max(d.abs().max() for d in difference)
    for p, d in zip(product, difference, strict=True):
        assert (p - d).abs().max() < 1e-5 * scale


def test_the_seed_decides_the_weights_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (build("vit", (1, 8, 8), 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    build("mlp", (3,), 2)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "message"),
    [
        ("resnet", (3, 32, 32), 10, {}, "unknown model 'resnet': expected one of resnet18, "),
        ("ViT-tiny", (3, 32, 32), 10, {}, "expected one of vit, "),
        ("mlp", (3, 32, 32), 10, {"hiden": 3}, r"unknown option of model 'mlp' 'hiden': expected one of hidden"),
        ("vit", (3, 32, 32), 10, {"head": 3}, "'head': expected one of heads, "),
        ("mlp", (3,), 0, {}, "0 classes"),
        ("mlp", (), 2, {}, r"input_shape \(\)"),
        ("mlp", (4, 0), 2, {}, r"input_shape \(4, 0\)"),
        ("mlp", (3,), 2, {"hidden": (4, 0)}, "option hidden of model 'mlp' is 0"),
        ("convnet", (64,), 2, {}, r"'convnet' got input_shape \(64,\): expected images"),
        ("convnet", (1, 3, 9), 2, {}, "images of 3x9: expected at least 4x4"),
        ("convnet", (1, 8, 8), 2, {"norm": "layer"}, "option norm of model 'convnet' is 'layer': expected 'none' or"),
        ("convnet", (1, 8, 8), 2, {"channels": (4, -1)}, "option channels of model 'convnet' is -1"),
        ("resnet18", (3, 4, 4), 2, {}, "at least 8x8"),
        ("resnet18", (3, 32, 32), 2, {"width": 0.5}, r"option width of model 'resnet18' is 0\.5: expected an integer"),
        ("vit", (3, 32, 32), 2, {"dim": 10, "heads": 4}, "dim=10 is not a multiple of heads=4"),
        ("vit", (3, 32, 32), 2, {"patch": 5}, r"option patch of model 'vit' is 5: expected a divisor of 32 and 32"),
        ("vit", (3, 28, 29), 2, {}, r"no patch that divides 28x29 .* one of \[1\]"),
    ],
)
def test_bad_arguments_are_named(
    name: str, shape: tuple[int, ...], classes: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, shape, classes, **options)
