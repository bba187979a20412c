"""How flat a base network is in the box: the paper's indicator, the worst point, the trace, and where its prototypes go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flatminima.curvature import trace
from flatminima.objective import Objective
from flatminima.optim.flat_region import FlatRegion
from flatminima.protocols.claims import finite
from flatminima.protocols.fewshot_base import base_classes, load_network, on_outputs, pieces
from flatminima.protocols.fewshot_methods import base_settings
from flatminima.protocols.fewshot_network import EmbeddingNetwork, Tail
from flatminima.protocols.fewshot_prototypes import class_means
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_views import View, data_and_split, stream_seed

_TRACE_RTOL = 0.02


@dataclass(frozen=True)
class ProbeCell:
    """Flatness of one base network, for a worker; attributes as of a session cell."""

    settings: FewShotSettings
    base: str
    seed: int
    draws: int
    weights: bytes
    digest: str

    @property
    def name(self) -> str:
        """Of the task and its files."""
        return probe_name(self.base, self.seed)


def probe_name(base: str, seed: int) -> str:
    """The name of a measurement of flatness."""
    return f"{base}-seed{seed}-flatness"


def run_probe(cell: ProbeCell, report: Callable[[float], None] = lambda fraction: None) -> dict[str, Any]:
    r"""Measure on rows of base train and of base test images, with clean weights and BatchNorm in eval mode.

    The box has the experiment's half width b for every base, so that bases are compared in the same box; what b means for a
    layer is b / RMS(w). Noise is uniform and the same for all bases of a seed.

    Returns:
        Per part: the loss, mean of :math:`(L_i - L)^2` (the paper's I), mean rise with its standard error, variance over draws,
        largest and worst loss, and the relative drift of class means at the draws (mean) and at the worst point. For the train
        part, the trace of the Hessian on the region. A network whose loss is not finite has a ``failure`` instead.
    """
    started = time.perf_counter()
    settings = cell.settings
    data, split = data_and_split(settings, cell.seed, cell.draws)
    view = View(settings, data.train, split.train)
    network, _ = load_network(base_settings(settings, cell.base), data, split, view, cell.weights)
    record: dict[str, Any] = {
        "cell": "flatness", "base": cell.base, "seed": cell.seed, "weights": cell.digest, "failure": None,
        "bound": settings.bound, "relative": settings.relative, "draws": settings.probe_draws, "region": network.names,
        "parts": {},
    }  # fmt: skip
    for place, (name, images, rows) in enumerate(
        (("train", data.train, split.train), ("test", data.test, split.test[0]))
    ):
        chosen = rows[:: max(1, len(rows) // settings.probe_rows)][: settings.probe_rows]
        with torch.no_grad():
            h = torch.cat([network.trunk(x) for x in pieces(view, images, chosen)])
            outputs = network.tail(h)[1]
        y = base_classes(images, split, chosen).to(view.device)
        loss = float(F.cross_entropy(outputs, y))
        if not math.isfinite(loss):
            reason = f"the loss on {name} images is {loss}: there is nothing to compare with"
            return {**record, "failure": {"step": None, "reason": reason}, "seconds": time.perf_counter() - started}
        region = FlatRegion(
            network.region, settings.bound, relative=settings.relative, seed=stream_seed("probe", cell.seed)
        )
        record["parts"][name] = in_box(region, network.tail, h, y, settings)
        if name == "train":
            record["half_over_rms"] = record["parts"][name].pop("half_over_rms")
            report(0.4)
            record["trace"] = region_trace(network, h, y, cell.seed)
        report((place + 1) / 2)
    record["seconds"] = time.perf_counter() - started
    plain: dict[str, Any] = finite(record)
    return plain


def in_box(region: FlatRegion, tail: Tail, h: Tensor, y: Tensor, settings: FewShotSettings) -> dict[str, Any]:
    """The loss of the base classifier over the box around the present weights, and the drift of class means in it."""
    present = y.unique()
    place = torch.searchsorted(present, y)

    def means(offset: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return class_means(region.forward(tail, h, offset)[0], place, len(present))

    clean = means([torch.zeros_like(p) for p in region.params])

    def moved(offset: list[Tensor]) -> float:
        return float(((means(offset) - clean).norm(dim=1) / clean.norm(dim=1)).mean())

    state = region.state_dict()
    found = region.probe(tail, [(h, y)], on_outputs, steps=settings.probe_steps, draws=settings.probe_draws)
    region.load_state_dict(state)  # the same draws again
    drifts = [moved(eps) for eps in region.sample(settings.probe_draws + settings.probe_draws % 2 * region.antithetic)]
    losses = torch.tensor(found.losses, dtype=torch.float64)
    return {
        "rows": len(y), "loss": found.clean, "indicator": found.mean_square, "mean_rise": found.mean_rise,
        "error": found.error, "variance": float(losses.var(correction=0)), "largest": max(found.losses), "worst": found.worst,
        "drift": sum(drifts) / len(drifts), "worst_drift": moved(list(found.offset)),
        "half_over_rms": list(found.half_over_rms),
    }  # fmt: skip


def region_trace(network: EmbeddingNetwork, h: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Trace of the Hessian of the cross entropy on the region, exact where the tail is piecewise linear."""
    outputs = _Outputs(network.tail)
    objective = Objective(
        outputs, F.cross_entropy, (h, y), parameters=lambda _, p: any(p is q for q in network.region), check=False
    )
    found = trace(objective, rtol=_TRACE_RTOL, seed=seed)
    return {
        "value": found.value, "error": found.error, "method": found.method, "converged": found.converged,
        "parameters": objective.n,
    }  # fmt: skip


class _Outputs(torch.nn.Module):
    """The tail's outputs alone: what an objective's loss takes."""

    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self.layers, self.head = tail.layers, tail.head

    def forward(self, h: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(h))
        return found
