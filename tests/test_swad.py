"""The streaming rule against Algorithm 1 written over the whole recorded run, and against published-code vectors.

Iterates are one-hot in float64 wherever the rule is tested, so that the averaged tensor *is* the list of weights that
every step got.
"""

from __future__ import annotations

import io
import json
import math
import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatminima.averaging import SWAD, SWADResult, SWADStatus

VECTORS = json.loads((Path(__file__).parent / "vectors" / "swad.json").read_text(encoding="utf-8"))
CONVERGING = [v for v in VECTORS if v["paper"] is not None]


@dataclass
class Run:
    """A recorded training run: ``values[i]`` was measured at step ``at[i]``; ``broken`` steps had NaN weights."""

    values: list[float]
    at: list[int]
    steps: int
    n_converge: int = 3
    n_tolerance: int = 6
    tolerance: float = 0.3
    broken: frozenset[int] = frozenset()

    @classmethod
    def of(cls, vector: dict[str, Any]) -> Run:
        values = [float(value) for value in vector["val_loss"]]
        at = [e * vector["eval_every"] for e in range(len(values))]
        return cls(values, at, at[-1] + 1, vector["n_s"], vector["n_e"], vector["tolerance_ratio"])

    def swad(self, *parameters: nn.Parameter) -> SWAD:
        rule = {"n_converge": self.n_converge, "n_tolerance": self.n_tolerance, "tolerance": self.tolerance}
        return SWAD(parameters, **rule)

    def iterate(self, step: int) -> Tensor:
        one_hot = torch.zeros(self.steps, dtype=torch.float64)
        one_hot[step] = math.nan if step in self.broken else 1.0
        return one_hot

    def play(self, swad: SWAD, parameter: nn.Parameter, steps: range | None = None) -> list[SWADStatus]:
        values = dict(zip(self.at, self.values, strict=True))
        statuses = []
        for step in range(self.steps) if steps is None else steps:
            parameter.data.copy_(self.iterate(step))
            swad.update()
            if step in values:
                statuses.append(swad.evaluate(values[step]))
        return statuses


def play(run: Run) -> tuple[SWAD, list[SWADStatus]]:
    parameter = nn.Parameter(torch.zeros(run.steps, dtype=torch.float64))
    swad = run.swad(parameter)
    return swad, run.play(swad, parameter)


@dataclass
class Expected:
    """What Algorithm 1 says about a run, and the weight of every iterate; ``weights`` is None if nothing is usable."""

    converged: bool
    start: int
    end: int
    threshold: float | None
    detected: int | None
    stopped: int | None
    weights: list[float] | None


def algorithm_1(run: Run) -> Expected:
    """The paper's rule, looking back over the whole record; NaN as +inf; segments with NaN weights dropped."""
    firsts = [0, *(step + 1 for step in run.at[:-1])]
    segments = [range(first, last + 1) for first, last in zip(firsts, run.at, strict=True)]
    lost = [any(step in run.broken for step in segment) for segment in segments]
    losses = [math.inf if bad or not math.isfinite(v) else v for v, bad in zip(run.values, lost, strict=True)]
    n_s, n_e = run.n_converge, run.n_tolerance

    def uniform(kept: Sequence[int]) -> list[float]:
        return [(step in kept) / len(kept) for step in range(run.steps)]

    for e in range(n_s - 1, len(losses)):
        window = losses[e - n_s + 1 : e + 1]
        if math.isfinite(window[0]) and window[0] == min(window):
            break
    else:
        usable = [segment for segment, bad in zip(segments, lost, strict=True) if not bad]
        if not usable:
            return Expected(False, 0, 0, None, None, None, None)
        return Expected(False, usable[-1][0], usable[-1][-1], None, None, None, uniform(usable[-1]))
    start = e - n_s + 1
    finite = [value for value in window if math.isfinite(value)]
    threshold = max(window[0], (1 + run.tolerance) * math.fsum(finite) / len(finite))
    stop = next((s for s in range(e, len(losses)) if min(losses[max(0, s - n_e + 1) : s + 1]) > threshold), None)
    good = [index for index, value in enumerate(losses) if value <= threshold]
    end = good[-1] if stop is None else stop - n_e
    kept = [run.at[start]] + [t for s, bad in zip(segments, lost, strict=True) if not bad for t in s]
    kept = sorted({step for step in kept if run.at[start] <= step <= run.at[end]})
    stopped = None if stop is None else run.at[stop]
    return Expected(True, run.at[start], run.at[end], threshold, run.at[e], stopped, uniform(kept))


