"""Base training: one network per kind of base and seed, from base train images alone. The last iterate is what is kept."""

from __future__ import annotations

import bisect
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.averaging import SWA, SWAD, WeightAverage, reestimate_batchnorm
from flatminima.data.incremental import ClassData
from flatminima.data.splits import IntArray, LabelledImages
from flatminima.optim import SAM
from flatminima.optim.flat_region import FlatRegion
from flatminima.protocols.claims import finite
from flatminima.protocols.fewshot_methods import BASES, base_settings
from flatminima.protocols.fewshot_network import EmbeddingNetwork, build
from flatminima.protocols.fewshot_prototypes import class_means, predict
from flatminima.protocols.fewshot_released import released_loss
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_split import FewShotSplit
from flatminima.protocols.fewshot_views import View, balanced_batches, data_and_split, rows_by_class, stream_seed
from flatminima.study.tasks import Result

_BATCHNORM_BATCHES = 100  # at most; statistics of a few thousand images are enough
_PIXELS = 2**20  # of a piece that is evaluated at once: activations that stay near a CPU
_ON_ACCELERATOR = 2**24


@dataclass(frozen=True)
class BaseCell:
    """One base training, for a worker."""

    settings: FewShotSettings
    base: str
    seed: int
    draws: int = 1

    @property
    def name(self) -> str:
        """Of the task and its files."""
        return f"{self.base}-seed{self.seed}"


