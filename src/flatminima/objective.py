"""The loss over a data set as a function of the parameters, and its first and second derivatives.

Everything this library measures is a statement about ``L(theta) = sum_i w_i l(theta; batch_i)`` with ``w_i`` the share of rows
in batch ``i``. :class:`Objective` is that function: it is deterministic, it never leaves the model changed, and its
vectors are plain flat tensors.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

LossFn = Callable[[Any, Any], Tensor]
ParameterFilter = Callable[[str, Tensor], bool]


class ObjectiveError(ValueError):
    """The model, the loss and the data do not form a function that can be measured; the message names the cause."""


class NonFiniteLossError(FloatingPointError):
    """The loss is NaN or infinite; the message names the batch."""


class NonFiniteDerivativeError(NonFiniteLossError):
    """The loss is finite but a derivative is NaN or infinite; the message names the parameters."""


@dataclass
class Evaluations:
    """Passes over the whole data set made so far, by kind.

    :attr:`gradient_equivalents` prices them with the nominal cost of a dense network, where a forward pass is one third of a
    gradient: loss 1/3, gradient 1, Hessian- and Gauss-Newton-vector product 2 each.
    """

    loss: int = 0
    gradient: int = 0
    hvp: int = 0
    ggnvp: int = 0

    @property
    def gradient_equivalents(self) -> float:
        """Cost so far in gradient evaluations."""
        return self.loss / 3 + self.gradient + 2 * (self.hvp + self.ggnvp)


@dataclass(frozen=True)
class _Piece:
    """Rows that go through the model in one forward pass."""

    inputs: Any
    targets: Any
    rows: int
    batch: int


class Objective:
    r"""``L(theta)`` over a fixed data set, with gradient, Hessian- and Gauss-Newton-vector products.

    .. math:: L(\theta) = \sum_i \frac{r_i}{\sum_j r_j}\, \ell\bigl(f_\theta(x_i), y_i\bigr)

    with :math:`r_i` the rows of batch *i*, so a short last batch counts by its rows. ``theta`` is the concatenation of the
    selected parameters in ``model.named_parameters()`` order, a flat tensor of shape ``(n,)``.

    The data are drawn once and kept, so order and augmentation are the same at every evaluation; dropout masks are
    replayed from ``seed``. The model is only read: weights, buffers, ``.grad``, train/eval flags and the global random
    state are bit-identical afterwards. Attention runs on the kernel that has a double backward.

    Args:
        model: any ``nn.Module``; called as ``model(x)``, ``model(*x)`` for tuples, ``model(**x)`` for dictionaries.
        loss_fn: ``loss_fn(output, target)`` -> scalar, the *mean* over the rows of the batch.
        data: one ``(x, y)`` pair, or an iterable of such pairs (a ``DataLoader``, a list).
        micro_batch: at most this many rows pass through the model at once, which bounds memory; ``None`` keeps the
            batches as they come.
        parameters: ``parameters(name, tensor) -> bool`` selects parameters; by default those that require a gradient.
        mode: ``"eval"`` (default) or ``"train"`` (dropout active and replayed).
        seed: of the replayed random draws.
        check: evaluate twice at construction, and check that the loss is a finite scalar that repeats.

    Raises:
        ObjectiveError: no data, no parameters, a loss that is not a scalar, that does not repeat, or that is not a mean
            over rows where the data are split.
        NonFiniteLossError: NaN or infinite loss; the batch is named. Its subclass NonFiniteDerivativeError, from the
            methods: a derivative is NaN or infinite; the parameters are named.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> f = Objective(model, nn.functional.mse_loss, (x, y))     # L(w) = (w1^2 + w2^2) / 2
        >>> f.loss(), f.gradient().tolist(), f.hvp(torch.tensor([1.0, 0.0])).tolist()
        (2.5, [1.0, 2.0], [1.0, 0.0])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: tuple[Any, Any] | Iterable[Any],
        *,
        micro_batch: int | None = 1024,
        parameters: ParameterFilter | None = None,
        mode: str = "eval",
        seed: int = 0,
        check: bool = True,
    ) -> None:
        if mode not in ("eval", "train"):
            raise ObjectiveError(f"mode must be 'eval' or 'train', got {mode!r}")
        if micro_batch is not None and micro_batch < 1:
            raise ObjectiveError(f"micro_batch must be at least 1 row or None, got {micro_batch}")
        self.model = model
        self.loss_fn = loss_fn
        self.mode = mode
        self.seed = seed
        self.evaluations = Evaluations()
        self._names, self._parameters = _select(model, parameters)
        self._shapes = [p.shape for p in self._parameters]
        self._sizes = [p.numel() for p in self._parameters]
        self.n = sum(self._sizes)
        devices = {p.device for p in self._parameters}
        if len(devices) > 1:
            raise ObjectiveError(
                f"the selected parameters are on several devices ({', '.join(sorted(map(str, devices)))}); "
                "move the model to one, or select the parameters of one device"
            )
        self.device = devices.pop()
        self.dtype = self._parameters[0].dtype
        for p in self._parameters[1:]:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        # Sums over batches in double precision: the error of a mean must not grow with the number of batches.
        self._accumulate = torch.float32 if self.device.type == "mps" else torch.float64
        self._pieces = _pieces(data, micro_batch)
        self.rows = sum(piece.rows for piece in self._pieces)
        self._kept: _KeptGraph | None = None
        self._differentiable = False
        if check:
            self._check()

    # ----- vectors ---------------------------------------------------------------------------------------------------

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the selected parameters, in the order of the flat vector."""
        return tuple(self._names)

    def point(self) -> Tensor:
        """The model's current parameters as a flat tensor ``(n,)`` (a copy)."""
        return self._flatten([p.detach() for p in self._parameters])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector ``(n,)`` as ``{parameter name: tensor of its shape}``."""
        return dict(zip(self._names, self._unflatten(self._vector(vector)), strict=True))

    # ----- the function and its derivatives --------------------------------------------------------------------------

    def loss(self, theta: Tensor | None = None) -> float:
        """``L(theta)``, accumulated in double precision; at the model's own parameters by default. Cost: 1/3 gradient."""
        values = self._values(theta)
        total = 0.0
        with torch.no_grad():
            for index, piece in enumerate(self._pieces):
                value = self._piece_loss(index, piece, values)
                total += piece.rows / self.rows * self._finite(value, piece)
        self.evaluations.loss += 1
        return total

    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """``grad L(theta)``, shape ``(n,)``. Cost: 1 gradient."""
        return self.loss_and_gradient(theta)[1]

    def loss_and_gradient(self, theta: Tensor | None = None) -> tuple[float, Tensor]:
        """``L(theta)`` and its gradient from one pass. Cost: 1 gradient."""
        leaves = self._leaves(theta)
        total, gradient = 0.0, torch.zeros(self.n, dtype=self._accumulate, device=self.device)
        for index, piece in enumerate(self._pieces):
            with torch.enable_grad():
                value = self._piece_loss(index, piece, leaves)
            share = piece.rows / self.rows
            total += share * self._finite(value, piece)
            found = self._flatten(_grad([value], leaves))
            gradient.add_(self._finite_derivative(found, f"gradient of batch {piece.batch}"), alpha=share)
        self.evaluations.gradient += 1
        return total, gradient.to(self.dtype)

    def hvp(self, vectors: Tensor, theta: Tensor | None = None) -> Tensor:
        r"""Hessian-vector products :math:`H v` by double backward.

        Args:
            vectors: ``(n,)`` or a block ``(n, k)``.
            theta: where; the model's own parameters by default.

        Returns:
            The products, in the shape of ``vectors``.

        The gradient's graph is built once per micro-batch and reused for all columns; data that fit one
        micro-batch keep it between calls until the parameters change. Cost: 2 gradients a column (nominal).
        """
        return self._products(vectors, theta, self._hessian_product, "hvp")

    def ggnvp(self, vectors: Tensor, theta: Tensor | None = None) -> Tensor:
        r"""Generalised Gauss-Newton products :math:`J^\top H_{out} J v`, positive semi-definite for convex losses.

        :math:`J` is the Jacobian of the model's output, :math:`H_{out}` the Hessian of the loss in that output. Shapes as
        in :meth:`hvp`; the model must return one tensor. Cost: 2 gradients a column (nominal).
        """
        return self._products(vectors, theta, self._gauss_newton_product, "ggnvp")

    def to_dtype(self, dtype: torch.dtype) -> Objective:
        """The same function in another floating precision, on a copy of the model; rows and pieces stay as they are."""
        chosen = set(self._names)
        loss_fn = copy.deepcopy(self.loss_fn).to(dtype) if isinstance(self.loss_fn, nn.Module) else self.loss_fn
        return Objective(
            copy.deepcopy(self.model).to(dtype),
            loss_fn,
            [(_cast(piece.inputs, dtype), _cast(piece.targets, dtype)) for piece in self._pieces],
            micro_batch=None,
            parameters=lambda name, _: name in chosen,
            mode=self.mode,
            seed=self.seed,
            check=False,
        )

    def release(self) -> None:
        """Free the graph that :meth:`hvp` keeps between calls."""
        self._kept = None

    # ----- products --------------------------------------------------------------------------------------------------

    def _products(
        self,
        vectors: Tensor,
        theta: Tensor | None,
        product: Callable[[int, _Piece, list[Tensor]], Callable[[list[Tensor]], Tensor]],
        kind: str,
    ) -> Tensor:
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.n:
            raise ObjectiveError(
                f"expected a vector ({self.n},) or a block ({self.n}, k), got a tensor of shape {tuple(vectors.shape)}"
            )
        if not vectors.is_floating_point():
            raise ObjectiveError(f"expected floating-point vectors, got {vectors.dtype}: convert them with .to(...)")
        block = vectors if vectors.dim() == 2 else vectors[:, None]
        block = block.to(device=self.device, dtype=self.dtype)
        columns = [[part.to(p.dtype) for part, p in self._parts(column)] for column in block.unbind(1)]
        total = torch.zeros(self.n, len(columns), dtype=self._accumulate, device=self.device)
        for index, piece in enumerate(self._pieces):
            apply = self._linearised(index, piece, theta, product, kind)
            for j, column in enumerate(columns):
                try:
                    total[:, j].add_(apply(column), alpha=piece.rows / self.rows)
                except RuntimeError as error:
                    if "derivative" in str(error) and "not implemented" in str(error):
                        raise _no_second_derivative(str(error).splitlines()[0]) from error
                    raise
        setattr(self.evaluations, kind, getattr(self.evaluations, kind) + len(columns))
        self._finite_derivative(total.sum(1), kind)
        result = total.to(vectors.dtype)
        return result if vectors.dim() == 2 else result[:, 0]

    def _linearised(
        self,
        index: int,
        piece: _Piece,
        theta: Tensor | None,
        product: Callable[[int, _Piece, list[Tensor]], Callable[[list[Tensor]], Tensor]],
        kind: str,
    ) -> Callable[[list[Tensor]], Tensor]:
        # One graph is all that may be alive, so it is worth keeping only if it covers the whole data set.
        keep = theta is None and len(self._pieces) == 1
        if keep and self._kept is not None and self._kept.kind == kind and self._kept.valid_for(self.model):
            return self._kept.apply
        self._kept = None
        apply = product(index, piece, self._leaves(theta))
        if keep:
            self._kept = _KeptGraph(kind, apply, _state(self.model))
        return apply

    def _hessian_product(self, index: int, piece: _Piece, leaves: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
        self._refuse_weight_norm()
        with torch.enable_grad():
            value = self._piece_loss(index, piece, leaves)
        self._finite(value, piece)
        gradients = _grad([value], leaves, [_one(value)], create_graph=True)

        self._refuse_once_differentiable(gradients)

        def apply(vector: list[Tensor]) -> Tensor:
            return self._flatten(_grad(gradients, leaves, vector, retain_graph=True))

        return apply

    def _gauss_newton_product(
        self, index: int, piece: _Piece, leaves: list[Tensor]
    ) -> Callable[[list[Tensor]], Tensor]:
        with torch.enable_grad(), self._evaluating(index):
            output = self._output(piece, leaves)
            if not isinstance(output, Tensor):
                raise ObjectiveError(f"ggnvp needs a model that returns one tensor, got {type(output).__name__}")
            at_output = output.detach().requires_grad_()
            value = self.loss_fn(at_output, _to(piece.targets, self.device))
        self._finite(value, piece)
        (slope,) = _grad([value], [at_output], [_one(value)], create_graph=True)
        # J v without forward mode: u -> J'u is linear, and J v is the gradient of <J'u, v> in u.
        with torch.enable_grad():
            dummy = torch.zeros_like(output, requires_grad=True)
        pulled = _grad([output], leaves, [dummy], create_graph=True)
        self._refuse_once_differentiable([slope, *pulled])

        def apply(vector: list[Tensor]) -> Tensor:
            (pushed,) = _grad(pulled, [dummy], vector, retain_graph=True)
            (curved,) = _grad([slope], [at_output], [pushed], retain_graph=True)
            return self._flatten(_grad([output], leaves, [curved], retain_graph=True))

        return apply

    def _refuse_weight_norm(self) -> None:
        modules = list(self.model.modules())
        hooks = [type(hook).__name__ for module in modules for hook in module._forward_pre_hooks.values()]
        if "WeightNorm" in hooks or any(type(module).__name__ == "_WeightNorm" for module in modules):
            raise ObjectiveError(
                "the second derivative of weight_norm is wrong in PyTorch (its Hessian is not symmetric); remove it from the "
                "model first, which changes no prediction: torch.nn.utils.parametrize.remove_parametrizations or "
                "torch.nn.utils.remove_weight_norm"
            )

    def _refuse_once_differentiable(self, tensors: Sequence[Tensor]) -> None:
        # Asked for the gradient in some inputs, autograd drops the node that stands for the missing derivative in silence.
        if self._differentiable:
            return
        seen, waiting = set(), [t.grad_fn for t in tensors]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if type(node).__name__ == "Error":
                    raise _no_second_derivative("a torch.autograd.Function marked once_differentiable")
                waiting += [following for following, _ in node.next_functions]
        self._differentiable = True

    # ----- one evaluation --------------------------------------------------------------------------------------------

    def _piece_loss(self, index: int, piece: _Piece, values: Sequence[Tensor]) -> Tensor:
        with self._evaluating(index):
            return self._scalar(self.loss_fn(self._output(piece, values), _to(piece.targets, self.device)))

    def _output(self, piece: _Piece, values: Sequence[Tensor]) -> Any:
        # Copies of the buffers: a layer that updates its statistics in place then updates the copy.
        state: dict[str, Tensor] = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        state.update(zip(self._names, values, strict=True))
        inputs = _to(piece.inputs, self.device)
        if isinstance(inputs, Mapping):
            return functional_call(self.model, state, (), dict(inputs))
        return functional_call(self.model, state, inputs if isinstance(inputs, tuple) else (inputs,))

    @contextlib.contextmanager
    def _evaluating(self, index: int) -> Iterator[None]:
        flags = [(module, module.training) for module in self.model.modules()]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), sdpa_kernel(SDPBackend.MATH):
            # torch.manual_seed would reseed every device of the machine, also those that fork_rng does not restore.
            torch.default_generator.manual_seed(self.seed + index)
            for device in cuda:
                torch.cuda.default_generators[device.index].manual_seed(self.seed + index)
            try:
                # The fused inference kernel of nn.MultiheadAttention rounds differently from the differentiable one.
                torch.backends.mha.set_fastpath_enabled(False)
                self.model.train(self.mode == "train")
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast_path)
                for module, training in flags:
                    module.training = training

    def _scalar(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise ObjectiveError(f"loss_fn must return a tensor with one element, got {type(value).__name__}")
        if value.numel() != 1:
            raise ObjectiveError(
                f"loss_fn must return one number, the mean over the batch, got a tensor of shape {tuple(value.shape)}; "
                "use reduction='mean'"
            )
        if not value.is_floating_point():
            raise ObjectiveError(f"loss_fn must return a floating-point tensor, got {value.dtype}")
        return value.reshape(())

    def _finite(self, value: Tensor, piece: _Piece) -> float:
        number = float(value.detach())
        if not math.isfinite(number):
            bad = [name for name, p in zip(self._names, self._parameters, strict=True) if not p.isfinite().all()]
            raise NonFiniteLossError(
                f"the loss of batch {piece.batch} is {number}"
                + (f"; the parameters {', '.join(bad)} hold NaN or infinity" if bad else "")
            )
        return number

    def _finite_derivative(self, found: Tensor, what: str) -> Tensor:
        if not bool(found.isfinite().all()):
            parts = zip(self._names, self._unflatten(found), strict=True)
            bad = [name for name, part in parts if not part.isfinite().all()]
            raise NonFiniteDerivativeError(
                f"the loss is finite but its {what} is NaN or infinite in {', '.join(bad)}; a square root or a norm at zero "
                "has no derivative"
            )
        return found

    # ----- checks ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        before = _state(self.model)
        first, second = self.loss(), self.loss()
        changed = [name for name, old, new in _differences(before, _state(self.model)) if not torch.equal(old, new)]
        if changed:
            raise ObjectiveError(
                f"evaluating the model changes its own {', '.join(changed)}; a forward pass must only read them"
            )
        tolerance = 100 * torch.finfo(self.dtype).eps * max(1.0, abs(first))
        if abs(first - second) > tolerance:
            source = (
                "in train mode a module draws random numbers from a generator of its own: use mode='eval', or draw from "
                "torch's global generator, which is replayed"
                if self.mode == "train"
                else "the model, the loss or the data (a transform applied on access) draws random numbers from a generator "
                "of its own, or keeps state between calls"
            )
            raise ObjectiveError(f"two evaluations at the same point differ ({first!r} and {second!r}): {source}")
        if len(self._pieces) > 1 and self.mode == "eval":
            self._check_mean_over_rows()
        self.evaluations = Evaluations()

    def _check_mean_over_rows(self) -> None:
        piece = next((p for p in self._pieces if p.rows > 1), None)
        if piece is None:
            return
        half = piece.rows // 2
        parts = [
            _Piece(_rows(piece.inputs, piece.rows, s), _rows(piece.targets, piece.rows, s), n, piece.batch)
            for s, n in ((slice(0, half), half), (slice(half, piece.rows), piece.rows - half))
        ]
        with torch.no_grad():
            whole, left, right = (float(self._piece_loss(0, p, self._values(None))) for p in (piece, *parts))
        scale = max(1e-3, abs(whole), abs(left), abs(right)) * max(1e-4, 1e3 * torch.finfo(self.dtype).eps)
        if abs(whole - (half * left + (piece.rows - half) * right) / piece.rows) <= scale:
            return
        if abs(whole - (left + right)) <= scale:
            raise ObjectiveError("loss_fn sums over the rows of a batch; it must average: use reduction='mean'")
        raise ObjectiveError(
            f"the loss of a batch of {piece.rows} rows ({whole:.6g}) is not the mean over its rows ({left:.6g} and "
            f"{right:.6g} on its halves): batch statistics, class weights or ignored targets make it depend on how the data "
            "are cut. Pass all data as one batch with micro_batch=None, or a loss that averages over rows"
        )

    # ----- small parts -----------------------------------------------------------------------------------------------

    def _vector(self, theta: Tensor) -> Tensor:
        if theta.shape != (self.n,):
            raise ObjectiveError(f"expected a flat vector of shape ({self.n},), got {tuple(theta.shape)}")
        return theta.detach().to(device=self.device)

    def _values(self, theta: Tensor | None) -> list[Tensor]:
        if theta is None:
            return [p.detach() for p in self._parameters]
        return [part.to(p.dtype) for part, p in self._parts(self._vector(theta))]

    def _leaves(self, theta: Tensor | None) -> list[Tensor]:
        # Own copies: a graph that is kept must not see the user's later in-place updates.
        return [value.clone().requires_grad_() for value in self._values(theta)]

    def _parts(self, vector: Tensor) -> Iterable[tuple[Tensor, nn.Parameter]]:
        return zip(self._unflatten(vector), self._parameters, strict=True)

    def _unflatten(self, vector: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1).to(self.dtype) for t in tensors])


