"""Readers for class-incremental data: three layouts of folders, the small data sets, and that nothing is decoded unasked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatminima.data import DataError, load_incremental
from flatminima.data.incremental import kept
from flatminima.data.pictures import Augmentation, ShiftAndFlip, centre
from flatminima.data.splits import LabelledImages


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 10, 3), value, dtype=np.uint8)).save(path)


def mini(folder: Path) -> Path:
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for c, label in enumerate(("n02", "n01")):
        for part, count in (("train", 3), ("test", 2)):
            for i in range(count):
                name = f"{label}_{part}{i}.jpg"
                picture(folder / "images" / name, 40 * c + 10 * i)
                rows[part].append(f"{name},{label}")
    (folder / "split").mkdir()
    for part, lines in rows.items():
        (folder / "split" / f"{part}.csv").write_text("\n".join(["filename,label", *lines]) + "\n")
    return folder


def cub(folder: Path) -> Path:
    names = ("001.Albatross", "002.Auklet")
    images, labels, training = [], [], []
    for c, name in enumerate(names):
        for i in range(4):
            number = 1 + 4 * c + i
            picture(folder / "images" / name / f"{i}.jpg", 20 * number)
            images.append(f"{number} {name}/{i}.jpg")
            labels.append(f"{number} {c + 1}")
            training.append(f"{number} {int(i < 3)}")
    for file, lines in (
        ("images.txt", images), ("image_class_labels.txt", labels), ("train_test_split.txt", training),
        ("classes.txt", [f"{c + 1} {name}" for c, name in enumerate(names)]),
    ):  # fmt: skip
        (folder / file).write_text("\n".join(lines) + "\n")
    return folder


def plain(folder: Path) -> Path:
    for part, count in (("train", 3), ("test", 1)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(folder / part / name / f"{i}.png", 50 * c + 5 * i)
    return folder


@pytest.mark.parametrize(
    ("make", "classes", "train", "first"),
    [
        (mini, ("n01", "n02"), [1, 1, 1, 0, 0, 0], "n02/n02_train0.jpg"),
        (cub, ("001.Albatross", "002.Auklet"), [0, 0, 0, 1, 1, 1], "001.Albatross/0.jpg"),
        (plain, ("cat", "dog"), [0, 0, 0, 1, 1, 1], "cat/0.png"),
    ],
)
def test_three_layouts(
    make: Callable[[Path], Path], classes: tuple[str, ...], train: list[int], first: str, tmp_path: Path
) -> None:
    data = load_incremental(make(tmp_path), size=6)
    assert (data.classes, data.shape, data.natural) == (classes, (3, 6, 6), True)
    assert data.train.labels.tolist() == train
    assert data.train.names is not None
    assert data.train.names[0] == first
    assert data.train.pixels(np.array([0, 5])).shape == (2, 3, 6, 6)
    assert sorted(set(data.test.labels.tolist())) == [0, 1]


def test_known_folders_are_looked_up_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMINIMA_DATA", str(tmp_path))
    with pytest.raises(
        DataError, match=r"cub-200 was not found \(no folder cub-200 or CUB_200_2011 or cub200 in FLATMINIMA"
    ):
        load_incremental("cub-200")
    cub(tmp_path / "CUB_200_2011")
    mini(tmp_path / "miniimagenet")
    assert load_incremental("cub-200").shape == (3, 256, 256)
    assert load_incremental("mini-imagenet").shape == (3, 92, 92)
    monkeypatch.delenv("FLATMINIMA_DATA")
    with pytest.raises(
        DataError, match=r"mini-imagenet was not found \(FLATMINIMA_DATA is not set\). Expected there: images/"
    ):
        load_incremental("mini-imagenet")


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown data set 'fashion': expected one of fashion-mnist"):
        load_incremental("fashion")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds nothing: expected train/<class>/<file>"):
        load_incremental(tmp_path / "empty")
    listed = mini(tmp_path / "mini")
    (listed / "images" / "n01_test1.jpg").unlink()
    with pytest.raises(DataError, match=r"n01_test1.jpg is listed in test.csv and does not exist"):
        load_incremental(listed)
    lines = (listed / "split" / "train.csv").read_text()
    for text, message in (
        (lines, r"n02_train0.jpg is in train.csv and in test.csv: a test image must not be trained on"),
        ("filename,label\nn01_test0.jpg,n01\nn01_test0.jpg,n01\n", r"n01_test0.jpg is in test.csv twice"),
        ("filename,label\nn01_test0.jpg\n", r"test.csv, line 2, has no label"),
    ):
        (listed / "split" / "test.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            load_incremental(listed)
    (listed / "split" / "test.csv").write_text("filename,label\nx.jpg,n09\n")
    with pytest.raises(DataError, match=r"test.csv has the class 'n09', which train.csv does not have"):
        load_incremental(listed)
    (listed / "split" / "test.csv").write_text("file,class\nx.jpg,n09\n")
    with pytest.raises(DataError, match="has columns file, class: expected filename,label"):
        load_incremental(listed)
    (listed / "split" / "test.csv").unlink()
    with pytest.raises(DataError, match=r"test.csv does not exist"):
        load_incremental(listed)
    birds = cub(tmp_path / "cub")
    for name, text, message in (
        ("classes.txt", "1 one\n3 three\n", "image_class_labels.txt has class 2, which classes.txt does not have"),
        ("classes.txt", "a one\nb two\n", "classes.txt has the number 'a': expected whole numbers"),
        (
            "train_test_split.txt",
            "\n".join(f"{i} {i % 3}" for i in range(1, 9)),
            "train_test_split.txt has '2': expected 1 or 0",
        ),
    ):
        kept_text = (birds / name).read_text()
        (birds / name).write_text(text)
        with pytest.raises(DataError, match=message):
            load_incremental(birds)
        (birds / name).write_text(kept_text)
    (birds / "train_test_split.txt").write_text("1 1\n")
    with pytest.raises(DataError, match=r"train_test_split.txt lists 1 pictures and images.txt 8"):
        load_incremental(birds)
    (birds / "train_test_split.txt").write_text("1\n")
    with pytest.raises(DataError, match=r"train_test_split.txt, line 1, is not a number and a value"):
        load_incremental(birds)
    (birds / "image_class_labels.txt").unlink()
    with pytest.raises(DataError, match=r"image_class_labels.txt does not exist: it belongs to CUB_200_2011"):
        load_incremental(birds)
    one = plain(tmp_path / "plain")
    for file in (one / "test" / "dog").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="empty data set: "):
        load_incremental(one)
    with pytest.raises(DataError, match="size is 9: digits has 8 pixels a side"):
        load_incremental("digits", size=9)


@pytest.mark.parametrize("part", ["train", "test"])
def test_pictures_are_checked_to_their_last_byte(part: str, tmp_path: Path) -> None:
    folder = plain(tmp_path)
    rng = np.random.default_rng(0)
    whole = folder / part / "dog" / "0.jpg"
    Image.fromarray(rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(whole)
    data = load_incremental(folder, size=6)
    parts = {"train": data.train, "test": data.test}
    for images in parts.values():
        assert images.check is not None
        images.check()
    whole.write_bytes(whole.read_bytes()[:-200])  # its header is whole
    check = parts[part].check
    assert check is not None
    with pytest.raises(DataError, match=r"dog/0.jpg is not a readable image"):
        check()


def test_pictures_of_other_kinds_are_read_as_what_they_show(tmp_path: Path) -> None:
    """Grey of 8 and of 16 bits, a palette, transparency, another size: all are half as bright as can be."""
    folder = plain(tmp_path)
    grey = Image.fromarray(np.full((9, 14), 128, dtype=np.uint8))
    kinds = [grey, Image.fromarray(np.full((9, 14), 128 * 256, dtype=np.uint16)), grey.convert("P"), grey.convert("LA")]
    for i, image in enumerate(kinds):
        image.save(folder / "test" / "cat" / f"{i}.png")
    found = load_incremental(folder, size=6).test.pixels(np.arange(4))
    assert found.shape == (4, 3, 6, 6)
    assert found.tolist() == np.full((4, 3, 6, 6), 128).tolist()


def test_more_pixels_than_memory_are_refused(tmp_path: Path) -> None:
    data = load_incremental(plain(tmp_path), size=10**6)
    with pytest.raises(
        DataError, match=r"6 pictures of 1000000x1000000 pixels need .* GiB of memory: choose a smaller size"
    ):
        data.train.pixels(np.array([0]))


def test_digits_are_cut_once_and_for_all() -> None:
    first, second = load_incremental("digits"), load_incremental("digits")
    assert np.array_equal(first.test.labels, second.test.labels)
    together = {first.train.pixels(np.arange(1438)).tobytes(), first.test.pixels(np.arange(359)).tobytes()}
    assert len(together) == 2
    assert min(np.bincount(first.test.labels)) >= 34


def test_images_are_decoded_once_and_only_when_asked_for() -> None:
    asked: list[int] = []

    def pixels(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return np.full((len(rows), 1, 2, 2), 3, dtype=np.uint8) + rows[:, None, None, None].astype(np.uint8)

    images = kept(LabelledImages(np.zeros(6, dtype=np.int64), pixels), (1, 2, 2))
    assert asked == []
    assert images.pixels(np.array([4, 1, 4]))[:, 0, 0, 0].tolist() == [7, 4, 7]
    assert images.pixels(np.array([1, 2]))[:, 0, 0, 0].tolist() == [4, 5]
    assert sorted(asked) == [1, 2, 4]


def test_shift_and_flip_cuts_windows_out_of_the_padded_picture() -> None:
    x = torch.arange(1.0, 2 * 3 * 4 * 5 + 1).view(2, 3, 4, 5)
    found = ShiftAndFlip(pad=2)(x, torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(x, [2, 2, 2, 2])
    for i in range(2):
        windows = [
            w for top in range(5) for left in range(5)
            for w in (padded[i, :, top : top + 4, left : left + 5], padded[i, :, top : top + 4, left : left + 5].flip(2))
        ]  # fmt: skip
        assert any(torch.equal(found[i], w) for w in windows)
    flips = [
        torch.equal(ShiftAndFlip(pad=0)(x[:1], torch.Generator().manual_seed(s)), x[:1].flip(3)) for s in range(60)
    ]
    assert 15 < sum(flips) < 45


def test_a_crop_of_another_size() -> None:
    x = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    found = Augmentation(jitter=0.0, grey=0.0, out=8)(x, torch.Generator().manual_seed(1))
    assert found.shape == (3, 3, 8, 8)
    assert x.min() <= found.min() <= found.max() <= x.max()
    assert torch.equal(centre(x, 8), x[:, :, 2:10, 2:10])
