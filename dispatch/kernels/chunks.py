"""What the counting kernels share: slots in chunks, a histogram of each chunk, and sums and scans over a block.

A *chunk* is a run of neighbouring positions that one block counts (here) and places (place.py). A position holds slot ``position``, or
``order[position]`` where an earlier pass has sorted the slots. A slot's *key* is its id where that lies in [0, size), else ``size``;
its *bin* is a digit of the key, ``(key >> shift) & mask``.

    histogram: chunk c -> counts[c, bin]      shared-memory atomics of 1: integers, so the order does not show

Bytes: 4 or 8 a slot, and 4 a bin and chunk.
"""

import cutlass
from cutlass import cute

from dispatch.kernels.sizes import ITEMS, MAX_BINS, THREADS, TILE

WARPS = THREADS // 32
FULL_WARP = 0xFFFFFFFF


@cute.jit
def key_of(index: cute.Tensor, slot: cutlass.Int32, size: cutlass.Int32):
    """The id of ``slot`` where it is in [0, size), else ``size``; an int64 id is compared as int64."""
    value = index[slot]
    inside = (value >= index.element_type(0)) & (value < index.element_type(size))
    return cutlass.select_(inside, cutlass.Int32(value), size)


@cute.jit
def slot_at(order: cute.Tensor | None, position: cutlass.Int32):
    """The slot at a position."""
    slot = position
    if cutlass.const_expr(order is not None):
        slot = order[position]
    return slot


@cute.jit
def rank_in_warp(bin: cutlass.Int32, present: cutlass.Boolean, row: cute.Tensor):
    """How many slots of the warp come before this lane's in the same bin: those of lower lanes, and what ``row`` (MAX_BINS,) counts.

    ``row`` is shared memory of the warp's own, zeros at first; the present slots are added to it. Every lane calls it.
    """
    peers = cute.arch.match_sync(FULL_WARP, cutlass.select_(present, bin, cutlass.Int32(-1)))
    below = peers & cute.arch.lanemask_lt()
    so_far = row[bin]
    cute.arch.sync_warp()
    if present & (below == 0):
        row[bin] = so_far + cutlass.Int32(cute.arch.popc(peers))
    cute.arch.sync_warp()
    return so_far + cutlass.Int32(cute.arch.popc(below))


@cute.jit
def block_scan(value: cutlass.Int32, warp_sums: cute.Tensor):
    """Sum of ``value`` over the threads before this one, and over all. Every thread calls it; ``warp_sums`` (WARPS,) is shared memory."""
    thread, _, _ = cute.arch.thread_idx()
    lane, warp = thread % 32, thread // 32
    inclusive = value
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(inclusive, 1 << step)
        inclusive += cutlass.select_(lane >= (1 << step), below, cutlass.Int32(0))
    cute.arch.sync_threads()  # the sums of an earlier scan have been read
    if lane == 31:
        warp_sums[warp] = inclusive
    cute.arch.sync_threads()
    before, total = inclusive - value, cutlass.Int32(0)
    for other in cutlass.range_constexpr(WARPS):
        warp_sum = warp_sums[other]
        before += cutlass.select_(other < warp, warp_sum, cutlass.Int32(0))
        total += warp_sum
    return before, total


@cute.jit
def sum_chunks(counts: cute.Tensor, chunk: cutlass.Int32, scratch: cute.Tensor, before: cute.Tensor, total: cute.Tensor):
    """Per bin, the sum of ``counts`` (C, S) over the chunks before ``chunk`` and over all of them, into shared memory (MAX_BINS,).

    S is a multiple of 4: a thread reads 16 bytes of a row at a time, and groups of threads take the rows in turns.
    ``scratch`` (2, 4 * THREADS) is shared memory for the groups' sums.
    """
    thread, _, _ = cute.arch.thread_idx()
    chunks, stride = counts.shape
    quads = stride // 4
    groups = THREADS // quads
    group = thread // quads
    quad = thread - group * quads
    if group < groups:
        sum_before, sum_total = (cute.make_rmem_tensor((4,), cutlass.Int32) for _ in range(2))
        sum_before.fill(0)
        sum_total.fill(0)
        for row in cutlass.range(group, chunks, groups, unroll=8):
            value = cute.make_rmem_tensor((4,), cutlass.Int32)
            cute.autovec_copy(cute.local_tile(counts, (1, 4), (row, quad))[0, None], value)
            for i in cutlass.range_constexpr(4):
                sum_total[i] += value[i]
                sum_before[i] += cutlass.select_(row < chunk, value[i], cutlass.Int32(0))
        for i in cutlass.range_constexpr(4):
            scratch[0, group * stride + quad * 4 + i] = sum_before[i]
            scratch[1, group * stride + quad * 4 + i] = sum_total[i]
    cute.arch.sync_threads()
    for bin in cutlass.range(thread, stride, THREADS, unroll=1):
        bin_before, bin_total = cutlass.Int32(0), cutlass.Int32(0)
        for other in cutlass.range(0, groups, 1, unroll=4):
            bin_before += scratch[0, other * stride + bin]
            bin_total += scratch[1, other * stride + bin]
        before[bin] = bin_before
        total[bin] = bin_total
    cute.arch.sync_threads()


@cute.jit
def scan_bins(total: cute.Tensor, first: cute.Tensor, stride: cutlass.Int32, warp_sums: cute.Tensor):
    """``first[bin]`` = sum of ``total`` over the bins before, for bins in [0, stride); both in shared memory."""
    thread, _, _ = cute.arch.thread_idx()
    low, high = cutlass.Int32(0), cutlass.Int32(0)
    if 2 * thread < stride:
        low = total[2 * thread]
        high = total[2 * thread + 1]
    lower, _ = block_scan(low + high, warp_sums)
    if 2 * thread < stride:
        first[2 * thread] = lower
        first[2 * thread + 1] = lower + low
    cute.arch.sync_threads()


@cute.kernel
def histogram_kernel(
    index: cute.Tensor,
    order: cute.Tensor | None,
    counts: cute.Tensor,
    length: cutlass.Int32,
    size: cutlass.Int32,
    shift: cutlass.Int32,
    mask: cutlass.Int32,
):
    """counts[chunk, bin] of the chunk of ``length`` positions that is this block's; index (R,), counts (C, S), S at least the bins."""
    thread, _, _ = cute.arch.thread_idx()
    chunk, _, _ = cute.arch.block_idx()
    cute.arch.griddepcontrol_launch_dependents()
    count = cutlass.utils.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout((MAX_BINS,)), byte_alignment=16)
    stride = counts.shape[1]
    for bin in cutlass.range(thread, stride, THREADS, unroll=1):
        count[bin] = 0
    cute.arch.sync_threads()
    begin = chunk * length
    end = cutlass.min(begin + length, index.shape[0])
    for tile in cutlass.range(begin, end, TILE, unroll=1):
        bins = cute.make_rmem_tensor((ITEMS,), cutlass.Int32)
        for j in cutlass.range_constexpr(ITEMS):
            # The last position again instead of a branch: the loads of all items are in flight together.
            position = cutlass.min(tile + j * THREADS + thread, end - 1)
            bins[j] = (key_of(index, slot_at(order, position), size) >> shift) & mask
        for j in cutlass.range_constexpr(ITEMS):
            if tile + j * THREADS + thread < end:
                cute.arch.atomic_add(count.iterator + bins[j], cutlass.Int32(1), sem="relaxed", scope="cta")
    cute.arch.sync_threads()
    for bin in cutlass.range(thread, stride, THREADS, unroll=1):
        counts[chunk, bin] = count[bin]
