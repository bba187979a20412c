"""FSDP2's ``fully_shard``: gradients of one rank's own, and perturbations by them.

A rank holds a shard of every parameter. The whole one exists from a module's forward pass to the end of its backward
pass, where its gradient is averaged and cut up again. What a rank finds on its own is therefore caught on the whole
parameters, where autograd delivers it, and a perturbation of its own is written into them each time they have been
gathered. The shards are not touched by it, so there is nothing to bring back.

Memory of such a perturbation, on each rank: the whole gradient, which becomes the displaced parameters. It also costs one more
gathering of all parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flatminima.optim.closures import Closure, evaluate
from flatminima.optim.ranks import Look, OneProcess, Through
from flatminima.optim.scaling import Scaling, unit_of
from flatminima.optim.weights import Held
from flatminima.sharding import is_sharded, reshard, sharding_modules

if TYPE_CHECKING:
    from flatminima.optim.engine import Engine

Visit = Callable[[Tensor, Tensor], None]
Place = tuple[nn.Module, str, Tensor]  # the module that owns a parameter, its name there, its shard
_UNNOTICED: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]


class FullySharded(OneProcess):
    """A model with modules that ``fully_shard`` was applied to, its root among them."""

    defers = True
    cuts_gradients = True

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._own: dict[nn.Module, list[Place]] = {}  # what each module gathers
        self._whole: dict[Tensor, Tensor] = {}  # from whole parameters to shards, as far as they were met

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Backward passes in this block average nothing over ranks."""
        modules = sharding_modules(self._model)
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)

    @contextlib.contextmanager
    def through(self, function: Through, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Every gradient that arrives in this block passes through ``function(leaf, gradient)`` before it is accumulated."""
        hooked: set[Tensor] = set()
        with contextlib.ExitStack() as stack:

            def hook(leaf: Tensor) -> None:
                if leaf.requires_grad and leaf not in hooked:
                    hooked.add(leaf)
                    stack.callback(leaf.register_hook(lambda gradient: function(leaf, gradient)).remove)

            for p in parameters:
                if not is_sharded(p):
                    hook(p)
            with self._visiting(lambda shard, whole: hook(whole)):
                yield

    def leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors in whose ``.grad`` autograd accumulates: the whole parameters, and those that are not sharded."""
        return [*(p for p in parameters if not is_sharded(p)), *self._whole]

    def settle(self) -> None:
        """The shards were moved: forget gathered copies of them."""
        reshard(self._model)

    def look(self, engine: Engine, closure: Closure, parameters: list[Tensor], scaler: Scaling | None) -> Look:
        """As of :class:`OneProcess`, with the whole parameters displaced."""
        caught: dict[Tensor, Tensor] = {}

        def catch(leaf: Tensor, gradient: Tensor) -> Tensor:
            if leaf not in self._whole:
                return gradient
            caught[leaf] = caught[leaf] + gradient if leaf in caught else gradient.clone()
            return torch.zeros_like(gradient)  # what FSDP accumulates of this pass

        def seen() -> bool:
            return bool(caught) or any(p.grad is not None for p in parameters)

        with self.through(catch, parameters), self.alone():
            loss = evaluate(closure, parameters, scaler, seen)
        targets, skipped = self._displace(engine, caught, parameters, unit_of(scaler))
        return loss, self._holding(targets, engine), skipped

    @torch.no_grad()
    def _displace(
        self, engine: Engine, caught: dict[Tensor, Tensor], parameters: list[Tensor], unit: float
    ) -> tuple[dict[Tensor, Tensor], str | None]:
        """The displaced whole parameters, by their shards, or why there are none. All ranks gather."""
        for module in sharding_modules(self._model):
            module.unshard()
        group_of = {p: group for group in engine.base.param_groups for p in group["params"]}
        wholes = [whole for whole in caught if self._whole[whole] in group_of]
        others = [p for p in parameters if not is_sharded(p) and p.grad is not None]
        found = [*(caught[w] for w in wholes), *(p.grad for p in others if p.grad is not None)]
        groups = [group_of[self._whole.get(p, p)] for p in (*wholes, *others)]
        at = engine.point([*wholes, *others], Held([*wholes, *others], found, None), unit, groups)
        vectors, scales, length = engine.direction(at)
        targets: dict[Tensor, Tensor] = {}
        if scales:
            for i, whole in enumerate(wholes):
                targets[self._whole[whole]] = torch.add(whole, vectors[i], alpha=scales[i], out=caught[whole])
            k = len(wholes)
            engine.move(others, others, [vectors[i] for i in range(k, len(vectors))], scales[k:])
        reshard(self._model)
        return targets, None if math.isfinite(length) else f"the norm of this rank's gradient is {length}"

    @contextlib.contextmanager
    def _holding(self, targets: dict[Tensor, Tensor], engine: Engine) -> Iterator[None]:
        """Within the block every gathered parameter has the value that belongs to its shard."""

        def fill(shard: Tensor, whole: Tensor) -> None:
            if shard in targets:
                # Between forward and backward pass FSDP gathers without autograd's notice, and so do we.
                with torch.no_grad(), _UNNOTICED(whole):
                    whole.copy_(targets[shard])

        try:
            with self._visiting(fill, before_backward=True):
                yield
        except BaseException:
            # A pass that ends half way leaves parameters gathered, and displaced.
            if hasattr(self._model, "reset_iter_state"):
                self._model.reset_iter_state()
            raise
        finally:
            reshard(self._model)
            engine.restore()

    @contextlib.contextmanager
    def _visiting(self, visit: Visit, before_backward: bool = False) -> Iterator[None]:
        """Call ``visit(shard, whole)`` for each parameter that a module has gathered for a pass in this block."""
        reshard(self._model)
        names = dict(self._model.named_parameters(remove_duplicate=False))
        prefixes = {module: f"{name}." if name else "" for name, module in self._model.named_modules()}

        def before(module: nn.Module) -> None:
            if module not in self._own:
                self._own[module] = [
                    (owner, name, names[f"{prefixes[owner]}{name}"])
                    for owner in module.modules()
                    for name, p in owner._parameters.items()
                    if p is not None and p is not names[f"{prefixes[owner]}{name}"]
                ]
            for owner, name, shard in self._own[module]:
                whole = owner._parameters[name]
                assert whole is not None
                self._whole[whole] = shard
                visit(shard, whole)

        def again(module: Any, output: Any) -> None:
            def arrived(gradient: Tensor) -> None:
                module.unshard()
                before(module)

            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(arrived)

        with contextlib.ExitStack() as stack:
            for module in sharding_modules(self._model):
                stack.callback(module.register_forward_pre_hook(lambda m, _: before(m)).remove)
                if before_backward:
                    stack.callback(module.register_forward_hook(lambda m, _, output: again(m, output)).remove)
            yield
