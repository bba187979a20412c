"""Splits: who is new when, which images are shots, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewshot_fixture import tiny_data
from flatminima.data import ClassData, DataError
from flatminima.data.splits import LabelledImages
from flatminima.protocols.fewshot_split import FewShotSplit, load_split, make_split, validation_data


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 50),
    st.sampled_from([0, 0.3]),
)
def test_the_laws_of_a_split(base: int, way: int, shot: int, draws: int, seed: int, held_out: float) -> None:
    data = tiny_data(9, 12)
    split = make_split(data, base=base, way=way, shot=shot, draws=draws, seed=seed, held_out=held_out)
    assert len(set(split.order)) == len(split.order) == base + way * ((9 - base) // way)
    assert len(split.shots) == draws
    for draw in split.shots:
        for rows, group in zip(draw, split.sessions, strict=True):
            assert data.train.labels[rows].tolist() == [label for label in group for _ in range(shot)]
            assert len(set(rows.tolist())) == len(rows)
    own = np.concatenate([split.train, split.held_out])
    assert sorted(own.tolist()) == [i for i, label in enumerate(data.train.labels) if label in split.base]
    assert len(split.held_out) == base * int(held_out * 12)
    for rows, group in zip(split.test, (split.base, *split.sessions), strict=True):
        assert sorted(set(data.test.labels[rows].tolist())) == sorted(group)
        assert len(rows) == 6 * len(group)
    again = make_split(data, base=base, way=way, shot=shot, draws=draws + 2, seed=seed, held_out=held_out)
    for draw, same in zip(split.shots, again.shots, strict=False):  # more draws change none of the others
        assert all(np.array_equal(a, b) for a, b in zip(draw, same, strict=True))
    restored = FewShotSplit.from_dict(json.loads(json.dumps(split.to_dict())))
    assert restored.to_dict() == split.to_dict()


def test_a_file_is_read_back_and_shots_carry_file_names(tmp_path: Path) -> None:
    data = tiny_data()
    names = [f"picture{i}.png" for i in range(len(data.train.labels))]
    train = LabelledImages(data.train.labels, data.train.pixels, None, names)
    named = ClassData("tiny", data.classes, train, data.test, data.shape, False, "")
    split = make_split(named, base=3, way=2, shot=3, draws=2, order=[6, 5, 4, 3, 2, 1, 0])
    assert (split.base, split.sessions) == ((6, 5, 4), ((3, 2), (1, 0)))
    assert split.files[1][0] == tuple(names[row] for row in split.shots[1][0])
    split.save(tmp_path / "split.json")
    assert load_split(tmp_path / "split.json", named).to_dict() == split.to_dict()
    renamed = [names[0], "new.png", *names[1:-1]]
    moved = ClassData("tiny", data.classes, replace(train, names=renamed), data.test, data.shape, False, "")
    with pytest.raises(
        DataError, match=r"is the file 'picture\d+.png', whose row is that of 'picture\d+.png' now: the pict"
    ):
        load_split(tmp_path / "split.json", moved)
    content = split.to_dict()
    content["files"][0] = []
    (tmp_path / "short.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="there is not one file name for every shot"):
        load_split(tmp_path / "short.json", named)
    with pytest.raises(DataError, match="the split is of 7 classes of tiny, tiny has others"):
        load_split(tmp_path / "split.json", tiny_data(9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shot": 17}, "has 16 train images: expected at least 17, the shots"),
        ({"base": 6}, "6 base classes and 1 sessions of 2 need 8 classes: tiny has 7"),
        ({"sessions": 3}, "need 9 classes: tiny has 7"),
        ({"order": [0, 1, 2, 3, 1, 4, 5]}, "class 1 is in the order twice: every class is new once"),
        ({"order": [0, 1, 2, 3, 9]}, "class 9 does not exist: there are classes 0 to 6"),
        ({"order": "radnom"}, "unknown class order 'radnom': expected one of random"),
        ({"way": 0}, "way must be at least 1, got 0"),
        ({"base_images": 0}, "base_images must be at least 1, got 0"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1, got 1.0"),
    ],
)
def test_what_cannot_be_cut_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_split(tiny_data(), **{"base": 3, "way": 2, "shot": 3, **options})


def test_a_class_without_images_is_named() -> None:
    data = tiny_data()
    keep = np.flatnonzero(data.test.labels != 4)
    short = ClassData("tiny", data.classes, data.train, data.test.subset(keep), data.shape, False, "")
    with pytest.raises(DataError, match="class 'place 4' has no images in the test part of tiny"):
        make_split(short, base=3, way=2, shot=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["sessions"].__setitem__(1, [5, 3]),
            "class 'place 3' is in sessions 2 and 3: every class is new once",
        ),
        (lambda c: c["base"].append(0), "class 'place 0' is in session 1 twice"),
        (lambda c: c["shots"][0].__setitem__(1, []), "session 3 has no images in draw 0"),
        (lambda c: c["sessions"].__setitem__(0, []), "session 2 has no classes"),
        (lambda c: c["shots"][0][0].pop(), "the shots of session 2, draw 0, are not 3 of each class in its order"),
        (lambda c: c["shots"][0][0].__setitem__(0, 0), "hold class 'place 0', which belongs to another session"),
        (lambda c: c["train"].__setitem__(0, 9999), "have row 9999: there are 112"),
        (lambda c: c["train"].append(c["train"][0]), "the base images hold a row twice"),
        (lambda c: c["held_out"].append(c["train"][0]), "an image is held out and trained on"),
        (lambda c: c["test"][1].clear(), "the test images of session 2 hold none of class"),
        (lambda c: c["test"][0].append(3), "the test images of session 1 hold class 'place 3'"),
        (lambda c: c.pop("train"), "this is no few-shot split: KeyError 'train'"),
        (lambda c: c.update(schema=7), "schema 7 of 'few-shot split'"),
        (lambda c: c["train"].__setitem__(0, 1.5), "this is no few-shot split: TypeError 1.5 is no whole number"),
        (lambda c: c["train"].__setitem__(0, True), "TypeError True is no whole number"),
        (lambda c: c["train"].__setitem__(0, 10**30), "this is no few-shot split: OverflowError"),
        (lambda c: c.update(shot=float("inf")), "TypeError inf is no whole number"),
        (lambda c: c.update(shot=-1), "shot is -1: expected at least 1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    content = make_split(tiny_data(), base=3, way=2, shot=3, order="sorted").to_dict()
    change(content)
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        load_split(path, tiny_data())
    assert str(caught.value).startswith(f"{path}: ")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_split(tmp_path / "absent.json", tiny_data())
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_split(tmp_path / "broken.json", tiny_data())


def test_validation_uses_base_images_alone() -> None:
    data = tiny_data()
    split = make_split(data, base=5, way=1, shot=3, seed=1)
    pseudo = validation_data(data, split)
    assert pseudo.classes == tuple(data.classes[label] for label in split.base)
    assert pseudo.test.labels.tolist().count(0) == 3  # one in five of 16
    allowed = {data.train.pixels(np.array([row])).tobytes() for row in split.train}
    for images in (pseudo.train, pseudo.test):
        for row in range(len(images.labels)):
            assert images.pixels(np.array([row])).tobytes() in allowed
    again = make_split(pseudo, base=3, way=1, shot=3, order="sorted")
    assert again.base == (0, 1, 2)
