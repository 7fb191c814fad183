"""What the host halves of the expert kernels, forward and backward, ask of their arguments."""

import torch

import cute_runtime
from dispatch.chunk_counts import multiprocessors

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

MOST_GATHERED = 2**34 - 1
"""Elements of a matrix whose rows are gathered: where a row begins is an int32 in units of 16 bytes."""


def as_stored(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(the contiguous tensor behind ``weight``, whether its last two dimensions are exchanged there).

    transformers keeps gpt-oss's weights as (E, H, 2I) and hands over their `mT`: no copy is made of either.

    Raises:
        ValueError: the weight lies in neither way.
    """
    if weight.is_contiguous():
        return weight, False
    transposed = weight.mT
    if transposed.is_contiguous():
        return transposed, True
    shape, strides = tuple(weight.shape), weight.stride()
    raise ValueError(f"{name}: shape {shape} with strides {strides}: must be contiguous, or be so with its last two dimensions exchanged")


def check_matrices(**tensors: torch.Tensor | None) -> None:
    """Refuse matrices that no kernel takes as they are: their dtype, the first one's, or what `cute_runtime.check_launch` refuses.

    Raises:
        TypeError, ValueError: in one sentence.
    """
    (first, dtype), *others = ((name, tensor.dtype) for name, tensor in tensors.items() if tensor is not None)
    if dtype not in DTYPES:
        raise TypeError(f"{first}: dtype {dtype}: the Hopper kernels take bfloat16 or float16")
    for name, other in others:
        if other != dtype:
            raise TypeError(f"{name}: dtype {other}: must be {first}'s dtype {dtype}")
    cute_runtime.check_launch(**tensors)


def check_gathered(**tensors: torch.Tensor) -> None:
    """Refuse a matrix with more elements than a gather reaches."""
    for name, tensor in tensors.items():
        if tensor.numel() > MOST_GATHERED:
            cute_runtime.check_launch(max_elements=MOST_GATHERED, **{name: tensor})


def blocks(device: torch.device) -> int:
    """One persistent block a multiprocessor, an even number so that clusters of two are whole."""
    return multiprocessors(device) // 2 * 2
