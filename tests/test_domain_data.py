from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_fixture import image, parquet
from flatminima.data import DOMAIN_DATASETS, DataError, load_domains, mnist_domains
from flatminima.data.domain_splits import DomainSampler, domain_split, seed_hash
from flatminima.data.formats import in_memory
from flatminima.data.mnist_domains import colored_mnist, rotated, rotated_mnist
from flatminima.data.sources import Source

REAL = pytest.mark.skipif(not os.environ.get("FLATMINIMA_DATA"), reason="needs real data: FLATMINIMA_DATA is not set")


def small_mnist() -> Source:
    """Twenty-three pictures, each of its own constant grey, with labels; train and test."""
    grey = np.arange(1, 24, dtype=np.uint8)
    pixels = np.broadcast_to(grey[:, None, None, None], (23, 1, 28, 28)).copy()
    labels = np.arange(23) % 10
    train, test = in_memory(pixels[:20], labels[:20]), in_memory(pixels[20:], labels[20:])
    return Source("mnist", tuple("0123456789"), train, test, labels[:20], "")


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist_domains.sources, "mnist", small_mnist)


def greys(pixels: np.ndarray) -> list[int]:
    """The grey in the middle of each picture, which names it."""
    return [int(picture.max()) for picture in pixels]


@pytest.mark.usefixtures("mnist")
def test_mnist_is_dealt_out_like_cards_and_no_picture_twice() -> None:
    environments = rotated_mnist(data_seed=3)
    assert list(environments) == ["0", "15", "30", "45", "60", "75"]
    assert [len(e.labels) for e in environments.values()] == [4, 4, 4, 4, 4, 3]
    found = [greys(e.pixels(np.arange(len(e.labels)))) for e in environments.values()]
    assert sorted(name for names in found for name in names) == list(range(1, 24))  # test images too
    order = torch.randperm(23, generator=torch.Generator().manual_seed(3))
    assert found[1] == [int(v) + 1 for v in order[1::6]]
    for environment, names in zip(environments.values(), found, strict=True):
        assert environment.labels.tolist() == [(name - 1) % 10 for name in names]


@pytest.mark.usefixtures("mnist")
def test_environments_depend_on_their_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = colored_mnist(5)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = colored_mnist(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first.values(), second.values(), strict=True):
        assert np.array_equal(a.labels, b.labels)
        assert np.array_equal(a.pixels(np.arange(7)), b.pixels(np.arange(7)))
    other = colored_mnist(6)
    assert any(not np.array_equal(a.labels, b.labels) for a, b in zip(first.values(), other.values(), strict=True))


def test_pictures_turn_counter_clockwise_about_their_centre_with_black_corners() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    assert np.array_equal(rotated(picture, 90), np.rot90(picture))
    assert np.array_equal(rotated(picture, 0), picture)
    turned = rotated(np.full((28, 28), 255, dtype=np.uint8), 45)
    assert turned[0, 0] == turned[-1, -1] == 0
    assert turned[14, 14] == 255
    dot = np.zeros((28, 28), dtype=np.uint8)
    dot[13:15, 24:26] = 255  # to the right of the centre
    up, right = np.argwhere(rotated(dot, 45) > 100).mean(0)
    assert up < 10  # row 0 is at the top
    assert right > 18
    assert not np.array_equal(rotated(picture, 30), rotated(picture, 30, "bicubic"))


@pytest.mark.usefixtures("mnist")
def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(DataError, match="unknown interpolation 'bicubik': expected one of bicubic, bilinear"):
        rotated_mnist(0, "bicubik")