def check(result: SWADResult, expected: Expected) -> None:
    assert expected.weights is not None
    assert result.converged == expected.converged
    assert (result.start_step, result.end_step) == (expected.start, expected.end)
    assert (result.detected_at, result.stopped_at) == (expected.detected, expected.stopped)
    if expected.threshold is None:
        assert result.threshold is None
    else:
        assert result.threshold == pytest.approx(expected.threshold, rel=1e-12)
    weights = result.tensors[0]
    assert result.n == sum(weight > 0 for weight in expected.weights)
    torch.testing.assert_close(weights, torch.tensor(expected.weights, dtype=torch.float64), rtol=0, atol=1e-12)


def random_run(rng: random.Random, broken: bool) -> Run:
    """Anything from one evaluation to thirty, mostly valleys, with ties, NaN, infinities and irregular periods."""
    count = rng.randint(1, 30)
    shape = rng.choice(["noise", "valley", "fall", "coarse"])
    bottom = rng.uniform(0, count)
    values = []
    for e in range(count):
        base = {"noise": 1.0, "valley": 0.3 + abs(e - bottom) / count, "fall": 2.0 - e / count, "coarse": 1.0}[shape]
        value = base * rng.uniform(0.7, 1.3)
        values.append(rng.choice([0.5, 0.6, 0.7]) if shape == "coarse" else value)
        if rng.random() < 0.05:
            values[-1] = rng.choice([math.nan, math.inf, -math.inf])
    period = rng.choice([1, 2, 3, None])
    first = rng.randint(0, 2)
    at = [first]
    for _ in range(count - 1):
        at.append(at[-1] + (rng.randint(1, 3) if period is None else period))
    steps = at[-1] + 1 + rng.choice([0, 0, 2])
    n_converge = rng.randint(1, 4)
    n_tolerance = rng.randint(n_converge, 7)
    lost = frozenset(rng.sample(range(steps), k=min(steps, rng.randint(1, 3)))) if broken else frozenset()
    return Run(values, at, steps, n_converge, n_tolerance, rng.choice([0.0, 0.05, 0.3, 1.0]), lost)


# ------------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_vectors(vector: dict[str, Any]) -> None:
    run, paper = Run.of(vector), vector["paper"]
    swad, statuses = play(run)
    result = swad.finalize()
    check(result, algorithm_1(run))
    assert result.converged == (paper is not None)
    if paper is None:
        assert [result.start_step, result.end_step] == vector["released"]["reported_range"]
        assert result.n == vector["released"]["n_averaged"]
        return
    assert (result.start_step, result.end_step, result.n) == (paper["t_s"], paper["t_e"], paper["n_iterates"])
    assert (result.detected_at, result.stopped_at) == (paper["detected_at"], paper["stopped_at"])
    assert result.threshold == pytest.approx(paper["threshold"], abs=1e-9)
    assert [status.converged for status in statuses] == [step >= paper["detected_at"] for step in run.at]
    dead = math.inf if paper["stopped_at"] is None else paper["stopped_at"]
    assert [status.dead for status in statuses] == [step >= dead for step in run.at]
    assert all((s.start_step, s.threshold) == (None, None) for s in statuses if not s.converged)
    assert [status.step for status in statuses] == run.at


