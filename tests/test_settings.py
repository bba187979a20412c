from __future__ import annotations

import json
import math
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatminima.study.methods import METHODS, parse
from flatminima.study.settings import DEFAULT_EPOCHS, CompareSettings, SettingsError


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"data": "digit"}, "unknown data set 'digit': expected one of digits, "),
        ({"data": "fashion_mnist"}, "expected one of fashion-mnist, "),
        ({"model": "conv"}, "unknown model 'conv': expected one of convnet, "),
        ({"methods": ("sgd", "swda")}, "unknown method 'swda': expected one of swa, swad, "),
        ({"methods": ()}, "--methods is empty: name at least one of sgd, sam"),
        ({"methods": ("sgd", "sam", "sgd")}, "--methods names a method twice: sgd, sam, sgd"),
        ({"methods": ("swad+sam", "sam+swad")}, "--methods names a method twice: sam+swad, sam+swad"),
        ({"methods": ("sgd", "sam+asam")}, "'sam+asam' names 2 optimisers, sam and asam"),
        (
            {"methods": ("sam-on",)},
            "model 'mlp' has none: choose --model convnet-bn, resnet18, resnet20, mnist-cnn, resnet-gn or vit, "
            "or leave sam-on out",
        ),
        ({"epochs": 3, "steps": 4}, "--epochs 3 and --steps 4 were both given"),
        ({"budget": "gradient"}, "unknown --budget 'gradient': expected one of gradients, "),
        ({"schedule": "cos"}, "unknown --schedule 'cos': expected one of cosine, "),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"steps": 1}, "--steps must be at least 2, got 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"train_size": 0}, "--train-size must be at least 1, got 0"),
        ({"data_seed": -1}, "--data-seed must be at least 0, got -1"),
        ({"monitor_rows": 0}, "--monitor-rows must be at least 1, got 0"),
        ({"measure_rows": 0}, "--measure-rows must be at least 1, got 0"),
        ({"audit_rows": 0}, "--audit-rows must be at least 1, got 0"),
        ({"audit_members": -1}, "--audit-members must be at least 0, got -1"),
        ({"rho": -0.1}, "--rho must be finite and >= 0, got -0.1"),
        ({"rho": math.nan}, "--rho must be finite and >= 0, got nan"),
        ({"lr": 0.0}, "--lr must be finite and > 0, got 0.0"),
        ({"lr": math.inf}, "--lr must be finite and > 0, got inf"),
        ({"weight_decay": -1e-9}, "--weight-decay must be finite and >= 0, got -1e-09"),
        ({"tolerance": -1.0}, "--tolerance must be finite and >= 0, got -1.0"),
        ({"momentum": 1.0}, "--momentum must be below 1, got 1.0"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_by_name(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        CompareSettings(**given_settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@given(
    st.lists(st.sampled_from(sorted(METHODS)), min_size=1, unique=True),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(2, 99)),
    st.floats(1e-9, 1e9),
    st.sampled_from(["cpu", "cuda"]),
)
def test_settings_survive_json_and_their_command(
    methods: list[str], seeds: int, steps: int | None, lr: float, device: str
) -> None:
    settings = CompareSettings(
        methods=tuple(methods), seeds=seeds, steps=steps, lr=lr, device=device, model="convnet-bn"
    )
    assert CompareSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    program, job, *words = shlex.split(settings.command())
    assert (program, job) == ("flatminima", "compare")
    said = {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)
    }
    kinds = {**CompareSettings().to_dict(), "steps": 0, "epochs": 0, "train_size": 0, "monitor_rows": 0}
    read = {name: value.split(",") if name == "methods" else type(kinds[name])(value) for name, value in said.items()}
    assert CompareSettings.from_dict({**CompareSettings().to_dict(), **read}) == settings


def test_all_methods_are_one_word_of_the_command() -> None:
    assert "--methods all --" in CompareSettings(methods=("all",)).command()
    more = CompareSettings(methods=("all", "ema+asam"), model="vit")
    assert "--methods all,asam+ema --" in more.command()
    assert more.methods == (*METHODS, "asam+ema")
    assert "--methods swad,sgd,sam --" in CompareSettings(methods=("swad", "sgd", "sam")).command()


@given(st.integers(2, 10_000), st.sampled_from([*METHODS, "sam+swad", "sa-gd+ema"]))
def test_a_budget_of_gradients_is_the_same_for_every_method(steps: int, method: str) -> None:
    settings = CompareSettings(steps=steps)
    budget = settings.method_steps("sgd", 1000)
    assert budget in (steps, steps + 1)
    assert budget - parse(method).usual_cost < settings.method_steps(method, 1000) * parse(method).usual_cost <= budget
    assert CompareSettings(steps=steps, budget="steps").method_steps(method, 1000) == budget


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 20))
def test_an_epoch_is_every_row_once(rows: int, batch_size: int, epochs: int) -> None:
    batches = -(-rows // batch_size)
    steps = CompareSettings(epochs=epochs, batch_size=batch_size).sgd_steps(rows)
    assert steps - epochs * batches in (0, 1)
    assert steps % 2 == 0
    assert CompareSettings(batch_size=batch_size).sgd_steps(rows) - DEFAULT_EPOCHS * batches in (0, 1)
