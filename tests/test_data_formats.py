from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_fixture import archive, cifar_records, idx, image, parquet
from flatminima.data import DataError
from flatminima.data.formats import decode, idx_images, image_folder, read_cifar_archive, read_idx, read_parquet

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path_factory.mktemp("idx") / "a.gz"
    path.write_bytes(idx(array))
    assert np.array_equal(read_idx(path), array)
    assert read_idx(path).shape == tuple(shape)


def test_idx_pair_is_images_with_one_channel(tmp_path: Path) -> None:
    x, y = noise(6, 4, 5), np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)
    (tmp_path / "x").write_bytes(idx(x))
    (tmp_path / "y").write_bytes(idx(y))
    images = idx_images(tmp_path / "x", tmp_path / "y")
    assert images.labels.tolist() == y.tolist()
    assert np.array_equal(images.pixels(np.array([5, 0])), x[[5, 0]][:, None])
    (tmp_path / "y").write_bytes(idx(y[:5]))
    with pytest.raises(DataError, match=r"shape \(6, 4, 5\).*shape \(5,\)"):
        idx_images(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it starts with nothing"),
        (b"plain text", "not a complete gzip file"),
        (idx(noise(9, 9))[:-20], "not a complete gzip file"),
        (gzip.compress(b"\x00\x00\x0d\x01" + bytes(8)), "starts with 00000d01"),
        (gzip.compress(b"\x00\x00\x08\x02" + struct.pack(">II", 2, 3) + bytes(5)), r"5 bytes of data: expected 6"),
        (gzip.compress(b"\x00\x00\x08\x02" + struct.pack(">I", 0)), "bytes of data"),
    ],
)
def test_broken_idx_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"broken\.gz .*{message}"):
        read_idx(path)


def cifar10_members(rows: int = 3) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    pixels, labels = noise(6, rows, 3, 32, 32), RNG.integers(0, 10, (6, rows, 1))
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    # In the archive the batches come in another order than their numbers.
    members = {f"cifar-10-batches-bin/{names[i]}.bin": cifar_records(labels[i], pixels[i]) for i in (4, 0, 5, 3, 1, 2)}
    members["cifar-10-batches-bin/batches.meta.txt"] = "\n".join("abcdefghij").encode() + b"\n\n"
    return members, pixels, labels


def test_cifar10_archive(tmp_path: Path) -> None:
    members, pixels, labels = cifar10_members()
    data = read_cifar_archive(archive(tmp_path / "c.tar.gz", members))
    assert data.classes == tuple("abcdefghij")
    assert data.train.labels.tolist() == labels[:5].ravel().tolist()
    assert data.test.labels.tolist() == labels[5].ravel().tolist()
    assert np.array_equal(data.train.pixels(np.arange(15)), pixels[:5].reshape(15, 3, 32, 32))
    assert np.array_equal(data.test.pixels(np.array([2])), pixels[5, 2:])


def test_cifar100_archive_gives_fine_labels(tmp_path: Path) -> None:
    pixels = noise(5, 3, 32, 32)
    labels = np.stack([np.arange(5), 90 + np.arange(5)], axis=1)  # coarse, fine
    members = {
        "cifar-100-binary/train.bin": cifar_records(labels[:4], pixels[:4]),
        "cifar-100-binary/test.bin": cifar_records(labels[4:], pixels[4:]),
        "cifar-100-binary/fine_label_names.txt": "\n".join(f"name_{i}" for i in range(100)).encode(),
        "cifar-100-binary/coarse_label_names.txt": b"x\ny",
    }
    data = read_cifar_archive(archive(tmp_path / "c.tar.gz", members))
    assert len(data.classes) == 100
    assert data.train.labels.tolist() == [90, 91, 92, 93]
    assert data.test.labels.tolist() == [94]
    assert np.array_equal(data.train.pixels(np.arange(4)), pixels[:4])