@dataclass(frozen=True)
class _KeptGraph:
    kind: str
    apply: Callable[[list[Tensor]], Tensor]
    state: dict[str, Tensor]

    def valid_for(self, model: nn.Module) -> bool:
        # Comparing values costs O(n); version counters would miss updates made through ``.data``.
        return all(torch.equal(old, new) for _, old, new in _differences(self.state, _state(model, clone=False)))


def _state(model: nn.Module, clone: bool = True) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone() if clone else t.detach() for name, t in tensors.items()}


def _differences(old: dict[str, Tensor], new: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, tensor in old.items():
        yield name, tensor, new[name]


def _one(value: Tensor) -> Tensor:
    """The seed of a backward pass whose graph is kept; a variable, or a once-differentiable function would pass for linear."""
    return torch.ones_like(value).requires_grad_()


def _no_second_derivative(what: str) -> ObjectiveError:
    return ObjectiveError(
        f"an operation of the model or the loss has no second derivative ({what}); use an implementation of it made of "
        "differentiable operations"
    )


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vector: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """``torch.autograd.grad`` where what does not depend on an input has the derivative zero instead of an error."""
    live = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not live:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [outputs[i] for i in live],
        list(inputs),
        None if vector is None else [vector[i] for i in live],
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _select(model: nn.Module, keep: ParameterFilter | None) -> tuple[list[str], list[nn.Parameter]]:
    chosen = [(name, p) for name, p in model.named_parameters() if (keep(name, p) if keep else p.requires_grad)]
    if not chosen:
        raise ObjectiveError(
            "no parameter is selected: "
            + ("the filter returned False for all of them" if keep else "none requires a gradient; pass parameters=...")
        )
    wrong = [name for name, p in chosen if not p.is_floating_point()]
    if wrong:
        raise ObjectiveError(f"only floating-point parameters can be differentiated, not {', '.join(wrong)}")
    return [name for name, _ in chosen], [p for _, p in chosen]


def batches(data: Any) -> list[tuple[Any, Any]]:
    """The data of an :class:`Objective` as a list of ``(inputs, targets)``, drawn once.

    Raises:
        ObjectiveError: an element that is not a pair.
    """
    if isinstance(data, Dataset) or not isinstance(data, Iterable):
        raise ObjectiveError(
            f"data must be one (inputs, targets) pair or an iterable of batches, got {type(data).__name__}; "
            "wrap a data set in torch.utils.data.DataLoader"
        )
    is_pair = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)
    found = []
    for number, batch in enumerate([data] if is_pair else data):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ObjectiveError(
                f"every batch must be a pair (inputs, targets); batch {number} is {type(batch).__name__}"
            )
        found.append((tuple(batch[0]) if isinstance(batch[0], list) else batch[0], batch[1]))
    return found


