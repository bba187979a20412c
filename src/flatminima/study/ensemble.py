"""Many small networks trained at once, each with the bits that it would have by itself.

A network of a few thousand weights spends much of its training time between operations. An ensemble makes each operation
once for all: the parameters of the members are stacked (``torch.func.stack_module_state``), gradients are taken under ``vmap``,
or written out for multilayer perceptrons. Every member has its own rows, order, step size and stop criterion, and leaves when
it is done. Whether the stack rounds as single networks do is tried out for every size of batch that occurs; where it does not,
that step is made member by member.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from flatminima.study.course import Course, Trained, Training
from flatminima.study.dense_step import dense_gradients, dense_layers, dense_outputs
from flatminima.study.parts import even_parts
from flatminima.study.together import (
    Stack,
    gradients_alone,
    member,
    one_thread,
    outputs_alone,
    same_bits,
    same_outputs,
    stacked_gradients,
    stacked_outputs,
)

Progress = Callable[[float], None]

#: Numbers in the inputs of one batched step: of a perceptron, whose step costs little beyond its products and must stay in the
#: cache of a core, and of any other network. More members than fit are trained in turns.
DENSE_NUMBERS, OTHER_NUMBERS = 400_000, 4_000_000
_NEVER = -1  # members that are trusted: even one is not
_FEW_ROWS = 16  # products of so few rows take other paths through the BLAS from case to case: member by member


def train_alone(training: Training, progress: Progress = lambda fraction: None) -> Trained:
    """Train one network: a plain loop over ``torch.optim.SGD``.

    Args:
        training: what and how.
        progress: called after every epoch with a lower bound on the fraction done.

    Returns:
        The network where the stop criterion was met, or at the cap; the model that was given is left as it is.

    Raises:
        ValueError: rows and labels that do not fit, or none.

    Example:
        >>> from flatminima.models import build
        >>> from flatminima.study.run_spec import OptimiserSpec, StopSpec
        >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> stop = StopSpec("accuracy", 1.0, max_epochs=300)
        >>> found = train_alone(Training(build("mlp", (4,), 2, seed=0, hidden=(8,)), x, y, OptimiserSpec(lr=0.5), stop))
        >>> found.met, found.stopped.accuracy
        (True, 1.0)
    """
    _check([training])
    with one_thread():
        return _alone(training, progress)


def _alone(training: Training, progress: Progress) -> Trained:
    course, options = Course(training), training.optimiser
    model = copy.deepcopy(training.model).train()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    # A training pass writes to running statistics, so they are copies too.
    state = weights | {name: b.clone() for name, b in model.named_buffers()}
    optimiser = torch.optim.SGD(
        list(weights.values()), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    x, y = training.x, training.y
    while not course.over:
        batches = course.order()
        optimiser.param_groups[0]["lr"] = course.lr
        for number, rows in enumerate(batches, start=1):
            optimiser.zero_grad()
            nn.functional.cross_entropy(functional_call(model, state, (x[rows],)), y[rows]).backward()
            optimiser.step()
            if course.stepped(number == len(batches)):
                kept = {name: t.detach().clone() for name, t in state.items()}
                course.look(outputs_alone(model.eval(), kept, x), kept)
                model.train()
                if course.over:
                    break
        progress(course.fraction)
    return course.result()


def train_together(trainings: Sequence[Training], progress: Progress = lambda fraction: None) -> list[Trained]:
    """Train networks of one architecture on training sets of one size with one batch size, many at a time.

    Every member ends with the bits that :func:`train_alone` gives it, whatever the others are.

    Args:
        trainings: one per member. Rows, order, step size, schedule, momentum, weight decay and stop criterion are its own.
        progress: called after every epoch with a lower bound on the fraction done.

    Returns:
        One result per member, in the order given.

    Raises:
        ValueError: members that differ in architecture, number of rows or batch size, named with the difference.

    Example:
        >>> from flatminima.models import build
        >>> from flatminima.study.run_spec import OptimiserSpec, StopSpec
        >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> nets = [build("mlp", (4,), 2, seed=seed, hidden=(8,)) for seed in range(3)]
        >>> stop = StopSpec("loss", 0.1, max_epochs=500)
        >>> tasks = [Training(net, x, y, OptimiserSpec(lr=0.5), stop, seed) for seed, net in enumerate(nets)]
        >>> together, alone = train_together(tasks)[2].stopped, train_alone(tasks[2]).stopped
        >>> together.epochs == alone.epochs, all(torch.equal(together.weights[k], alone.weights[k]) for k in alone.weights)
        (True, True)
    """
    _check(trainings)
    found: list[Trained] = []
    with one_thread():
        for group in turns(trainings):
            before = len(found) / len(trainings)
            share = len(group) / len(trainings)

            def told(fraction: float, before: float = before, share: float = share) -> None:
                progress(before + share * fraction)

            found += [_alone(group[0], told)] if len(group) == 1 else _Ensemble(group).train(told)
    return found


def most_at_once(training: Training) -> int:
    """How many networks like this one a turn has at most."""
    step = min(training.optimiser.batch_size, len(training.y)) * training.x[0].numel()
    return max(1, (OTHER_NUMBERS if dense_layers(training.model) is None else DENSE_NUMBERS) // step)


def turns(trainings: Sequence[Training]) -> Iterator[Sequence[Training]]:
    """The members that are trained at once; one by one where a step of one network is already large."""
    return even_parts(trainings, most_at_once(trainings[0]))


class _Ensemble:
    """Members of one turn. ``active`` are those still in training; stacks and lists of a step are in their order."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.courses = [Course(training) for training in trainings]
        self.results: list[Trained | None] = [None] * len(trainings)
        self.active = list(range(len(trainings)))
        self.model = trainings[0].model
        self.layers = dense_layers(self.model)
        parameters, buffers = stack_module_state([training.model for training in trainings])
        self.stackable = not buffers  # buffers, such as running statistics, are written to by every pass
        self.stack: Stack = {name: p.detach().clone() for name, p in parameters.items()}
        self.velocity: Stack | None = None
        self._trusted: dict[tuple[str, int], int] = {}
        self._read_options()

    def train(self, progress: Progress) -> list[Trained]:
        if not self.stackable:
            return [_alone(course.training, lambda fraction: None) for course in self.courses]
        while self.active:
            self._epoch()
            progress(sum(course.fraction for course in self.courses) / len(self.courses))
        return [result for result in self.results if result is not None]

    def _read_options(self) -> None:
        options = [self.courses[i].training.optimiser for i in self.active]
        momentum, decay = (self._numbers([getattr(o, name) for o in options]) for name in ("momentum", "weight_decay"))
        self._momentum = momentum if momentum.any() else None
        self._decay = decay if decay.any() else None

    def _numbers(self, values: Sequence[float]) -> Tensor:
        """One for each member, where the members are."""
        return torch.tensor(values, device=self.courses[0].training.x.device)

    def _epoch(self) -> None:
        orders = [self.courses[i].order() for i in self.active]
        rates = self._numbers([-self.courses[i].lr for i in self.active])
        batches = len(orders[0])
        for number in range(batches):
            x, y = self._rows([order[number] for order in orders])
            self._update(self._gradients(x, y), rates)
            looking = [at for at, i in enumerate(self.active) if self.courses[i].stepped(number == batches - 1)]
            if looking:
                self._look(looking)
                staying = [at for at, i in enumerate(self.active) if not self.courses[i].over]
                if not staying:
                    self.active = []
                    return
                if len(staying) < len(self.active):
                    orders, rates = [orders[at] for at in staying], rates[staying]
                    self._keep(staying)

    def _rows(self, chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Inputs and classes of one step, ``(members, rows, ...)``."""
        trainings = [self.courses[i].training for i in self.active]
        x = trainings[0].x.new_empty(len(chosen), len(chosen[0]), *trainings[0].x.shape[1:])
        for at, (training, rows) in enumerate(zip(trainings, chosen, strict=True)):
            torch.index_select(training.x, 0, rows, out=x[at])
        return x, torch.stack([training.y[rows] for training, rows in zip(trainings, chosen, strict=True)])

    def _gradients(self, x: Tensor, y: Tensor) -> Stack:
        def together(stack: Stack, rows: Tensor) -> Stack:
            return self._stacked_gradients(stack, rows, y)

        if self._trust(("step", x.shape[1]), len(x), lambda: same_bits(self.model, self.stack, x, y, together)):
            return together(self.stack, x)
        single = [gradients_alone(self.model, member(self.stack, at), x[at], y[at]) for at in range(len(x))]
        return {name: torch.stack([gradients[name] for gradients in single]) for name in self.stack}

    def _stacked_gradients(self, stack: Stack, x: Tensor, y: Tensor) -> Stack:
        if self.layers is not None:
            return dense_gradients(self.layers, stack, x, y)
        return stacked_gradients(self.model, stack, x, y)

    def _trust(self, key: tuple[str, int], members: int, trial: Callable[[], bool]) -> bool:
        """Whether what is computed for so many at once has the bits of single networks, for so many rows.

        Tried once, and again for more members than were tried: where a member lies depends on its place in the stack.
        """
        tried = self._trusted.get(key, 0)
        if tried != _NEVER and members > tried:
            try:
                self._trusted[key] = members if key[1] >= _FEW_ROWS and trial() else _NEVER
            except (RuntimeError, NotImplementedError, ValueError):
                # Dropout, control flow that depends on the data: nothing that can be batched.
                self._trusted[key] = _NEVER
        return self._trusted[key] != _NEVER

    def _update(self, gradients: Stack, rates: Tensor) -> None:
        """The step of ``torch.optim.SGD``, in its order of operations."""
        if self._momentum is not None and self.velocity is None:
            self.velocity = {name: torch.zeros_like(p) for name, p in self.stack.items()}
        for name, p in self.stack.items():
            g, shape = gradients[name], (-1,) + (1,) * (p.dim() - 1)
            if self._decay is not None:
                g = torch.addcmul(g, p, self._decay.view(shape))
            if self.velocity is not None and self._momentum is not None:
                g = self.velocity[name].mul_(self._momentum.view(shape)).add_(g)
            p.addcmul_(g, rates.view(shape))

    def _look(self, looking: Sequence[int]) -> None:
        for at, logits in zip(looking, self._outputs(looking), strict=True):
            course = self.courses[self.active[at]]
            course.look(logits, {name: p.clone() for name, p in member(self.stack, at).items()})
            if course.over:
                self.results[self.active[at]] = course.result()

    def _outputs(self, looking: Sequence[int]) -> Iterator[Tensor]:
        """Of all training rows; no more members at once than in a step."""
        rows = [self.courses[self.active[at]].training.x for at in looking]
        size = max(1, DENSE_NUMBERS // rows[0].numel())
        for start in range(0, len(looking), size):
            x = torch.stack(rows[start : start + size])
            part = {name: p[looking[start : start + size]] for name, p in self.stack.items()}
            trial = partial(same_outputs, self.model, part, x, self._stacked_outputs)
            if self._trust(("look", x.shape[1]), len(x), trial):
                yield from self._stacked_outputs(part, x)
            else:
                yield from (outputs_alone(self.model, member(part, at), x[at]) for at in range(len(x)))

    def _stacked_outputs(self, part: Stack, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.layers is not None:
                return dense_outputs(self.layers, part, x)
            return stacked_outputs(self.model, part, x)

    def _keep(self, staying: Sequence[int]) -> None:
        self.active = [self.active[at] for at in staying]
        self.stack = {name: p[staying] for name, p in self.stack.items()}
        if self.velocity is not None:
            self.velocity = {name: v[staying] for name, v in self.velocity.items()}
        self._read_options()


def _check(trainings: Sequence[Training]) -> None:
    if not trainings:
        raise ValueError("no network to train: expected at least one")
    for number, training in enumerate(trainings):
        rows = len(training.x)
        if not rows or len(training.y) != rows:
            raise ValueError(f"network {number} has {rows} rows and {len(training.y)} labels: expected as many of both")
        if training.optimiser.name != "sgd":
            raise ValueError(f"network {number} has optimiser {training.optimiser.name!r}: expected 'sgd'")
        for what, of in _SHARED.items():
            if of(training) != of(trainings[0]):
                raise ValueError(
                    f"network {number} has {what} {of(training)}, network 0 {of(trainings[0])}: members of an ensemble "
                    "share it; train them in ensembles of their own"
                )


_SHARED: dict[str, Callable[[Training], object]] = {
    "shape of a row": lambda t: tuple(t.x.shape[1:]),
    "rows": lambda t: len(t.y),
    "batch size": lambda t: min(t.optimiser.batch_size, len(t.y)),
    "architecture": lambda t: f"{t.model}, {[tuple(p.shape) for p in t.model.parameters()]}",
}
