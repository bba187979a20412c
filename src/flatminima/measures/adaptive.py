"""Sharpness measured in units of the weights themselves: element by element, filter by filter, and as common code has it."""

from __future__ import annotations

from flatminima.measures import scales
from flatminima.measures.base import Measurement, Workbench, register
from flatminima.measures.invariance import ALL, CHANGES_RATIOS, KEEPS_RATIOS, NEARLY, SIGNED_PERMUTATIONS
from flatminima.measures.sharpness import Ball, average, worst

_KEEPS_ROWS = SIGNED_PERMUTATIONS | {"relu-layer-rescaling", "query-key-diagonal", "key-bias-shift"}
_CHANGES_ROWS = ALL - _KEEPS_ROWS - NEARLY
_KEEPS_SIZES = SIGNED_PERMUTATIONS | {"key-bias-shift"}


@register(
    "adaptive_sharpness",
    "elementwise-adaptive sharpness",
    "Largest rise of the loss found when each weight moves relative to its own size; a lower bound of the true maximum.",
    invariant_under=KEEPS_RATIOS,
    almost_under=NEARLY,
    changes_under=CHANGES_RATIOS,
    default=True,
)
def adaptive_sharpness(bench: Workbench) -> Measurement:
    r"""Elementwise-adaptive worst case :math:`\max_{\lVert \delta / |w| \rVert_2 \le \rho} L(w+\delta) - L(w)`, from below.

    The scale is :math:`|w|` for every parameter, biases included, with nothing added: adding a constant, as common code does,
    breaks the invariance. The ascent runs in :math:`s = \delta/|w|`, so its iterates are invariant too. Source: Kwon et al.
    (2021), eq. 3 with eta = 0. Cost: up to 2 * ascent_steps gradients.
    """
    return worst("adaptive_sharpness", bench, Ball(scales.elementwise(bench.objective), bench.options.adaptive_rho))


@register(
    "adaptive_average_sharpness",
    "average-case adaptive sharpness",
    "Mean rise of the loss over random displacements in which each weight moves relative to its own size.",
    invariant_under=KEEPS_RATIOS,
    almost_under=NEARLY,
    changes_under=CHANGES_RATIOS,
)
def adaptive_average_sharpness(bench: Workbench) -> Measurement:
    r"""Elementwise-adaptive average case :math:`\mathbb{E}_u[L(w + \rho\,|w| \odot u)] - L(w)`, *u* uniform on the unit sphere.

    To second order :math:`\rho^2 \sum_i w_i^2 H_{ii} / 2n`. Antithetic pairs; the error is a standard error. Source:
    Andriushchenko et al. (2023), section 3. Cost: 2/3 gradient a pair.
    """
    ball = Ball(scales.elementwise(bench.objective), bench.options.adaptive_rho)
    return average("adaptive_average_sharpness", bench, ball)


@register(
    "adaptive_linf_sharpness",
    "adaptive Linf sharpness",
    "Largest rise of the loss found when no weight changes by more than a fixed fraction of itself; a lower bound.",
    invariant_under=KEEPS_RATIOS,
    almost_under=NEARLY,
    changes_under=CHANGES_RATIOS,
)
def adaptive_linf_sharpness(bench: Workbench) -> Measurement:
    r"""Elementwise-adaptive worst case in a box, :math:`\max_{|\delta_i| \le \rho |w_i|} L(w+\delta) - L(w)`, from below.

    Source: Andriushchenko et al. (2023), section 3. Cost: up to 2 * ascent_steps gradients.
    """
    ball = Ball(scales.elementwise(bench.objective), bench.options.adaptive_linf_rho, "linf")
    return worst("adaptive_linf_sharpness", bench, ball)


@register(
    "filter_adaptive_sharpness",
    "filter-wise adaptive sharpness",
    "Largest rise of the loss found when each row of a weight matrix moves relative to its own length; a lower bound.",
    invariant_under=_KEEPS_ROWS,
    almost_under=NEARLY,
    changes_under=_CHANGES_ROWS,
    repair=("adaptive_sharpness",),
)
def filter_adaptive_sharpness(bench: Workbench) -> Measurement:
    r"""Filter-wise adaptive worst case: as the elementwise one, with :math:`T` the length of the weight's row, from below.

    A layer may be rescaled as a whole; scaling single units changes the rows of the next layer. Source: Kwon et al.
    (2021), section 3. Cost: up to 2 * ascent_steps gradients.
    """
    ball = Ball(scales.filterwise(bench.objective), bench.options.adaptive_rho)
    return worst("filter_adaptive_sharpness", bench, ball)


@register(
    "asam_sharpness",
    "ASAM sharpness, as coded",
    "Adaptive sharpness with the constants of common code: 0.01 is added to the weights' sizes, and biases count as they are.",
    invariant_under=_KEEPS_SIZES,
    changes_under=ALL - _KEEPS_SIZES,
    repair=("adaptive_sharpness",),
)
def asam_sharpness(bench: Workbench) -> Measurement:
    r"""Worst case over ASAM's ball as it is commonly coded: :math:`T = |w| + 0.01` on matrices, 1 on biases; from below.

    Neither constant survives a rescaling. Source: the released code of Kwon et al. (2021). Cost: up to 2 * ascent_steps
    gradients.
    """
    return worst("asam_sharpness", bench, Ball(scales.asam(bench.objective), bench.options.adaptive_rho))
