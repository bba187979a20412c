"""The methods: a base training, what is done in the sessions, and how images are classified. Each part has a name of its own.

Methods that share a base share its network to the last bit, so that an ablation changes one thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from flatminima.names import unknown
from flatminima.protocols.fewshot_settings import RELEASED, FewShotSettings
from flatminima.study.settings import SettingsError

#: Which loss, optimiser and average a base training uses.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "plain": "cross entropy",
        "flat": "F2M: mean over noise in the box, with prototype fixing",
        "sam": "sharpness-aware minimisation",
        "swa": "weight average of the last part of the training",
        "swad": "F2M, averaged over SWAD's valley of the loss on base images held out",
    }
)


class Base(NamedTuple):
    """A base training: its kind, settings of its own, and what follows from the experiment's, in words."""

    kind: str
    changes: Mapping[str, Any] = {}
    note: str = ""


_WIDE = 4
_NO_SPLIT = {name: value for name, value in RELEASED.items() if name not in ("order", "held_out")}
BASES: Mapping[str, Base] = MappingProxyType(
    {
        "plain": Base("plain"),
        "plain-long": Base("plain", note="as many passes as F2M takes"),
        "flat": Base("flat"),
        "flat-no-pf": Base("flat", {"prototype_weight": 0.0}),
        "flat-one-draw": Base("flat", {"draws": 1, "antithetic": False, "std_weight": 0.0}),
        "flat-wide": Base("flat", note=f"noise in a box {_WIDE} times as wide as the clamp"),
        # A half width for the clamp is of the experiment's kind, absolute or relative: it means nothing in this box.
        "flat-relative": Base("flat", {"relative": True, "bound": 0.1, "clamp_bound": None}),
        "flat-released": Base("flat", {**_NO_SPLIT, "antithetic": False}),
        "sam": Base("sam"),
        "swa": Base("swa"),
        "flat-swad": Base("swad"),
    }
)

#: What happens in a session: procedure, and settings of its own.
ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "frozen": ("frozen", {}),
        "clamp": ("metric", {}),
        "no-clamp": ("metric", {}),
        "clamp-no-replay": ("metric", {"replay": "none"}),
        "clamp-released": ("metric", {"grid_step": True}),
        "ft": ("ft", {}),
        "joint": ("joint", {}),
        "crt": ("crt", {}),
        "icarl": ("icarl", {}),
        "rebalance": ("rebalance", {}),
        "fsll": ("fsll", {}),
    }
)

#: How an image is classified; every session is read with all that apply.
CLASSIFIERS: Mapping[str, str] = MappingProxyType(
    {
        "cosine": "nearest prototype, prototypes normalised: the ranking of cosines",
        "euclidean": "nearest raw prototype",
        "head": "largest output of the linear classifier",
    }
)


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        label: in tables.
        base, arm, classifier: of :data:`BASES`, :data:`ARMS` and :data:`CLASSIFIERS`.
        memory: images of earlier classes that its sessions see.
    """

    label: str
    base: str
    arm: str
    classifier: str = "cosine"
    memory: str = "novel shots"


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "baseline": Method("Baseline (frozen)", "plain", "frozen", memory="none"),
        "baseline-raw": Method("Baseline, raw prototypes", "plain", "frozen", "euclidean", "none"),
        "baseline-long": Method("Baseline, F2M's compute", "plain-long", "frozen", memory="none"),
        "ft": Method("FT (softmax)", "plain", "ft", "head"),
        "joint": Method("Joint", "plain", "joint", "head", "all images"),
        "crt": Method("cRT (upper bound)", "plain", "crt", "head", "all images"),
        "icarl": Method("iCaRL", "plain", "icarl", memory="exemplars of all classes"),
        "rebalance": Method("Rebalance (LUCIR)", "plain", "rebalance", "head", "exemplars of all classes"),
        "fsll": Method("FSLL", "plain", "fsll"),
        "f2m": Method("F2M", "flat", "clamp"),
        "f2m-no-noise": Method("F2M without noise", "plain", "clamp"),
        "f2m-no-clamp": Method("F2M without clamp", "flat", "no-clamp"),
        "f2m-no-pf": Method("F2M without prototype fixing", "flat-no-pf", "clamp"),
        "f2m-no-pn": Method("F2M without prototype normalisation", "flat", "clamp", "euclidean"),
        "f2m-no-replay": Method("F2M without replay", "flat", "clamp-no-replay", memory="none"),
        "f2m-one-draw": Method("F2M, M = 1", "flat-one-draw", "clamp"),
        "f2m-wide": Method("F2M, noise 4 × the clamp", "flat-wide", "clamp"),
        "f2m-relative": Method("F2M, relative box", "flat-relative", "clamp"),
        "f2m-frozen": Method("F2M, frozen", "flat", "frozen", memory="none"),
        "plain-no-clamp": Method("F2M without noise and clamp", "plain", "no-clamp"),
        "f2m-released": Method("F2M as released", "flat-released", "clamp-released"),
        "sam": Method("SAM base, frozen", "sam", "frozen", memory="none"),
        "sam-clamp": Method("SAM base, clamp", "sam", "clamp"),
        "swa": Method("SWA base, frozen", "swa", "frozen", memory="none"),
        "swa-clamp": Method("SWA base, clamp", "swa", "clamp"),
        "f2m-swad": Method("F2M + SWAD", "flat-swad", "clamp"),
    }
)

DEFAULT_METHODS = (
    "baseline", "baseline-raw", "ft", "crt", "f2m", "f2m-no-noise", "f2m-no-clamp", "f2m-wide", "f2m-frozen",
    "plain-no-clamp", "sam", "sam-clamp",
)  # fmt: skip


def chosen_methods(names: Sequence[str]) -> list[str]:
    """The names in the order of the tables; ``all`` is all of them.

    Raises:
        SettingsError: an unknown name, one twice, or none.
    """
    if list(names) == ["all"]:
        return list(METHODS)
    for name in names:
        if name not in METHODS:
            raise SettingsError(unknown("method", name, METHODS))
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"--methods must name at least one and none twice, got {', '.join(names) or 'none'}")
    return [name for name in METHODS if name in names]


def memory(method: Method, settings: FewShotSettings) -> str:
    """Images of earlier classes that the method's sessions see with these settings."""
    procedure, changes = ARMS[method.arm]
    if procedure != "metric":
        return method.memory
    replay = changes.get("replay", settings.replay)
    return {"none": "none", "all": f"{method.memory}, exemplars of base classes"}.get(replay, method.memory)


def base_settings(settings: FewShotSettings, base: str) -> FewShotSettings:
    """The settings of one base training."""
    changes = dict(BASES[base].changes)
    if base == "plain-long":
        changes["iterations"] = settings.iterations * (settings.draws + 1)
    if base == "flat-wide":
        clamp = settings.clamp_bound or settings.bound
        changes |= {"bound": _WIDE * clamp, "clamp_bound": clamp}
    return replace(settings, **changes)


def arm_settings(settings: FewShotSettings, base: str, arm: str) -> FewShotSettings:
    """The settings of the sessions of an arm on a base."""
    return replace(base_settings(settings, base), **ARMS[arm][1])
