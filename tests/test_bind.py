"The bind network: numbers against a formula written out, and the legacy form."

import pytest
import torch
from torch.nn import functional as F

from ibllm.bind import BindNetwork


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(()))


def by_hand(state, feature, norm):
    v = feature @ state["project.weight"].T + state["project.bias"]
    for i in range(3):
        p = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items()}
        if norm == "rms":
            n = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm.weight"]
        else:
            n = F.layer_norm(v, v.shape[-1:], p["norm.weight"], p["norm.bias"], eps=1e-5)
        gate, up = linear(p, "gate", n), linear(p, "up", n)
        v = v + linear(p, "down", gate * torch.sigmoid(gate) * up)
    return v


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_equals_the_formula_with_random_weights(norm):
    torch.manual_seed(0)
    bind = BindNetwork(12, 20, norm=norm)
    for p in bind.parameters():
        torch.nn.init.normal_(p, std=0.3)
    feature = F.normalize(torch.randn(5, 12), dim=-1)
    expected = by_hand(bind.state_dict(), feature, norm)
    assert torch.allclose(bind(feature), expected, atol=1e-4, rtol=1e-5)


def test_legacy_form_has_biases_everywhere():
    parameters = BindNetwork(4, 4, norm="layer").named_parameters()
    biased = {name.rsplit(".", 2)[-2] for name, _ in parameters if name.endswith("bias")}
    assert biased == {"project", "norm", "gate", "up", "down"}


def test_published_form_has_one_bias():
    parameters = BindNetwork(4, 4).named_parameters()
    assert [name for name, _ in parameters if name.endswith("bias")] == ["project.bias"]


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (2, 5, 8)])
def test_keeps_leading_dimensions(shape):
    bind = BindNetwork(8, 6, num_blocks=2, expansion=3)
    assert bind(torch.randn(shape)).shape == (*shape[:-1], 6)


def test_bfloat16_stays_bfloat16():
    assert BindNetwork(8, 6).bfloat16()(torch.randn(1, 8).bfloat16()).dtype == torch.bfloat16


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="^feature: got width 7, wants 8$"):
        BindNetwork(8, 6)(torch.randn(1, 7))
    with pytest.raises(ValueError, match="^norm: got 'group'"):
        BindNetwork(8, 6, norm="group", num_blocks=0)
