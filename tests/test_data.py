from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_fixture import archive, cifar_records, idx, image, parquet
from flatminima.data import DATASETS, DataError, Splits, load, load_pacs_domain, sources
from flatminima.data.files import DataFile
from flatminima.data.splits import channel_statistics
from flatminima.models import build

REAL = pytest.mark.skipif(not os.environ.get("FLATMINIMA_DATA"), reason="needs real data: FLATMINIMA_DATA is not set")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, an empty cache, and no network."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("FLATMINIMA_DATA", str(folder))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return folder


def rows_of(splits: Splits) -> list[bytes]:
    """Every input as bytes, to see which rows are where (digits has no duplicate)."""
    return [row.numpy().tobytes() for split in (splits.train, splits.validation, splits.test) for row in split.x]


def test_digits_is_cut_60_20_20_by_class_and_standardised() -> None:
    splits = load("digits")
    assert splits.name == "digits"
    assert splits.classes == tuple("0123456789")
    assert splits.input_shape == (1, 8, 8)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1079, 359, 359]
    assert len(set(rows_of(splits))) == 1797
    total = sum(torch.bincount(part.y, minlength=10) for part in (splits.train, splits.validation, splits.test))
    for part in (splits.train, splits.validation, splits.test):
        assert part.x.dtype == torch.float32
        assert part.y.dtype == torch.int64
        share = len(part) / 1797 * total
        assert (torch.bincount(part.y, minlength=10) - share).abs().max() < 2
    x = splits.train.x.double()
    assert abs(x.mean()) < 1e-6
    assert abs(x.std(correction=0) - 1) < 1e-6


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    splits = load("digits", seed=3)
    # The affine map of the standardisation, undone: 17 levels, so the least and the greatest are 0 and 16.
    parts = (splits.train, splits.validation, splits.test)
    x = torch.cat([part.x for part in parts]).double()
    x = ((x - x.min()) / (x.max() - x.min()) * 16).round().to(torch.uint8)
    got = sorted((row.numpy().tobytes(), int(y)) for row, y in zip(x, torch.cat([p.y for p in parts]), strict=True))
    expected = sorted(
        (row.astype(np.uint8).tobytes(), int(y)) for row, y in zip(bunch.images, bunch.target, strict=True)
    )
    assert got == expected


def test_the_seed_decides_the_rows() -> None:
    first, again, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.test.y, again.test.y)
    assert not torch.equal(first.test.y, other.test.y)


def test_train_size_changes_the_train_split_alone() -> None:
    whole, part = load("digits"), load("digits", train_size=200)
    assert len(part.train) == 200
    assert torch.equal(part.validation.y, whole.validation.y)
    assert torch.equal(part.test.y, whole.test.y)
    assert (torch.bincount(part.train.y) - 20).abs().max() <= 1
    # Statistics are those of the 200 rows.
    assert abs(part.train.x.double().mean()) < 1e-6
    assert abs(part.train.x.double().std(correction=0) - 1) < 1e-6
    assert abs(part.test.x.double().mean()) > 1e-4


def test_validation_fraction_counts_all_rows() -> None:
    splits = load("digits", validation_fraction=0.5)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1797 - 359 - 898, 898, 359]


