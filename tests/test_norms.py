"""Spectral products against singular values, layer by layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Objective, audit, measure
from flatminima.measures.norms import spectral_product_of

pytestmark = pytest.mark.usefixtures("one_thread")


def top(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.detach().double().flatten(1))[0])


class Attends(nn.Module):
    def __init__(self, kdim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.norm = nn.LayerNorm(4)
        self.place = nn.Parameter(torch.randn(1, 3, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        other = F.pad(x, (0, self.attention.kdim - 4))
        h, _ = self.attention(x, other, other, need_weights=False)
        return self.head(self.norm(x + h).mean(1))


def test_linear_layers_convolutions_and_batch_norm() -> None:
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double().eval()
    )
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -4.0, 2.0]))
        net[1].running_var.copy_(torch.tensor([1.0, 16.0, 0.25]))
    f = Objective(net, F.cross_entropy, (torch.randn(6, 1, 4, 4).double(), torch.arange(6) % 4))
    found = spectral_product_of(f)
    gain = float((net[1].weight.detach().abs() / (net[1].running_var + net[1].eps).sqrt()).max())
    assert set(found.factors) == {"0.weight", "1", "4.weight"}
    assert found.value == pytest.approx(top(net[0].weight) * gain * top(net[4].weight), rel=1e-12)
    assert found.left_out == ()
    for scale in (0.3, 5.0):  # a layer as a whole, through batch norm
        with torch.no_grad():
            for p, power in ((net[1].weight, 1), (net[1].bias, 1), (net[4].weight, -1)):
                p *= scale**power
        assert spectral_product_of(f).value == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize("kdim", [4, 5])
def test_attention_counts_each_projection_and_names_what_it_leaves_out(kdim: int) -> None:
    torch.manual_seed(0)
    model = Attends(kdim).double()
    attention = model.attention
    if kdim == 4:  # as wide as the queries: one matrix for all three
        parts = attention.in_proj_weight.chunk(3)
    else:
        parts = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    f = Objective(model, F.cross_entropy, (torch.randint(0, 7, (5, 3)), torch.arange(5) % 3))
    plainly = top(model.embed.weight) * top(attention.out_proj.weight) * top(model.head.weight)
    for part in parts:
        plainly *= top(part)
    found = spectral_product_of(f)
    assert found.value == pytest.approx(plainly * float(model.norm.weight.detach().abs().max()), rel=1e-12)
    assert found.left_out == ("place",)
    assert measure(f, ["spectral_product"])["spectral_product"].note == "not counted: place"


def test_frozen_layers_count_too_because_a_rescaling_moves_scale_into_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3, elementwise_affine=False), nn.ReLU(), nn.Linear(3, 2)).double()
    f = Objective(net, F.cross_entropy, (torch.randn(6, 4).double(), torch.arange(6) % 2))
    found, expected = spectral_product_of(f), top(net[0].weight) * top(net[3].weight)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert spectral_product_of(f.restricted(["3.bias"])) == found
    net[0].requires_grad_(False)
    frozen = Objective(net, F.cross_entropy, (torch.randn(6, 4).double(), torch.arange(6) % 2))
    assert spectral_product_of(frozen) == found


def test_a_frozen_layer_leaves_spectral_measures_invariant_under_layer_rescaling() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net[2].weight.requires_grad_(False)
    report = audit(
        net, F.cross_entropy, (torch.randn(20, 5), torch.arange(20) % 3), kinds=["relu-layer-rescaling"],
        measures=["spectral_product", "normalised_margin"],
    )  # fmt: skip
    assert report.verdicts == {"spectral_product": "invariant", "normalised_margin": "invariant"}


def test_a_model_without_matrices_has_a_reason() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    f = Objective(Scale(), F.cross_entropy, (torch.randn(6, 2), torch.arange(6) % 2))
    found = measure(f, ["spectral_product", "normalised_margin"])
    assert all("no linear, convolutional" in m.note for m in found.values())


def test_sums_of_sizes() -> None:
    net = nn.Linear(2, 1).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -4.0]]))
        net.bias.fill_(-0.5)
    f = Objective(net, F.mse_loss, (torch.randn(3, 2).double(), torch.randn(3, 1).double()))
    found = measure(f, ["parameter_norm", "parameter_l1_norm"])
    assert found["parameter_l1_norm"].value == 7.5
    assert found["parameter_norm"].value == pytest.approx(25.25**0.5)
