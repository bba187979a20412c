"""A synthetic ``results.json``: every part of the report filled with plausible numbers, or left out on request."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

from scipy import stats

LAYER, UNIT = "relu-layer-rescaling", "relu-unit-rescaling"
# name: (label, flatter_when, invariant_under, size at the first method, change factor under rescaling)
MEASURES: dict[str, tuple[str, str | None, list[str], float, float]] = {
    "lambda_max": ("top Hessian eigenvalue", "lower", [], 38.0, 411.0),
    "trace": ("Hessian trace", "lower", [], 512.0, 187.0),
    "sam_sharpness": ("SAM sharpness", "lower", [], 0.061, 96.0),
    "average_sharpness": ("average-case sharpness", "lower", [], 2.6e-4, 143.0),
    "adaptive_sharpness": ("elementwise-adaptive sharpness", "lower", [LAYER, UNIT], 0.184, 1.0000002),
    "relative_curvature": ("curvature along the weights, w'Hw", "lower", [LAYER, UNIT], 3.1, 1.0),
    "fisher_rao": ("Fisher-Rao norm", "lower", [LAYER, UNIT], 1.72, 1.0),
    "parameter_norm": ("parameter norm", None, [], 17.3, 12.4),
}
HOSTILE = '<script>document.title="owned"</script>"><img src=x onerror=alert(1)>'


def _interval(values: list[float]) -> dict[str, Any]:
    n = len(values)
    if n == 0:
        return {"mean": None, "sd": None, "low": None, "high": None, "n": 0}
    mean = statistics.fmean(values)
    if n == 1:
        return {"mean": mean, "sd": None, "low": None, "high": None, "n": 1}
    sd = statistics.stdev(values)
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "n": n}


def _paired(values: dict[int, float], first: dict[int, float]) -> dict[str, Any]:
    found = _interval([values[seed] - first[seed] for seed in values if seed in first])
    return {"difference": found["mean"], "low": found["low"], "high": found["high"], "n": found["n"]}


def _run(method: str, index: int, seed: int, failed: bool, density: bool, landscape: bool) -> dict[str, Any]:
    noise = random.Random(f"{method}/{seed}")
    shared = random.Random(seed).gauss(0.0, 1.0)
    steps = 1100 + 3 * seed if method == "ae-sam" else 800 if "sam" in method else 1600
    last = 260 if failed else steps
    grid = list(range(20, last + 1, 20))
    floor = 0.17 - 0.012 * index + 0.006 * shared
    decay = [floor + 2.1 * math.exp(-4.5 * step / steps) for step in grid]
    history = {
        "step": grid,
        "train_loss": [0.7 * value * math.exp(noise.gauss(0, 0.03)) for value in decay],
        "validation_loss": [
            value * math.exp(noise.gauss(0, 0.03)) + 0.04 * (s / steps) for value, s in zip(decay, grid, strict=True)
        ],
        "validation_accuracy": [0.97 - 0.6 * math.exp(-5 * step / steps) for step in grid],
    }
    run: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "steps": last,
        "gradient_evaluations": 1600,
        "history": history,
    }
    run |= {"swad": None, "landscape": None, "density": None, "audit": None, "proofs": {}, "measures": {}}
    numbers = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
    if failed:
        reason = "the training loss is not finite (nan) in batch 4"
        return run | {"status": "failed", "failure": {"step": last, "reason": reason}} | dict.fromkeys(numbers)
    run |= {"status": "finished", "failure": None}
    accuracy = 0.962 + 0.006 * index + 0.003 * shared + noise.gauss(0, 0.002)
    train, test = 0.035 + 0.004 * index, floor + noise.gauss(0, 0.004)
    run |= dict(zip(numbers, (train, 0.997, test + 0.005, accuracy - 0.002, test, accuracy), strict=True))
    factors = {}
    for position, (name, (_, _, _, size, _)) in enumerate(MEASURES.items()):
        factors[name] = (
            (1.0, 0.42, 0.66, 0.3)[index % 4] ** (0.7 if position % 2 else 1.0) if name != "parameter_norm" else 0.98
        )
        value = size * factors[name] * math.exp(0.08 * shared + noise.gauss(0, 0.09))
        error = {"parameter_norm": None, "lambda_max": 1e-7 * value}.get(name, 0.02 * value)
        kind = {"parameter_norm": "exact", "lambda_max": "residual bound", "sam_sharpness": "lower bound"}
        run["measures"][name] = {
            "value": value,
            "error": error,
            "error_kind": kind.get(name, "standard error"),
            "converged": not (name == "trace" and seed == 1 and index == 1),
            "cost": 0.0 if name == "parameter_norm" else 40.0 + 20.0 * position,
            "note": "stopped at 200 iterations" if name == "trace" and seed == 1 and index == 1 else "",
        }
    if "swad" in method:
        start = round(steps * (0.35 + 0.02 * seed))
        end = round(steps * (0.8 + 0.02 * seed))
        run["swad"] = {
            "start_step": start,
            "end_step": end,
            "n": end - start + 1,
            "converged": True,
            "threshold": 0.21,
            "notes": [],
        }
    if landscape:
        alpha = [(i - 20) / 20 for i in range(41)]
        top = run["measures"]["lambda_max"]["value"] / 10.0
        slope = [train + 0.5 * top * a * a * (1 - 0.25 * abs(a)) + 0.05 * a**3 for a in alpha]
        run["landscape"] = {"alpha": alpha, "random": [train + 0.02 * a * a for a in alpha], "random_curvature": 0.04}
        run["landscape"] |= {"top": slope, "top_curvature": top}
    if density:
        top = run["measures"]["lambda_max"]["value"]
        grid_values = [-0.1 * top + 1.2 * top * i / 400 for i in range(401)]
        bumps = [(0.0, 0.985), (0.12 * top, 0.01), (0.4 * top, 0.003), (top, 0.002)]
        width = 0.012 * top
        spread = [
            sum(w * math.exp(-(((x - c) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi)) for c, w in bumps)
            for x in grid_values
        ]
        run["density"] = {"grid": grid_values, "density": spread}
    run["audit"] = {
        name: {
            LAYER: {"max_ratio": 1.0 + (factor - 1.0) * 0.9, "changes": [1.0, 1.0 + (factor - 1.0) * 0.9]},
            UNIT: {"max_ratio": factor, "changes": [1.0, factor]},
        }
        for name, (_, _, _, _, factor) in MEASURES.items()
    }
    run["proofs"] = {LAYER: 3.1e-15 * (1 + seed), UNIT: 4.4e-15}
    return run


def make_results(
    *,
    methods: tuple[str, ...] = ("sgd", "sam", "swad", "sam+swad"),
    seeds: int = 5,
    failed: tuple[tuple[str, int], ...] = (),
    density: bool = True,
    landscape: bool = True,
    audit: bool = True,
    name: str = "digits",
) -> dict[str, Any]:
    """Return results with ``seeds`` runs of each method; ``failed`` names (method, seed) pairs that diverged."""
    runs = [
        _run(method, index, seed, (method, seed) in failed, density, landscape and seed == 0)
        for index, method in enumerate(methods)
        for seed in range(seeds)
    ]
    done = [run for run in runs if run["status"] == "finished"]
    keys = ("test_accuracy", "test_loss", "train_loss", "generalisation_gap")
    for run in done:
        run["generalisation_gap"] = run["test_loss"] - run["train_loss"]
    column = {
        method: {
            **{key: {run["seed"]: run[key] for run in done if run["method"] == method} for key in keys},
            **{
                key: {run["seed"]: run["measures"][key]["value"] for run in done if run["method"] == method}
                for key in MEASURES
            },
        }
        for method in methods
    }
    for run in done:
        del run["generalisation_gap"]
    summaries = []
    for method in methods:
        mine, first = column[method], column[methods[0]]
        count = len(mine["test_accuracy"])
        summary: dict[str, Any] = {
            "method": method,
            "n": count,
            "failed": seeds - count,
            "measures": {},
            "versus_first": None,
        }
        for key in ("steps", "gradient_evaluations"):
            spent = [run[key] for run in done if run["method"] == method]
            summary[key] = {"least": min(spent), "mean": statistics.fmean(spent), "most": max(spent)} if spent else None
        for key in keys:
            summary[key] = {k: v for k, v in _interval(list(mine[key].values())).items() if k != "n"}
        for key in MEASURES:
            errors = [run["measures"][key]["error"] for run in done if run["method"] == method]
            known = [error for error in errors if error is not None]
            root = math.sqrt(statistics.fmean(error**2 for error in known)) if known else None
            summary["measures"][key] = _interval(list(mine[key].values())) | {"error": root}
        if method != methods[0]:
            versus: dict[str, Any] = {key: _paired(mine[key], first[key]) for key in ("test_accuracy", "test_loss")}
            versus["test_accuracy"] |= {"p": 0.004 * len(summaries), "p_holm": min(1.0, 0.02 * len(summaries))}
            versus["measures"] = {key: _paired(mine[key], first[key]) for key in MEASURES}
            summary["versus_first"] = versus
        summaries.append(summary)
    ratios = {key: {LAYER: 1.0 + (entry[4] - 1.0) * 0.9, UNIT: entry[4]} for key, entry in MEASURES.items()}
    verdict = {key: "survives" if entry[2] else "changes" for key, entry in MEASURES.items()}
    audited = {
        "symmetries": [LAYER, UNIT],
        "measures": list(MEASURES),
        "max_ratio": ratios,
        "verdict": verdict,
        "rejected": [["layers.4", "the activation is added to another tensor (residual connection)"]],
        "members": 5,
    }
    settings = {
        "data": name,
        "model": "mlp",
        "methods": list(methods),
        "seeds": seeds,
        "epochs": 20,
        "steps": 1600,
        "batch_size": 32,
        "lr": 0.1,
    }
    settings |= {"momentum": 0.9, "weight_decay": 5e-4, "rho": 0.05, "budget": "gradients", "train_size": None}
    return {
        "schema": 1,
        "flatminima": "0.1.0",
        "command": f"flatminima compare --data {name} --methods {','.join(methods)} --seeds {seeds} --out report",
        "settings": settings,
        "answer": "SAM, SWAD and SAM+SWAD found flatter minima than SGD by the top Hessian eigenvalue, "
        "and all three were more accurate on the test set.",
        "details": ["Test accuracy of SAM minus SGD: +0.50 points, 95% interval [+0.10, +0.90], n=5."],
        "cautions": [
            "Five of the eight measures change by a factor of 10 or more under rescalings that change no prediction; "
            "what they say about flatness depends on the coordinates.",
            "All methods were given the same number of gradient evaluations, so SAM took half as many steps as SGD.",
        ],
        "data": {
            "name": name,
            "classes": 10,
            "train": 1078,
            "validation": 359,
            "test": 360,
            "note": "8 x 8 images of handwritten digits, from scikit-learn",
        },
        "network": {"name": "mlp", "parameters": 9034},
        "measures": {
            key: {
                "label": entry[0],
                "unit": "",
                "flatter_when": entry[1],
                "invariant_under": entry[2],
                "meaning": f"The {entry[0]} of the training loss at the final weights.",
            }
            for key, entry in MEASURES.items()
        },
        "methods": summaries,
        "runs": runs,
        "audit": audited if audit else {},
        "times": {"started": "2026-01-01T12:00:00", "seconds": 93.2},
    }
