"""The measures and what they survive as tables for documents, made from the registry so that no document can differ from it."""

from __future__ import annotations

from collections.abc import Mapping

from flatminima.measures import MEASURES, Measure
from flatminima.measures.invariance import MARKS
from flatminima.symmetries.kinds import KINDS

#: Headings short enough for one column a kind.
SHORT: Mapping[str, str] = {
    "relu-layer-rescaling": "L",
    "relu-unit-rescaling": "N",
    "norm-gain-rescaling": "NG",
    "gated-rescaling": "GU",
    "pre-norm-rescaling": "PN",
    "layernorm-shift": "LN",
    "query-key": "QK",
    "query-key-diagonal": "QKd",
    "key-bias-shift": "KB",
    "value-output": "VO",
    "value-output-diagonal": "VOd",
    "value-bias-shift": "VB",
    "residual-stream": "RS",
    "unit-permutation": "P",
    "head-permutation": "PH",
    "sign-flip": "SF",
    "sigmoid-flip": "SG",
    "softmax-shift": "SM",
    "dead-unit": "Z",
    "duplicate-unit": "ZZ",
    "temperature": "T",
}


def invariance_table() -> str:
    """Markdown: one row for all measures that behave alike, one column a kind of symmetry.

    Example:
        >>> invariance_table().splitlines()[0][:25]
        '| measures | L | N | NG |'
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, measure in MEASURES.items():
        alike.setdefault(_row(measure), []).append(f"`{name}`")
    lines = [_line(["measures", *(SHORT[kind] for kind in KINDS)]), _line(["---"] * (1 + len(KINDS)))]
    lines += [_line([", ".join(names), *marks]) for marks, names in alike.items()]
    return "\n".join(lines)


def kinds_table() -> str:
    """Markdown: what the columns mean.

    Example:
        >>> kinds_table().splitlines()[2]
        '| L | `relu-layer-rescaling` | W, b of a layer times d > 0; what reads it divided by d (by d^2 behind ReLU^2) |'
    """
    lines = [_line(["", "kind", "what its maps do"]), _line(["---"] * 3)]
    lines += [_line([SHORT[name], f"`{name}`", kind.law]) for name, kind in KINDS.items()]
    return "\n".join(lines)


def _row(measure: Measure) -> tuple[str, ...]:
    return tuple(MARKS[measure.invariance(kind)] for kind in KINDS)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
