"""Decision rules written down, with a hash, before anything is trained; verdicts are then computed and not written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from flatminima.names import unknown

SCHEMA = 1
OUTCOMES = ("supported", "refuted", "undecided")

#: Kind of rule -> what it is given beside name and statement, and in words what supports and what refutes it.
KINDS: Mapping[str, tuple[frozenset[str], str]] = {
    "predicts": (
        frozenset({"measure", "given", "margin", "data_sets"}),
        "Supported if the {level:.0%} interval of the partial rank correlation with {outcome}, within cells, lies above 0 on "
        "at least {data_sets} data sets and all there are. Refuted if on one of them the interval lies below 0, or the "
        "{inner:.0%} interval lies within ±{margin:g}.",
    ),
    "beats": (
        frozenset({"measure", "rivals", "margin", "data_sets"}),
        "Supported if the {level:.0%} interval of the difference in size of the rank correlations lies above 0 against every "
        "rival on at least {data_sets} data sets and all there are. Refuted if against one of them it lies below 0, or its "
        "{inner:.0%} interval lies within ±{margin:g}.",
    ),
    "indifferent": (
        frozenset({"measure", "rivals", "margin", "data_sets"}),
        "Against the rival whose rank correlation with one half of the test set is largest in size, measured on the other "
        "half: supported if the {inner:.0%} interval of the difference in size lies within ±{margin:g} on at least {data_sets} "
        "data sets and all there are. Refuted if on one of them the {level:.0%} interval lies outside.",
    ),
    "batch": (
        frozenset({"margins"}),
        "Large minus small batch at the same learning rate and number of rows, paired by seed and averaged over learning "
        "rates. Supported if for every number of rows two one-sided tests show that it is smaller than the margin. Refuted if "
        "for one of them the {level:.0%} interval, widened for their number, lies outside the margin.",
    ),
    "coordinates": (
        frozenset({"measure", "invariant", "margin", "keeps", "data_sets"}),
        "Supported if after random function-preserving moves the {inner:.0%} interval of the rank correlation lies within "
        "±{margin:g}, while that of the invariant version is larger in size than {keeps:.0%} of the original's, both on at "
        "least {data_sets} data sets and all there are. Refuted if on one of them either is shown to be otherwise, undecided "
        "if the original shows no correlation.",
    ),
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
        if set(self.settings) != expected:
            raise PreregistrationError(
                f"rule {self.name} of kind {self.kind} is given {', '.join(sorted(self.settings)) or 'nothing'}: "
                f"expected {', '.join(sorted(expected))}"
            )


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
        names = [hypothesis.name for hypothesis in self.hypotheses]
        if len(set(names)) < len(names):
            raise PreregistrationError(f"two rules have one name: {', '.join(names)}")
        if not 0.5 < self.level < 1:
            raise PreregistrationError(f"level is {self.level}: expected more than 0.5 and less than 1")

    @property
    def inner(self) -> float:
        """Level of the interval whose being inside a margin is two one-sided tests at ``1 - level``."""
        return 1 - 2 * (1 - self.level)

    def rule(self, hypothesis: Hypothesis) -> str:
        """What decides a hypothesis, in words."""
        words = {"level": self.level, "inner": self.inner, "outcome": self.outcome} | dict(hypothesis.settings)
        return KINDS[hypothesis.kind][1].format(**words)

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
