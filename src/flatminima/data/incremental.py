"""Data sets with a train and a test part, whose images are decoded when a session of class-incremental learning asks for them.

Known by name, or a folder in one of the layouts below. Nothing is decoded before it is needed, and what was decoded is kept.

- miniImageNet: ``images/<file>`` with ``split/train.csv`` and ``split/test.csv`` (columns ``filename,label``), 500 and 100
  pictures of each of the 100 classes, as incremental papers cut it (the few-shot cut into 64, 16 and 20 classes is another);
- CUB-200-2011 as its authors pack it: ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``classes.txt`` and
  ``images/``;
- any: ``train/<class>/<file>`` and ``test/<class>/<file>``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from flatminima.data import sources
from flatminima.data.files import VARIABLE, data_folder
from flatminima.data.formats import image_folder, picture_files
from flatminima.data.registry import TEST_FRACTION
from flatminima.data.splits import DataError, IntArray, LabelledImages, PixelArray, stratified_choice
from flatminima.names import unknown

_FOLDERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "mini-imagenet": (
        ("mini-imagenet", "miniimagenet", "miniImageNet"),
        "images/ and split/train.csv, split/test.csv, or train/<class>/<file> and test/<class>/<file>; 100 classes",
    ),
    "cub-200": (
        ("cub-200", "CUB_200_2011", "cub200"),
        "the unpacked CUB_200_2011 of its authors (images.txt, train_test_split.txt, images/ ...); 200 classes",
    ),
}
_SIZES = {"mini-imagenet": 92, "cub-200": 256}

INCREMENTAL_DATASETS: Mapping[str, str] = MappingProxyType(
    {
        "digits": "1,797 handwritten digits, 8x8 gray, 10 classes; one in five of every class is for the test",
        "fashion-mnist": "70,000 pictures of clothing, 28x28 gray, 10 classes",
        "cifar100": "60,000 photographs, 32x32 RGB, 100 classes",
        "mini-imagenet": "60,000 photographs, 100 classes; a folder in FLATMINIMA_DATA",
        "cub-200": "11,788 photographs of 200 species of birds; a folder in FLATMINIMA_DATA",
    }
)
"""Names that :func:`load_incremental` takes, with one line on each."""


@dataclass(frozen=True, eq=False)
class ClassData:
    """A classification data set that can be handed out class by class.

    Attributes:
        name: of the data set.
        classes: names, in the order of the labels.
        train, test: labels, and pixels when asked for.
        shape: channels, height and width of the stored pixels (uint8).
        natural: whether they are photographs in colour.
        note: where they come from.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages
    shape: tuple[int, int, int]
    natural: bool
    note: str


def load_incremental(data: str | Path, *, size: int | None = None) -> ClassData:
    """Read labels and file names of a data set with a train and a test part; pixels are decoded when they are asked for.

    Args:
        data: a name of :data:`INCREMENTAL_DATASETS`, or the path of a folder in one of the layouts above.
        size: pixels a side that pictures in files are resized to (miniImageNet 92, CUB-200 256, other folders 64).

    Raises:
        DataError: an unknown name, a folder that is not there or has another layout; the message says what was found.

    Example:
        >>> found = load_incremental("digits")
        >>> found.shape, len(found.classes), len(found.train.labels), len(found.test.labels)
        ((1, 8, 8), 10, 1438, 359)
    """
    name = str(data)
    if size is not None and size < 1:
        raise DataError(f"size is {size}: expected a number of pixels above zero")
    if name in ("digits", "fashion-mnist", "cifar100"):
        return _of_source(name, size)
    if name in _FOLDERS:
        return _of_folder(_known(name), name, size or _SIZES[name])
    if Path(data).is_dir():
        return _of_folder(Path(data), Path(data).name, size or 64)
    raise DataError(
        f"{unknown('data set', name, INCREMENTAL_DATASETS)}, or the path of a folder; there is none of that name"
    )