@REAL
def test_real_mnist_environments_have_the_published_sizes_and_noise() -> None:
    data = load_domains("rotated-mnist")
    assert [len(d.labels) for d in data.domains.values()] == [11_667] * 4 + [11_666] * 2
    assert data.shape == (1, 28, 28)
    total = Counter(np.concatenate([d.labels for d in data.domains.values()]).tolist())
    assert sorted(total.values()) == sorted([6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958])
    coloured = load_domains("colored-mnist")
    assert [len(d.labels) for d in coloured.domains.values()] == [23_334, 23_333, 23_333]
    for (name, domain), noise in zip(coloured.domains.items(), (0.1, 0.2, 0.9), strict=True):
        pixels = domain.pixels(np.arange(len(domain.labels)))
        used = pixels.reshape(len(pixels), 2, -1).max(2) > 0
        assert (used.sum(1) == 1).all(), name  # the digit is in one channel, the other is black
        colours = used[:, 1].astype(int)
        assert abs((colours != domain.labels).mean() - noise) < 0.01, name


@REAL
def test_real_pacs_has_four_domains_and_the_published_counts() -> None:
    data = load_domains("pacs")
    assert {name: sum(counts) for name, counts in data.counts().items()} == {
        "art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929,
    }  # fmt: skip
    assert data.counts()["sketch"] == [772, 740, 753, 608, 816, 80, 160]
    assert "found" not in data.note
    small = load_domains("pacs", rows=70, size=32)
    assert small.shape == (3, 32, 32)
    assert small.counts()["photo"] == [8, 8, 8, 8, 8, 12, 18]  # in proportion, largest remainders


def domains(folder: Path, content: dict[str, dict[str, int]]) -> Path:
    """Pictures ``<domain>/<class>/<n>.png``."""
    rng = np.random.default_rng(0)
    for domain, classes in content.items():
        for name, count in classes.items():
            (folder / domain / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (3, 9, 11), dtype=np.uint8)
                (folder / domain / name / f"{number}.png").write_bytes(image(pixels))
    return folder


def test_any_folder_of_domains_is_a_data_set(tmp_path: Path) -> None:
    folder = domains(tmp_path / "mine", {"b": {"dog": 3, "cat": 2}, "a": {"cat": 1, "dog": 2}, ".hidden": {}})
    data = load_domains(folder, size=8)
    assert (data.name, data.classes, data.shape, data.natural) == ("mine", ("cat", "dog"), (3, 8, 8), True)
    assert data.counts() == {"a": [1, 2], "b": [2, 3]}
    assert data.domains["b"].pixels(np.array([4, 0])).shape == (2, 3, 8, 8)


def test_a_folder_of_parquet_files_is_a_data_set(tmp_path: Path) -> None:
    pixels = np.zeros((3, 4, 4), dtype=np.uint8)
    for name, labels in (("x", [0, 1]), ("y", [1, 0, 0])):
        parquet(tmp_path / f"{name}.parquet", {"image": [image(pixels)] * len(labels), "label": labels}, ["p", "q"])
    assert load_domains(tmp_path).counts() == {"x": [1, 1], "y": [2, 1]}
    parquet(tmp_path / "z.parquet", {"image": [image(pixels)], "label": [1]}, ["p", "q"])
    with pytest.raises(DataError, match="domain 'z' has no class 'p', which x, y have"):
        load_domains(tmp_path)
    parquet(tmp_path / "z.parquet", {"image": [image(pixels)], "label": [1]}, ["p", "other"])
    with pytest.raises(DataError, match=r"z\.parquet names the classes \['p', 'other'\], another domain \['p', 'q'\]"):
        load_domains(tmp_path)


