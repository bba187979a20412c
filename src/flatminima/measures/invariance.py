r"""What whole families of measures do under the kinds of symmetry, and why.

Under an affine map :math:`\theta' = D\theta + t` that preserves the function for every :math:`\theta`,
:math:`g' = D^{-\top} g` and :math:`H' = D^{-\top} H D^{-1}` (see :mod:`flatminima.symmetries.kinds`).
What a measure does under a kind follows from what :math:`D` and :math:`t` are; each set below is one answer to that.
"""

from __future__ import annotations

from typing import Literal

from flatminima.symmetries.kinds import KINDS

Invariance = Literal["invariant", "almost", "changes", "unknown"]

#: How a table shows each; "almost": up to the epsilon of a normalisation layer.
MARKS: dict[Invariance, str] = {"invariant": "✓", "almost": "~", "changes": "✗", "unknown": "–"}

ALL = frozenset(KINDS)

#: Signed permutations of the parameters: distances and the size of every weight stay.
SIGNED_PERMUTATIONS = frozenset(k.name for k in KINDS.values() if k.form == "linear" and k.orthogonal)

#: Translations along directions in which the loss is constant: derivatives stay, the sizes of the weights do not.
SHIFTS = frozenset(k.name for k in KINDS.values() if k.form == "affine" and k.orthogonal)

#: Exact only as far as the epsilon of a normalisation layer is negligible.
NEARLY = frozenset(k.name for k in KINDS.values() if not k.exact)

#: Linear for all parameters: the ray through the weights becomes the ray through the new ones.
LINEAR = frozenset(k.name for k in KINDS.values() if k.form == "linear" and k.exact and k.preserves == "outputs")

#: Preserve the function on a part of parameter space only, so that nothing follows for derivatives.
CONDITIONAL = frozenset(k.name for k in KINDS.values() if k.form == "conditional")

#: Linear maps whose :math:`D` is diagonal: relative changes of single weights stay.
DIAGONAL = frozenset(
    {
        "relu-layer-rescaling",
        "relu-unit-rescaling",
        "norm-gain-rescaling",
        "gated-rescaling",
        "query-key-diagonal",
        "value-output-diagonal",
    }
)

#: Every kind that leaves the loss alone; the temperature leaves only the order of the classes.
FUNCTION_PRESERVING = ALL - {"temperature"}

#: What is measured in Euclidean distances, or in any other norm of the coordinates, survives these and no others.
KEEPS_DISTANCES = SIGNED_PERMUTATIONS | SHIFTS
CHANGES_DISTANCES = ALL - KEEPS_DISTANCES

#: What relative displacements of single weights survive. A key bias and a unit that nothing reads have no effect at all, so
#: their own size does not matter either.
KEEPS_RATIOS = SIGNED_PERMUTATIONS | DIAGONAL | {"key-bias-shift", "dead-unit"}
CHANGES_RATIOS = ALL - KEEPS_RATIOS - NEARLY

#: What derivatives along the weight vector survive. Units that are dead or equal stay so along the ray. Of the shifts, that of
#: what feeds a normalisation moves the running mean with it where batch norm has one, and then not along a constant direction.
KEEPS_RAY = LINEAR | CONDITIONAL | (SHIFTS - {"layernorm-shift"})
CHANGES_RAY = ALL - KEEPS_RAY - NEARLY
