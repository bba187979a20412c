"""What the numbers of one minimum say, in sentences; every number with its error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def pm(value: float, error: float | None) -> str:
    """A number with its error, two digits of the error.

    Example:
        >>> pm(43.80591, 0.0213), pm(1234567.0, 89.0), pm(-0.5, 2e-9), pm(0.4468682, 5.9e-7)
        ('43.806 ± 0.021', '1234567 ± 89', '−0.5 (± 2 × 10⁻⁹)', '0.4468682 ± 5.9 × 10⁻⁷')
    """
    if error is None or not (math.isfinite(error) and error > 0):
        return _minus(f"{value:.6g}")
    if error < 1e-6 * abs(value):
        return _minus(f"{value:.7g} (± {error:.1g})")
    decimals = 1 - math.floor(math.log10(error))
    if not -2 <= decimals <= 6 or abs(value) >= 1e9:
        return _minus(f"{value:.{max(2, 2 + _orders(value, error))}g} ± {error:.2g}")
    return _minus(f"{round(value, decimals):.{max(0, decimals)}f} ± {round(error, decimals):.{max(0, decimals)}f}")


def describe(results: Record) -> dict[str, Any]:
    """``answer`` in one sentence, the ``details`` behind it, and the ``cautions``."""
    return {"answer": _answer(results), "details": _details(results), "cautions": _cautions(results)}


def _answer(results: Record) -> str:
    label, n, rows = results["matrix"]["label"], results["model"]["parameters"], results["data"]["rows"]
    where = f"{results['model']['name']}, {n:,} parameters, on {rows:,} rows"
    largest = [pair for pair in results["eigenvalues"] if pair["end"] == "largest"]
    clauses = []
    if largest:
        top = largest[0]
        clauses.append(f"a largest eigenvalue of {pm(top['value'], top['error'])}{_open(top['converged'])}")
    total = results["trace"] or (results["layers_trace"] if results["layers"] else None)
    if total is not None:
        clauses.append(f"a trace of {pm(total['value'], total['error'])}{_open(total['converged'])}")
    smallest = results["smallest"]
    if smallest is not None and not clauses:
        clauses.append(
            f"a smallest eigenvalue of {pm(smallest['value'], smallest['error'])}{_open(smallest['converged'])}"
        )
    if not clauses:
        measures = [m for m in results["measures"].values() if m["error_kind"] != "not applicable"]
        done = sum(m["converged"] for m in measures)
        return f"{where}: {done} of {len(measures)} measures reached the accuracy asked for." if measures else where
    verdict = ""
    if smallest is not None and results["matrix"]["name"] == "hessian" and largest:
        verdict = f"; {_negative(results)}"
    return f"{where}: the {label} has {_list(clauses)}{verdict}."


def _open(converged: bool | None) -> str:
    return " (not converged)" if converged is False else ""


def _negative(results: Record) -> str:
    smallest = results["smallest"]
    value, error = smallest["value"], smallest["error"]
    if value + error < 0:
        return f"it has a negative eigenvalue, {pm(value, error)}, so this is not exactly a minimum"
    if value - error > 0:
        return f"no negative eigenvalue was seen; the smallest found is {pm(value, error)}"
    return f"no negative eigenvalue is told from zero; the smallest found is {pm(value, error)}"


def _details(results: Record) -> list[str]:
    lines = []
    settings = results["settings"]
    for end in ("largest", "smallest"):
        pairs = [pair for pair in results["eigenvalues"] if pair["end"] == end]
        if pairs:
            done = sum(pair["converged"] for pair in pairs)
            lines.append(
                f"{done} of {len(pairs)} {end} eigenvalues reached the relative residual asked for, {settings['rtol']:g}."
            )
    total = results["trace"]
    if total is not None:
        how = "exact to rounding" if total["method"] == "exact" else f"95% interval [{_span(total)}]"
        asked = (
            ""
            if total["method"] == "exact"
            else f"; a relative standard error of {settings['trace_rtol']:g} was asked for"
        )
        lines.append(f"The trace is {pm(total['value'], total['error'])}, {how}{asked}{_open(total['converged'])}.")
    lines += _shape_lines(results)
    lines += _layer_lines(results)
    gradient = results["gradient"]
    if gradient is not None:
        unknown = "" if gradient["error"] is not None else " (its rounding could not be measured)"
        lines.append(
            f"The gradient has length {pm(gradient['norm'], gradient['error'])}{unknown}; at a minimum it is zero."
        )
    cost = results["cost"]
    lines.append(
        f"It took {cost['products']} products, {cost['gradient_equivalents']:.0f} gradient evaluations in all."
    )
    return lines


def _shape_lines(results: Record) -> list[str]:
    shape = results["shape"]
    if shape is None:
        return []
    lines = []
    value, low, high = shape["negative_ratio"]
    if value is not None and low is not None and low > 0:
        up = "beyond any bound" if high is None else f"{high:.3g}"
        lines.append(
            f"The most negative eigenvalue found is {value:.3g} [{low:.3g}, {up}] times the largest one in size."
        )
    mass = shape["resolved_negative_mass"]
    if mass is not None:
        edge = results["density"]["bandwidth"]
        lines.append(
            f"Below minus one bandwidth (−{edge:.3g}) lie {100 * mass[0]:.3g}% of the eigenvalues, 95% interval "
            f"[{100 * mass[1]:.3g}%, {100 * mass[2]:.3g}%]."
        )
    numbers = shape["condition_numbers"]
    if len(numbers) > 1 and numbers[-1][0] is not None:
        value, low, high = numbers[-1]
        up = "beyond any bound" if high is None else f"{high:.4g}"
        lines.append(f"The largest eigenvalue is {value:.4g} [{low:.4g}, {up}] times number {len(numbers)}.")
    return lines


def _layer_lines(results: Record) -> list[str]:
    layers = results["layers"]
    if not layers:
        return []
    lines = []
    known = [row for row in layers if row["share"] is not None]
    if known:
        most = max(known, key=lambda row: row["share"]["value"])
        part = pm(100 * most["share"]["value"], 100 * most["share"]["error"])
        lines.append(
            f"Layer {most['name']} ({most['module']}) holds the largest part of the trace, {part}%, with "
            f"{100 * most['parameters'] / results['model']['parameters']:.3g}% of the parameters."
        )
    sharp = max(layers, key=lambda row: row["top"]["value"])
    lines.append(
        f"The sharpest layer by itself is {sharp['name']} ({sharp['module']}), top eigenvalue "
        f"{pm(sharp['top']['value'], sharp['top']['error'])}{_open(sharp['top']['converged'])}."
    )
    return lines


def _cautions(results: Record) -> list[str]:
    lines = []
    for end in ("largest", "smallest"):
        short = [pair for pair in results["eigenvalues"] if pair["end"] == end and not pair["converged"]]
        if short:
            zero = sum(pair["error"] >= abs(pair["value"]) for pair in short)
            ranks = _list([str(pair["rank"]) for pair in short])
            told = f"; {zero} of them are not told from zero, where no relative accuracy can be reached" if zero else ""
            lines.append(
                f"{len(short)} of the {end} eigenvalues did not converge (rank {ranks}){told}. "
                "Their errors are bounds all the same."
            )
    total = results["trace"]
    if total is not None and not total["converged"]:
        lines.append("The trace did not reach the accuracy asked for; its interval says what is known.")
    names = [row["name"] for row in results["layers"] if not (row["trace"]["converged"] and row["top"]["converged"])]
    if names:
        lines.append(f"Not converged in {_list(names)}: the errors there are larger than asked for.")
    lines += _disagreement(results)
    absent = [m for m in results["measures"].values() if m["error_kind"] == "not applicable"]
    loose = [m["label"] for m in results["measures"].values() if not m["converged"] and m not in absent]
    if loose:
        lines.append(f"Measures that did not converge: {_list(loose)}.")
    if absent:
        lines.append(f"Measures that do not apply here: {_list([m['label'] for m in absent])}; the notes say why.")
    smallest = results["smallest"]
    if smallest is not None and smallest["converged"] is None:
        lines.append(
            "The smallest eigenvalue was not iterated: an eigenvalue lies within its error, but there may be smaller ones. "
            "--smallest 1 looks for them."
        )
    if results["matrix"]["name"] == "empirical-fisher":
        lines.append("The empirical Fisher matrix is no curvature: it vanishes where the model fits its targets.")
    if results["eigenvalues"] or total is not None or results["layers"]:
        lines.append(
            "Eigenvalues and traces change when weights are rescaled without changing any prediction; flatminima audit "
            "says which numbers do not."
        )
    return lines


def _disagreement(results: Record) -> list[str]:
    """The traces of the layers must add up to that of the whole."""
    total, parts = results["trace"], results["layers_trace"]
    if total is None or parts is None:
        return []
    gap, spread = abs(total["value"] - parts["value"]), math.hypot(total["error"], parts["error"])
    if gap <= 4 * spread:
        return []
    return [
        f"The traces of the layers add up to {pm(parts['value'], parts['error'])}, not to the trace of the whole, "
        f"{pm(total['value'], total['error'])}: {gap / spread:.1f} standard errors apart. One of the two is wrong."
    ]


def _span(total: Record) -> str:
    half = (total["high"] - total["low"]) / 2
    decimals = max(0, min(9, 1 - math.floor(math.log10(half)))) if half > 0 else 6
    return _minus(f"{total['low']:.{decimals}f}, {total['high']:.{decimals}f}")


def _orders(value: float, error: float) -> int:
    return max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(error))) if value else 0


def _minus(text: str) -> str:
    """With real minus signs and powers of ten."""
    text = re.sub(r"e([+-])0*(\d+)", lambda m: f" × 10{(m[1].strip('+') + m[2]).translate(_SUPERSCRIPTS)}", text)
    return text.replace("-", "\N{MINUS SIGN}")


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
