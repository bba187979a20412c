"""From run records to results: statistics per method, the audit over methods, and the answer in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flatminima
from flatminima.data import Splits
from flatminima.measures import MEASURES, resolve
from flatminima.study.methods import label, parse
from flatminima.study.settings import CompareSettings
from flatminima.study.statistics import LEVEL, holm, interval, paired, paired_p
from flatminima.study.steps import ASAM_RATIO

SCHEMA = 1
_MEASURED = tuple(m.name for m in resolve())  # what a comparison measures
_SCORES = ("test_accuracy", "test_loss", "train_loss", "generalisation_gap")
_SPENT = ("steps", "gradient_evaluations")
_FEW = 6  # methods: of more, only what is told apart gets a sentence

_VERDICTS = ("not tested", "survives", "undecided", "changes")  # the worst of several cells counts

Record = dict[str, Any]


def summarise(settings: CompareSettings, splits: Splits, parameters: int, records: Sequence[Record]) -> dict[str, Any]:
    """The dictionary that ``results.json`` holds; docs/results.md documents it."""
    runs = [_run(record) for record in records]
    methods = [_method(name, settings.methods[0], runs) for name in settings.methods]
    _correct(methods, runs)
    audit = _audit(settings, len(splits.train), runs)
    return {
        "schema": SCHEMA,
        "flatminima": flatminima.__version__,
        "command": settings.command(),
        "settings": settings.to_dict(),
        "answer": _answer(settings, methods, audit),
        "details": _details(methods, audit),
        "cautions": _cautions(settings, audit, len(splits.classes), runs),
        "data": {
            "name": splits.name,
            "classes": list(splits.classes),
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
            "note": splits.note,
        },
        "budget": {"kind": settings.budget, "amount": settings.sgd_steps(len(splits.train))},
        "network": {"name": settings.model, "parameters": parameters},
        "measures": {
            m.name: {
                "label": m.label,
                "unit": "",
                "flatter_when": m.flatter_when,
                "invariant_under": sorted(m.invariant_under),
                "meaning": m.meaning,
            }
            for m in resolve()
        },
        "methods": methods,
        "runs": runs,
        "audit": audit,
        "times": {f"{r['method']}-seed{r['seed']}": r["seconds"] for r in records},
    }


def _run(record: Record) -> Record:
    keys = (
        "method", "seed", "status", "failure", "steps", "gradient_evaluations",
        "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy",
    )  # fmt: skip
    run = {key: record.get(key) for key in keys}
    run["measures"] = record.get("measures", {})
    for key in ("history", "swad", "average", "landscape", "density", "audit", "audit_verdict"):
        run[key] = record.get(key)
    run["proofs"], run["rejected"] = record.get("proofs", {}), record.get("rejected", [])
    return run


def _method(name: str, first: str, runs: Sequence[Record]) -> Record:
    mine = _finished(runs, name)
    entry: Record = {"method": name, "n": len(mine), "failed": sum(r["method"] == name for r in runs) - len(mine)}
    for key in _SPENT:
        spent = [r[key] for r in mine]
        entry[key] = {"least": min(spent), "mean": math.fsum(spent) / len(spent), "most": max(spent)} if spent else None
    for score in _SCORES:
        entry[score] = interval(list(_values(mine, score).values()))
    entry["measures"] = {}
    for measure in _MEASURED:
        errors = [
            r["measures"][measure]["error"] for r in mine if r["measures"].get(measure, {}).get("error") is not None
        ]
        root_mean_square = math.sqrt(math.fsum(e * e for e in errors) / len(errors)) if errors else None
        entry["measures"][measure] = {**interval(list(_values(mine, measure).values())), "error": root_mean_square}
    entry["versus_first"] = None
    if name != first:
        reference = _finished(runs, first)
        versus: Record = {s: paired(_values(mine, s), _values(reference, s)) for s in _SCORES}
        versus["measures"] = {m: paired(_values(mine, m), _values(reference, m)) for m in _MEASURED}
        entry["versus_first"] = versus
    return entry


def _correct(methods: Sequence[Record], runs: Sequence[Record]) -> None:
    """p-values of the primary comparison, test accuracy, and what Holm's correction for their number makes of them."""
    reference = _values(_finished(runs, methods[0]["method"]), "test_accuracy") if methods else {}
    others = [m for m in methods if m["versus_first"] is not None]
    for m in others:
        found = paired_p(_values(_finished(runs, m["method"]), "test_accuracy"), reference)
        m["versus_first"]["test_accuracy"] |= {"p": found, "p_holm": None}
    tested = [m["versus_first"]["test_accuracy"] for m in others if m["versus_first"]["test_accuracy"]["n"] > 1]
    # One without a p-value still counts in the family.
    for versus, corrected in zip(tested, holm([1.0 if v["p"] is None else v["p"] for v in tested]), strict=True):
        versus["p_holm"] = None if versus["p"] is None else corrected


