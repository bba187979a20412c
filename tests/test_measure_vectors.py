"""Every measure that the specification tabulates, at every point of its two-layer network."""

from __future__ import annotations

import pytest
import torch

from flatminima import MeasureOptions, Objective, measure
from flatminima.measures import scales
from flatminima.measures.relative_flatness import relative_flatness_of
from flatminima.measures.sharpness import Ball, one_step_rise
from flatminima.operators import GaussNewton
from weakness_fixture import LAYER_SCALES, POINTS, VECTORS, data, dense_hessian, network, objective

RTOL = 1e-9
MEASURED = {
    "lmax": "lambda_max",
    "trace": "trace",
    "sum_w2_Hii": "adaptive_trace",
    "wHw": "w_hessian_w",
    "fisher_rao": "fisher_rao",
    "relflat_W2": "relative_flatness",
    "wnorm": "parameter_norm",
    "specprod": "spectral_product",
    "orbit_min_trace": "orbit_minimal_trace",
}


def test_the_base_point_predicts_what_is_tabulated() -> None:
    logits = network()(data()[0])
    assert logits.tolist() == [pytest.approx(row) for row in VECTORS["logits_base"]]
    assert logits.argmax(1).tolist() == VECTORS["pred"]


@pytest.mark.parametrize("point", POINTS)
def test_measures(point: str) -> None:
    f, expected = objective(point), POINTS[point]
    assert f.loss() == pytest.approx(expected["loss"], rel=RTOL)
    found = measure(
        f, [*MEASURED.values(), "positive_eigenvalues", "negative_eigenvalues"], options=MeasureOptions(rtol=1e-12)
    )
    for key, name in MEASURED.items():
        assert found[name].value == pytest.approx(expected[key], rel=RTOL), name
        assert found[name].error is not None
        assert found[name].error <= 1e-9 * expected[key]
    assert [found["positive_eigenvalues"].value, found["negative_eigenvalues"].value] == expected["inertia"]
    assert relative_flatness_of(f, "0").value == pytest.approx(expected["relflat_W1"], rel=RTOL)


@pytest.mark.parametrize("point", POINTS)
def test_one_step_sharpness(point: str) -> None:
    f, expected = objective(point), POINTS[point]
    steps = {
        "sam_1step": Ball(scales.plain(f), 0.05),
        "adaptive_elem_1step": Ball(scales.elementwise(f), 0.1),
        "adaptive_as_coded_1step": Ball(scales.asam(f), 0.1),
        "adaptive_filter_1step": Ball(scales.filterwise(f), 0.1),
    }
    for key, ball in steps.items():
        assert one_step_rise(f, ball) == pytest.approx(expected[key], rel=RTOL), key
    # The measures themselves, cut down to that one step.
    names = ("sam_sharpness", "adaptive_sharpness", "asam_sharpness", "filter_adaptive_sharpness")
    found = measure(f, names, options=MeasureOptions(ascent_steps=1, ascent_starts=1, rho=0.05, adaptive_rho=0.1))
    for name, key in zip(names, steps, strict=True):
        assert found[name].value == pytest.approx(expected[key], rel=RTOL), key


@pytest.mark.parametrize("point", POINTS)
def test_the_oracle_itself(point: str) -> None:
    """The dense matrices behind the table."""
    f, expected = objective(point), POINTS[point]
    hessian = dense_hessian(f)
    values = torch.linalg.eigvalsh(hessian)
    assert float(values[-1]) == pytest.approx(expected["lmax"], rel=RTOL)
    assert float(values[0]) == pytest.approx(expected["eig_min"], rel=RTOL)
    assert float(f.gradient().norm()) == pytest.approx(expected["grad_norm"], rel=RTOL)
    ggn = GaussNewton(f) @ torch.eye(f.n, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(ggn)[-1]) == pytest.approx(expected["ggn_lmax"], rel=RTOL)
    blocks = f.split(hessian.diagonal())
    for key, part in zip(("tr_W1", "tr_b1", "tr_W2", "tr_b2"), blocks.values(), strict=True):
        assert float(part.sum()) == pytest.approx(expected[key], rel=RTOL)


def test_the_trace_is_the_tabulated_polynomial_of_the_scale() -> None:
    law = VECTORS["polynomial"]
    a, b, c = law["a"], law["b"], law["c"]

    def trace_at(alpha: float) -> float:
        net = network()
        with torch.no_grad():
            for p, power in zip(net.parameters(), (1, 1, -1, 0), strict=True):
                p *= alpha**power
        f = Objective(net, torch.nn.functional.cross_entropy, data())
        return measure(f, ["trace"])["trace"].value

    for alpha in (*LAYER_SCALES.values(), 1e-2, 31.6, law["alpha"]):
        assert trace_at(alpha) == pytest.approx(a / alpha**2 + b * alpha**2 + c, rel=1e-12)
    assert law["alpha"] == pytest.approx((a / b) ** 0.25, rel=1e-14)
    assert trace_at(law["alpha"]) == pytest.approx(law["minimum"], rel=1e-12)
    assert law["minimum"] == pytest.approx(c + 2 * (a * b) ** 0.5, rel=1e-14)


@pytest.mark.parametrize("point", [p for p in POINTS if p != "temperature_x3"])
def test_one_orbit_has_one_minimal_trace(point: str) -> None:
    """c + 2 sum_u sqrt(A_u B_u), from the dense diagonal."""
    f = objective(point)
    w1, b1, w2, b2 = f.split(dense_hessian(f).diagonal()).values()
    plainly = float(b2.sum() + 2 * ((w1.sum(1) + b1) * w2.sum(0)).sqrt().sum())
    found = measure(f, ["orbit_minimal_trace"])["orbit_minimal_trace"]
    assert found.value == pytest.approx(plainly, rel=1e-13)
    assert found.value == pytest.approx(VECTORS["polynomial"]["orbit_minimal"], rel=1e-13)
    assert abs(found.value - plainly) <= float(found.error or 0) + 1e-14
