"""Host half of kernels/plan_few.py, place.py, keys.py and bounds.py: the passes of a plan. Notation: T tokens, E experts, R slots.

    few slots, K each  one block sorts all of them by expert                                             1 launch at R <= 4096
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
from dispatch.chunk_counts import DTYPE_NAME, MAX_SIZE, check_sizes, chunk_sizes, chunks
from dispatch.kernels import variants
from dispatch.kernels.sizes import FEW_SLOTS, MAX_BINS, TICKETS
from dispatch.types import DispatchPlan, packed_size, unpack

ONE_BLOCK_SLOTS = FEW_SLOTS // 4
"""Up to here one block was faster than two launches: on an H100, in a CUDA graph, 2.9 against 4.6 microseconds for 8 slots, 3.4 against
5.4 for 512, but 13.6 against 7.3 for 4096 of 128 experts, where it waits for its own scattered stores."""


class Digit(NamedTuple):
    """One pass's part of a key: ``(key >> shift) & mask``, one of ``bins``."""

    shift: int
    mask: int
    bins: int


@functools.lru_cache(maxsize=256)
def digits(size: int) -> tuple[Digit, ...]:
    """The digits of keys in [0, size], lowest first, in as few passes as there can be and of equal length.

    Worked example: 128 -> one digit of 129 bins, the key itself; 50_000 -> two of 8 bits; 4_000_000 -> three of 8 bits.
    """
    if size < MAX_BINS:
        return (Digit(0, 2**31 - 1, size + 1),)
    most = MAX_BINS.bit_length() - 1
    passes = -(-size.bit_length() // most)
    bits = -(-size.bit_length() // passes)
    return tuple(Digit(number * bits, 2**bits - 1, 2**bits) for number in range(passes))


def supports(expert_index: torch.Tensor, num_tokens: int, num_experts: int) -> bool:
    """Whether the kernels plan this: slots on an sm_90 GPU, none of R, T and E above 2**30."""
    sizes_fit = max(expert_index.shape[0], num_tokens, num_experts) <= MAX_SIZE
    return sizes_fit and cute_runtime.is_supported_device(expert_index.device)


def launch(
    token_index: torch.Tensor | None, expert_index: torch.Tensor, num_tokens: int, num_experts: int, slots_per_token: int | None
) -> tuple[torch.Tensor, DispatchPlan]:
    """The plan and the tensor that it is made of, on the current stream; the arguments are those of :func:`dispatch.plan`, checked.

    Strided ids are copied first. With slots_per_token, token_index is not read.

    Raises:
        ValueError: a size or a device that the kernels cannot take.
    """
    slots = expert_index.shape[0]
    check_sizes(slots=slots, num_tokens=num_tokens, num_experts=num_experts)
    expert_index = expert_index.contiguous()
    token_index = token_index.contiguous() if slots_per_token is None else None
    cute_runtime.check_launch(alignment=4, expert_index=expert_index, token_index=token_index)
    with cute_runtime.on_device(expert_index.device):
        if slots and slots_per_token is not None and num_experts < MAX_BINS:
            return uniform_launch(num_tokens, num_experts, slots_per_token, expert_index.dtype, expert_index.device)(expert_index)
        packed = expert_index.new_empty(packed_size(slots, num_tokens, num_experts, slots_per_token), dtype=torch.int32)
        row_to_token = packed.new_empty(slots) if slots_per_token is not None else None
        plan = unpack(packed, slots, num_tokens, num_experts, slots_per_token, row_to_token)
        if slots == 0:
            packed.zero_()
        elif slots_per_token is not None:
            _plan_uniform(expert_index, plan)
        else:
            _plan_any(token_index, expert_index, plan)
    return packed, plan


class UniformLaunch(NamedTuple):
    """A plan of K slots a token and fewer than MAX_BINS experts, for fixed sizes: one pass, one launch or two."""

    kernel: Callable[..., None]
    size: int
    """Elements of the packed plan."""
    sizes: tuple[int, int, int, int]
    """Of the packed plan's parts, as types.unpack has them: R, R, E + 1, TICKETS."""
    num_tokens: int
    counts: tuple[int, int] | None
    """Shape of the chunks' counts; None where one block plans all slots."""
    numbers: tuple[int, ...]
    """The kernel's last arguments, of which K is the last."""
    narrow: bool
    """Whether the ids are int32."""

    def __call__(self, expert_index: torch.Tensor) -> tuple[torch.Tensor, DispatchPlan]:
        """``expert_index`` (R,) is checked, contiguous, and on the current device."""
        # Without a dtype, of an int32 tensor: half the host time.
        packed = expert_index.new_empty(self.size) if self.narrow else expert_index.new_empty(self.size, dtype=torch.int32)
        row_to_slot, slot_to_row, offsets, tickets = packed.split_with_sizes(self.sizes)
        row_to_token = packed.new_empty(self.sizes[0])  # not kept for backward, so not a part of the plan's memory
        rows = (offsets, row_to_slot, row_to_token, slot_to_row, tickets)
        if self.counts is None:
            self.kernel(expert_index, *rows, *self.numbers)
        else:
            self.kernel(expert_index, None, packed.new_empty(*self.counts), None, None, *rows, *self.numbers)
        sizes = self.num_tokens, self.sizes[2] - 1, self.numbers[-1]
        return packed, DispatchPlan(offsets, row_to_token, row_to_slot, slot_to_row, None, None, *sizes, tickets)


@functools.lru_cache(maxsize=1024)
def uniform_launch(num_tokens: int, num_experts: int, slots_per_token: int, index: torch.dtype, device: torch.device) -> UniformLaunch:
    """Loads the kernel; R >= 1.

    Up to ONE_BLOCK_SLOTS slots one block plans them: two launches would be two blocks one after the other at best, and each of these
    slots' loads and stores is in flight at once.
    """
    slots = num_tokens * slots_per_token
    sizes = (slots, slots, num_experts + 1, TICKETS)
    made, narrow = (sum(sizes), sizes, num_tokens), index == torch.int32
    if slots <= ONE_BLOCK_SLOTS:
        return UniformLaunch(_load_plan_few(index), *made, None, (num_experts, slots_per_token), narrow)
    (digit,) = digits(num_experts)
    length, counts = chunk_sizes(slots, digit.bins, device)
    numbers = (length, num_experts, digit.shift, digit.mask, slots_per_token)
    return UniformLaunch(_load_place(index, False, "uniform"), *made, counts, numbers, narrow)


def _plan_uniform(expert_index: torch.Tensor, plan: DispatchPlan) -> None:
    """The same for any number of experts: passes over sorted slots before the last one."""
    *low_digits, last = digits(plan.num_experts)
    key = _like(expert_index)
    _load_keys(expert_index.dtype, False)(None, expert_index, None, key, plan.num_tokens, plan.num_experts)
    order = _sorted_slots(key, None, plan.num_experts, low_digits)
    rows = (plan.offsets, plan.row_to_slot, plan.row_to_token, plan.slot_to_row, plan.tickets)
    _place("uniform", key, order, last, plan.num_experts, None, None, *rows, plan.slots_per_token)
    _load_bounds()(key, plan.row_to_slot, plan.offsets)


def _plan_any(token_index: torch.Tensor, expert_index: torch.Tensor, plan: DispatchPlan) -> None:
    if token_index.dtype != expert_index.dtype:
        token_index, expert_index = token_index.long(), expert_index.long()
    token_key, expert_key = _like(token_index), _like(expert_index)
    _load_keys(expert_index.dtype, True)(token_index, expert_index, token_key, expert_key, plan.num_tokens, plan.num_experts)
    _sort_slots(token_key, None, plan.num_tokens, digits(plan.num_tokens), plan.token_slots)
    _load_bounds()(token_key, plan.token_slots, plan.token_offsets)

    *low_digits, last = digits(plan.num_experts)
    order = plan.token_slots
    if low_digits:
        order = _sorted_slots(expert_key, order, plan.num_experts, low_digits)
    rows = (plan.offsets, plan.row_to_slot, plan.row_to_token, plan.slot_to_row, plan.tickets)
    _place("rows", expert_key, order, last, plan.num_experts, token_key, None, *rows, 0)
    if low_digits:
        _load_bounds()(expert_key, plan.row_to_slot, plan.offsets)


def _sorted_slots(key: torch.Tensor, order: torch.Tensor | None, size: int, passes: tuple[Digit, ...]) -> torch.Tensor:
    """The slots of ``order`` (None: 0, 1, ...) sorted stably by the given digits of their keys, lowest first."""
    order_out = _like(key)
    _sort_slots(key, order, size, passes, order_out)
    return order_out


def _sort_slots(key: torch.Tensor, order: torch.Tensor | None, size: int, passes: tuple[Digit, ...], out: torch.Tensor) -> None:
    """The same into ``out`` (R,)."""
    for digit in passes[:-1]:
        order_out = _like(key)
        _place("order", key, order, digit, size, None, order_out, *[None] * 5, 0)
        order = order_out
    _place("order", key, order, passes[-1], size, None, out, *[None] * 5, 0)


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
def _load_plan_few(index: torch.dtype) -> Callable[..., None]:
    return cute_runtime.load(variants.plan_few(index=DTYPE_NAME[index]))


@functools.cache
def _load_keys(index: torch.dtype, paired: bool) -> Callable[..., None]:
    return cute_runtime.load(variants.keys(index=DTYPE_NAME[index], paired=paired))


@functools.cache
def _load_bounds() -> Callable[..., None]:
    return cute_runtime.load(variants.bounds())