def test_what_cannot_be_used_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = domains(tmp_path / "one", {"photo": {"dog": 1}})
    with pytest.raises(DataError, match="holds only 'photo': leaving one domain out needs at least two"):
        load_domains(folder)
    domains(folder, {"sketch": {"cat": 1, "dog": 1}})
    with pytest.raises(
        DataError, match="domain 'photo' has no class 'cat', which sketch has: every domain needs the same"
    ):
        load_domains(folder)
    (folder / "photo" / "cat").mkdir()
    with pytest.raises(DataError, match=r"empty data set: .*cat holds no image"):
        load_domains(folder)
    broken = folder / "photo" / "cat" / "7.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"photo/cat/7\.jpg is not a readable image \(10 bytes\)"):
        load_domains(folder)
    with pytest.raises(DataError, match=r"photo/cat/7\.jpg is not a readable image"):
        load_domains(folder, memory=0)  # the headers are looked at, though nothing is decoded
    broken.write_bytes(image(np.zeros((3, 4, 4), dtype=np.uint8)))
    lazy = load_domains(folder, memory=0, size=6)
    assert lazy.domains["photo"].pixels(np.array([0])).shape == (1, 3, 6, 6)
    with pytest.raises(DataError, match=r"unknown data set 'pac': expected one of pacs, .*or the path of a folder"):
        load_domains("pac")
    for option, value in (("rows", 1), ("size", 0), ("data_seed", -1)):
        with pytest.raises(DataError, match=f"{option} is {value}"):
            load_domains(folder, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="rotated-mnist has 28 pixels a side"):
        load_domains("rotated-mnist", size=14)
    monkeypatch.setenv("FLATMINIMA_DATA", str(tmp_path))
    with pytest.raises(
        DataError, match=r"vlcs was not found .*no folder vlcs or VLCS.*Caltech101, LabelMe, SUN09, VOC2007"
    ):
        load_domains("vlcs")
    domains(tmp_path / "VLCS", {"LabelMe": {"car": 1}, "SUN09": {"car": 1}, "VOC2007": {"car": 1}})
    with pytest.raises(DataError, match="lacks the domain Caltech101: found LabelMe, SUN09, VOC2007"):
        load_domains("vlcs")
    domains(tmp_path / "VLCS", {"Caltech101": {"car": 1}})
    with pytest.raises(DataError, match="has 1 classes: vlcs has 5"):
        load_domains("vlcs")
    monkeypatch.delenv("FLATMINIMA_DATA")
    with pytest.raises(DataError, match=r"domainnet was not found \(FLATMINIMA_DATA is not set"):
        load_domains("domainnet")


def test_known_data_sets_are_described() -> None:
    assert list(DOMAIN_DATASETS) == [
        "rotated-mnist", "colored-mnist", "pacs", "vlcs", "office-home", "terra-incognita", "domainnet",
    ]  # fmt: skip


def test_the_split_is_domainbeds() -> None:
    keys = list(range(50))
    np.random.RandomState(seed_hash(2, 3)).shuffle(keys)  # a list, as there
    kept, out = domain_split(50, 0.2, trial_seed=2, domain=3)
    assert (out.tolist(), kept.tolist()) == (keys[:10], keys[10:])
    assert domain_split(1670, 0.2, 0, 2)[1].shape == (334,)  # floor
    again = domain_split(50, 0.2, 2, 3)
    assert all(np.array_equal(a, b) for a, b in zip((kept, out), again, strict=True))
    assert not np.array_equal(domain_split(50, 0.2, 2, 1)[0], kept)
    assert not np.array_equal(domain_split(50, 0.2, 1, 3)[0], kept)
    for rows, held_out in ((1, 0.2), (4, 0.2), (5, 1.0)):
        with pytest.raises(DataError, match="expected at least one row to hold out and one to train on"):
            domain_split(rows, held_out, 0, 0)


def test_batches_are_drawn_with_replacement_for_ever_from_a_stream_of_their_own() -> None:
    rows = np.array([2, 3, 5, 7])
    sampler = DomainSampler(rows, 1000, seed=4, domain=1)
    drawn = np.concatenate([next(sampler) for _ in range(8)])
    counts = Counter(drawn.tolist())
    assert set(counts) == {2, 3, 5, 7}
    assert all(abs(count - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5 for count in counts.values())
    assert (drawn[:-1] == drawn[1:]).any()  # with replacement
    other = DomainSampler(rows, 1000, seed=4, domain=2)
    torch.manual_seed(0)
    same = DomainSampler(rows, 1000, seed=4, domain=1)
    assert np.array_equal(next(same), drawn[:1000])
    assert not np.array_equal(next(other), drawn[:1000])
    with pytest.raises(DataError, match="a batch of 0 rows cannot be drawn from 4"):
        DomainSampler(rows, 0, seed=0, domain=0)
