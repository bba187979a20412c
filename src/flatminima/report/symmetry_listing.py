"""What ``flatminima symmetries`` lists: the symmetries layer by layer, what follows from them, and what was rejected."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

_STYLES = {"proved": "green", "approximate": "yellow"}


def symmetry_listing(found: Mapping[str, Any], layers: Sequence[str]) -> RenderableType:
    """A search (`SymmetrySearch.to_dict`) for ``console.print``.

    Args:
        found: what was found and rejected.
        layers: names of modules and parameters in the order of the model; sites stand under the first one that they name.
    """
    return Group(*_sites(found, layers), *_laws(found), *_rejected(found))


def _sites(found: Mapping[str, Any], layers: Sequence[str]) -> list[RenderableType]:
    if not found["found"]:
        return [_title("No symmetry was found."), Text("")]
    order = {name: i for i, name in enumerate(layers)}
    under: dict[str, list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    for symmetry in found["found"]:
        for site in symmetry["sites"]:
            first = re.split(r"[ ,]", site, maxsplit=1)[0]
            under[re.sub(r"\.(weight|bias)$", "", first)].append((site, symmetry))
    lines: list[RenderableType] = [
        _title("Found, layer by layer (change of the largest output, all sites of a kind at once)")
    ]
    for layer in sorted(under, key=lambda name: order.get(name, len(order))):
        lines.append(Text(layer))
        for site, symmetry in under[layer]:
            proof = symmetry["proof"]
            line = Text(f"  {symmetry['kind']:<23}{symmetry['preserves']:<15}")
            line.append(f"{proof['status']}: {proof['max_change']:.0e}", style=_STYLES.get(proof["status"], ""))
            lines.append(line)
            if site != layer:
                lines.append(Padding(Text(site, style="dim"), (0, 0, 0, 4)))
    return [*lines, Text("")]


def _laws(found: Mapping[str, Any]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for symmetry in found["found"]:
        lines.append(Text(f"{symmetry['kind']} ({len(symmetry['sites'])}): {symmetry['law']}"))
        lines.append(Padding(Text(symmetry["hessian_law"], style="dim"), (0, 0, 0, 2)))
    return [_title("What the maps do, and what follows for gradient and Hessian"), *lines, Text("")] if lines else []


def _rejected(found: Mapping[str, Any]) -> list[RenderableType]:
    lines = [Text(f"{site}: {reason}") for site, reason in found["rejected"]]
    return [_title("Looked for and rejected"), *lines] if lines else []


def _title(text: str) -> Text:
    return Text(text, style="bold")
