"""What the tests of weakness share: the cold linear programs that decide pairs one by one, and trained features."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog

from flatminima.measures.weakness import features
from flatminima.protocols.small_data import small_data, train_small

Features = tuple[NDArray, NDArray, NDArray, NDArray]  # training features and labels, probe features and labels
EPSILON = 1e-4  # margin of the notebooks


def rows(points: NDArray, labels: NDArray, classes: int) -> NDArray:
    """Every row ``(e_y - e_c) (x) [phi, 1]``, class-major, as the definition has them."""
    extended = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    out = []
    for x, y in zip(extended, labels, strict=True):
        for c in range(classes):
            if c != y:
                row = np.zeros((classes, len(x)))
                row[y] += x
                row[c] -= x
                out.append(row.ravel())
    return np.array(out)


def cold_status(train: NDArray, labels: NDArray, probes: NDArray, classes: int) -> NDArray:
    """Status of one cold HiGHS program per (probe, class): 0 feasible, 2 infeasible, 4 numerical trouble."""
    base = rows(train, labels, classes)
    found = np.empty((len(probes), classes), dtype=int)
    for j, probe in enumerate(probes):
        for c in range(classes):
            system = np.concatenate([base, rows(probe[None], np.array([c]), classes)])
            found[j, c] = linprog(
                np.zeros(system.shape[1]), A_ub=-system, b_ub=np.full(len(system), -EPSILON), bounds=(None, None),
                method="highs",
            ).status  # fmt: skip
    return found


@cache
def trained(name: str, seed: int, units: int = 8, probes: int = 100) -> Features:
    """Features of a network of two hidden layers, 64 and ``units`` wide, trained on 250 rows."""
    data = small_data(name, rows=250, probes=probes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small only wait for each other
    model = train_small(data, hidden=(64, units), seed=seed).model
    torch.set_num_threads(threads)
    return (
        features(model, data.x).numpy(), data.y.numpy(), features(model, data.probes).numpy(), data.probe_labels.numpy(),
    )  # fmt: skip
