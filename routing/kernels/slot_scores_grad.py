"""The gradient of scores in the logits, for top-K and token-rounded routings, one token by one warp.

With p the probabilities of routing/kernels/scores.py, g the incoming gradient times scale, sums over the token's slots, and
S = sum p + 1e-20 when renormalised (else d = g):

    d[slot]   = (g[slot] - sum(g p) / S) / S
    softmax:    dlogits[e] = p[e] * (d[e] - sum(d p))          d = 0 where e has no slot: dense in e
    softmax_topk: the same over the token's experts, 0 elsewhere
    sigmoid:    dlogits[e] = d[e] * p[e] * (1 - p[e])          0 where e has no slot
    and 0 where the logit is not finite

Data flow, lane l of the warp of token t: as slot_scores.py, then the part without d for all E, a barrier of the warp, and the
slots' elements over it. Nothing of size (T, E) is read or kept but the logits, whose probabilities are computed again.

Bytes: T*E*w of logits read and as many written, 8*R of slots. Floor: those bytes at device-copy bandwidth.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from routing.kernels import scores, warp
from routing.kernels.warp import CHUNK, LANES, LEAST_SUM, PER_LANE, WARPS


@cute.kernel
def _slot_scores_grad_kernel(
    logits: cute.Tensor,
    expert_index: cute.Tensor,
    token_offsets: cute.Tensor | None,
    score_grad: cute.Tensor,
    logits_grad: cute.Tensor,
    slots_per_token: Int32,
    renormalize: Int32,
    scale: Float32,
    scoring: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    lane = thread % LANES
    token = block * WARPS + thread // LANES
    num_tokens, num_experts = logits.shape
    element = logits_grad.element_type
    if token < num_tokens:
        row, out = warp.row_of(logits, token), warp.row_of(logits_grad, token)
        begin = token * slots_per_token
        end = begin + slots_per_token
        if cutlass.const_expr(token_offsets is not None):
            begin, end = token_offsets[token], token_offsets[token + 1]
        largest, exp_sum = scores.softmax_terms(row, expert_index, begin, end, lane, scoring)

        p_part, gp_part = Float32(0.0), Float32(0.0)
        for slot in cutlass.range(begin + lane, end, LANES, unroll=1):
            p = scores.probability(warp.logit(row, expert_index[slot]), largest, exp_sum, scoring)
            p_part += p
            gp_part += score_grad[slot] * scale * p
        p_sum, gp_sum = warp.total(p_part), warp.total(gp_part)
        divisor, shift = Float32(1.0), Float32(0.0)
        if renormalize != 0:
            divisor = p_sum + Float32(LEAST_SUM)
            shift = gp_sum / divisor
        dp_sum = (gp_sum - shift * p_sum) / divisor

        for chunk in cutlass.range(0, num_experts, CHUNK, unroll=1):
            for j in cutlass.range_constexpr(PER_LANE):
                expert = chunk + j * LANES + lane
                value = Float32(0.0)
                if cutlass.const_expr(scoring == "softmax"):
                    read = cutlass.min(expert, num_experts - 1)
                    p = scores.probability(warp.logit(row, read), largest, exp_sum, scoring)
                    value = Float32(cutlass.select_(warp.is_finite(row, read), -p * dp_sum, Float32(0.0)))
                if expert < num_experts:
                    out[expert] = value.to(element)
        cute.arch.sync_warp()
        for slot in cutlass.range(begin + lane, end, LANES, unroll=1):
            expert = expert_index[slot]
            p = scores.probability(warp.logit(row, expert), largest, exp_sum, scoring)
            d = (score_grad[slot] * scale - shift) / divisor
            value = p * (d * (Float32(1.0) - p) if cutlass.const_expr(scoring == "sigmoid") else d - dp_sum)
            out[expert] = Float32(cutlass.select_(warp.is_finite(row, expert), value, Float32(0.0))).to(element)


@cute.jit
def _slot_scores_grad(
    logits: cute.Tensor,
    expert_index: cute.Tensor,
    token_offsets: cute.Tensor | None,
    score_grad: cute.Tensor,
    logits_grad: cute.Tensor,
    slots_per_token: Int32,
    renormalize: Int32,
    scale: Float32,
    scoring: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    _slot_scores_grad_kernel(
        logits, expert_index, token_offsets, score_grad, logits_grad, slots_per_token, renormalize, scale, scoring
    ).launch(grid=[(logits.shape[0] + WARPS - 1) // WARPS, 1, 1], block=[WARPS * LANES, 1, 1], stream=stream)


def trace(*, dtype: str, form: str, scoring: str) -> tuple:
    """What is compiled: ``(logits (T, E), expert_index (R,) int32, token_offsets (T + 1,) int32 | None, score_grad (R,) float32,
    logits_grad (T, E), K, renormalize, scale)``, all dense.

    Args:
        dtype: of the logits and their gradient: bfloat16, float16 or float32.
        form: "uniform", every token has the K slots from t * K, or "csr", token_offsets says which and K is ignored.
        scoring: softmax, softmax_topk or sigmoid.
    """
    T, E, R = cute.sym_int(), cute.sym_int(), cute.sym_int()
    element = warp.ELEMENT[dtype]

    def matrix() -> cute.Tensor:
        return make_fake_compact_tensor(element, (T, E), stride_order=(1, 0), assumed_align=element.width // 8)

    arguments = (
        matrix(),
        make_fake_compact_tensor(Int32, (R,), assumed_align=4),
        make_fake_compact_tensor(Int32, (cute.sym_int(),), assumed_align=4) if form == "csr" else None,
        make_fake_compact_tensor(Float32, (R,), assumed_align=4),
        matrix(),
        Int32(1),
        Int32(0),
        Float32(1.0),
        scoring,
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _slot_scores_grad, arguments
