"""Attention as a run shows it: two batched matrix products, a softmax in between, and which units are which head's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .classes import FIXED
from .ops import ELEMENTWISE, MOVES, PRODUCTS, SAME, SOFTMAXES, SUMS, moved, number
from .parameters import Entry
from .records import Average, Contraction
from .tape import Call, Value

if TYPE_CHECKING:
    from .network import Network


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention, each of whose heads has its row in the tensors of labels.

    Attributes:
        name: the module, or the operation.
        queries, keys: (heads, d) labels that are multiplied and summed.
        values: (heads, d_v) labels that are averaged, None if no average with this attention matrix is found.
        sums_to_one: whether a softmax over the keys makes the weights of the average.
        unscaled: whether something else than a softmax reads the products, through which their scale might pass.
        average: the operation that averages.
        batch: the head of each matrix of the average's batch.
    """

    name: str
    queries: Tensor
    keys: Tensor
    values: Tensor | None
    sums_to_one: bool
    unscaled: bool
    average: Average | None
    batch: Tensor


def heads(network: Network) -> Iterator[Attention]:
    """Every attention of the run."""
    users: dict[int, list[Call]] = defaultdict(list)
    for call in network.tape.calls:
        for value in dict.fromkeys(call.inputs):
            users[id(value)].append(call)
    averages = {id(average.matrix): average for average in network.flow.averages}
    seen: list[tuple[Tensor, Tensor]] = []
    for contraction in network.flow.contractions:
        units = tuple(network.raw.classes.roots(labels)[0] for labels in (contraction.first, contraction.second))
        if any(torch.equal(units[0], first) and torch.equal(units[1], second) for first, second in seen):
            continue  # a layer that runs several times
        seen.append((units[0], units[1]))
        softmax, average = _follow(contraction.call.out[0], users, averages)
        over_last = softmax is None or number(softmax, 1, "dim", -1) in (-1, softmax.args[0].tensor.ndim - 1)
        unscaled = softmax is None and not _reaches_only_the_output(
            contraction.call.out[0], users, network.tape.outputs
        )
        yield replace(_attention(network, contraction, average, softmax is not None, over_last), unscaled=unscaled)


def _attention(
    network: Network, contraction: Contraction, average: Average | None, sums: bool, over_last: bool
) -> Attention:
    queries, keys = contraction.first, contraction.second
    if not over_last:  # keys' q: the softmax runs over the rows
        queries, keys = keys, queries
    values = average.labels if average is not None and len(average.labels) == len(queries) else None
    together = torch.cat([part for part in (queries, keys, values) if part is not None], 1)
    _, batch = torch.unique(together, dim=0, return_inverse=True)
    first = [int((batch == head).nonzero()[0, 0]) for head in range(int(batch.max()) + 1)]
    first.sort()  # heads in the order of the run
    order = torch.tensor([first.index(int((batch == batch[n]).nonzero()[0, 0])) for n in range(len(batch))])
    name = contraction.call.module or network.tape.describe(contraction.call)
    return Attention(
        name, queries[first], keys[first], None if values is None else values[first],
        sums and average is not None, False, average if values is not None else None, order,
    )  # fmt: skip


def _follow(
    value: Value, users: dict[int, list[Call]], averages: dict[int, Average]
) -> tuple[Call | None, Average | None]:
    """The softmax of these scores, and the average that uses it; scales, masks and views come in between."""
    softmax: Call | None = None
    pending = [value]
    seen: set[int] = set()
    while pending:
        value = pending.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if id(value) in averages:
            return softmax, averages[id(value)]
        for call in users[id(value)]:
            if call.op in SOFTMAXES:
                softmax = call
            if call.op in _ON_THE_WAY:
                pending.extend(call.out)
    return softmax, None


def _reaches_only_the_output(value: Value, users: dict[int, list[Call]], outputs: tuple[Value, ...]) -> bool:
    """Whether the products are what the model returns, in another shape and with something added at most."""
    readers = users[id(value)]
    if not all(call.op in SAME | MOVES | SUMS for call in readers):
        return False
    return (bool(readers) or any(value is out for out in outputs)) and all(
        _reaches_only_the_output(out, users, outputs) for call in readers for out in call.out
    )


_ON_THE_WAY = SAME | MOVES | SUMS | PRODUCTS | SOFTMAXES | ELEMENTWISE | {"where", "masked_fill"}


def output_columns(network: Network, attention: Attention) -> list[Entry]:
    """Which entries of which weights read what the heads put out: labels ``head * d_v + i``, in the shape of the weights."""
    average, flow = attention.average, network.flow
    if average is None or attention.values is None:
        return []
    width = attention.values.shape[1]
    numbers = attention.batch[:, None] * width + torch.arange(width)
    out = average.call.out[0]
    by_row = average.matrix is _operand(average.call, 0)
    start = numbers[:, None, :].expand(out.shape) if by_row else numbers[:, :, None].expand(out.shape)
    labels: dict[int, Tensor] = {id(out): start}
    found: list[Entry] = []
    uses = {id(use.call) for use in flow.uses}
    for call in network.tape.calls:
        mine = [value for value in call.inputs if id(value) in labels]
        if not mine:
            continue
        if call.op in SAME:
            labels[id(call.out[0])] = labels[id(mine[0])]
        elif call.op in MOVES and len(mine) == len(call.inputs):
            for value, result in zip(call.out, moved(call, lambda value: labels[id(value)]), strict=True):
                labels[id(value)] = result
        elif id(call) in uses:
            columns = labels[id(mine[0])].reshape(-1, mine[0].shape[-1])
            weights = [flow.numbers(value) for value in call.inputs if value is not mine[0]]
            matrices = [m.squeeze(0) for m in weights if m is not None and m.squeeze(0).ndim == 2]
            if len(matrices) != 1 or len(matrices[0]) != columns.shape[1] or not bool((columns == columns[0]).all()):
                return []
            found += flow.parameters.entries(matrices[0], columns[0][:, None], torch.tensor(FIXED))
        else:
            return []
    return found


def _operand(call: Call, index: int) -> Value:
    """A factor of a matrix product."""
    values = [argument for argument in call.args if isinstance(argument, Value)]
    found: Value = values[index - 2] if len(values) > 2 else values[index]
    return found