@pytest.mark.parametrize("broken", [False, True], ids=["finite", "with-nan-weights"])
@pytest.mark.parametrize("block", range(4))
def test_streaming_is_algorithm_1(block: int, broken: bool) -> None:
    rng = random.Random(1000 * block + broken)
    seen = {"converged": 0, "stopped": 0, "fallback": 0, "unusable": 0}
    for _ in range(1250):
        run = random_run(rng, broken)
        expected = algorithm_1(run)
        swad, _ = play(run)
        if expected.weights is None:
            seen["unusable"] += 1
            with pytest.raises(RuntimeError, match="Training diverged"):
                swad.finalize()
            continue
        seen["converged" if expected.converged else "fallback"] += 1
        seen["stopped"] += expected.stopped is not None
        try:
            check(swad.finalize(), expected)
        except AssertionError as error:
            raise AssertionError(f"{run}\nexpected {expected}") from error
    assert min(seen["converged"], seen["stopped"], seen["fallback"]) > 50, seen  # the fuzz reaches every outcome
    assert (seen["unusable"] > 0) == broken


def test_the_result_can_be_asked_for_at_any_time() -> None:
    rng = random.Random(7)
    for _ in range(100):
        run = random_run(rng, broken=False)
        parameter = nn.Parameter(torch.zeros(run.steps, dtype=torch.float64))
        swad = run.swad(parameter)
        for step in range(run.steps):
            run.play(swad, parameter, range(step, step + 1))
            past = [(v, a) for v, a in zip(run.values, run.at, strict=True) if a <= step]
            if past:
                values, at = (list(column) for column in zip(*past, strict=True))
                so_far = Run(values, at, run.steps, run.n_converge, run.n_tolerance, run.tolerance)
                check(swad.finalize(), algorithm_1(so_far))


def test_a_plateau_at_zero_tolerance_is_not_bad() -> None:
    # Six times 0.1, summed naively and divided, can come out below 0.1: the floor itself would count as bad.
    for value in (0.1, 0.7, 1 / 3, 1e-30):
        for n in range(1, 8):
            run = Run([value] * 20, list(range(20)), 20, n, 7, 0.0)
            result = play(run)[0].finalize()
            assert (result.end_step, result.stopped_at) == (19, None)


def test_after_the_end_nothing_changes() -> None:
    vector = VECTORS[2]
    run = Run.of(vector)
    swad, statuses = play(run)
    assert statuses[-1].dead
    assert statuses[-1].step == 160  # two good evaluations came after the end
    assert (statuses[-1].start_step, statuses[-1].end_step) == (40, 80)
    result = swad.finalize()
    assert result.stopped_at == 140
    assert not any("left out" in note for note in result.notes)
    assert swad.state_dict()["current"]["n"] == 0  # not even work


# ----------------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("vector", CONVERGING, ids=[v["name"] for v in CONVERGING])
@pytest.mark.parametrize("weights_too", [False, True])
def test_a_nan_tail_leaves_the_result_unchanged(vector: dict[str, Any], weights_too: bool) -> None:
    run = Run.of(vector)
    parameter = nn.Parameter(torch.zeros(run.steps, dtype=torch.float64))
    swad = run.swad(parameter)
    run.play(swad, parameter)
    before = swad.finalize()
    for _ in range(10):
        for _ in range(5):
            if weights_too:
                parameter.data.fill_(math.nan)
            swad.update()
        swad.evaluate(math.nan)
    after = swad.finalize()
    assert torch.equal(after.tensors[0], before.tensors[0])
    assert (after.start_step, after.end_step, after.n) == (before.start_step, before.end_step, before.n)
    assert swad.status.dead
    if weights_too and before.stopped_at is None:
        assert any("held non-finite weights, were dropped" in note for note in after.notes)


def test_a_dropped_segment_is_named_and_its_neighbours_stay() -> None:
    model = nn.Linear(2, 1)
    swad = SWAD(model, n_converge=1)
    for step, loss in enumerate([1.0, 1.1, 1.2, 1.1]):
        model.weight.data.fill_(float(step))
        model.bias.data.fill_(math.inf if step == 1 else 0.0)
        swad.update()
        swad.evaluate(loss)
    result = swad.finalize()
    assert (result.start_step, result.end_step, result.n) == (0, 3, 3)
    assert result.tensors[0].flatten().tolist() == pytest.approx([5 / 3, 5 / 3])
    assert result.notes == (
        "1 segment(s) held non-finite weights, were dropped and counted as bad evaluations; the first is steps 1 to 1, "
        "in parameter 'bias'.",
    )


