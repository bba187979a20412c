"""The numbers of a comparison without its curves: ``python docs/examples/zoo/compact.py runs/digits/results.json > kept.json``.

Settings, methods with their intervals and p-values, and every run with what it spent, its scores and its measures, to six
digits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WHOLE = (
    "schema",
    "flatminima",
    "command",
    "settings",
    "budget",
    "answer",
    "details",
    "cautions",
    "data",
    "network",
    "methods",
)
SCORES = ("method", "seed", "status", "failure", "steps", "gradient_evaluations", "swad", "average")
SCORES += tuple(f"{split}_{score}" for split in ("train", "validation", "test") for score in ("loss", "accuracy"))


def compact(results: dict[str, Any]) -> dict[str, Any]:
    """The same fields, fewer of them."""
    runs = []
    for run in results["runs"]:
        measures = {
            name: {key: found[key] for key in ("value", "error", "converged")}
            for name, found in run["measures"].items()
        }
        runs.append({key: run[key] for key in SCORES} | {"measures": measures})
    audit = {key: results["audit"][key] for key in ("max_ratio", "verdict", "members", "rows")}
    return {key: results[key] for key in WHOLE} | {"audit": audit, "runs": runs}


def rounded(tree: Any) -> Any:
    """Six significant digits."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree


if __name__ == "__main__":
    kept = rounded(compact(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
    print("{\n" + lines + "\n}")