def _finished(runs: Sequence[Record], method: str) -> list[Record]:
    return [r for r in runs if r["method"] == method and r["status"] == "finished"]


def _values(runs: Sequence[Record], name: str) -> dict[int, float]:
    """Seed -> score or measure, where it exists."""
    found: dict[int, float] = {}
    for r in runs:
        if name == "generalisation_gap":
            value = r["test_loss"] - r["train_loss"]
        elif name in _MEASURED:
            value = r["measures"].get(name, {}).get("value")
        else:
            value = r[name]
        if value is not None:
            found[r["seed"]] = value
    return found


def _audit(settings: CompareSettings, train_rows: int, runs: Sequence[Record]) -> Record:
    audited = [r for r in runs if r["audit"]]
    symmetries = sorted({kind for r in audited for kind in r["proofs"]})
    ratios: dict[str, dict[str, float | None]] = {m: {} for m in _MEASURED}
    verdict = dict.fromkeys(_MEASURED, "not tested")
    for name in _MEASURED:
        for kind in symmetries:
            cells = [r["audit"][name][kind] for r in audited if kind in r["audit"].get(name, {})]
            if cells:
                factors = [c["max_ratio"] for c in cells]
                ratios[name][kind] = None if None in factors else max(factors)
                verdict[name] = max(verdict[name], *map(_verdict, cells), key=_VERDICTS.index)
    rejected = sorted({tuple(pair) for r in audited for pair in r["rejected"]})
    return {
        "symmetries": symmetries,
        "measures": list(_MEASURED),
        "max_ratio": ratios,
        "verdict": verdict,
        "proofs": {kind: max(r["proofs"].get(kind, 0.0) for r in audited) for kind in symmetries},
        "rejected": [list(pair) for pair in rejected],
        "members": settings.audit_members,
        "rows": min(settings.audit_rows, settings.measure_rows, train_rows),
    }


def _verdict(cell: Record) -> str:
    return "changes" if cell["significant"] else "undecided" if cell["status"] == "undecided" else "survives"


def _answer(settings: CompareSettings, methods: Sequence[Record], audit: Record) -> str:
    first, others = methods[0], methods[1:]
    if not first["n"] or not any(m["n"] for m in others):
        reason = "there is nothing to compare it with" if first["n"] else f"every run of {_label(first)} failed"
        return f"No comparison: {reason}."
    pairs = sorted(m["versus_first"]["test_accuracy"]["n"] for m in others)
    if pairs[-1] < 2:
        return f"On {settings.data}: fewer than two paired seeds give no interval, so no difference can be claimed."
    n = f"{pairs[0]}" if pairs[0] == pairs[-1] else f"{pairs[0]} to {pairs[-1]}"
    survivors = _survivors(audit)
    judged = survivors or [m for m in _MEASURED if MEASURES[m].flatter_when]

    def where(sign: int, names: Sequence[str]) -> str:
        found = [m for m in others if all(_sign(m["versus_first"]["measures"][name]) == sign for name in names)]
        return _list([_label(m) for m in found])

    def tested(sign: int) -> str:
        return _list([_label(m) for m in others if _sign(m["versus_first"]["test_accuracy"]) == sign])

    basis = (
        f"by every flatness number that survives a change of coordinates ({_list([MEASURES[m].label for m in survivors])})"
        if survivors
        else "by every flatness number, though none was shown to survive a change of coordinates"
    )
    flatter, sharper, better, worse = where(-1, judged), where(1, judged), tested(1), tested(-1)
    clauses = [f"{flatter or 'no method'} found flatter minima than {_label(first)} {basis}"]
    if sharper:
        clauses.append(f"{sharper} found sharper ones")
    clauses.append(f"{better or 'no method'} predicted better than {_label(first)} on held-out data")
    if worse:
        clauses[-1] += f", and {worse} predicted worse"
    seen = [m for m in others if _sign(m["versus_first"]["test_accuracy"])]
    if seen and len(others) > 1:
        kept = [m for m in seen if _holds(m["versus_first"]["test_accuracy"])]
        which = "all" if len(kept) == len(seen) else f"only {_list([_label(m) for m in kept])}" if kept else "none"
        clauses[-1] += f" (of these differences Holm's correction for {len(others)} comparisons leaves {which})"
    return f"On {settings.data}, with {n} paired seeds: {'; '.join(clauses)}."


def _survivors(audit: Record) -> list[str]:
    """Flatness numbers that did not move and are invariant by theorem; on a dead network nothing moves."""
    return [
        m
        for m in _MEASURED
        if MEASURES[m].flatter_when
        and audit["verdict"][m] == "survives"
        and set(audit["symmetries"]) <= MEASURES[m].invariant_under
    ]


