"""Top-K routing of one token by one warp: choice, scores, renormalisation and scale, in one launch.

Data flow, lane l of the warp of token t; the row of logits comes from memory once, later passes find it in L1:

    softmax before a choice by score:  largest logit and sum of exp over all E
    groups (num_groups > 1):           each group's value -> the list of the best groups, ascending by rank in lanes 0, 1, ...
    for each group in question, for each chunk of 128 experts:
        key[4]  <- value of experts chunk + 32 j + l as an ordered integer, sorted in the lane (6 exchanges of neighbours)
        while the warp's largest key beats the K-th of the list so far:
            the lowest expert that has it leaves its lane and enters the list, which lane p holds the p-th entry of
    softmax:                           sum of exp over all E, the largest logit being the first of the list
    lane p < K: score of the p-th expert; sum over the lanes for renormalisation; three stores of K * 4 bytes

A round of the while loop is 2 warp reductions, 3 shuffles and about 25 other instructions; there are K of them for the first
chunk and about K / i for the i-th of random logits. Ties: a later expert enters only if it beats the K-th strictly, equals enter
behind their equals, and chunks come in ascending order, so that the lower index goes first.

Bytes: T*E*w of logits + 12*R. FLOPs: about 10*T*E for the exponentials. Floor: those bytes at device-copy bandwidth. What was
measured is in docs/kernels/top_k.md.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from routing.kernels import warp
from routing.kernels.warp import BELOW_ALL, CHUNK, LANES, LEAST_SUM, PER_LANE, WARPS

_INT32_MAX = 2**31 - 1


@cute.jit
def _value(
    logit: Float32,
    bias: Float32 | None,
    largest: Float32,
    exp_sum: Float32,
    scoring: cutlass.Constexpr,
    by_score: cutlass.Constexpr,
) -> Float32:
    """What is compared: the logit or the score, with the bias."""
    value = logit
    if cutlass.const_expr(by_score and scoring == "sigmoid"):
        value = warp.sigmoid(value)
    if cutlass.const_expr(by_score and scoring == "softmax"):
        value = warp.exp(value - largest) / exp_sum
    if cutlass.const_expr(bias is not None):
        value = warp.finite(value + bias)
    return value


def _exchange(key: cute.Tensor, index: cute.Tensor, j: int) -> None:
    """Order entries j and j + 1, the larger key first; equals stay, which makes a sort of such steps stable."""
    swap = key[j + 1] > key[j]
    high_key, high_index = cutlass.select_(swap, key[j + 1], key[j]), cutlass.select_(swap, index[j + 1], index[j])
    key[j + 1], index[j + 1] = cutlass.select_(swap, key[j], key[j + 1]), cutlass.select_(swap, index[j], index[j + 1])
    key[j], index[j] = high_key, high_index


@cute.jit
def _group_value(
    row: cute.Tensor,
    bias: cute.Tensor | None,
    begin: Int32,
    size: Int32,
    top2: Int32,
    lane: Int32,
    largest: Float32,
    exp_sum: Float32,
    scoring: cutlass.Constexpr,
    by_score: cutlass.Constexpr,
) -> Float32:
    """The best value of the experts [begin, begin + size), or the sum of the two best."""
    first, second = Int32(BELOW_ALL), Int32(BELOW_ALL)
    for offset in cutlass.range(lane, size, LANES, unroll=1):
        expert = begin + offset
        own_bias = bias[expert] if cutlass.const_expr(bias is not None) else None
        key = warp.key_of(_value(warp.logit(row, expert), own_bias, largest, exp_sum, scoring, by_score))
        second = cutlass.max(second, cutlass.min(first, key))
        first = cutlass.max(first, key)
    best = warp.highest(first)
    holders = warp.ballot(first == best)
    is_holder = (first == best) & (warp.set_below(holders, lane) == 0)
    runner_up = warp.highest(cutlass.select_(is_holder, second, first))
    value = warp.value_of(best)
    if (top2 != 0) & (size > 1):
        value += warp.value_of(runner_up)
    return value


@cute.kernel
def _top_k_kernel(
    logits: cute.Tensor,
    bias: cute.Tensor | None,
    token_index: cute.Tensor,
    expert_index: cute.Tensor,
    score: cute.Tensor,
    k: Int32,
    num_groups: Int32,
    group_size: Int32,
    groups_per_token: Int32,
    top2: Int32,
    renormalize: Int32,
    scale: Float32,
    scoring: cutlass.Constexpr,
    by_score: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    lane = thread % LANES
    token = block * WARPS + thread // LANES

    if token < logits.shape[0]:
        row = warp.row_of(logits, token)
        largest, exp_sum = Float32(0.0), Float32(1.0)
        if cutlass.const_expr(by_score and scoring == "softmax"):
            largest, exp_sum = warp.softmax_of(row, lane)

        group_key, group_index = Int32(BELOW_ALL), Int32(0)
        if num_groups > 1:
            for group in cutlass.range(0, num_groups, unroll=1):
                value = _group_value(row, bias, group * group_size, group_size, top2, lane, largest, exp_sum, scoring, by_score)
                group_key, group_index = warp.insert(group_key, group_index, warp.key_of(value), group, lane)

        list_key, list_index = Int32(BELOW_ALL), Int32(0)
        last = Int32(BELOW_ALL)  # the K-th key of the list
        key = cute.make_rmem_tensor((PER_LANE,), Int32)
        index = cute.make_rmem_tensor((PER_LANE,), Int32)
        logit = cute.make_rmem_tensor((PER_LANE,), Float32)
        own_bias = cute.make_rmem_tensor((PER_LANE,), Float32)
        for group in cutlass.range(0, num_groups, unroll=1):
            listed = warp.ballot((lane < groups_per_token) & (group_index == group))
            if (num_groups == 1) | (listed != 0):
                begin, end = group * group_size, (group + 1) * group_size
                for chunk in cutlass.range(begin, end, CHUNK, unroll=1):
                    for j in cutlass.range_constexpr(PER_LANE):
                        index[j] = chunk + j * LANES + lane
                        # A position behind the end reads the last expert again: no branch, all loads in flight.
                        expert = cutlass.min(index[j], end - 1)
                        logit[j] = warp.logit(row, expert)
                        if cutlass.const_expr(bias is not None):
                            own_bias[j] = bias[expert]
                    for j in cutlass.range_constexpr(PER_LANE):
                        key[j] = Int32(BELOW_ALL)
                        if chunk + j * LANES < end:  # the same for all lanes, and scores are worth skipping in small groups
                            added = own_bias[j] if cutlass.const_expr(bias is not None) else None
                            value = _value(logit[j], added, largest, exp_sum, scoring, by_score)
                            key[j] = cutlass.select_(index[j] < end, warp.key_of(value), Int32(BELOW_ALL))
                    for step in cutlass.range_constexpr(PER_LANE):
                        for j in cutlass.range_constexpr(step % 2, PER_LANE - 1, 2):
                            _exchange(key, index, j)
                    best = warp.highest(key[0])
                    while best > last:
                        winner = cute.arch.warp_redux_sync(cutlass.select_(key[0] == best, index[0], Int32(_INT32_MAX)), "min")
                        leaves = index[0] == winner
                        for j in cutlass.range_constexpr(PER_LANE - 1):
                            key[j] = cutlass.select_(leaves, key[j + 1], key[j])
                            index[j] = cutlass.select_(leaves, index[j + 1], index[j])
                        key[PER_LANE - 1] = cutlass.select_(leaves, Int32(BELOW_ALL), key[PER_LANE - 1])
                        list_key, list_index = warp.insert(list_key, list_index, best, winner, lane)
                        last = warp.from_lane(list_key, k - 1)
                        best = warp.highest(key[0])

        in_use = lane < k
        x = warp.logit(row, cutlass.select_(in_use, list_index, Int32(0)))
        result = Float32(0.0)
        if cutlass.const_expr(scoring == "softmax"):
            if cutlass.const_expr(not by_score):
                # Without a bias, and with groups judged by their best, the token's largest logit is always chosen.
                largest = warp.value_of(warp.from_lane(list_key, 0))
                exp_sum = warp.exp_sum(row, largest, lane)
            result = warp.exp(x - largest) / exp_sum
        elif cutlass.const_expr(scoring == "sigmoid"):
            result = warp.sigmoid(x)
        else:
            largest = warp.value_of(warp.highest(cutlass.select_(in_use, warp.key_of(x), Int32(BELOW_ALL))))
            result = warp.exp(x - largest)
        result = cutlass.select_(in_use, result, Float32(0.0))
        if cutlass.const_expr(scoring == "softmax_topk"):
            result = result / warp.total(result)
        elif renormalize != 0:
            result = result / (warp.total(result) + Float32(LEAST_SUM))
        if in_use:
            slot = Int64(token) * k
            warp.part_of(token_index, slot)[lane] = token
            warp.part_of(expert_index, slot)[lane] = list_index
            warp.part_of(score, slot)[lane] = result * scale


@cute.jit
def _top_k(
    logits: cute.Tensor,
    bias: cute.Tensor | None,
    token_index: cute.Tensor,
    expert_index: cute.Tensor,
    score: cute.Tensor,
    k: Int32,
    num_groups: Int32,
    group_size: Int32,
    groups_per_token: Int32,
    top2: Int32,
    renormalize: Int32,
    scale: Float32,
    scoring: cutlass.Constexpr,
    by_score: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    _top_k_kernel(
        logits,
        bias,
        token_index,
        expert_index,
        score,
        k,
        num_groups,
        group_size,
        groups_per_token,
        top2,
        renormalize,
        scale,
        scoring,
        by_score,
    ).launch(grid=[(logits.shape[0] + WARPS - 1) // WARPS, 1, 1], block=[WARPS * LANES, 1, 1], stream=stream)


def trace(*, dtype: str, scoring: str, by: str) -> tuple:
    """What is compiled: ``(logits (T, E), selection_bias (E,) float32 | None, token_index (R,) int32, expert_index (R,) int32,
    score (R,) float32, K, num_groups, group_size, groups_per_token, top2, renormalize, scale)``, all dense; K and groups_per_token
    at most 32.

    Args:
        dtype: of the logits: bfloat16, float16 or float32.
        scoring: softmax, softmax_topk or sigmoid.
        by: what is compared: "logit", "score", or "bias", either of them with a selection_bias.
    """
    T, E, R = cute.sym_int(), cute.sym_int(), cute.sym_int()

    def vector(element: type[cutlass.Numeric], count: cute.SymInt) -> cute.Tensor:
        return make_fake_compact_tensor(element, (count,), assumed_align=4)

    element = warp.ELEMENT[dtype]
    arguments = (
        make_fake_compact_tensor(element, (T, E), stride_order=(1, 0), assumed_align=element.width // 8),
        vector(Float32, E) if by == "bias" else None,
        vector(Int32, R),
        vector(Int32, R),
        vector(Float32, R),
        Int32(1),
        Int32(1),
        Int32(1),
        Int32(1),
        Int32(0),
        Int32(0),
        Float32(1.0),
        scoring,
        scoring != "softmax_topk" and by != "logit",
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _top_k, arguments
