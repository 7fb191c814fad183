"""Host half of kernels/count.py. Notation: N slots, E experts."""

import functools
from collections.abc import Callable

import torch

import cute_runtime
from dispatch.chunk_counts import DTYPE_NAME, MAX_SIZE, check_sizes, chunks
from dispatch.kernels import variants
from dispatch.kernels.sizes import MAX_BINS

MAX_EXPERTS = 2**20
"""Beyond, the scan's E * E / 4096 reads would take longer than PyTorch's."""


def supports(expert_index: torch.Tensor, num_experts: int) -> bool:
    """Whether the kernels count this: ids on an sm_90 GPU, N <= 2**30, E <= 2**20."""
    return expert_index.shape[0] <= MAX_SIZE and num_experts <= MAX_EXPERTS and cute_runtime.is_supported_device(expert_index.device)


def launch(expert_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """count (E,) and its inclusive cumsum (E,), int32, in two launches on the current stream.

    ``expert_index`` (N,) int32 or int64; a strided one is copied first.

    Raises:
        ValueError: a size or a device that the kernels cannot take.
    """
    expert_index = expert_index.contiguous()
    slots = expert_index.shape[0]
    check_sizes(slots=slots)
    check_sizes(MAX_EXPERTS, num_experts=num_experts)
    cute_runtime.check_launch(alignment=4, expert_index=expert_index)
    if slots == 0:
        return expert_index.new_zeros(num_experts, dtype=torch.int32), expert_index.new_zeros(num_experts, dtype=torch.int32)
    index = DTYPE_NAME[expert_index.dtype]
    cumsum = expert_index.new_empty(num_experts, dtype=torch.int32)
    with cute_runtime.on_device(expert_index.device):
        if num_experts < MAX_BINS:
            count = torch.empty_like(cumsum)
            length, counts = chunks(expert_index, num_experts + 1)
            _kernel(index, "shared")(expert_index, counts, count, cumsum, length)
        else:
            count = torch.zeros_like(cumsum)
            _kernel(index, "global")(expert_index, count, cumsum)
    return count, cumsum


@functools.cache
def _kernel(index: str, form: str) -> Callable[..., None]:
    return cute_runtime.load(variants.count(index=index, form=form))