def test_only_non_finite_weights_is_an_error_that_names_them() -> None:
    model = nn.Linear(2, 1)
    model.weight.data.fill_(math.nan)
    swad = SWAD(model)
    swad.update()
    swad.evaluate(1.0)
    with pytest.raises(RuntimeError, match=r"parameter 'weight' was already NaN or infinite between steps 0 and 0"):
        swad.finalize()


# ---------------------------------------------------------------------------------------------------------------- notes


def test_notes_say_what_was_left_out() -> None:
    def notes(values: list[float], tail: int = 0) -> str:
        run = Run(values, [10 * e for e in range(len(values))], 10 * len(values) - 9 + tail)
        return " ".join(play(run)[0].finalize().notes)

    assert notes([2.0, 1.0, 1.1, 1.2]) == ""
    assert notes([2.0, 1.5, 1.2]).startswith("Not converged: no window of 3 evaluations")
    assert "steps 11 to 20" in notes([2.0, 1.5, 1.2])
    assert "Steps 31 to 34 are left out: no evaluation followed" in notes([2.0, 1.0, 1.1, 1.2], tail=4)
    assert "Steps 31 to 50 are left out: their evaluations were above" in notes([2.0, 1.0, 1.1, 1.2, 5.0, 5.0])
    assert "2 evaluation(s) were NaN or infinite (steps 0, 20)" in notes([math.nan, 1.0, math.inf, 1.2, 1.1])
    assert "still improving: 0.5 at the last evaluation, 1 at the start" in notes([2.0, 1.0, 1.1, 1.2, 0.5])


# --------------------------------------------------------------------------------------------------------------- resume


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def only_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and only_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(only_plain(item) for item in value)
    return value is None or type(value) in (Tensor, int, float, str)


