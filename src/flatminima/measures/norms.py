"""Norms of the parameters and of the layers: rival explanations rather than flatness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import ALL, SIGNED_PERMUTATIONS
from flatminima.objective import Objective

#: Biases are not used, so what moves only those is not seen.
KEEPS_SPECTRUM = SIGNED_PERMUTATIONS | {"relu-layer-rescaling", "sigmoid-flip", "key-bias-shift", "value-bias-shift"}
CHANGES_SPECTRUM = ALL - KEEPS_SPECTRUM


@register(
    "parameter_norm",
    "parameter norm",
    "Euclidean length of all parameters, a rival explanation rather than a flatness.",
    flatter_when=None,
    invariant_under=SIGNED_PERMUTATIONS,
    changes_under=ALL - SIGNED_PERMUTATIONS,
    cost_class="cheap",
    default=True,
    repair=("path_norm",),
)
def parameter_norm(bench: Workbench) -> Measurement:
    r""":math:`\lVert w \rVert_2` in double precision; the error is its rounding. Cost: none."""
    value = float(bench.objective.point().double().norm())
    return Measurement("parameter_norm", value, torch.finfo(torch.float64).eps * value, "rounding", True)


@register(
    "parameter_l1_norm",
    "parameter L1 norm",
    "Sum of the sizes of all parameters, a rival explanation rather than a flatness.",
    flatter_when=None,
    invariant_under=SIGNED_PERMUTATIONS,
    changes_under=ALL - SIGNED_PERMUTATIONS,
    cost_class="cheap",
    repair=("path_norm_l1",),
)
def parameter_l1_norm(bench: Workbench) -> Measurement:
    r""":math:`\lVert w \rVert_1` in double precision; the error is its rounding. Cost: none."""
    value = float(bench.objective.point().double().abs().sum())
    return Measurement("parameter_l1_norm", value, 8 * torch.finfo(torch.float64).eps * value, "rounding", True)


# ----- spectral norms -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpectralProduct:
    """The product of the layers' spectral norms.

    Attributes:
        value: the product.
        factors: layer -> its factor.
        left_out: parameters of the model that belong to no layer of a known kind, biases aside.
        relative_error: of the value.
    """

    value: float
    factors: dict[str, float]
    left_out: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """Rounding of the decompositions."""
        return 64 * torch.finfo(torch.float64).eps * len(self.factors)


def why_no_matrices(objective: Objective) -> str | None:
    """Why there is no spectral product, or ``None``. Cost: none."""
    if any(True for _ in _matrices(objective)):
        return None
    return "the model has no linear, convolutional, embedding or attention layer"


def spectral_product_of(objective: Objective) -> SpectralProduct:
    r"""Product over layers of the largest singular value of each weight matrix, biases unused.

    .. math:: \prod_l \lVert W_l \rVert_2

    Layers: linear, bilinear, embedding, the query, key, value and output projections of attention each by itself, and
    convolutions by their kernel as a matrix ``(out, in * positions)``. The gain of a normalisation layer is the diagonal
    matrix that it is: its factor is the largest absolute gain, divided by the running standard deviation for batch norm in
    evaluation mode. So a network of linear layers, batch norm and ReLU is Lipschitz with this constant, up to the overlap of
    convolution kernels, and rescaling a layer does not change it. The bound is the function's, so that layers count which are
    frozen or not selected: a rescaling moves scale into them too. Source: Neyshabur, Bhojanapalli and Srebro (2018).

    Raises:
        NotApplicableError: no such layer.

    Cost: no pass over the data; one singular value decomposition a matrix, in double precision.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> f = Objective(net, nn.functional.mse_loss, (torch.ones(1, 2), torch.ones(1, 1)))
        >>> round(spectral_product_of(f).value, 9)
        15.0
    """
    matrices = list(_matrices(objective))
    if not matrices:
        raise NotApplicableError(str(why_no_matrices(objective)))
    counted = {parameter for _, parameter, _ in matrices}
    left_out = tuple(n for n, p in objective.model.named_parameters() if p.dim() >= 2 and n not in counted)
    norms = {name: _spectral_norm(matrix) for name, _, matrix in matrices} | dict(_gains(objective))
    return SpectralProduct(math.prod(norms.values()), norms, left_out)


def _matrices(objective: Objective) -> Iterator[tuple[str, str, Tensor]]:
    """Factor, parameter and matrix of every weight that multiplies, frozen or not."""
    for name, module in objective.model.named_modules():
        held = {local: p.detach() for local, p in module.named_parameters(recurse=False)}
        for local, weight in held.items():
            parameter = f"{name}.{local}".lstrip(".")
            if weight.dim() < 2 or _is_norm(module):
                continue
            if isinstance(module, nn.MultiheadAttention) and local == "in_proj_weight":
                for part, matrix in zip("qkv", weight.chunk(3), strict=True):
                    yield f"{name}.{part}", parameter, matrix
            elif local == "weight" or (isinstance(module, nn.MultiheadAttention) and local.endswith("_proj_weight")):
                yield parameter, parameter, weight.flatten(1)


def _gains(objective: Objective) -> Iterator[tuple[str, float]]:
    for name, module in objective.model.named_modules():
        if _is_norm(module):
            gain = module.weight.detach().double().abs()
            if getattr(module, "running_var", None) is not None and objective.mode == "eval":
                gain = gain / (module.running_var.double() + module.eps).sqrt()
            yield name, float(gain.max())


def _is_norm(module: nn.Module) -> bool:
    """Whether the layer normalises and then multiplies by a gain."""
    return isinstance(getattr(module, "weight", None), Tensor) and "norm" in type(module).__name__.lower()


def _spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2)) if matrix.numel() else 0.0


@register(
    "spectral_product",
    "spectral product",
    "Product of the layers' spectral norms, which bounds how fast the outputs can change with the inputs.",
    flatter_when=None,
    invariant_under=KEEPS_SPECTRUM,
    changes_under=CHANGES_SPECTRUM,
    cost_class="cheap",
    applies=why_no_matrices,
    repair=("path_norm",),
)
def spectral_product(bench: Workbench) -> Measurement:
    """See :func:`spectral_product_of`. Cost: no pass over the data."""
    found = spectral_product_of(bench.objective)
    note = f"not counted: {', '.join(found.left_out)}" if found.left_out else ""
    return Measurement("spectral_product", found.value, found.relative_error * found.value, "rounding", True, note=note)
