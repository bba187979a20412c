"""Images as networks see them, batches with so many images of so many classes, and who may see what when."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatminima.data.domain_splits import seed_hash
from flatminima.data.incremental import ClassData, load_incremental
from flatminima.data.pictures import Augmentation, Scaling, ShiftAndFlip, centre
from flatminima.data.splits import IntArray, LabelledImages, channel_statistics
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_split import FewShotSplit, load_split, make_split, validation_data
from flatminima.study.settings import SettingsError

_STATISTICS = 5000  # rows that mean and deviation are taken from


@functools.lru_cache(maxsize=1)
def loaded(data: str, size: int | None) -> ClassData:
    """The data set, read once a process."""
    return load_incremental(data, size=size)


def data_and_split(settings: FewShotSettings, seed: int, draws: int) -> tuple[ClassData, FewShotSplit]:
    """The data set of the settings and its split for a seed; with ``validate``, those made of base images alone.

    Raises:
        DataError, SettingsError: they cannot be used.
    """
    data = loaded(settings.data, settings.size)
    if settings.split is not None:
        if settings.validate:
            raise SettingsError("--validate makes its own splits; leave out --split")
        split = load_split(settings.split, data)
        if len(split.shots) < draws:
            raise SettingsError(f"--draws {draws}: the split {settings.split} has {len(split.shots)}")
        return data, split
    split = make_split(
        data, base=settings.base, way=settings.way, shot=settings.shot, sessions=settings.sessions, order=settings.order,
        draws=draws, seed=seed, base_images=settings.base_images, test_images=settings.test_images,
        held_out=settings.held_out,
    )  # fmt: skip
    if not settings.validate:
        return data, split
    pseudo = validation_data(data, split)
    total = len(split.order)
    base = max(2, round(settings.base * settings.base / total))
    return pseudo, make_split(
        pseudo, base=base, way=settings.way, shot=settings.shot, order="sorted", draws=draws, seed=seed,
        held_out=settings.held_out,
    )  # fmt: skip


class View:
    """Images as the network sees them, standardised by the base train images.

    Args:
        settings: of pooling, cropping, augmentation and device.
        images, rows: base train images.
    """

    def __init__(self, settings: FewShotSettings, images: LabelledImages, rows: IntArray) -> None:
        every = max(1, len(rows) // _STATISTICS)
        mean, deviation = channel_statistics(images.pixels(np.sort(rows[::every])))
        self.device = torch.device(settings.device)
        self._mean, self._deviation = (
            torch.tensor(v / 255, dtype=torch.float32, device=self.device).view(1, -1, 1, 1) for v in (mean, deviation)
        )
        self._scaling = Scaling(pool=settings.pool)
        self._crop = settings.crop
        self._augmentation: ShiftAndFlip | Augmentation | None = None
        if settings.augment == "shift-flip":
            self._augmentation = ShiftAndFlip()
        elif settings.augment == "resized-crop":
            self._augmentation = Augmentation(scale=(0.08, 1.0), jitter=0.0, grey=0.0, out=settings.crop)

    def clean(self, images: LabelledImages, rows: IntArray) -> Tensor:
        """Inputs ``(rows, C, H, W)`` as they are evaluated."""
        x = self._unit(images, rows)
        return self._standardised(x if self._crop is None else centre(x, self._crop))

    def augmented(self, images: LabelledImages, rows: IntArray, generator: torch.Generator) -> Tensor:
        """Inputs as they train; the generator is on the CPU."""
        if self._augmentation is None:
            return self.clean(images, rows)
        return self._standardised(self._augmentation(self._unit(images, rows), generator))

    def _unit(self, images: LabelledImages, rows: IntArray) -> Tensor:
        return self._scaling.unit(torch.from_numpy(images.pixels(rows)).to(self.device))

    def _standardised(self, x: Tensor) -> Tensor:
        return ((x - self._mean) / self._deviation).contiguous(memory_format=torch.channels_last)


def balanced_batches(
    classes: Sequence[IntArray], batch_classes: int, batch_images: int, *, seed: int
) -> Iterator[tuple[IntArray, IntArray]]:
    """For ever: rows and class numbers of ``batch_images`` images of each of ``batch_classes`` classes.

    Classes come in random order, each once a round, and so do the images of a class. All methods of a seed see the same.

    Args:
        classes: rows of each class.
        batch_classes: at most; there may be fewer.
        batch_images: of each.
        seed: of the stream.

    Example:
        >>> batches = balanced_batches([np.arange(3), np.arange(3, 9)], 2, 2, seed=0)
        >>> rows, labels = next(batches)
        >>> sorted(labels.tolist()), len(set(rows.tolist()))
        ([0, 0, 1, 1], 4)
    """
    rng = np.random.default_rng(seed)
    queues: list[list[int]] = [[] for _ in classes]
    waiting: list[int] = []
    count = min(batch_classes, len(classes))
    while True:
        chosen: dict[int, None] = {}
        while len(chosen) < count:
            if not waiting:
                waiting = rng.permutation(len(classes)).tolist()
            place = next((i for i, label in enumerate(waiting) if label not in chosen), None)
            if place is None:  # the rest of the round is in the batch already
                waiting = rng.permutation(len(classes)).tolist()
                continue
            chosen[waiting.pop(place)] = None
        rows: list[int] = []
        for label in chosen:
            while len(queues[label]) < batch_images:
                queues[label] += rng.permutation(classes[label]).tolist()
            rows += queues[label][:batch_images]
            del queues[label][:batch_images]
        yield np.asarray(rows, dtype=np.int64), np.repeat(np.asarray(list(chosen), dtype=np.int64), batch_images)


def rows_by_class(labels: IntArray, rows: IntArray, order: Sequence[int]) -> list[IntArray]:
    """The rows of each class, in the order of the classes."""
    own = labels[rows]
    return [rows[own == label] for label in order]


@dataclass(frozen=True, eq=False)
class Shots:
    """What a method is given in a session.

    Attributes:
        rows: of the train part, ``shot`` of each new class after the other.
        classes: output number of every row.
        images: whose rows these are.
    """

    rows: IntArray
    classes: IntArray
    images: LabelledImages


class Stream:
    """The sessions in their order. Nothing of a session can be had before it is opened, and no session can be skipped.

    Args:
        data, split: what is cut, and how.
        draw: of the shots.
    """

    def __init__(self, data: ClassData, split: FewShotSplit, draw: int) -> None:
        self._data, self._split, self._draw = data, split, draw
        self.session = 0

    @property
    def classes(self) -> int:
        """Seen so far."""
        return self._split.seen(self.session)

    def advance(self) -> Shots:
        """Open the next session.

        Raises:
            RuntimeError: there is none.
        """
        if self.session == len(self._split.sessions):
            raise RuntimeError(
                f"there are {len(self._split.sessions)} sessions after the base session, and all are open"
            )
        before = self.classes
        self.session += 1
        rows = self._split.shots[self._draw][self.session - 1]
        classes = np.repeat(np.arange(before, self.classes), self._split.shot)
        return Shots(rows, classes, self._data.train)

    def test(self, group: int) -> tuple[IntArray, IntArray]:
        """Rows of the test part, and output numbers, of the classes that were new in session ``group``.

        Raises:
            RuntimeError: the session is not open yet.
        """
        if group > self.session:
            raise RuntimeError(
                f"test images of session {group + 1} were asked for in session {self.session + 1}: that is a leak"
            )
        rows = self._split.test[group]
        place = {label: index for index, label in enumerate(self._split.order)}
        return rows, np.array([place[label] for label in self._data.test.labels[rows].tolist()], dtype=np.int64)


def stream_seed(*parts: object) -> int:
    """A seed for one purpose."""
    return seed_hash("few-shot", *parts)
