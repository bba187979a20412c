"""What the reading of the outputs leaves free.

* ``softmax-shift``: the same vector added to the weights of all classes, the same number to all their biases. Every logit of a
  row moves by the same number: softmax and cross-entropy do not see it, the logits do. H' = H.
* ``temperature``: all that writes the logits times c > 0. Only the order of the logits stays: accuracy is unchanged, the loss
  and its Hessian are not. A class of its own: it preserves predictions and is no reparameterisation of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import Findings, Site, Symmetry
from .classes import FIXED, position_among
from .network import Network
from .sites import Shifting, log_uniform, slices


def find(network: Network) -> Findings:
    """Both kinds, for a model with one output tensor."""
    if len(network.tape.outputs) != 1:
        return Findings(
            (),
            (
                (
                    "output",
                    f"softmax and temperature: the model returns {len(network.tape.outputs)} tensors, expected one",
                ),
            ),
        )
    labels = network.flow.labels(network.tape.outputs[0])
    proposed: list[Symmetry] = []
    refused: list[tuple[str, str]] = []
    axis, classes = _class_axis(network.raw.classes.roots(labels)[0])
    if classes is not None:
        shifts = list(_shifts(network, classes, refused))
        if shifts:
            proposed.append(Symmetry.of("softmax-shift", shifts, class_axis=axis))
    else:
        refused.append(("output", "softmax-shift: no layer writes the logits and nothing else"))
    hot = [group for group in network.to_output.groups if "output" in group.categories]
    if hot:
        places = [group.rescaling(log_uniform) for group in hot]
        proposed.append(Symmetry.of("temperature", places))
    else:
        reason = network.to_output.classes.reason(int(labels.reshape(-1)[0])) if labels.numel() else None
        refused.append(("output", f"temperature: no layer scales all outputs alike ({reason})"))
    return Findings(tuple(proposed), tuple(refused))


def _class_axis(roots: Tensor) -> tuple[int, Tensor | None]:
    """The axis along which the outputs belong to different units, and these units; None where there is none or several."""
    for axis in range(roots.ndim):
        first = roots
        for other in range(roots.ndim):
            if other != axis:
                first = first.narrow(other, 0, 1)
        if roots.shape[axis] > 1 and bool((roots == first).all()) and len(torch.unique(first)) == roots.shape[axis]:
            return axis - roots.ndim, first.reshape(-1)
    return -1, None


def _shifts(network: Network, classes: Tensor, refused: list[tuple[str, str]]) -> Iterator[Site]:
    units = torch.sort(classes).values
    met = {category for root in units.tolist() for category in network.raw.met[root]}
    if bool((units <= FIXED).any()) or not met <= {"write", "output", "averaged", "scaled"} or not network.alike(units):
        refused.append(("output", "softmax-shift: no layer writes the logits and nothing else"))
        return
    for name, found in network.raw.uses_of.items():
        for entry, _ in found:
            unit = position_among(network.raw.classes.roots(entry.out)[0], units)
            if not bool((unit >= 0).any()):
                continue
            if len(found) > 1:
                refused.append((name, f"softmax-shift: used {len(found)} times in the forward pass (tied parameters)"))
                continue
            try:
                part = slices(name, network.tape.parameters[name].shape, unit, len(units))
            except ValueError as error:
                refused.append((name, f"softmax-shift: {error}"))
                continue
            if part is not None:
                yield Shifting(f"{name} -> output", part, network.typical(name))
