"""The methods of a comparison by name: an optimiser, an average of its iterates, or both as in ``asam+ema``."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from flatminima import models
from flatminima.names import nearest_first, unknown
from flatminima.optim.variants import normalisation_parameters

OPTIMIZERS: dict[str, str] = {
    "sgd": "SGD with momentum",
    "sam": "sharpness-aware minimisation around SGD",
    "asam": "SAM in units of each weight's own size",
    "gsam": "SAM along the surrogate gap",
    "wsam": "SAM with the sharpness as a weighted penalty",
    "friendly-sam": "SAM without the gradient that batches share",
    "looksam": "SAM every 5th step, its direction used again in between",
    "ae-sam": "SAM where the gradient is large",
    "every-k": "SAM every 2nd step",
    "probability": "SAM with probability 1/2",
    "msam": "SAM along the momentum, without a second gradient",
    "sam-on": "SAM of the normalisation layers only",
    "m-sam": "SAM with a perturbation per quarter of the batch",
    "random": "the gradient at randomly perturbed weights",
    "sa-gd": "the gradient at the maximum that 5 steps of ascent find",
    "bsam": "SAM as variational inference, with its own learning rate",
}
AVERAGES: dict[str, str] = {
    "swa": "uniform mean of the last quarter, one iterate an epoch",
    "ema": "exponential mean with a memory of a tenth of the run",
    "lawa": "mean of the five latest epochs",
    "tail": "uniform mean of the last quarter of the iterates",
    "swad": "mean over the valley of the validation loss",
    "swad-released": "SWAD as its authors' code has it",
}
METHODS: dict[str, str] = OPTIMIZERS | AVERAGES
"""Single names. An average alone is of SGD; any optimiser and any average go together as ``OPTIMIZER+AVERAGE``."""

#: Steps of ascent of ``sa-gd``.
ASCENT = 5
#: Gradient evaluations of a usual step, and of the dearest one; (1, 1) for what is not listed.
_COSTS: dict[str, tuple[float, int]] = {
    **dict.fromkeys(("sam", "asam", "gsam", "wsam", "friendly-sam", "sam-on", "m-sam", "bsam"), (2.0, 2)),
    **dict.fromkeys(("ae-sam", "every-k", "probability"), (1.5, 2)),
    "looksam": (1.2, 2),
    "sa-gd": (ASCENT + 1.0, ASCENT + 1),
}
_LABELS = {
    "sgd": "SGD", "sam": "SAM", "asam": "ASAM", "gsam": "GSAM", "wsam": "WSAM", "friendly-sam": "Friendly-SAM",
    "looksam": "LookSAM", "ae-sam": "AE-SAM", "every-k": "SAM every 2nd", "probability": "SAM half the time", "msam": "MSAM",
    "sam-on": "SAM-ON", "m-sam": "m-SAM", "random": "Random noise", "sa-gd": "SA-GD", "bsam": "bSAM", "swa": "SWA",
    "ema": "EMA", "lawa": "LAWA", "tail": "Tail average", "swad": "SWAD", "swad-released": "SWAD (released)",
}  # fmt: skip
_SHOWN = 8


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        optimizer: a key of :data:`OPTIMIZERS`.
        average: a key of :data:`AVERAGES`, or ``None`` for the last iterate.

    Example:
        >>> method = parse("ema+asam")
        >>> method.name, method.usual_cost, method.most_cost
        ('asam+ema', 2.0, 2)
    """

    optimizer: str
    average: str | None = None

    @property
    def name(self) -> str:
        """As it stands in ``--methods``, in files and in results."""
        if self.average is None:
            return self.optimizer
        return self.average if self.optimizer == "sgd" else f"{self.optimizer}+{self.average}"

    @property
    def usual_cost(self) -> float:
        """Gradient evaluations a step, of variants that decide from step to step the expected ones."""
        return _COSTS.get(self.optimizer, (1.0, 1))[0]

    @property
    def most_cost(self) -> int:
        """Gradient evaluations of the dearest step."""
        return _COSTS.get(self.optimizer, (1.0, 1))[1]


def parse(name: str) -> Method:
    """The method of this name; the order of the two parts and a needless ``sgd+`` do not matter.

    Raises:
        ValueError: an unknown name (the nearest ones are listed), or two optimisers, or two averages.

    Example:
        >>> parse("swad"), parse("sam")
        (Method(optimizer='sgd', average='swad'), Method(optimizer='sam', average=None))
    """
    parts = name.split("+")
    if any(part not in METHODS for part in parts):
        known = [Method(o, a).name for o in OPTIMIZERS for a in (None, *AVERAGES)]
        raise ValueError(
            f"{unknown('method', name, nearest_first(name, known)[:_SHOWN])}; {', '.join(OPTIMIZERS)} are optimisers, "
            f"{', '.join(AVERAGES)} averages, OPTIMISER+AVERAGE is both, all is each of them"
        )
    optimizers, averages = ([part for part in parts if part in kind] for kind in (OPTIMIZERS, AVERAGES))
    for kind, found in (("optimisers", optimizers), ("averages", averages)):
        if len(found) > 1:
            raise ValueError(
                f"method {name!r} names {len(found)} {kind}, {' and '.join(found)}: expected at most one optimiser and one "
                "average, as in asam+ema; two methods are separated by a comma"
            )
    return Method(optimizers[0] if optimizers else "sgd", averages[0] if averages else None)


def expand(names: Iterable[str], model: str) -> tuple[str, ...]:
    """Names as results have them, with ``all`` replaced by every single method that the model allows and that is not named.

    Raises:
        ValueError: as :func:`parse`; ``sam-on`` for a model without normalisation layers.

    Example:
        >>> expand(["ema+sam"], "mlp"), len(expand(["all"], "mlp")), len(expand(["all", "sam+swad"], "resnet18"))
        (('sam+ema',), 21, 23)
    """
    given = list(names)
    named = [parse(name).name for name in given if name != "all"]
    for name in named:
        if parse(name).optimizer == "sam-on" and not has_normalisation(model):
            able = [other for other in models.MODELS if has_normalisation(other)]
            raise ValueError(
                f"method {name!r} perturbs the normalisation layers alone, and model {model!r} has none: choose --model "
                f"{', '.join(able[:-1])} or {able[-1]}, or leave {name} out"
            )
    rest = [n for n in METHODS if n not in named and (n != "sam-on" or has_normalisation(model))]
    found: list[str] = []
    for name in given:
        found += rest if name == "all" else [parse(name).name]
        rest = [] if name == "all" else rest
    return tuple(found)


def label(name: str) -> str:
    """A method's name for readers; parts nobody knows stay as they are.

    Example:
        >>> label("asam+ema"), label("mine")
        ('ASAM+EMA', 'mine')
    """
    return "+".join(_LABELS.get(part, part) for part in name.split("+"))


@functools.cache
def has_normalisation(model: str) -> bool:
    """Whether a reference network has parameters that ``sam-on`` can move."""
    with torch.device("meta"):
        return any(True for _ in normalisation_parameters(models.build(model, (3, 32, 32), 10)))
