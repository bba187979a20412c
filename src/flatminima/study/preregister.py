"""Decision rules written down, with a hash, before anything is trained; verdicts are then computed and not written."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from flatminima.names import unknown
from flatminima.study.value_names import word

SCHEMA = 1
OUTCOMES = ("supported", "refuted", "undecided")

#: Kind of rule -> what it is given beside name and statement, and in words what supports and what refutes it.
KINDS: Mapping[str, tuple[frozenset[str], str]] = {
    "predicts": (
        frozenset({"measure", "given", "margin", "data_sets"}),
        "Supported if the {level:.0%} interval of the partial rank correlation of {measure} with {outcome} given {given}, "
        "within cells, lies above 0 on at least {data_sets} data sets and all there are. Refuted if on one of them the "
        "interval lies below 0, or the {inner:.0%} interval lies within ±{margin:g}.",
    ),
    "beats": (
        frozenset({"measure", "rivals", "margin", "data_sets"}),
        "Supported if the {level:.0%} interval of the difference in size between the rank correlations of {measure} and of a "
        "rival with {outcome} lies above 0 against every rival ({rivals}) on at least {data_sets} data sets and all there "
        "are. Refuted if against one of them it lies below 0, or its {inner:.0%} interval lies within ±{margin:g}.",
    ),
    "indifferent": (
        frozenset({"measure", "rivals", "margin", "data_sets"}),
        "{measure} against the one of its rivals ({rivals}) whose rank correlation with one half of the test set is largest "
        "in size, both measured on the other half: supported if the {inner:.0%} interval of the difference in size lies "
        "within ±{margin:g} on at least {data_sets} data sets and all there are. Refuted if on one of them the {level:.0%} "
        "interval lies outside.",
    ),
    "batch": (
        frozenset({"margins"}),
        "Large minus small batch at the same learning rate and number of rows, paired by seed and averaged over learning "
        "rates. Supported if for every number of rows two one-sided tests show that it is smaller than the margin "
        "({margins}). Refuted if for one of them the {level:.0%} interval, widened for their number, lies outside the margin.",
    ),
    "coordinates": (
        frozenset({"measure", "invariant", "margin", "keeps", "data_sets"}),
        "Supported if after random function-preserving moves the {inner:.0%} interval of the rank correlation of {measure} "
        "with {outcome} lies within ±{margin:g}, while that of {invariant} is larger in size than {keeps:.0%} of the "
        "original's, both on at least {data_sets} data sets and all there are. Refuted if on one of them either is shown to "
        "be otherwise, undecided if the original shows no correlation.",
    ),
}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _steps(value: Any) -> bool:
    """From 0 rows on, ascending: otherwise a number of rows has no margin, or the wrong one."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if not all(isinstance(s, (list, tuple)) and len(s) == 2 and all(map(_number, s)) and s[1] > 0 for s in value):
        return False
    starts = [start for start, _ in value]
    return bool(starts[0] == 0 and all(a < b for a, b in itertools.pairwise(starts)))


#: Setting of a rule -> whether a value is one, and in words what is. A rule that cannot be applied would be noticed only
#: once everything is trained.
_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "measure": (lambda value: isinstance(value, str), "the name of a measure"),
    "invariant": (lambda value: isinstance(value, str), "the name of a measure"),
    "given": (_names, "a list of names"),
    "rivals": (lambda value: _names(value) and len(value) > 0, "a list of at least one measure"),
    "margin": (lambda value: _number(value) and 0 < value < 1, "a number between 0 and 1"),
    "keeps": (lambda value: _number(value) and 0 < value <= 1, "a share, more than 0 and at most 1"),
    "data_sets": (lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0, "1 or more"),
    "margins": (_steps, "pairs of a number of rows and a margin above 0, ascending, the first from 0 rows on"),
}


