"""Is anything missing? The directions in which a generic network does not change, counted in two ways.

The null space of the Jacobian of the log-probabilities, over enough inputs, holds the tangents of every continuous symmetry.
The members found are sampled close to the identity; their differences must lie in that null space and span all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatminima.symmetries import Rescaling, find_symmetries, residual, sites
from flatminima.symmetries.base import Site
from flatminima.symmetries.sites import Mixing
from symmetry_models import GroupNormed, Llama, RMSNorm, Stream, Transformer, generic, inputs, mlp, tokens

STEP = 1e-5
CONTINUOUS = (
    "relu-unit-rescaling", "norm-gain-rescaling", "gated-rescaling", "layernorm-shift", "query-key", "key-bias-shift",
    "value-output", "value-bias-shift", "residual-stream", "softmax-shift",
)  # fmt: skip


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def null_space(model: nn.Module, x: Any) -> Tensor:
    """An orthonormal basis, (dimension, n), of the directions in which no log-probability changes."""
    named = [(name, p.shape) for name, p in model.named_parameters()]

    def log_probabilities(theta: Tensor) -> Tensor:
        pieces = theta.split([math.prod(shape) for _, shape in named])
        values = {n: piece.reshape(shape) for (n, shape), piece in zip(named, pieces, strict=True)}
        return functional_call(model, values, (x,)).log_softmax(-1).reshape(-1)

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(log_probabilities, flat(model))
    assert jacobian.shape[0] > jacobian.shape[1]
    _, singular, basis = torch.linalg.svd(jacobian)
    rank = int((singular > 1e-11 * singular[0]).sum())
    assert singular[rank - 1] > 1e3 * (singular[rank] if rank < len(singular) else 0.0)  # a clear gap
    return basis[rank:]


def near_identity(generator: torch.Generator, max_scale: float, units: int) -> tuple[Tensor, Tensor]:
    a = torch.eye(units, dtype=torch.float64)
    a += STEP * torch.randn(units, units, generator=generator, dtype=torch.float64)
    return a, torch.linalg.inv(a)


def small_turns(generator: torch.Generator, max_scale: float, units: int) -> tuple[Tensor, Tensor]:
    a = torch.eye(units, dtype=torch.float64)
    for i in range(0, units, 2):
        grow, turn = (STEP * torch.randn(2, generator=generator, dtype=torch.float64)).tolist()
        a[i : i + 2, i : i + 2] += torch.tensor([[grow, -turn], [turn, grow]])
    return a, torch.linalg.inv(a)


def small_rotation(generator: torch.Generator, units: int) -> Tensor:
    x = STEP * torch.randn(units, units, generator=generator, dtype=torch.float64)
    return torch.linalg.matrix_exp(x - x.T)


def close(place: Site) -> Site:
    """The same site with members close to the identity."""
    if isinstance(place, Rescaling):
        return replace(place, draw=sites.log_uniform)
    if isinstance(place, Mixing):
        draws = {sites.invertible: near_identity, sites.rotations: small_turns}
        return replace(place, blocks=tuple(replace(b, draw=draws[b.draw]) for b in place.blocks))
    return place


def tangents(model: nn.Module, x: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """For each site of a continuous kind an orthonormal basis of its tangents, (dimension, n)."""
    monkeypatch.setattr(residual, "invertible", near_identity)
    monkeypatch.setattr(residual, "orthogonal", small_rotation)
    generator = torch.Generator().manual_seed(0)
    for symmetry in find_symmetries(model, x, kinds=CONTINUOUS).found:
        for place in symmetry.places:
            small = replace(symmetry, places=(close(place),))
            moves = [flat(small.member(generator, 1 + STEP).apply(model)) - flat(model) for _ in range(60)]
            _, singular, basis = torch.linalg.svd(torch.stack(moves), full_matrices=False)
            yield basis[: int((singular > 1e-3 * singular[0]).sum())]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int]] = {
    # name: (model, inputs, dimension)
    "relu": (lambda: mlp(nn.ReLU), lambda: inputs(60, 3), 4 + 5),  # a scale for each unit; a row and a number for all classes
    "tanh": (lambda: mlp(nn.Tanh), lambda: inputs(60, 3), 5),
    "group norm": (GroupNormed, lambda: inputs(120, 2, 6, 6), 4 + 2 + 5),  # gains, the constant of each group
    "stream": (Stream, lambda: inputs(60, 6), 16 + 5),  # GL(4)
    "transformer": (  # 3 x 4 gains, 2 heads of GL(2) for query-key and value-output, rotations of 4 units, 4 weights of a class
        lambda: Transformer("sdpa", lambda dim: RMSNorm(dim, cast=False), bias=False), lambda: inputs(80, 4, 6),
        12 + 8 + 8 + 6 + 4,
    ),
    "llama": (  # 3 x 8 gains, 5 gated units, 2 key heads of one pair each, 2 value heads of GL(2), rotations of 8 units
        lambda: Llama(cast=False), lambda: tokens(20), 24 + 5 + 4 + 8 + 28 + 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_symmetries_found_span_everything_that_leaves_the_function(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, example, dimension = CASES[name]
    model, x = generic(make()), example()
    null = null_space(model, x)
    found = torch.cat(list(tangents(model, x, monkeypatch)))
    assert float((found - found @ null.T @ null).abs().max()) < 1e-4  # nothing that changes the function
    assert int((torch.linalg.svdvals(found) > 1e-2).sum()) == len(null) == dimension


def constants(model: Transformer) -> Iterator[Tensor]:
    """What the catalogue leaves out of a transformer with layer normalisation and biases: three redundancies of its constants.

    The output of a layer normalisation lies in a plane (its mean before the gain is zero), and biases in a row can be traded.
    """

    def direction(**moves: Tensor) -> Tensor:
        names = dict(model.named_parameters())
        moved = {name.replace("__", "."): value for name, value in moves.items()}
        assert moved.keys() <= names.keys()
        return torch.cat([moved.get(name, torch.zeros_like(p)).detach().reshape(-1) for name, p in names.items()])

    for unit in torch.eye(4, dtype=torch.float64):  # a constant of the embedding in all positions
        yield direction(embed__bias=unit, position=-unit.expand(4, 4))
    for norm, reader in (("norm1", "attention.qkv"), ("norm2", "up"), ("norm", "head")):
        gain, bias = model.get_parameter(f"{norm}.weight"), model.get_parameter(f"{norm}.bias")
        weight = model.get_parameter(f"{reader}.weight")
        key = reader.replace(".", "__")
        for unit in torch.eye(4, dtype=torch.float64):  # the bias of a normalisation in the bias of what reads it
            yield direction(**{f"{norm}__bias": unit, f"{key}__bias": -weight @ unit})
        for row in torch.eye(len(weight), dtype=torch.float64):  # a row that the plane does not see
            yield direction(
                **{f"{key}__weight": torch.outer(row, 1 / gain), f"{key}__bias": -row * (bias / gain).sum()}
            )


def test_what_the_catalogue_leaves_out_of_a_layernorm_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = generic(Transformer()), inputs(90, 4, 6)
    null = null_space(model, x)
    found = torch.cat(list(tangents(model, x, monkeypatch)))
    known = int((torch.linalg.svdvals(found) > 1e-2).sum())
    extra = torch.stack([v / v.norm() for v in constants(model)])
    assert float((extra - extra @ null.T @ null).abs().max()) < 1e-9
    both = torch.cat([found, extra])
    assert int((torch.linalg.svdvals(both) > 1e-3).sum()) == len(null) == known + 34
