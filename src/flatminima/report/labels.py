"""Names for readers: methods, symmetries and measures as the page and the terminal print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatminima.study import methods as known


def method(name: object) -> str:
    """``sam+swad`` as ``SAM+SWAD``; names of others stay as they are."""
    return known.label(str(name))


def symmetry(kind: object) -> str:
    """``relu-layer-rescaling`` as ``ReLU layer rescaling``."""
    words = str(kind).split("-")
    return " ".join("ReLU" if word == "relu" else word for word in words)


def measure(results: Mapping[str, Any], name: str) -> str:
    """The measure's label in the results, or its name."""
    return str((results.get("measures") or {}).get(name, {}).get("label") or name)


def capitalised(label: str) -> str:
    """The label with a capital first letter, unless it begins with a symbol such as ``w'Hw``."""
    return label[:1].upper() + label[1:] if label[1:2].isalpha() else label


def measures(results: Mapping[str, Any]) -> list[str]:
    """The names of the measures, in the order of the results; a name is in no list twice."""
    return list(results.get("measures") or {})


def methods(results: Mapping[str, Any]) -> list[str]:
    """The names of the methods, the first one being what the others are compared with."""
    return [str(summary["method"]) for summary in results.get("methods") or []]
