"""Scores of the slots of a token-rounded routing, one token by one warp.

Data flow, lane l of the warp of token t, whose slots are token_offsets[t] .. token_offsets[t + 1]:

    softmax:       largest logit and sum of exp over all E
    softmax_topk:  largest logit and sum of exp over the token's slots
    renormalize:   sum of the probabilities over the token's slots
    score[slot] <- probability of (t, expert_index[slot]), divided and scaled

Slots from token_offsets[T] on are sentinels and get 0. A token's slots are read up to four times, from L1 after the first.

Bytes: T*E*4 of logits (softmax; else a sector a slot) + 8*R. Floor: those bytes at device-copy bandwidth.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from routing.kernels import scores, warp
from routing.kernels.warp import LANES, LEAST_SUM, WARPS


@cute.kernel
def _slot_scores_kernel(
    logits: cute.Tensor,
    expert_index: cute.Tensor,
    token_offsets: cute.Tensor,
    score: cute.Tensor,
    renormalize: Int32,
    scale: Float32,
    scoring: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    lane = thread % LANES
    token = block * WARPS + thread // LANES
    num_tokens = logits.shape[0]
    if token < num_tokens:
        row = warp.row_of(logits, token)
        begin, end = token_offsets[token], token_offsets[token + 1]
        largest, exp_sum = scores.softmax_terms(row, expert_index, begin, end, lane, scoring)
        divisor = Float32(1.0)
        if renormalize != 0:
            divisor = scores.probability_sum(row, expert_index, begin, end, lane, largest, exp_sum, scoring) + Float32(LEAST_SUM)
        for slot in cutlass.range(begin + lane, end, LANES, unroll=1):
            x = warp.logit(row, expert_index[slot])
            score[slot] = scores.probability(x, largest, exp_sum, scoring) / divisor * scale
    threads = WARPS * LANES
    for slot in cutlass.range(token_offsets[num_tokens] + block * threads + thread, score.shape[0], blocks * threads, unroll=1):
        score[slot] = Float32(0.0)


@cute.jit
def _slot_scores(
    logits: cute.Tensor,
    expert_index: cute.Tensor,
    token_offsets: cute.Tensor,
    score: cute.Tensor,
    renormalize: Int32,
    scale: Float32,
    scoring: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    _slot_scores_kernel(logits, expert_index, token_offsets, score, renormalize, scale, scoring).launch(
        grid=[(logits.shape[0] + WARPS - 1) // WARPS, 1, 1], block=[WARPS * LANES, 1, 1], stream=stream
    )


def trace(*, scoring: str) -> tuple:
    """What is compiled: ``(logits (T, E) float32, expert_index (R,) int32, token_offsets (T + 1,) int32, score (R,) float32, renormalize,
    scale)``, all dense.

    Args:
        scoring: softmax, softmax_topk or sigmoid.
    """
    R = cute.sym_int()
    arguments = (
        make_fake_compact_tensor(Float32, (cute.sym_int(), cute.sym_int()), stride_order=(1, 0), assumed_align=4),
        make_fake_compact_tensor(Int32, (R,), assumed_align=4),
        make_fake_compact_tensor(Int32, (cute.sym_int(),), assumed_align=4),
        make_fake_compact_tensor(Float32, (R,), assumed_align=4),
        Int32(0),
        Float32(1.0),
        scoring,
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _slot_scores, arguments
