"""Host side of what the counting kernels share (kernels/chunks.py): how many slots a block takes, and room for its counts."""

import functools

import torch

from dispatch.kernels.sizes import TILE

MAX_SIZE = 2**30
"""Most slots, tokens or experts that the kernels take: a block past the end must not overflow an int32."""

DTYPE_NAME = {torch.int32: "int32", torch.int64: "int64"}


def chunks(key: torch.Tensor, bins: int) -> tuple[int, torch.Tensor]:
    """Positions a chunk of ``key`` (R,), R >= 1, and an uninitialised (chunks, S) int32 beside it, S >= bins a multiple of 4."""
    length, shape = chunk_sizes(key.shape[0], bins, key.device)
    return length, key.new_empty(shape, dtype=torch.int32)


def chunk_sizes(slots: int, bins: int, device: torch.device) -> tuple[int, tuple[int, int]]:
    """Positions a chunk and the shape (chunks, S) of the counts.

    At most one chunk a multiprocessor: every block of the second launch reads all counts.
    """
    length = -(-slots // (multiprocessors(device) * TILE)) * TILE
    return length, (-(-slots // length), -(-bins // 4) * 4)


def check_sizes(most: int = MAX_SIZE, **sizes: int) -> None:
    """Refuse what the kernels do not take; sizes under the names that the messages use."""
    for name, size in sizes.items():
        if size > most:
            raise ValueError(f"{name}={size}: must be at most {most} for the kernel")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