def _of_source(name: str, size: int | None) -> ClassData:
    readers: Mapping[str, Callable[[], sources.Source]] = {
        "digits": sources.digits, "fashion-mnist": sources.fashion_mnist, "cifar100": sources.cifar100,
    }  # fmt: skip
    source = readers[name]()
    train, test, note = source.train, source.test, source.note
    if test is None:
        rows = round(TEST_FRACTION * len(source.strata))
        held_out, rest = stratified_choice(source.strata, rows, np.random.default_rng(0))
        train, test = source.train.subset(np.sort(rest)), source.train.subset(np.sort(held_out))
        note += " One row in five of every class is for the test, chosen once and for all."
    shape = tuple(int(n) for n in train.pixels(np.arange(1)).shape[1:])
    if size is not None and size != shape[1]:
        raise DataError(f"size is {size}: {name} has {shape[1]} pixels a side; a model that wants fewer pools them")
    channels, height, width = shape
    return ClassData(
        name, source.classes, kept(train, (channels, height, width)), kept(test, (channels, height, width)),
        (channels, height, width), name == "cifar100", note,
    )  # fmt: skip


def _known(name: str) -> Path:
    folders, layout = _FOLDERS[name]
    root = data_folder()
    at = next((root / f for f in folders if root is not None and (root / f).is_dir()), None)
    if at is None:
        where = f"no folder {' or '.join(folders)} in {VARIABLE}" if root else f"{VARIABLE} is not set"
        raise DataError(f"{name} was not found ({where}). Expected there: {layout}; or name its folder")
    return at


def _of_folder(folder: Path, name: str, side: int) -> ClassData:
    size = (side, side)
    if (folder / "train_test_split.txt").is_file():
        classes, train, test = _cub(folder, size)
    elif (folder / "split").is_dir():
        classes, train, test = _listed(folder, size)
    elif (folder / "train").is_dir() and (folder / "test").is_dir():
        classes = tuple(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir() and p.name[0] != "."))
        if not classes:
            raise DataError(f"no class folders in {folder / 'train'}: expected train/<class>/<file>")
        train, test = (image_folder(folder / part, classes, size) for part in ("train", "test"))
    else:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{folder} holds {found}: expected train/<class>/<file> and test/<class>/<file>, images/ with split/train.csv "
            "and split/test.csv, or the files of CUB_200_2011"
        )
    shape = (3, side, side)
    note = f"Pictures in the folder {folder.name}, {side}x{side} pixels."
    return ClassData(name, classes, kept(readable(train), shape), kept(readable(test), shape), shape, True, note)


_Parts = tuple[tuple[str, ...], LabelledImages, LabelledImages]


def _listed(folder: Path, size: tuple[int, int]) -> _Parts:
    """``images/`` with one list of (filename, label) for each part; classes in the order of their sorted names."""
    lists = {part: _rows_of(folder / "split" / f"{part}.csv") for part in ("train", "test")}
    classes = tuple(sorted({label for _, label in lists["train"]}))
    index = {label: i for i, label in enumerate(classes)}
    learned = {file for file, _ in lists["train"]}
    if both := next((file for file, _ in lists["test"] if file in learned), None):
        raise DataError(f"{both} is in train.csv and in test.csv: a test image must not be trained on")
    parts = []
    for part, rows in lists.items():
        if strange := sorted({label for _, label in rows} - index.keys()):
            raise DataError(
                f"{folder / 'split' / part}.csv has the class {strange[0]!r}, which train.csv does not have"
            )
        files = [folder / "images" / file for file, _ in rows]
        if absent := next((file for file in files if not file.is_file()), None):
            raise DataError(f"{absent} is listed in {part}.csv and does not exist")
        if len(set(files)) < len(files):
            twice = next(file for file in files if files.count(file) > 1)
            raise DataError(f"{twice.name} is in {part}.csv twice")
        names = [f"{label}/{file}" for file, label in rows]
        parts.append(picture_files(files, [index[label] for _, label in rows], names, size))
    return classes, parts[0], parts[1]


