"""What the host halves of the expert kernels, forward and backward, ask of their arguments."""

import functools

import torch

import cute_runtime
from dispatch import DispatchPlan
from dispatch.chunk_counts import MAX_SIZE, multiprocessors
from dispatch.kernels.sizes import TICKETS
from sonicmoe.kernels.tiles import FAST_MEMORY

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

MOST_GATHERED = 2**34 - 64
"""Elements of a matrix whose rows are gathered: where a row begins is an int32 in units of 16 bytes, and a lane adds up to seven."""


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


def check_reach(rows: int, **expert_elements: int) -> None:
    """Refuse sizes beyond the int32 of the kernels whose output has a row for each routed slot.

    A row's number, the rows of a tile added, is an int32. Weights are reached by coordinates and int64 strides, but for the step from
    gate to up in up_projection.py; the backward refuses what the forward does.

    Args:
        rows: R.
        **expert_elements: elements of one expert's part of a weight, under the weight's name.

    Raises:
        ValueError: in one sentence.
    """
    if rows > MAX_SIZE:
        raise ValueError(f"routing: {rows} slots: must be at most {MAX_SIZE} for the kernels")
    for name, elements in expert_elements.items():
        if elements > cute_runtime.INT32_ELEMENTS:
            raise ValueError(f"{name}: {elements} elements an expert: must be at most {cute_runtime.INT32_ELEMENTS}")


def check_gradient_reach(rows: int, name: str, experts: int, expert_rows: int) -> None:
    """Refuse sizes beyond the int32 of weight_grad.py: R, and the rows of all experts' gradients, which it stores as one matrix.

    Raises:
        ValueError: in one sentence.
    """
    check_reach(rows)
    if experts * expert_rows > MAX_SIZE:
        raise ValueError(f"{name}: {experts} experts of {expert_rows} rows: must be at most {MAX_SIZE} rows together for the kernel")


def blocks(device: torch.device) -> int:
    """One persistent block a multiprocessor, an even number so that clusters of two are whole."""
    return multiprocessors(device) // 2 * 2


@functools.cache
def fast_memory(device: torch.device) -> bool:
    """Whether a GPU's memory is so fast that `sonicmoe.kernels.tiles` chooses otherwise than on an H100."""
    properties = torch.cuda.get_device_properties(device)
    return 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8 >= FAST_MEMORY


def tickets(plan: DispatchPlan) -> torch.Tensor:
    """The plan's counters, or fresh ones of a plan that `dispatch.plan` did not make."""
    return plan.offsets.new_zeros(TICKETS) if plan.tickets is None else plan.tickets
