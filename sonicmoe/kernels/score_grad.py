"""Gradient of the scores: dscore[slot] = sum over tiles of partial[tile, row of slot], plus dout[token] . b_down[e] where there is a bias.

Data flow, one warp a slot (one thread a slot without a bias):

    slot -> row = slot_to_row[slot]          below 0: a sentinel, dscore = 0
    partial[0..tiles-1, row]                 activation_backward.py's row sums, added up in the order of the tiles
    row -> token, and expert by bisection of offsets; 8 columns a lane of dout[token] and b_down[e], then a butterfly over the warp

Every slot is written, each by one thread, in a fixed order of additions: the same bits every run. Bytes: 4 R (tiles + 2), and with a
bias 2 R H of dout's rows, read again.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.runtime import make_fake_stream

from sonicmoe.kernels.fake import DTYPES, row_major

THREADS = 256


@cute.kernel
def _score_grad_kernel(
    partial: cute.Tensor,
    slot_to_row: cute.Tensor,
    dout: cute.Tensor | None,
    b_down: cute.Tensor | None,
    offsets: cute.Tensor | None,
    row_token: cute.Tensor | None,
    dscore: cute.Tensor,
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    lanes = const_expr(1 if b_down is None else 32)
    slot = block * const_expr(THREADS // lanes) + thread // lanes
    if slot < dscore.shape[0]:
        row = slot_to_row[slot]
        total = Float32(0.0)
        if row >= 0:
            for tile in cutlass.range(partial.shape[0], unroll=4):
                total += partial[tile, row]
            if const_expr(b_down is not None):
                total += _bias_term(dout, b_down, offsets, row_token, row)
        if thread % lanes == 0:
            dscore[slot] = total


@cute.jit
def _bias_term(dout: cute.Tensor, b_down: cute.Tensor, offsets: cute.Tensor, row_token: cute.Tensor, row: Int32):
    """dout[token of row] . b_down[expert of row], by one warp."""
    low = Int32(0)
    high = offsets.shape[0] - 1
    while high - low > 1:  # offsets[low] <= row < offsets[high]
        middle = (low + high) // 2
        if offsets[middle] <= row:
            low = middle
        else:
            high = middle
    vectors = dout.shape[1] // 8
    total = Float32(0.0)
    for i in cutlass.range(cute.arch.lane_idx(), vectors, 32, unroll=1):
        left = cute.make_rmem_tensor((8,), dout.element_type)
        right = cute.make_rmem_tensor((8,), dout.element_type)
        cute.autovec_copy(cute.local_tile(dout, (1, 8), (row_token[row], i))[0, None], left)
        cute.autovec_copy(cute.local_tile(b_down, (1, 8), (low, i))[0, None], right)
        for j in cutlass.range_constexpr(8):
            total += left[j].to(Float32) * right[j].to(Float32)
    for shift in cutlass.range_constexpr(5):
        total += cute.arch.shuffle_sync_bfly(total, const_expr(1 << shift))
    return total


@cute.jit
def _score_grad(
    partial: cute.Tensor,
    slot_to_row: cute.Tensor,
    dout: cute.Tensor | None,
    b_down: cute.Tensor | None,
    offsets: cute.Tensor | None,
    row_token: cute.Tensor | None,
    dscore: cute.Tensor,
    stream: cuda.CUstream,
):
    slots = const_expr(THREADS if b_down is None else THREADS // 32)  # of one block
    _score_grad_kernel(partial, slot_to_row, dout, b_down, offsets, row_token, dscore).launch(
        grid=[cute.ceil_div(dscore.shape[0], slots), 1, 1], block=[THREADS, 1, 1], stream=stream
    )


def trace(*, dtype: str, bias: bool):
    """The kernel of one variant and the arguments to compile it with, for cute_runtime; dtype is dout's and b_down's."""
    element = DTYPES[dtype]
    tiles, rows, tokens, experts, offsets = (cute.sym_int() for _ in range(5))
    hidden = cute.sym_int(divisibility=8)
    fake = (
        row_major(cutlass.Float32, tiles, rows),
        row_major(Int32, rows),
        row_major(element, tokens, hidden) if bias else None,
        row_major(element, experts, hidden) if bias else None,
        row_major(Int32, offsets) if bias else None,
        row_major(Int32, rows) if bias else None,
        row_major(cutlass.Float32, rows),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _score_grad, fake