def test_a_small_network_learns_digits() -> None:
    splits = load("digits")
    model = build("mlp", splits.input_shape, splits.classes, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(splits.train.x), splits.train.y).backward()
        optimizer.step()
    accuracy = (model(splits.test.x).argmax(1) == splits.test.y).float().mean()
    assert accuracy > 0.93


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fashion_mnist", {}, r"unknown data set 'fashion_mnist': expected one of fashion-mnist, mnist, "),
        ("CIFAR-100", {}, r"expected one of cifar100, cifar10, "),
        ("digits", {"train_size": 0}, "train_size is 0: expected at least 1"),
        ("digits", {"train_size": 1080}, "train_size is 1080: expected at most 1079"),
        ("digits", {"validation_fraction": 0.0}, r"validation_fraction is 0\.0: expected a number between 0 and 1"),
        ("digits", {"validation_fraction": 1.5}, r"validation_fraction is 1\.5"),
        ("digits", {"validation_fraction": float("nan")}, "validation_fraction is nan"),
        ("digits", {"validation_fraction": 0.8}, "and only 1438 are left"),
        ("digits", {"validation_fraction": 1e-9}, "none of the 1797 rows of 'digits' is left for split 'validation'"),
        ("digits", {"seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_named(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(name, **options)


def test_the_registry_describes_every_name() -> None:
    assert list(DATASETS) == ["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "pacs"]
    assert all(DATASETS.values())


def fake_mnist(monkeypatch: pytest.MonkeyPatch, folder: Path, labels: np.ndarray) -> np.ndarray:
    """Files in the layout of MNIST, with their checksums made known; the images, train rows then test rows."""
    x = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4), dtype=np.uint8)
    train = len(labels) - 10
    (folder / "mnist").mkdir()
    contents = [idx(a) for a in (x[:train], labels[:train], x[train:], labels[train:])]
    for name, content in zip(sources.IDX_NAMES, contents, strict=True):
        (folder / "mnist" / f"{name}-ubyte.gz").write_bytes(content)
    monkeypatch.setattr(sources, "MNIST_SHA256", tuple(hashlib.sha256(c).hexdigest() for c in contents))
    return x


def test_an_official_test_set_is_kept_whole_and_in_order(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(110, dtype=np.uint8) % 10
    x = fake_mnist(monkeypatch, elsewhere, labels)
    splits = load("mnist", train_size=50)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [50, 20, 10]
    assert splits.test.y.tolist() == list(range(10))
    assert torch.bincount(splits.train.y).tolist() == [5] * 10
    assert torch.bincount(splits.validation.y).tolist() == [2] * 10
    # One affine map takes the pixels of the files to the test inputs, in order.
    pixels = torch.from_numpy(x[100:].astype(np.float64)).flatten()
    inputs = splits.test.x.double().flatten()
    assert torch.corrcoef(torch.stack([pixels, inputs]))[0, 1] > 1 - 1e-9


def test_a_label_out_of_range_is_named_before_training(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(110, dtype=np.uint8) % 10
    labels[103] = 10
    fake_mnist(monkeypatch, elsewhere, labels)
    with pytest.raises(DataError, match=r"label out of range in split 'test', row 3: got 10, expected 0\.\.9"):
        load("mnist")


def test_an_empty_file_set_is_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mnist(monkeypatch, elsewhere, np.zeros(10, dtype=np.uint8))
    with pytest.raises(DataError, match="empty data set: 'mnist' has no rows"):
        load("mnist")


def test_a_truncated_file_is_named_with_both_checksums(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mnist(monkeypatch, elsewhere, np.zeros(30, dtype=np.uint8))
    path = elsewhere / "mnist" / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()[:-4]
    path.write_bytes(content)
    expected, found = sources.MNIST_SHA256[1], hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match=rf"{path.name} is corrupt.*expected sha256 {expected}, found {found}"):
        load("mnist")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_without_a_network_the_error_names_the_address_and_the_folder(elsewhere: Path, name: str) -> None:
    with pytest.raises(
        DataError, match=rf"{name}/.*could not be downloaded:\n  http.*no network(.|\n)*FLATMINIMA_DATA"
    ):
        load(name)


def test_cifar_is_downloaded_once_in_its_binary_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATMINIMA_DATA", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    labels = np.arange(20)[:, None] % 10
    members = {
        f"cifar-10-batches-bin/{name}.bin": cifar_records(labels, rng.integers(0, 256, (20, 3, 32, 32)))
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    }
    members["cifar-10-batches-bin/batches.meta.txt"] = b"\n".join(f"class{i}".encode() for i in range(10))
    path = archive(tmp_path / "site.tar.gz", members)
    checksum = f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"
    remote = DataFile("cifar10/cifar-10-binary.tar.gz", checksum, (path.as_uri(),))
    monkeypatch.setitem(sources.CIFAR_FILES, "cifar10", (sources.CIFAR_FILES["cifar10"][0], remote))
    first = load("cifar10")
    path.unlink()
    again = load("cifar10")
    assert torch.equal(first.train.x, again.train.x)
    assert [len(part) for part in (first.train, first.validation, first.test)] == [80, 20, 20]
    assert first.classes[3] == "class3"
    assert first.input_shape == (3, 32, 32)
    for part in (first.train, first.validation):
        assert torch.bincount(part.y).tolist() == [len(part) // 10] * 10


def test_cifar_parquet_keeps_pictures_with_their_labels(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(60) % 10
    part = np.where(np.arange(60) % 6 == 5, "test", "train")  # test rows stand between the train rows
    pictures = [image(np.full((3, 32, 32), 20 * label, dtype=np.uint8)) for label in labels]
    (elsewhere / "cifar10").mkdir()
    columns = {"image": pictures, "label": labels.tolist(), "split": part.tolist()}
    path = parquet(elsewhere / "cifar10" / "cifar10.parquet", columns, list("abcdefghij"))
    known = DataFile("cifar10/cifar10.parquet", f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    monkeypatch.setitem(sources.CIFAR_FILES, "cifar10", (known, sources.CIFAR_FILES["cifar10"][1]))
    splits = load("cifar10")
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [40, 10, 10]
    assert splits.test.y.tolist() == labels[part == "test"].tolist()
    for rows in (splits.train, splits.validation, splits.test):
        colours = rows.x[:, 0, 0, 0]
        assert torch.equal(colours, rows.x.amax((1, 2, 3)))
        pairs = torch.stack([colours.double(), rows.y.double()])
        assert torch.corrcoef(pairs)[0, 1] > 1 - 1e-9


def fake_pacs(folder: Path, per_class: int = 5) -> None:
    """PACS as folders of images; every image is one colour, which tells its domain and class."""
    for d, domain in enumerate(sources.PACS_DOMAINS):
        for c, name in enumerate(sources.PACS_CLASSES):
            here = folder / "pacs" / domain / name
            here.mkdir(parents=True)
            for i in range(per_class):
                pixels = np.full((3, 64, 64), 60 * d + 8 * c + i, dtype=np.uint8)
                (here / f"{i}.png").write_bytes(image(pixels))


def test_pacs_from_folders_pools_the_domains_in_proportion(elsewhere: Path) -> None:
    fake_pacs(elsewhere)
    splits = load("pacs")
    assert splits.name == "pacs"
    assert splits.classes == sources.PACS_CLASSES
    assert splits.input_shape == (3, 64, 64)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [84, 28, 28]
    colours = torch.cat([part.x[:, 0, 0, 0] for part in parts]).double()
    colours = ((colours - colours.min()) / (colours.max() - colours.min()) * 232).round().long()
    labels = torch.cat([part.y for part in parts])
    assert torch.equal(colours % 60 // 8, labels)
    for rows, each in ((slice(0, 84), 3), (slice(84, 112), 1), (slice(112, 140), 1)):
        assert torch.bincount(colours[rows] // 60 * 7 + labels[rows]).tolist() == [each] * 28


def test_one_domain_is_that_domain_alone(elsewhere: Path) -> None:
    fake_pacs(elsewhere)
    splits = load_pacs_domain("photo", train_size=14)
    assert splits.name == "pacs/photo"
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [14, 7, 7]


def test_pacs_errors_say_what_to_do(elsewhere: Path) -> None:
    with pytest.raises(DataError, match=r"unknown PACS domain 'skech': expected one of sketch, "):
        load_pacs_domain("skech")
    with pytest.raises(DataError, match=r"pacs/photo\.parquet or pacs/photo/<class>/<file> not found.*no automatic"):
        load_pacs_domain("photo")
    (elsewhere / "pacs").mkdir()
    (elsewhere / "pacs" / "photo.parquet").write_bytes(b"other data")
    with pytest.raises(DataError, match=r"photo\.parquet is corrupt, truncated or another file \(10 bytes\)"):
        load_pacs_domain("photo")


@REAL
@pytest.mark.parametrize(("name", "mean", "deviation"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)])
def test_real_idx_files_have_the_published_statistics(name: str, mean: float, deviation: float) -> None:
    source = sources.mnist() if name == "mnist" else sources.fashion_mnist()
    assert source.test is not None
    found = channel_statistics(source.train.pixels(np.arange(60000)))
    assert [float(v[0]) / 255 for v in found] == pytest.approx([mean, deviation], abs=5e-5)
    expected = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949] if name == "mnist" else [6000] * 10
    assert np.bincount(source.train.labels).tolist() == expected
    assert len(source.test.labels) == 10000


@REAL
def test_real_fashion_mnist_is_loaded() -> None:
    splits = load("fashion-mnist", train_size=1000, validation_fraction=0.05)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1000, 3000, 10000]
    assert torch.bincount(splits.train.y).tolist() == [100] * 10
    assert splits.classes[9] == "Ankle boot"


@REAL
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar_parquet(name: str, classes: int) -> None:
    import pyarrow.parquet

    source = sources.cifar10() if name == "cifar10" else sources.cifar100()
    assert source.test is not None
    for images, rows in ((source.train, 50000), (source.test, 10000)):
        assert np.bincount(images.labels).tolist() == [rows // classes] * classes
    path = Path(os.environ["FLATMINIMA_DATA"]) / name / f"{name}.parquet"
    columns = pyarrow.parquet.read_table(path, columns=["label", "label_name", "split"])
    names = [source.classes[label] for label in (*source.train.labels, *source.test.labels)]
    order = np.argsort(np.asarray(columns["split"].to_pylist()) != "train", kind="stable")
    assert names == np.asarray(columns["label_name"].to_pylist())[order].tolist()
    pixels = source.train.pixels(np.arange(0, 50000, 50))
    mean, deviation = channel_statistics(pixels)
    published = (
        ([0.4914, 0.4822, 0.4465], [0.247, 0.244, 0.262])
        if classes == 10
        else (
            [0.5071, 0.4866, 0.4409],
            [0.267, 0.256, 0.276],
        )
    )
    assert mean / 255 == pytest.approx(published[0], abs=0.015)
    assert deviation / 255 == pytest.approx(published[1], abs=0.015)


@REAL
def test_real_pacs_counts_and_one_domain() -> None:
    source = sources.pacs()
    counts = np.bincount(source.strata).reshape(4, 7).tolist()
    assert counts == [
        [379, 255, 285, 184, 201, 295, 449],
        [389, 457, 346, 135, 324, 288, 405],
        [189, 202, 182, 186, 199, 280, 432],
        [772, 740, 753, 608, 816, 80, 160],
    ]
    splits = load_pacs_domain("photo")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1002, 334, 334]


@REAL
def test_real_pacs_originals_in_folders_match_the_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    real = Path(os.environ["FLATMINIMA_DATA"])
    if not (real / "pacs-sample").is_dir():
        pytest.skip("needs real data: FLATMINIMA_DATA has no pacs-sample")
    (tmp_path / "pacs").symlink_to(real / "pacs-sample")
    monkeypatch.setenv("FLATMINIMA_DATA", str(tmp_path))
    originals = sources.pacs(["photo"]).train
    assert np.bincount(originals.labels).tolist() == [12] * 7
    monkeypatch.setenv("FLATMINIMA_DATA", str(real))
    resized = sources.pacs(["photo"]).train
    table = pyarrow.parquet.read_table(real / "pacs" / "photo.parquet", columns=["file_name"])
    row_of = {name: row for row, name in enumerate(table["file_name"].to_pylist())}
    files = sorted((real / "pacs-sample" / "photo" / "dog").iterdir())
    a = originals.pixels(np.arange(12)).astype(int)
    b = resized.pixels(np.array([row_of[f"dog/{file.name}"] for file in files])).astype(int)
    # The same pictures, apart from one more JPEG compression.
    assert np.abs(a - b).mean() < 4
