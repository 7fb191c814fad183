"""The experts' activations, their derivatives, and how gate and up share the up-projection's rows.

Notation: R rows, I intermediate size. A gated activation computes ``act(gate) * up`` from z of shape (R, 2I), an ungated one
``act(z)`` from z of shape (R, I). z's columns are laid out like w_up's rows: "interleaved" has gate in columns 0, 2, 4, ...
and up in columns 1, 3, 5, ...; "concatenated" has gate in the first I columns and up in the last I.

``swiglu_oai`` is the clamped SwiGLU of gpt-oss (its published model code, `GptOssExperts._apply_gate` in transformers)::

    a = g * sigmoid(1.702 * g) * (u + 1)        g = min(gate, 7)        u = min(max(up, -7), 7)

Beyond a clamp the derivative is 0; at the clamp itself it is not, as torch.clamp has it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from sonicmoe import names


class Activation(NamedTuple):
    """One activation; ``forward`` and ``derivative`` act elementwise on the gate (on z where there is no gate)."""

    gated: bool
    forward: Callable[[torch.Tensor], torch.Tensor]
    derivative: Callable[[torch.Tensor], torch.Tensor]
    up_forward: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What up becomes before it multiplies the gate's value; None leaves it as it is."""
    up_derivative: Callable[[torch.Tensor], torch.Tensor] | None = None


def _silu(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(z)


def _silu_derivative(z: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def _normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """erfc keeps the digits that 1 + erf loses for negative z."""
    return 0.5 * torch.special.erfc(-z * math.sqrt(0.5))


def _gelu(z: torch.Tensor) -> torch.Tensor:
    return z * _normal_cdf(z)


def _gelu_derivative(z: torch.Tensor) -> torch.Tensor:
    return _normal_cdf(z) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _relu(z: torch.Tensor) -> torch.Tensor:
    return z.clamp(min=0)


def _relu_derivative(z: torch.Tensor) -> torch.Tensor:
    return (z > 0).to(z.dtype)


_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0


def _oai_gate(gate: torch.Tensor) -> torch.Tensor:
    gate = gate.clamp(max=_OAI_LIMIT)
    return gate * torch.sigmoid(_OAI_ALPHA * gate)


def _oai_gate_derivative(gate: torch.Tensor) -> torch.Tensor:
    clamped = gate.clamp(max=_OAI_LIMIT)
    sigmoid = torch.sigmoid(_OAI_ALPHA * clamped)
    return (gate <= _OAI_LIMIT) * sigmoid * (1 + _OAI_ALPHA * clamped * (1 - sigmoid))


def _oai_up(up: torch.Tensor) -> torch.Tensor:
    return up.clamp(-_OAI_LIMIT, _OAI_LIMIT) + 1


def _oai_up_derivative(up: torch.Tensor) -> torch.Tensor:
    return (up.abs() <= _OAI_LIMIT).to(up.dtype)


def _relu_squared(z: torch.Tensor) -> torch.Tensor:
    return _relu(z).square()


def _relu_squared_derivative(z: torch.Tensor) -> torch.Tensor:
    return 2 * _relu(z)


_FUNCTIONS = {
    "swiglu": (_silu, _silu_derivative),
    "geglu": (_gelu, _gelu_derivative),
    "reglu": (_relu, _relu_derivative),
    "swiglu_oai": (_oai_gate, _oai_gate_derivative, _oai_up, _oai_up_derivative),
    "silu": (_silu, _silu_derivative),
    "gelu": (_gelu, _gelu_derivative),
    "relu": (_relu, _relu_derivative),
    "relu_squared": (_relu_squared, _relu_squared_derivative),
}

ACTIVATIONS = {name: Activation(gated, *_FUNCTIONS[name]) for name, gated in names.ACTIVATIONS.items()}
"""By name; gelu is the exact one, with the error function. The derivative of relu at 0 is 0, as torch has it."""


def is_gated(activation: str) -> bool:
    """Whether w_up has 2I rows an expert, not I."""
    return ACTIVATIONS[activation].gated


def split_gate_up(z: torch.Tensor, gate_up_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (gate (..., I), up (..., I)) of z (..., 2I).

    Worked example, I=2, z = [1, 2, 3, 4]: interleaved gives gate [1, 3] and up [2, 4], concatenated gate [1, 2] and up [3, 4].
    """
    if gate_up_layout == "interleaved":
        return z[..., 0::2], z[..., 1::2]
    return z.tensor_split(2, dim=-1)


def activate(z: torch.Tensor, activation: str, gate_up_layout: str) -> torch.Tensor:
    """The activation a (R, I) of z (R, 2I), or (R, I) without a gate, in z's dtype."""
    chosen = ACTIVATIONS[activation]
    if not chosen.gated:
        return chosen.forward(z)
    gate, up = split_gate_up(z, gate_up_layout)
    return chosen.forward(gate) * (up if chosen.up_forward is None else chosen.up_forward(up))


def activation_gradient(z: torch.Tensor, da: torch.Tensor, activation: str, gate_up_layout: str) -> torch.Tensor:
    """The gradient with respect to z, in z's shape and layout, from the gradient da (R, I) of `activate`'s result."""
    chosen = ACTIVATIONS[activation]
    if not chosen.gated:
        return da * chosen.derivative(z)
    gate, up = split_gate_up(z, gate_up_layout)
    dz = torch.empty_like(z)
    dgate, dup = split_gate_up(dz, gate_up_layout)
    if chosen.up_forward is None:
        factor = up
        torch.mul(da, chosen.forward(gate), out=dup)
    else:
        factor = chosen.up_forward(up)
        torch.mul(da * chosen.up_derivative(up), chosen.forward(gate), out=dup)
    torch.mul(da * factor, chosen.derivative(gate), out=dgate)
    return dz
