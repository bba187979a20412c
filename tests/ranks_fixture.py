"""Two processes that meet through gloo, for tests of what several ranks do together."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = Callable[[int, Path], Any]


def _entry(rank: int, job: Job, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(job(rank, Path(folder)), f"{folder}/{rank}.pt")
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
    leave()


def leave() -> None:
    """End this process without finalising the interpreter.

    A thread of gloo that still holds a tensor asks for the GIL while Python ends, and aborts the process after its work is done
    (pytorch/pytorch pull request 179291).
    """
    os._exit(0)


def on_two_ranks(job: Job) -> list[Any]:
    """What ``job(rank, folder)`` returns on each of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_entry, args=(job, folder), nprocs=2)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]
