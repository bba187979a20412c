"""The code length step by step, what a real compressor makes of it, and the grid."""

from __future__ import annotations

import lzma
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatminima import MeasureOptions, Objective, measure
from flatminima.measures.compressed import code_length, compressed_size_of
from test_relative_flatness import mlp, objective


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_the_code_length_is_that_of_coding_one_symbol_after_the_other(code: list[int]) -> None:
    sizes = [abs(q) for q in code]
    alphabet = max(sizes) + 1
    seen = [0.5] * alphabet
    bits = float(sum(q != 0 for q in code))
    for size in sizes:
        bits -= math.log2(seen[size] / sum(seen))
        seen[size] += 1
    assert code_length(torch.tensor(code)) == pytest.approx(bits, abs=1e-9)
    assert code_length(torch.tensor(code).flip(0)) == pytest.approx(bits, abs=1e-9)
    assert code_length(-torch.tensor(code)) == pytest.approx(bits, abs=1e-9)


def test_no_general_compressor_does_better_on_independent_integers() -> None:
    code = (2 * torch.randn(20000, generator=torch.Generator().manual_seed(0))).round().to(torch.int64)
    found = code_length(code)
    assert found < 8 * len(lzma.compress(code.to(torch.int8).numpy().tobytes(), preset=9))
    counts = torch.bincount(code - code.min()).double()
    p = counts[counts > 0] / len(code)
    assert found == pytest.approx(-len(code) * float((p * p.log2()).sum()), rel=2e-3)  # the empirical entropy
    assert code_length(torch.zeros(0, dtype=torch.int64)) == 0.0


def test_the_grid_is_the_coarsest_that_the_loss_tolerates() -> None:
    f = objective(mlp())
    point, start = f.point(), f.loss()

    def change(k: int) -> float:
        rounded = []
        for part in f.split(point).values():
            step = part.abs().max() * 2.0 ** (-k / 4)
            rounded.append(((part / step).round() * step).reshape(-1))
        return abs(f.loss(torch.cat(rounded)) - start)

    for tolerance in (1e-1, 1e-3, 1e-6):
        found = compressed_size_of(f, tolerance)
        assert found.reached
        assert found.change == pytest.approx(change(found.grid))
        assert found.change <= tolerance
        octave = -(-found.grid // 4) * 4
        assert all(change(k) > tolerance for k in range(0, octave, 4))
        assert all(change(k) > tolerance for k in range(max(0, octave - 3), found.grid))
    sizes = [compressed_size_of(f, t).bits for t in (1e-1, 1e-3, 1e-6)]
    assert sizes == sorted(sizes)


def test_a_tolerance_out_of_reach_is_said() -> None:
    f = objective(mlp())
    found = measure(f, ["compressed_size"], options=MeasureOptions(compression_tolerance=1e-300))["compressed_size"]
    assert not found.converged
    assert found.value > 0
    ordinary = measure(f, ["compressed_size"])["compressed_size"]
    assert ordinary.value == pytest.approx(compressed_size_of(f).bits / 8)
    assert ordinary.converged
    assert ordinary.cost <= 9.01


def test_weights_that_are_all_zero_need_their_steps_alone() -> None:
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    f = Objective(model, F.cross_entropy, (torch.randn(6, 4).double(), torch.arange(6) % 3))
    found = compressed_size_of(f)
    assert (found.bits, found.grid, found.change) == (64.0, 0, 0.0)
