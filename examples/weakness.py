"""How weak are the labels of 250 digits, given the features of a small network? Takes seconds.

python examples/weakness.py
"""

from __future__ import annotations

import torch

from flatminima.measures import weakness
from flatminima.protocols.small_data import small_data, train_small

torch.set_num_threads(1)
data = small_data("digits", rows=250, probes=100)
model = train_small(data, hidden=(64, 8), seed=0).model  # ReLU, 64-64-8-10, until every training row is right

train, probes = weakness.features(model, data.x), weakness.features(model, data.probes)
regions = weakness.region_weakness(train, probes, classes=10, labels=data.y)
print(f"activation patterns: {regions.train_regions} in training, {regions.free_regions} more on the probes")

found = weakness.pair_proxy(train, data.y, probes, classes=10, probe_labels=data.probe_labels)
print(
    f"pair proxy: {found.value} of 1000, {found.true_feasible} of them true classes, {len(found.undecided)} undecided"
)
probe, label = next((j, c) for j in range(100) for c in range(10) if not found.feasible[j, c])
print(found.why(probe, label).explain())  # type: ignore[union-attr]
check = found.verify(rational=True, sample=200)
held = f"{check.feasible} witnesses and {check.infeasible} certificates hold"
print(f"in rational arithmetic: {held}, {len(check.failed)} fail")

extension = weakness.exact_extension(train, data.y, probes[:2], classes=10)
print(f"exact weakness on the first two probes: {extension.bounds[0]} <= {extension.size} <= {extension.bounds[1]}")

drawn = weakness.sample_completions(train, data.y, probes[:20], classes=10)
print(f"random completions: entropy {drawn.mean_entropy:.3f} ± {drawn.mean_entropy_error:.3f} nats a probe")
print(f"  R-hat {drawn.rhat:.3f}, effective sample size {drawn.ess:.0f}, at least {drawn.chao1:.0f} labelings")
print(f"leverage: {weakness.leverage(train, probes).total:.2f}")
