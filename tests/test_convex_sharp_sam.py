"""Theorem 6: in one dimension SAM ends at the sharpest minimum, and SA-GD does not."""

from __future__ import annotations

import math

import pytest
import torch

from convex_fixture import VECTORS
from flatminima.problems.convex import SharpSAM1D, gd, optimization_bound, sagd, sam

pytestmark = pytest.mark.usefixtures("one_thread")


def reached(f: SharpSAM1D, radius: float, w: torch.Tensor) -> float:
    return f.empirical_risk(w) + f.sharpness(radius, w).lower


@pytest.mark.parametrize("row", VECTORS["sam_1d"]["rows"], ids=lambda row: f"w1={row['w1']}")
def test_sam_as_recorded(row: dict[str, float]) -> None:
    tol, f = VECTORS["sam_1d"]["tol"], SharpSAM1D(row["w1"])
    run = sam(f, lr=row["eta"], radius=row["r"], steps=int(row["T"]))
    assert run.values.reshape(50, -1).sum(1)[:5].tolist() == pytest.approx(row["first_5"], abs=tol)
    assert float(run.last) == pytest.approx(row["w_T"], abs=tol)
    assert reached(f, row["r"], run.last) == pytest.approx(row["saer_w_T"], abs=tol)
    assert float(run.suffix_average(1)) == pytest.approx(row["average"], abs=tol)
    assert reached(f, row["r"], run.suffix_average(1)) == pytest.approx(row["saer_average"], abs=tol)
    if row["w1"] > 0:
        assert reached(f, row["r"], run.last) >= f.floor(lr=row["eta"], radius=row["r"])


@pytest.mark.parametrize("row", VECTORS["sagd_1d"]["rows"], ids=lambda row: f"eta={row['eta']:.3g}")
def test_sagd_as_recorded(row: dict[str, float]) -> None:
    tol, f = VECTORS["sagd_1d"]["tol"], SharpSAM1D(row["w1"])
    run = sagd(f, lr=row["eta"], radius=row["r"], steps=int(row["T"]), tie_break="unique")
    expected = [-row["r"] * (1 - (1 - row["eta"]) ** t) for t in range(int(row["T"]))]
    assert run.values[:, 0].tolist() == pytest.approx(expected, abs=tol)
    assert float(run.last) == pytest.approx(row["w_T"], abs=tol)
    assert reached(f, row["r"], run.last) == pytest.approx(row["saer_w_T"], abs=tol)
    assert reached(f, row["r"], run.suffix_average(1)) == pytest.approx(row["saer_average"], abs=tol)
    bound = optimization_bound(
        smoothness=1, lr=row["eta"], radius=row["r"], flatness_radius=0.5, steps=int(row["T"]), distance=0.5
    )
    assert bound == pytest.approx(row["bound"], abs=tol)
    assert reached(f, row["r"], run.suffix_average(1)) <= bound


def test_the_theorem() -> None:
    for radius in (0.0, 0.2, 0.5):
        f = SharpSAM1D()
        assert f.certify(radius).covered
        run = sam(f, lr=0.25, radius=radius, steps=20)
        least = reached(f, radius, f.minimisers["flat"])
        for tau in (1, 10, 20):
            assert reached(f, radius, run.suffix_average(tau)) - least == pytest.approx(radius**2 / 2, rel=1e-15)
    assert [c.name for c in SharpSAM1D(0.1).certify(0.6).checks if not c.holds] == ["w_1 = 0", "r <= 1/2"]


def test_gradient_descent_ends_at_the_same_sharp_point() -> None:
    f = SharpSAM1D(0.9)
    assert 0 < float(gd(f, lr=0.25, steps=60).last) < 1e-6


def test_any_displacement_maximises_in_the_flat_part() -> None:
    f = SharpSAM1D(-0.7)
    assert f.sharpness(0.4).lower == 0.0
    run = sagd(f, lr=0.25, radius=0.4, steps=3, tie_break="power")
    assert float(run.last) == -0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"start": 1.5}, r"in \[-1, 1\], got 1.5"), ({"start": math.nan}, "got nan"), ({"smoothness": -1}, "smoothness")],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpSAM1D(**arguments)


def test_a_floor_needs_a_step_size_and_a_radius() -> None:
    with pytest.raises(ValueError, match="lr must be finite and > 0, got nan"):
        SharpSAM1D(0.1).floor(lr=math.nan, radius=0.4)
    with pytest.raises(ValueError, match="radius must be finite and >= 0, got -1"):
        SharpSAM1D(0.1).floor(lr=0.25, radius=-1.0)
    with pytest.raises(ValueError, match="start must be finite, got '0'"):
        SharpSAM1D("0")  # type: ignore[arg-type]
