"""Whether Markov chains agree with each other, and how many independent draws they are worth.

Vehtari, Gelman, Simpson, Carpenter and Buerkner, "Rank-normalization, folding, and localization: an improved R-hat" (2021),
without the rank normalisation, which means cannot use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def split_r_hat(chains: Tensor) -> float:
    r"""Split-:math:`\hat R`: the spread of all draws over that within the halves of each chain; 1 when chains agree.

    Args:
        chains: ``(chains, draws)``, at least 4 draws.

    Example:
        >>> split_r_hat(torch.tensor([[0.0, 1.0, 0.0, 1.0], [5.0, 6.0, 5.0, 6.0]])) > 3
        True
    """
    half = chains.shape[1] // 2
    split = torch.cat([chains[:, :half], chains[:, -half:]]).double()
    within = float(split.var(1).mean())
    between = float(split.mean(1).var())
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt(((half - 1) / half * within + between) / within)


def effective_draws(chains: Tensor) -> float:
    """How many independent draws tell the mean as well as these, by Geyer's initial monotone sequence.

    Args:
        chains: ``(chains, draws)``, at least 4 draws.

    Example:
        >>> x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
        >>> 3000 < effective_draws(x) < 5000
        True
    """
    split = torch.cat([chains[:, : chains.shape[1] // 2], chains[:, -(chains.shape[1] // 2) :]]).double()
    count, draws = split.shape
    centred = split - split.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * draws)
    covariance = torch.fft.irfft(spectrum.abs().square())[:, :draws].mean(0) / draws
    within = float(covariance[0]) * draws / (draws - 1)
    total = within * (draws - 1) / draws + float(split.mean(1).var())
    if total == 0:
        return float(count * draws)
    correlation = 1 - (within - covariance * draws / (draws - 1)) / total
    correlation[0] = 1.0
    pairs = correlation[: draws // 2 * 2].reshape(-1, 2).sum(1)
    positive = int((pairs <= 0).nonzero()[0]) if bool((pairs <= 0).any()) else len(pairs)
    monotone = pairs[: max(1, positive)].cummin(0).values
    time = max(-1.0 + 2.0 * float(monotone.sum()), 1 / math.log10(count * draws))
    return count * draws / time