class PreregistrationError(ValueError):
    """Rules that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Hypothesis:
    """One statement and the rule that decides it.

    Attributes:
        name: such as ``H1``.
        kind: of rule, one of ``KINDS``.
        statement: in words.
        settings: of the rule.
    """

    name: str
    kind: str
    statement: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PreregistrationError(unknown("kind of rule", self.kind, KINDS))
        expected = KINDS[self.kind][0]
        if not isinstance(self.settings, Mapping) or set(self.settings) != expected:
            raise PreregistrationError(
                f"rule {self.name} of kind {self.kind} is given {', '.join(sorted(self.settings)) or 'nothing'}: "
                f"expected {', '.join(sorted(expected))}"
            )
        for name, value in self.settings.items():
            sound, words = _SETTINGS[name]
            if not sound(value):
                raise PreregistrationError(f"rule {self.name}: {name} is {value!r}: expected {words}")


@dataclass(frozen=True)
class Preregistration:
    """The primary family of a study.

    Attributes:
        study: its name.
        hypotheses: decided, with Holm's correction over them.
        outcome: the value that is predicted.
        level: of the intervals; ``1 - level`` is that of every test.
        draws: of every bootstrap.
        seed: of these.
        written: when, in UTC; not part of the hash.

    Example:
        >>> rules = weakness_rules("seeds")
        >>> Preregistration.from_json(rules.to_json()) == rules
        True
        >>> Preregistration.from_json(rules.to_json().replace('"margin": 0.1', '"margin": 0.2'))
        Traceback (most recent call last):
        flatminima.study.preregister.PreregistrationError: the rules of study 'seeds' were changed after they were written: ...
    """

    study: str
    hypotheses: tuple[Hypothesis, ...]
    outcome: str = "test.accuracy"
    level: float = 0.95
    draws: int = 10_000
    seed: int = 0
    written: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.hypotheses:
            raise PreregistrationError("there is no rule: expected at least one hypothesis")
        names = [hypothesis.name for hypothesis in self.hypotheses]
        if len(set(names)) < len(names):
            raise PreregistrationError(f"two rules have one name: {', '.join(names)}")
        if not 0.5 < self.level < 1:
            raise PreregistrationError(f"level is {self.level}: expected more than 0.5 and less than 1")
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 100:
            raise PreregistrationError(f"draws is {self.draws!r}: expected a whole number of at least 100")

    @property
    def inner(self) -> float:
        """Level of the interval whose being inside a margin is two one-sided tests at ``1 - level``."""
        return 1 - 2 * (1 - self.level)

    def rule(self, hypothesis: Hypothesis) -> str:
        """What decides a hypothesis, in words."""
        words: dict[str, Any] = {"level": self.level, "inner": self.inner, "outcome": word(self.outcome)}
        for name, value in hypothesis.settings.items():
            if name == "margins":
                words[name] = "; ".join(f"{100 * margin:g} points from {start:,} rows on" for start, margin in value)
            elif isinstance(value, (list, tuple)):
                words[name] = ", ".join(map(word, value)) or "nothing"
            else:
                words[name] = word(value) if isinstance(value, str) else value
        said = KINDS[hypothesis.kind][1].format(**words)
        return said[0].upper() + said[1:]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of everything but ``written``."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("written", "hypotheses")}
        listed = [
            {"name": h.name, "kind": h.kind, "statement": h.statement, "settings": dict(h.settings)}
            for h in self.hypotheses
        ]
        content: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA} | plain | {"hypotheses": listed}))
        return content

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with ``digest`` and ``written``."""
        return self._content() | {"written": self.written, "digest": self.digest}

    def to_json(self) -> str:
        """To be kept with the study."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Preregistration:
        """The rules of a text, checked against the hash in it.

        Raises:
            PreregistrationError: not such a text, of another schema, or changed after it was written.
        """
        try:
            content = json.loads(text)
            made = cls(
                content["study"],
                tuple(Hypothesis(h["name"], h["kind"], h["statement"], h["settings"]) for h in content["hypotheses"]),
                content["outcome"], content["level"], content["draws"], content["seed"], content.get("written", ""),
            )  # fmt: skip
            schema, digest = content["schema"], content["digest"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PreregistrationError(f"not the rules of a study: {type(error).__name__}: {error}") from error
        if schema != SCHEMA:
            raise PreregistrationError(f"the rules have schema {schema!r}, but this version reads schema {SCHEMA}")
        if digest != made.digest:
            raise PreregistrationError(
                f"the rules of study {made.study!r} were changed after they were written: their hash is {made.digest[:12]}, "
                f"the one recorded {str(digest)[:12]}. Restore them, or begin a new study"
            )
        return made


INVARIANT_SHARPNESS = ("adaptive_sharpness", "w_hessian_w", "orbit_minimal_trace", "relative_flatness")
CLASSICAL_RIVALS = ("normalised_margin", "spectral_product", "participation_ratio")


def weakness_rules(study: str, *, data_sets: int = 2, batch: bool = False, written: str = "") -> Preregistration:
    """The rules H1 to H5 on weakness, sharpness and batch size.

    Args:
        study: name.
        data_sets: on how many at least H1 to H3 and H5 have to hold.
        batch: with H4, for a study that crosses batch size and learning rate; H4 alone is then asked.
        written: when, in UTC.

    Source: weakness specification, section 5.3. Two things it leaves open are fixed here: a measure beats sharpness if it
    beats every rival (choosing the best one on the same networks would have to be paid for), and it is indifferent if it is
    equivalent to the best one, chosen on the other half of the test set.

    Example:
        >>> [rule.name for rule in weakness_rules("seeds").hypotheses]
        ['H1', 'H2', 'H3', 'H5']
        >>> [rule.name for rule in weakness_rules("grid", batch=True).hypotheses]
        ['H4']
    """
    if batch:
        statement = "At a matched learning rate large batches are neither better nor worse."
        margins = {"margins": [[0, 0.003], [6000, 0.001]]}
        return Preregistration(study, (Hypothesis("H4", "batch", statement, margins),), written=written)
    shared = {"margin": 0.1, "data_sets": data_sets}
    given = ["train.loss", "parameter_norm", "live_units", "participation_ratio"]
    rules = (
        Hypothesis(
            "H1", "predicts", "Weakness predicts accuracy beyond its confounders.",
            {"measure": "pair_proxy", "given": given} | shared,
        ),
        Hypothesis(
            "H2", "beats", "Weakness predicts accuracy better than invariant sharpness and classical measures.",
            {"measure": "pair_proxy", "rivals": [*INVARIANT_SHARPNESS, *CLASSICAL_RIVALS]} | shared,
        ),
        Hypothesis(
            "H3", "indifferent", "Weakness and the best invariant sharpness predict accuracy equally well.",
            {"measure": "pair_proxy", "rivals": list(INVARIANT_SHARPNESS)} | shared,
        ),
        Hypothesis(
            "H5", "coordinates", "What the Hessian trace says about accuracy is its coordinates only.",
            {"measure": "trace", "invariant": "orbit_minimal_trace", "keeps": 0.7} | shared,
        ),
    )  # fmt: skip
    return Preregistration(study, rules, written=written)


def differs(found: Preregistration, expected: Preregistration) -> list[str]:
    """A caution where the rules of a database are not those that this version writes.

    The hash inside a file shows a change made by hand, but whoever can write the file can write its hash anew. The rules of a
    shipped study are known elsewhere too: here.

    Example:
        >>> differs(weakness_rules("s"), weakness_rules("s", data_sets=1))[0][:45]
        'The rules of decision in the databases (hash '
    """
    if found == expected:
        return []
    return [
        f"The rules of decision in the databases (hash {found.digest[:12]}) are not those of this version "
        f"({expected.digest[:12]}): another version wrote them, or they were changed and their hash with them."
    ]
