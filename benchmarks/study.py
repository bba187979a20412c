"""Claims: an ensemble trains 100 networks at least 3 times faster than one by one on two cores, each with the same bits; and a
network of the pair-proxy study, trained and measured, costs less than a tenth of the published procedure.

    FLATMINIMA_DATA=folder python benchmarks/study.py [--rounds 3] [--networks 2] [--quick]

One by one is the plain loop over `torch.optim.SGD` (`train_alone`, which `tests/test_ensemble.py` holds to the loop that a user
would write), on one thread: two threads make steps of this size slower. The ensemble is `train_together`, in this process, and
split over two processes that have imported torch before. Every weight of every network is compared. The published procedure is
the training by itself, 30 Hutchinson probes in single precision by double backward, and one cold linear program
(`scipy.optimize.linprog`, HiGHS) per probe and class; ours is the training in the ensemble, the exact trace and the pair proxy
with proofs; both add the weight norm and the accuracy on 10,000 pictures. CPU seconds are those of the processes; wall seconds
are those of the machine with whatever else it does.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from weakness import cold

from flatminima.curvature.piecewise_linear import exact_trace
from flatminima.data import DataError
from flatminima.measures.weakness import features, pair_proxy
from flatminima.models import build
from flatminima.objective import Objective
from flatminima.study.course import Trained, Training
from flatminima.study.ensemble import train_alone, train_together
from flatminima.study.run_spec import DataSpec, OptimiserSpec, StopSpec
from flatminima.study.subsets import Subset, load_subset

HIDDEN = (64, 8)
STOP = StopSpec("accuracy", 1.0, check_every=10, max_epochs=500)
PROBES = 30


def trainings(name: str, seeds: Sequence[int]) -> list[Training]:
    data = load_subset(DataSpec(name, 250))
    return [
        Training(
            build("mlp", data.x.shape[1:], data.classes, seed=seed, hidden=HIDDEN),
            data.x,
            data.y,
            OptimiserSpec(),
            STOP,
            seed,
        )
        for seed in seeds
    ]


def together(name: str, seeds: Sequence[int]) -> tuple[list[Trained], float]:
    torch.set_num_threads(1)
    some = trainings(name, seeds)
    start = time.process_time()
    return train_together(some), time.process_time() - start


def spent(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its CPU seconds (of this process) and its wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = call()
    return found, time.process_time() - cpu, time.perf_counter() - wall


def same(a: Sequence[Trained], b: Sequence[Trained]) -> bool:
    return all(
        p.stopped.epochs == q.stopped.epochs
        and all(torch.equal(w, q.stopped.weights[name]) for name, w in p.stopped.weights.items())
        for p, q in zip(a, b, strict=True)
    )


def ensembles(name: str, count: int, rounds: int) -> None:
    seeds = list(range(count))
    halves = [seeds[0::2], seeds[1::2]]
    taken: dict[str, list[float]] = {key: [] for key in ("alone", "alone wall", "one", "one wall", "two", "two wall")}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(together, [name] * 2, [[0, 1]] * 2))  # imports, data
        for _ in range(rounds):
            some = trainings(name, seeds)
            alone, cpu, wall = spent(lambda some=some: [train_alone(training) for training in some])
            taken["alone"].append(cpu)
            taken["alone wall"].append(wall)
            one, cpu, wall = spent(lambda some=some: train_together(some))
            taken["one"].append(cpu)
            taken["one wall"].append(wall)
            parts, _, wall = spent(lambda: list(pool.map(together, [name] * 2, halves)))
            taken["two"].append(sum(part[1] for part in parts))
            taken["two wall"].append(wall)
            assert same(alone, one)
            for half, (part, _) in zip(halves, parts, strict=True):
                assert same(part, [alone[seed] for seed in half])
    m = {key: statistics.median(values) for key, values in taken.items()}
    print(
        f"| {name} | {count} | {m['alone']:.1f} ({m['alone wall']:.1f}) | {m['one']:.1f} ({m['one wall']:.1f}) "
        f"| {m['two']:.1f} ({m['two wall']:.1f}) | {m['alone'] / m['one']:.2f} "
        f"| **{2 * m['alone'] / m['two']:.1f}** | {m['alone wall'] / m['two wall']:.1f} |",
        flush=True,
    )


def hutchinson(model: nn.Module, data: Subset, probes: int) -> float:
    """As the notebooks do: double backward in single precision, random signs, all parameters."""
    parameters = list(model.parameters())
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(probes):
        loss = F.cross_entropy(model(data.x), data.y)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        signs = [torch.randint(0, 2, p.shape, generator=generator).float() * 2 - 1 for p in parameters]
        products = torch.autograd.grad(sum((g * s).sum() for g, s in zip(gradients, signs, strict=True)), parameters)
        found.append(sum(float((h * s).sum()) for h, s in zip(products, signs, strict=True)))
    return statistics.fmean(found)


def network(training: Training, found: Trained) -> nn.Module:
    model = build("mlp", training.x.shape[1:], 10, hidden=HIDDEN)
    model.load_state_dict(found.stopped.weights)
    return model


def common(model: nn.Module, data: Subset) -> tuple[float, float]:
    with torch.no_grad():
        accuracy = float((model(data.test).argmax(1) == data.test_labels).double().mean())
    return accuracy, float(torch.cat([p.detach().flatten() for p in model.parameters()]).norm())


def published(training: Training, data: Subset) -> dict[str, Any]:
    model = network(training, train_alone(training))
    points = features(model, data.x).numpy(), data.y.numpy(), features(model, data.probes).numpy()
    status = cold(points)
    return {
        "common": common(model, data),
        "trace": hutchinson(model, data, PROBES),
        "pairs": status == 0,
        "known": (status == 0) | (status == 2),
    }


def ours(model: nn.Module, data: Subset) -> dict[str, Any]:
    precise = build("mlp", data.x.shape[1:], 10, hidden=HIDDEN).double()
    precise.load_state_dict(model.state_dict())
    trace = exact_trace(Objective(precise, F.cross_entropy, (data.x.double(), data.y))).value
    decided = pair_proxy(features(model, data.x), data.y, features(model, data.probes), classes=10)
    return {"common": common(model, data), "trace": trace, "pairs": decided.feasible == 1}


def pipelines(name: str, networks: int) -> None:
    data = load_subset(DataSpec(name, 250))
    some = trainings(name, range(100))
    trained, cpu, _ = spent(lambda: train_together(some))
    training = cpu / len(some)
    old, new, off = [], [], []
    for seed in range(networks):
        there, cpu, _ = spent(lambda seed=seed: published(some[seed], data))
        old.append(cpu)
        here, cpu, _ = spent(lambda seed=seed: ours(network(some[seed], trained[seed]), data))
        new.append(training + cpu)
        assert here["common"] == there["common"]
        assert (here["pairs"] == there["pairs"])[there["known"]].all()
        off.append(abs(there["trace"] / here["trace"] - 1))
    a, b = statistics.median(old), statistics.median(new)
    print(
        f"| {name} | {networks} | {a:.1f} | {b:.2f} | {training:.3f} | **{a / b:.0f}** | {100 * statistics.fmean(off):.0f} % |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3, help="of the trainings")
    parser.add_argument("--networks", type=int, default=2, help="that the published procedure measures")
    parser.add_argument("--quick", action="store_true", help="10 networks, one data set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ["mnist", "fashion-mnist"]
    try:
        load_subset(DataSpec("mnist", 250))
    except DataError:
        names = ["digits"]
    names = names[: 1 if arguments.quick else None]
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.rounds} interleaved rounds, medians\n")
    print(
        "| CPU s (wall s) | networks | one by one | ensemble, one core | ensemble, two cores "
        "| faster per core | on two cores, by CPU | on two cores, by wall |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        ensembles(name, 10 if arguments.quick else 100, arguments.rounds)
    print(
        "\n| CPU s a network | networks | published procedure | this library | of it training | times faster | trace off by |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        pipelines(name, arguments.networks)


if __name__ == "__main__":
    main()
