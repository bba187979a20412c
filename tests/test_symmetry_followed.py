"""What carries a scale is followed or reported: neither lost without a word nor taken for a theorem that nothing passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit_fixture import QUICK
from flatminima import audit, compare_minima, find_symmetries
from flatminima.audit.pair import _difference
from flatminima.symmetries import prove
from flatminima.symmetries.search import may_hide

pytestmark = pytest.mark.usefixtures("one_thread")
RELU, GATED, PRE_NORM = "relu-unit-rescaling", "gated-rescaling", "pre-norm-rescaling"


class Between(nn.Module):
    """A layer, an operation, and a head with a bend in it, so that only the operation is in question."""

    def __init__(self, function: Callable[[Tensor], Tensor], first: nn.Module | None = None, width: int = 6) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Linear(5, 6) if first is None else first
        self.head = nn.Sequential(nn.Linear(width, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.first(x)))


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def rows(count: int = 24) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(0, 11, (24, 7), generator=torch.Generator().manual_seed(1))


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "bag": (lambda: Between(F.relu, nn.EmbeddingBag(11, 6)), tokens, RELU),
    "sum of a bag": (lambda: Between(F.relu, nn.EmbeddingBag(11, 6, mode="sum")), tokens, RELU),
    "maximum of a bag": (lambda: Between(F.relu, nn.EmbeddingBag(11, 6, mode="max")), tokens, RELU),
    "sort": (lambda: Between(lambda h: h.relu().sort(-1).values), rows, RELU),
    "stable sort": (lambda: Between(lambda h: h.relu().sort(dim=0, stable=True).values), rows, RELU),
    "topk": (lambda: Between(lambda h: h.relu().topk(3, -1).values, width=3), rows, RELU),
    "kthvalue": (lambda: Between(lambda h: h.relu() + h.kthvalue(2, -1).values[:, None]), rows, RELU),
    "argmax": (lambda: Between(lambda h: h.relu().gather(1, h.argmax(1, keepdim=True)), width=1), rows, RELU),
    "cumsum": (lambda: Between(lambda h: h.relu().cumsum(-1)), rows, RELU),
    "fft": (lambda: Between(lambda h: torch.fft.fft(h.relu()).real), rows, RELU),
    "real fft": (lambda: Between(lambda h: torch.fft.irfft(torch.fft.rfft(h.relu()), n=6)), rows, RELU),
    "deviation": (lambda: Between(lambda h: h.relu() + h.std(-1, keepdim=True)), rows, RELU),
    "compared with each other": (lambda: Between(lambda h: h * (h > h.mean(-1, keepdim=True))), rows, GATED),
    "asked for NaN": (lambda: Between(lambda h: h.relu().masked_fill(h.isnan(), 0.0)), rows, RELU),
    "length 1": (lambda: Between(lambda h: F.normalize(h, dim=-1)), rows, PRE_NORM),
}

NOT_FOLLOWED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cumulative product": (lambda: Between(lambda h: h.relu().cumprod(-1)), "cumprod"),
    "divided by a length plus eps": (lambda: Between(lambda h: h / (h.norm(dim=-1, keepdim=True) + 1e-6)), "add"),
    "divided by a deviation plus eps": (lambda: Between(lambda h: h / (h.std(-1, keepdim=True) + 1e-6)), "add"),
    "divided by a guarded sum": (
        lambda: Between(lambda h: h.relu() / h.relu().sum(-1, keepdim=True).clamp(min=1e-9)),
        "clamp",
    ),
    "logarithm": (lambda: Between(lambda h: h.abs().log()), "log"),
    "two factors": (lambda: Between(lambda h: (h.view(-1, 2, 3) @ h.view(-1, 3, 2)).flatten(1), width=4), "matmul"),
    "bilinear": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Squared(), nn.GELU(), nn.Linear(4, 3)),
        "2.layer (Bilinear)",
    ),
}

NOTHING_PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda h: h.softmax(-1),
    "plus one": lambda h: h.relu() + 1.0,
    "relu6": F.relu6,
    "exponential": lambda h: 2.0**h,
    "above one": lambda h: h * (h > 0.1),
    "integers": lambda h: h.int().to(h.dtype),
    "rounded": torch.round,
    "masked": lambda h: h.masked_fill(h > 0, 0.5),
    "ReLU": F.relu,
    "square": torch.square,
}


class Squared(nn.Module):
    """One bilinear form of what comes in with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(6, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x, x)
        return found


