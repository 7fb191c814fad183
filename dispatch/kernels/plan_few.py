"""The plan of few slots, K of each token, in one launch of one block: at most FEW_SLOTS slots, fewer than MAX_BINS experts.

The same stable counting sort as place.py's, with nothing between blocks and so nothing in global memory but ids and plan. A warp has
n * 32 neighbouring slots, n = ceil(R / 512), 32 at a time:

    keys      <- ids                           every load in flight at once, 4 or 8 bytes a slot
    rank[n]   <- lanes below in the same bin (match) + the warp's count of the bin so far (shared memory, one row a warp)
    ---- barrier
    a thread a bin: sums over the warps' rows before each;  a scan over the bins -> first[bin], which are the offsets
    ---- 5 barriers, of which 2 are the scan's
    row       <- first[bin] + row of the warp [bin] + rank
    slot_to_row at the slot; row_to_slot, row_to_token at the row, the tail's too

Every row is a sum of counts, so the bits are those of place.py. Bytes: 4 or 8 a slot read, 12 a slot written, straight to their
places: at most 48 KB. The floor is the time of a launch, one load, the barriers above and one store.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from dispatch.kernels.chunks import WARPS, key_of, rank_in_warp, scan_bins
from dispatch.kernels.place import write_by_row
from dispatch.kernels.sizes import FEW_ITEMS, MAX_BINS, THREADS, TICKETS

_ELEMENT = {"int32": cutlass.Int32, "int64": cutlass.Int64}


@cute.kernel
def _plan_few_kernel(
    index: cute.Tensor, offsets: cute.Tensor, tickets: cute.Tensor, rows: tuple, size: cutlass.Int32, slots_per_token: cutlass.Int32
):
    thread, _, _ = cute.arch.thread_idx()
    lane, warp = thread % 32, thread // 32
    allocator = cutlass.utils.SmemAllocator()

    def shared(*shape: int) -> cute.Tensor:
        layout = cute.make_ordered_layout(shape, order=tuple(reversed(range(len(shape)))))
        return allocator.allocate_tensor(cutlass.Int32, layout, byte_alignment=16)

    warp_rows, total, first, warp_sums = shared(WARPS, MAX_BINS), shared(MAX_BINS), shared(MAX_BINS), shared(WARPS)
    own_row = warp_rows[warp, None]
    key, rank = (cute.make_rmem_tensor((FEW_ITEMS,), cutlass.Int32) for _ in range(2))
    slots = index.shape[0]
    bins = (size + 2) // 2 * 2  # the sentinels' too; a scan takes two a thread
    turns = cute.ceil_div(slots, THREADS)
    begin = warp * (turns * 32) + lane
    *_, slot_to_row = rows

    for j in cutlass.range_constexpr(FEW_ITEMS):
        # The last slot again instead of a branch: the loads of all turns are in flight together.
        key[j] = key_of(index, cutlass.min(begin + 32 * j, slots - 1), size)
    for bin in cutlass.range(lane, bins, 32, unroll=1):
        own_row[bin] = 0
    cute.arch.sync_warp()
    for j in cutlass.range_constexpr(FEW_ITEMS):
        if j < turns:
            rank[j] = rank_in_warp(key[j], begin + 32 * j < slots, own_row)
    cute.arch.sync_threads()

    for bin in cutlass.range(thread, bins, THREADS, unroll=1):
        running = cutlass.Int32(0)
        for other in cutlass.range_constexpr(WARPS):
            count = warp_rows[other, bin]
            warp_rows[other, bin] = running
            running += count
        total[bin] = running
    cute.arch.sync_threads()
    scan_bins(total, first, bins, warp_sums)
    for bin in cutlass.range(thread, size + 1, THREADS, unroll=1):
        offsets[bin] = first[bin]
    if thread < TICKETS:
        tickets[thread] = 0

    for j in cutlass.range_constexpr(FEW_ITEMS):
        slot = begin + 32 * j
        if (j < turns) & (slot < slots):
            row = first[key[j]] + own_row[key[j]] + rank[j]
            routed = key[j] < size
            slot_to_row[slot] = cutlass.select_(routed, row, cutlass.Int32(-1))
            write_by_row(cutlass.select_(routed, slot, cutlass.Int32(-1)), row, None, rows, slots_per_token)


@cute.jit
def _plan_few(
    index: cute.Tensor,
    offsets: cute.Tensor,
    row_to_slot: cute.Tensor,
    row_to_token: cute.Tensor,
    slot_to_row: cute.Tensor,
    tickets: cute.Tensor,
    size: cutlass.Int32,
    slots_per_token: cutlass.Int32,
    stream: cuda.CUstream,
):
    rows = (row_to_slot, row_to_token, slot_to_row)
    _plan_few_kernel(index, offsets, tickets, rows, size, slots_per_token).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)


def trace(*, index: str) -> tuple:
    """What is compiled: ``(index (R,), offsets (size + 1,), row_to_slot (R,), row_to_token (R,), slot_to_row (R,), tickets (TICKETS,),
    size, K)``, 1 <= R = T K <= FEW_SLOTS, size < MAX_BINS; int32 but for index.

    Args:
        index: dtype of the ids, int32 or int64.
    """
    R = cute.sym_int()

    def vector(count: cute.SymInt | int, element: type[cutlass.Numeric] = cutlass.Int32) -> cute.Tensor:
        return make_fake_compact_tensor(element, (count,), assumed_align=element.width // 8)

    arguments = (
        vector(R, _ELEMENT[index]),
        vector(cute.sym_int()),
        *(vector(R) for _ in range(3)),
        vector(TICKETS),
        *(cutlass.Int32(1) for _ in range(2)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _plan_few, arguments
