"""The numbers of the protocol from the records of its streams: sessions, summaries, paired differences, flatness."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatminima.protocols.fewshot_methods import BASES, METHODS, Method, memory
from flatminima.protocols.fewshot_prototypes import session_numbers
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.study.resampling import nested_interval, sign_flip
from flatminima.study.statistics import holm

Record = Mapping[str, Any]

#: What a stream of sessions is summed up in: name -> (label, whether more is better). In percent or points.
QUANTITIES: Mapping[str, tuple[str, bool]] = {
    "average": ("mean over sessions", True),
    "last": ("last session", True),
    "harmonic": ("harmonic mean of base and novel, last session", True),
    "base": ("base classes, last session", True),
    "novel": ("novel classes, last session", True),
    "drop": ("PD: first minus last session", False),
    "relative_drop": ("PD over the first session", False),
    "forgetting": ("base classes, first minus last session", False),
    "first": ("first session", True),
}

#: Which method is compared with which, decided before any run; the first two are the headline and the mechanism.
COMPARISONS: Sequence[tuple[str, str]] = (
    ("f2m", "baseline"),
    ("f2m", "f2m-no-noise"),
    ("f2m", "f2m-no-clamp"),
    ("f2m-wide", "f2m-no-noise"),
    ("f2m-wide", "baseline"),
    ("f2m-no-noise", "plain-no-clamp"),
    ("f2m-frozen", "baseline"),
    ("f2m-no-noise", "baseline"),
    ("f2m", "f2m-no-pf"),
    ("f2m", "f2m-no-pn"),
    ("f2m", "f2m-no-replay"),
    ("f2m", "f2m-one-draw"),
    ("f2m-relative", "f2m"),
    ("f2m-released", "f2m"),
    ("f2m-swad", "f2m"),
    ("sam", "baseline"),
    ("sam-clamp", "f2m"),
    ("sam-clamp", "f2m-no-noise"),
    ("swa", "baseline"),
    ("swa-clamp", "f2m"),
    ("baseline", "baseline-raw"),
    ("baseline-long", "baseline"),
    ("f2m", "crt"),
    ("baseline", "ft"),
    ("baseline", "joint"),
    ("baseline", "fsll"),
    ("baseline", "icarl"),
    ("baseline", "rebalance"),
)
#: What every method is compared with in the ablation table.
ABLATIONS = (
    "f2m", "f2m-no-noise", "f2m-no-clamp", "plain-no-clamp", "f2m-frozen", "f2m-no-pf", "f2m-no-pn", "f2m-no-replay",
    "f2m-one-draw", "f2m-wide", "f2m-relative", "f2m-released", "f2m-swad",
)  # fmt: skip


def numbers_of(record: Record, classifier: str) -> dict[str, Any]:
    """Session curves and summaries of one stream, read with a classifier; percent."""
    curves = session_numbers(record["correct"][classifier], record["counts"])
    accuracy, base = curves["accuracy"], curves["base"]
    return {
        **{f"{name}_curve": values for name, values in curves.items()},
        "first": accuracy[0], "last": accuracy[-1], "average": math.fsum(accuracy) / len(accuracy),
        "drop": accuracy[0] - accuracy[-1], "relative_drop": 100 * (accuracy[0] - accuracy[-1]) / max(accuracy[0], 1e-9),
        "base": base[-1], "novel": curves["novel"][-1], "harmonic": curves["harmonic"][-1], "forgetting": base[0] - base[-1],
        "floor": 100 * record["correct"][classifier][0][0] / sum(record["counts"]),
    }  # fmt: skip


class Results:
    """The finished streams, by method, seed and draw.

    Args:
        records: of the tasks that are done.
        methods, seeds, draws: of the plan.
    """

    def __init__(self, records: Iterable[Record], methods: Sequence[str], seeds: int, draws: int) -> None:
        self.seeds, self.draws, self.wanted = seeds, draws, list(methods)
        self.bases = [r for r in records if r["cell"] == "base"]
        probes = [r for r in records if r["cell"] == "flatness"]
        self.probes = [r for r in probes if r["failure"] is None]
        self.unmeasured = [r for r in probes if r["failure"] is not None]
        self.streams = [r for r in records if r["cell"] == "sessions"]
        self._found = {
            (r["base"], r["arm"], r["seed"], r["draw"]): r for r in self.streams if r["failure"] is None
        }  # fmt: skip
        self._numbers: dict[tuple[str, int, int], dict[str, Any]] = {}
        for name in self.wanted:
            method = METHODS[name]
            for seed in range(seeds):
                for draw in range(draws):
                    record = self._found.get((method.base, method.arm, seed, draw))
                    if record is not None and method.classifier in record["correct"]:
                        self._numbers[name, seed, draw] = numbers_of(record, method.classifier)

    def failed(self) -> list[Record]:
        """Tasks that diverged, or found nothing to measure."""
        return [r for r in (*self.bases, *self.streams, *self.unmeasured) if r["failure"] is not None]

    def methods(self) -> list[str]:
        """Those with at least one finished stream."""
        return [name for name in self.wanted if any(key[0] == name for key in self._numbers)]

    def records(self, method: str) -> list[Record]:
        """The streams of a method."""
        known = METHODS[method]
        return [r for (base, arm, _, _), r in self._found.items() if (base, arm) == (known.base, known.arm)]

    def cells(self, method: str, quantity: str, session: int | None = None) -> NDArray[np.float64]:
        """``(seeds, draws)``; NaN where there is no stream. ``session``: an entry of a curve."""
        table = np.full((self.seeds, self.draws), math.nan)
        for seed in range(self.seeds):
            for draw in range(self.draws):
                found = self._numbers.get((method, seed, draw))
                if found is not None:
                    table[seed, draw] = found[quantity] if session is None else found[quantity][session]
        return table

    def sessions(self) -> int:
        """How many sessions there are, the base session included."""
        return max((len(r["counts"]) for r in self.streams), default=0)


def method_row(results: Results, name: str, settings: FewShotSettings) -> dict[str, Any]:
    """One method: every session and every summary, each a mean with its nested interval."""
    method, count = METHODS[name], results.sessions()

    def curve(quantity: str, first: int) -> list[dict[str, Any]]:
        return [nested_interval(results.cells(name, f"{quantity}_curve", t)) for t in range(count - first)]

    return {
        "name": name, "label": method.label, "base": method.base, "arm": method.arm, "classifier": method.classifier,
        "memory": memory(method, settings), "parts": parts(method),
        "sessions": {"accuracy": curve("accuracy", 0), "base": curve("base", 0), "novel": curve("novel", 1),
                     "harmonic": curve("harmonic", 1)},
        "numbers": {q: nested_interval(results.cells(name, q)) for q in (*QUANTITIES, "floor")},
    }  # fmt: skip


def parts(method: Method) -> str:
    """What a method is made of, in words."""
    base = BASES[method.base]
    changes = [f"{key.replace('_', ' ')} {value}" for key, value in base.changes.items() if value is not None]
    notes = [base.note] if base.note else []
    return ", ".join([f"base: {base.kind}", f"sessions: {method.arm.replace('-', ' ')}", *changes, *notes])


def compare(results: Results, method: str, reference: str) -> dict[str, Any] | None:
    """Paired differences of every quantity, with nested intervals and the exact sign-flip test over seeds."""
    rows: dict[str, Any] = {}
    for quantity in QUANTITIES:
        cells = results.cells(method, quantity) - results.cells(reference, quantity)
        means = [float(np.nanmean(row)) for row in cells if np.isfinite(row).any()]
        if not means:
            return None
        test = sign_flip(means)
        rows[quantity] = {
            **nested_interval(cells), "wins": sum(m > 0 for m in means), "p": test.p, "smallest_p": test.smallest,
        }  # fmt: skip
    return {"method": method, "baseline": reference, "quantities": rows}


def comparisons(results: Results) -> list[dict[str, Any]]:
    """All of :data:`COMPARISONS` that can be made, with Holm's correction of the test on the mean accuracy."""
    present = set(results.methods())
    found = [
        row
        for method, reference in COMPARISONS
        if {method, reference} <= present and (row := compare(results, method, reference)) is not None
    ]
    for row, corrected in zip(found, holm([r["quantities"]["average"]["p"] for r in found]), strict=True):
        row["p_holm"] = corrected
    return found


