from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flatminima.measures import loss_plane
from flatminima.measures.plane import plane_basis
from flatminima.objective import Objective


def bowl(n: int) -> Objective:
    """``L(w) = |w|**2``."""
    model = nn.Linear(n, 1, bias=False).double()
    return Objective(model, nn.functional.mse_loss, (n**0.5 * torch.eye(n).double(), torch.zeros(n, 1).double()))


@given(st.integers(0, 1000), st.integers(3, 8))
def test_the_basis_is_orthonormal_and_spans_the_points(seed: int, n: int) -> None:
    points = list(torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    u, v = plane_basis(points)
    assert torch.allclose(torch.stack([u @ u, v @ v, u @ v]), torch.tensor([1.0, 1.0, 0.0]).double(), atol=1e-12)
    for point in points[1:]:
        offset = point - points[0]
        assert torch.allclose((offset @ u) * u + (offset @ v) * v, offset, atol=1e-10)
    assert ((points[1] - points[0]) @ u) > 0
    assert ((points[2] - points[0]) @ v) > 0


def test_the_grid_holds_the_loss_at_every_point_of_the_plane() -> None:
    n = 6
    generator = torch.Generator().manual_seed(1)
    a, b, c, other = torch.randn(4, n, generator=generator, dtype=torch.float64)
    objective = bowl(n)
    before = objective.point().clone()
    plane = loss_plane(objective, {"a": a, "b": b, "c": c}, others={"other": other}, resolution=5, margin=0.1)
    u, v = plane_basis([a, b, c])
    for i, y in enumerate(plane.y):
        for j, x in enumerate(plane.x):
            assert plane.loss[i][j] == pytest.approx((a + x * u + y * v).square().sum().item())
    assert plane.points["a"] == (0.0, 0.0)
    assert plane.points["b"] == pytest.approx(((b - a).norm().item(), 0.0), abs=1e-12)
    assert list(plane.points) == ["a", "b", "c", "other"]
    assert max(plane.distance[name] for name in "abc") < 1e-12
    offset = other - a
    off = offset - (offset @ u) * u - (offset @ v) * v
    assert plane.distance["other"] == pytest.approx(off.norm().item())
    xs = [x for x, _ in plane.points.values()]
    extent = max(xs) - min(xs)
    assert (plane.x[0], plane.x[-1]) == (pytest.approx(min(xs) - 0.1 * extent), pytest.approx(max(xs) + 0.1 * extent))
    assert plane.cost == pytest.approx(25 / 3)
    assert plane.to_dict()["points"]["a"] == (0.0, 0.0)
    assert torch.equal(objective.point(), before)


def test_what_spans_no_plane_is_refused() -> None:
    objective, e = bowl(3), torch.eye(3)
    with pytest.raises(ValueError, match="the first two points are the same"):
        loss_plane(objective, {"a": e[0], "b": e[0], "c": e[1]})
    with pytest.raises(ValueError, match="lie on one line"):
        loss_plane(objective, {"a": e[0], "b": 2 * e[0], "c": 5 * e[0]})
    with pytest.raises(ValueError, match="needs three flat vectors of one length"):
        loss_plane(objective, {"a": e[0], "b": e[1]})
    with pytest.raises(ValueError, match=r"point 'far' has shape \(4,\): the objective has 3 parameters"):
        loss_plane(objective, {"a": e[0], "b": e[1], "c": e[2]}, others={"far": torch.zeros(4)})
    with pytest.raises(ValueError, match="resolution 1"):
        loss_plane(objective, {"a": e[0], "b": e[1], "c": e[2]}, resolution=1)
