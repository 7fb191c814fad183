"""The expert operations on an sm_90 GPU: host half of kernels/up_projection.py and kernels/down_projection.py.

The forward runs in this project's kernels, without host synchronisation, on the current stream. The backward's four operations
are those of `sonicmoe.backends.reference`, in PyTorch, until their kernels exist: correct, slower, and they read the experts' row
offsets on the host, so that a training step cannot be captured in a CUDA graph yet.
Notation: T tokens, H hidden size, I intermediate size, E experts, R rows, Z = 2I for a gated activation, else I.
"""

import functools
from collections.abc import Callable

import torch

import cute_runtime
from dispatch import DispatchPlan
from sonicmoe.activations import is_gated
from sonicmoe.backends.reference import activation_backward, down_weight_grad, dx_rows, up_weight_grad
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import Tile, down_tile, up_tile

__all__ = ["DTYPES", "activation_backward", "down_projection", "down_weight_grad", "dx_rows", "up_projection", "up_weight_grad"]

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

_MOST_GATHERED = 2**34 - 1
"""Elements of x: where a row begins is an int32 in units of 16 bytes."""


def up_projection(
    x: torch.Tensor,
    w_up: torch.Tensor,
    b_up: torch.Tensor | None,
    plan: DispatchPlan,
    *,
    activation: str,
    gate_up_layout: str,
    store_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """a (R, I) and z (R, Z) as `sonicmoe.backends.reference.up_projection`; the tail behind ``plan.offsets[E]`` stays unwritten.

    Args:
        x: (T, H) bfloat16 or float16, H a multiple of 8, contiguous and aligned to 16 bytes like every tensor here.
        w_up: (E, Z, H), x's dtype.
        b_up: (E, Z) or None.

    Raises:
        TypeError, ValueError: a tensor that the kernel cannot take as it is, in one sentence, before any work.
    """
    gated = is_gated(activation)
    rows, width, experts = plan.row_to_token.shape[0], w_up.shape[1], w_up.shape[0]
    _check("x", x, w_up=w_up, b_up=b_up)
    cute_runtime.check_launch(max_elements=_MOST_GATHERED, x=x)
    cute_runtime.check_launch(alignment=4, x=x, offsets=plan.offsets, row_to_token=plan.row_to_token)
    a = x.new_empty(rows, width // 2 if gated else width)
    z = x.new_empty(rows, width) if store_z else None
    if rows == 0:
        return a, z
    kernel = _up_kernel(
        up_tile(rows=rows, experts=experts),
        x.dtype,
        activation,
        gated and gate_up_layout == "interleaved",
        store_z,
        b_up is not None,
    )
    with torch.cuda.device(x.device):
        kernel(x, w_up, b_up, plan.offsets, plan.row_to_token, a, z, _blocks(x.device))
    return a, z


def down_projection(a: torch.Tensor, w_down: torch.Tensor, b_down: torch.Tensor | None, plan: DispatchPlan) -> torch.Tensor:
    """y (R, H) as `sonicmoe.backends.reference.down_projection`; the tail behind ``plan.offsets[E]`` stays unwritten.

    Args:
        a: (R, I) bfloat16 or float16, I a multiple of 8, contiguous and aligned to 16 bytes like every tensor here.
        w_down: (E, H, I), a's dtype.
        b_down: (E, H) or None.

    Raises:
        TypeError, ValueError: a tensor that the kernel cannot take as it is, in one sentence, before any work.
    """
    rows, reduced = a.shape
    experts, hidden, _ = w_down.shape
    _check("a", a, w_down=w_down, b_down=b_down)
    cute_runtime.check_launch(alignment=4, a=a, offsets=plan.offsets)
    y = a.new_empty(rows, hidden)
    if rows == 0:
        return y
    kernel = _down_kernel(down_tile(rows=rows, experts=experts, reduced=reduced), a.dtype, b_down is not None)
    with torch.cuda.device(a.device):
        kernel(a, w_down, b_down, plan.offsets, y, _blocks(a.device))
    return y


def _check(name: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    if first.dtype not in DTYPES:
        raise TypeError(f"{name}: dtype {first.dtype}: the Hopper kernels take bfloat16 or float16")
    for other, tensor in others.items():
        if tensor is not None and tensor.dtype != first.dtype:
            raise TypeError(f"{other}: dtype {tensor.dtype}: must be {name}'s dtype {first.dtype}")
    cute_runtime.check_launch(**{name: first}, **others)


@functools.cache
def _blocks(device: torch.device) -> int:
    """One persistent block a multiprocessor, an even number so that clusters of two are whole."""
    return torch.cuda.get_device_properties(device).multi_processor_count // 2 * 2


@functools.cache
def _up_kernel(tile: Tile, dtype: torch.dtype, activation: str, interleaved: bool, store_z: bool, bias: bool) -> Callable[..., None]:
    return cute_runtime.load(
        variants.up_projection(tile=tile, dtype=DTYPES[dtype], activation=activation, interleaved=interleaved, store_z=store_z, bias=bias)
    )


@functools.cache
def _down_kernel(tile: Tile, dtype: torch.dtype, bias: bool) -> Callable[..., None]:
    return cute_runtime.load(variants.down_projection(tile=tile, dtype=DTYPES[dtype], bias=bias))
