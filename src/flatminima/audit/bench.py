"""One minimum in double precision, ready to be measured again and again in other coordinates."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.batches import ObjectiveError, batches, cast, count_rows, cut_rows
from flatminima.measures import MEASURES, Measurement, MeasureOptions, measure
from flatminima.objective import LossFn, Objective, SecondDerivativeError
from flatminima.symmetries.execution import Widened, double_copy

#: By which one measure ends without a number, and an audit goes on.
_FAILURES = (ArithmeticError, ValueError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]

_LOWER = "the model computes its loss in"  # how a note about narrower casts begins
_LIFTED = "casts to narrower types inside the model were lifted: all numbers are of double precision"


class Bench:
    """A model, a loss and data, all in double precision; the user's own are not touched.

    Models that cast inside (logits or a normalisation in float32) run with these casts lifted: rounding of that kind cannot
    be told from a small change of a measure.

    Args:
        model: any module.
        loss_fn: mean loss over the rows, or ``None`` where the model computes it.
        data: as for :class:`~flatminima.Objective`.
        options: of the measures.
        mode: ``"eval"`` or ``"train"``.
        seed: of every random draw.
        probes: unlabelled inputs, for measures that look at some.

    Raises:
        ObjectiveError: data without targets, or whatever :class:`~flatminima.Objective` refuses.
        NonFiniteLossError: the loss is NaN or infinite; the batch is named.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        data: Any,
        options: MeasureOptions,
        mode: str,
        seed: int,
        probes: Any = None,
    ) -> None:
        pairs = batches(data)
        if loss_fn is not None and any(y is None for _, y in pairs):
            raise ObjectiveError(
                "the data have no targets: an audit measures the loss, so each batch must be (inputs, targets), or the model "
                "must compute its own loss (loss_fn=None); flatminima.find_symmetries needs inputs alone"
            )
        self.pairs = [(cast(x, torch.float64), cast(y, torch.float64)) for x, y in pairs]
        self.model = double_copy(model, mode)
        self.loss_fn = copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
        self.options, self.mode, self.seed, self.probes = options, mode, seed, cast(probes, torch.float64)
        plain = self._unchecked(self.model).loss()
        with Widened():  # type: ignore[no-untyped-call]
            self.loss = self._unchecked(self.model).loss()
        self._casts = self.loss != plain
        with self.lifted():  # the one construction that checks the function; its copies are the same function
            self.objective = Objective(self.model, self.loss_fn, self.pairs, mode=mode, seed=seed)
            with contextlib.suppress(SecondDerivativeError):  # products are differences then
                self.objective.verify()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers must know."""
        return (*self.objective.notes, _LIFTED) if self._casts else self.objective.notes

    @property
    def classifies(self) -> bool:
        """Whether the targets are classes, so that the order of the outputs is a prediction."""
        if isinstance(self.loss_fn, nn.CrossEntropyLoss | nn.NLLLoss) or self.loss_fn in (F.cross_entropy, F.nll_loss):
            return True
        return all(isinstance(y, Tensor) and not y.is_floating_point() for _, y in self.pairs)

    def inputs(self, rows: int) -> Any:
        """The first rows of the first batch, as the model takes them."""
        x, y = self.pairs[0]
        return cut_rows(x, count_rows(y if isinstance(y, Tensor) and y.dim() else x), slice(0, rows))

    def at(self, model: nn.Module) -> Objective:
        """The objective of a member; what is known of the network itself is not checked again."""
        return self._unchecked(model).measured_like(self.objective)

    def _unchecked(self, model: nn.Module) -> Objective:
        return Objective(model, self.loss_fn, self.pairs, mode=self.mode, seed=self.seed, check=False)

    def lifted(self) -> contextlib.AbstractContextManager[Any]:
        """Where everything is computed."""
        return Widened() if self._casts else contextlib.nullcontext()  # type: ignore[no-untyped-call]

    def measured(self, model: nn.Module, names: Iterable[str]) -> tuple[float, dict[str, Measurement]]:
        """Loss and measures of a member; a measure that fails there has no value, and the others go on."""
        with self.lifted():
            objective = self.at(model)
            return objective.loss(), self._all(objective, names)

    def at_the_network(self, names: Iterable[str]) -> dict[str, Measurement]:
        """Measures of the network itself; one that fails has no value but the reason, and the others go on."""
        with self.lifted():
            return self._all(self.objective, names)

    def ascended_again(self, found: Mapping[str, Measurement]) -> dict[str, Measurement]:
        """The lower bounds that come without an error, with the spread to a second ascent from elsewhere as theirs.

        At the members one ascent is enough, because it moves along with the coordinates; how far the maximum may be above it is
        seen only here.
        """
        names = [name for name, m in found.items() if m.error is None and m.error_kind.startswith("lower bound")]
        with self.lifted():
            options = replace(self.options, ascent_starts=2)
            twice = measure(self.objective, names, options=options, seed=self.seed) if names else {}
        return {name: replace(found[name], error=twice[name].error) for name in names}

    def applicable(self, names: Iterable[str]) -> list[str]:
        """Those of the measures that are defined here, at the cost of a forward pass each."""
        with self.lifted():
            return [name for name in names if MEASURES[name].applies(self.objective) is None]

    def _all(self, objective: Objective, names: Iterable[str]) -> dict[str, Measurement]:
        wanted = list(names)
        if not wanted:
            return {}
        try:
            return measure(objective, wanted, options=self.options, seed=self.seed, probes=self.probes)
        except _FAILURES:
            found: dict[str, Measurement] = {}
            for name in wanted:
                try:
                    found |= measure(objective, [name], options=self.options, seed=self.seed, probes=self.probes)
                except _FAILURES as error:
                    reason = str(error) or type(error).__name__
                    found[name] = Measurement(name, math.nan, None, "not applicable", False, note=reason)
            return found
