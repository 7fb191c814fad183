"""What the forward and the backward of scores share: one token's scores over its slots, in one warp.

A slot's score is ``probability * scale``, or ``probability / (sum over the token's slots) * scale`` when renormalised. A
probability is ``exp(logit - largest) / exp_sum``, over all experts ("softmax") or over the token's slots ("softmax_topk"), or the
logit's sigmoid. T tokens, E experts, R slots.
"""

import cutlass
from cutlass import Float32, Int32, cute

from routing.kernels import warp
from routing.kernels.warp import BELOW_ALL, LANES


@cute.jit
def softmax_terms(
    row: cute.Tensor, expert_index: cute.Tensor, begin: Int32, end: Int32, lane: Int32, scoring: cutlass.Constexpr
) -> tuple[Float32, Float32]:
    """The largest logit and the sum of exp that a probability takes; (0, 1) for a sigmoid."""
    largest, exp_sum = Float32(0.0), Float32(1.0)
    if cutlass.const_expr(scoring == "softmax"):
        largest, exp_sum = warp.softmax_of(row, lane)
    if cutlass.const_expr(scoring == "softmax_topk"):
        key = Int32(BELOW_ALL)
        for slot in cutlass.range(begin + lane, end, LANES, unroll=1):
            key = cutlass.max(key, warp.key_of(warp.logit(row, expert_index[slot])))
        largest = warp.value_of(warp.highest(key))
        part = Float32(0.0)
        for slot in cutlass.range(begin + lane, end, LANES, unroll=1):
            part += warp.exp(warp.logit(row, expert_index[slot]) - largest)
        exp_sum = warp.total(part)
    return largest, exp_sum


def probability(logit: Float32, largest: Float32, exp_sum: Float32, scoring: str) -> Float32:
    return warp.sigmoid(logit) if scoring == "sigmoid" else warp.exp(logit - largest) / exp_sum


@cute.jit
def probability_sum(
    row: cute.Tensor,
    expert_index: cute.Tensor,
    begin: Int32,
    end: Int32,
    lane: Int32,
    largest: Float32,
    exp_sum: Float32,
    scoring: cutlass.Constexpr,
) -> Float32:
    """The sum of the probabilities of a token's slots, in every lane."""
    part = Float32(0.0)
    for slot in cutlass.range(begin + lane, end, LANES, unroll=1):
        part += probability(warp.logit(row, expert_index[slot]), largest, exp_sum, scoring)
    return warp.total(part)