def _pieces(data: Any, micro_batch: int | None) -> list[_Piece]:
    pieces: list[_Piece] = []
    for number, (inputs, targets) in enumerate(batches(data)):
        rows = _count_rows(targets if isinstance(targets, Tensor) and targets.dim() else inputs)
        step = rows if micro_batch is None else micro_batch
        for start in range(0, rows, max(step, 1)):
            cut = slice(start, min(start + step, rows))
            pieces.append(_Piece(_rows(inputs, rows, cut), _rows(targets, rows, cut), cut.stop - cut.start, number))
    if not pieces:
        raise ObjectiveError("the data set is empty: no batch with at least one row")
    return pieces


def _count_rows(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.shape[0] if tree.dim() else 1
    if isinstance(tree, Mapping):
        return _count_rows(next(iter(tree.values())))
    if isinstance(tree, tuple | list):
        return _count_rows(tree[0])
    raise ObjectiveError(
        f"cannot count the rows of a {type(tree).__name__}; use tensors, or tuples or dictionaries of them"
    )


def _rows(tree: Any, rows: int, cut: slice) -> Any:
    if isinstance(tree, Tensor):
        return tree[cut] if tree.dim() and tree.shape[0] == rows else tree
    if isinstance(tree, Mapping):
        return {key: _rows(value, rows, cut) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(_rows(value, rows, cut) for value in tree)
    return tree


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {key: _cast(value, dtype) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(_cast(value, dtype) for value in tree)
    return tree


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {key: _to(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(_to(value, device) for value in tree)
    return tree