class Diverged(Exception):
    """The loss, a gradient or the weights became NaN or infinite; ``step`` is ``None`` after the last one."""

    def __init__(self, step: int | None, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def reestimated(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate BatchNorm statistics.

    Raises:
        Diverged: weights, or what a layer makes of the batches, are NaN or infinite.
    """
    if not all_finite(network.parameters()):
        raise Diverged(None, "weights are not finite after the last step")
    try:
        reestimate_batchnorm(network.train(), batches)
    except ValueError as error:
        raise Diverged(None, f"after the last step: {error}") from error


def run_base(cell: BaseCell, report: Callable[[float], None] = lambda fraction: None) -> Result:
    """Train a base network. Test images and images of later classes are never read.

    Returns:
        The record, and the file of weights and raw base prototypes (``.safetensors``). The same bits every time on one machine,
        apart from ``seconds``; a training that diverged has no file.
    """
    started = time.perf_counter()
    settings = base_settings(cell.settings, cell.base)
    data, split = data_and_split(cell.settings, cell.seed, cell.draws)
    view = View(settings, data.train, split.train)
    network = new_network(settings, data, split, view, cell.seed)
    record: dict[str, Any] = {
        "cell": "base", "base": cell.base, "seed": cell.seed, "failure": None,
        "fingerprint": fingerprint(network, split), "region": network.names,
        "parameters": sum(p.numel() for p in network.parameters()),
    }  # fmt: skip
    trainer = Trainer(settings, BASES[cell.base].kind, network, view, data.train, split, cell.seed)
    try:
        record["history"] = trainer.run(lambda fraction: report(0.95 * fraction))
        prototypes = base_prototypes(network, view, data, split)
        if not all_finite([*network.state_dict().values(), prototypes]):
            raise Diverged(None, "weights or prototypes are not finite after the last step")
    except Diverged as error:
        record["failure"] = {"step": error.step, "reason": error.reason}
        record["seconds"] = time.perf_counter() - started
        return Result(finite(record))
    record |= trainer.facts()
    if len(split.held_out):
        z, y = embeddings(network, view, data.train, split.held_out), base_classes(data.train, split, split.held_out)
        record["held_out_accuracy"] = {
            "head": float((network.head(z).argmax(1) == y).double().mean()),
            "cosine": float((predict(z, prototypes, "cosine") == y).double().mean()),
        }
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    content = save_tensors({**tensors, "prototypes": prototypes})
    record["weights"] = weights_name(content)
    record["seconds"] = time.perf_counter() - started
    report(1.0)
    return Result(finite(record), {".safetensors": content})


def new_network(
    settings: FewShotSettings, data: ClassData, split: FewShotSplit, view: View, seed: int
) -> EmbeddingNetwork:
    """A freshly initialised network for the base classes; the same for all methods of a seed."""
    shape = view.clean(data.train, split.train[:1]).shape[1:]
    return build(settings, shape, len(split.base), stream_seed("weights", seed))


def load_network(
    settings: FewShotSettings, data: ClassData, split: FewShotSplit, view: View, content: bytes
) -> tuple[EmbeddingNetwork, Tensor]:
    """The network and its raw base prototypes from the file of a base training, in eval mode."""
    tensors = load_tensors(content)
    prototypes = tensors.pop("prototypes").to(settings.device)
    network = new_network(settings, data, split, view, 0)
    network.load_state_dict(tensors)
    return network.eval(), prototypes


def weights_name(content: bytes) -> str:
    """A short name of a file of weights, to know it by."""
    return hashlib.sha256(content).hexdigest()[:16]


def fingerprint(network: nn.Module, split: FewShotSplit) -> str:
    """A short name of initial weights and split: runs that are compared must agree in it."""
    hasher = hashlib.sha256(str(split.to_dict() | {"shots": None, "files": None}).encode())
    for parameter in network.parameters():
        hasher.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


def base_classes(images: LabelledImages, split: FewShotSplit, rows: IntArray) -> Tensor:
    """Output numbers of rows of base classes."""
    place = {label: index for index, label in enumerate(split.base)}
    return torch.tensor([place[label] for label in images.labels[rows].tolist()])


def pieces(view: View, images: LabelledImages, rows: IntArray) -> Iterator[Tensor]:
    """Clean inputs of the rows, in pieces that fit the device."""
    start, piece = 0, 1
    while start < len(rows):
        x = view.clean(images, rows[start : start + piece])
        yield x
        start += len(x)
        limit = _PIXELS if x.device.type == "cpu" else _ON_ACCELERATOR
        piece = max(8, limit // x[0].numel())  # known after the first image


@torch.no_grad()
def embeddings(network: EmbeddingNetwork, view: View, images: LabelledImages, rows: IntArray) -> Tensor:
    """Embeddings of clean images, ``(rows, dimensions)``, in eval mode."""
    was_training = network.training
    network.eval()
    found = torch.cat([network.embed(x) for x in pieces(view, images, rows)])
    network.train(was_training)
    return found


def base_prototypes(network: EmbeddingNetwork, view: View, data: ClassData, split: FewShotSplit) -> Tensor:
    """Mean embedding of the train images of every base class, unnormalised; summed in double precision."""
    z = embeddings(network, view, data.train, split.train)
    return class_means(z.double(), base_classes(data.train, split, split.train).to(z.device), len(split.base)).to(
        z.dtype
    )


class Trainer:
    """The loop of base training.

    Args:
        settings: of this base.
        kind: of :data:`~flatminima.protocols.fewshot_methods.KINDS`.
        network: trained in place.
        view, images, split: what it learns from.
        seed: of batches, augmentation and noise.
    """

    def __init__(
        self, settings: FewShotSettings, kind: str, network: EmbeddingNetwork, view: View, images: LabelledImages,
        split: FewShotSplit, seed: int,
    ) -> None:  # fmt: skip
        self._settings, self._kind, self._network = settings, kind, network
        self._view, self._images, self._split, self._seed = view, images, split, seed
        self._sgd = torch.optim.SGD(
            [
                {"params": network.features, "lr": settings.lr},
                {"params": list(network.head.parameters()), "lr": settings.classifier_lr or settings.lr},
            ],
            momentum=settings.momentum, weight_decay=settings.weight_decay,
        )  # fmt: skip
        self._rates = [float(group["lr"]) for group in self._sgd.param_groups]
        self._sam = SAM(self._sgd, settings.rho, model=network) if kind == "sam" else None
        self._region = None
        if kind in ("flat", "swad"):
            self._region = FlatRegion(
                network.region, settings.bound, relative=settings.relative, noise=settings.noise,
                antithetic=settings.antithetic, seed=stream_seed("noise", seed),
            )  # fmt: skip
        # One step at least is averaged, however few there are.
        self._start = min(math.ceil(settings.average_start * settings.iterations), settings.iterations - 1)
        self._average: WeightAverage | SWAD | None = None
        if kind == "swa":
            self._average = SWA(network, start=self._start)
        elif kind == "swad":
            self._average = SWAD(network)

    def batches(self, stream: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented class-balanced batches for ever; the same for all methods of a seed."""
        settings = self._settings
        classes = rows_by_class(self._images.labels, self._split.train, self._split.base)
        generator = torch.Generator().manual_seed(stream_seed("augmentation", stream, self._seed))
        for rows, labels in balanced_batches(
            classes, settings.batch_classes, settings.batch_images, seed=stream_seed("batches", stream, self._seed)
        ):
            yield self._view.augmented(self._images, rows, generator), torch.from_numpy(labels).to(self._view.device)

    def run(self, report: Callable[[float], None]) -> dict[str, list[float]]:
        """Train, put averaged weights in place where there are some, and re-estimate BatchNorm.

        Raises:
            Diverged: a loss or a gradient became NaN or infinite.
        """
        settings, network = self._settings, self._network
        history: dict[str, list[float]] = {"step": [], "loss": []}
        window: list[float] = []
        network.train()
        for step, (x, y) in zip(range(settings.iterations), self.batches("training"), strict=False):
            self._schedule(step)
            loss = self._step(x, y, step)
            if not math.isfinite(loss):
                raise Diverged(step, f"the training loss became {loss}")
            window.append(loss)
            if self._average is not None:
                self._average.update()
            if (step + 1) % settings.every == 0 or step == settings.iterations - 1:
                history["step"].append(step + 1)
                history["loss"].append(math.fsum(window) / len(window))
                window.clear()
                if isinstance(self._average, SWAD):
                    history.setdefault("held_out_loss", []).append(self._held_out_loss(step))
                    self._average.evaluate(history["held_out_loss"][-1])
                report((step + 1) / settings.iterations)
        if self._average is not None:
            self._average.copy_to(network)
        if settings.batchnorm == "reestimate":
            batches = islice(self.batches("batchnorm"), min(_BATCHNORM_BATCHES, settings.iterations))
            reestimated(network, (x for x, _ in batches))
        network.eval()
        return history

    def facts(self) -> dict[str, Any]:
        """How an average came about."""
        if isinstance(self._average, SWAD):
            found = self._average.finalize()
            names = ("start_step", "end_step", "n", "converged", "stopped_at")
            return {"average": {name: getattr(found, name) for name in names}}
        if self._average is not None:
            return {"average": {"start_step": self._start, "n": self._average.n}}
        return {}

    def _schedule(self, step: int) -> None:
        settings = self._settings
        passed = bisect.bisect_right([part * settings.iterations for part in settings.milestones], step)
        for group, rate in zip(self._sgd.param_groups, self._rates, strict=True):
            group["lr"] = rate * settings.gamma**passed
            if self._kind == "swa" and step >= self._start:
                group["lr"] = rate * settings.average_lr / settings.lr

    def _step(self, x: Tensor, y: Tensor, step: int) -> float:
        network = self._network
        if self._sam is not None:

            def closure() -> Tensor:
                self._sgd.zero_grad()
                loss = F.cross_entropy(network(x)[1], y)
                loss.backward()
                return loss

            loss = self._sam.step(closure)
            if self._sam.skipped:
                raise Diverged(step, self._sam.skip_reason or "a gradient became NaN or infinite")
            return float(loss.detach())
        self._sgd.zero_grad()
        loss = F.cross_entropy(network(x)[1], y) if self._region is None else self._flat(self._region, x, y)
        loss.backward()
        self._sgd.step()
        return float(loss.detach())

    def _flat(self, region: FlatRegion, x: Tensor, y: Tensor) -> Tensor:
        settings = self._settings
        h = self._network.trunk(x)
        if settings.constant_prototypes or settings.swap_weights:
            return released_loss(region, self._network.tail, h, y, settings)
        return region.loss(
            self._network.tail, h, y, on_outputs, draws=settings.draws, prototype_weight=settings.prototype_weight,
            std_weight=settings.std_weight, embedding=picked, detach_clean=settings.detach_clean,
        ).value  # fmt: skip

    @torch.no_grad()
    def _held_out_loss(self, step: int) -> float:
        rows, network = self._split.held_out, self._network
        y = base_classes(self._images, self._split, rows).to(self._view.device)
        network.eval()
        outputs = torch.cat([network(x)[1] for x in pieces(self._view, self._images, rows)])
        network.train()
        value = float(F.cross_entropy(outputs.double(), y))
        if not np.isfinite(value):
            raise Diverged(step, f"the loss on images held out became {value}")
        return value


def on_outputs(found: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Cross entropy of the base classifier, for what :class:`~flatminima.protocols.fewshot_network.Tail` returns."""
    return F.cross_entropy(found[1], y)


def picked(found: tuple[Tensor, Tensor]) -> Tensor:
    """The embedding in what the tail returns."""
    return found[0]
