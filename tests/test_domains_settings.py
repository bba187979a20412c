from __future__ import annotations

import math

import numpy as np
import pytest

from flatminima import cli_swad
from flatminima.data.domain_splits import seed_hash
from flatminima.protocols.domains_hyperparameters import hyperparameters
from flatminima.protocols.domains_settings import PROTOCOLS, DomainSettings, differences, preset
from flatminima.study.settings import SettingsError


@pytest.mark.parametrize(
    ("data", "every", "tolerance", "steps"),
    [
        ("pacs", 100, 0.3, 5001),
        ("vlcs", 50, 0.2, 5001),
        ("office-home", 100, 0.3, 5001),
        ("domainnet", 500, 0.3, 15001),
    ],
)
def test_the_pinned_protocol_is_the_papers(data: str, every: int, tolerance: float, steps: int) -> None:
    settings = preset(data, "swad-2021", weights="torchvision:IMAGENET1K_V1")
    assert (settings.every, settings.tolerance, settings.run_steps) == (every, tolerance, steps)
    assert (settings.model, settings.size, settings.batch, settings.lr) == ("resnet50", 224, 32, 5e-5)
    assert (settings.freeze_batchnorm, settings.augment, settings.augment_validation) == (True, True, False)
    assert (settings.n_converge, settings.n_tolerance, settings.rho, settings.ema_decay) == (3, 6, 0.05, 0.99)
    assert settings.evaluated(0)
    assert settings.evaluated(settings.run_steps - 1)
    assert sum(map(settings.evaluated, range(settings.run_steps))) == (steps - 1) // every + 1


def test_the_two_protocols_differ_where_the_documents_say() -> None:
    rows = {name: (first, second) for name, first, second, _ in differences("pacs")}
    assert rows["freeze_batchnorm"] == ("True", "False")
    assert rows["every"] == ("100", "300")
    assert rows["augment_validation"] == ("False", "True")
    assert rows["oracle_at_any"] == ("True", "False")
    assert rows["extra_last"] == ("False", "True")
    assert rows["fixed_seed"] == ("True", "False")
    assert rows["weights"] == ("torchvision IMAGENET1K_V1", "timm resnet50.ram_in1k (trained with AugMix)")
    assert {name for name, *_ in differences("rotated-mnist")} == {
        "interpolation", "extra_last", "oracle_at_any", "fixed_seed",
    }  # fmt: skip
    assert all(meaning for *_, meaning in differences("pacs"))
    today = preset("pacs", "domainbed", weights="none")
    assert today.run_steps == 5001
    assert [step for step in range(5001) if today.evaluated(step)][-2:] == [4800, 5000]


def test_mnist_under_the_pinned_protocol_is_the_whole_network() -> None:
    settings = preset("rotated-mnist", "swad-2021")
    assert (settings.model_options, settings.batch, settings.lr, settings.pool) == ({"width": 64}, 64, 1e-3, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1}, "--steps must be at least 2, got 1"),
        ({"every": 0}, "--every must be at least 1"),
        ({"every": 900}, "--every 900 is more than --steps 800"),
        ({"lr": 0.0}, "--lr must be finite and > 0, got 0.0"),
        ({"tolerance": math.nan}, "--tolerance must be finite and >= 0, got nan"),
        ({"held_out": 1.0}, "--held-out must lie between 0 and 1, got 1.0"),
        ({"tail": 0.0}, "--tail must lie between 0 and 1"),
        ({"model": "resnt-gn"}, "unknown model 'resnt-gn': expected one of resnet-gn"),
        ({"interpolation": "nearest"}, "unknown interpolation"),
        ({"dropout": 0.1}, "weights, dropout and freeze_batchnorm are of model 'resnet50'"),
        ({"pairs": 1}, "pairs 1 and plane"),
        ({"radii": (1.0, -1.0)}, "radii must be positive"),
        ({"stepz": 3}, "unknown setting 'stepz': expected one of steps"),
        ({"rows": 1}, "--rows must be at least 2"),
    ],
)
def test_what_cannot_be_used_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        preset("rotated-mnist", **changes)


def test_a_protocol_that_fine_tunes_asks_for_its_weights() -> None:
    with pytest.raises(
        SettingsError, match=r"swad-2021 fine-tunes a ResNet-50: give --weights torchvision:IMAGENET1K_V1"
    ):
        preset("pacs", "swad-2021")
    with pytest.raises(SettingsError, match=r"give --weights FILE with those of timm's resnet50\.ram_in1k"):
        preset("pacs", "domainbed")
    assert preset("pacs", "swad-2021", model="resnet-gn").weights == "none"
    assert preset("pacs", model="resnet18").model_options == {"width": 16}
    assert cli_swad.settings("pacs", "scratch", width=8).model_options == {"width": 8, "stem_stride": 2}
    with pytest.raises(SettingsError, match="unknown protocol 'swad': expected one of swad-2021"):
        preset("pacs", "swad")
    assert list(PROTOCOLS) == ["scratch", "swad-2021", "domainbed"]


def test_hyper_parameters_are_drawn_as_domainbed_draws_them() -> None:
    mnist, pictures = preset("rotated-mnist"), preset("domainnet", "swad-2021", weights="none")
    assert hyperparameters(mnist, "erm", 0) == {"lr": 1e-3, "batch": 16}
    assert hyperparameters(pictures, "coral", 0) == {
        "lr": 5e-5,
        "weight_decay": 0.0,
        "dropout": 0.0,
        "batch": 32,
        "coral": 1.0,
    }
    rng = np.random.RandomState(seed_hash(3, "lr"))
    assert hyperparameters(mnist, "erm", 3)["lr"] == 10 ** rng.uniform(-4.5, -2.5)
    drawn = [hyperparameters(pictures, "mixup", draw) for draw in range(1, 40)]
    assert all(1e-5 <= d["lr"] <= 10**-3.5 and 1e-6 <= d["weight_decay"] <= 1e-2 for d in drawn)
    assert {d["dropout"] for d in drawn} == {0.0, 0.1, 0.5}
    assert all(8 <= d["batch"] <= 32 and 0.1 <= d["mixup"] <= 10 for d in drawn)
    assert hyperparameters(mnist, "erm", 3) == hyperparameters(mnist, "sam", 3)


def test_settings_survive_json() -> None:
    settings = preset("pacs")
    assert DomainSettings(**{**settings.to_dict(), "radii": tuple(settings.to_dict()["radii"])}) == settings
