from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatminima.study.checkpoint import CheckpointError, load_weights, save_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained() -> nn.Module:
    model = net()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randint(-9, 9, tensor.shape))
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_safetensors_hold_parameters_and_buffers(tmp_path: Path) -> None:
    model, other = trained(), net()
    save_weights(model, tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    load_weights(other, tmp_path / "w.safetensors")
    assert same(model, other)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_torch_is_read_bare_or_wrapped(tmp_path: Path, wrap: Any, zipped: bool) -> None:
    model, other = trained(), net()
    torch.save(wrap(model.state_dict()), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    load_weights(other, tmp_path / "w.pt")
    assert same(model, other)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        nn.init.zeros_(other.encode.weight)
        load_weights(other, tmp_path / name)
        assert torch.equal(other.encode.weight, model.encode.weight)
        assert other.decode.weight is other.encode.weight


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.pkl"])
@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_pickle_is_refused_with_the_reason_and_not_run(tmp_path: Path, name: str, how: str) -> None:
    sprung = tmp_path / "sprung"
    content = {"state_dict": net().state_dict(), "hyperparameters": Trap(sprung)}
    if how == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(
        CheckpointError, match=r"refused: .*reading a pickle can run any code.*safetensors\.torch\.save_m"
    ):
        load_weights(net(), tmp_path / name)
    assert not sprung.exists()
    torch.load(tmp_path / name, weights_only=False) if how != "pickle" else pickle.loads((tmp_path / name).read_bytes())
    assert sprung.exists()  # the trap is one


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt is refused: it is not a file of plain tensors"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "legacy.pt"])
def test_a_truncated_or_foreign_file_is_refused_wherever_it_ends(tmp_path: Path, name: str) -> None:
    model, before = trained(), trained()
    before.load_state_dict(model.state_dict())
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(net().state_dict(), path, _use_new_zipfile_serialization=name == "w.pt")
    else:
        save_weights(net(), path)
    whole = path.read_bytes()
    cuts = [whole[: len(whole) * k // 100] for k in range(100)]
    for content in [*cuts, b"plain text", b"\x80\x02", b"{}", b"PK\x03\x04"]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_weights(model, path)
    assert same(model, before)


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "w.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            load_weights(net(), path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    state = {**net().state_dict(), "head.bias": torch.ones(2), "0.weight": torch.ones(4, 5)}
    del state["2.bias"]
    (save_file if name == "w.safetensors" else torch.save)(state, tmp_path / name)
    with pytest.raises(CheckpointError) as refused:
        load_weights(net(), tmp_path / name)
    assert str(refused.value) == (
        f"{tmp_path / name} does not fit the model: 0.weight has shape (4, 5), expected (4, 3); missing 2.bias; "
        "unexpected head.bias"
    )


@pytest.mark.parametrize("content", [[torch.ones(2)], {"0.weight": 3.0}, torch.ones(3)])
def test_something_else_than_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"expected a state_dict: names with tensors"):
        load_weights(net(), tmp_path / "w.pt")
