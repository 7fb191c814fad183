"""What the layer and `routed_experts` accept. Every refusal is one sentence: argument, value, what is allowed.

Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R routed slots.
"""

import torch

from cute_runtime import BACKENDS
from dispatch.counting import ID_DTYPES
from dispatch.operators import check_backend
from routing import Routing
from sonicmoe.activations import ACTIVATIONS, is_gated
from sonicmoe.names import LAYOUTS

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCORE_DTYPES = (torch.float32, torch.float64)


def check_options(activation: str, gate_up_layout: str, backend: str) -> None:
    """Raises ValueError."""
    for name, value, allowed in (("activation", activation, ACTIVATIONS), ("gate_up_layout", gate_up_layout, LAYOUTS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    check_backend(backend)


def check_sizes(hidden_size: int, intermediate_size: int, num_experts: int, num_experts_per_tok: int) -> None:
    """Raises ValueError, or TypeError for what is no integer."""
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be an int")
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    for name in ("hidden_size", "intermediate_size"):
        if sizes[name] % 8:
            raise ValueError(f"{name}={sizes[name]}: must be a multiple of 8")
    if num_experts_per_tok > num_experts:
        raise ValueError(f"num_experts_per_tok={num_experts_per_tok}: must be at most num_experts={num_experts}")


def check_dtype(dtype: torch.dtype) -> None:
    """Raises TypeError."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype={dtype}: must be one of {', '.join(map(str, DTYPES))}")


def check_experts(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    routing: Routing,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    activation: str,
    gate_up_layout: str,
    backend: str,
) -> None:
    """The arguments of `routed_experts`. Raises ValueError or TypeError."""
    if not _is_sound(x, w_up, w_down, routing, b_up, b_down, activation, gate_up_layout, backend):
        _refuse(x, w_up, w_down, routing, b_up, b_down, activation, gate_up_layout, backend)


def check_main_grads(w_up: torch.Tensor, w_down: torch.Tensor, main_up: torch.Tensor | None, main_down: torch.Tensor | None) -> None:
    """The buffers that `routed_experts` adds the weights' gradients to. Raises ValueError or TypeError."""
    for name, weight, main in (("w_up", w_up, main_up), ("w_down", w_down, main_down)):
        if main is None:
            continue
        what = f"main_grads: {name}'s has"
        if weight.dtype == torch.float64:
            raise TypeError(f"main_grads: {name} has dtype {weight.dtype}: must be at most float32, as its buffer is")
        if main.dtype != torch.float32:
            raise TypeError(f"{what} dtype {main.dtype}: must be torch.float32")
        if main.shape != weight.shape:
            raise ValueError(f"{what} shape {tuple(main.shape)}: must be the weight's {tuple(weight.shape)}")
        if main.device != weight.device:
            raise ValueError(f"{what} device {main.device}: must be the weight's {weight.device}")
        if not main.is_contiguous() or main.requires_grad:
            raise ValueError(f"{what} strides {main.stride()}, requires_grad={main.requires_grad}: must be contiguous, without a gradient")


def _is_sound(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    routing: Routing,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    activation: str,
    gate_up_layout: str,
    backend: str,
) -> bool:
    """All conditions of _refuse in a few expressions, so that the usual case costs no more than reading its attributes.

    They follow from one another: what equals a checked shape, dtype or device needs no check of its own.
    """
    if activation not in ACTIVATIONS or gate_up_layout not in LAYOUTS or backend not in BACKENDS or not x.dim() == w_down.dim() - 1 == 2:
        return False
    dtype, device = x.dtype, x.device
    tokens, hidden_size = x.shape
    num_experts, _, intermediate_size = w_down.shape
    up_rows = intermediate_size * (2 if is_gated(activation) else 1)
    token_index, expert_index, score, num_tokens, experts_routed, k = routing
    slots = expert_index.shape
    return (
        dtype in DTYPES
        and hidden_size >= 8
        and hidden_size % 8 == 0
        and intermediate_size >= 8
        and intermediate_size % 8 == 0
        and num_experts >= 1
        and w_up.shape == (num_experts, up_rows, hidden_size)
        and w_down.shape == (num_experts, hidden_size, intermediate_size)
        and w_up.dtype == w_down.dtype == dtype
        and w_up.device == w_down.device == device
        and (b_up is None or (b_up.shape == (num_experts, up_rows) and b_up.dtype == dtype and b_up.device == device))
        and (b_down is None or (b_down.shape == (num_experts, hidden_size) and b_down.dtype == dtype and b_down.device == device))
        and num_tokens == tokens
        and experts_routed == num_experts
        and len(slots) == 1
        and score.shape == slots
        and expert_index.dtype in ID_DTYPES
        and (score.dtype in SCORE_DTYPES or score.dtype == dtype)
        and expert_index.device == score.device == device
        and (
            (k is not None and num_tokens * k == slots[0])
            if token_index is None
            else (token_index.shape == slots and token_index.dtype in ID_DTYPES and token_index.device == device)
        )
    )


def _refuse(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    routing: Routing,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    activation: str,
    gate_up_layout: str,
    backend: str,
) -> None:
    """Raises for the first condition that does not hold."""
    check_options(activation, gate_up_layout, backend)
    for name, tensor, shape in (("x", x, "(T, H)"), ("w_up", w_up, "(E, 2I, H)"), ("w_down", w_down, "(E, H, I)")):
        if tensor.dim() != len(shape.split(",")):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {shape}")
    tokens, hidden_size = x.shape
    num_experts, _, intermediate_size = w_down.shape
    check_sizes(hidden_size, intermediate_size, num_experts, 1)
    up_rows = intermediate_size * (2 if is_gated(activation) else 1)
    expected = {
        "w_up": (w_up, (num_experts, up_rows, hidden_size)),
        "w_down": (w_down, (num_experts, hidden_size, intermediate_size)),
        "b_up": (b_up, (num_experts, up_rows)),
        "b_down": (b_down, (num_experts, hidden_size)),
    }
    check_dtype(x.dtype)
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {shape} for x {tuple(x.shape)} and activation {activation}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}: must be x's {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on x's device {x.device}")
    _check_routing(routing, x, tokens, num_experts)


def _check_routing(routing: Routing, x: torch.Tensor, tokens: int, num_experts: int) -> None:
    for name, value, expected in (("num_tokens", routing.num_tokens, tokens), ("num_experts", routing.num_experts, num_experts)):
        if value != expected:
            raise ValueError(f"routing.{name}={value}: must be {expected}, as x and the weights have it")
    slots, k = routing.expert_index.shape, routing.slots_per_token
    for name in ("token_index", "expert_index", "score"):
        tensor = getattr(routing, name)
        if tensor is None and name == "token_index":
            if k is None:
                raise ValueError("routing.token_index is None: must be a tensor where routing.slots_per_token is None")
            continue
        if tensor.dim() != 1 or tensor.shape != slots:
            raise ValueError(f"routing.{name} has shape {tuple(tensor.shape)}: must be (R,) as expert_index {tuple(slots)}")
        if tensor.device != x.device:
            raise ValueError(f"routing.{name} is on {tensor.device}: must be on x's device {x.device}")
        allowed = ID_DTYPES if name != "score" else (*SCORE_DTYPES, x.dtype)
        if tensor.dtype not in allowed:
            raise TypeError(f"routing.{name} has dtype {tensor.dtype}: must be {' or '.join(map(str, dict.fromkeys(allowed)))}")
    if routing.token_index is None and tokens * k != slots[0]:
        raise ValueError(f"routing.slots_per_token={k}: must be the {slots[0]} slots of each of {tokens} tokens where token_index is None")
