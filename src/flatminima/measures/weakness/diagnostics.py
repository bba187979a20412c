"""Did several chains sample the same thing, and how many independent draws are theirs worth?

After Vehtari, Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization, folding, and localization: an improved R-hat
for assessing convergence of MCMC", Bayesian Analysis 16 (2021).
"""

from __future__ import annotations

import numpy as np
from scipy.fft import next_fast_len
from scipy.special import ndtri
from scipy.stats import rankdata

from flatminima.measures.weakness.features import FloatArray


def split_rhat(draws: FloatArray) -> FloatArray:
    r"""Rank-normalised split R-hat of each quantity.

    The square root of the ratio of the variance of all half chains together to that within them, after every value has
    been replaced by the normal quantile of its rank. About 1 where the chains agree; above 1.01 they do not yet.

    Args:
        draws: ``(chains, draws, quantities)``, at least four draws a chain.

    Returns:
        ``(quantities,)``; NaN for a quantity that never changes.
    """
    halves = _halves(_normal_scores(draws))
    count = halves.shape[1]
    within = halves.var(axis=1, ddof=1).mean(0)
    between = count * halves.mean(1).var(axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: FloatArray = np.sqrt((count - 1) / count + between / (count * within))
    return np.where(within > 0, ratio, np.nan)


def effective_sample_size(draws: FloatArray) -> FloatArray:
    r"""Effective number of independent draws for the mean of each quantity (bulk ESS).

    :math:`N / (1 + 2 \sum_t \rho_t)` with the autocorrelations of all half chains together, summed in pairs as long as
    the pairs are positive and made monotone (Geyer, 1992).

    Args:
        draws: ``(chains, draws, quantities)``, at least four draws a chain.

    Returns:
        ``(quantities,)``; NaN for a quantity that never changes.
    """
    halves = _halves(_normal_scores(draws))
    chains, count, quantities = halves.shape
    centred = halves - halves.mean(1, keepdims=True)
    size = next_fast_len(2 * count)
    spectrum = np.fft.rfft(centred, n=size, axis=1)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), n=size, axis=1)[:, :count] / count
    within = covariance[:, 0].mean(0) * count / (count - 1)
    total = within * (count - 1) / count + halves.mean(1).var(axis=0, ddof=1)
    out = np.full(quantities, np.nan)
    for q in np.flatnonzero(within > 0):
        rho = 1.0 - (within[q] - covariance[:, :, q].mean(0)) / total[q]
        rho[0] = 1.0
        pairs = rho[: count - count % 2].reshape(-1, 2).sum(1)
        negative = np.flatnonzero(pairs < 0)
        pairs = np.minimum.accumulate(pairs[: negative[0] if len(negative) else len(pairs)])
        time = max(2.0 * pairs.sum() - 1.0, 1.0 / np.log10(chains * count))
        out[q] = chains * count / time
    return out


def _halves(draws: FloatArray) -> FloatArray:
    count = draws.shape[1] // 2
    if count < 2:
        raise ValueError(f"expected at least four draws a chain, got {draws.shape[1]}")
    return np.concatenate([draws[:, :count], draws[:, -count:]])


def _normal_scores(draws: FloatArray) -> FloatArray:
    chains, count, quantities = draws.shape
    ranks = rankdata(draws.reshape(-1, quantities), axis=0)
    scores: FloatArray = ndtri((ranks - 0.375) / (chains * count + 0.25)).reshape(draws.shape)
    return scores
