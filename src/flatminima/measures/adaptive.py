"""Sharpness measured in units of the weights themselves, so that rescaling the weights does not change it."""

from __future__ import annotations

from flatminima.measures.base import RELU_RESCALING, Measurement, Workbench, register
from flatminima.measures.sharpness import ascend


@register(
    "adaptive_sharpness",
    "elementwise-adaptive sharpness",
    "Largest rise of the loss found when each weight moves relative to its own size; a lower bound of the true maximum.",
    invariant_under=RELU_RESCALING,
)
def adaptive_sharpness(bench: Workbench) -> Measurement:
    r"""Elementwise-adaptive worst case :math:`\max_{\lVert \delta / |w| \rVert_2 \le \rho} L(w+\delta) - L(w)`, from below.

    The scale is :math:`|w|` for every parameter, biases included, with nothing added: adding a constant, as common code does,
    breaks the invariance. The ascent runs in :math:`s = \delta/|w|`, so its iterates are invariant too. Source: Kwon et al.
    (2021), eq. 3 with eta = 0. Cost: up to 2 * ascent_steps gradients.
    """
    return ascend("adaptive_sharpness", bench, bench.objective.point().double().abs(), bench.options.adaptive_rho)
