"""Host half of kernels/place.py, keys.py and bounds.py: the passes of a plan. Notation: T tokens, E experts, R slots.

    K slots a token    the slots are sorted by token, so one stable pass by expert is the plan           2 launches
    any order          keys; passes by the tokens' digits -> token_slots; bounds -> token_offsets;
                       then a pass by expert over token_slots                                            8 launches at 1024 <= T < 2**20
    E >= 1024          the experts take several passes too, all but the last of which sort slots only, and bounds -> offsets

A digit has at most 10 bits, as many bins as a pass has.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

import cute_runtime
from dispatch.chunk_counts import DTYPE_NAME, MAX_SIZE, check_sizes, chunks
from dispatch.kernels import variants
from dispatch.kernels.sizes import MAX_BINS

Indices = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Digit(NamedTuple):
    """One pass's part of a key: ``(key >> shift) & mask``, one of ``bins``."""

    shift: int
    mask: int
    bins: int


def digits(size: int) -> list[Digit]:
    """The digits of keys in [0, size], lowest first, in as few passes as there can be and of equal length.

    Worked example: 128 -> one digit of 129 bins, the key itself; 50_000 -> two of 8 bits; 4_000_000 -> three of 8 bits.
    """
    if size < MAX_BINS:
        return [Digit(0, 2**31 - 1, size + 1)]
    most = MAX_BINS.bit_length() - 1
    passes = -(-size.bit_length() // most)
    bits = -(-size.bit_length() // passes)
    return [Digit(number * bits, 2**bits - 1, 2**bits) for number in range(passes)]


def supports(expert_index: torch.Tensor, num_tokens: int, num_experts: int) -> bool:
    """Whether the kernels plan this: slots on an sm_90 GPU, none of R, T and E above 2**30."""
    sizes_fit = max(expert_index.shape[0], num_tokens, num_experts) <= MAX_SIZE
    return sizes_fit and cute_runtime.is_supported_device(expert_index.device)


def launch(
    token_index: torch.Tensor, expert_index: torch.Tensor, num_tokens: int, num_experts: int, slots_per_token: int | None
) -> Indices:
    """The six tensors of a DispatchPlan, in its order, on the current stream; the arguments are those of :func:`dispatch.plan`, checked.

    Strided ids are copied first. With slots_per_token, token_index is not read.

    Raises:
        ValueError: a size or a device that the kernels cannot take.
    """
    slots, device = expert_index.shape[0], expert_index.device
    check_sizes(slots=slots, num_tokens=num_tokens, num_experts=num_experts)
    token_index, expert_index = token_index.contiguous(), expert_index.contiguous()
    cute_runtime.check_launch(alignment=4, expert_index=expert_index, token_index=token_index)
    if slots == 0:
        empty = [torch.empty(0, dtype=torch.int32, device=device) for _ in range(4)]
        offsets, token_offsets = (torch.zeros(size + 1, dtype=torch.int32, device=device) for size in (num_experts, num_tokens))
        return offsets, *empty[:3], token_offsets, empty[3]
    with torch.cuda.device(device):
        if slots_per_token is not None:
            return _plan_uniform(expert_index, num_tokens, num_experts, slots_per_token)
        return _plan_any(token_index, expert_index, num_tokens, num_experts)


def _plan_uniform(expert_index: torch.Tensor, num_tokens: int, num_experts: int, slots_per_token: int) -> Indices:
    *low_digits, last = digits(num_experts)
    key, order = expert_index, None
    if low_digits:
        key = _like(expert_index)
        _load_keys(expert_index.dtype, False)(None, expert_index, None, key, num_tokens, num_experts)
        order = _sorted_slots(key, None, num_experts, low_digits)
    row_to_slot, row_to_token, slot_to_row, token_slots = (_like(key) for _ in range(4))
    # Without a dtype, of an int32 tensor: half the host time.
    offsets, token_offsets = row_to_slot.new_empty(num_experts + 1), row_to_slot.new_empty(num_tokens + 1)
    rows = (offsets, row_to_slot, row_to_token, slot_to_row, token_offsets, token_slots)
    _place("uniform", key, order, last, num_experts, None, None, *rows, slots_per_token)
    if low_digits:
        _load_bounds()(key, row_to_slot, offsets)
    return offsets, row_to_token, row_to_slot, slot_to_row, token_offsets, token_slots


def _plan_any(token_index: torch.Tensor, expert_index: torch.Tensor, num_tokens: int, num_experts: int) -> Indices:
    if token_index.dtype != expert_index.dtype:
        token_index, expert_index = token_index.long(), expert_index.long()
    token_key, expert_key = _like(token_index), _like(expert_index)
    _load_keys(expert_index.dtype, True)(token_index, expert_index, token_key, expert_key, num_tokens, num_experts)
    token_slots = _sorted_slots(token_key, None, num_tokens, digits(num_tokens))
    token_offsets = token_key.new_empty(num_tokens + 1)
    _load_bounds()(token_key, token_slots, token_offsets)

    *low_digits, last = digits(num_experts)
    order = _sorted_slots(expert_key, token_slots, num_experts, low_digits)
    offsets = expert_key.new_empty(num_experts + 1)
    row_to_slot, row_to_token, slot_to_row = (_like(expert_key) for _ in range(3))
    rows = (offsets, row_to_slot, row_to_token, slot_to_row, None, None)
    _place("rows", expert_key, order, last, num_experts, token_key, None, *rows, 0)
    if low_digits:
        _load_bounds()(expert_key, row_to_slot, offsets)
    return offsets, row_to_token, row_to_slot, slot_to_row, token_offsets, token_slots


def _sorted_slots(key: torch.Tensor, order: torch.Tensor | None, size: int, passes: list[Digit]) -> torch.Tensor | None:
    """The slots of ``order`` (None: 0, 1, ...) sorted stably by the given digits of their keys, lowest first."""
    for digit in passes:
        order_out = _like(key)
        _place("order", key, order, digit, size, None, order_out, *[None] * 6, 0)
        order = order_out
    return order


def _place(
    output: str,
    key: torch.Tensor,
    order: torch.Tensor | None,
    digit: Digit,
    size: int,
    token_key: torch.Tensor | None,
    order_out: torch.Tensor | None,
    *rows_and_slots_per_token: torch.Tensor | int | None,
) -> None:
    """One stable pass: two launches."""
    *rows, slots_per_token = rows_and_slots_per_token
    length, counts = chunks(key, digit.bins)
    kernel = _load_place(key.dtype, order is not None, output)
    kernel(key, order, counts, token_key, order_out, *rows, length, size, digit.shift, digit.mask, slots_per_token)


def _like(slots: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(slots, dtype=torch.int32)


@functools.cache
def _load_place(index: torch.dtype, ordered: bool, output: str) -> Callable[..., None]:
    return cute_runtime.load(variants.place(index=DTYPE_NAME[index], ordered=ordered, output=output))


@functools.cache
def _load_keys(index: torch.dtype, paired: bool) -> Callable[..., None]:
    return cute_runtime.load(variants.keys(index=DTYPE_NAME[index], paired=paired))


@functools.cache
def _load_bounds() -> Callable[..., None]:
    return cute_runtime.load(variants.bounds())