def missed(rejected: tuple[tuple[str, str], ...]) -> list[str]:
    return [site for site, reason in rejected if may_hide(site, reason)]


@pytest.mark.parametrize("name", FOLLOWED)
def test_scales_are_followed_through(name: str) -> None:
    make, example, kind = FOLLOWED[name]
    model, x = built(make), example()
    search = find_symmetries(model, x)
    assert not missed(search.rejected), search.rejected
    (found,) = (s for s in search.found if s.kind == kind)
    assert found.exact
    member = found.member(torch.Generator().manual_seed(3))
    other = x.flip(0) if x.dtype == torch.int64 else 2 * x + 0.5
    assert prove(model, member, other).max_change < 1e-11
    moved = dict(member.apply(model).named_parameters())
    assert not torch.equal(moved["first.weight"], dict(model.named_parameters())["first.weight"])


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_operations_that_are_not_followed_are_named(name: str) -> None:
    make, site = NOT_FOLLOWED[name]
    search = find_symmetries(built(make), rows())
    assert site in missed(search.rejected), search.rejected


@pytest.mark.parametrize("name", NOTHING_PASSES)
def test_a_theorem_is_no_gap(name: str) -> None:
    search = find_symmetries(built(lambda: Between(NOTHING_PASSES[name])), rows())
    assert not missed(search.rejected), search.rejected


# ----- two minima -----------------------------------------------------------------------------------------------------


def nudged_pair(model: nn.Module, scaled: tuple[str, ...], readers: tuple[str, ...]) -> tuple[nn.Module, nn.Module]:
    """A network, and itself in other coordinates with one weight moved, so that the functions differ by a little."""
    twin = copy.deepcopy(model)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name in scaled:
            own[name] *= 5.0
        for name in readers:
            own[name] /= 5.0
        own["head.2.weight"][0, 0] += 1e-3
    return model, twin


@pytest.mark.filterwarnings("ignore:.*no second derivative")  # of a bag, in torch
@pytest.mark.parametrize(
    "name", ["bag", "sort", "topk", "cumsum", "fft", "length 1", "divided by a deviation plus eps"]
)
def test_a_rescaling_makes_neither_of_two_minima_flatter(name: str) -> None:
    make, x = (FOLLOWED[name][0], FOLLOWED[name][1]()) if name in FOLLOWED else (NOT_FOLLOWED[name][0], rows())
    model = built(make)
    layer = tuple(n for n, _ in model.named_parameters() if n.startswith("first"))
    readers = () if name.startswith(("length", "divided")) else ("head.0.weight",)
    first, second = nudged_pair(model, layer, readers)
    y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))
    found = compare_minima(first, second, F.cross_entropy, (x, y), measures=["lambda_max", "trace"], options=QUICK)
    assert found.function.relation == "different"
    assert any(d.resolved for d in found.differences)  # coordinates make them look unlike
    assert found.flatter is None, found.verdict


# ----- what used to be reported wrongly, or not at all -----------------------------------------------------------------


def test_a_bag_is_a_table_whose_columns_are_units() -> None:
    model = built(lambda: nn.Sequential(nn.EmbeddingBag(11, 6), nn.ReLU(), nn.Linear(6, 3)))
    found = {s.kind: s.sites for s in find_symmetries(model, tokens()).found}
    assert found[RELU] == found["unit-permutation"] == ("0 -> 2",)


def test_a_bag_of_weighted_rows_is_named_if_units_are_the_weights() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.weigh = nn.EmbeddingBag(11, 6, mode="sum"), nn.Parameter(torch.randn(24, 7))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.bag(x, per_sample_weights=self.weigh)
            return found

    search = find_symmetries(built(Weighted), tokens())
    assert {"bag.weight", "weigh"} <= set(missed(search.rejected))


@pytest.mark.parametrize(
    "cast",
    [
        lambda h: h.int(),
        lambda h: h.long(),
        lambda h: h.to(torch.int64),
        lambda h: torch.zeros_like(h, dtype=torch.int32).copy_(h),
    ],
)
def test_a_cast_to_integers_stops_a_scale(cast: Callable[[Tensor], Tensor]) -> None:
    """On the example every number is cut to 0, whatever its scale; elsewhere it is not."""
    model = built(lambda: Between(lambda h: h.relu() + cast(h * 0.001).to(h.dtype)))
    kinds = {s.kind for s in find_symmetries(model, rows()).found}
    assert not kinds & {RELU, "relu-layer-rescaling", "residual-stream"}


