"""Everything that a study records of one trained network, in double precision where the number is not an accuracy."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.measures import Measurement, MeasureOptions, Workbench, measure
from flatminima.measures.base import NotApplicableError
from flatminima.measures.outputs import last_layer
from flatminima.measures.simplicity import activation_ranges
from flatminima.measures.weakness import FeatureError, features, pair_proxy
from flatminima.objective import Objective, ObjectiveError
from flatminima.study.run_spec import MeasureSpec, RunSpec
from flatminima.study.study_measures import STUDY_MEASURES, Network, study_value
from flatminima.study.subsets import Subset
from flatminima.symmetries import find_symmetries

#: Logged of every network, whatever else is measured: what a correlation may really be about.
COVARIATES = (
    "parameter_norm", "parameter_l1_norm", "spectral_product", "minimum_margin", "margin_quantile", "median_margin",
    "normalised_margin", "live_units", "participation_ratio",
)  # fmt: skip

# Moves that are no reparameterisations: they rewire what nothing reads, and weakness may change under them.
_REWIRING = frozenset({"dead-unit", "duplicate-unit"})
_EXAMPLES = 8  # rows on which symmetries are found and proved
_UNCHANGED = 1e-9  # largest change of an output, relative to the largest
_ERRORS = (ObjectiveError, NotApplicableError, FeatureError, FloatingPointError, ValueError)


class NetworkValues:
    """Values by name, and what is missing with the reason; see :class:`~flatminima.study.run_spec.Record` for the names.

    Args:
        spec: of the network.
        model: trained, in single precision.
        data: of :func:`~flatminima.study.subsets.load_subset`.
        prefix: of every name.
    """

    def __init__(self, spec: RunSpec, model: nn.Module, data: Subset, prefix: str = "") -> None:
        self.values: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        self.predictions: Tensor | None = None
        self._spec, self._data, self._prefix = spec, data, prefix
        self._network = Network(model, copy.deepcopy(model).double(), data)
        self._seed = int(spec.id[:8], 16)

    def accuracies(self) -> None:
        """``test.accuracy`` on all evaluation rows, ``.a`` and ``.b`` on their halves, and ``test.loss``."""
        data = self._data
        with torch.no_grad():
            logits = torch.cat([self._network.model(x) for x in data.test.split(8192)])
        self.predictions = logits.argmax(1)
        right = (self.predictions == data.test_labels).double()
        self._put("test.accuracy", float(right.mean()))
        self._put("test.accuracy.a", float(right[data.half].mean()))
        self._put("test.accuracy.b", float(right[~data.half].mean()))
        self._put("test.loss", float(F.cross_entropy(logits.double(), data.test_labels)))

    def covariates(self) -> None:
        """``covariate.*``: :data:`COVARIATES`, live units of each hidden layer, step size and batch size."""
        bench = self._bench(self._network.precise, MeasureOptions(), None)
        self._measured("covariate", measure(bench.objective, COVARIATES, workbench=bench))
        try:
            for number, layer in enumerate(activation_ranges(bench.objective), start=1):
                self._put(f"covariate.live_units.{number}", float(layer.live))
        except _ERRORS as error:
            self._miss("covariate.live_units.1", str(error))
        self._put("covariate.lr", self._spec.optimiser.lr)
        self._put("covariate.batch_size", float(self._spec.optimiser.batch_size))

    def measures(self) -> None:
        """``measure.<label>`` with ``error.<label>`` where the number has an error that is not rounding, and ``repeat.*``."""
        benches: dict[Any, Workbench] = {}
        for asked in self._spec.measures:
            self._one("measure", asked, self._network, benches, self._seed, errors=True)
            for number in range(1, asked.repeats + (asked.repeats > 1)):
                self._one("repeat", asked, self._network, {}, self._seed + number, suffix=f".{number}")

    def orbit(self) -> None:
        """``orbit.<label>``: the same after a random function-preserving move of this network, its own for every network."""
        asked = [m for m in self._spec.measures if m.orbit]
        if not asked:
            return
        try:
            moved, change = self._moved()
        except _ERRORS as error:
            for m in asked:
                self._miss(f"orbit.{m.label}", str(error))
            return
        self._put("orbit.change", change)
        network = Network(copy.deepcopy(moved).float(), moved, self._data)
        benches: dict[Any, Workbench] = {}
        for m in asked:
            self._one("orbit", m, network, benches, self._seed)

    def _moved(self) -> tuple[nn.Module, float]:
        model, x = self._network.precise, self._data.x.double()
        found = find_symmetries(model, x[:_EXAMPLES]).found
        symmetries = [s for s in found if s.preserves == "outputs" and s.kind not in _REWIRING]
        if not symmetries:
            raise ValueError("no symmetry that keeps the outputs was found")
        generator = torch.Generator().manual_seed(int(self._spec.id[8:16], 16))
        moved = model
        for symmetry in symmetries:
            moved = symmetry.member(generator).apply(moved)
        with torch.no_grad():
            before, after = model(x), moved(x)
        change = float((after - before).abs().max() / before.abs().max())
        if not change <= _UNCHANGED:
            raise ValueError(
                f"the moved network's outputs differ by {change:.1e} of the largest, more than {_UNCHANGED:g}"
            )
        return moved, change

    def _one(
        self,
        group: str,
        asked: MeasureSpec,
        network: Network,
        benches: dict[Any, Workbench],
        seed: int,
        suffix: str = "",
        errors: bool = False,
    ) -> None:
        name = f"{group}.{asked.label}{suffix}"
        try:
            if asked.name in STUDY_MEASURES:
                self._put(name, study_value(network, asked, seed))
                return
            if asked.name == "pair_proxy":
                self._pair_proxy(name, asked.label, network, extras=group == "measure")
                return
            key = asked.options
            if key not in benches:
                given: dict[str, Any] = dict(key)
                benches[key] = self._bench(network.precise, MeasureOptions(**given), seed)
            found = measure(benches[key].objective, [asked.name], workbench=benches[key])[asked.name]
        except _ERRORS as error:
            self._miss(name, str(error))
            return
        self._record(name, found)
        if errors and found.applies and found.error is not None and found.error_kind not in ("exact", "rounding"):
            self._put(f"error.{asked.label}", found.error)

    def _pair_proxy(self, name: str, label: str, network: Network, extras: bool) -> None:
        """The proxy with what it is made of: true and wrong classes, and the undecided pairs, of which there must be none."""
        data = self._data
        layer = last_layer(Objective(network.precise, F.cross_entropy, (data.x.double(), data.y), check=False)).name
        train, probes = (features(network.precise, rows.double(), layer) for rows in (data.x, data.probes))
        found = pair_proxy(train, data.y, probes, classes=data.classes, probe_labels=data.probe_labels)
        self._put(name, float(found.value))
        if extras:
            self._put(f"error.{label}", float(found.upper - found.value))
            self._put("covariate.pair_proxy.true_feasible", float(found.true_feasible or 0))
            self._put("covariate.pair_proxy.wrong_feasible", float(found.wrong_feasible or 0))
            self._put("covariate.training_feasible", float(bool(found.training_feasible)))

    def _bench(self, model: nn.Module, options: MeasureOptions, seed: int | None) -> Workbench:
        data = self._data
        rows = slice(self._spec.data.measure_rows)
        # A moved network is the same function, in scales at which a difference of gradients would cross kinks.
        check = model is self._network.precise
        objective = Objective(model, F.cross_entropy, (data.x[rows].double(), data.y[rows]), check=check)
        return Workbench(objective, options, self._seed if seed is None else seed, data.probes.double())

    def _measured(self, group: str, found: Mapping[str, Measurement]) -> None:
        for name, one in found.items():
            self._record(f"{group}.{name}", one)

    def _record(self, name: str, found: Measurement) -> None:
        if found.applies:
            self._put(name, found.value)
        else:
            self._miss(name, found.note)

    def _put(self, name: str, value: float) -> None:
        if math.isfinite(value):
            self.values[self._prefix + name] = value
        else:
            self._miss(name, f"the number is {value}")

    def _miss(self, name: str, reason: str) -> None:
        self.missing[self._prefix + name] = reason or "no reason is known"
