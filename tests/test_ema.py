"""EMA against the weighted mean written out in float64."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatminima.averaging import EMA


def walk(n: int, seed: int = 0, size: int = 4) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(0)


def run(iterates: Tensor, dtype: torch.dtype = torch.float64, **options: Any) -> EMA:
    parameter = nn.Parameter(torch.zeros(iterates.shape[1], dtype=dtype))
    ema = EMA([parameter], **options)
    for iterate in iterates:
        parameter.data.copy_(iterate)
        ema.update()
    return ema


@given(
    n=st.integers(1, 80),
    timescale=st.floats(0.1, 1e6),
    every=st.integers(1, 5),
    start=st.integers(0, 10),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_unbiased_is_the_normalised_weighted_mean(n: int, timescale: float, every: int, start: int, seed: int) -> None:
    iterates = walk(n + start, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a timescale below one step is allowed
        ema = run(iterates, timescale=timescale, every=every, start=start)
    counted = iterates[start::every]
    weights = torch.exp(-every / timescale * torch.arange(len(counted) - 1, -1, -1, dtype=torch.float64))
    expected = (weights.unsqueeze(1) * counted).sum(0) / weights.sum()
    assert ema.n == len(counted)
    torch.testing.assert_close(ema.tensors()[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("warmup", ["none", "ratio"])
def test_the_other_warmups_are_their_recursions(warmup: Any) -> None:
    iterates, decay = walk(60), math.exp(-1 / 20)
    expected = iterates[0].clone()
    for n, iterate in enumerate(iterates[1:], start=2):
        d = decay if warmup == "none" else min(decay, n / (n + 9))
        expected = d * expected + (1 - d) * iterate
    ema = run(iterates, timescale=20, warmup=warmup)
    assert ema.decay == pytest.approx(decay)
    torch.testing.assert_close(ema.tensors()[0], expected, rtol=1e-12, atol=1e-12)


def test_a_long_timescale_is_the_uniform_mean() -> None:
    iterates = walk(50)
    torch.testing.assert_close(run(iterates, timescale=1e14).tensors()[0], iterates.mean(0), rtol=1e-11, atol=1e-11)


def test_the_timescale_means_steps_whatever_every_is() -> None:
    # A slow drift: the average lags behind it by the timescale.
    drift = torch.arange(4000, dtype=torch.float64).unsqueeze(1)
    for every in (1, 5):
        lag = (drift[-1] - run(drift, timescale=100, every=every).tensors()[0]).item()
        assert lag == pytest.approx(100, abs=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_model_has_an_average_exact_to_2e_6(dtype: torch.dtype) -> None:
    iterates = (1.0 + 0.05 * walk(2000, size=500) / 40).to(dtype)
    weights = torch.exp(-torch.arange(1999, -1, -1, dtype=torch.float64) / 1000)
    expected = (weights.unsqueeze(1) * iterates.double()).sum(0) / weights.sum()
    (tensor,) = run(iterates, dtype, timescale=1000).tensors()
    assert tensor.dtype == torch.float32
    assert (tensor.double() - expected).norm() / expected.norm() < 2e-6
    (tensor,) = _wide(iterates, dtype)
    assert (tensor - expected).norm() / expected.norm() < 1e-13


def _wide(iterates: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    parameter = nn.Parameter(torch.zeros(iterates.shape[1], dtype=dtype))
    ema = EMA([parameter], timescale=1000, dtype=torch.float64)
    for iterate in iterates:
        parameter.data.copy_(iterate)
        ema.update()
    return ema.tensors()


@pytest.mark.parametrize("at", [0, 1, 7, 20])
def test_resuming_changes_no_bit(at: int) -> None:
    iterates = walk(30).float()
    parameter = nn.Parameter(torch.zeros(4))
    ema = EMA([parameter], 5.0, start=2, every=3)
    for step, iterate in enumerate(iterates):
        if step == at:
            state, ema = ema.state_dict(), EMA([parameter], 5.0, start=2, every=3)
            ema.load_state_dict(state)
        parameter.data.copy_(iterate)
        ema.update()
    assert torch.equal(ema.tensors()[0], run(iterates, torch.float32, timescale=5.0, start=2, every=3).tensors()[0])
    with pytest.raises(ValueError, match=r"saved with timescale=5\.0; this EMA has timescale=6\.0"):
        EMA([parameter], 6.0, start=2, every=3).load_state_dict(ema.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timescale": 0.0}, ValueError, r"timescale=0\.0 must be a positive"),
        ({"timescale": math.inf}, ValueError, "use SWA"),
        ({"timescale": "9"}, TypeError, "number of steps"),
        ({"warmup": "unbased"}, ValueError, "unknown warmup 'unbased': expected one of unbiased"),
        ({"every": 0}, ValueError, "every=0 must be at least 1"),
        ({"start": -1}, ValueError, "start=-1 must be at least 0"),
        ({"every": 1.5}, TypeError, "every must be an int"),
        ({"buffers": "avarage"}, ValueError, "unknown buffers policy 'avarage': expected one of average"),
        ({"dtype": torch.int32}, TypeError, "cannot hold a mean"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EMA(nn.Linear(1, 1), **options)


def test_a_decay_in_the_place_of_a_timescale_is_noticed() -> None:
    with pytest.warns(UserWarning, match=r"A decay of 0.999 per step is timescale=999.5") as said:
        EMA(nn.Linear(1, 1), 0.999)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EMA(nn.Linear(1, 1), 1.0)
