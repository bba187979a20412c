"""Reparameterisation, reproduced: what happens to sharpness and to weakness while no prediction changes.

After M. T. Bennett, "Are Flat Minima an Illusion?" (arXiv:2605.05209): a hidden layer of a ReLU network is multiplied by
beta (or gamma) and what reads it is divided by it. The source re-estimates the Hessian trace with random probes; here every
trace is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flatminima
from flatminima.data import DataError
from flatminima.measures import MEASURES
from flatminima.measures.weakness import exact_extension, pair_proxy
from flatminima.names import unknown
from flatminima.protocols.claims import DERIVED, PAPER, Claim, finite
from flatminima.protocols.rescaled_networks import (
    BETAS,
    GAMMAS,
    HIDDEN,
    LAYER_RESCALING,
    MEASURED,
    NARROW,
    REGIMES,
    narrow,
    rescaled,
)
from flatminima.protocols.small_data import SmallData, small_data

Progress = Callable[[str, float], None]

DATA = ("auto", "mnist", "digits")
ROWS, NARROW_ROWS, PROBES = 500, 250, 100

_GROUPS = {
    "function": "The function stays",
    "trace": "The trace follows a law",
    "invariant": "What stays with the function",
    "limits": "What weakness is not",
}
_ROUNDING = 1e-9


def reproduce_reparameterization(data: str = "auto", progress: Progress | None = None) -> dict[str, Any]:
    """Rescale trained networks without changing a prediction, and measure what changes.

    Args:
        data: ``mnist``, ``digits`` (embedded), or ``auto``: MNIST where its files are, digits otherwise.
        progress: called with what is being done and the fraction of everything that is finished.

    Returns:
        The JSON-ready results (documented in ``docs/reproductions/reparameterization.md``), the same every time on one
        machine with one setting of threads.

    Raises:
        ValueError: an unknown data set; :class:`flatminima.data.DataError` where it is not there.

    Some minutes on two cores.
    """
    if data not in DATA:
        raise ValueError(unknown("data set", data, DATA))
    name, wide, small = _load(data)

    def part(title: str, low: float, high: float) -> Callable[[float], None]:
        return lambda done: progress(title, low + done * (high - low)) if progress is not None else None

    step = 0.9 / len(REGIMES)
    records = [
        rescaled(regime, wide, PROBES, part(regime.name, i * step, (i + 1) * step)) for i, regime in enumerate(REGIMES)
    ]
    narrows = [
        narrow(seed, small, part(f"pair proxy, seed {seed}", 0.9 + 0.05 * seed, 0.95 + 0.05 * seed)) for seed in (0, 1)
    ]
    rewired = _rewired()
    claims = {
        "function": [_function_claim(record, len(wide.probes)) for record in records],
        "trace": [claim for record in records for claim in _trace_claims(record)],
        "invariant": [*_measure_claims(records), *_count_claims(records, narrows)],
        "limits": [_limit_claim(rewired)],
    }
    results = {
        "schema": 1,
        "flatminima": flatminima.__version__,
        "command": f"flatminima reproduce reparameterization --data {name}",
        "settings": {
            "data": name, "rows": ROWS, "unseen": len(wide.probes), "hidden": list(HIDDEN), "betas": list(BETAS),
            "gammas": list(GAMMAS), "narrow": list(NARROW), "narrow_rows": NARROW_ROWS, "probes": PROBES,
        },
        "groups": [
            {"name": key, "title": title, "claims": [claim.to_dict() for claim in claims[key]]}
            for key, title in _GROUPS.items()
        ],
        "measures": {
            name: {"label": MEASURES[name].label, "unchanged": LAYER_RESCALING in MEASURES[name].invariant_under}
            for name in ("trace", *MEASURED) if name in MEASURES
        },
        "networks": records,
        "narrow": narrows,
        "rewired": rewired,
    }  # fmt: skip
    results |= _summary([claim for group in claims.values() for claim in group], records, narrows)
    plain: dict[str, Any] = finite(results)
    return plain


def _load(data: str) -> tuple[str, SmallData, SmallData]:
    name = "mnist" if data == "auto" else data
    try:
        return name, small_data(name, ROWS, _unseen(name)), small_data(name, NARROW_ROWS, PROBES)
    except DataError:
        if data != "auto":
            raise
    return "digits", small_data("digits", ROWS, _unseen("digits")), small_data("digits", NARROW_ROWS, PROBES)


def _unseen(name: str) -> int:
    return 10_000 if name == "mnist" else 1_000


def _function_claim(record: dict[str, Any], unseen: int) -> Claim:
    claim = Claim(
        f"no prediction changes ({record['name']})", {"copies": len(record["copies"]), "unseen rows": unseen}, PAPER
    )
    copies = record["copies"]
    claim.same("predictions changed", 0, sum(copy["predictions_changed"] for copy in copies))
    claim.at_most("largest change of an output, relative", _ROUNDING, max(copy["largest_change"] for copy in copies))
    return claim


def _trace_claims(record: dict[str, Any]) -> list[Claim]:
    name, copies = record["name"], record["copies"]
    law = Claim(f"the trace is a/β² + b β² + c, and alike in γ ({name})", {"copies": len(copies)}, DERIVED)
    for copy in copies:
        label = f"trace at β = {copy['beta']:g}, γ = {copy['gamma']:g}"
        law.close(label, copy["predicted"], copy["measures"]["trace"]["value"], rtol=_ROUNDING)
    least = Claim(
        f"the smallest trace over β is c + 2√(ab) ({name})", {"β": round(record["least"]["beta"], 4)}, DERIVED
    )
    least.close("trace there", record["least"]["predicted"], record["least"]["trace"], rtol=_ROUNDING)
    least.at_most("against the trace of the network", record["trace"] * (1 + _ROUNDING), record["least"]["trace"])
    headline = Claim(f"rescaling inflates the trace about a hundredfold ({name})", {"β": BETAS[-1], "γ": 1.0}, PAPER)
    factor = inflation(record, BETAS[-1], 1.0)
    headline.at_least("inflation", 10**1.5, factor)
    headline.at_most("inflation, from above", 10**2.5, factor)
    return [law, least, headline]


def inflation(record: dict[str, Any], beta: float, gamma: float) -> float:
    """Trace of one copy over that of the network itself."""
    copy = next(c for c in record["copies"] if (c["beta"], c["gamma"]) == (beta, gamma))
    return float(copy["measures"]["trace"]["value"] / record["trace"])


def _measure_claims(records: Sequence[dict[str, Any]]) -> list[Claim]:
    claims = []
    for name in (name for name in MEASURED if name in MEASURES):
        entry = MEASURES[name]
        stays = LAYER_RESCALING in entry.invariant_under
        verb = "does not change" if stays else "changes"
        claim = Claim(f"{entry.label} {verb}", {"copies": len(records[0]["copies"]) - 1}, DERIVED)
        for record in records:
            worst = largest_ratio(record, name)
            label = f"largest ratio to the network ({record['name']})"
            if stays:
                claim.close(label, 1.0, worst, rtol=1e-6)
            else:
                claim.at_least(label, 1.5, worst)
        claims.append(claim)
    return claims


def largest_ratio(record: dict[str, Any], measure: str) -> float:
    """How far a measure moves over the copies: the largest ratio, or its inverse, to the first copy."""
    values = [copy["measures"][measure]["value"] for copy in record["copies"]]
    ratios = [value / values[0] for value in values]
    return float(max(max(r, 1.0 / r) if r > 0 else math.inf for r in ratios))


def _count_claims(records: Sequence[dict[str, Any]], narrows: Sequence[dict[str, Any]]) -> list[Claim]:
    regions = Claim("the numbers of activation patterns do not change", {"layers": len(HIDDEN)}, PAPER)
    for record in records:
        first = record["copies"][0]["patterns"]
        regions.same(f"patterns ({record['name']})", [first], _distinct([c["patterns"] for c in record["copies"]]))
    wide = Claim("the pair proxy does not change (128 features, saturated)", {"probes": PROBES}, PAPER)
    for record in records:
        pairs = [copy["pairs"] for copy in record["copies"] if copy["pairs"] is not None]
        wide.same(f"decisions that differ ({record['name']})", 0, sum(p["changed"] + p["undecided"] for p in pairs))
    eight = Claim(
        "the pair proxy does not change: layers, single units, permutations (8 features)", {"probes": PROBES}, PAPER
    )
    for record in narrows:
        eight.same(
            f"pair proxies (seed {record['seed']})",
            [record["value"]],
            _distinct([c["pair_proxy"] for c in record["copies"]]),
        )
        eight.same(
            f"decisions that differ (seed {record['seed']})",
            0,
            sum(c["changed"] + c["undecided"] for c in record["copies"]),
        )
    return [regions, wide, eight]


def _distinct(values: Sequence[Any]) -> list[Any]:
    seen: list[Any] = []
    for value in values:
        if value not in seen:
            seen.append(value)
    return seen


def _rewired() -> list[dict[str, Any]]:
    """One hidden unit that nobody reads, with three different incoming biases: the same function, other features."""
    train, probes = (-1.0, 1.0), (-0.5, 0.0, 2.0)
    rows = []
    for bias in (-10.0, -1.5, 0.25):
        phi = [[[max(x + 3.0, 0.0), max(x + bias, 0.0)] for x in points] for points in (train, probes)]
        proxy = pair_proxy(phi[0], [0, 1], phi[1])
        rows.append(
            {"bias": bias, "pair_proxy": proxy.value, "extension": exact_extension(phi[0], [0, 1], phi[1]).size}
        )
    return rows


def _limit_claim(rewired: Sequence[dict[str, Any]]) -> Claim:
    claim = Claim(
        "networks that agree on every input can differ in weakness",
        {"bias of an unread unit": [-10.0, -1.5, 0.25]},
        DERIVED,
    )
    claim.same("pair proxy", [5, 6, 6], [row["pair_proxy"] for row in rewired])
    claim.same("exact extension", [16, 24, 22], [row["extension"] for row in rewired])
    return claim


def _summary(
    claims: Sequence[Claim], records: Sequence[dict[str, Any]], narrows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    failed = [claim for claim in claims if claim.failures]
    whole = f"All {len(claims)} statements were reproduced"
    part = f"{len(claims) - len(failed)} of {len(claims)} statements were reproduced"
    at_20 = [inflation(record, BETAS[-1], 1.0) for record in records]
    shares = [record["blocks"][list(record["blocks"])[2]] / record["trace"] for record in records]
    off = max(
        abs(copy["measures"]["trace"]["value"] / copy["predicted"] - 1.0)
        for record in records
        for copy in record["copies"]
    )
    both = [inflation(record, beta, gamma) for record in records for beta in BETAS for gamma in GAMMAS]
    steady = [MEASURES[n].label for n in MEASURED if n in MEASURES and LAYER_RESCALING in MEASURES[n].invariant_under]
    worst = max(
        largest_ratio(record, name) - 1.0
        for record in records
        for name in MEASURED
        if name in MEASURES and LAYER_RESCALING in MEASURES[name].invariant_under
    )
    proxies = " and ".join(str(record["value"]) for record in narrows)
    details = [
        f"At β = {BETAS[-1]:g} the exact Hessian trace grows by a factor of {min(at_20):.0f} to {max(at_20):.0f}, over the "
        f"grid of β and γ by {min(both):.2f} to {max(both):.0f}, and follows a/β² + b β² + c to {off:.0e}. Not one "
        "prediction changes.",
        "The factor is arithmetic: β² times the share of the second layer's weights in the trace, here "
        f"{min(shares):.2f} to {max(shares):.2f}. A report of it must name both.",
        f"Unchanged over the same grid, to {worst:.0e}: {', '.join(steady)}; the numbers of activation patterns; and the pair "
        f"proxy ({proxies} of {PROBES * 10} on eight features, every decision with a proof).",
    ]
    cautions = [
        "That a sharpness changes under rescaling does not show that sharpness says nothing: training does not pick a random "
        "copy, and sharpness measures that do not change exist (above).",
        "The source's own check of the pair proxy rescales layers that leave the features as they are, which tests nothing "
        "about it. Here the feature layer itself is rescaled, whole and unit by unit.",
        f"With {HIDDEN[-1]} features and {ROWS} rows nearly every pair is feasible: there the pair proxy is saturated, and its "
        "being unchanged says little. The eight-feature networks are the test.",
        "The numbers of activation patterns are near their ceiling, the number of unseen rows.",
        "The pair proxy is not a property of the function: rewiring a unit that nobody reads changes it.",
    ]
    missing = [name for name in MEASURED if name not in MEASURES]
    if missing:
        cautions.append(f"Not measured, because this version does not register them: {', '.join(missing)}.")
    cautions += [f"{claim.statement}: {claim.verdict}." for claim in failed]
    return {"answer": (part if failed else whole) + ".", "details": details, "cautions": cautions}
