"""How many rows each expert gets. Notation: N routed slots, E experts."""

import torch

from dispatch import count_hopper
from dispatch.operators import check_backend, fake, operator

INT32_MAX = 2**31 - 1
ID_DTYPES = (torch.int32, torch.int64)
SIZE_TYPES = (int, torch.SymInt)


def count_cumsum(
    expert_index: torch.Tensor, num_experts: int, *, cumsum: bool = True, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Count the slots of each expert and, on request, their running total.

    Args:
        expert_index: (N,) int32 or int64, N from 0 up. Ids outside [0, E) are sentinels and are skipped; int64 ids are
            compared as int64, so 2**32 is a sentinel and not expert 0.
        num_experts: E >= 1.
        cumsum: whether to return the running total.
        backend: "hopper" is the kernels (an sm_90 GPU, E <= 2**20), "reference" is PyTorch anywhere, "auto" is the kernels where the device
            and the sizes allow them, else PyTorch. The bits are the same.

    Returns:
        count (E,) int32 and its inclusive cumulative sum (E,) int32, or None in its place. Nothing waits for the device.

    Raises:
        TypeError, ValueError: a wrong rank, dtype or size.

    Worked example, E=3, four slots, 7 is a sentinel::

        expert_index = [2, 0, 7, 2]
        count        = [1, 0, 2]
        cumsum       = [1, 1, 3]
    """
    check_ids("expert_index", expert_index)
    check_size("num_experts", num_experts, least=1)
    check_backend(backend)
    count, running = _count(expert_index, num_experts, backend)
    return count, running if cumsum else None


@operator("sonicmoe_dispatch::count_cumsum")
def _count(expert_index: torch.Tensor, num_experts: int, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "hopper" or (backend == "auto" and count_hopper.supports(expert_index, num_experts)):
        return count_hopper.launch(expert_index, num_experts)
    count = histogram(bucket(expert_index, num_experts), num_experts)
    return count, count.cumsum(0, dtype=torch.int32)


@fake(_count)
def _(expert_index: torch.Tensor, num_experts: int, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    return expert_index.new_empty(num_experts, dtype=torch.int32), expert_index.new_empty(num_experts, dtype=torch.int32)


def bucket(index: torch.Tensor, size: int) -> torch.Tensor:
    """(N,) int64: ``index`` where it is inside [0, size), else ``size``."""
    index = index.long()
    return torch.where((index >= 0) & (index < size), index, size)


def histogram(buckets: torch.Tensor, size: int) -> torch.Tensor:
    """(size,) int32: how often each of 0..size-1 occurs in ``buckets`` (N,) int64, whose values lie in [0, size].

    torch.bincount would do, but on CUDA it waits for the largest id. Additions of integers give the same bits in any order.
    """
    one = torch.ones(1, dtype=torch.int32, device=buckets.device)
    count = torch.zeros(size + 1, dtype=torch.int32, device=buckets.device)
    return count.scatter_add_(0, buckets, one.expand(buckets.shape[0]))[:size]


def check_ids(name: str, index: torch.Tensor) -> None:
    """Refuse anything but a 1-D int32 or int64 tensor that int32 positions can address."""
    if index.dtype not in ID_DTYPES:
        raise TypeError(f"{name}: dtype {index.dtype}: must be torch.int32 or torch.int64")
    if index.dim() != 1:
        raise ValueError(f"{name}: shape {tuple(index.shape)}: must have one dimension")
    if index.shape[0] > INT32_MAX:
        raise ValueError(f"{name}: length {index.shape[0]}: must be at most {INT32_MAX}, positions are int32")


def check_size(name: str, value: int, *, least: int) -> None:
    """Refuse a size below ``least`` or beyond what int32 indices can address, and what is no integer."""
    if not isinstance(value, SIZE_TYPES) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be an int")
    if value < least or value >= INT32_MAX:
        raise ValueError(f"{name}={value}: must be between {least} and {INT32_MAX - 1}")
