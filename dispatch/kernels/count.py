"""How many slots each expert has, and the running total. N slots, E experts.

Two launches; key_of and the chunks are those of chunks.py:

    E < 1024 ("shared")    histogram_kernel    chunk c -> counts[c, e], in shared memory
                           _finish_kernel      one block: count[e] = sum over c, cumsum = its inclusive scan
    above ("global")       _add_kernel         count[e] += 1 in global memory, count zeroed before; lanes of a warp with the same
                                               expert (match) add once, so that one popular expert does not serialise the warp
                           _scan_kernel        a block for 2048 experts: the sum of all before, then the scan of its own

Only integers are added with atomics: the bits do not depend on the order. Bytes: 4 or 8 a slot, 8 an expert. The scan reads count
E / 4096 times on average, from L2: 2.4 MB at E = 50,000.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from dispatch.kernels.chunks import FULL_WARP, WARPS, block_scan, histogram_kernel, key_of, scan_bins, sum_chunks
from dispatch.kernels.sizes import ITEMS, MAX_BINS, THREADS, TILE

_ELEMENT = {"int32": cutlass.Int32, "int64": cutlass.Int64}


@cute.kernel
def _finish_kernel(counts: cute.Tensor, count: cute.Tensor, cumsum: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    allocator = cutlass.utils.SmemAllocator()
    groups_sums = cute.make_layout((2, 4 * THREADS), stride=(4 * THREADS, 1))
    scratch = allocator.allocate_tensor(cutlass.Int32, groups_sums, byte_alignment=16)
    first, before, total = (allocator.allocate_tensor(cutlass.Int32, cute.make_layout((MAX_BINS,)), byte_alignment=16) for _ in range(3))
    warp_sums = allocator.allocate_tensor(cutlass.Int32, cute.make_layout((WARPS,)), byte_alignment=16)
    cute.arch.griddepcontrol_wait()
    sum_chunks(counts, cutlass.Int32(0), scratch, before, total)
    scan_bins(total, first, counts.shape[1], warp_sums)
    for expert in cutlass.range(thread, count.shape[0], THREADS, unroll=1):
        count[expert] = total[expert]
        cumsum[expert] = first[expert] + total[expert]


@cute.kernel
def _add_kernel(index: cute.Tensor, count: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    cute.arch.griddepcontrol_launch_dependents()
    slots, size = index.shape[0], count.shape[0]
    key = cute.make_rmem_tensor((ITEMS,), cutlass.Int32)
    first = block * TILE + thread
    for j in cutlass.range_constexpr(ITEMS):
        key[j] = key_of(index, cutlass.min(first + j * THREADS, slots - 1), size)
    for j in cutlass.range_constexpr(ITEMS):
        routed = (first + j * THREADS < slots) & (key[j] < size)
        peers = cute.arch.match_sync(FULL_WARP, cutlass.select_(routed, key[j], cutlass.Int32(-1)))
        if routed & ((peers & cute.arch.lanemask_lt()) == 0):
            cute.arch.atomic_add(count.iterator + key[j], cutlass.Int32(cute.arch.popc(peers)), sem="relaxed", scope="gpu")


@cute.kernel
def _scan_kernel(count: cute.Tensor, cumsum: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp_sums = cutlass.utils.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout((WARPS,)), byte_alignment=16)
    cute.arch.griddepcontrol_wait()
    before = cutlass.Int32(0)
    for quad in cutlass.range(thread, block * (TILE // 4), THREADS, unroll=8):
        value = cute.make_rmem_tensor((4,), cutlass.Int32)
        cute.autovec_copy(cute.local_tile(count, (4,), (quad,)), value)
        for i in cutlass.range_constexpr(4):
            before += value[i]
    own = cute.make_rmem_tensor((ITEMS,), cutlass.Int32)
    own_sum = cutlass.Int32(0)
    expert = block * TILE + thread * ITEMS
    for j in cutlass.range_constexpr(ITEMS):
        own[j] = 0
        if expert + j < count.shape[0]:
            own[j] = count[expert + j]
        own_sum += own[j]
    _, running = block_scan(before, warp_sums)
    lower, _ = block_scan(own_sum, warp_sums)
    running += lower
    for j in cutlass.range_constexpr(ITEMS):
        running += own[j]
        if expert + j < count.shape[0]:
            cumsum[expert + j] = running


@cute.jit
def _count_shared(
    index: cute.Tensor, counts: cute.Tensor, count: cute.Tensor, cumsum: cute.Tensor, length: cutlass.Int32, stream: cuda.CUstream
):
    whole_key = cutlass.Int32(2**31 - 1)
    histogram_kernel(index, None, counts, length, count.shape[0], cutlass.Int32(0), whole_key).launch(
        grid=[counts.shape[0], 1, 1], block=[THREADS, 1, 1], stream=stream
    )
    _finish_kernel(counts, count, cumsum).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True)


@cute.jit
def _count_global(index: cute.Tensor, count: cute.Tensor, cumsum: cute.Tensor, stream: cuda.CUstream):
    block = [THREADS, 1, 1]
    _add_kernel(index, count).launch(grid=[cute.ceil_div(index.shape[0], TILE), 1, 1], block=block, stream=stream)
    _scan_kernel(count, cumsum).launch(grid=[cute.ceil_div(count.shape[0], TILE), 1, 1], block=block, stream=stream, use_pdl=True)


def trace(*, index: str, form: str) -> tuple:
    """What is compiled: for the form "shared" ``(index (N,), counts (C, S), count (E,), cumsum (E,), positions a chunk)``, with S >= E + 1
    a multiple of 4; for "global" ``(index (N,), count (E,), cumsum (E,))``. int32 but for index.

    Args:
        index: dtype of the ids, int32 or int64.
        form: "shared", for E + 1 <= MAX_BINS, or "global", which adds to what count holds.
    """
    element, E = _ELEMENT[index], cute.sym_int()
    ids = make_fake_compact_tensor(element, (cute.sym_int(),), assumed_align=element.width // 8)
    count, cumsum = (make_fake_compact_tensor(cutlass.Int32, (E,), assumed_align=16) for _ in range(2))
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if form == "global":
        return _count_global, (ids, count, cumsum, stream)
    shape = (cute.sym_int(), cute.sym_int(divisibility=4))
    counts = make_fake_compact_tensor(cutlass.Int32, shape, stride_order=(1, 0), assumed_align=16)
    return _count_shared, (ids, counts, count, cumsum, cutlass.Int32(1), stream)