def _rows_of(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: expected columns filename,label") from error
    if not rows or not {"filename", "label"} <= rows[0].keys():
        raise DataError(f"{path} has columns {', '.join(rows[0]) if rows else 'none'}: expected filename,label")
    for number, row in enumerate(rows, 2):
        for column in ("filename", "label"):
            if not row[column]:
                raise DataError(f"{path}, line {number}, has no {column}")
    return [(row["filename"], row["label"]) for row in rows]


def _cub(folder: Path, size: tuple[int, int]) -> _Parts:
    """The official lists, whose lines are ``<image number> <value>``."""
    files, labels, training, names = (
        _pairs(folder / name)
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    )
    for name, other in (("image_class_labels.txt", labels), ("train_test_split.txt", training)):
        if other.keys() != files.keys():
            raise DataError(
                f"{folder / name} lists {len(other)} pictures and images.txt {len(files)}: expected the same"
            )
    if bad := next((number for number in names if not number.isdecimal()), None):
        raise DataError(f"{folder / 'classes.txt'} has the number {bad!r}: expected whole numbers")
    if unnamed := next((label for label in labels.values() if label not in names), None):
        raise DataError(f"{folder / 'image_class_labels.txt'} has class {unnamed}, which classes.txt does not have")
    if other_flag := next((flag for flag in training.values() if flag not in ("0", "1")), None):
        raise DataError(f"{folder / 'train_test_split.txt'} has {other_flag!r}: expected 1 or 0")
    numbers = sorted(names, key=int)
    index = {number: i for i, number in enumerate(numbers)}
    parts = []
    for flag in ("1", "0"):
        keys = [key for key in files if training[key] == flag]
        paths = [folder / "images" / files[key] for key in keys]
        if absent := next((path for path in paths if not path.is_file()), None):
            raise DataError(f"{absent} is listed in images.txt and does not exist")
        parts.append(picture_files(paths, [index[labels[key]] for key in keys], [files[key] for key in keys], size))
    return tuple(names[number] for number in numbers), parts[0], parts[1]


def _pairs(path: Path) -> dict[str, str]:
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: it belongs to CUB_200_2011") from error
    if bad := next((number for number, line in enumerate(lines, 1) if len(line) != 2), None):
        raise DataError(f"{path}, line {bad}, is not a number and a value")
    return {key: value.strip() for key, value in lines}


def readable(images: LabelledImages) -> LabelledImages:
    """The same images, whose ``check()`` decodes every one and keeps none: a download that was cut short has a whole header."""

    def check() -> None:
        for row in range(len(images.labels)):
            images.pixels(np.array([row]))

    return LabelledImages(images.labels, images.pixels, check, images.names)


def kept(images: LabelledImages, shape: tuple[int, int, int]) -> LabelledImages:
    """The same images, each decoded at most once: pixels stay in memory, which is only used up by rows that were asked for."""
    held: list[PixelArray] = []
    there = np.zeros(len(images.labels), dtype=bool)

    def pixels(rows: IntArray) -> PixelArray:
        if not held:
            try:
                held.append(np.empty((len(there), *shape), dtype=np.uint8))
            except MemoryError as error:
                gibibytes = len(there) * math.prod(shape) / 2**30
                raise DataError(
                    f"{len(there)} pictures of {shape[1]}x{shape[2]} pixels need {gibibytes:.0f} GiB of memory: choose "
                    "a smaller size"
                ) from error
        missing = np.unique(rows[~there[rows]])
        if len(missing):
            held[0][missing] = images.pixels(missing)
            there[missing] = True
        found: PixelArray = held[0][rows]
        return found

    return LabelledImages(images.labels, pixels, images.check, images.names)
