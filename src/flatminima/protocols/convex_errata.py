"""Errata of the paper (v2) that can be measured, each as a claim: what is printed fails, what should be there holds.

E1 is in :mod:`flatminima.protocols.convex_constants`, E2 is the tie-breaking of :mod:`flatminima.protocols.convex_theorems`.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch

from flatminima.curvature import eigenpairs
from flatminima.problems.convex import (
    DeadZoneRegression,
    FlatSharpERM,
    SAGDTrap,
    Sample,
    SAMTrap,
    SharpSAM1D,
    gd,
    sam,
    stability_bound,
)
from flatminima.problems.convex_sagd_trap import PRINTED_FLOOR
from flatminima.protocols.claims import DERIVED, RECORDED, Claim
from flatminima.protocols.convex_constants import invariants
from flatminima.protocols.convex_traps import sam_run, saturated


def errata() -> list[Claim]:
    """E3 to E12, and the constant link of another reproduction."""
    return [
        _displayed_chain(), _one_iterate(), _rectified(), _distance(), _dimension(), _lipschitz(), _no_contrast(),
        _zero_gradient(), _norm(), _start(), _constant_link(),
    ]  # fmt: skip


def _displayed_chain() -> Claim:
    claim = Claim("E3: F(ŵ₁) ≥ ⅛ η²r²T, as displayed in the proof of Theorem 7, is false; the floor holds",
                  {"η": "1/24, ¼, 1", "T": "16, 64, 256", "constants": "conditioned"}, RECORDED)  # fmt: skip
    ratios, floors = [], []
    for lr, steps in product((1 / 24, 0.25, 1.0), (16, 64, 256)):
        f = SAMTrap(6, steps, lr, saturated(lr, steps), sample="classes")
        scale = (f.lr * f.radius) ** 2 * steps
        ratios.append(f.population_risk(sam_run(f).suffix_average(1)).value / scale)
        floors.append(ratios[-1] / (f.floor() / scale))
    claim.at_most("largest F(ŵ₁) / η²r²T (displayed: at least 0.125)", 0.084, max(ratios))
    claim.at_least("smallest F(ŵ₁) / floor", 1.0, min(floors))
    return claim


def _one_iterate() -> Claim:
    claim = Claim("E4: Theorem 3 needs T ≥ 2; with one iterate the output is the start", {"η": 0.25, "ρ": 0.0}, DERIVED)
    for steps in (1, 2):
        f = SAGDTrap(6, steps, 0.0, sample="spurious")
        radius = 4 / math.sqrt(steps)
        holds = f.suffix_risk(1, lr=0.25, radius=radius) >= PRINTED_FLOOR * (0.25 * radius) ** 2 * steps
        claim.same(f"the bound holds, T = {steps}", steps > 1, holds)
    return claim


def _rectified() -> Claim:
    claim = Claim("E5: with the last coordinate rectified as well the flat region is unbounded; without, its radius is ρ",
                  {"n": 6, "ρ": 0.1}, DERIVED)  # fmt: skip
    f = SAGDTrap(6, 2, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(200, f.d, generator=generator, dtype=torch.float64)
    v = 40.0 * v / v.norm(dim=1, keepdim=True)
    # Deep in the negative orthant of the unanimous block and the last coordinate; blocks of mixed signs stay at zero.
    column = f.sample.ones[0]
    mask = torch.zeros(f.d, dtype=torch.float64)
    mask[column * 2 : column * 2 + 2] = mask[-1] = 1.0
    there = -100.0 * mask + v * mask
    rectified = there.clamp(min=0.0)  # what the printed loss sees: all examples have +1 in that column
    claim.at_most("largest loss within 40 of −100, rectified", 0.0, float(f.losses(rectified).max()))
    edge = f.sharpness(0.1 * (1 + 1e-3)).lower
    claim.at_least("loss just beyond ρ of the origin, as in Theorem 3", 1e-12, edge)
    claim.at_most("loss within ρ of the origin", 0.0, f.sharpness(0.1).lower)
    return claim


def _distance() -> Claim:
    """Gradient descent from a hundred units away."""
    claim = Claim("E6: the second term of Lemma 5 lacks D²; without it the bound is violated",
                  {"method": "GD", "n": 20, "T": 20, "η": 0.25, "D": 100}, RECORDED)  # fmt: skip
    f = DeadZoneRegression(20, 40, samples=20)
    twin = f.leave_one_out()
    twin.centre = 100.0 * twin.centre
    mean = gd(twin, lr=0.25, steps=20, start=torch.zeros(20, 21, 40, dtype=torch.float64)).suffix_average(1)
    moved = float((mean[:, 1:] - mean[:, :1]).square().sum(-1).mean())
    known: dict[str, Any] = {"smoothness": 1.0, "lr": 0.25, "radius": 0.0, "flatness_radius": 0.0, "steps": 20, "n": 20}
    claim.at_least("measured against the printed bound", stability_bound(**known, distance=1.0), moved)
    claim.at_most("measured against the bound with D²", stability_bound(**known, distance=100.0), moved)
    return claim


def _dimension() -> Claim:
    claim = Claim("E7: the losses need 2ⁿT + 1 parameters, one more than printed", {"n": 6, "T": 16}, DERIVED)
    claim.same("Theorem 3", 64 * 16 + 1, SAGDTrap(6, 16).d)
    claim.same("Theorem 7", 64 * 16 + 1, SAMTrap(6, 16, 1 / 24, 3.0).d)
    return claim


def _lipschitz() -> Claim:
    claim = Claim(
        "E8: 6 bounds gradients on the unit ball and curvature, also with links of 1", {"n": 6, "T": 8}, RECORDED
    )
    generator = torch.Generator().manual_seed(0)
    for delta in (0.1, 1.0):
        f = SAMTrap(6, 8, 0.25, 0.7, chain_delta=delta, delta_2=delta, delta_3=delta, sample=Sample.draw(6, 0, "one"))
        # All links pull where the slots grow fast enough.
        rise = (2.0 ** torch.arange(8, dtype=torch.float64)).expand(64, 8).reshape(-1)
        w = torch.cat([rise, torch.ones(1, dtype=torch.float64)])
        top = float(eigenpairs(f.objective(w), 1).values[0])
        claim.at_most(f"top Hessian eigenvalue, links {delta:g}", f._curvature(), top)
        points = torch.randn(200, f.d, generator=generator, dtype=torch.float64)
        points = torch.cat([points, w[None]])
        gradients = f.value_and_gradient(points / points.norm(dim=1, keepdim=True))[1]
        claim.at_most(f"largest gradient on the sphere, links {delta:g}", 6.0, float(gradients.norm(dim=1).max()))
    return claim


def _no_contrast() -> Claim:
    claim = Claim(
        "E9: at ρ = 0 the flat and the sharp minimum of Theorem 1 are equally sharp", {"n": 6, "r": 0.3}, DERIVED
    )
    for rho in (0.0, 0.25):
        f = FlatSharpERM(6, rho, sample=Sample.draw(6, 0, "some"))
        sharp, flat = (f.sharpness(0.3, f.minimisers[name], closed_form=False).lower for name in ("sharp", "flat"))
        expected = 0.5 * (0.3**2 - max(0.0, 0.3 - rho) ** 2)
        claim.close(f"difference of the sharpness, ρ = {rho:g}", expected, sharp - flat, atol=1e-10)
    return claim


def _zero_gradient() -> Claim:
    claim = Claim(
        "E10: SAM's update is 0/0 at a zero gradient, on which Theorem 6 rests; it needs v = 0", {"r": 0.4}, DERIVED
    )
    f = SharpSAM1D()
    gradient = f.gradient()
    claim.same("r g/‖g‖ as printed is NaN", True, bool((0.4 * gradient / gradient.norm()).isnan().all()))
    claim.close("w_T with v = 0", 0.0, float(sam(f, lr=0.25, radius=0.4, steps=10).last))
    return claim


def _norm() -> Claim:
    claim = Claim("E11: the iterates of Theorem 7 stay within ½, half of what is estimated",
                  {"n": 6, "constants": "conditioned"}, RECORDED)  # fmt: skip
    for lr, steps in ((1 / 24, 16), (1 / 24, 256), (1.0, 64)):
        f = SAMTrap(6, steps, lr, saturated(lr, steps), sample="classes")
        claim.at_most(f"‖w_T‖, η = {lr:.4g}, T = {steps}", 0.5, float(sam_run(f).last.norm()))
    return claim


def _start() -> Claim:
    claim = Claim("E12: both traps start at a point that is already optimal", {"n": 6, "T": 64}, DERIVED)
    claim.at_most("F(w₁), Theorem 3", 0.0, SAGDTrap(6, 64).population_risk().value)
    risk = SAMTrap(6, 64, 1 / 24, 1.5).population_risk()
    claim.at_most("F(w₁), Theorem 7", 1e-15, risk.value + risk.error)
    return claim


def _constant_link() -> Claim:
    claim = Claim("δ₃ has to be tiny: a constant link of 0.03, as another reproduction has it, breaks the proof's invariants",
                  {"n": 6, "T": 16, "η": "1/24", "constants": "corrected"}, RECORDED)  # fmt: skip
    for label, delta_2, delta_3, ratio in (("constant", 0.03, 0.03, 0.058735), ("tiny", 0.5, None, 0.058823)):
        links: dict[str, Any] = {"chain_delta": 0.03, "delta_2": delta_2, "delta_3": delta_3}
        f = SAMTrap(6, 16, 1 / 24, 3.0, variant="corrected", sample="classes", **links)
        run = sam_run(f)
        scale = (f.lr * f.radius) ** 2 * f.steps
        claim.close(f"F(ŵ₁) / η²r²T, {label}", ratio, f.population_risk(run.suffix_average(1)).value / scale, atol=1e-6)
        claim.same(f"invariants hold, {label}", delta_3 is None, not invariants(f, run))
    return claim
