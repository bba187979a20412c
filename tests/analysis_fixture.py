"""Records of studies that nobody ran: numbers drawn so that the truth is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from flatminima.study.run_spec import Record

ROWS = 10_000  # test rows


def record(
    seed: int, values: Mapping[str, float], *, data: str = "mnist", cell: Mapping[str, Any] | None = None, subset: int = 42,
    rows: int = 250, lr: float = 0.1, batch: int = 64, status: str = "finished", reason: str = "", labels: tuple[str, ...] = (),
) -> Record:  # fmt: skip
    spec = {
        "study": f"simulated-{data}", "cell": dict(cell or {}),
        "data": {"name": data, "rows": rows, "subset_seed": subset, "subset_rule": "permutation"},
        "model": {"name": "mlp", "options": {}},
        "optimiser": {"name": "sgd", "lr": lr, "batch_size": batch, "schedule": "constant", "drops": []},
        "stop": {"rule": "loss", "threshold": 0.01, "max_epochs": 500, "max_steps": None}, "seed": seed, "order_seed": seed,
        "measures": [{"name": label, "label": label} for label in labels],
    }  # fmt: skip
    identity = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    return Record(identity, spec, status, reason, {k: float(v) for k, v in values.items()})


def measured(rng: np.random.Generator, skill: float, effects: Mapping[str, float]) -> dict[str, float]:
    """Values of one network: its skill (standard normal), and measures that follow it with the given correlations."""
    p = min(max(0.8 + 0.03 * skill, 0.0), 1.0)
    a, b = (rng.binomial(ROWS // 2, p) / (ROWS // 2) for _ in "ab")
    values = {
        "test.accuracy": (a + b) / 2, "test.accuracy.a": a, "test.accuracy.b": b,
        "train.loss": 0.01 * np.exp(0.1 * rng.normal()), "train.epochs": 100.0,
        "covariate.live_units": float(rng.integers(4, 9)), "covariate.parameter_norm": rng.normal(10, 1),
        "covariate.participation_ratio": rng.normal(4, 1), "covariate.margin_quantile": rng.normal(2, 0.3),
        "covariate.normalised_margin": rng.normal(1, 0.3),
    }  # fmt: skip
    for name, rho in effects.items():
        values[name] = rho * skill + np.sqrt(1 - rho**2) * rng.normal()
    return values


def seeds_study(
    n: int, effects: Mapping[str, float], *, data: str = "mnist", seed: int = 0, first: int = 0, subsets: int = 1
) -> list[Record]:
    """``n`` seeds on each of some training subsets; a measure's random moves follow the skill as ``effects`` says."""
    rng = np.random.default_rng(seed)
    labels = tuple(name.removeprefix("measure.") for name in effects if name.startswith("measure."))
    return [
        record(first + i, measured(rng, rng.normal(), effects), data=data, subset=42 + s, labels=labels)
        for s in range(subsets)
        for i in range(n)
    ]


#: Weakness predicts; invariant sharpness as well as the trace, whose copies after random moves do not.
WEAK = {
    "measure.pair_proxy": 0.6, "measure.trace": -0.5, "orbit.trace": 0.0, "measure.orbit_minimal_trace": -0.5,
    "measure.adaptive_sharpness": -0.1, "measure.w_hessian_w": -0.1, "measure.relative_flatness": -0.1,
    "measure.normalised_margin": 0.1, "measure.spectral_product": -0.1, "measure.participation_ratio": 0.1,
}  # fmt: skip