class Walk:
    """A small float32 model on a seeded random walk: step ``t`` has the same bits however it is reached."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)

    def at(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) + step / 10)


@pytest.mark.parametrize(
    ("vector", "dtype"),
    [*((v, torch.float32) for v in VECTORS), (VECTORS[2], torch.bfloat16)],
    ids=[*(v["name"] for v in VECTORS), "bfloat16"],
)
def test_resuming_at_any_step_changes_no_bit(vector: dict[str, Any], dtype: torch.dtype) -> None:
    run, walk = Run.of(vector), Walk(dtype)
    rule = {"n_converge": run.n_converge, "n_tolerance": run.n_tolerance, "tolerance": run.tolerance}
    values = dict(zip(run.at, run.values, strict=True))

    def advance(swad: SWAD, steps: range, states: list[dict[str, Any]] | None = None) -> None:
        for step in steps:
            walk.at(step)
            swad.update()
            if states is not None and step in values:
                states.append(swad.state_dict())  # between update() and evaluate(), too
            if step in values:
                swad.evaluate(values[step])
            if states is not None:
                states.append(swad.state_dict())

    whole = SWAD(walk.model, **rule)
    states: list[dict[str, Any]] = [whole.state_dict()]
    advance(whole, range(run.steps), states)
    expected = whole.finalize()
    for state in states:
        assert only_plain(state)
        resumed = SWAD(walk.model, **rule)
        resumed.load_state_dict(through_file(state))
        step = state["step"]
        if step in values and state["evaluated"] < step:
            walk.at(step)
            resumed.evaluate(values[step])
        advance(resumed, range(step + 1, run.steps))
        result = resumed.finalize()
        assert all(torch.equal(a, b) for a, b in zip(result.tensors, expected.tensors, strict=True))
        assert result.__dict__ | {"tensors": ()} == expected.__dict__ | {"tensors": ()}


def test_resuming_keeps_dropped_segments() -> None:
    rng = random.Random(3)
    for _ in range(200):
        run = random_run(rng, broken=True)
        parameter = nn.Parameter(torch.zeros(run.steps, dtype=torch.float64))
        whole, part, rest = run.swad(parameter), run.swad(parameter), run.swad(parameter)
        cut = rng.randint(0, run.steps)
        run.play(whole, parameter)
        run.play(part, parameter, range(cut))
        rest.load_state_dict(through_file(part.state_dict()))
        run.play(rest, parameter, range(cut, run.steps))
        if algorithm_1(run).weights is not None:
            a, b = whole.finalize(), rest.finalize()
            assert torch.equal(a.tensors[0], b.tensors[0])
            assert a.notes == b.notes


def test_a_state_is_a_copy_both_ways() -> None:
    run = Run.of(VECTORS[1])
    parameter = nn.Parameter(torch.zeros(run.steps, dtype=torch.float64))
    swad = run.swad(parameter)
    run.play(swad, parameter, range(100))
    state, expected = swad.state_dict(), swad.finalize().tensors[0]
    other = run.swad(parameter)
    other.load_state_dict(state)
    run.play(swad, parameter, range(100, run.steps))
    run.play(other, parameter, range(100, run.steps))
    again = run.swad(parameter)
    again.load_state_dict(state)
    assert torch.equal(again.finalize().tensors[0], expected)


def test_a_state_with_other_settings_or_parameters_is_refused() -> None:
    model = nn.Linear(2, 2)
    swad = SWAD(model)
    swad.update()
    swad.evaluate(1.0)
    state = swad.state_dict()
    for change in ({"n_converge": 2}, {"n_tolerance": 7}, {"tolerance": 0.2}):
        with pytest.raises(ValueError, match=r"saved with \w+=.*; this SWAD has \w+="):
            SWAD(model, **change).load_state_dict(state)
    with pytest.raises(ValueError, match=r"shapes \[\(2, 2\), \(2,\)\]; here are 2 of shapes \[\(3, 3\)"):
        SWAD(nn.Linear(3, 3)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"not a state saved by SWAD: it has no 'rule\.best'"):
        swad.load_state_dict(state | {"rule": {name: value for name, value in state["rule"].items() if name != "best"}})
    with pytest.raises(ValueError, match=r"saved with variant='paper'; this SWAD has variant='released'"):
        SWAD(model, variant="released", nan="bad").load_state_dict(state)
    double = SWAD(nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"needs torch\.float64"):
        double.load_state_dict(state)
    assert double.status.step == -1
    assert swad.finalize().n == 1


# ------------------------------------------------------------------------------------------------- memory and precision


class Alive(TorchDispatchMode):
    """Counts the tensors of one shape that are alive at the same time, ``own`` and their views left out."""

    def __init__(self, *own: Tensor) -> None:
        super().__init__()
        self.shape, self.own, self.peak = own[0].shape, {tensor.data_ptr() for tensor in own}, 0
        self.known: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.shape == self.shape and tensor.dtype != torch.bool:
                self.known[id(tensor)] = weakref.ref(tensor)
        alive = {tensor.data_ptr() for ref in self.known.values() if (tensor := ref()) is not None}
        self.peak = max(self.peak, len(alive - self.own))
        return out


def test_the_memory_probe_sees_tensors() -> None:
    own = torch.zeros(7, 3)
    with Alive(own) as alive:
        own.add_(1)
        kept = [torch.zeros(7, 3) for _ in range(3)]
        del kept[0]
        kept.append(torch.zeros(7, 3))
        torch.zeros(3, 7)
    assert alive.peak == 3


def test_at_most_three_copies_or_n_converge() -> None:
    rng = random.Random(5)
    peaks: dict[int, int] = {}
    for _ in range(80):
        run = random_run(rng, broken=rng.random() < 0.3)
        run.n_converge = rng.randint(1, 6)
        run.n_tolerance = max(run.n_tolerance, run.n_converge)
        parameters = [nn.Parameter(torch.zeros(7, 3)) for _ in range(10)]
        swad = run.swad(*parameters)
        values = dict(zip(run.at, run.values, strict=True))
        with Alive(*parameters) as alive:
            for step in range(run.steps):
                parameters[-1].data.view(-1)[0] = math.nan if step in run.broken else float(step)
                swad.update()
                if step in values:
                    swad.evaluate(values[step])
        peaks[run.n_converge] = max(peaks.get(run.n_converge, 0), alive.peak)
    # Ten tensors make a copy; looking for a NaN needs room for one tensor more.
    assert all(peak <= 10 * max(3, n) + 1 for n, peak in peaks.items()), peaks
    assert peaks[6] >= 60  # the probe does see the copies that the rule needs


def test_bfloat16_weights_have_a_float32_average() -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(500, generator=generator, dtype=torch.float64)
    drift = 1e-4 * torch.randn(500, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start.to(torch.bfloat16))
    swad, exact, count = SWAD([parameter]), torch.zeros(500, dtype=torch.float64), 0
    for step in range(2001):
        parameter.data.copy_(start + step * drift)
        swad.update()
        if step >= 100:
            exact += parameter.detach().double()
            count += 1
        if step % 100 == 0:
            swad.evaluate(2.0 if step == 0 else 1.0)
    result = swad.finalize()
    assert (result.n, result.start_step, result.tensors[0].dtype) == (count, 100, torch.float32)
    exact /= count
    assert (result.tensors[0].double() - exact).norm() / (exact - start).norm() < 1e-4


# ------------------------------------------------------------------------------------------- in the model and out again


def trained(seed: int = 0) -> tuple[nn.Sequential, SWAD]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swad = SWAD(model, n_converge=1)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        swad.update()
        swad.evaluate(1.0)
    return model, swad


@pytest.mark.parametrize("fail", [False, True])
def test_swapped_restores_every_bit(fail: bool) -> None:
    model, swad = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = swad.finalize()
    assert result.names == ("0.weight", "1.weight", "1.bias", "2.weight", "2.bias")

    def look() -> None:
        with swad.swapped():
            held = dict(model.named_parameters())
            assert all(torch.equal(held[n], t) for n, t in zip(result.names or (), result.tensors, strict=True))
            model(torch.randn(8, 3))
            for action in (swad.update, lambda: swad.evaluate(1.0), lambda: swad.copy_to(model)):
                with pytest.raises(RuntimeError, match="inside swapped"):
                    action()
            if fail:
                raise KeyboardInterrupt

    if fail:
        with pytest.raises(KeyboardInterrupt):
            look()
    else:
        look()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(swad.finalize().tensors[0], result.tensors[0])
    swad.update()


def test_copy_to_is_for_good_and_leaves_frozen_parameters() -> None:
    model, swad = trained()
    frozen, result = model[0].bias.clone(), swad.finalize()
    swad.copy_to(model)
    assert torch.equal(model[0].weight, result.tensors[0])
    assert torch.equal(model[0].bias, frozen)


def test_tied_parameters_are_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    swad = SWAD(model, n_converge=1)
    for step in range(3):
        model[0].weight.data.fill_(float(step))
        swad.update()
        swad.evaluate(1.0)
    result = swad.finalize()
    assert result.names == ("0.weight",)
    assert result.tensors[0].unique().tolist() == [1.0]
    swad.copy_to(model)
    assert model[1].weight is model[0].weight
    assert model[1].weight.unique().tolist() == [1.0]


def test_a_result_is_not_moved_by_later_training() -> None:
    model, swad = trained()
    result = swad.finalize()
    before = [tensor.clone() for tensor in result.tensors]
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    swad.update()
    swad.evaluate(1.0)
    assert all(torch.equal(a, b) for a, b in zip(result.tensors, before, strict=True))
    assert not torch.equal(swad.finalize().tensors[0], before[0])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n_converge": 0}, ValueError, "n_converge=0 must be at least 1"),
        ({"n_tolerance": -1}, ValueError, "n_tolerance=-1 must be at least 1"),
        ({"n_converge": 2.0}, TypeError, "n_converge must be an int"),
        ({"n_converge": True}, TypeError, "n_converge must be an int"),
        ({"n_converge": 7}, ValueError, "n_converge=7 is larger than n_tolerance=6"),
        ({"tolerance": -0.1}, ValueError, "tolerance=-0.1"),
        ({"tolerance": math.nan}, ValueError, "tolerance=nan"),
        ({"tolerance": math.inf}, ValueError, "tolerance=inf"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SWAD(nn.Linear(1, 1), **settings)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.tensor(-0.5), torch.ones(2), torch.empty(0)])
def test_a_refused_value_changes_nothing(value: float | Tensor) -> None:
    model = nn.Linear(1, 1)
    swad = SWAD(model)
    swad.update()
    with pytest.raises(ValueError, match=r"evaluate\(\) (got|takes one number)"):
        swad.evaluate(value)
    assert swad.evaluate(torch.tensor(1.5)).step == 0
    assert swad.finalize().n == 1


def test_calls_in_the_wrong_order_are_refused() -> None:
    model = nn.Linear(1, 1)
    swad = SWAD(model)
    assert swad.status == SWADStatus(False, False, None, None, None, -1)
    with pytest.raises(RuntimeError, match=r"There was no update\(\) yet"):
        swad.evaluate(1.0)
    swad.update()
    with pytest.raises(RuntimeError, match=r"evaluate\(\) has not been called"):
        swad.finalize()
    with pytest.raises(RuntimeError, match=r"evaluate\(\) has not been called"), swad.swapped():
        pass
    swad.evaluate(1.0)
    with pytest.raises(RuntimeError, match=r"no update\(\) since the evaluation at step 0"):
        swad.evaluate(1.0)


def test_a_changed_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    swad = SWAD(model)
    swad.update()
    swad.evaluate(1.0)
    swad.update()
    model[0].bias.data = torch.zeros(1)
    with pytest.raises(ValueError, match=r"shape \(2,\) when its mean began and now has shape \(1,\)"):
        swad.update()
    assert swad.status.step == 1
    model[0] = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"'0\.weight' was replaced"):
        swad.evaluate(1.0)
    with pytest.raises(ValueError, match=r"'0\.weight' was replaced"), swad.swapped():
        pass


# -------------------------------------------------------------------------------------------------------- other metrics


def test_a_metric_to_be_maximised_is_the_mirror_image() -> None:
    rng = random.Random(9)
    for _ in range(200):
        run = random_run(rng, broken=False)
        tolerance = rng.choice([0.02, 0.1])
        rule = {"n_converge": run.n_converge, "n_tolerance": run.n_tolerance, "tolerance": tolerance}
        absolute = {**rule, "tolerance_mode": "absolute"}
        results = []
        for options, flip in (
            ({**absolute, "direction": "min"}, lambda v: v - 5.0),  # any sign
            ({**absolute, "direction": "max"}, lambda v: 5.0 - v),
        ):
            parameter = nn.Parameter(torch.zeros(run.steps, dtype=torch.float64))
            swad = SWAD([parameter], **options)
            changed = Run([flip(v) for v in run.values], run.at, run.steps)
            changed.play(swad, parameter)
            results.append(swad.finalize())
        left, right = results
        assert torch.equal(left.tensors[0], right.tensors[0])
        assert (left.start_step, left.end_step, left.n) == (right.start_step, right.end_step, right.n)
        assert (left.threshold is None) == (right.threshold is None)
        if left.threshold is not None and right.threshold is not None:
            assert left.threshold == pytest.approx(-right.threshold)


def test_accuracy_with_a_relative_tolerance() -> None:
    model = nn.Linear(1, 1, bias=False)
    swad = SWAD(model, n_converge=2, n_tolerance=2, tolerance=0.1, direction="max")
    for weight, accuracy in enumerate([0.3, 0.8, 0.7, 0.68, 0.5, 0.5]):
        nn.init.constant_(model.weight, weight)
        swad.update()
        swad.evaluate(accuracy)
    result = swad.finalize()
    assert result.threshold == pytest.approx(0.9 * 0.75)
    assert (result.start_step, result.end_step, result.stopped_at) == (1, 3, 5)


def test_the_nan_policies() -> None:
    model = nn.Linear(1, 1)
    strict = SWAD(model, nan="raise")
    strict.update()
    with pytest.raises(ValueError, match=r"evaluate\(\) got nan"):
        strict.evaluate(math.nan)
    assert strict.evaluate(1.0).step == 0
    swad = SWAD(model)
    swad.update()
    assert not swad.evaluate(math.nan).converged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "realeased"}, "unknown variant 'realeased': expected one of released, paper"),
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"tolerance_mode": "rel"}, "unknown tolerance_mode 'rel': expected one of relative"),
        ({"nan": "ignore"}, "unknown nan policy 'ignore'"),
        ({"nan": "released"}, "part of variant='released'"),
        ({"direction": "max", "tolerance": 1.0}, "accepts everything above 0"),
        ({"buffers": "all"}, "unknown buffers policy 'all'"),
    ],
)
def test_choices_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SWAD(nn.Linear(1, 1), **settings)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_changed_shape_is_refused_also_right_after_an_evaluation(variant: Any) -> None:
    model = nn.Linear(2, 2)
    swad = SWAD(model, variant=variant)
    swad.update()
    swad.evaluate(1.0)
    model.bias.data = torch.zeros(1)
    with pytest.raises(ValueError, match=r"had shape \(2,\) when its mean began and now has shape \(1,\)"):
        swad.update()
    assert swad.status.step == 0
    assert swad.finalize().n == 1


def test_averaged_buffers_follow_the_valley() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    swad = SWAD(model, n_converge=2, n_tolerance=2, buffers="average")
    for step, loss in enumerate([3.0, 1.0, 1.1, 1.2, 9.0, 9.0]):
        model[1].running_mean.fill_(step)
        swad.update()
        swad.evaluate(loss)
    assert swad.finalize().tensors[-2].tolist() == [2.0, 2.0]
    with swad.swapped():
        assert model[1].running_mean.tolist() == [2.0, 2.0]
    assert model[1].running_mean.tolist() == [5.0, 5.0]


def test_it_has_what_the_other_averages_have() -> None:
    model = nn.Linear(1, 1, bias=False)
    swad = SWAD(model, n_converge=2, n_tolerance=2)
    assert (swad.names, swad.n, swad.step) == (("weight",), 0, -1)
    with pytest.raises(RuntimeError, match="no average yet"):
        swad.tensors()
    for weight, loss in enumerate([3.0, 1.0, 1.1, 1.2, 9.0, 9.0]):
        _ = nn.init.constant_(model.weight, weight)
        swad.update()
        swad.evaluate(loss)
    result = swad.finalize()
    assert (swad.n, swad.step) == (result.n, 5)
    assert torch.equal(swad.tensors()[0], result.tensors[0])


@pytest.mark.parametrize("value", ["0.5", True, None, [0.5]])
def test_what_is_no_number_is_no_value(value: Any) -> None:
    swad = SWAD(nn.Linear(1, 1))
    swad.update()
    with pytest.raises(TypeError, match=r"evaluate\(\) takes one number, got"):
        swad.evaluate(value)
    swad.evaluate(torch.tensor([0.5]))


@pytest.mark.parametrize("name", ["step", "evaluated", "value"])
def test_a_state_whose_counts_are_no_numbers_is_refused(name: str) -> None:
    swad = SWAD(nn.Linear(1, 1))
    swad.update()
    swad.evaluate(1.0)
    before = swad.status
    with pytest.raises(ValueError, match=f"its '{name}' is 'x', expected a number"):
        swad.load_state_dict({**swad.state_dict(), name: "x"})
    assert swad.status == before
