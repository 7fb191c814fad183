import math

import pytest
import torch
import torch.nn.functional as F

from sonicmoe import activations
from sonicmoe.activations import ACTIVATIONS, activate, activation_gradient, is_gated
from sonicmoe.names import LAYOUTS

EXPECTED = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "swiglu_oai": lambda z: z.clamp(max=7) * torch.sigmoid(1.702 * z.clamp(max=7)),
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu_squared": lambda z: F.relu(z).square(),
}
POINTS = torch.tensor([-40.0, -9.0, -2.5, -0.3, -1e-6, 0.0, 1e-6, 0.4, 3.0, 7.0, 9.0, 40.0], dtype=torch.float64)


def test_every_activation_is_covered():
    assert EXPECTED.keys() == ACTIVATIONS.keys()
    assert activations._FUNCTIONS.keys() == ACTIVATIONS.keys()
    assert {name for name in ACTIVATIONS if is_gated(name)} == {"swiglu", "geglu", "reglu", "swiglu_oai"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative_agree_with_torch_and_autograd(name):
    z = POINTS.clone().requires_grad_()
    expected = EXPECTED[name](z)
    (derivative,) = torch.autograd.grad(expected.sum(), z)
    chosen = ACTIVATIONS[name]
    torch.testing.assert_close(chosen.forward(POINTS), expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(chosen.derivative(POINTS), derivative, rtol=1e-12, atol=1e-14)


def test_gelu_keeps_its_digits_in_the_negative_tail():
    exact = -9 * 0.5 * math.erfc(9 / math.sqrt(2))
    assert ACTIVATIONS["gelu"].forward(torch.tensor([-9.0])).item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_decides_which_columns_are_gate(layout):
    gate, up = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    z = torch.stack([gate, up], dim=-1).flatten(-2) if layout == "interleaved" else torch.cat([gate, up], dim=-1)
    assert activate(z, "reglu", layout).tolist() == [[10.0, 0.0, 90.0]]
    da = torch.tensor([[1.0, 1.0, 2.0]])
    dgate, dup = torch.tensor([[10.0, 0.0, 60.0]]), torch.tensor([[1.0, 0.0, 6.0]])
    expected = torch.stack([dgate, dup], dim=-1).flatten(-2) if layout == "interleaved" else torch.cat([dgate, dup], dim=-1)
    assert torch.equal(activation_gradient(z, da, "reglu", layout), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swiglu_oai_is_gpt_oss_gate_with_its_gradient_inside_on_and_beyond_the_clamps(layout):
    """Every pair of a gate and an up below, at and above -7 and 7."""
    gate, up = (values.flatten().contiguous() for values in torch.meshgrid(POINTS, torch.cat([POINTS, -POINTS]), indexing="ij"))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    clamped = gate.clamp(max=7)
    expected = (up.clamp(-7, 7) + 1) * clamped * torch.sigmoid(clamped * 1.702)
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves)
    z = torch.stack(leaves, dim=-1).flatten() if layout == "interleaved" else torch.cat(leaves)
    z = z.detach()[None]
    a = activate(z, "swiglu_oai", layout)
    torch.testing.assert_close(a[0], expected.detach(), rtol=1e-12, atol=1e-14)
    dz = activation_gradient(z, 2 * a, "swiglu_oai", layout)[0]
    got = dz.unflatten(0, (-1, 2)).unbind(-1) if layout == "interleaved" else dz.chunk(2)
    torch.testing.assert_close(got, expected_gradients, rtol=1e-12, atol=1e-14)
