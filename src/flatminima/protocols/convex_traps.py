"""Theorems 3 and 7 as claims: the traps of SA-GD and of SAM, beside what real gradients on real samples do."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from flatminima.problems.convex import SAGDTrap, Sample, SAMTrap, Trajectory, gd, sagd, sam
from flatminima.protocols.claims import DERIVED, PAPER, RECORDED, Claim
from flatminima.protocols.convex_theorems import FRESH, climbed, fresh_mean

Report = Callable[[float], None]

# ----- Theorem 3 -----------------------------------------------------------------------------------------------------

#: lr, rho, T; the radius saturates lr (r - rho) <= 1 / sqrt T.
SAGD_CASES = (
    (0.25, 0.1, 4), (0.25, 0.1, 16), (0.25, 0.1, 64), (0.25, 0.1, 256), (0.25, 0.1, 1024), (0.25, 0.0, 64),
    (0.25, 0.25, 64), (1.0, 0.1, 64),
)  # fmt: skip


def sagd_is_trapped(progress: Report | None = None) -> list[Claim]:
    """Theorem 3 for every case, its oracle, our variant, and what the others do from the same start."""
    claims = []
    for at, (lr, rho, steps) in enumerate(SAGD_CASES):
        radius = rho + 1 / (lr * math.sqrt(steps))
        few = steps <= 64
        sample = Sample.draw(6, at, "some", bit=1) if few else Sample.spurious(6)
        f = SAGDTrap(6, steps, rho, sample=sample)
        claim = Claim("Theorem 3: SA-GD ends in a flat minimum with F(ŵ_τ) ≥ c η²(r − ρ)²T, for a chosen maximiser",
                      {"η": lr, "ρ": rho, "r": round(radius, 6), "T": steps, "n": 6,
                       "columns": f"{len(sample)} of 64"}, PAPER)  # fmt: skip
        run = sagd(f, lr=lr, radius=radius, steps=steps, tie_break="adversarial")
        for tau in (1, steps // 2, steps):
            risk = f.population_risk(run.suffix_average(tau)).value
            claim.close(f"F(ŵ_τ), τ = {tau}", f.suffix_risk(tau, lr=lr, radius=radius), risk, rtol=1e-11)
        claim.at_least("smallest F(ŵ_τ) against the floor", f.floor(lr=lr, radius=radius),
                       f.population_risk(run.suffix_average(1)).value)  # fmt: skip
        risks = [f.empirical_risk(run.suffix_average(tau)) for tau in (1, steps // 2, steps)]
        claim.at_most("largest F_S(ŵ_τ)", 0.0, max(risks))
        claim.close("F_S at w_t + v_t, mean", 0.5 * (radius - rho) ** 2, float(run.perturbed_risks.mean()), rtol=1e-12)
        claim.at_most("‖w_T‖", 1.0, float(run.last.norm()))
        claim.same("hypotheses and event hold", True, f.certify(lr, radius).covered)
        claims.append(claim)
        if progress is not None:
            progress((at + 1) / len(SAGD_CASES))
    return [*claims, _oracle(), _fresh(), _robust(), _others()]


def _oracle() -> Claim:
    f = SAGDTrap(6, 16, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    run = sagd(f, lr=0.25, radius=1.1, steps=16, tie_break="adversarial")
    claim = Claim("the displacement that is chosen is a global maximiser, at every step, and the sharpness-aware risk of the "
                  "output a global minimum", {"T": 16, "search": "power iteration, 8 random starts and all axes"},
                  DERIVED)  # fmt: skip
    found = max(climbed(f, run.iterate(t), 1.1) for t in (1, 5, 9, 13, 16))
    claim.at_most("best of all searches along the run", 0.5 * (1.0 + 1e-9), found)
    claim.close("at the displacement", 0.5, float(run.perturbed_risks.max()), rtol=1e-12)
    claim.close("sharpness-aware risk of ŵ₁", 0.5, climbed(f, run.suffix_average(1), 1.1), rtol=1e-9)
    return claim


def _fresh() -> Claim:
    f = SAGDTrap(6, 64, 0.1, sample=Sample.draw(6, 1, "some", bit=1))
    run = sagd(f, lr=0.25, radius=0.6, steps=64, tie_break="adversarial")
    claim = Claim("fresh examples see the risk that the sample hides", {"T": 64, "examples": FRESH}, DERIVED)
    for tau in (1, 32, 64):
        value, error = fresh_mean(f, run.suffix_average(tau), seed=tau)
        claim.close(f"F(ŵ_τ), τ = {tau}", f.suffix_risk(tau, lr=0.25, radius=0.6), value, atol=4 * error)
    return claim


#: What breaks the ties, and where the run starts.
TIES: tuple[tuple[str, str, str], ...] = (
    ("adversarial", "the adversary", "0"),
    ("auxiliary", "the auxiliary axis", "0"),
    ("uniform", "uniform among all maximisers", "0"),
    ("power", "power iteration from random starts", "0"),
    ("uniform", "any exact rule (no ties are left)", "10⁻⁹ on the auxiliary axis"),
    ("power", "power iteration from random starts", "random, of length 10⁻³"),
)


def tie_start(f: SAGDTrap, start: str) -> Tensor:
    """The start that a row of :data:`TIES` names."""
    if start == "0":
        return f.start
    if start.startswith("10"):
        return 1e-9 * f.auxiliary_unit()
    w: Tensor = torch.randn(f.d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return w * (1e-3 / float(w.norm()))


def ties(progress: Report | None = None) -> tuple[list[dict[str, Any]], Claim]:
    """Theorem 3 rests on tie-breaking: the same sample and constants with every rule, as rows and as a claim."""
    f = SAGDTrap(6, 64, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    claim = Claim("E2: Theorem 3 rests on tie-breaking: only the adversary's run is bad",
                  {"η": 0.25, "ρ": 0.1, "r": 0.6, "T": 64}, DERIVED)  # fmt: skip
    rows = []
    for at, (rule, label, start) in enumerate(TIES):
        run = sagd(f, lr=0.25, radius=0.6, steps=64, tie_break=rule, start=tie_start(f, start))
        risks = [f.population_risk(run.suffix_average(tau)) for tau in range(1, 65)]
        rows.append(
            {
                "rule": rule, "label": label, "start": start, "risks": [risk.value for risk in risks],
                "errors": [risk.error for risk in risks], "first": float(run.perturbed_risks[0]),
                "last": float(run.perturbed_risks[-1]),
                "auxiliary": [float(run.iterate(t)[-1]) for t in range(1, 65)],
            }
        )  # fmt: skip
        name = f"{label}, start {start}"
        largest = max(risk.value for risk in risks)
        if rule == "adversarial":
            claim.close(f"F(ŵ₁): {name}", f.suffix_risk(1, lr=0.25, radius=0.6), risks[0].value, rtol=1e-11)
        else:
            claim.at_most(f"largest F(ŵ_τ): {name}", 2e-3, largest)
        claim.close(f"F_S at w₁ + v₁: {name}", 0.125, float(run.perturbed_risks[0]), rtol=2e-3)
        if progress is not None:
            progress((at + 1) / len(TIES))
    return rows, claim


def _robust() -> Claim:
    """Our variant: with a smaller weight on the auxiliary axis nobody has to choose badly."""
    claim = Claim("with the auxiliary weight below 1 the trap needs no adversary (our variant)",
                  {"n": 6, "η": 0.25, "ρ": 0.1, "r": 1.1, "T": 16, "rule": "power iteration, 6 random starts"},
                  RECORDED)  # fmt: skip
    for weight in (1.0, 0.9, 0.0):
        f = SAGDTrap(6, 16, 0.1, auxiliary_weight=weight, sample=Sample.draw(6, 0, "some", bit=1))
        run = sagd(f, lr=0.25, radius=1.1, steps=16, tie_break="power")
        risk = f.population_risk(run.suffix_average(1)).value
        if weight == 1.0:
            claim.at_most("F(ŵ₁), weight 1", 0.005, risk)
        else:
            claim.at_least(f"F(ŵ₁), weight {weight:g}", 0.02, risk)
    return claim


def _others() -> Claim:
    f = SAGDTrap(6, 64, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    claim = Claim("gradient descent and SAM stay at the start, which is flat and optimal", {"T": 64}, DERIVED)
    claim.at_most("F of gradient descent", 0.0, f.population_risk(gd(f, lr=0.25, steps=64).last).value)
    claim.at_most("F of SAM", 0.0, f.population_risk(sam(f, lr=0.25, radius=0.6, steps=64).last).value)
    return claim


# ----- Theorem 7 -----------------------------------------------------------------------------------------------------

#: lr, T, and F at tau = 1, T/2, T with links of 0.1 and 'corrected' constants, as recorded.
SAM_CASES: tuple[tuple[float, int, tuple[float, float, float]], ...] = (
    (1 / 24, 16, (0.01302236, 0.02778805, 0.04580577)),
    (1 / 24, 64, (0.01607552, 0.03270814, 0.05012146)),
    (1 / 24, 256, (0.067618 / 4, 0.135823 / 4, 0.204802 / 4)),
    (1 / 24, 1024, (0.068463 / 4, 0.137075 / 4, 0.205880 / 4)),
    (0.25, 16, (0.01346465, 0.02883185, 0.04762778)),
    (1.0, 16, (0.01527883, 0.03314584, 0.05520496)),
)


def saturated(lr: float, steps: int) -> float:
    """The largest radius of Theorem 7."""
    return 1 / (2 * lr * math.sqrt(steps))


def sam_run(f: SAMTrap) -> Trajectory:
    """SAM with the constants of its trap."""
    return sam(f, lr=f.lr, radius=f.radius, steps=f.steps)


def sam_is_trapped() -> list[Claim]:
    """Theorem 7 for every case, with the constants that work."""
    claims = []
    for variant, (lr, steps, recorded) in product(("corrected", "conditioned"), SAM_CASES):
        if variant == "conditioned" and steps > 64:
            continue
        sample = Sample.draw(8, 0, "one") if steps <= 64 else Sample.canonical(8, "classes")
        f = SAMTrap(8, steps, lr, saturated(lr, steps), variant=variant, sample=sample)  # type: ignore[arg-type]
        scale = (f.lr * f.radius) ** 2 * steps
        claim = Claim("Theorem 7: SAM ends in an empirical minimum with F(ŵ_τ) ≥ c η²r²T, for every τ",
                      {"constants": variant, "η": round(lr, 6), "T": steps, "r": round(f.radius, 6), "n": 8},
                      PAPER)  # fmt: skip
        run = sam_run(f)
        taus = (1, steps // 2, steps)
        risks = [f.population_risk(run.suffix_average(tau)) for tau in taus]
        for tau, risk, value in zip(taus, risks, recorded, strict=True):
            claim.close(f"F(ŵ_τ), τ = {tau}", value, risk.value, rtol=1e-5)
        claim.at_least("smallest F(ŵ_τ) against the floor", f.floor(), risks[0].value)
        claim.at_least("F(ŵ₁) / η²r²T", f.floor() / scale, risks[0].value / scale)
        claim.at_most("largest F_S(ŵ_τ)", 0.0, max(f.empirical_risk(run.suffix_average(tau)) for tau in taus))
        claim.at_most("‖w_T‖", 1.0, float(run.last.norm()))
        claim.same("proof and hypotheses hold", True, f.certify().covered)
        still = f.population_risk(gd(f, lr=lr, steps=min(steps, 64)).last)
        claim.at_most("F of gradient descent", 1e-14, still.value + still.error)
        claims.append(claim)
    return [*claims, _large(), _single()]


def _large() -> Claim:
    claim = Claim("hundreds of examples, 2⁴⁰⁰ columns", {"η": 0.041667, "T": 64, "constants": "conditioned"}, DERIVED)
    for n in (12, 50, 100, 200, 400):
        f = SAMTrap(n, 64, 1 / 24, 1.5, sample="classes")
        value = f.population_risk(sam_run(f).suffix_average(1)).value
        claim.close(f"F(ŵ₁), n = {n}", f.closed_form().suffix_risk(1), value, rtol=1e-9)
    return claim


def _single() -> Claim:
    claim = Claim("single precision: right to six digits, or refused", {"constants": "conditioned", "T": 64}, DERIVED)
    for n in (6, 8):
        exact, single = (SAMTrap(n, 64, 1 / 24, 1.5, dtype=dtype) for dtype in (torch.float64, torch.float32))
        values = [f.population_risk(sam_run(f).suffix_average(1)).value for f in (exact, single)]
        claim.close(f"F(ŵ₁) in float32, n = {n}", values[0], values[1], rtol=1e-6)
    refused = ""
    try:
        SAMTrap(60, 64, 1 / 24, 1.5, sample="classes", dtype=torch.float32)
    except ValueError as error:
        refused = "underflows" if "underflows in float32" in str(error) else str(error)
    claim.same("n = 60 in float32", "underflows", refused)
    return claim
