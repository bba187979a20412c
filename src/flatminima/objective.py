"""The loss over a data set as a function of the parameters, and its first and second derivatives.

Everything this library measures is a statement about ``L(theta) = sum_i w_i l(theta; piece_i)`` with ``w_i`` the share of rows
(or of tokens) in piece ``i``. :class:`Objective` is that function: it is deterministic, it never leaves the model changed, and
its vectors are plain flat tensors.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from flatminima import checks, products
from flatminima.batches import ObjectiveError, Piece, Pieces, Weighting, batches, by_rows, cast
from flatminima.forward import Forward, LossFn, NonFiniteDerivativeError, NonFiniteLossError, finite, uses_attention
from flatminima.products import LinearMap, SecondDerivativeError

__all__ = [
    "SECOND_ORDER",
    "Evaluations",
    "LossFn",
    "NonFiniteDerivativeError",
    "NonFiniteLossError",
    "Objective",
    "ObjectiveError",
    "SecondDerivativeError",
    "batches",
]

ParameterFilter = Callable[[str, Tensor], bool]

#: How Hessian-vector products may be formed.
SECOND_ORDER = ("auto", "graph", "traced", "calibrate", "finite-difference")

# Vectors that share one graph when it has to be rebuilt: the gain levels off, the memory does not.
_BLOCK = 8

# Relative rounding of products that a reader must know of.
_NOTABLE = 1e-6

# Parameters beyond which no double-precision copy of the model is made to check the products.
_LARGE = 5_000_000


@dataclass
class Evaluations:
    """Passes over the whole data set made so far, by kind.

    :attr:`gradient_equivalents` prices them with the nominal cost of a dense network, where a forward pass is one third of a
    gradient: loss 1/3, gradient 1, a product of any kind 2.
    """

    loss: int = 0
    gradient: int = 0
    hvp: int = 0
    ggnvp: int = 0
    fishervp: int = 0
    #: Single forward and backward passes of the exact diagonal and trace, already in gradients.
    passes: float = 0.0

    @property
    def gradient_equivalents(self) -> float:
        """Cost so far in gradient evaluations."""
        return self.loss / 3 + self.gradient + 2 * (self.hvp + self.ggnvp + self.fishervp) + self.passes


class Objective:
    r"""``L(theta)`` over a fixed data set, with gradient and with Hessian-, Gauss-Newton- and Fisher-vector products.

    .. math:: L(\theta) = \sum_i \frac{r_i}{\sum_j r_j}\, \ell\bigl(f_\theta(x_i), y_i\bigr)

    with :math:`r_i` the rows of batch *i*, so a short last batch counts by its rows. Where targets are masked (``-100``, or the
    loss's ``ignore_index``) and the loss averages over the others, :math:`r_i` counts those instead; which of the two it is
    is found out by an experiment and stated in :attr:`weighting`. ``theta`` is the concatenation of the selected parameters in
    ``model.named_parameters()`` order, a flat tensor of shape ``(n,)``.

    The data are drawn once and kept, so order and augmentation are the same at every evaluation; dropout masks are
    replayed from ``seed``. The model is only read: weights, buffers, ``.grad``, train/eval flags and the global random
    state are bit-identical afterwards. Attention runs on the kernel that has a double backward (said in :attr:`notes`).

    Args:
        model: any ``nn.Module``; called as ``model(x)``, ``model(*x)`` for tuples, ``model(**x)`` for dictionaries.
            DistributedDataParallel, DataParallel and torch.compile wrappers are taken off.
        loss_fn: ``loss_fn(output, target)`` -> scalar, the *mean* over the rows (or unmasked targets) of the batch. ``None``:
            the model computes it, as Hugging Face models do when the batch holds labels; it is the output's ``.loss``.
        data: one ``(x, y)`` pair, or an iterable of such pairs (a ``DataLoader``, a list); dictionaries for ``model(**x)``,
            their ``"labels"`` are the targets.
        parameters: ``parameters(name, tensor) -> bool`` selects parameters; by default those that require a gradient.
        mode: ``"eval"`` (default) or ``"train"`` (dropout active and replayed).
        micro_batch: at most this many rows pass through the model at once; by default as many as ``max_memory`` allows.
        max_memory: bytes that kept graphs may take together. The graphs of as many pieces as fit are kept between products;
            the others are rebuilt, once for all vectors of a block.
        second_order: how Hessian products are formed. ``"auto"``: double backward through the kept graph (``"graph"``), and
            central differences of the gradient where an operation has no second derivative, with a warning and a note.
            ``"traced"``: ``torch.func.linearize``, seconds to trace, then cheaper for convolutions. ``"calibrate"``: times both
            and keeps the faster, so bits may differ between runs. ``"finite-difference"``: always.
        weight: how much a piece counts: ``"auto"``, ``"rows"``, or a function of (inputs, targets).
        keep_data: ``False`` iterates ``data`` anew at every pass instead of holding it; data that change are refused.
        process_group: of ``torch.distributed``; every rank then holds its share of the rows, and all results are those of the
            union, the same on every rank. All ranks must make the same calls.
        seed: of the replayed random draws.
        check: experiments at construction: the loss is a finite scalar that repeats, averages, and depends on the parameters;
            and before the first product: the Hessian agrees with a difference of gradients in double precision on a few rows
            (up to five million parameters; beyond, it is symmetric).

    Raises:
        ObjectiveError: no data, no parameters, a loss that is not a scalar, that does not repeat, that does not depend on the
            parameters, or that is not a mean where the data are split; data that changed; a second derivative that is wrong.
            Its subclass SecondDerivativeError: an operation without second derivative.
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
        loss_fn: LossFn | None,
        data: Any,
        *,
        parameters: ParameterFilter | None = None,
        mode: str = "eval",
        micro_batch: int | None = None,
        max_memory: int = 2**31,
        second_order: str = "auto",
        weight: str | Weighting = "auto",
        keep_data: bool = True,
        process_group: torch.distributed.ProcessGroup | None = None,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        _check_options(mode, micro_batch, max_memory, second_order, weight)
        if torch.is_inference_mode_enabled():
            raise ObjectiveError("nothing can be differentiated under torch.inference_mode(); leave it first")
        self.model, wrapper = unwrapped(model)
        self.loss_fn, self.mode, self.seed = loss_fn, mode, seed
        self.max_memory, self.second_order, self.check = max_memory, second_order, check
        self.process_group = process_group
        self._use(*_select(self.model, parameters))
        self._forward = Forward(self.model, loss_fn, self._names, self.device, train=mode == "train", seed=seed)
        self._pieces = Pieces(data, micro_batch, keep=keep_data, seed=seed)
        self._notes = [wrapper] if wrapper else []
        self._memory: checks.Memory | None = None
        self._prepare(weight, automatic=micro_batch is None)
        if check:
            self._check()

    def _use(self, names: list[str], parameters: list[nn.Parameter]) -> None:
        self._names, self._parameters = names, parameters
        self._shapes = [p.shape for p in parameters]
        self._sizes = [p.numel() for p in parameters]
        self.n = sum(self._sizes)
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise ObjectiveError(
                f"the selected parameters are on several devices ({', '.join(sorted(map(str, devices)))}); "
                "move the model to one, or select the parameters of one device"
            )
        self.device = devices.pop()
        self.dtype = parameters[0].dtype
        for p in parameters[1:]:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        # Sums over batches in double precision: the error of a mean must not grow with the number of batches.
        self._accumulate = torch.float32 if self.device.type == "mps" else torch.float64
        self.evaluations = Evaluations()
        self._kept: _Kept | None = None
        self._path: dict[str, str] = {}
        self._verified = False
        self._product_error = 0.0
        self._lost = 0.0
        self._difference_error = 0.0

    # ----- vectors ---------------------------------------------------------------------------------------------------

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the selected parameters, in the order of the flat vector."""
        return tuple(self._names)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result must know: how pieces count, which kernel or product was chosen, what is unused."""
        return tuple(self._notes)

    @property
    def block_size(self) -> int:
        """Vectors that are best multiplied at once: 1 where all graphs are kept, more where they are rebuilt."""
        return 1 if self._keeps() == len(self._pieces) else _BLOCK

    @property
    def rounding(self) -> float:
        """Relative error of a Hessian product, about: machine epsilon, or more where an experiment has shown it."""
        return max(self.pass_rounding, self._lost)

    @property
    def pass_rounding(self) -> float:
        """As :attr:`rounding`, without what products lose where the loss is next to zero."""
        precision = self._forward.precision or self.dtype
        coarsest = max(float(torch.finfo(t).eps) for t in (precision, *(p.dtype for p in self._parameters)))
        return max(coarsest, self._product_error) + self._difference_error

    def point(self) -> Tensor:
        """The model's current parameters as a flat tensor ``(n,)`` (a copy)."""
        self._refresh()
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
            for index, piece, share in self._shares():
                total += share * self._finite(self._forward.loss(index, piece, values), piece)
        self.evaluations.loss += 1
        return float(self._summed(torch.tensor(total, dtype=self._accumulate, device=self.device)))

    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """``grad L(theta)``, shape ``(n,)``. Cost: 1 gradient."""
        return self.loss_and_gradient(theta)[1]

    def loss_and_gradient(self, theta: Tensor | None = None) -> tuple[float, Tensor]:
        """``L(theta)`` and its gradient from one pass. Cost: 1 gradient."""
        leaves = self._leaves(theta)
        total = torch.zeros(self.n + 1, dtype=self._accumulate, device=self.device)
        for index, piece, share in self._shares():
            with torch.enable_grad():
                value = self._forward.loss(index, piece, leaves)
            total[0] += share * self._finite(value, piece)
            found = self._flatten(products.grad([value], leaves))
            total[1:].add_(self._finite_derivative(found, f"gradient of batch {piece.batch}"), alpha=share)
        self.evaluations.gradient += 1
        total = self._summed(total)
        return float(total[0]), total[1:].to(self.dtype)

    def hvp(self, vectors: Tensor, theta: Tensor | None = None) -> Tensor:
        r"""Hessian-vector products :math:`H v`.

        Args:
            vectors: ``(n,)`` or a block ``(n, k)``.
            theta: where; the model's own parameters by default.

        Returns:
            The products, in the shape of ``vectors``.

        One linear map is built per piece and applied to all columns; it is kept for later calls, within ``max_memory``,
        until parameters or buffers change; after changing anything else (a temperature, a coefficient in ``loss_fn``) call
        :meth:`release`. Cost: 2 gradients a column (nominal).
        """
        if self.second_order != "finite-difference":
            checks.refuse_weight_norm(self.model)
        return self._products(vectors, theta, "hvp", self._hessian_map)

    def ggnvp(self, vectors: Tensor, theta: Tensor | None = None) -> Tensor:
        r"""Generalised Gauss-Newton products :math:`J^\top H_{out} J v`, positive semi-definite for convex losses.

        :math:`J` is the Jacobian of the model's output, :math:`H_{out}` the Hessian of the loss in that output. Shapes as
        in :meth:`hvp`; the model must return one tensor. Cost: 2 gradients a column (nominal).
        """
        return self._products(vectors, theta, "ggnvp", self._gauss_newton_map)

    def fishervp(self, vectors: Tensor, theta: Tensor | None = None) -> Tensor:
        r"""Empirical Fisher products :math:`\frac1R \sum_r g_r g_r^\top v`, :math:`g_r` the gradient of the loss of row *r*.

        The observed targets are used; for the true Fisher matrix see :class:`flatminima.operators.Fisher`. A row is one entry
        of the first dimension: a whole sequence, if targets are sequences. Shapes as in :meth:`hvp`. Cost: 2 gradients a
        column.
        """
        return self._products(vectors, theta, "fishervp", self._fisher_map)

    def to_dtype(self, dtype: torch.dtype) -> Objective:
        """The same function in another floating precision, on a copy of the model; rows and pieces stay as they are."""
        loss_fn = copy.deepcopy(self.loss_fn).to(dtype) if isinstance(self.loss_fn, nn.Module) else self.loss_fn
        twin = copy.copy(self)
        twin.model, twin.loss_fn = copy.deepcopy(self.model).to(dtype), loss_fn
        twin._notes = list(self._notes)
        chosen = dict(twin.model.named_parameters())
        twin._use(list(self._names), [chosen[name] for name in self._names])
        twin._forward = Forward(
            twin.model, loss_fn, self._names, twin.device, train=self._forward.train, seed=self.seed
        )
        twin._cast = dtype
        return twin

    def restricted(self, parameters: ParameterFilter | Iterable[str]) -> Objective:
        """The same function of some of the selected parameters only, the others held fixed: a principal block of the Hessian.

        Args:
            parameters: a filter ``(name, tensor) -> bool``, or names.

        Raises:
            ObjectiveError: unknown names, or nothing left.
        """
        pairs = list(zip(self._names, self._parameters, strict=True))
        if callable(parameters):
            chosen = [(name, p) for name, p in pairs if parameters(name, p)]
        else:
            wanted = set(parameters)
            unknown = sorted(wanted - set(self._names))
            if unknown:
                raise ObjectiveError(
                    f"no selected parameter is called {', '.join(unknown)}; there are {', '.join(self._names)}"
                )
            chosen = [(name, p) for name, p in pairs if name in wanted]
        if not chosen:
            raise ObjectiveError("no parameter is left: the filter returned False for all of them")
        twin = copy.copy(self)
        twin._notes = list(self._notes)
        twin._use([name for name, _ in chosen], [p for _, p in chosen])
        twin._forward = Forward(
            self.model, self.loss_fn, twin._names, twin.device, train=self._forward.train, seed=self.seed
        )
        return twin

    def layers(self) -> dict[str, Objective]:
        """One restricted objective for each module that owns selected parameters: the diagonal blocks of the Hessian.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
            >>> f = Objective(net, nn.functional.mse_loss, (torch.randn(4, 2), torch.randn(4, 1)))
            >>> {name: block.n for name, block in f.layers().items()}
            {'0': 9, '2': 4}
        """
        owners: dict[str, list[str]] = {}
        for name in self._names:
            owners.setdefault(name.rpartition(".")[0] or "(model)", []).append(name)
        return {owner: self.restricted(names) for owner, names in owners.items()}

    def resampled(
        self, sampler: Callable[[Tensor, torch.Generator], Tensor], seed: int, theta: Tensor | None = None
    ) -> Objective:
        """The same model on the same inputs, with targets ``sampler(output, generator)`` drawn at ``theta``."""
        if self.weighting != "rows":
            raise ObjectiveError(f"targets can be drawn where a batch counts by its rows, not by its {self.weighting}")
        generator = torch.Generator(device=self.device).manual_seed(seed)
        pairs = []
        for index, piece, _ in self._shares():
            with torch.no_grad():
                output = self._forward.logits(index, piece, self._values(theta))
            pairs.append((piece.inputs, sampler(output, generator)))
        return self.with_data(pairs)

    def with_data(self, data: Any) -> Objective:
        """The same loss of the same model over other data, weighted by the same rule; floating inputs in the model's dtype.

        Example:
            >>> x, y = torch.eye(2), torch.zeros(2, 1)
            >>> f = Objective(nn.Linear(2, 1), nn.functional.mse_loss, (x, y))
            >>> first, second = f.with_data((x[:1], y[:1])), f.with_data((x[1:], y[1:]))
            >>> abs(f.loss() - (first.loss() + second.loss()) / 2) < 1e-6
            True
        """
        twin = copy.copy(self)
        twin._notes = list(self._notes)
        twin._use(self._names, self._parameters)
        twin._pieces = Pieces(data, self._pieces.micro_batch, seed=self.seed)
        twin._cast = None
        total = sum(self._weigh(piece.inputs, piece.targets) for piece in twin._pieces)
        counts = self._summed(torch.tensor([twin._pieces.rows, total], dtype=torch.float64, device=self.device))
        twin.rows, twin._total = int(counts[0]), float(counts[1])
        return twin

    def with_loss(self, loss_fn: LossFn) -> Objective:
        """Another loss of the same model over the same data, a mean over the same rows.

        Example:
            >>> f = Objective(nn.Linear(2, 1), nn.functional.mse_loss, (torch.eye(2), torch.zeros(2, 1)))
            >>> f.with_loss(lambda output, target: 2 * f.loss_fn(output, target)).loss() == 2 * f.loss()
            True
        """
        twin = copy.copy(self)
        twin.loss_fn = loss_fn
        twin._notes = list(self._notes)
        twin._use(self._names, self._parameters)
        twin._forward = Forward(
            self.model, loss_fn, self._names, self.device, train=self._forward.train, seed=self.seed
        )
        return twin

    def release(self) -> None:
        """Free the graphs that products keep between calls."""
        self._kept = None

    # ----- products --------------------------------------------------------------------------------------------------

    def _products(self, vectors: Tensor, theta: Tensor | None, kind: str, build: _Builder) -> Tensor:
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.n:
            raise ObjectiveError(
                f"expected a vector ({self.n},) or a block ({self.n}, k), got a tensor of shape {tuple(vectors.shape)}"
            )
        if not vectors.is_floating_point():
            raise ObjectiveError(f"expected floating-point vectors, got {vectors.dtype}: convert them with .to(...)")
        block = (vectors if vectors.dim() == 2 else vectors[:, None]).to(device=self.device, dtype=self.dtype)
        try:
            total = self._multiply(block, theta, kind, build)
        except SecondDerivativeError as error:
            if self.second_order != "auto" or kind == "fishervp" or kind in self._path:
                raise
            self._fall_back(kind, str(error))
            total = self._multiply(block, theta, kind, build)
        setattr(self.evaluations, kind, getattr(self.evaluations, kind) + block.shape[1])
        total = self._summed(total)
        self._finite_derivative(total.sum(1), kind)
        result = total.to(vectors.dtype)
        return result if vectors.dim() == 2 else result[:, 0]

    def _multiply(self, block: Tensor, theta: Tensor | None, kind: str, build: _Builder) -> Tensor:
        columns = [[part.to(p.dtype) for part, p in self._parts(column)] for column in block.unbind(1)]
        if len(self._pieces) == 1 and columns and self.process_group is None:  # one term: nothing to accumulate
            ((index, piece, _),) = self._shares()
            apply = self._linearised(index, piece, theta, kind, build)
            images = [self._flatten(apply(column)) for column in columns]
            return images[0][:, None] if len(images) == 1 else torch.stack(images, dim=1)
        total = torch.zeros(self.n, len(columns), dtype=self._accumulate, device=self.device)
        for index, piece, share in self._shares():
            apply = self._linearised(index, piece, theta, kind, build)
            for j, column in enumerate(columns):
                total[:, j].add_(self._flatten(apply(column)), alpha=share)
        return total

    def _linearised(self, index: int, piece: Piece, theta: Tensor | None, kind: str, build: _Builder) -> LinearMap:
        if self._kept is None or not self._kept.valid_for(kind, theta, self.model, index):
            self._kept = _Kept(kind, theta, None if theta is None else theta.detach().clone(), _state(self.model))
        if index in self._kept.maps:
            return self._kept.maps[index]
        apply = build(index, piece, self._leaves(theta))
        if index < self._keeps():
            self._kept.maps[index] = apply
        return apply

    def _keeps(self) -> int:
        """How many graphs may be kept: those of the first pieces that fit ``max_memory`` together."""
        count = len(self._pieces)
        if count == 1 or self._memory is None:
            return 1 if count == 1 else 0
        step = self._pieces.micro_batch or self._pieces.largest
        return min(count, int(self.max_memory // max(1.0, self._memory.of(min(step, self._pieces.largest)))))

    def _hessian_map(self, index: int, piece: Piece, leaves: list[Tensor]) -> LinearMap:
        def loss_at(parts: Sequence[Tensor]) -> Tensor:
            return self._forward.loss(index, piece, parts)

        path = self._path.get("hvp", self.second_order)
        if path == "finite-difference":
            self._estimate_difference_error(loss_at, leaves)
            return products.hessian_difference(loss_at, leaves)
        checks.refuse_flash_attention(self.model)
        self.verify()
        if path == "calibrate":
            return self._calibrated(loss_at, leaves)
        return products.hessian_traced(loss_at, leaves) if path == "traced" else products.hessian_graph(loss_at, leaves)

    def verify(self) -> None:
        """Compare a Hessian product with a difference of gradients in double precision, or else with its mirror image.

        On a few rows, once; the products call it by themselves unless ``check=False``. It also measures :attr:`rounding`: the
        product in the objective's own precision against that in double precision, and how far products are from symmetric
        where the loss is so small that probabilities round to one.

        Raises:
            ObjectiveError: a second derivative is wrong, or does not exist (SecondDerivativeError).
        """
        if self._verified or not self.check or self.second_order == "finite-difference" or "hvp" in self._path:
            return
        checks.refuse_weight_norm(self.model)
        checks.refuse_flash_attention(self.model)
        few, leaves = self._few(self._pieces.first()), self._leaves(None)
        compared = False
        if self.n <= _LARGE and self.device.type != "mps":
            twin = self if self.dtype == torch.float64 else self.to_dtype(torch.float64)
            precise, exact = self._in_dtype(few, torch.float64), twin._leaves(None)
            compared = checks.refuse_wrong_derivative(twin._forward, precise, exact)
            if compared and twin is not self:
                self._product_error = checks.product_error(self._forward, few, leaves, twin._forward, precise, exact)
        if not compared:
            checks.refuse_asymmetry(self._forward, few, leaves)
        self._lost = checks.lost_near_zero(self._forward, few, leaves)
        if self._lost > _NOTABLE:
            self._note(
                f"the loss is so near zero that rounding is {self._lost:.1g} of a Hessian product, relative: probabilities "
                "next to one leave nothing of their distance to it"
            )
        self._verified = True

    def measured_like(self, other: Objective) -> Objective:
        """This objective, with products taken to be as exact as those of another way to write the same function."""
        self._product_error, self._lost = other._product_error, other._lost
        return self

    def _calibrated(self, loss_at: Callable[[Sequence[Tensor]], Tensor], leaves: list[Tensor]) -> LinearMap:
        """Time the kept graph against the traced map on one vector each, and keep the faster if they agree."""
        generator = torch.Generator().manual_seed(self.seed)
        vector = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in leaves]
        maps = {"graph": products.hessian_graph(loss_at, leaves)}
        try:
            maps["traced"] = products.hessian_traced(loss_at, leaves)
        except products.TracingError as error:
            self._path["hvp"] = "graph"
            self._note(f"products by the graph map: {error}")
            return maps["graph"]
        seconds, images = {}, {}
        for name, apply in maps.items():
            apply(vector)  # the first call allocates
            start = time.perf_counter()
            images[name] = self._flatten(apply(vector))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds[name] = time.perf_counter() - start
        gap = float((images["graph"] - images["traced"]).norm() / images["graph"].norm().clamp_min(1e-300))
        agree = gap <= 1e3 * torch.finfo(self.dtype).eps
        path = "traced" if agree and seconds["traced"] < seconds["graph"] else "graph"
        self._path["hvp"] = path
        ratio = seconds["traced"] / max(seconds["graph"], 1e-9)
        self._note(f"products by the {path} map, after a calibration: traced / kept graph = {ratio:.2f} in time")
        return maps[path]

    def _gauss_newton_map(self, index: int, piece: Piece, leaves: list[Tensor]) -> LinearMap:
        def output_at(parts: Sequence[Tensor]) -> Tensor:
            return self._forward.logits(index, piece, parts)

        def loss_of(output: Tensor) -> Tensor:
            with self._forward.evaluating(index):
                value = self._forward.loss_of(output, piece)
            self._finite(value, piece)
            return value

        difference = "finite-difference" in (self._path.get("ggnvp"), self.second_order)
        if not difference:
            self.verify()
        make = products.gauss_newton_difference if difference else products.gauss_newton
        return make(output_at, loss_of, leaves)

    def _fisher_map(self, index: int, piece: Piece, leaves: list[Tensor]) -> LinearMap:
        return products.fisher(lambda parts: self._forward.row_losses(index, piece, parts), leaves)

    def _fall_back(self, kind: str, reason: str) -> None:
        self._path[kind] = "finite-difference"
        self._kept = None
        missing = reason.split("; use an implementation")[0]
        what = "central differences of the gradient" if kind == "hvp" else "central differences of the output"
        self._note(f"products by {what}: {missing}")
        warnings.warn(f"{missing}: using {what}, which are less exact", stacklevel=4)

    def _estimate_difference_error(self, loss_at: Callable[[Sequence[Tensor]], Tensor], leaves: list[Tensor]) -> None:
        """The error of finite differences, seen when the step is halved."""
        if self._difference_error:
            return
        generator = torch.Generator().manual_seed(self.seed)
        # A single weight moves further than one of many in a random direction, and meets the kinks of a ReLU network.
        directions = [[torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in leaves]]
        for index in range(min(3, len(leaves))):
            unit = [torch.zeros_like(p) for p in leaves]
            unit[index].view(-1)[:1] = 1
            directions.append(unit)
        gap, largest = 0.0, 0.0
        for vector in directions:
            whole = self._flatten(products.hessian_difference(loss_at, leaves)(vector))
            half = self._flatten(products.hessian_difference(loss_at, leaves, 0.5)(vector))
            largest = max(largest, float(whole.norm()))
            gap = max(gap, float((whole - half).norm()) / max(float(whole.norm()), 1e-3 * largest, 1e-300))
        self._difference_error = max(gap, float(torch.finfo(self.dtype).eps))
        self._note(f"finite differences: halving the step changes a product by {gap:.1g}, relative")

    # ----- pieces ----------------------------------------------------------------------------------------------------

    def _shares(self) -> Iterator[tuple[int, Piece, float]]:
        for index, piece in enumerate(self._pieces):
            weight = self._weigh(piece.inputs, piece.targets)
            if weight:  # a piece whose targets are all masked has no mean
                yield index, piece if self._cast is None else self._in_dtype(piece, self._cast), weight / self._total

    _cast: torch.dtype | None = None

    @staticmethod
    def _in_dtype(piece: Piece, dtype: torch.dtype) -> Piece:
        return Piece(cast(piece.inputs, dtype), cast(piece.targets, dtype), piece.rows, piece.batch)

    def _summed(self, total: Tensor) -> Tensor:
        if self.process_group is not None:
            torch.distributed.all_reduce(total, group=self.process_group)
        return total

    def _few(self, piece: Piece) -> Piece:
        piece = piece if self._cast is None else self._in_dtype(piece, self._cast)
        return checks.fewest(self._forward, piece, self._values(None))

    def _finite(self, value: Tensor, piece: Piece) -> float:
        return finite(value, piece, self._names, [p.detach() for p in self._parameters])

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

    def _prepare(self, weight: str | Weighting, *, automatic: bool) -> None:
        """Cut the data to fit the memory, and find out what a piece counts."""
        self._weigh: Weighting = by_rows
        self.weighting, self.rows, self._total = "rows", self._pieces.rows, float(self._pieces.rows)
        splits = self.mode == "eval" or not _has_batch_statistics(self.model)
        if automatic and splits and self._pieces.largest > 1:
            self._memory = checks.graph_memory(self._forward, self._pieces.first(), self._leaves(None))
            if self._memory is not None and self._memory.of(self._pieces.largest) > self.max_memory:
                self._pieces.resize(self._memory.rows(self.max_memory))
                self._note(
                    f"batches are cut into pieces of {self._pieces.micro_batch} rows, whose graph fits "
                    f"max_memory={self.max_memory} bytes"
                )
        elif len(self._pieces) > 1:
            self._memory = checks.graph_memory(self._forward, self._pieces.first(), self._leaves(None))
        if callable(weight):
            self.weighting, self._weigh = "the given function", weight
        elif weight == "auto" and self.check:
            self.weighting, self._weigh = checks.weighting(
                self._forward, self._pieces, self._leaves(None), self.dtype, alone=self.process_group is None
            )
        if self.weighting != "rows":
            self._total = sum(self._weigh(piece.inputs, piece.targets) for piece in self._pieces)
            self._note(f"a batch counts by its number of {self.weighting}")
            if not self._total > 0:
                raise ObjectiveError(f"the data count nothing: the sum of {self.weighting} is {self._total:g}")
        if self.process_group is not None:
            self._agree_across_ranks()

    def _agree_across_ranks(self) -> None:
        told: list[Any] = [None] * torch.distributed.get_world_size(self.process_group)
        torch.distributed.all_gather_object(told, self.weighting, group=self.process_group)
        if len(set(told)) > 1:
            raise ObjectiveError(
                f"the ranks would count their data differently ({', '.join(map(str, told))}); say how with weight=..."
            )
        point = self.point().to(self._accumulate)
        mine = torch.stack([point.new_tensor(float(self.n)), point.sum(), point.square().sum()])
        highest, lowest = mine.clone(), mine.clone()
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self.process_group)
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=self.process_group)
        if not torch.equal(highest, lowest):
            raise ObjectiveError("the ranks hold different parameters; load the same weights on every rank first")
        counts = self._summed(torch.tensor([float(self.rows), self._total], dtype=torch.float64, device=self.device))
        self.rows, self._total = int(counts[0]), float(counts[1])

    def _check(self) -> None:
        before = _state(self.model)
        self.loss()
        few = self._few(self._pieces.first())
        with torch.no_grad():
            first, second = (float(self._forward.loss(0, few, self._values(None))) for _ in range(2))
        changed = [name for name, old, new in _differences(before, _state(self.model)) if not torch.equal(old, new)]
        if changed:
            raise ObjectiveError(
                f"evaluating the model changes its own {', '.join(changed)}; a forward pass must only read them"
            )
        tolerance = 100 * self.rounding * max(1.0, abs(first))
        if abs(first - second) > tolerance:
            source = (
                "in train mode a module draws random numbers from a generator of its own: use mode='eval', or draw from "
                "torch's global generator, which is replayed"
                if self.mode == "train"
                else "the model, the loss or the data (a transform applied on access) draws random numbers from a generator "
                "of its own, or keeps state between calls"
            )
            raise ObjectiveError(f"two evaluations at the same point differ ({first!r} and {second!r}): {source}")
        if self.mode == "train":
            self._notes += checks.refuse_batch_statistics(self.model, self._pieces)
        precision = self._forward.precision or self.dtype
        if torch.finfo(precision).eps > torch.finfo(self.dtype).eps:
            self._note(f"the model computes its loss in {precision}: everything carries the rounding of that")
        for name in checks.padding_rows(self.model):
            self._note(f"the padding row of {name} receives no gradient and is held constant")
        checks.plain_and_ours(self.model, self._forward, few, self._leaves(None))
        silent = checks.unused(self._forward, few, self._leaves(None))
        if silent:
            self._note(f"the loss does not depend on {', '.join(silent)}: their curvature is zero")
        if uses_attention(self._forward, few, self._values(None)):
            self._note("attention runs on PyTorch's math kernel, the one that has a second derivative")
        self.evaluations = Evaluations()

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    # ----- small parts -----------------------------------------------------------------------------------------------

    def _vector(self, theta: Tensor) -> Tensor:
        if theta.shape != (self.n,):
            raise ObjectiveError(f"expected a flat vector of shape ({self.n},), got {tuple(theta.shape)}")
        return theta.detach().to(device=self.device)

    def _refresh(self) -> None:
        """The model's present parameter objects: loading with ``assign=True`` or replacing a layer makes new ones."""
        named = dict(self.model.named_parameters())
        current = [named.get(name) for name in self._names]
        shapes = [None if p is None else p.shape for p in current]
        if shapes != self._shapes:
            raise ObjectiveError("the model's parameters are no longer those of this Objective; build it anew")
        self._parameters = [p for p in current if p is not None]

    def _values(self, theta: Tensor | None) -> list[Tensor]:
        self._refresh()
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
        dense = (t.to_dense() if t.is_sparse else t for t in tensors)  # embeddings may hand out sparse gradients
        return torch.cat([t.detach().reshape(-1).to(self.dtype) for t in dense])