def _details(methods: Sequence[Record], audit: Record) -> list[str]:
    """The effects on held-out data and on the invariant numbers, method by method."""
    words = {-1: "flatter", 0: "no detectable difference", 1: "sharper"}
    lines = []
    compared = [m for m in methods[1:] if m["versus_first"]["test_accuracy"]["low"] is not None]
    shown = compared if len(compared) <= _FEW else [m for m in compared if _sign(m["versus_first"]["test_accuracy"])]
    for m in shown:
        versus = m["versus_first"]["test_accuracy"]
        low, middle, high = (_points(versus[key]) for key in ("low", "difference", "high"))
        seen = "" if _sign(versus) else ": no detectable difference"
        corrected = f", Holm's p {versus['p_holm']:.2g}" if len(compared) > 1 and versus["p_holm"] is not None else ""
        lines.append(
            f"Test accuracy of {_label(m)} minus {_label(methods[0])}: {middle} points, 95% interval [{low}, {high}], "
            f"n={versus['n']}{corrected}{seen}."
        )
        signs = [f"{MEASURES[k].label} {words[_sign(m['versus_first']['measures'][k])]}" for k in _survivors(audit)]
        if signs:
            lines.append(f"Flatness of {_label(m)} against {_label(methods[0])}: {', '.join(signs)}.")
    if len(shown) < len(compared):
        lines.append(
            f"Of {len(compared) - len(shown)} of the {len(compared)} methods the test accuracy cannot be told from that of "
            f"{_label(methods[0])}."
        )
    return lines


def _cautions(settings: CompareSettings, audit: Record, classes: int, runs: Sequence[Record]) -> list[str]:
    lines = []
    averaged = [r["swad"] for r in runs if r["status"] == "finished" and r["swad"]]
    unconverged = sum(not s["converged"] for s in averaged)
    if unconverged:
        lines.append(
            f"SWAD found no valley in {unconverged} of {len(averaged)} runs; the average is then over the last segment only."
        )
    stopped = sum(s["stopped_at"] is not None for s in averaged)
    if stopped:
        lines.append(
            f"In {stopped} of {len(averaged)} runs SWAD saw its valley end and stopped before its budget was spent; its minima "
            "are then compared with those of longer trainings."
        )
    changing = [MEASURES[m].label for m in _MEASURED if audit["verdict"][m] == "changes"]
    if changing:
        lines.append(
            f"These numbers change when the weights are rescaled without changing any prediction: {_list(changing)}. "
            "A difference in them alone is no evidence about the function."
        )
    if not audit["symmetries"]:
        lines.append(
            "No function-preserving rescaling was found or tested for this model: no number was put to that test."
        )
    finished = [r for r in runs if r["status"] == "finished"]
    if not finished:
        return lines
    chance = sum(r["train_accuracy"] < 2 / classes for r in finished)
    if chance:
        lines.append(
            f"{chance} of {len(finished)} runs fit their training rows hardly better than chance: a network that learned "
            "nothing can be perfectly flat."
        )
    methods = [parse(name) for name in settings.methods]
    if settings.schedule == "constant" and any(m.average for m in methods):
        lines.append(
            "All methods train with a constant learning rate, which SWAD assumes; averaging then also does what a decaying "
            "rate would do for the others (try --schedule cosine)."
        )
    if any(m.optimizer not in ("sgd", "sam") for m in methods):
        lines.append(_defaults(settings))
    lines.append(
        f"The budget is equal in {settings.budget}. Intervals are over seeds (initial weights and data order) on one split, "
        "each comparison by itself; Holm's correction is for the test accuracies alone. The test set was used once, after "
        "training."
    )
    return lines


def _defaults(settings: CompareSettings) -> str:
    """What the variants were given; none of it was tuned."""
    optimizers = {parse(name).optimizer for name in settings.methods}
    exceptions = []
    if "asam" in optimizers:
        exceptions.append(f"ASAM, whose radius is in units of the weights, at {ASAM_RATIO * settings.rho:g}")
    if "bsam" in optimizers:
        exceptions.append("bSAM at the learning rate and radius that its authors publish")
    but = f"; {' and '.join(exceptions)}" if exceptions else ""
    return f"Every variant has its documented defaults, untuned, and the radius {settings.rho:g}{but}."


def _holds(difference: Record) -> bool:
    """Whether the difference is left by Holm's correction."""
    return difference["p_holm"] is not None and difference["p_holm"] <= 1 - LEVEL


def _sign(difference: Record) -> int:
    """1 or -1 where the 95 % interval excludes zero, else 0."""
    if difference["low"] is None:
        return 0
    return 1 if difference["low"] > 0 else -1 if difference["high"] < 0 else 0


def _label(method: Record) -> str:
    return label(str(method["method"]))


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}".replace("-", "\N{MINUS SIGN}")


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
