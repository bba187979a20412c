"""Names of methods: what they mean, in any order, and what is said about a wrong one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flatminima import models
from flatminima.optim.variants import VARIANTS
from flatminima.study.methods import AVERAGES, METHODS, OPTIMIZERS, Method, expand, has_normalisation, label, parse


def test_every_variant_and_every_average_is_a_method() -> None:
    assert set(OPTIMIZERS) == {"sgd", "bsam", *VARIANTS}
    assert set(AVERAGES) == {"swa", "ema", "lawa", "tail", "swad", "swad-released"}
    assert not set(OPTIMIZERS) & set(AVERAGES)
    assert len({label(name) for name in METHODS}) == len(METHODS)


@given(st.sampled_from(sorted(OPTIMIZERS)), st.sampled_from([None, *AVERAGES]))
def test_a_name_is_that_of_its_parts_in_any_order(optimizer: str, average: str | None) -> None:
    method = Method(optimizer, average)
    assert parse(method.name) == method
    if average is not None:
        assert parse(f"{optimizer}+{average}") == parse(f"{average}+{optimizer}") == method
    assert (method.name == average) == (optimizer == "sgd" and average is not None)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ssam", "sam"),
        ("sawd", "swad"),
        ("asamm", "asam"),
        ("gsma", "gsam"),
        ("look-sam", "looksam"),
        ("friendlysam", "friendly-sam"),
        ("swad_released", "swad-released"),
        ("asam-ema", "asam+ema"),
        ("asam+emma", "asam+ema"),
        ("SAM", "sam"),
        ("sam+", "sam"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown method {name!r}: expected one of {nearest}, ")) as error:
        parse(name)
    assert "asam, gsam" in str(error.value)  # all of them follow, by kind
    assert "swa, ema, lawa" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sam+asam", "names 2 optimisers, sam and asam"),
        ("sgd+sam+ema", "names 2 optimisers, sgd and sam"),
        ("ema+swa", "names 2 averages, ema and swa"),
        ("sam+ema+ema", "names 2 averages, ema and ema"),
    ],
)
def test_two_of_a_kind_are_no_method(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        parse(name)
    assert "separated by a comma" in str(error.value)


def test_all_is_every_single_method_that_the_model_allows() -> None:
    assert expand(["all"], "resnet18") == tuple(METHODS)
    assert expand(["all"], "mlp") == tuple(name for name in METHODS if name != "sam-on")
    first = expand(["swad", "all", "ema+asam"], "vit")
    assert first[0] == "swad"
    assert first[-1] == "asam+ema"
    assert sorted(first[:-1]) == sorted(METHODS)


def test_models_with_normalisation_layers_are_told_from_those_without() -> None:
    for name in models.MODELS:
        found = any(
            isinstance(m, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d)
            for m in models.build(name, (3, 32, 32), 2, **({"width": 2} if name == "resnet18" else {})).modules()
        )
        assert has_normalisation(name) == found
    assert [name for name in models.MODELS if has_normalisation(name)] == [
        "convnet-bn", "resnet18", "resnet20", "mnist-cnn", "resnet-gn", "vit",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sam-on", "sam-on+ema"])
def test_sam_on_is_refused_where_it_has_nothing_to_move(name: str) -> None:
    with pytest.raises(ValueError, match=r"model 'mlp' has none: choose --model convnet-bn, .*, resnet-gn or vit"):
        expand(["sgd", name], "mlp")
    assert expand([name], "convnet-bn") == (name,)
