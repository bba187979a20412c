"""Every kind of symmetry by name: what its maps do, what they keep, and what follows for the Hessian.

Measures declare their invariance by these names, so a name never changes its meaning.

A map ``theta -> theta'`` has one of four forms:

* ``linear``: ``theta' = D theta``, and ``f(D theta) = f(theta)`` for **all** theta. By the chain rule ``g' = D^-T g`` and
  ``H' = D^-T H D^-1``; if D is orthogonal, the eigenvalues of H are kept.
* ``affine``: ``theta' = D theta + t`` for all theta. The same laws hold, but ``theta' != D theta``, so that what is measured
  relative to the weights (w'Hw, adaptive sharpness) need not be kept.
* ``nonlinear``: function preserving for all theta, but the map is not affine; only the sign pattern of the Hessian's
  eigenvalues at a stationary point follows.
* ``conditional``: function preserving on a subset of the parameters only (a unit that nobody reads). Nothing follows for
  the Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Preserves = Literal["outputs", "probabilities", "predictions"]
Form = Literal["linear", "affine", "nonlinear", "conditional"]

HESSIAN_LAWS: dict[tuple[Form, bool], str] = {
    ("linear", False): "g' = D^-T g, H' = D^-T H D^-1",
    ("linear", True): "g' = D g, H' = D H D^T: eigenvalues kept",
    ("affine", False): "g' = D^-T g, H' = D^-T H D^-1 with D the linear part",
    ("affine", True): "g' = D g, H' = D H D^T with D the linear part: eigenvalues kept",
    ("nonlinear", False): "no law for all of H: the map is not affine in the parameters",
    ("conditional", False): "no law: the function is preserved on a subset of the parameters only",
}


@dataclass(frozen=True)
class Kind:
    """One kind of symmetry.

    Attributes:
        name: under which measures declare their invariance.
        law: what a map does to the parameters, in one line.
        preserves: ``outputs``; ``probabilities``: the outputs up to one number added to all classes of a row;
            ``predictions``: the outputs up to one positive factor, so that only their order is kept.
        form: of the map, see the module.
        orthogonal: whether the linear part of the map is an orthogonal matrix.
        exact: False where the map preserves the function only up to the ``eps`` of a normalisation.
    """

    name: str
    law: str
    preserves: Preserves = "outputs"
    form: Form = "linear"
    orthogonal: bool = False
    exact: bool = True


_ALL = (
    Kind("relu-layer-rescaling", "W, b of a layer times d > 0; what reads it divided by d (by d^2 behind ReLU^2)"),
    Kind("relu-unit-rescaling", "row and bias of each unit times d_i > 0; the columns that read it divided by d_i"),
    Kind("norm-gain-rescaling", "gain and bias of a normalisation times d_i; the columns that read them divided by d_i"),
    Kind("gated-rescaling", "rows of the ungated branch times c_i != 0; the columns that read the product divided by c_i"),
    Kind("pre-norm-rescaling", "what feeds a normalisation times c > 0 (running statistics along)", exact=False),
    Kind(
        "layernorm-shift", "the same row vector and number added to all units that one normalisation centres",
        form="affine", orthogonal=True,
    ),
    Kind("query-key", "per head: queries times A, keys times A^-T, A invertible (with rotary positions: scaled rotations)"),
    Kind("query-key-diagonal", "per head: query rows times a_i != 0, key rows divided by a_i"),
    Kind("key-bias-shift", "b_K + t: every score of a query moves by the same number", form="affine", orthogonal=True),
    Kind("value-output", "per head: values times B, the output map times B^-1, B invertible"),
    Kind("value-output-diagonal", "per head: value rows times b_i != 0, output columns divided by b_i"),
    Kind("value-bias-shift", "b_V + t, b_O - W_O t: the rows of an attention matrix sum to 1", form="affine"),
    Kind("residual-stream", "writers times A, readers times A^-1: A invertible, orthogonal where a normalisation reads"),
    Kind("unit-permutation", "units change places, with all rows, columns and gains that belong to them", orthogonal=True),
    Kind("head-permutation", "heads change places, with their rows and columns", orthogonal=True),
    Kind("sign-flip", "row, bias and reading columns of a unit of an odd activation times -1", orthogonal=True),
    Kind("sigmoid-flip", "row, bias and reading columns of a sigmoid unit times -1; b_next + w_out"),
    Kind(
        "softmax-shift", "one vector added to all class rows, one number to all class biases",
        preserves="probabilities", form="affine", orthogonal=True,
    ),
    Kind("dead-unit", "incoming weights of a unit whose outgoing weights are all zero: arbitrary", form="conditional"),
    Kind("duplicate-unit", "outgoing weights (a, b) of two identical units: (a + t, b - t)", form="conditional"),
    Kind("temperature", "last layer times c > 0: the loss and its Hessian change", preserves="predictions"),
)  # fmt: skip

KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
"""All kinds, in the order in which they are reported."""
