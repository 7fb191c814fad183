"""Which tokens each expert keeps and which it takes besides, from its rounded row count; one block of 1024 threads an expert.

    kept, added (ceil(T / 32), E) int32: bit t % 32 of word (t / 32, e): token t stays with expert e, or joins it

Data flow, thread i of expert e, whose keys (kernels/rounding_keys.py) are keys[e, 0 .. T):

    target <- counts[e] rounded as the mode says; "balanced" first sums the excesses of the experts before
    n of the candidates pass: the target's number of those that chose e, or target - count of those that did not
    3 times 11, 10, 10 bits from the top:          the n-th largest score of the candidates, by counting digits
        histogram[2048] <- candidates that agree so far    one atomic addition of an integer in shared memory each
        barrier; one warp finds the digit; barrier
    if more candidates have that very score than may pass: the same for the token numbers among them, lowest first
    for each 32 tokens: 32 lanes compare, two ballots -> kept, added

An expert reads its T keys four times, seven with such a tie; from L2 after the first. Additions of integers in any order give the
same bits.

Bytes: T*E*4 of keys and T*E/4 of bits. Floor: those bytes at device-copy bandwidth.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from routing.kernels import warp
from routing.kernels.warp import LANES

THREADS = 1024
_BINS = 2048
_BINS_PER_LANE = _BINS // LANES
_DIGITS = ((20, 11), (10, 10), (0, 10))
"""Lowest bit and width of each digit of a number below 2^31."""
_INT32_MAX = 2**31 - 1


@cute.jit
def _rises(
    counts: cute.Tensor,
    draws: cute.Tensor | None,
    sums: cute.Tensor,
    expert: Int32,
    excess: Int32,
    tile_m: Int32,
    num_tokens: Int32,
    thread: Int32,
    mode: cutlass.Constexpr,
) -> cutlass.Boolean:
    """Whether an expert with ``excess`` rows over whole tiles rounds up, were there tokens enough; see routing.rounding.rounded_counts."""
    result = excess > 0
    if cutlass.const_expr(mode == "down"):
        result = excess < 0
    if cutlass.const_expr(mode == "nearest"):
        result = Int64(excess) * 2 >= tile_m
    if cutlass.const_expr(mode == "stochastic"):
        result = draws[expert] * Float32(tile_m) < Float32(excess)
    if cutlass.const_expr(mode == "balanced"):
        if thread == 0:
            sums[0] = Int64(0)
        cute.arch.sync_threads()
        before = Int64(0)
        for other in cutlass.range(thread, expert, THREADS, unroll=1):
            below = counts[other] // tile_m * tile_m
            if Int64(below) + tile_m <= num_tokens:
                before += counts[other] - below
        if before > 0:
            cute.arch.atomic_add(sums.iterator, before)
        cute.arch.sync_threads()
        half, tile = Int64(tile_m), Int64(tile_m) * 2
        result = (2 * (sums[0] + excess) + half) // tile > (2 * sums[0] + half) // tile
    return result


@cute.jit
def _find_digit(histogram: cute.Tensor, found: cute.Tensor, n: Int32, lane: Int32):
    """One warp: the digit of the n-th largest, and what n becomes among those that share it -> found[0], found[1]."""
    # Lane l sums the bins [64 (31 - l), 64 (32 - l)), so that a running sum over lanes goes down from the largest digit.
    base = (LANES - 1 - lane) * _BINS_PER_LANE
    here = Int32(0)
    for i in cutlass.range(_BINS_PER_LANE, unroll=4):
        # Each lane starts elsewhere in its bins: neighbours read different banks.
        here += histogram[base + (i + lane) % _BINS_PER_LANE]
    through = here
    for step in cutlass.range_constexpr(5):
        below = warp.from_lane_below(through, 1 << step)
        through += cutlass.select_(lane >= (1 << step), below, Int32(0))
    if (through >= n) & (through - here < n):
        left = n - (through - here)
        digit = base + _BINS_PER_LANE - 1
        while histogram[digit] < left:
            left -= histogram[digit]
            digit -= 1
        found[0] = digit
        found[1] = left
        found[2] = histogram[digit]


@cute.jit
def _nth_largest(
    keys: cute.Tensor,
    histogram: cute.Tensor,
    found: cute.Tensor,
    n: Int32,
    candidate_sign: Int32,
    score: Int32,
    thread: Int32,
    by_token: cutlass.Constexpr,
) -> tuple[Int32, Int32, Int32]:
    """The n-th largest number of the candidates, how many of those that have it are within the n, and how many have it.

    A candidate's key has the sign; its number is the rest of the key or, ``by_token``, 2^31 - 1 - token if the rest equals ``score``.
    """
    num_tokens = keys.shape[0]
    prefix, left, equal = Int32(0), n, Int32(0)
    for step in cutlass.range_constexpr(len(_DIGITS)):
        shift, width = _DIGITS[step]
        for bin_index in cutlass.range(thread, _BINS, THREADS, unroll=1):
            histogram[bin_index] = Int32(0)
        cute.arch.sync_threads()
        for token in cutlass.range(thread, num_tokens, THREADS, unroll=4):
            key = keys[token]
            number = key & _INT32_MAX
            is_candidate = (key < 0) == (candidate_sign != 0)
            if cutlass.const_expr(by_token):
                is_candidate = is_candidate & (number == score)
                number = _INT32_MAX - token
            if cutlass.const_expr(step > 0):
                is_candidate = is_candidate & ((number >> (shift + width)) == prefix)
            if is_candidate:
                cute.arch.atomic_add(histogram.iterator + ((number >> shift) & ((1 << width) - 1)), Int32(1))
        cute.arch.sync_threads()
        if thread < LANES:
            _find_digit(histogram, found, left, thread)
        cute.arch.sync_threads()
        prefix = (prefix << width) | found[0]
        left, equal = found[1], found[2]
        cute.arch.sync_threads()
    return prefix, left, equal


@cute.kernel
def _rounding_select_kernel(
    keys: cute.Tensor,
    counts: cute.Tensor,
    draws: cute.Tensor | None,
    kept: cute.Tensor,
    added: cute.Tensor,
    tile_m: Int32,
    mode: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    expert, _, _ = cute.arch.block_idx()
    num_tokens = keys.shape[1]
    allocator = cutlass.utils.SmemAllocator()
    histogram = allocator.allocate_tensor(Int32, cute.make_layout((_BINS,)), byte_alignment=16)
    found = allocator.allocate_tensor(Int32, cute.make_layout((4,)), byte_alignment=16)
    sums = allocator.allocate_tensor(Int64, cute.make_layout((1,)), byte_alignment=8)
    row = warp.row_of(keys, expert)

    count = counts[expert]
    below = count // tile_m * tile_m
    excess = count - below
    can_rise = Int64(below) + tile_m <= num_tokens
    # An expert that cannot rise stays out of the sums of "balanced".
    rises = _rises(counts, draws, sums, expert, excess, tile_m, num_tokens, thread, mode) & can_rise
    target = below + cutlass.select_(rises, tile_m, Int32(0))
    drops = target < count
    wanted = cutlass.select_(drops, target, target - count)
    candidate_sign = cutlass.select_(drops, Int32(1), Int32(0))

    # A candidate passes with a score above the cut, or with the cut's and a token up to the last.
    cut, last = Int32(_INT32_MAX), Int32(-1)
    if wanted > 0:
        cut, left, equal = _nth_largest(row, histogram, found, wanted, candidate_sign, Int32(0), thread, False)
        last = Int32(_INT32_MAX)
        if left < equal:
            number, _, _ = _nth_largest(row, histogram, found, left, candidate_sign, cut, thread, True)
            last = _INT32_MAX - number

    for begin in cutlass.range(thread // LANES * LANES, num_tokens, THREADS, unroll=1):
        token = begin + thread % LANES
        key = row[cutlass.min(token, num_tokens - 1)]
        score = key & _INT32_MAX
        chosen = key < 0
        passes = (score > cut) | ((score == cut) & (token <= last))
        inside = token < num_tokens
        kept_word = warp.ballot(inside & chosen & (passes | (candidate_sign == 0)))
        added_word = warp.ballot(inside & (key >= 0) & passes & (candidate_sign == 0))
        if thread % LANES == 0:
            warp.row_of(kept, begin // LANES)[expert] = Int32(kept_word)
            warp.row_of(added, begin // LANES)[expert] = Int32(added_word)


@cute.jit
def _rounding_select(
    keys: cute.Tensor,
    counts: cute.Tensor,
    draws: cute.Tensor | None,
    kept: cute.Tensor,
    added: cute.Tensor,
    tile_m: Int32,
    mode: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    _rounding_select_kernel(keys, counts, draws, kept, added, tile_m, mode).launch(
        grid=[keys.shape[0], 1, 1], block=[THREADS, 1, 1], stream=stream
    )


def trace(*, mode: str) -> tuple:
    """What is compiled: ``(keys (E, T) int32, counts (E,) int32, draws (E,) float32 | None, kept (ceil(T / 32), E) int32, added
    likewise, tile_m)``, all dense; draws, uniform in [0, 1), for "stochastic" only.

    Args:
        mode: nearest, up, down, stochastic or balanced.
    """
    T, E, W = cute.sym_int(), cute.sym_int(), cute.sym_int()

    def matrix(rows: cute.SymInt, columns: cute.SymInt) -> cute.Tensor:
        return make_fake_compact_tensor(Int32, (rows, columns), stride_order=(1, 0), assumed_align=4)

    arguments = (
        matrix(E, T),
        make_fake_compact_tensor(Int32, (E,), assumed_align=4),
        make_fake_compact_tensor(Float32, (E,), assumed_align=4) if mode == "stochastic" else None,
        matrix(W, E),
        matrix(W, E),
        Int32(1),
        mode,
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _rounding_select, arguments
