"""Claim: the pair proxy costs less than a thirtieth of a loop of cold linear programs, and grows linearly with the probes.

    make bench      # or: FLATMINIMA_DATA=folder python benchmarks/weakness.py [--rounds 3] [--quick]

The peer is the loop of the notebooks: one `scipy.optimize.linprog` (HiGHS) of 2,259 rows per probe and class, rows built once.
"dual simplex" is this library without its search: one warm-started program with rows added when violated. Both sides decide all
pairs first, and must agree; pairs on which the cold program gives up are counted and left out. One thread, process CPU time,
interleaved within a round, medians over rounds. Without MNIST the networks are those of scikit-learn's digits.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import scipy
import torch
from scipy.optimize import linprog

from flatminima.data import DataError
from flatminima.measures.weakness import PairProxy, exact_extension, features, pair_proxy, version_space_volume
from flatminima.measures.weakness.completions import sample_completions
from flatminima.protocols.small_data import small_data, train_small

PROBES = 100
MANY = (100, 200, 400, 800)
EPSILON = 1e-4

Points = tuple[np.ndarray, np.ndarray, np.ndarray]


def network(name: str, units: int, probes: int) -> Points:
    """Features of the 784-64-`units`-10 network trained on 250 rows, of its training rows and of the probes."""
    data = small_data(name, rows=250, probes=probes)
    model = train_small(data, hidden=(64, units), seed=0).model
    return features(model, data.x).numpy(), data.y.numpy(), features(model, data.probes).numpy()


def rows(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    extended = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    out = np.zeros((len(points), 10, 10, extended.shape[1]))
    for i, y in enumerate(labels):
        out[i, :, y] += extended[i]
        out[i, range(10), range(10)] -= extended[i]
    keep = np.ones((len(points), 10), dtype=bool)
    keep[np.arange(len(points)), labels] = False
    return out[keep].reshape(keep.sum(), -1)


def cold(points: Points) -> np.ndarray:
    """The loop of the notebooks; status of every program."""
    train, labels, probes = points
    base = rows(train, labels)
    found = np.empty((len(probes), 10), dtype=int)
    for j in range(len(probes)):
        for c in range(10):
            system = np.concatenate([base, rows(probes[j : j + 1], np.array([c]))])
            found[j, c] = linprog(
                np.zeros(system.shape[1]), A_ub=-system, b_ub=np.full(len(system), -EPSILON), bounds=(None, None),
                method="highs",
            ).status  # fmt: skip
    return found


def cpu_seconds(call: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def compare(name: str, units: int, rounds: int) -> None:
    points = network(name, units, PROBES)
    times: dict[str, list[float]] = {"cold": [], "simplex": [], "proxy": []}
    for _ in range(rounds):
        seconds, status = cpu_seconds(lambda: cold(points))
        times["cold"].append(seconds)
        seconds, alone = cpu_seconds(lambda: pair_proxy(*points, classes=10, search=False))
        times["simplex"].append(seconds)
        seconds, found = cpu_seconds(lambda: pair_proxy(*points, classes=10))
        times["proxy"].append(seconds)
        assert isinstance(status, np.ndarray)
        assert isinstance(found, PairProxy)
        assert isinstance(alone, PairProxy)
        decided = (status == 0) | (status == 2)
        assert np.array_equal(found.feasible[decided], status[decided] == 0)
        assert np.array_equal(found.feasible, alone.feasible)
        assert not found.undecided
        assert found.verify().ok
    median = {key: statistics.median(value) for key, value in times.items()}
    exact = sum(c.proof == "exact" for c in found.certificates)
    print(
        f"| {name}, d = {units} | {found.value} | {median['cold']:.1f} | {median['simplex']:.2f} | {median['proxy']:.2f} "
        f"| **{median['cold'] / median['proxy']:.0f}** | {median['cold'] / median['simplex']:.1f} "
        f"| {(~decided).sum()} | {exact} of {len(found.certificates)} |"
    )


def growth(name: str) -> None:
    train, labels, probes = network(name, 8, max(MANY))
    print(f"\n| probes ({name}, d = 8) | CPU s | ms a probe | Newton steps a probe | linear programs a probe |")
    print("| --- | --- | --- | --- | --- |")
    for count in MANY:
        runs = [
            cpu_seconds(lambda count=count: pair_proxy(train, labels, probes[:count], classes=10)) for _ in range(3)
        ]
        seconds, found = statistics.median(run[0] for run in runs), runs[0][1]
        assert isinstance(found, PairProxy)
        print(
            f"| {count} | {seconds:.2f} | {1000 * seconds / count:.1f} | {found.cost['newton_steps'] / count:.1f} "
            f"| {found.cost['linear_programs'] / count:.2f} |"
        )


def others(name: str) -> None:
    points = network(name, 8, PROBES)
    train, labels, probes = points
    print(f"\n| on the same features ({name}, d = 8) | CPU s | result |\n| --- | --- | --- |")
    found = pair_proxy(*points, classes=10)
    seconds, check = cpu_seconds(found.verify)
    print(f"| all proofs checked again, float64 with bounds | {seconds:.2f} | {check.pairs} hold |")
    seconds, check = cpu_seconds(lambda: found.verify(rational=True, sample=100))
    print(
        f"| 100 proofs checked again, rational | {seconds:.2f} | {check.pairs - len(check.failed)} hold, all exactly |"
    )
    assert check.ok
    assert check.limited == 0
    seconds, extension = cpu_seconds(lambda: exact_extension(train, labels, probes[:3], classes=10))
    low, high = extension.bounds
    print(f"| exact extension on 3 probes | {seconds:.1f} | {low} ≤ {extension.size} ≤ {high} |")
    seconds, drawn = cpu_seconds(lambda: sample_completions(*points, classes=10))
    print(
        f"| {drawn.draws} random completions | {seconds:.1f} | entropy a probe {drawn.mean_entropy:.4f} ± "
        f"{drawn.mean_entropy_error:.4f}, R-hat {drawn.rhat:.3f}, ESS {drawn.ess:.0f} |"
    )
    seconds, volume = cpu_seconds(lambda: version_space_volume(*points, classes=10))
    print(f"| log of the version space's share | {seconds:.0f} | {volume.log_volume:.1f} ± {volume.error:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1, help="of each comparison")
    parser.add_argument("--quick", action="store_true", help="one network, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        small_data("mnist")
        cases = [("mnist", 8), ("fashion-mnist", 8), ("mnist", 16)]
    except DataError:
        cases = [("digits", 8)]
    print(
        f"scipy {scipy.__version__}, highspy {version('highspy')}, torch {torch.__version__}, {platform.machine()}, one "
        f"thread, {arguments.rounds} interleaved round{'s' * (arguments.rounds > 1)}\n"
    )
    print(
        "| 250 training rows, 1000 pairs | pair proxy | cold, CPU s | dual simplex | this library | times faster "
        "| simplex alone | cold gave up | exact certificates |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, units in cases[: 1 if arguments.quick else None]:
        compare(name, units, arguments.rounds)
    if not arguments.quick:
        growth(cases[0][0])
        others(cases[0][0])


if __name__ == "__main__":
    main()
