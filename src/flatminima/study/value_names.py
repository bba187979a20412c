"""What the values of a study are called in sentences and tables."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flatminima.measures import MEASURES
from flatminima.study.study_measures import STUDY_MEASURES

_VALUES: Mapping[str, str] = MappingProxyType(
    {
        "test.accuracy": "test accuracy", "test.accuracy.a": "test accuracy on half a",
        "test.accuracy.b": "test accuracy on half b", "train.loss": "training loss", "train.epochs": "training epochs",
    }
)  # fmt: skip


def word(name: str) -> str:
    """What a value is called in sentences: the label of a measure, and names of other values without their underscores.

    Example:
        >>> word("w_hessian_w"), word("train.loss"), word("live_units"), word("orbit.trace")
        ("w'Hw", 'training loss', 'live units', 'Hessian trace after random moves')
    """
    if name.startswith("orbit."):
        return f"{word(name.removeprefix('orbit.'))} after random moves"
    bare = name.removeprefix("measure.").removeprefix("covariate.")
    known = MEASURES.get(bare) or STUDY_MEASURES.get(bare)
    return known.label if known is not None else _VALUES.get(bare, bare.replace("_", " ").replace(".", " "))


def outcome_word(name: str) -> str:
    """The same for what is predicted, which is accuracy unless something else is asked for.

    Example:
        >>> outcome_word("test.accuracy"), outcome_word("test.loss")
        ('accuracy', 'test loss')
    """
    return "accuracy" if name == "test.accuracy" else word(name)


def is_share(name: str) -> bool:
    """Whether a value is a share of rows, told in percent and points.

    Example:
        >>> is_share("fixed.test.accuracy"), is_share("test.loss")
        (True, False)
    """
    return "accuracy" in name.split(".")
