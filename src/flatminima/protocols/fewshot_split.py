"""Who is a base class, who comes in which session, and which images are the shots: plain arrays of row numbers, kept as JSON.

A split belongs to a data set, not to a method, and any other code can use the file: rows count the train and the test part of
the data set in the order in which :func:`flatminima.data.load_incremental` reads it, and shots carry their file names too,
where there are any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flatminima.data.domain_splits import seed_hash
from flatminima.data.incremental import ClassData
from flatminima.data.splits import DataError, IntArray
from flatminima.names import unknown

ORDERS = ("random", "sorted")


@dataclass(frozen=True, eq=False)
class FewShotSplit:
    """Base classes and sessions of one class order, with several draws of shots.

    Attributes:
        data: name of the data set.
        classes: names of all its classes, in the order of its labels.
        base: labels of the base classes, in the order of the network's outputs.
        sessions: labels of the new classes of every later session, in that order too.
        shot: images per new class.
        train: rows of the train part the base network learns from.
        held_out: rows of base classes in the train part that validate; may be empty.
        shots: per draw and session, rows of the train part, ``shot`` of each class after the other.
        test: rows of the test part of the classes that are new in each session, the base classes first.
        files: per draw and session, names of the shots' files; empty where files have no names.
        seed: that made it.
    """

    data: str
    classes: tuple[str, ...]
    base: tuple[int, ...]
    sessions: tuple[tuple[int, ...], ...]
    shot: int
    train: IntArray
    held_out: IntArray
    shots: tuple[tuple[IntArray, ...], ...]
    test: tuple[IntArray, ...]
    files: tuple[tuple[tuple[str, ...], ...], ...] = ()
    seed: int | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """All labels in the order of the network's outputs."""
        return (*self.base, *(label for session in self.sessions for label in session))

    def seen(self, session: int) -> int:
        """How many classes there are after ``session`` (0: the base session)."""
        return len(self.base) + sum(len(labels) for labels in self.sessions[:session])

    def to_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` takes it back."""
        return {
            "schema": 1, "kind": "few-shot split", "data": self.data, "classes": list(self.classes), "seed": self.seed,
            "shot": self.shot, "base": list(self.base), "sessions": [list(labels) for labels in self.sessions],
            "train": self.train.tolist(), "held_out": self.held_out.tolist(),
            "shots": [[rows.tolist() for rows in draw] for draw in self.shots],
            "files": [[list(names) for names in draw] for draw in self.files], "test": [rows.tolist() for rows in self.test],
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        path.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @staticmethod
    def from_dict(content: Any) -> FewShotSplit:
        """The split in what :meth:`to_dict` gave.

        Raises:
            DataError: a field is missing or of another kind.
        """
        try:
            if content["schema"] != 1 or content["kind"] != "few-shot split":
                raise DataError(f"schema {content['schema']!r} of {content['kind']!r}: expected 1 of 'few-shot split'")
            return FewShotSplit(
                data=str(content["data"]), classes=tuple(content["classes"]), base=tuple(map(_whole, content["base"])),
                sessions=tuple(tuple(map(_whole, labels)) for labels in content["sessions"]), shot=_whole(content["shot"]),
                train=_rows(content["train"]), held_out=_rows(content["held_out"]),
                shots=tuple(tuple(map(_rows, draw)) for draw in content["shots"]), test=tuple(map(_rows, content["test"])),
                files=tuple(tuple(map(tuple, draw)) for draw in content["files"]), seed=content["seed"],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"this is no few-shot split: {type(error).__name__} {error}") from error


def _rows(values: Sequence[int]) -> IntArray:
    return np.array([_whole(value) for value in values], dtype=np.int64)


def _whole(value: Any) -> int:
    """A number of the file; one that had to be rounded would name another image."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def make_split(
    data: ClassData,
    *,
    base: int,
    way: int,
    shot: int,
    sessions: int | None = None,
    order: str | Sequence[int] = "random",
    draws: int = 1,
    seed: int = 0,
    base_images: int | None = None,
    test_images: int | None = None,
    held_out: float = 0.0,
) -> FewShotSplit:
    """Cut a data set into a base session and few-shot sessions.

    Which classes are base, which images are held out and which are the shots of a draw come from streams of their own, so
    a draw has the same shots however many others there are.

    Args:
        data: what is cut.
        base: base classes.
        way: new classes of every later session.
        shot: images of each new class.
        sessions: after the base session; as many as the classes allow by default.
        order: ``"random"`` (decided by ``seed``), ``"sorted"`` (that of the labels), or the labels themselves.
        draws: of shots.
        seed: of class order, shots and rows held out.
        base_images, test_images: of each class, at most; all by default.
        held_out: part of the images of every base class that validates.

    Raises:
        DataError: more classes than there are, a class twice, fewer images than shots, a class without images.

    Example:
        >>> from flatminima.data import load_incremental
        >>> split = make_split(load_incremental("digits"), base=6, way=2, shot=5, order="sorted")
        >>> split.base, split.sessions, [len(rows) for rows in split.shots[0]], split.seen(1)
        ((0, 1, 2, 3, 4, 5), ((6, 7), (8, 9)), [10, 10], 8)
    """
    for name, value in (
        ("base", base), ("way", way), ("shot", shot), ("draws", draws), ("base_images", base_images),
        ("test_images", test_images), ("sessions", sessions),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
    if not 0 <= held_out < 1:
        raise DataError(f"held_out must lie between 0 and 1, got {held_out}")
    count = len(data.classes)
    labels = _order(order, count, seed)
    later = (len(labels) - base) // way if sessions is None else sessions
    if later < 1 or base + later * way > len(labels):
        raise DataError(
            f"{base} base classes and {max(later, 1)} sessions of {way} need {base + max(later, 1) * way} classes: "
            f"{data.name} has {len(labels)}{'' if len(labels) == count else ' in the order given'}"
        )
    ends = [base + t * way for t in range(later + 1)]
    train, out = [], []
    for label in labels[:base]:
        rows = _of(data.train.labels, label, data, "train", base_images, seed_hash("base", seed, label))
        kept = len(rows) - int(held_out * len(rows))
        train.append(rows[:kept])
        out.append(rows[kept:])
    new = [labels[low:high] for low, high in pairwise(ends)]
    shots = tuple(
        tuple(np.concatenate([_shots(data, label, shot, seed, draw) for label in session]) for session in new)
        for draw in range(draws)
    )
    test = tuple(
        np.concatenate([
            np.sort(_of(data.test.labels, label, data, "test", test_images, seed_hash("test", label))) for label in group
        ])
        for group in (labels[:base], *new)
    )  # fmt: skip
    names = data.train.names
    files = () if names is None else tuple(tuple(tuple(names[i] for i in rows) for rows in draw) for draw in shots)
    split = FewShotSplit(
        data.name, data.classes, tuple(labels[:base]), tuple(map(tuple, new)), shot, np.concatenate(train),
        np.concatenate(out), shots, test, files, seed,
    )  # fmt: skip
    check_split(split, data)
    return split


def load_split(path: str | Path, data: ClassData) -> FewShotSplit:
    """Read a split and check that it fits the data set.

    Raises:
        DataError: the file cannot be read, or does not fit; see :func:`check_split`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the split {path} cannot be read: {error}") from error
    try:
        split = FewShotSplit.from_dict(content)
        check_split(split, data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return split


def check_split(split: FewShotSplit, data: ClassData) -> None:
    """Refuse a split that does not fit its data set, or that would leak.

    Raises:
        DataError: other classes; a class in two sessions; a session without classes, shots or test images; rows that do not
            exist, occur twice, or belong to a class of another session; another number of shots than said; shots whose files
            have other names, so that rows count something else.
    """
    if split.classes != data.classes:
        raise DataError(f"the split is of {len(split.classes)} classes of {split.data}, {data.name} has others")
    order = split.order
    if not split.base or not split.sessions:
        raise DataError("the split has no base classes or no later session")
    if bad := [label for label in order if not 0 <= label < len(data.classes)]:
        raise DataError(f"class {bad[0]} does not exist: {data.name} has classes 0 to {len(data.classes) - 1}")
    if split.shot < 1:
        raise DataError(f"shot is {split.shot}: expected at least 1")
    places: dict[int, int] = {}
    for t, group in enumerate((split.base, *split.sessions)):
        if not group:
            raise DataError(f"session {t + 1} has no classes")
        for label in group:
            if label in places:
                where = (
                    f"in session {t + 1} twice"
                    if places[label] == t
                    else f"in sessions {places[label] + 1} and {t + 1}"
                )
                raise DataError(f"class {data.classes[label]!r} is {where}: every class is new once")
            places[label] = t
    _check_rows(split.train, data.train.labels, split.base, "the base images", data)
    _check_rows(split.held_out, data.train.labels, split.base, "the base images held out", data, may_lack=True)
    if len(np.intersect1d(split.train, split.held_out)):
        raise DataError("an image is held out and trained on")
    if not split.shots or len(split.test) != len(split.sessions) + 1:
        raise DataError(f"the split has {len(split.shots)} draws and test rows of {len(split.test)} sessions")
    for number, draw in enumerate(split.shots):
        if len(draw) != len(split.sessions):
            raise DataError(f"draw {number} has shots of {len(draw)} sessions: expected {len(split.sessions)}")
        for t, (rows, group) in enumerate(zip(draw, split.sessions, strict=True), 2):
            if len(rows) == 0:
                raise DataError(f"session {t} has no images in draw {number}")
            _check_rows(rows, data.train.labels, group, f"the shots of session {t}, draw {number},", data)
            expected = np.repeat(np.asarray(group), split.shot)
            if len(rows) != len(expected) or not np.array_equal(data.train.labels[rows], expected):
                raise DataError(
                    f"the shots of session {t}, draw {number}, are not {split.shot} of each class in its order"
                )
    for t, (rows, group) in enumerate(zip(split.test, (split.base, *split.sessions), strict=True), 1):
        _check_rows(rows, data.test.labels, group, f"the test images of session {t}", data)
    if split.files and data.train.names is not None:
        _check_files(split, data.train.names)


def _check_files(split: FewShotSplit, names: Sequence[str]) -> None:
    """Refuse a split whose shots are other files now: one picture more in a folder moves the rows of all that follow."""
    here = [[[names[row] for row in rows] for rows in draw] for draw in split.shots]
    there = [[list(files) for files in draw] for draw in split.files]
    if here == there:
        return
    differ = [
        (number, t, one, other)
        for number, (draw, same) in enumerate(zip(here, there, strict=False))
        for t, (ones, others) in enumerate(zip(draw, same, strict=False), 2)
        for one, other in zip(ones, others, strict=False)
        if one != other
    ]
    if not differ:
        raise DataError("there is not one file name for every shot")
    number, t, one, other = differ[0]
    raise DataError(
        f"a shot of session {t}, draw {number}, is the file {other!r}, whose row is that of {one!r} now: the pictures are not "
        "those that the split was made of"
    )


def _check_rows(
    rows: IntArray, labels: IntArray, group: Sequence[int], what: str, data: ClassData, may_lack: bool = False
) -> None:
    if len(rows) and (rows.min() < 0 or rows.max() >= len(labels)):
        raise DataError(f"{what} have row {int(rows.max())}: there are {len(labels)}")
    if len(np.unique(rows)) != len(rows):
        raise DataError(f"{what} hold a row twice")
    present = set(labels[rows].tolist())
    if strange := sorted(present - set(group)):
        raise DataError(f"{what} hold class {data.classes[strange[0]]!r}, which belongs to another session")
    if not may_lack and (absent := sorted(set(group) - present)):
        raise DataError(f"{what} hold none of class {data.classes[absent[0]]!r}")


def _order(order: str | Sequence[int], count: int, seed: int) -> list[int]:
    if isinstance(order, str):
        if order not in ORDERS:
            raise DataError(unknown("class order", order, ORDERS))
        if order == "sorted":
            return list(range(count))
        return [int(label) for label in np.random.default_rng(seed_hash("order", seed)).permutation(count)]
    labels = [int(label) for label in order]
    if bad := [label for label in labels if not 0 <= label < count]:
        raise DataError(f"class {bad[0]} does not exist: there are classes 0 to {count - 1}")
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise DataError(f"class {twice[0]} is in the order twice: every class is new once")
    return labels


def _of(labels: IntArray, label: int, data: ClassData, part: str, limit: int | None, seed: int) -> IntArray:
    """Rows of a class in random order, ``limit`` of them at most."""
    rows = np.flatnonzero(labels == label)
    if len(rows) == 0:
        raise DataError(f"class {data.classes[label]!r} has no images in the {part} part of {data.name}")
    found: IntArray = np.random.default_rng(seed).permutation(rows)[:limit]
    return found


def _shots(data: ClassData, label: int, shot: int, seed: int, draw: int) -> IntArray:
    rows = _of(data.train.labels, label, data, "train", None, seed_hash("shots", seed, draw, label))
    if len(rows) < shot:
        raise DataError(
            f"class {data.classes[label]!r} has {len(rows)} train images: expected at least {shot}, the shots"
        )
    return rows[:shot]


def validation_data(data: ClassData, split: FewShotSplit, fraction: float = 0.2) -> ClassData:
    """A data set made of the base images alone, to choose settings on: its classes are the base classes, its test part a
    ``fraction`` of their train images. A split of it has pseudo-new classes, and nothing of it is novel or from the test part.

    Raises:
        DataError: a part would be empty.
    """
    rows = np.concatenate([split.train, split.held_out])
    place = {label: i for i, label in enumerate(split.base)}
    labels = np.array([place[label] for label in data.train.labels[rows].tolist()], dtype=np.int64)
    parts: tuple[list[IntArray], list[IntArray]] = ([], [])
    for index in range(len(split.base)):
        mine = np.random.default_rng(seed_hash("validation", split.seed, index)).permutation(rows[labels == index])
        cut = int(fraction * len(mine))
        if not 0 < cut < len(mine):
            raise DataError(
                f"{fraction:g} of {len(mine)} images of a base class leave nothing to validate or to train on"
            )
        parts[0].append(mine[cut:])
        parts[1].append(mine[:cut])
    made = []
    for part in parts:
        images = data.train.subset(np.concatenate(part))
        renamed = np.array([place[label] for label in images.labels.tolist()], dtype=np.int64)
        made.append(type(images)(renamed, images.pixels, images.check, images.names))
    names = tuple(data.classes[label] for label in split.base)
    note = f"{data.note} Base classes only: some play the new ones, and the test images are train images."
    return ClassData(f"{data.name}, validation", names, made[0], made[1], data.shape, data.natural, note)
