"""Data of every form an objective takes: masks, dictionaries, streams, many processes; and data that are refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from flatminima import Objective
from flatminima.batches import Pieces, by_tokens
from flatminima.objective import ObjectiveError
from ranks_fixture import leave

V, T = 7, 5


class Tagger(nn.Module):
    """One output a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(V, 4), nn.Linear(4, V)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embedding(tokens)))
        return out


def token_loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def sequences(rows: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and targets masked after a random length."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, V, (2, rows, T), generator=g)
    lengths = torch.randint(1, T + 1, (rows, 1), generator=g)
    return x, y.masked_fill(torch.arange(T)[None] >= lengths, -100)


def same_function(f: Objective, g: Objective, tolerance: float = 1e-12) -> None:
    v = torch.randn(g.n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert abs(f.loss() - g.loss()) < tolerance * abs(g.loss())
    for found, expected in ((f.gradient(), g.gradient()), (f.hvp(v), g.hvp(v))):
        assert float((found - expected).norm()) < tolerance * float(expected.norm())


# ----- what a piece counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_masked_targets_count_by_tokens(micro_batch: int) -> None:
    x, y = sequences()
    model = Tagger().double()
    whole = Objective(model, token_loss, (x, y), micro_batch=None)
    cut = Objective(model, token_loss, (x, y), micro_batch=micro_batch)
    assert "targets other than -100" in cut.weighting
    assert any("counts by its number of targets" in note for note in cut.notes)
    same_function(cut, whole)


def test_a_sequence_without_any_target_counts_nothing() -> None:
    x, y = sequences()
    y[3] = -100
    same_function(
        Objective(Tagger().double(), token_loss, (x, y), micro_batch=1),
        Objective(Tagger().double(), token_loss, (x, y)),
    )


def test_a_loss_that_averages_each_sequence_counts_by_rows() -> None:
    def per_row(output: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(o, t) for o, t in zip(output, targets, strict=True)]).mean()

    x, y = sequences()
    cut = Objective(Tagger().double(), per_row, (x, y), micro_batch=2)
    assert cut.weighting == "rows"
    same_function(cut, Objective(Tagger().double(), per_row, (x, y)))


def test_another_padding_index_is_read_off_the_loss() -> None:
    x, y = sequences()
    y = y.masked_fill(y == -100, 0)
    loss = nn.CrossEntropyLoss(ignore_index=0)
    model = nn.Sequential(Tagger(), nn.Flatten(0, 1)).double()

    def flat(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets.flatten(), ignore_index=0)

    class Flat(nn.CrossEntropyLoss):
        def forward(self, output: Tensor, targets: Tensor) -> Tensor:
            return loss(output, targets.flatten())

    named = Objective(model, Flat(ignore_index=0), (x, y), micro_batch=2)
    same_function(named, Objective(model, flat, (x, y)))
    with pytest.raises(ObjectiveError, match=r"not the mean over its rows.*weight="):
        Objective(model, flat, (x, y), micro_batch=2)
    given = Objective(model, flat, (x, y), micro_batch=2, weight=by_tokens(0))
    same_function(given, Objective(model, flat, (x, y)))


def test_one_mask_per_row_too() -> None:
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, -100, 2, 3, -100, -100, 1, 2])
    same_function(Objective(model, F.cross_entropy, (x, y), micro_batch=3), Objective(model, F.cross_entropy, (x, y)))


def test_data_that_count_nothing_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="count nothing"):
        Objective(Tagger(), token_loss, sequences(), weight=lambda inputs, targets: 0.0, check=False)


# ----- models that compute their loss ---------------------------------------------------------------------------------


