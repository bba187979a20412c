"""Data sets of several domains, for leaving one out: pictures in folders or parquet files, and the two made of MNIST."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from flatminima.data import sources
from flatminima.data.files import VARIABLE, data_folder, verify
from flatminima.data.formats import image_folder, in_memory, read_parquet
from flatminima.data.mnist_domains import ANGLES, COLOUR_NOISE, colored_mnist, rotated_mnist
from flatminima.data.splits import DataError, IntArray, LabelledImages, stratified_choice
from flatminima.names import unknown

MEMORY = 4 * 2**30  # bytes of decoded pixels that are kept; larger data sets are decoded batch by batch


@dataclass(frozen=True)
class Pictures:
    """A known data set of pictures ``<folder>/<domain>/<class>/<file>``.

    Attributes:
        folders: names it goes by, inside the data folder.
        domains: in index order, which is that of their sorted names.
        classes: how many.
        images: how many, published.
        site: where its authors give it away. None of them publishes checksums.
        text: one line.
    """

    folders: tuple[str, ...]
    domains: tuple[str, ...]
    classes: int
    images: int
    site: str
    text: str


PICTURES: Mapping[str, Pictures] = MappingProxyType(
    {
        "pacs": Pictures(
            ("pacs", "PACS"), tuple(sources.PACS_DOMAINS), 7, 9_991,
            "the project page of Li et al., ICCV 2017 (eecs.qmul.ac.uk/~dl307/project_iccv2017)",
            "9,991 art paintings, cartoons, photos and sketches of 7 classes",
        ),
        "vlcs": Pictures(
            ("vlcs", "VLCS"), ("Caltech101", "LabelMe", "SUN09", "VOC2007"), 5, 10_729,
            "the project page of Li et al., ICCV 2017 (eecs.qmul.ac.uk/~dl307/project_iccv2017)",
            "10,729 photographs from 4 collections, 5 classes",
        ),
        "office-home": Pictures(
            ("office-home", "office_home", "OfficeHome"), ("Art", "Clipart", "Product", "Real World"), 65, 15_588,
            "the authors' page (hemanthdv.org/OfficeHome-Dataset)",
            "15,588 pictures of things in home and office, 4 domains, 65 classes",
        ),
        "terra-incognita": Pictures(
            ("terra-incognita", "terra_incognita", "TerraIncognita"),
            ("location_100", "location_38", "location_43", "location_46"), 10, 24_788,
            "the Caltech Camera Traps of LILA (lila.science/datasets/caltech-camera-traps), sorted by location and class",
            "24,788 pictures from 4 camera traps, 10 classes",
        ),
        "domainnet": Pictures(
            ("domainnet", "domain_net", "DomainNet"), ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
            345, 586_575, "the authors' page (ai.bu.edu/M3SDA)", "586,575 pictures of 6 styles, 345 classes",
        ),
    }
)  # fmt: skip

DOMAIN_DATASETS: Mapping[str, str] = MappingProxyType(
    {
        "rotated-mnist": "70,000 digits dealt to 6 domains, turned by 0 to 75 degrees; made from MNIST",
        "colored-mnist": "70,000 digits dealt to 3 domains whose colour predicts a noisy label, or its opposite; from MNIST",
        **{name: known.text for name, known in PICTURES.items()},
    }
)
"""Names that :func:`load_domains` takes, with one line on each."""


@dataclass(frozen=True, eq=False)
class MultiDomain:
    """A data set of several domains with the same classes.

    Attributes:
        name: of the data set.
        classes: names, in the order of the labels.
        domains: name -> images, in index order.
        shape: channels, height and width of the stored pixels (uint8).
        natural: whether they are photographs or drawings in colour: to be augmented, and standardised like ImageNet.
        note: where they come from.
    """

    name: str
    classes: tuple[str, ...]
    domains: Mapping[str, LabelledImages]
    shape: tuple[int, int, int]
    natural: bool
    note: str

    def counts(self) -> dict[str, list[int]]:
        """Images of each class in each domain."""
        return {
            name: np.bincount(images.labels, minlength=len(self.classes)).tolist()
            for name, images in self.domains.items()
        }


def load_domains(
    data: str | Path,
    *,
    size: int | None = None,
    data_seed: int = 0,
    interpolation: str = "bilinear",
    rows: int | None = None,
    memory: int = MEMORY,
) -> MultiDomain:
    """Read a data set of several domains, and refuse it before anything is trained if it cannot be used.

    Args:
        data: one of :data:`DOMAIN_DATASETS`, looked up in the folder that ``FLATMINIMA_DATA`` names; or a folder that holds
            ``<domain>/<class>/<file>`` or ``<domain>.parquet`` for every domain.
        size: pixels a side; pictures of another size are resized (Lanczos). Default: 64 for pictures, 28 for MNIST, which
            has no other.
        data_seed: of the environments of the MNIST sets, and of ``rows``.
        interpolation: of RotatedMNIST.
        rows: keep so many images of each domain, each class in proportion.
        memory: bytes of pixels to decode now. Every image of a smaller data set is read now, so that a broken file is
            named now; of a larger one only the headers are.

    Raises:
        DataError: unknown name, missing files, fewer than two domains, a domain that lacks a class (both named), an image that
            cannot be read (named).

    Example:
        >>> load_domains("rotated")
        Traceback (most recent call last):
        flatminima.data.splits.DataError: unknown data set 'rotated': expected one of rotated-mnist, ... (nearest first)...
    """
    if data_seed < 0:
        raise DataError(f"data_seed is {data_seed}: expected a non-negative integer")
    if rows is not None and rows < 2:
        raise DataError(f"rows is {rows}: expected at least 2 a domain, one to train on and one to hold out")
    if size is not None and size < 1:
        raise DataError(f"size is {size}: expected a number of pixels above zero")
    if str(data) in ("rotated-mnist", "colored-mnist"):
        return _mnist(str(data), size, data_seed, interpolation, rows)
    side = size or sources.PACS_SIZE[0]
    if str(data) in PICTURES:
        name, found = str(data), _known(str(data), side)
        known = PICTURES[name]
        note = f"{known.text}; {side}x{side} pixels."
        images = sum(len(domain.labels) for domain in found[1].values())
        if images != known.images:
            note += f" {images:,} images were found, {known.images:,} are published."
    elif Path(data).is_dir():
        name, found = Path(data).name, _folder(Path(data), side)
        note = f"Pictures in the folder {Path(data).name}, {side}x{side} pixels."
    else:
        raise DataError(
            f"{unknown('data set', str(data), DOMAIN_DATASETS)}, or the path of a folder; there is none of that name"
        )
    classes, domains = found
    kept = {domain: _subset(images, rows, data_seed) for domain, images in domains.items()}
    pixels = sum(len(images.labels) for images in kept.values()) * 3 * side * side
    if pixels <= memory:
        kept = {
            domain: in_memory(images.pixels(np.arange(len(images.labels))), images.labels)
            for domain, images in kept.items()
        }
    else:
        for domain in domains.values():
            if domain.check is not None:
                domain.check()
    return MultiDomain(name, classes, MappingProxyType(kept), (3, side, side), True, note)


def _mnist(name: str, size: int | None, data_seed: int, interpolation: str, rows: int | None) -> MultiDomain:
    if size not in (None, 28):
        raise DataError(f"size is {size}: {name} has 28 pixels a side; a model that wants fewer pools them")
    if name == "rotated-mnist":
        domains, classes = rotated_mnist(data_seed, interpolation), tuple("0123456789")
        note = f"MNIST dealt to {len(ANGLES)} domains by seed {data_seed}, turned with {interpolation} interpolation."
    else:
        domains, classes = colored_mnist(data_seed), ("5 to 9", "0 to 4")
        note = (
            f"MNIST dealt to {len(COLOUR_NOISE)} domains by seed {data_seed}, coloured; 25 % of the labels are noise."
        )
    kept = {domain: _subset(images, rows, data_seed) for domain, images in domains.items()}
    channels = 1 if name == "rotated-mnist" else 2
    return MultiDomain(name, classes, MappingProxyType(kept), (channels, 28, 28), False, note)


def _subset(images: LabelledImages, rows: int | None, seed: int) -> LabelledImages:
    if rows is None or rows >= len(images.labels):
        return images
    chosen = np.sort(stratified_choice(images.labels, rows, np.random.default_rng(seed))[0])

    def pixels(wanted: IntArray) -> np.ndarray:
        return images.pixels(chosen[wanted])

    return LabelledImages(images.labels[chosen], pixels)


_Found = tuple[tuple[str, ...], dict[str, LabelledImages]]


def _known(name: str, side: int) -> _Found:
    known, folder = PICTURES[name], data_folder()
    at = next((folder / f for f in known.folders if folder is not None and (folder / f).is_dir()), None)
    if at is None:
        where = f"no folder {' or '.join(known.folders)} in {VARIABLE}" if folder else f"{VARIABLE} is not set"
        raise DataError(
            f"{name} was not found ({where}). Get it from {known.site}, put it there as "
            f"{known.folders[0]}/<domain>/<class>/<file> with the domains {', '.join(known.domains)}, or name its folder"
        )
    if name == "pacs":
        for domain, checksum in sources.PACS_DOMAINS.items():
            if (at / f"{domain}.parquet").is_file():
                verify(at / f"{domain}.parquet", checksum)
    classes, domains = _folder(at, side, known.domains)
    if len(classes) != known.classes:
        raise DataError(f"{at} has {len(classes)} classes: {name} has {known.classes}")
    return classes, domains


def _folder(folder: Path, side: int, expected: tuple[str, ...] | None = None) -> _Found:
    """Domains as parquet files or as folders, their classes checked against each other."""
    files = {path.stem: path for path in sorted(folder.glob("*.parquet")) if not path.name.startswith(".")}
    folders = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    names = sorted(files.keys() | folders.keys())
    if expected is not None and (missing := [name for name in expected if name not in names]):
        raise DataError(
            f"{folder} lacks the domain{'s' if len(missing) > 1 else ''} {', '.join(missing)}: found {', '.join(names)}"
        )
    names = list(expected) if expected is not None else names
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise DataError(
            f"{folder} holds {found}: leaving one domain out needs at least two, each a folder <domain>/<class>/<file> or a "
            "file <domain>.parquet"
        )
    if any(name in files for name in names):
        return _parquet({name: _required(files, name, folder) for name in names}, side)
    per_domain = {name: _classes(folders[name]) for name in names}
    classes = _same_classes(per_domain)
    return classes, {name: image_folder(folders[name], classes, (side, side)) for name in names}


def _required(files: Mapping[str, Path], name: str, folder: Path) -> Path:
    if name not in files:
        raise DataError(f"{folder} holds parquet files for {', '.join(files)} but not for the domain {name!r}")
    return files[name]


def _parquet(files: Mapping[str, Path], side: int) -> _Found:
    read = {name: read_parquet(path, (side, side)) for name, path in files.items()}
    first = next(iter(read.values())).classes
    for name, content in read.items():
        if content.classes != first:
            raise DataError(
                f"{files[name]} names the classes {list(content.classes)}, another domain {list(first)}: they must be equal"
            )
    present = {name: {first[label] for label in set(content.images.labels.tolist())} for name, content in read.items()}
    _same_classes(present)
    return first, {name: content.images for name, content in read.items()}


def _classes(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}


def _same_classes(present: Mapping[str, set[str]]) -> tuple[str, ...]:
    every = sorted(set().union(*present.values()))
    for name, classes in present.items():
        if lacking := [label for label in every if label not in classes]:
            having = [other for other, theirs in present.items() if lacking[0] in theirs]
            raise DataError(
                f"domain {name!r} has no class {', '.join(map(repr, lacking))}, which {', '.join(having)} "
                f"{'has' if len(having) == 1 else 'have'}: every domain needs the same classes"
            )
    if not every:
        raise DataError(f"no class folders in the domains {', '.join(present)}: expected <domain>/<class>/<file>")
    return tuple(every)
