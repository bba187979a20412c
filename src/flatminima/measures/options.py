"""Radii, sizes and accuracies of all measures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from flatminima.names import unknown

# Option: the least value it may take, itself included or not.
_POSITIVE = (
    "rho", "adaptive_rho", "linf_rho", "adaptive_linf_rho", "radius", "rtol", "zero_threshold", "compression_tolerance",
    "loss_rise", "prior_std", "localization",
)  # fmt: skip
_LEAST = {
    "max_products": 2, "max_probes": 10, "ascent_steps": 1, "ascent_starts": 1, "draws": 2, "micro_batch": 1,
    "max_micro_batches": 2, "dense_limit": 1, "directions": 2, "chains": 2, "burn_in": 1, "chain_draws": 8,
}  # fmt: skip


@dataclass(frozen=True)
class MeasureOptions:
    """Radii, sizes and accuracies; the defaults are those of the command line.

    Attributes:
        rho: radius of the Euclidean ball of SAM sharpness.
        adaptive_rho: radius of the ball of adaptive sharpness, in relative units.
        linf_rho: half width of the box of Linf sharpness.
        adaptive_linf_rho: the same for adaptive Linf sharpness: the largest relative change of a weight.
        radius: length of the random displacements of average-case sharpness.
        rtol: relative error asked of eigenvalue and trace.
        max_products: Hessian-vector products for the eigenvalue, at most.
        max_probes: probes for the trace, at most.
        ascent_steps: gradient steps of the sharpness ascents, at most, per start. 1 is the step of SAM.
        ascent_starts: 1: the ascents start from the gradient alone; 2: also from a random direction.
        draws: antithetic pairs of random displacements.
        micro_batch: rows m of m-sharpness.
        max_micro_batches: micro-batches of m-sharpness, at most.
        zero_threshold: eigenvalues below this fraction of the largest absolute one count as zero.
        dense_limit: parameters up to which a Hessian is formed and decomposed exactly.
        relative_flatness_layer: name of the linear layer of relative flatness; the last one by default.
        margin_quantile: which quantile of the margins.
        compression_tolerance: change of the loss that the quantised weights may cause.
        loss_rise: mean rise of the loss that fixes the noise of the PAC-Bayes terms, and height of the basin.
        prior_std: standard deviation of the Gaussian prior of the basin volume.
        directions: rays of the basin volume.
        chains, burn_in, chain_draws: of the local learning coefficient.
        localization: its restoring force gamma.
        step_size: its step epsilon; by default a fixed fraction of the stability limit.
    """

    rho: float = 0.05
    adaptive_rho: float = 0.5
    linf_rho: float = 1e-3
    adaptive_linf_rho: float = 0.01
    radius: float = 1.0
    rtol: float = 0.02
    max_products: int = 60
    max_probes: int = 100
    ascent_steps: int = 20
    ascent_starts: int = 2
    draws: int = 16
    micro_batch: int = 32
    max_micro_batches: int = 16
    zero_threshold: float = 1e-10
    dense_limit: int = 2000
    relative_flatness_layer: str | None = None
    margin_quantile: float = 0.1
    compression_tolerance: float = 0.01
    loss_rise: float = 0.1
    prior_std: float = 1.0
    directions: int = 64
    chains: int = 4
    burn_in: int = 200
    chain_draws: int = 400
    localization: float = 100.0
    step_size: float | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.ascent_starts > 2:
            raise ValueError(f"ascent_starts must be 1 or 2, got {self.ascent_starts}")
        if not 0 <= self.margin_quantile <= 1:
            raise ValueError(f"margin_quantile must be between 0 and 1, got {self.margin_quantile}")
        if self.step_size is not None and not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size must be positive and finite, or None, got {self.step_size}")

    def assigned(self, settings: Iterable[str]) -> MeasureOptions:
        """These options with some of them replaced, each given as ``"name=value"``.

        Raises:
            ValueError: not of that form, an unknown name, or a value that the option cannot take.

        Example:
            >>> MeasureOptions().assigned(["micro_batch=64", "linf_rho=1e-4"]).micro_batch
            64
        """
        kinds = {field.name: str(field.type) for field in fields(self)}
        given: dict[str, Any] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise ValueError(f"expected name=value, got {setting!r}")
            if name not in kinds:
                raise ValueError(unknown("option of the measures", name, kinds))
            convert = int if kinds[name] == "int" else float if "float" in kinds[name] else str
            try:
                given[name] = convert(text)
            except ValueError:
                raise ValueError(f"{name} takes a number of type {convert.__name__}, got {text!r}") from None
        return replace(self, **given)
