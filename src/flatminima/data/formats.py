"""Readers for the file formats: gzip IDX, the CIFAR binary archive, parquet of encoded images, folders of images.

None of them can execute anything that a file contains: no pickle is opened, no archive is unpacked to disk.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatminima.data.splits import DataError, IntArray, LabelledImages, PixelArray

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


def read_idx(path: Path) -> PixelArray:
    """The uint8 array of a gzip IDX file: 2 zero bytes, type 0x08, number of axes, big-endian int32 lengths, data."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4].hex() or 'nothing'}")
    start = 4 + 4 * content[3]
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], dtype=">i4"))
    if len(content) != start + math.prod(shape) or len(shape) != content[3]:
        raise DataError(
            f"{path} holds {len(content) - start} bytes of data: expected {math.prod(shape)} for shape {shape}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def idx_images(images: Path, labels: Path) -> LabelledImages:
    """Gray images `(N, 1, H, W)` with their labels, from a pair of IDX files."""
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
        raise DataError(f"{images} has shape {x.shape} and {labels} has shape {y.shape}: expected (N, H, W) and (N,)")
    return in_memory(x[:, None], y)


def in_memory(pixels: PixelArray, labels: Any) -> LabelledImages:
    """Images that are decoded already, `(N, C, H, W)`."""
    return LabelledImages(np.asarray(labels, dtype=np.int64), lambda rows: pixels[rows])


@dataclass(frozen=True)
class CifarArchive:
    """What the binary version of CIFAR-10 or CIFAR-100 holds (fine labels)."""

    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]


def read_cifar_archive(path: Path) -> CifarArchive:
    """Read a "binary version" tarball: records of label byte(s), the last being the class, and 3072 pixel bytes.

    CIFAR-10 has one label byte (`data_batch_1.bin` .. `data_batch_5.bin`, `test_batch.bin`, `batches.meta.txt`),
    CIFAR-100 two, coarse then fine (`train.bin`, `test.bin`, `fine_label_names.txt`). Members are read in memory by
    their base name; nothing is unpacked, so paths inside the archive do not matter.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = {
                Path(member.name).name: stream.read()
                for member in archive
                if member.isfile() and (stream := archive.extractfile(member)) is not None
            }
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is not a complete tar.gz archive: {error}") from error
    if "batches.meta.txt" in members:
        names, label_bytes = "batches.meta.txt", 1
        train = sorted(name for name in members if name.startswith("data_batch_") and name.endswith(".bin"))
        test = "test_batch.bin"
    else:
        names, label_bytes = "fine_label_names.txt", 2
        train, test = ["train.bin"], "test.bin"
    for name in (names, *train, test):
        if name not in members:
            raise DataError(f"{path} has no {name}: expected the binary version of CIFAR-10 or CIFAR-100")

    def images(files: Sequence[str]) -> LabelledImages:
        record = label_bytes + 3072
        for name in files:
            if len(members[name]) % record:
                raise DataError(f"{name} in {path} has {len(members[name])} bytes: expected a multiple of {record}")
        rows = np.frombuffer(b"".join(members[name] for name in files), dtype=np.uint8).reshape(-1, record)
        return in_memory(rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1])

    classes = tuple(members[names].decode("utf-8").split())
    return CifarArchive(images(train), images([test]), classes)


@dataclass(frozen=True)
class ParquetImages:
    """A parquet file of encoded images: all rows, the `split` column where there is one, the class names."""

    images: LabelledImages
    split: tuple[str, ...] | None
    classes: tuple[str, ...]


def read_parquet(path: Path, size: tuple[int, int]) -> ParquetImages:
    """Read columns `image` (one encoded image file per cell), `label` and, if present, `split` and `file_name`.

    Class names come from the schema metadata `class_names` (JSON). Images stay encoded until their pixels are asked
    for, at about 0.1 ms each for 32x32 JPEG.
    """
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(path)
    names = set(parquet.schema_arrow.names)
    metadata = parquet.schema_arrow.metadata or {}
    if not {"image", "label"} <= names or b"class_names" not in metadata:
        raise DataError(f"{path} has columns {sorted(names)}: expected image and label, and metadata class_names")
    table = parquet.read(columns=["image", "label", *(name for name in ("split", "file_name") if name in names)])
    encoded: list[bytes] = table["image"].to_pylist()

    def pixels(rows: IntArray) -> PixelArray:
        return _stack([decode(encoded[row], size, f"{path}, row {row}") for row in rows], size)

    def check() -> None:
        for row, content in enumerate(encoded):
            opened(content, f"{path}, row {row}")

    return ParquetImages(
        LabelledImages(
            np.asarray(table["label"].to_pylist(), dtype=np.int64),
            pixels,
            check,
            table["file_name"].to_pylist() if "file_name" in names else None,
        ),
        tuple(table["split"].to_pylist()) if "split" in names else None,
        tuple(json.loads(metadata[b"class_names"])),
    )


def image_folder(folder: Path, classes: Sequence[str], size: tuple[int, int]) -> LabelledImages:
    """Images laid out as `folder/<class>/<file>`: classes numbered in the given order, files sorted by name.

    Files that are no images by their suffix, and hidden ones, are passed over. Another size is resized (Lanczos).
    """
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if found != sorted(classes):
        raise DataError(f"{folder} has class folders {found}: expected {sorted(classes)}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(
            file
            for file in (folder / name).iterdir()
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        )
        if not images:
            raise DataError(f"empty data set: {folder / name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        files += images
        labels += [label] * len(images)
    return picture_files(files, labels, [f"{file.parent.name}/{file.name}" for file in files], size)


def picture_files(
    files: Sequence[Path], labels: Sequence[int], names: Sequence[str], size: tuple[int, int]
) -> LabelledImages:
    """Images in files that exist, one label and one name each. Another size is resized (Lanczos)."""

    def pixels(rows: IntArray) -> PixelArray:
        return _stack([decode(files[row].read_bytes(), size, str(files[row])) for row in rows], size)

    def check() -> None:
        for file in files:
            opened(file.read_bytes(), str(file))

    return LabelledImages(np.asarray(labels, dtype=np.int64), pixels, check, names)


def opened(content: bytes, source: str) -> None:
    """Refuse one encoded image whose header cannot be read; its pixels are not looked at."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source} is not a readable image ({len(content)} bytes): {error}") from error


def decode(content: bytes, size: tuple[int, int], source: str) -> PixelArray:
    """One encoded image as RGB `(H, W, 3)` of the given `(H, W)`, resized (Lanczos) if it has another size."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I;16"):  # which PIL would clip at 255: a white picture
                rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            else:
                rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source} is not a readable image ({len(content)} bytes): {error}") from error
    height, width = size
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def _stack(images: list[PixelArray], size: tuple[int, int]) -> PixelArray:
    stacked = np.empty((len(images), 3, *size), dtype=np.uint8)
    for row, image in enumerate(images):
        stacked[row] = image.transpose(2, 0, 1)
    return stacked
