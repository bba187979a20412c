"""The kinds of function-preserving maps, and the sets of them under which whole families of measures behave alike.

A map that preserves the function for *every* value of the parameters is affine in them here: :math:`\\theta' = A\\theta + c`,
so that :math:`g' = A^{-\\top} g` and :math:`H' = A^{-\\top} H A^{-1}`. What a measure does under a kind follows from what
kind of :math:`A` and :math:`c` it is; each set below is one answer to that, and says why.
"""

from __future__ import annotations

from typing import Literal

Invariance = Literal["invariant", "almost", "changes", "unknown"]

#: How a table shows each; "almost": up to the epsilon of a normalisation layer.
MARKS: dict[Invariance, str] = {"invariant": "✓", "almost": "~", "changes": "✗", "unknown": "–"}

#: Kinds of symmetry, in the order of the tables; :mod:`flatminima.symmetries` finds and proves them in a model.
KINDS = (
    "relu-layer-rescaling",
    "relu-unit-rescaling",
    "unit-permutation",
    "head-permutation",
    "sign-flip",
    "sigmoid-flip",
    "norm-gain-rescaling",
    "gated-rescaling",
    "pre-norm-rescaling",
    "layernorm-shift",
    "query-key",
    "query-key-diagonal",
    "key-bias-shift",
    "value-output",
    "value-output-diagonal",
    "value-bias-shift",
    "residual-stream",
    "softmax-shift",
    "dead-unit",
    "duplicate-unit",
    "temperature",
)

#: Signed permutations of the parameters: the metric and every coordinate's size stay.
SIGNED_PERMUTATIONS = frozenset({"unit-permutation", "head-permutation", "sign-flip"})

#: Translations along directions in which the loss is constant: derivatives stay, the sizes of the weights do not.
SHIFTS = frozenset({"softmax-shift", "layernorm-shift", "key-bias-shift"})

#: Diagonal :math:`A` that the entries of each tensor follow: relative changes of single weights stay.
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

#: Linear :math:`A` with :math:`c = 0`: the ray through the weights is mapped to the ray through the new ones.
LINEAR = SIGNED_PERMUTATIONS | DIAGONAL | {"sigmoid-flip", "query-key", "value-output", "residual-stream"}

#: Diagonal too, but exact only as far as a normalisation layer's epsilon is negligible.
NEARLY = frozenset({"pre-norm-rescaling"})

#: Preserve the function on a part of parameter space only, so no law for derivatives follows.
DEGENERATE = frozenset({"dead-unit", "duplicate-unit"})

#: Every kind that preserves the loss; the temperature preserves only which class comes first.
FUNCTION_PRESERVING = frozenset(KINDS) - {"temperature"}
