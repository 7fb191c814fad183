"""Host half of kernels/router_logits.py. Notation: T tokens, H hidden size, E experts."""

import functools
from collections.abc import Callable

import torch

import cute_runtime
from routing.hopper import DTYPE_NAME
from routing.kernels import variants
from routing.kernels.logits_tiles import Tile, choice

_HALF = (torch.bfloat16, torch.float16)


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """The rule by which :func:`routing.linalg.linear` chooses between the kernel and PyTorch.

    The kernel: x (T, H) and weight (E, H) both in bfloat16 or both in float16, contiguous and aligned to 16 bytes, on one sm_90 GPU, H a
    multiple of 8 and at least 8, E at least 1. Everything else is PyTorch's. Nothing is decided by an error: where the kernel is missing
    or fails, that is raised.
    """
    return (
        x.dtype in _HALF
        and weight.dtype == x.dtype
        and x.shape[1] % 8 == 0
        and x.shape[1] > 0
        and weight.shape[0] > 0
        and x.device == weight.device
        and cute_runtime.is_supported_device(x.device)
        and x.is_contiguous()
        and weight.is_contiguous()
        and not (x.data_ptr() | weight.data_ptr()) % 16
    )


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` (T, E) float32 of operands that :func:`supports` accepts, in one launch on the current stream, without autograd.

    float32 sums of exact products, in an order that T, H and E decide alone: the same bits every run.
    """
    (tokens, hidden), experts = x.shape, weight.shape[0]
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    if tokens:
        kernel, numbers = launch_of(x.dtype, tokens, hidden, experts)
        with cute_runtime.on_device(x.device):
            kernel(x, weight, logits, *numbers)
    return logits


@functools.lru_cache(maxsize=1024)
def launch_of(dtype: torch.dtype, tokens: int, hidden: int, experts: int) -> tuple[Callable[..., None], tuple[int, ...]]:
    """The kernel, launched as (x, weight, logits, *numbers), and its numbers; at least one token."""
    tile, parts = choice(tokens, hidden, experts)
    return _kernel(dtype, tile), (parts,)


@functools.cache
def _kernel(dtype: torch.dtype, tile: Tile) -> Callable[..., None]:
    return cute_runtime.load(variants.router_logits(dtype=DTYPE_NAME[dtype], tile=tile))
