"""Everything ``flatminima audit`` says about one minimum, or about two, as one JSON-ready structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import flatminima
from flatminima.audit import AuditReport, MinimaComparison, audit, compare_minima
from flatminima.objective import LossFn
from flatminima.study.audit_settings import AuditSettings
from flatminima.study.measuring import plain

SCHEMA = 1


@dataclass(frozen=True)
class Minimum:
    """A network at its weights, and its name for people."""

    name: str
    model: nn.Module


def audit_minima(
    minima: Sequence[Minimum],
    loss_fn: LossFn | None,
    data: Any,
    settings: AuditSettings | None = None,
    *,
    probes: Any = None,
    command: str = "",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Audit one minimum, or compare two of one architecture.

    Args:
        minima: one or two.
        loss_fn, data: as for :class:`~flatminima.Objective`.
        settings: what to audit.
        probes: unlabelled inputs, for measures that look at some.
        command: to be recorded.
        progress: called with what is at work, and the members measured so far and in all.

    Returns:
        The fields of ``audit.json``, which ``docs/audit.md`` documents. Infinity and NaN are ``None``.

    Raises:
        ValueError: neither one nor two minima, or whatever :func:`~flatminima.audit.compare_minima` refuses.

    Cost: that of :func:`~flatminima.audit.audit`, for each.

    Example:
        >>> import torch
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = torch.randn(8, 2), torch.randint(0, 2, (8,))
        >>> found = audit_minima([Minimum("w", net)], nn.functional.cross_entropy, data, AuditSettings(("w_hessian_w",)))
        >>> found["audits"][0]["measures"]["w_hessian_w"]["verdict"]
        'invariant'
    """
    settings = settings or AuditSettings()
    if len(minima) not in (1, 2):
        raise ValueError(f"expected one minimum to audit or two to compare, got {len(minima)}")
    asked: dict[str, Any] = {
        "measures": settings.measures, "kinds": settings.kinds, "max_scale": settings.max_scale, "mode": settings.mode,
        "options": settings.options, "seed": settings.seed, "probes": probes, "progress": progress,
        **settings.counts(len(minima)),
    }  # fmt: skip
    comparison: MinimaComparison | None = None
    if len(minima) == 1:
        reports: tuple[AuditReport, ...] = (audit(minima[0].model, loss_fn, data, **asked),)
    else:
        first, second = minima
        names = (first.name, second.name)
        comparison = compare_minima(first.model, second.model, loss_fn, data, names=names, **asked)
        reports = comparison.audits
    audits = [{"name": m.name, **report.to_dict()} for m, report in zip(minima, reports, strict=True)]
    said = audits[0] if comparison is None else comparison.to_dict()
    first_parameter = next(minima[0].model.parameters())
    found = plain(
        {
            "schema": SCHEMA,
            "flatminima": flatminima.__version__,
            "command": command,
            "settings": settings.to_dict(len(minima)),
            "answer": said["answer"] if comparison is None else said["verdict"],
            "details": said["details"],
            "cautions": said["cautions"],
            "notes": list(dict.fromkeys(note for report in reports for note in report.notes)),
            "model": {
                "name": type(minima[0].model).__name__, "parameters": reports[0].parameters,
                "dtype": str(first_parameter.dtype).removeprefix("torch."), "device": str(first_parameter.device),
            },
            "data": {"rows": reports[0].rows},
            "audits": audits,
            "comparison": None if comparison is None else said,
            "cost": sum(report.cost for report in reports),
            "times": _added([report.times for report in reports]),
        }
    )  # fmt: skip
    assert isinstance(found, dict)
    return found


def _added(times: Sequence[dict[str, float]]) -> dict[str, float]:
    return {part: sum(t.get(part, 0.0) for t in times) for part in dict.fromkeys(p for t in times for p in t)}