def test_units_that_choose_a_row_of_a_table_keep_their_scale() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table, self.head = nn.Linear(5, 6), nn.Embedding(500, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            found: Tensor = self.head(h) + self.table((0.001 * h).long()).sum(1)
            return found

    assert RELU not in {s.kind for s in find_symmetries(built(Choosing), rows()).found}


def test_zero_or_not_does_not_depend_on_a_scale() -> None:
    model = built(lambda: Between(lambda h: h.relu().bool().to(h.dtype) * h))
    assert GATED in {s.kind for s in find_symmetries(model, rows()).found}


def test_the_bits_of_a_number_are_no_view_of_it() -> None:
    model = built(lambda: Between(lambda h: h.relu() + (h.contiguous().view(torch.int64) & 1).to(h.dtype)))
    assert RELU not in {s.kind for s in find_symmetries(model, rows()).found}


@pytest.mark.parametrize("slopes", [1, 6])
def test_the_slope_of_prelu_is_read_and_no_gap(slopes: int) -> None:
    model = built(lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(slopes), nn.Linear(6, 3)))
    search = find_symmetries(model, rows())
    assert dict(search.rejected)["1.weight"] == "it is read by 1 (PReLU), and no kind of map changes it"
    assert not missed(search.rejected)


# ----- frozen parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [("2.bias",), ("2.weight",), ("0.weight",), ("2.bias", "2.weight"), ()])
def test_invariance_is_claimed_only_if_what_is_measured_maps_to_itself(frozen: tuple[str, ...]) -> None:
    """A sigmoid flip adds outgoing weights to the bias behind them: no map of one of them alone."""
    model = built(lambda: nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 3)))
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))
    names = ["w_hessian_w", "fisher_rao", "positive_eigenvalues", "minimum_margin"]
    report = audit(model, F.cross_entropy, (rows(), y), measures=names, options=QUICK, members=3)
    changes: dict[str, Any] = {c.measure: c for c in report.changes if c.symmetry == "sigmoid-flip"}
    split = ("2.bias" in frozen) != ("2.weight" in frozen)
    for name in names[:3]:
        assert changes[name].declared == ("unknown" if split else "invariant")
        assert changes[name].status in (("found to change", "survived", "undecided") if split else ("invariant",))
    if split:
        assert changes["w_hessian_w"].status == "found to change"
    assert changes["minimum_margin"].status == "invariant"  # of the outputs, whatever is frozen


# ----- probabilities ----------------------------------------------------------------------------------------------------


def squares(out: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(out, F.one_hot(y, 3).to(out.dtype))


@pytest.mark.parametrize(("loss", "hidden"), [(F.cross_entropy, True), (squares, False)])
def test_a_shift_of_all_logits_decides_nothing_where_the_loss_does_not_see_it(loss: Any, hidden: bool) -> None:
    first = built(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))
    second = copy.deepcopy(first)
    with torch.no_grad():
        own = dict(second.named_parameters())
        own["0.weight"][0, 0] += 1e-2  # a function that differs by a little
        own["2.weight"] += 3 * torch.randn(8, generator=torch.Generator().manual_seed(3))
        own["2.bias"] += 5
    names = ["adaptive_trace", "trace", "w_hessian_w"]
    found = compare_minima(first, second, loss, (rows(), y), measures=names, options=QUICK)
    bases = {d.measure: d.basis for d in found.differences}
    if hidden:
        assert bases == {"adaptive_trace": "coordinates", "trace": "coordinates", "w_hessian_w": "invariant"}
        assert "softmax-shift" not in found.audits[0].coordinates
        alone = compare_minima(first, second, loss, (rows(), y), measures=["adaptive_trace"], options=QUICK)
        assert alone.flatter is None
        assert "moves under softmax-shift" in alone.verdict
    else:
        assert "softmax-shift" not in found.audits[0].loss_preserving
        assert bases["w_hessian_w"] == "invariant"


def test_what_was_found_and_not_used_takes_the_word_invariant_away() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))
    report = audit(model, F.cross_entropy, (rows(), y), measures=["trace", "w_hessian_w"], options=QUICK)
    assert set(report.verdicts.values()) == {"invariant"}
    lost = replace(
        report, rejected=(*report.rejected, ("relu-unit-rescaling", "found, but member 0 changes the outputs"))
    )
    assert lost.unused == ("relu-unit-rescaling",)
    bases = {name: [_difference(name, a, report).basis for a in (report, lost)] for name in report.verdicts}
    assert bases == {"trace": ["invariant", "survived"], "w_hessian_w": ["invariant", "invariant"]}
