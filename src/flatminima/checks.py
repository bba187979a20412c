"""What an objective makes sure of before it is trusted: cheap experiments on a few rows, each with a named failure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatminima import products
from flatminima.batches import ObjectiveError, Piece, Pieces, Weighting, joined, weightings
from flatminima.forward import Forward, plain_gradient

_PROBE_ROWS = 16
_WRONG = (
    0.02  # a difference of gradients is not closer than that to the product of a model that works in float32 inside
)

_STEPS = (0.1, 1e-3, 1e-5, 1e-7)  # of differences, each tried where the one before did not agree


@dataclass(frozen=True)
class Memory:
    """Bytes that the kept graph of a gradient takes: ``constant + per_row * rows``."""

    constant: float
    per_row: float

    def of(self, rows: int) -> float:
        """Bytes for a piece of so many rows."""
        return self.constant + self.per_row * rows

    def rows(self, limit: float) -> int:
        """Most rows that stay below a limit; at least 1."""
        return max(1, int((limit - self.constant) / self.per_row)) if self.per_row > 0 else 2**62


def unused(forward: Forward, piece: Piece, leaves: Sequence[Tensor]) -> list[str]:
    """Names of the parameters that the loss does not depend on.

    Raises:
        ObjectiveError: it depends on none.
    """
    with torch.enable_grad():
        value = forward.loss(0, piece, leaves)
    if not value.requires_grad:
        raise ObjectiveError(
            "the loss depends on no selected parameter in a differentiable way: integer outputs (argmax, round), .detach(), "
            ".item(), torch.no_grad() or NumPy in the model or the loss cut the graph, or the selected parameters are not used"
        )
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in products.nodes([value])):
        raise ObjectiveError(
            "activation checkpointing (use_reentrant=True) hides what it recomputes from every derivative taken here; turn it "
            "off"
        )
    found = torch.autograd.grad(value, list(leaves), allow_unused=True)
    return [name for name, g in zip(forward.names, found, strict=True) if g is None]


def graph_memory(forward: Forward, piece: Piece, leaves: Sequence[Tensor]) -> Memory | None:
    """Bytes kept by the graph of a gradient, from two small graphs; ``None`` where a batch cannot be cut."""
    rows = min(piece.rows, _PROBE_ROWS)
    if rows < 2:
        return None
    few = max(1, rows // 2)
    try:
        large, small = (_saved_bytes(forward, piece.cut(0, count), leaves) for count in (rows, few))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None  # a model or a loss that wants the whole batch
    per_row = max(0.0, (large - small) / (rows - few))
    return Memory(max(0.0, large - per_row * rows), per_row)


def _saved_bytes(forward: Forward, piece: Piece, leaves: Sequence[Tensor]) -> int:
    storages: dict[int, int] = {}
    # The graph keeps numbers and this list the tensors: a graph that holds its own outputs by Python objects is a cycle through
    # C++, which no garbage collection sees.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return len(held) - 1

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, held.__getitem__):
            value = forward.loss(0, piece, leaves)
            products.grad([value], list(leaves), [products.one(value)], create_graph=True)
    finally:
        held.clear()
    return sum(storages.values())


def refuse_batch_statistics(model: nn.Module, pieces: Pieces) -> tuple[str, ...]:
    """In train mode, BatchNorm makes the loss depend on which rows share a piece: refused if a batch is cut, noted if not.

    Raises:
        ObjectiveError: a batch is cut into several pieces.
    """
    layers = [
        name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]  # fmt: skip
    if not layers:
        return ()
    if pieces.split:
        raise ObjectiveError(
            f"in train mode the statistics of BatchNorm ({layers[0]}) depend on how the data are cut, and a batch of "
            f"{pieces.largest} rows does not pass whole (micro_batch is {pieces.micro_batch}): use mode='eval', or leave "
            "micro_batch=None and raise max_memory"
        )
    return ("BatchNorm in train mode: the loss depends on which rows share a batch",)


def weighting(
    forward: Forward, pieces: Pieces, leaves: Sequence[Tensor], dtype: torch.dtype, *, alone: bool
) -> tuple[str, Weighting]:
    """By what a piece counts, proved on a few rows: the gradient of a whole is the weighted mean of those of its parts.

    Gradients, because losses of two parts can agree by chance. Evaluated in eval mode, where no random draw can disturb the
    comparison. Nothing is compared where all data are one piece (and no other process has more).

    Raises:
        ObjectiveError: no known weighting has that property; a sum is recognised.
    """
    candidates = weightings(pieces, forward.loss_fn)
    first = next(iter(candidates.items()))
    if len(pieces) == 1 and alone:
        return first
    gaps, sums, message = dict.fromkeys(candidates, 0.0), 0.0, ""
    for parts in _apart(pieces, list(candidates.values())):
        whole = joined(*parts)
        with forward.in_mode(False):
            found = []
            for piece in (*parts, whole):  # a label that is out of range is then named with its own batch
                with torch.enable_grad():
                    value = forward.loss(0, piece, leaves)
                slopes = products.grad([value], list(leaves))
                found.append((float(value.detach()), torch.cat([g.to_dense().flatten().double() for g in slopes])))
            found.insert(0, found.pop())
        target, images = found[0][1], [g for _, g in found[1:]]
        live = [g for g in (target, *images) if bool(g.isfinite().all())]
        scale = max((float(g.norm()) for g in live), default=0.0)
        if not scale:
            continue
        for description, weigh in candidates.items():
            weights = [weigh(part.inputs, part.targets) for part in parts]
            if sum(weights):
                mean = sum((g * (w / sum(weights)) for g, w in zip(images, weights, strict=True) if w), 0 * live[0])
                gaps[description] = max(gaps[description], float((target - mean).norm()) / scale)
        sums = max(sums, float((target - images[0] - images[1]).norm()) / scale)
        message = message or (
            f"the loss of {whole.rows} rows ({found[0][0]:.6g}) is not the mean over its rows "
            f"({found[1][0]:.6g} and {found[2][0]:.6g} on its parts)"
        )
    best = min(gaps, key=lambda description: gaps[description])
    tolerance = max(1e-3, 30 * torch.finfo(dtype).eps)
    if gaps[best] <= tolerance and not (message and sums < gaps[best]):
        return best, candidates[best]
    if sums <= tolerance:
        raise ObjectiveError("loss_fn sums over the rows of a batch; it must average: use reduction='mean'")
    raise ObjectiveError(
        f"{message}: batch statistics, class weights or ignored targets make it depend on how the data are cut. Pass all data "
        "as one batch with micro_batch=None, a loss that averages over rows, or weight=... , a function of "
        "(inputs, targets) that says how much a piece counts"
    )


def _apart(pieces: Pieces, candidates: Sequence[Weighting]) -> list[tuple[Piece, Piece]]:
    """Pairs of pieces from far apart in the data: ends of a batch, of one on which the candidates differ, of two batches."""
    half = _PROBE_ROWS // 2
    pairs: list[tuple[Piece, Piece]] = []
    uneven = False
    first = last = None
    for batch in pieces.batches():
        first, last = first or batch, batch
        if batch.rows < 2:
            continue
        size = min(half, batch.rows // 2)
        pair = batch.cut(0, size), batch.cut(batch.rows - size, batch.rows)
        shares = []
        for weigh in candidates:
            a, b = (weigh(part.inputs, part.targets) for part in pair)
            shares.append(a / (a + b) if a + b else 0.0)
        differ = len(shares) > 1 and min(shares) > 0 and max(shares) - min(shares) > 0.02
        if not pairs or (differ and not uneven):
            pairs.append(pair)
        uneven |= differ
    if first is not None and last is not None and last is not first:
        rows = min(half, last.rows, first.rows)
        pair = first.cut(0, rows), last.cut(last.rows - rows, last.rows)
        try:
            joined(*pair)
        except (RuntimeError, KeyError, ValueError, TypeError):
            return pairs  # sequences of different lengths, perhaps
        pairs.append(pair)
    return pairs


def plain_and_ours(model: nn.Module, forward: Forward, piece: Piece, leaves: Sequence[Tensor]) -> None:
    """Compare the gradient with ``loss_fn(model(x), y)`` and autograd, written plainly, on a few rows.

    They differ where the loss reaches the parameters past the model's forward pass: a penalty that reads
    ``model.parameters()``, a weight in a Python list, reentrant checkpointing.

    Raises:
        ObjectiveError: they do.
    """
    plain = plain_gradient(model, forward, piece)
    with torch.enable_grad():
        value = forward.loss(0, piece, leaves)
    ours = dict(zip(forward.names, products.grad([value], list(leaves)), strict=True))
    eps = max(torch.finfo(p.dtype).eps for p in leaves)
    size = math.sqrt(sum(float(g.to_dense().double().square().sum()) for g in plain.values()))
    for name in plain:
        if name in ours:
            gap = float((plain[name].to_dense().double() - ours[name].to_dense().double()).norm())
            if gap > max(1e-4, 100 * eps) * size:
                raise ObjectiveError(
                    f"the loss reaches {name} on a way that does not lead through the model's forward pass (a penalty in "
                    "loss_fn that reads model.parameters(), a weight kept in a Python list, activation checkpointing): its "
                    "gradient there is not seen. Let the model return what the penalty needs, share the weight as a "
                    "parameter, or turn checkpointing off"
                )


def padding_rows(model: nn.Module) -> list[str]:
    """Embeddings with a padding row, which PyTorch leaves out of every derivative."""
    layers = nn.Embedding | nn.EmbeddingBag
    return [name for name, m in model.named_modules() if isinstance(m, layers) and m.padding_idx is not None]


def refuse_weight_norm(model: nn.Module) -> None:
    """PyTorch's own ``weight_norm`` has a wrong second derivative.

    Raises:
        ObjectiveError: the model uses it.
    """
    modules = list(model.modules())
    hooks = [type(hook).__name__ for module in modules for hook in module._forward_pre_hooks.values()]
    if "WeightNorm" in hooks or any(type(module).__name__ == "_WeightNorm" for module in modules):
        raise ObjectiveError(
            "the second derivative of weight_norm is wrong in PyTorch (its Hessian is not symmetric); remove it from the "
            "model first, which changes no prediction: torch.nn.utils.parametrize.remove_parametrizations or "
            "torch.nn.utils.remove_weight_norm; or pass second_order='finite-difference'"
        )


def refuse_flash_attention(model: nn.Module) -> None:
    """A Hugging Face model that calls flash attention by itself: that kernel has no second derivative.

    Raises:
        SecondDerivativeError: the configuration says so.
    """
    chosen = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    if "flash" in chosen or "flex" in chosen:
        raise products.SecondDerivativeError(
            f"attention runs on {chosen}, which has no second derivative; load the model with attn_implementation='sdpa' or "
            "'eager', or pass second_order='finite-difference'"
        )


def refuse_asymmetry(forward: Forward, piece: Piece, leaves: list[Tensor]) -> None:
    """Compare ``u'Hv`` with ``v'Hu`` on a few rows: a second derivative that is wrong is rarely symmetric.

    Raises:
        ObjectiveError: they differ by more than rounding.
    """
    multiply = products.hessian_graph(lambda parts: forward.loss(0, piece, parts), leaves)
    generator = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in leaves] for _ in range(2))
    hu, hv = multiply(u), multiply(v)
    first, second = _dot(u, hv), _dot(v, hu)
    length = math.sqrt(_dot(hv, hv) * _dot(u, u)) + math.sqrt(_dot(hu, hu) * _dot(v, v))
    eps = max(torch.finfo(p.dtype).eps for p in leaves)
    tolerance = length * max(1e-2 / math.sqrt(sum(p.numel() for p in leaves)), 1e3 * eps)
    if abs(first - second) > tolerance:
        raise ObjectiveError(
            f"the Hessian of this model is not symmetric (u'Hv = {first:.6g}, v'Hu = {second:.6g}): the second derivative of "
            "some operation is wrong (a torch.autograd.Function, perhaps); write it in differentiable operations, or pass "
            "second_order='finite-difference'"
        )


def refuse_wrong_derivative(forward: Forward, piece: Piece, leaves: list[Tensor]) -> bool:
    """Compare a product with a central difference of gradients, in double precision, close to the given point.

    Close to it, because a unit that is exactly zero there has a kink where the two rightly differ; and where a kink lies within
    the step by chance, shorter steps and other directions decide: logits of a million bend within a millionth of a step.

    Returns:
        Whether they could be compared: not where the model rounds to a lower precision inside, nor where no two steps agree on
        a difference, because the loss is too sharp for it.

    Raises:
        ObjectiveError: they differ in every direction tried, from differences that do not depend on the step.
    """

    def loss_at(parts: Sequence[Tensor]) -> Tensor:
        return forward.loss(0, piece, parts)

    gaps, settled = [], False
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        shift, u = ([torch.randn(p.shape, generator=generator).to(p) for p in leaves] for _ in range(2))
        near = [(p + 1e-3 * s).detach().requires_grad_() for p, s in zip(leaves, shift, strict=True)]
        try:
            slope = products.grad([loss_at(near)], near)
            if forward.precision is not None and torch.finfo(forward.precision).eps > torch.finfo(near[0].dtype).eps:
                return False  # the loss is rounded (Hugging Face: to single precision), which a difference magnifies
            _clear_padding(forward, u)
            product = products.hessian_graph(loss_at, near)(u)
            differences = [products.hessian_difference(loss_at, near, _STEPS[0])(u)]
        except RuntimeError:  # a model that insists on its precision
            return False
        # Where the Hessian vanishes, the rounding of the gradient is all that a difference shows.
        unit = math.sqrt(_dot(u, u) / max(1.0, _dot(near, near)))
        noise = 1e-4 * unit * math.sqrt(_dot(slope, slope))
        gaps.append(_gap(product, differences[0], noise))
        if not gaps[-1] > _WRONG:
            return True
        for step in _STEPS[1:]:
            differences.append(products.hessian_difference(loss_at, near, step)(u))
            if not _gap(product, differences[-1], noise) > _WRONG:
                return True
        settled |= any(not _gap(a, b, noise) > _WRONG for a, b in itertools.pairwise(differences))
    if not settled:
        return False
    raise ObjectiveError(
        f"a Hessian product of this model differs from a difference of its gradients by {min(gaps):.2g}, relative: the second "
        "derivative of some operation is wrong: a torch.autograd.Function, perhaps (write it in differentiable operations, or "
        "pass second_order='finite-difference'), or activation checkpointing, which recomputes with other weights (turn it off)"
    )


def _gap(product: Sequence[Tensor], difference: Sequence[Tensor], noise: float) -> float:
    """How far a product is from a difference, relative to the difference and what rounding makes of it."""
    apart = [a - b for a, b in zip(product, difference, strict=True)]
    return math.sqrt(_dot(apart, apart)) / max(math.sqrt(_dot(difference, difference)) + noise, 1e-300)


def lost_near_zero(forward: Forward, piece: Piece, leaves: list[Tensor]) -> float:
    """Share of Hessian products that is rounding because the loss is next to zero, at most 1; 0 where the loss is not small.

    A probability of a confident classifier rounds to one, and what is left of its curvature is not symmetric any more: twice
    the same bilinear form tells by how much.
    """
    with torch.no_grad():
        small = abs(float(forward.loss(0, piece, leaves))) <= math.sqrt(max(torch.finfo(p.dtype).eps for p in leaves))
    if not small:
        return 0.0
    multiply = products.hessian_graph(lambda parts: forward.loss(0, piece, parts), leaves)
    generator = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in leaves] for _ in range(2))
    hu, hv = multiply(u), multiply(v)
    largest = max((float(part.abs().max()) for part in (*hu, *hv) if part.numel()), default=0.0)
    if not 0 < largest < math.inf:
        return 0.0
    hu, hv = ([part.double() / largest for part in image] for image in (hu, hv))  # their squares would underflow
    size = math.sqrt(math.sqrt(_dot(hu, hu)) * math.sqrt(_dot(hv, hv)))
    return min(1.0, abs(_dot(u, hv) - _dot(v, hu)) / max(size, torch.finfo(torch.float64).tiny))


def product_error(
    forward: Forward, piece: Piece, leaves: list[Tensor], precise: Forward, same: Piece, exact: list[Tensor]
) -> float:
    """Relative error of a Hessian product in the objective's own precision, against double precision."""
    generator = torch.Generator().manual_seed(0)
    u = [torch.randn(p.shape, generator=generator).to(p) for p in leaves]
    image = products.hessian_graph(lambda parts: forward.loss(0, piece, parts), leaves)(u)
    truth = products.hessian_graph(lambda parts: precise.loss(0, same, parts), exact)([v.double() for v in u])
    apart = [a.double() - b for a, b in zip(image, truth, strict=True)]
    return math.sqrt(_dot(apart, apart) / max(_dot(truth, truth), 1e-300))


def _clear_padding(forward: Forward, vector: list[Tensor]) -> None:
    """Zero where PyTorch takes an embedding's padding row for a constant, though a difference would move it."""
    position = {id(p): forward.names.index(n) for n, p in forward.model.named_parameters() if n in forward.names}
    for module in forward.model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            index = position.get(id(module.weight))
            if index is not None:
                vector[index][module.padding_idx] = 0


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x.detach().double() * y.detach().double()).sum() for x, y in zip(a, b, strict=True)))


def fewest(forward: Forward, piece: Piece, values: Sequence[Tensor]) -> Piece:
    """A few rows, if the model and the loss take them alone; else the whole piece (a graph network, flattened targets)."""
    rows = few(piece)
    if rows is piece:
        return piece
    try:
        with torch.no_grad():
            forward.loss(0, rows, values)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return piece
    return rows


def few(piece: Piece, rows: int = _PROBE_ROWS) -> Piece:
    """The first rows of a piece, or all there are."""
    return piece.cut(0, rows) if piece.rows > rows else piece
