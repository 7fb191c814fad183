"""A bias's gradient: db[e] = sum over the rows of expert e of rows[row], or of score[slot of row] * tokens[token of row].

db_up (E, Z): the plain sum of dz (R, Z). db_down (E, H): the weighted sum of the tokens' dout (T, H), gathered.

Data flow, one block of 8 warps for (expert, 256 columns), a thread for 8 columns:

    warp w takes the rows w, w + 8, ... of the expert: 16 bytes a lane, four rows in flight, added in float32 in this order
    8 sums a column in shared memory, 8 KiB (one block barrier) --> warp w adds up columns 32 w .. 32 w + 31 --> db, rounded once

An expert without rows gets zeros. The grid has one direction: another would end at 65535 experts.
Bytes: every row once, 2 R W, and 2 E W; FLOPs R W.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.runtime import make_fake_stream

from sonicmoe.kernels.fake import DTYPES, row_major

WARPS = 8
COLUMNS = 256
"""Of one block: 8 a lane."""


@cute.kernel
def _bias_grad_kernel(
    rows: cute.Tensor,
    offsets: cute.Tensor,
    row_token: cute.Tensor | None,
    row_slot: cute.Tensor | None,
    score: cute.Tensor | None,
    out: cute.Tensor,
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    lane = thread % 32
    warp = thread // 32
    width = out.shape[1]
    tiles = cute.ceil_div(width, COLUMNS)
    expert = block // tiles
    tile = block - expert * tiles
    vector = tile * const_expr(COLUMNS // 8) + lane
    sums = cutlass.utils.SmemAllocator().allocate_tensor(Float32, cute.make_layout((COLUMNS, WARPS)), 16)
    total = cute.make_rmem_tensor((8,), Float32)
    total.fill(0.0)
    if vector * 8 < width:
        for row in cutlass.range(offsets[expert] + warp, offsets[expert + 1], WARPS, unroll=4):
            source = row
            weight = Float32(1.0)
            if const_expr(row_token is not None):
                source = row_token[row]
                weight = score[row_slot[row]]
            value = cute.make_rmem_tensor((8,), rows.element_type)
            cute.autovec_copy(cute.local_tile(rows, (1, 8), (source, vector))[0, None], value)
            total.store(total.load() + weight * value.load().to(Float32))
    for j in cutlass.range_constexpr(8):
        sums[lane * 8 + j, warp] = total[j]
    cute.arch.sync_threads()
    column = tile * COLUMNS + thread
    if column < width:
        result = Float32(0.0)
        for w in cutlass.range_constexpr(WARPS):
            result += sums[thread, w]
        out[expert, column] = result.to(out.element_type)


@cute.jit
def _bias_grad(
    rows: cute.Tensor,
    offsets: cute.Tensor,
    row_token: cute.Tensor | None,
    row_slot: cute.Tensor | None,
    score: cute.Tensor | None,
    out: cute.Tensor,
    stream: cuda.CUstream,
):
    _bias_grad_kernel(rows, offsets, row_token, row_slot, score, out).launch(
        grid=[cute.ceil_div(out.shape[1], COLUMNS) * out.shape[0], 1, 1], block=[WARPS * 32, 1, 1], stream=stream
    )


def trace(*, dtype: str, gathered: bool):
    """The kernel of one variant and the arguments to compile it with, for cute_runtime."""
    element = DTYPES[dtype]
    count, rows, experts, offsets = (cute.sym_int() for _ in range(4))
    width = cute.sym_int(divisibility=8)
    fake = (
        row_major(element, count, width),
        row_major(Int32, offsets),
        row_major(Int32, rows) if gathered else None,
        row_major(Int32, rows) if gathered else None,
        row_major(cutlass.Float32, rows) if gathered else None,
        row_major(element, experts, width),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _bias_grad, fake