_Builder = Callable[[int, Piece, list[Tensor]], LinearMap]


@dataclass
class _Kept:
    """Linear maps that are kept between calls, by piece, and what they were built from."""

    kind: str
    theta: Tensor | None
    value: Tensor | None
    state: dict[str, Tensor]
    maps: dict[int, LinearMap] = field(default_factory=dict)

    def valid_for(self, kind: str, theta: Tensor | None, model: nn.Module, index: int) -> bool:
        if kind != self.kind or theta is not self.theta:
            return False
        # Comparing values costs O(n); version counters would miss updates made through ``.data``. Once a call is enough.
        if index > 0:
            return True
        if theta is not None and self.value is not None and not torch.equal(theta, self.value):
            return False
        present = _state(model, clone=False)
        return present.keys() == self.state.keys() and all(
            torch.equal(old, new) for _, old, new in _differences(self.state, present)
        )


def _state(model: nn.Module, clone: bool = True) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone() if clone else t.detach() for name, t in tensors.items()}


def _differences(old: dict[str, Tensor], new: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, tensor in old.items():
        yield name, tensor, new[name]


def _select(model: nn.Module, keep: ParameterFilter | None) -> tuple[list[str], list[nn.Parameter]]:
    chosen = [(name, p) for name, p in model.named_parameters() if (keep(name, p) if keep else p.requires_grad)]
    if not chosen:
        raise ObjectiveError(
            "no parameter is selected: "
            + ("the filter returned False for all of them" if keep else "none requires a gradient; pass parameters=...")
        )
    wrong = [name for name, p in chosen if not p.is_floating_point()]
    if wrong:
        raise ObjectiveError(
            f"only real floating-point parameters can be differentiated, not {', '.join(wrong)}; complex ones can be kept as "
            "two real parameters (torch.view_as_complex)"
        )
    sharded = [name for name, p in chosen if type(p.data).__name__ == "DTensor"]
    if sharded:
        raise ObjectiveError(
            f"sharded parameters (FSDP) cannot be measured in place: {sharded[0]}; gather the full state dict into an "
            "unsharded copy of the model first"
        )
    return [name for name, _ in chosen], [p for _, p in chosen]


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The module within DistributedDataParallel, DataParallel and torch.compile, and what was taken off, in words.

    Raises:
        ObjectiveError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise ObjectiveError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner: nn.Module = model.module
        return unwrapped(inner)[0], f"measured without its {type(model).__name__} wrapper"
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return unwrapped(model._orig_mod)[0], "measured without torch.compile, which has no second derivative"  # type: ignore[arg-type]
    return model, ""


def _has_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _check_options(
    mode: str, micro_batch: int | None, max_memory: int, second_order: str, weight: str | Weighting
) -> None:
    if mode not in ("eval", "train"):
        raise ObjectiveError(f"mode must be 'eval' or 'train', got {mode!r}")
    if micro_batch is not None and micro_batch < 1:
        raise ObjectiveError(f"micro_batch must be at least 1 row or None, got {micro_batch}")
    if max_memory < 1:
        raise ObjectiveError(f"max_memory must be a number of bytes, got {max_memory}")
    if second_order not in SECOND_ORDER:
        raise ObjectiveError(f"second_order must be one of {', '.join(SECOND_ORDER)}, got {second_order!r}")
    if not callable(weight) and weight not in ("auto", "rows"):
        raise ObjectiveError(f"weight must be 'auto', 'rows' or a function of (inputs, targets), got {weight!r}")
