from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetModel

from flatminima.averaging import reestimate_batchnorm
from flatminima.models import resnet50
from flatminima.models.resnet50 import ResNet50Features, torchvision_name


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[ResNetModel, Path]:
    """Another library's ResNet-50 with random weights and statistics, and where it is saved."""
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    folder = tmp_path_factory.mktemp("resnet")
    model.save_pretrained(folder)
    return model, folder


def test_it_is_the_network_of_another_library(other: tuple[ResNetModel, Path], tmp_path: Path) -> None:
    model, folder = other
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        expected = model(x).pooler_output.flatten(1)
        ours = resnet50(5, weights=f"transformers:{folder}").eval()
        assert torch.allclose(ours[0](x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        # A file with torchvision's names, classifier included, is the same.
        state = {torchvision_name(name): value.clone() for name, value in model.state_dict().items()}
        state |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
        save_file(state, tmp_path / "w.safetensors")
        torch.save(state, tmp_path / "w.pth")
        for path in (tmp_path / "w.safetensors", str(tmp_path / "w.pth")):
            again = resnet50(5, weights=path).eval()
            assert all(torch.equal(a, b) for a, b in zip(again[0].parameters(), ours[0].parameters(), strict=True))
            assert torch.equal(again[0](x), ours[0](x))


def test_frozen_statistics_stay_while_scale_and_shift_learn() -> None:
    model = resnet50(3, dropout=0.5)
    assert [type(part).__name__ for part in model] == ["ResNet50Features", "Dropout", "Linear"]
    assert model.training
    assert model[1].training
    before = {name: value.clone() for name, value in model.named_buffers()}
    bn = model[0].bn1
    weight = bn.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 33, 33)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert not torch.equal(bn.weight, weight)
    assert reestimate_batchnorm(model, iter(())) == 0  # nothing to re-estimate, nothing drawn
    model.eval()
    model.train()
    assert not bn.training
    live = resnet50(3, freeze_batchnorm=False)
    assert live[0].bn1.training


def test_weights_that_are_no_resnet_50_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = ResNet50Features().state_dict()
    for change, message in (
        ({"layer1.0.conv1.weight": None}, r"there is no layer1\.0\.conv1\.weight"),
        ({"layer9.weight": torch.zeros(1)}, r"layer9\.weight is not part of one"),
        (
            {"conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"conv1\.weight has shape \(64, 3, 3, 3\), expected \(64, 3, 7, 7\)",
        ),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        torch.save(changed, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=f"does not hold the weights of a ResNet-50: {message}"):
            resnet50(2, weights=tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        resnet50(2, weights=tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no such file, and neither torchvision:NAME nor transformers:NAME"):
        resnet50(2, weights=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"weights transformers:/no/such/folder cannot be had"):
        resnet50(2, weights="transformers:/no/such/folder")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match="weights torchvision:IMAGENET1K_V1 need a torchvision that fits this torch"):
        resnet50(2, weights="torchvision:IMAGENET1K_V1")
    with pytest.raises(ValueError, match=r"dropout of model 'resnet50' is 1\.0"):
        resnet50(2, dropout=1.0)


def test_torchvisions_weights_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself need not be there: what is used of it is an enumeration with ``name`` and ``get_state_dict``."""
    import enum
    import types

    state = ResNet50Features().state_dict() | {"fc.weight": torch.zeros(1)}

    class Weights(enum.Enum):
        IMAGENET1K_V1 = 1

        def get_state_dict(self, *, progress: bool, check_hash: bool) -> dict[str, torch.Tensor]:
            assert check_hash
            return state

    module = types.ModuleType("torchvision.models")
    module.ResNet50_Weights = Weights  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", module)
    model = resnet50(2, weights="torchvision:IMAGENET1K_V1")
    assert torch.equal(model[0].conv1.weight, state["conv1.weight"])
    with pytest.raises(ValueError, match="torchvision has no ResNet-50 weights 'V3': expected one of IMAGENET1K_V1"):
        resnet50(2, weights="torchvision:V3")
