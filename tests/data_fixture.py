"""Tiny files in the formats of the data sets, written by the formats' definitions."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def idx(array: np.ndarray) -> bytes:
    """A gzip IDX file of unsigned bytes."""
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


def archive(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar.gz archive."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def cifar_records(labels: np.ndarray, pixels: np.ndarray) -> bytes:
    """CIFAR binary records: label byte(s) `(N, bytes)`, then the red, green and blue planes `(N, 3, 32, 32)`."""
    return np.concatenate([labels, pixels.reshape(len(labels), -1)], axis=1).astype(np.uint8).tobytes()


def image(pixels: np.ndarray, form: str = "PNG") -> bytes:
    """An encoded picture of RGB `(3, H, W)`; PNG is lossless."""
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, form)
    return out.getvalue()


def parquet(path: Path, columns: Mapping[str, list[object]], classes: list[str] | None) -> Path:
    """A parquet file with the class names in its schema metadata."""
    table = pa.table(dict(columns))
    metadata = None if classes is None else {"class_names": json.dumps(classes)}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path