def test_broken_cifar_archives_are_named(tmp_path: Path) -> None:
    members, _, _ = cifar10_members()
    path = archive(tmp_path / "c.tar.gz", members)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"c\.tar\.gz is not a complete tar\.gz archive"):
        read_cifar_archive(path)
    cut = dict(members)
    cut["cifar-10-batches-bin/data_batch_2.bin"] = cut["cifar-10-batches-bin/data_batch_2.bin"][:-1]
    with pytest.raises(DataError, match=r"data_batch_2\.bin in .* has 9218 bytes: expected a multiple of 3073"):
        read_cifar_archive(archive(path, cut))
    del cut["cifar-10-batches-bin/test_batch.bin"]
    with pytest.raises(DataError, match=r"has no test_batch\.bin"):
        read_cifar_archive(archive(path, cut))
    with pytest.raises(DataError, match=r"has no fine_label_names\.txt: expected the binary version"):
        read_cifar_archive(archive(path, {"cifar-10-batches-py/data_batch_1": b"a pickle"}))


def test_parquet_decodes_the_rows_asked_for(tmp_path: Path) -> None:
    pixels = noise(4, 3, 6, 5)
    columns: dict[str, list[object]] = {
        "image": [image(row) for row in pixels],
        "label": [1, 0, 1, 1],
        "split": ["train", "train", "test", "train"],
    }
    # Row 1 cannot be decoded, and only asking for it says so.
    columns["image"][1] = b"\xff\xd8 not a picture"
    data = read_parquet(parquet(tmp_path / "p.parquet", columns, ["no", "yes"]), (6, 5))
    assert data.classes == ("no", "yes")
    assert data.split == ("train", "train", "test", "train")
    assert data.images.labels.tolist() == [1, 0, 1, 1]
    assert np.array_equal(data.images.pixels(np.array([3, 0])), pixels[[3, 0]])
    with pytest.raises(DataError, match=r"p\.parquet, row 1 is not a readable image \(16 bytes\)"):
        data.images.pixels(np.array([0, 1]))


def test_parquet_without_splits_or_without_names(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"image": [image(noise(3, 4, 4))], "label": [0]}
    assert read_parquet(parquet(tmp_path / "p", columns, ["only"]), (4, 4)).split is None
    with pytest.raises(DataError, match="metadata class_names"):
        read_parquet(parquet(tmp_path / "p", columns, None), (4, 4))
    del columns["label"]
    with pytest.raises(DataError, match=r"has columns \['image'\]: expected image and label"):
        read_parquet(parquet(tmp_path / "p", columns, ["only"]), (4, 4))


def folder(root: Path, **classes: dict[str, bytes]) -> Path:
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for file, content in files.items():
            (root / name / file).write_bytes(content)
    return root


def test_image_folder_numbers_classes_as_given_and_sorts_files(tmp_path: Path) -> None:
    a, b, c = noise(3, 3, 4, 4)
    root = folder(
        tmp_path,
        cat={"2.PNG": image(b), "1.png": image(a), "notes.txt": b"no", ".hidden.png": b"no"},
        ant={"x.png": image(c)},
    )
    (root / ".cache").mkdir()
    images = image_folder(root, ("cat", "ant"), (4, 4))
    assert images.labels.tolist() == [0, 0, 1]
    assert np.array_equal(images.pixels(np.arange(3)), np.stack([a, b, c]))


def test_broken_image_folders_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path, cat={"1.jpg": b"not a picture"}, dog={"notes.txt": b""})
    with pytest.raises(DataError, match=r"class folders \['cat', 'dog'\]: expected \['cat', 'cow'\]"):
        image_folder(root, ("cow", "cat"), (4, 4))
    with pytest.raises(DataError, match=r"empty data set: .*dog holds no image"):
        image_folder(root, ("cat", "dog"), (4, 4))
    (root / "dog" / "1.png").write_bytes(image(noise(3, 4, 4))[:-30])
    images = image_folder(root, ("cat", "dog"), (4, 4))
    with pytest.raises(DataError, match=r"cat.1\.jpg is not a readable image"):
        images.pixels(np.array([0]))
    with pytest.raises(DataError, match=r"dog.1\.png is not a readable image"):
        images.pixels(np.array([1]))


def test_other_sizes_and_modes_become_rgb_of_the_size() -> None:
    pixels = noise(3, 12, 10)
    expected = Image.fromarray(pixels.transpose(1, 2, 0)).resize((5, 6), Image.Resampling.LANCZOS)
    assert np.array_equal(decode(image(pixels), (6, 5), "x"), np.asarray(expected))
    gray = np.repeat(noise(1, 4, 4), 3, axis=0)
    assert np.array_equal(decode(image(gray), (4, 4), "x"), gray.transpose(1, 2, 0))
