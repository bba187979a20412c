"""Weights on disk: safetensors first, ``torch.load(weights_only=True)`` second, a pickle never."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot or must not be read; the message says why and what to do."""


def save_weights(model: nn.Module, path: Path) -> None:
    """Write parameters and buffers as safetensors; the file is whole or absent at every moment."""
    temporary = path.with_name(f".{path.name}.part")
    save_model(model, str(temporary))
    temporary.chmod(0o644)
    os.replace(temporary, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a checkpoint into a model, in place.

    ``.safetensors`` files are read as such. Anything else is read by ``torch.load`` with ``weights_only=True``; a mapping
    that holds the weights under ``"state_dict"`` or ``"model"`` is accepted.

    Raises:
        CheckpointError: no such file, a file that is neither of the two, a pickle that would have to run code, or
            weights that do not fit the model (missing, unexpected and misshapen names are given).
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        _load_safetensors(model, path)
    else:
        _load_state(model, _read_torch(path), path)


def _load_safetensors(model: nn.Module, path: Path) -> None:
    try:
        # load_model also restores parameters that share memory, which the file holds once.
        load_model(model, str(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    except RuntimeError:
        _load_state(model, load_file(str(path)), path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol, of files that are refused anyway
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is not a file of plain tensors, and reading a pickle can run any code its author put "
            "there. Save the weights alone, with safetensors.torch.save_model(model, 'w.safetensors') or "
            f"torch.save(model.state_dict(), 'w.pt') ({_first_line(error)})"
        ) from error
    except OSError:
        raise
    except Exception as error:  # the reader meets the bytes of a damaged file with nearly every kind of error there is
        raise CheckpointError(f"{path} is truncated, corrupt or no checkpoint: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state_dict: names with tensors")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(sorted(problems))}")
    model.load_state_dict(state)
