"""Every expert's score of every token, transposed and marked, for the choice of tokens by expert.

    keys (E, T) int32: the bits of score(t, e), a float32 >= 0, with the sign bit set where e is among the token's K

Data flow, one block of 8 warps for 32 tokens, each warp for 4 of them:

    softmax: largest logit and sum of exp of each token
    for each chunk of 128 experts:
        tile[expert][token] <- score's bits           shared memory, a column a lane, 33 words a row: no bank conflicts
        tile[expert][token] |= sign                   one lane a slot of the token
        barrier; keys[expert][32 tokens] <- tile row  128 contiguous bytes a warp; barrier

Bytes: T*E*4 of logits read, T*E*4 of keys written, 4*R of slots. Floor: those bytes at device-copy bandwidth.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from routing.kernels import scores, warp
from routing.kernels.warp import CHUNK, LANES, PER_LANE, WARPS

_TOKENS = LANES
_TOKENS_PER_WARP = _TOKENS // WARPS
_PITCH = _TOKENS + 1
_SIGN = -(2**31)


@cute.kernel
def _rounding_keys_kernel(logits: cute.Tensor, expert_index: cute.Tensor, keys: cute.Tensor, k: Int32, scoring: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    lane, warp_index = thread % LANES, thread // LANES
    num_tokens, num_experts = logits.shape
    tile = cutlass.utils.SmemAllocator().allocate_tensor(Int32, cute.make_layout((CHUNK * _PITCH,)), byte_alignment=16)

    first = block * _TOKENS + warp_index * _TOKENS_PER_WARP
    largest = cute.make_rmem_tensor((_TOKENS_PER_WARP,), Float32)
    exp_sum = cute.make_rmem_tensor((_TOKENS_PER_WARP,), Float32)
    for i in cutlass.range_constexpr(_TOKENS_PER_WARP):
        largest[i], exp_sum[i] = Float32(0.0), Float32(1.0)
        if cutlass.const_expr(scoring == "softmax"):
            # A token behind the end is the last one again; what it gives is not stored.
            largest[i], exp_sum[i] = warp.softmax_of(warp.row_of(logits, cutlass.min(first + i, num_tokens - 1)), lane)

    for chunk in cutlass.range(0, num_experts, CHUNK, unroll=1):
        for i in cutlass.range_constexpr(_TOKENS_PER_WARP):
            token = cutlass.min(first + i, num_tokens - 1)
            column = warp_index * _TOKENS_PER_WARP + i
            row = warp.row_of(logits, token)
            for j in cutlass.range_constexpr(PER_LANE):
                x = warp.logit(row, cutlass.min(chunk + j * LANES + lane, num_experts - 1))
                score = scores.probability(x, largest[i], exp_sum[i], scoring)
                tile[(j * LANES + lane) * _PITCH + column] = score.bitcast(Int32)
            cute.arch.sync_warp()
            chosen = warp.part_of(expert_index, Int64(token) * k)
            for slot in cutlass.range(lane, k, LANES, unroll=1):
                expert = chosen[slot] - chunk
                if (expert >= 0) & (expert < CHUNK):
                    tile[expert * _PITCH + column] = tile[expert * _PITCH + column] | _SIGN
        cute.arch.sync_threads()
        token = block * _TOKENS + lane
        for line in cutlass.range(warp_index, CHUNK, WARPS, unroll=4):
            if (token < num_tokens) & (chunk + line < num_experts):
                warp.row_of(keys, chunk + line)[token] = tile[line * _PITCH + lane]
        cute.arch.sync_threads()


@cute.jit
def _rounding_keys(
    logits: cute.Tensor, expert_index: cute.Tensor, keys: cute.Tensor, k: Int32, scoring: cutlass.Constexpr, stream: cuda.CUstream
):
    _rounding_keys_kernel(logits, expert_index, keys, k, scoring).launch(
        grid=[(logits.shape[0] + _TOKENS - 1) // _TOKENS, 1, 1], block=[WARPS * LANES, 1, 1], stream=stream
    )


def trace(*, scoring: str) -> tuple:
    """What is compiled: ``(logits (T, E) float32, expert_index (T * K,) int32, keys (E, T) int32, K)``, all dense.

    Args:
        scoring: softmax or sigmoid.
    """
    T, E = cute.sym_int(), cute.sym_int()
    arguments = (
        make_fake_compact_tensor(Float32, (T, E), stride_order=(1, 0), assumed_align=4),
        make_fake_compact_tensor(Int32, (cute.sym_int(),), assumed_align=4),
        make_fake_compact_tensor(Int32, (E, T), stride_order=(1, 0), assumed_align=4),
        Int32(1),
        scoring,
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _rounding_keys, arguments
