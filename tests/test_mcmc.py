"""Chain diagnostics on autoregressive processes, whose autocorrelation time is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flatminima.measures.mcmc import effective_draws, split_r_hat


def autoregressive(phi: float, chains: int = 4, draws: int = 4000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(chains, draws, generator=generator, dtype=torch.float64)
    x = torch.empty_like(noise)
    x[:, 0] = noise[:, 0] / math.sqrt(1 - phi**2)
    for t in range(1, draws):
        x[:, t] = phi * x[:, t - 1] + noise[:, t]
    return x


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.5, 0.9])
def test_effective_draws(phi: float) -> None:
    exact = 16000 * (1 - phi) / (1 + phi)
    assert effective_draws(autoregressive(phi)) == pytest.approx(exact, rel=0.15)


def test_chains_that_agree_and_that_do_not() -> None:
    x = autoregressive(0.5)
    assert split_r_hat(x) == pytest.approx(1.0, abs=0.01)
    apart = x + 3 * torch.arange(4.0).double()[:, None]
    assert split_r_hat(apart) > 1.5
    assert effective_draws(apart) < 20
    drift = x[:1] + torch.linspace(0, 10, 4000).double()  # one chain that has not settled
    assert split_r_hat(drift) > 1.5


def test_constant_chains() -> None:
    assert split_r_hat(torch.ones(3, 20)) == 1.0
    assert split_r_hat(torch.arange(3.0)[:, None].expand(3, 20)) == math.inf
    assert effective_draws(torch.ones(3, 20)) == 60