_FLATNESS = ("loss", "indicator", "mean_rise", "variance", "largest", "worst", "drift", "worst_drift")


def flatness(results: Results) -> dict[str, Any]:
    """Per base and part: means over seeds; and differences of every base to the plain one, paired by seed."""
    bases = list(dict.fromkeys(r["base"] for r in results.probes))
    rows, order = [], []
    by_key = {(r["base"], r["seed"]): r for r in results.probes}

    def cells(base: str, read: Any) -> NDArray[np.float64]:
        values = [read(by_key[base, seed]) if (base, seed) in by_key else None for seed in range(results.seeds)]
        return np.array([[math.nan if v is None else v] for v in values], dtype=np.float64)

    for base in bases:
        for part in ("train", "test"):
            row: dict[str, Any] = {"base": base, "part": part}
            for name in _FLATNESS:
                row[name] = nested_interval(cells(base, lambda r, n=name, p=part: r["parts"][p][n]))
            rows.append(row)
            if base != "plain" and "plain" in bases:
                for name in _FLATNESS:

                    def read(record: Record, n: str = name, p: str = part) -> float | None:
                        value: float | None = record["parts"][p][n]
                        return value

                    difference = cells(base, read) - cells("plain", read)
                    order.append({"base": base, "part": part, "quantity": name, **nested_interval(difference)})
    traces = [
        {
            "base": base, "trace": nested_interval(cells(base, lambda r: r["trace"]["value"])),
            "methods": sorted({r["trace"]["method"] for r in results.probes if r["base"] == base}),
            "half_over_rms": np.mean([r["half_over_rms"] for r in results.probes if r["base"] == base], axis=0).tolist(),
            "region": next(r["region"] for r in results.probes if r["base"] == base),
        }
        for base in bases
    ]  # fmt: skip
    return {"rows": rows, "differences": order, "traces": traces}


def movement(results: Results) -> list[dict[str, Any]]:
    """What the sessions did to the weights: clamp hits, share of coordinates at the bound, drift of base prototypes."""
    found = []
    for name in results.methods():
        records = [r for r in results.records(name) if r.get("drift") is not None]
        if records and METHODS[name].classifier != "euclidean":
            row: dict[str, Any] = {"name": name}
            for quantity in ("drift", "clamp_hits", "at_bound", "largest_move"):
                table = np.full((results.seeds, results.draws), math.nan)
                for record in records:
                    table[record["seed"], record["draw"]] = _moved(record, quantity)
                row[quantity] = nested_interval(table)
            found.append(row)
    return found


def _moved(record: Record, quantity: str) -> float:
    """NaN where the method has no such thing; of the parameters, the mean share and the largest move."""
    if quantity == "drift":
        return float(record["drift"])
    value = record["sessions"][-1].get(quantity)
    if value is None:
        return math.nan
    return float(np.max(value) if quantity == "largest_move" else np.mean(value))


def published(data: str) -> dict[str, Any]:
    """What was published for a data set, source -> method -> row; empty for the others."""
    text = resources.files("flatminima.protocols").joinpath("fewshot_published.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text).get(data, {})
    return found
