"""Away and back: the bits that were there, in the storage they were in, whatever happens in between."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatminima import Perturbation

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(t: Tensor) -> Tensor:
    """As integers: tells -0.0 from 0.0, and compares NaN."""
    return t.detach().clone().view(INTEGER[t.dtype])


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], float | list[float]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
    dtype, direction = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([*DTYPES, torch.float64]))
    size = draw(st.sampled_from([1e-6, 1.0, 1e4]))
    tensors = [(torch.randn(s, generator=generator) * size).to(dtype) for s in shapes]
    directions = [torch.randn(s, generator=generator).to(direction) for s in shapes]
    scale = st.floats(-1e3, 1e3, allow_subnormal=False)
    return tensors, directions, draw(st.one_of(scale, st.lists(scale, min_size=len(shapes), max_size=len(shapes))))


@settings(max_examples=150, deadline=None)
@given(moves())
def test_the_way_back_is_exact(case: tuple[list[Tensor], list[Tensor], float | list[float]]) -> None:
    tensors, directions, scale = case
    before, where = [bits(t) for t in tensors], [t.data_ptr() for t in tensors]
    scales = scale if isinstance(scale, list) else [scale] * len(tensors)
    with Perturbation() as away:
        away.move(tensors, directions, scale)
        assert away.active
        for t, old, d, s in zip(tensors, before, directions, scales, strict=True):
            clean = old.view(t.dtype).double()
            rounding = 4 * torch.finfo(t.dtype).eps * (clean.abs() + (s * d.double()).abs()) + 1e-6
            moved = t.double()
            assert bool(((moved - clean - s * d.double()).abs() <= rounding)[moved.isfinite()].all())
    assert not away.active
    assert all(torch.equal(bits(t), old) for t, old in zip(tensors, before, strict=True))
    assert [t.data_ptr() for t in tensors] == where


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_hundred_moves_do_not_drift_where_subtracting_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1000, generator=generator).to(dtype)
    before, subtracted, away = bits(w), w.clone(), Perturbation()
    for _ in range(200):
        d = torch.randn(1000, generator=generator).to(dtype)
        away.move([w], [d], 0.05)
        away.restore()
        subtracted.add_(d, alpha=0.05).sub_(d, alpha=0.05)
    assert torch.equal(bits(w), before)
    assert not torch.equal(bits(subtracted), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_survive(dtype: torch.dtype) -> None:
    w = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    w = w.to(dtype)
    before = bits(w)
    with Perturbation() as away:
        away.move([w], [torch.full_like(w, torch.finfo(dtype).max)], 2.0)
    assert torch.equal(bits(w), before)


def test_an_exception_passes_through_and_restores() -> None:
    w = nn.Parameter(torch.ones(3))

    def interrupted() -> None:
        with Perturbation() as away:
            away.move([w], [torch.ones(3)], 1.0)
            assert w.tolist() == [2.0, 2.0, 2.0]
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert w.tolist() == [1.0, 1.0, 1.0]
    assert w.grad is None
    assert w.requires_grad


def test_a_move_that_fails_half_way_is_undone() -> None:
    a, b = torch.ones(2), torch.ones(2)
    with pytest.raises(RuntimeError), Perturbation() as away:
        away.move([a, b], [torch.ones(2), torch.ones(3)], 1.0)
    assert a.tolist() == b.tolist() == [1.0, 1.0]


def test_a_nested_move_is_refused_and_the_first_still_comes_back() -> None:
    w = torch.ones(2)
    with Perturbation() as away:
        away.move([w], [torch.ones(2)])
        with pytest.raises(RuntimeError, match="already displaced"):
            away.move([w], [torch.ones(2)])
        assert w.tolist() == [2.0, 2.0]
    assert w.tolist() == [1.0, 1.0]


def test_only_what_was_moved_is_restored() -> None:
    moved, other = torch.ones(2), torch.ones(2)
    with Perturbation() as away:
        away.move([moved], [torch.ones(2)])
        other.fill_(5.0)
    assert other.tolist() == [5.0, 5.0]
    assert moved.tolist() == [1.0, 1.0]


def test_views_and_aliases_keep_their_storage() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    column, before = whole[:, 1], torch.arange(12.0).reshape(3, 4)
    with Perturbation() as away:
        away.move([column, whole.t()[2]], [torch.ones(3), torch.ones(3)], [1.0, 2.0])
        assert torch.equal(whole - before, torch.tensor([[0.0, 1.0, 2.0, 0.0]]).expand(3, 4))
    assert torch.equal(whole, before)


def test_one_perturbation_serves_different_sets_of_tensors() -> None:
    away = Perturbation()
    for tensors in ([torch.ones(2)], [torch.ones(3), torch.zeros(1)], [torch.ones(2).double()], []):
        before = [t.clone() for t in tensors]
        with away:
            away.move(tensors, [torch.ones_like(t) for t in tensors], 0.5)
        assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))
    away.restore()  # nothing displaced: nothing happens


def test_numbers_that_do_not_match_are_refused_before_anything_moves() -> None:
    w, away = torch.ones(2), Perturbation()
    for directions, scale in (([], 1.0), ([torch.ones(2)] * 2, 1.0), ([torch.ones(2)], [1.0, 2.0])):
        with pytest.raises(ValueError, match="got 1 tensors"):
            away.move([w], directions, scale)
    assert not away.active
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("count", [1, 3])
def test_tensors_that_change_shape_or_storage_between_moves(count: int) -> None:
    tensors, away = [torch.arange(6.0).reshape(2, 3) for _ in range(count)], Perturbation()
    for change in (
        lambda t: t.data.view(3, 2),
        lambda t: t.data.clone(),
        lambda t: t.data[:2],
        lambda t: t.data.double(),
    ):
        before = [t.clone() for t in tensors]
        with away:
            away.move(tensors, [torch.ones_like(t) for t in tensors], 0.5)
            assert all(torch.equal(t, b + 0.5) for t, b in zip(tensors, before, strict=True))
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
        for t in tensors:
            t.data = change(t)


def test_storage_that_is_swapped_while_displaced_is_restored_where_it_is_then() -> None:
    tensors = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    with Perturbation() as away:
        away.move(tensors, [torch.ones(2)] * 3, 0.5)
        for t in tensors:
            t.data = t.data.clone()
    assert all(t.tolist() == [1.0, 1.0] for t in tensors)


def test_what_autograd_has_seen_is_known_to_have_changed() -> None:
    w = nn.Parameter(torch.ones(2))
    loss = (w**2).sum()
    with Perturbation() as away:
        away.move([w], [torch.ones(2)], 0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
