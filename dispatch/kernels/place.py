"""One stable pass of a counting sort: every slot to the position that its bin and its predecessors give it.

Two launches; chunks, keys and bins are those of chunks.py. C chunks, one block each, at most one a multiprocessor.

    histogram_kernel   chunk c -> counts[c, bin]
    _place_kernel      starts while the first drains (programmatic dependent launch) and waits for its counts
        all blocks     counts (C, S), read whole: base[bin] = what the bins before hold + what the chunks before hold of this one
        each tile of 2048 positions, in order; a warp has 128 neighbouring ones, 32 at a time:
            rank <- lanes below in the same bin (match) + the warp's count of the bin so far (shared memory, one row a warp)
            a thread a bin: sums over the warps' rows before each; a scan over the bins: where each begins within the tile
            staged <- slot and destination, base[bin] + row[bin] + rank, in shared memory, sorted by bin
            a thread a staged slot: neighbours have neighbouring destinations, so that a bin's run is written by whole sectors

Every position is a sum of counts, so the result depends on nothing but the input. `output` says what is written:

    order      order_out[destination] = slot
    rows       the plan: row_to_slot, row_to_token, slot_to_row, and offsets where the pass sorts by whole keys
    uniform    rows, with token = slot // K

Bytes of `uniform` at R slots: 2 reads of the ids, 3 writes of 4 R, and C * C * S * 4 of counts from L2.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from dispatch.kernels.chunks import WARPS, histogram_kernel, key_of, rank_in_warp, scan_bins, slot_at, sum_chunks
from dispatch.kernels.sizes import ITEMS, MAX_BINS, THREADS, TICKETS, TILE

_ELEMENT = {"int32": cutlass.Int32, "int64": cutlass.Int64}


@cute.jit
def _load_tile(index, order, slot: cute.Tensor, key: cute.Tensor, first: cutlass.Int32, end: cutlass.Int32, size: cutlass.Int32):
    """The thread's slots and their keys; past the end the last position's again, so that no load waits for a branch."""
    for j in cutlass.range_constexpr(ITEMS):
        slot[j] = slot_at(order, cutlass.min(first + 32 * j, end - 1))
    for j in cutlass.range_constexpr(ITEMS):
        key[j] = key_of(index, slot[j], size)


@cute.jit
def _rank_tile(key: cute.Tensor, rank: cute.Tensor, row: cute.Tensor, first: cutlass.Int32, end: cutlass.Int32, shift, mask):
    """``rank[j]``: positions of the warp's part of the tile that come before the thread's j-th one in the same bin.

    ``row`` (MAX_BINS,) is the warp's own, zeros before and the warp's counts after.
    """
    for j in cutlass.range_constexpr(ITEMS):
        rank[j] = rank_in_warp((key[j] >> shift) & mask, first + 32 * j < end, row)


@cute.jit
def write_by_row(slot, destination, token_key, rows, slots_per_token):
    """What the plan says of a row; ``slot`` is -1 in the tail."""
    row_to_slot, row_to_token, _ = rows
    token = cutlass.Int32(-1)
    if slot >= 0:
        token = cutlass.Int32(cutlass.Uint32(slot) // cutlass.Uint32(slots_per_token))
        if cutlass.const_expr(token_key is not None):
            token = token_key[slot]
    row_to_slot[destination] = slot
    row_to_token[destination] = token


@cute.kernel
def _place_kernel(
    index: cute.Tensor,
    order: cute.Tensor | None,
    counts: cute.Tensor,
    token_key: cute.Tensor | None,
    order_out: cute.Tensor | None,
    offsets: cute.Tensor | None,
    tickets: cute.Tensor | None,
    rows: tuple,
    length: cutlass.Int32,
    size: cutlass.Int32,
    shift: cutlass.Int32,
    mask: cutlass.Int32,
    slots_per_token: cutlass.Int32,
):
    thread, _, _ = cute.arch.thread_idx()
    chunk, _, _ = cute.arch.block_idx()
    lane, warp = thread % 32, thread // 32
    allocator = cutlass.utils.SmemAllocator()

    def shared(*shape: int) -> cute.Tensor:
        layout = cute.make_ordered_layout(shape, order=tuple(reversed(range(len(shape)))))
        return allocator.allocate_tensor(cutlass.Int32, layout, byte_alignment=16)

    warp_rows = shared(WARPS, MAX_BINS)
    base, tile_first, tile_count = shared(MAX_BINS), shared(MAX_BINS), shared(MAX_BINS)
    staged_slot, staged_destination = shared(TILE), shared(TILE)
    warp_sums = shared(WARPS)
    stride = counts.shape[1]
    *_, slot_to_row = rows

    begin = chunk * length
    end = cutlass.min(begin + length, index.shape[0])
    first = begin + warp * (32 * ITEMS) + lane
    own_row = warp_rows[warp, None]
    slot, key, rank = (cute.make_rmem_tensor((ITEMS,), cutlass.Int32) for _ in range(3))
    _load_tile(index, order, slot, key, first, end, size)  # the histogram's inputs were complete before it started

    cute.arch.griddepcontrol_wait()
    # The groups' sums lie where the warps' rows will: the two are not in use at once.
    scratch = cute.make_tensor(warp_rows.iterator, cute.make_layout((2, 4 * THREADS), stride=(4 * THREADS, 1)))
    before, total = tile_first, tile_count  # likewise
    sum_chunks(counts, chunk, scratch, before, total)
    scan_bins(total, base, stride, warp_sums)
    if cutlass.const_expr(offsets is not None):
        if (chunk == 0) & (thread < TICKETS):
            tickets[thread] = 0
        # Whole keys: bin e is expert e, and the bin of the sentinels begins at the number of rows in use.
        if (chunk == 0) & (mask >= size):
            for bin in cutlass.range(thread, size + 1, THREADS, unroll=1):
                offsets[bin] = base[bin]
    cute.arch.sync_threads()
    for bin in cutlass.range(thread, stride, THREADS, unroll=1):
        base[bin] += before[bin]
        tile_count[bin] = 0

    for tile in cutlass.range(begin, end, TILE, unroll=1):
        for bin in cutlass.range(lane, stride, 32, unroll=1):
            own_row[bin] = 0
        cute.arch.sync_warp()
        _rank_tile(key, rank, own_row, first, end, shift, mask)
        cute.arch.sync_threads()
        for bin in cutlass.range(thread, stride, THREADS, unroll=1):
            base[bin] += tile_count[bin]  # of the tile before
            running = cutlass.Int32(0)
            for other in cutlass.range_constexpr(WARPS):
                count = warp_rows[other, bin]
                warp_rows[other, bin] = running
                running += count
            tile_count[bin] = running
        cute.arch.sync_threads()
        scan_bins(tile_count, tile_first, stride, warp_sums)
        for j in cutlass.range_constexpr(ITEMS):
            if first + 32 * j < end:
                bin = (key[j] >> shift) & mask
                within = own_row[bin] + rank[j]
                destination = base[bin] + within
                staged_destination[tile_first[bin] + within] = destination
                if cutlass.const_expr(order_out is not None):
                    staged_slot[tile_first[bin] + within] = slot[j]
                else:
                    routed = key[j] < size
                    staged_slot[tile_first[bin] + within] = cutlass.select_(routed, slot[j], cutlass.Int32(-1))
                    slot_to_row[slot[j]] = cutlass.select_(routed, destination, cutlass.Int32(-1))
        cute.arch.sync_threads()
        first += TILE
        _load_tile(index, order, slot, key, first, end, size)
        for j in cutlass.range_constexpr(ITEMS):
            item = j * THREADS + thread
            if item < end - tile:
                if cutlass.const_expr(order_out is not None):
                    order_out[staged_destination[item]] = staged_slot[item]
                else:
                    write_by_row(staged_slot[item], staged_destination[item], token_key, rows, slots_per_token)


@cute.jit
def _place(
    index: cute.Tensor,
    order: cute.Tensor | None,
    counts: cute.Tensor,
    token_key: cute.Tensor | None,
    order_out: cute.Tensor | None,
    offsets: cute.Tensor | None,
    row_to_slot: cute.Tensor | None,
    row_to_token: cute.Tensor | None,
    slot_to_row: cute.Tensor | None,
    tickets: cute.Tensor | None,
    length: cutlass.Int32,
    size: cutlass.Int32,
    shift: cutlass.Int32,
    mask: cutlass.Int32,
    slots_per_token: cutlass.Int32,
    stream: cuda.CUstream,
):
    grid, block = [counts.shape[0], 1, 1], [THREADS, 1, 1]
    histogram_kernel(index, order, counts, length, size, shift, mask).launch(grid=grid, block=block, stream=stream)
    rows = (row_to_slot, row_to_token, slot_to_row)
    _place_kernel(
        index, order, counts, token_key, order_out, offsets, tickets, rows, length, size, shift, mask, slots_per_token
    ).launch(grid=grid, block=block, stream=stream, use_pdl=True)  # fmt: skip


def trace(*, index: str, ordered: bool, output: str) -> tuple:
    """What is compiled: ``(index (R,), order (R,) | None, counts (C, S), token_key (R,) | None, order_out (R,) | None,
    offsets (size + 1,) | None, row_to_slot (R,) | None, row_to_token (R,) | None, slot_to_row (R,) | None, tickets (TICKETS,) | None,
    positions a chunk, size, shift, mask, K)``; int32 but for index.

    Args:
        index: dtype of the ids, int32 or int64.
        ordered: whether an earlier pass has sorted the slots: order, not positions, names them.
        output: "order", "rows" or "uniform", see above; "rows" reads token_key, and offsets is written where mask >= size.
    """
    R = cute.sym_int()

    def vector(present: bool, count: cute.SymInt | int, element: type[cutlass.Numeric] = cutlass.Int32) -> cute.Tensor | None:
        return make_fake_compact_tensor(element, (count,), assumed_align=element.width // 8) if present else None

    rows = output in ("rows", "uniform")
    arguments = (
        vector(True, R, _ELEMENT[index]),
        vector(ordered, R),
        make_fake_compact_tensor(cutlass.Int32, (cute.sym_int(), cute.sym_int(divisibility=4)), stride_order=(1, 0), assumed_align=16),
        vector(output == "rows", R),
        vector(output == "order", R),
        vector(rows, cute.sym_int()),
        *(vector(rows, R) for _ in range(3)),
        vector(rows, TICKETS),
        *(cutlass.Int32(1) for _ in range(5)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _place, arguments