class Causal(Tagger):
    """As Hugging Face's causal models do it: the loss is inside, labels are shifted, masked ones ignored."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(input_ids)
        loss = None if labels is None else token_loss(logits[:, :-1], labels[:, 1:])
        return SimpleNamespace(loss=loss, logits=logits)


def test_a_model_with_its_own_loss_counts_shifted_tokens() -> None:
    x, y = sequences()
    model = Causal().double()
    batches = [{"input_ids": x[:4], "labels": y[:4]}, {"input_ids": x[4:], "labels": y[4:]}]
    whole = Objective(model, None, {"input_ids": x, "labels": y})
    for micro_batch in (None, 2):
        f = Objective(model, None, batches, micro_batch=micro_batch)
        assert "the first of each sequence left out" in f.weighting
        same_function(f, whole)
    expected = token_loss(Tagger.forward(model, x)[:, :-1], y[:, 1:])
    assert whole.loss() == pytest.approx(float(expected.detach()), rel=1e-12)


def test_a_model_without_a_loss_of_its_own_is_refused() -> None:
    x, y = sequences()
    with pytest.raises(ObjectiveError, match=r"has none; give the labels"):
        Objective(Causal(), None, {"input_ids": x})
    with pytest.raises(ObjectiveError, match="Tensor has none"):
        Objective(Tagger(), None, (x, y))
    f = Objective(Causal(), None, {"input_ids": x, "labels": y})
    with pytest.raises(ObjectiveError, match=r"give loss_fn\(output, target\)"):
        f.ggnvp(f.point())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_hugging_face_models_and_their_loss(kind: str) -> None:
    torch.manual_seed(0)
    small = {
        "vocab_size": V,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    model = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=2, n_head=2, n_positions=T)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**small, num_key_value_heads=1, max_position_embeddings=T)
        ),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**small, max_position_embeddings=T)),
    }[kind]()
    model = model.double()
    x, y = sequences(6)
    if kind != "bert":
        y[:, 1] = x[:, 1]  # a causal model needs a target after the first position
    batch = {"input_ids": x, "labels": y, "attention_mask": torch.ones_like(x)}
    whole = Objective(model, None, batch)
    assert any("math kernel" in note for note in whole.notes)
    inside = 1e-10 if kind == "bert" else 1e-5  # the causal ones compute their loss in float32
    assert any("float32" in note for note in whole.notes) == (whole.rounding > 1e-8) == (inside > 1e-6)
    same_function(Objective(model, None, batch, micro_batch=2), whole, inside)

    def outside(output: Any, targets: Tensor) -> Tensor:
        logits = output.logits.double()
        return token_loss(logits, targets) if kind == "bert" else token_loss(logits[:, :-1], targets[:, 1:])

    exact = Objective(model, outside, [({"input_ids": x}, y)])
    same_function(whole, exact, inside)
    v = torch.randn(exact.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "bert":
        exact.split(v)["bert.embeddings.word_embeddings.weight"][0] = 0  # the padding row
        assert any("padding row of bert.embeddings" in note for note in exact.notes)
    # Llama's RMSNorm works in float32 whatever it is given, which limits a difference of gradients.
    h, tolerance = (1e-4, 1e-3) if kind == "llama" else (1e-6, 1e-6)
    slope = (exact.gradient(exact.point() + h * v) - exact.gradient(exact.point() - h * v)) / (2 * h)
    assert float((exact.hvp(v) - slope).norm()) < tolerance * float(slope.norm())


# ----- streams --------------------------------------------------------------------------------------------------------


def rows(n: int = 10) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, dtype=torch.float64, generator=g), torch.randint(0, 2, (n,), generator=g)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_is_the_same_function_and_leaves_the_random_state(shuffle: bool) -> None:
    x, y = rows()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)
    model = nn.Linear(3, 2).double()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    f = Objective(model, F.cross_entropy, loader, keep_data=False, micro_batch=3)
    same_function(f, Objective(model, F.cross_entropy, (x, y)))
    assert torch.equal(torch.get_rng_state(), before)


class Drifting:
    """Batches that grow noisier at every pass, or fewer."""

    def __init__(self, fewer: bool) -> None:
        self.late, self.fewer = False, fewer

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = rows()
        yield x[:4], y[:4]
        if not (self.late and self.fewer):
            yield x[4:] + (1e-9 if self.late else 0.0), y[4:]


@pytest.mark.parametrize(
    ("fewer", "message"), [(False, "batch 1 is not what it was"), (True, "2 batches at first, 1 now")]
)
def test_data_that_change_between_passes_are_detected(fewer: bool, message: str) -> None:
    data = Drifting(fewer)
    f = Objective(nn.Linear(3, 2).double(), F.cross_entropy, data, keep_data=False)
    f.gradient()
    data.late = True
    with pytest.raises(ObjectiveError, match=message):
        f.gradient()


def test_data_changed_in_place_are_detected() -> None:
    x, y = rows()
    f = Objective(nn.Linear(3, 2).double(), F.cross_entropy, (x, y), micro_batch=4)
    f.hvp(f.point())
    x[0] = 0
    with pytest.raises(ObjectiveError, match="changed in place"):
        f.hvp(f.point())


def test_an_iterator_cannot_be_streamed() -> None:
    with pytest.raises(ObjectiveError, match="again and again"):
        Objective(nn.Linear(3, 2), F.cross_entropy, iter([rows()]), keep_data=False)


def test_pieces_know_their_number() -> None:
    pieces = Pieces([rows(10), rows(3)], 4)
    assert [(p.rows, p.batch) for p in pieces] == [(4, 0), (4, 0), (2, 0), (3, 1)]
    assert len(pieces) == 4
    assert pieces.split
    assert not Pieces([rows(3)], 4).split


# ----- losses and models that cannot be measured ----------------------------------------------------------------------


def test_an_output_without_derivative_is_named() -> None:
    x, y = rows()
    with pytest.raises(ObjectiveError, match=r"integer outputs \(argmax, round\)"):
        Objective(nn.Linear(3, 2).double(), lambda out, y: (out.argmax(1) != y).double().mean(), (x, y))


def test_parameters_that_the_loss_ignores_are_named() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    f = Objective(TwoHeads().double(), F.cross_entropy, rows())
    assert any("does not depend on idle.weight, idle.bias" in note for note in f.notes)
    image = f.split(f.hvp(f.point()))
    assert not image["idle.weight"].any()
    assert image["used.weight"].any()


def test_batch_statistics_are_refused_where_a_batch_is_cut_and_noted_where_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with pytest.raises(ObjectiveError, match=r"statistics of BatchNorm \(1\).*mode='eval'.*max_memory"):
        Objective(model, F.cross_entropy, rows(), mode="train", micro_batch=4)
    f = Objective(model, F.cross_entropy, rows(), mode="train", max_memory=1)
    assert any("BatchNorm in train mode" in note for note in f.notes)
    assert len(f._pieces) == 1


def test_complex_parameters_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    with pytest.raises(ObjectiveError, match=r"real floating-point.*w.*view_as_complex"):
        Objective(Complex(), F.cross_entropy, rows())


def test_wrappers_are_taken_off() -> None:
    model = nn.Linear(3, 2).double()
    f = Objective(nn.DataParallel(model), F.cross_entropy, rows())
    assert f.model is model
    assert any("DataParallel" in note for note in f.notes)
    compiled = torch.compile(model)
    assert Objective(compiled, F.cross_entropy, rows()).model is model  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"max_memory": 0}, {"second_order": "exact"}, {"weight": "tokens"}, {"mode": "test"}, {"micro_batch": 0}],
)
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ObjectiveError, match=f"{next(iter(options))} must be"):
        Objective(nn.Linear(3, 2), F.cross_entropy, rows(), **options)


# ----- many processes -------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _shard(rank: int, world: int, port: int, path: str, masked: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    group = torch.distributed.group.WORLD
    model, loss, data = _problem(masked)
    cut = slice(0, 4) if rank == 0 else slice(4, None)
    f = Objective(model, loss, (data[0][cut], data[1][cut]), process_group=group, micro_batch=2)
    v = torch.ones(f.n, 2, dtype=torch.float64)
    found = {"loss": torch.tensor(f.loss()), "gradient": f.gradient(), "hvp": f.hvp(v), "ggnvp": f.ggnvp(v)}
    refused = ""
    with torch.no_grad():
        next(model.parameters())[0, 0] += rank
    try:
        Objective(model, loss, (data[0][cut], data[1][cut]), process_group=group, check=False)
    except ObjectiveError as error:
        refused = str(error)
    torch.save({"found": found, "rows": f.rows, "refused": refused}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()
    leave()


def _problem(masked: bool) -> tuple[nn.Module, Any, tuple[Tensor, Tensor]]:
    if masked:
        return Tagger().double(), token_loss, sequences(9)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), F.cross_entropy, rows(9)


@pytest.mark.parametrize("masked", [False, True])
def test_two_processes_are_one(tmp_path: Any, masked: bool) -> None:
    torch.multiprocessing.start_processes(
        _shard, args=(2, _free_port(), str(tmp_path), masked), nprocs=2, start_method="spawn"
    )
    model, loss, data = _problem(masked)
    f = Objective(model, loss, data)
    v = torch.ones(f.n, 2, dtype=torch.float64)
    gauss_newton = None if masked else f.ggnvp(v)
    expected = {"loss": torch.tensor(f.loss()), "gradient": f.gradient(), "hvp": f.hvp(v), "ggnvp": gauss_newton}
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert saved["rows"] == 9
        assert "the ranks hold different parameters" in saved["refused"]
        for name, value in expected.items():
            if value is not None:
                assert float((saved["found"][name] - value).norm()) < 1e-10 * float(value.norm()), name


# ----- what a fresh pair of eyes found --------------------------------------------------------------------------------


def test_shifted_tokens_are_told_from_tokens_by_the_gradient() -> None:
    """At random weights the losses of two halves are nearly equal, whatever they are weighted by."""
    for seed in range(4):
        x, y = sequences(12, seed)
        model = Causal().double()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.02)
        batches = [{"input_ids": x[i : i + 4], "labels": y[i : i + 4]} for i in (0, 4, 8)]
        f = Objective(model, None, batches)
        assert "first of each sequence left out" in f.weighting
        same_function(f, Objective(model, None, {"input_ids": x, "labels": y}))


def test_a_penalty_that_reads_the_parameters_is_refused() -> None:
    model = nn.Linear(3, 2).double()

    def penalised(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + sum((p**2).sum() for p in model.parameters())

    with pytest.raises(ObjectiveError, match=r"the loss reaches weight on a way.*model\.parameters\(\)"):
        Objective(model, penalised, rows())


def test_a_weight_in_a_list_is_refused() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
            self.held = [self.a.weight]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x) @ self.held[0])
            return out

    with pytest.raises(ObjectiveError, match=r"the loss reaches a\.weight on a way"):
        Objective(Listed().double(), F.cross_entropy, rows())


def test_new_parameter_objects_are_seen() -> None:
    model = nn.Linear(3, 2).double()
    f = Objective(model, F.cross_entropy, rows())
    f.hvp(f.point())
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
    g = Objective(model, F.cross_entropy, rows())
    assert torch.equal(f.point(), g.point())
    same_function(f, g)
    model.weight = nn.Parameter(torch.zeros(5, 3).double())
    with pytest.raises(ObjectiveError, match="no longer those of this Objective"):
        f.loss()


def test_a_point_changed_through_its_data_is_seen() -> None:
    f = Objective(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), F.cross_entropy, rows())
    theta = f.point()
    v = torch.ones_like(theta)
    f.hvp(v, theta)
    theta.data.mul_(2)
    assert torch.allclose(f.hvp(v, theta), f.hvp(v, theta.clone()), rtol=1e-12)


def test_a_sum_is_refused_in_half_precision_too() -> None:
    x, y = rows(16)
    for dtype in (torch.bfloat16, torch.float32):
        data = [(x[:8].to(dtype), y[:8]), (x[8:].to(dtype), y[8:])]
        with pytest.raises(ObjectiveError, match="reduction='mean'"):
            Objective(nn.Linear(3, 2).to(dtype), nn.CrossEntropyLoss(reduction="sum"), data)


def test_class_weights_in_sorted_data_are_refused() -> None:
    x, _ = rows(16)
    y = torch.arange(16) // 8
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]).double())
    with pytest.raises(ObjectiveError, match="class weights"):
        Objective(nn.Linear(3, 2).double(), weighted, [(x[:8], y[:8]), (x[8:], y[8:])])


def test_a_graph_network_is_measured_whole() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.rand(40, 40).double())
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.adjacency @ x)
            return out

    f = Objective(Graph().double(), F.cross_entropy, rows(40))
    assert f.hvp(f.point()).isfinite().all()


def test_a_loader_that_reuses_its_buffer_is_refused() -> None:
    class Reusing:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            x, y = rows()
            buffer = torch.empty(5, 3, dtype=torch.float64)
            for start in (0, 5):
                buffer.copy_(x[start : start + 5])
                yield buffer, y[start : start + 5]

    with pytest.raises(ObjectiveError, match="reuse their buffers"):
        Objective(nn.Linear(3, 2).double(), F.cross_entropy, Reusing())


def test_modules_that_merge_in_eval_are_left_alone() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            with torch.no_grad():
                self.weight.add_(1.0 if not mode else -1.0)
            return super().train(mode)

    model = Merging(3, 2).double()
    before = model.weight.detach().clone()
    f = Objective(model, F.cross_entropy, rows())
    f.hvp(f.point())
    assert torch.equal(model.weight, before)
    assert model.training


def test_inference_mode_is_named() -> None:
    with torch.inference_mode(), pytest.raises(ObjectiveError, match="inference_mode"):
        Objective(nn.Linear(3, 2), F.cross_entropy, rows())


def test_fisher_products_of_other_losses_are_refused() -> None:
    x, y = rows()
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]).double())
    f = Objective(nn.Linear(3, 2).double(), weighted, (x, y))
    with pytest.raises(ObjectiveError, match="mean over its rows"):
        f.fishervp(f.point())


def test_the_rounding_of_a_confident_network_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(20, 3)
    with torch.no_grad():
        y = model(x).argmax(1)
        model[2].weight.mul_(60)
        model[2].bias.mul_(60)
    f = Objective(model, F.cross_entropy, (x, y))
    v = torch.ones(f.n)
    truth = f.to_dtype(torch.float64).hvp(v.double())
    gap = float((f.hvp(v).double() - truth).norm() / truth.norm())
    assert gap < 100 * f.rounding


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing_is_refused(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(lambda z: torch.tanh(self.a(z)), x.requires_grad_(), use_reentrant=reentrant)
            out: Tensor = self.b(hidden)
            return out

    def measured() -> Tensor:
        f = Objective(Checkpointed().double(), F.cross_entropy, rows())
        return f.hvp(f.point())

    with pytest.raises(ObjectiveError, match="checkpointing"):
        measured()
