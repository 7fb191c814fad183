"""From the bits of kernels/rounding_select.py to slots, one token by one warp, in two launches with a running sum between them.

step "count":  counts[t + 1] <- the token's bits in kept and added;  counts[0] <- 0
               (the caller makes token_offsets of them)
step "write":  token_offsets[t] ..: the token's top-K in their order where kept, then those added by expert
               token_offsets[T] ..: sentinels with token T and expert E

Data flow, lane l of the warp of token t: words (t / 32, e) for e = l, l + 32, ..., contiguous over the lanes and the same for 32
tokens; ballots give every lane its place. Bytes: T*E/4 of words + 12*R, floor at device-copy bandwidth.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Int32, Int64, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from routing.kernels import warp
from routing.kernels.warp import LANES, WARPS


@cute.kernel
def _count_kernel(kept: cute.Tensor, added: cute.Tensor, counts: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    lane = thread % LANES
    token = block * WARPS + thread // LANES
    num_experts = kept.shape[1]
    if token < counts.shape[0] - 1:
        kept_words, added_words = warp.row_of(kept, token // LANES), warp.row_of(added, token // LANES)
        mine = Int32(0)
        for expert in cutlass.range(lane, num_experts, LANES, unroll=4):
            mine += ((kept_words[expert] | added_words[expert]) >> (token % LANES)) & 1
        slots = cute.arch.warp_redux_sync(mine, "add")
        if lane == 0:
            counts[token + 1] = slots
            if token == 0:
                counts[0] = Int32(0)


@cute.kernel
def _write_kernel(
    kept: cute.Tensor,
    added: cute.Tensor,
    chosen: cute.Tensor,
    token_offsets: cute.Tensor,
    token_index: cute.Tensor,
    expert_index: cute.Tensor,
    k: Int32,
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    lane = thread % LANES
    token = block * WARPS + thread // LANES
    num_tokens, num_experts = token_offsets.shape[0] - 1, kept.shape[1]
    if token < num_tokens:
        kept_words, added_words = warp.row_of(kept, token // LANES), warp.row_of(added, token // LANES)
        slot = token_offsets[token]
        choice = warp.part_of(chosen, Int64(token) * k)
        for begin in cutlass.range(0, k, LANES, unroll=1):
            expert = choice[cutlass.min(begin + lane, k - 1)]
            stays = (begin + lane < k) & (((kept_words[expert] >> (token % LANES)) & 1) != 0)
            mask = warp.ballot(stays)
            if stays:
                place = slot + warp.set_below(mask, lane)
                token_index[place] = token
                expert_index[place] = expert
            slot += Int32(cute.arch.popc(mask))
        for begin in cutlass.range(0, num_experts, LANES, unroll=1):
            expert = cutlass.min(begin + lane, num_experts - 1)
            joins = (begin + lane < num_experts) & (((added_words[expert] >> (token % LANES)) & 1) != 0)
            mask = warp.ballot(joins)
            if joins:
                place = slot + warp.set_below(mask, lane)
                token_index[place] = token
                expert_index[place] = expert
            slot += Int32(cute.arch.popc(mask))
    threads = WARPS * LANES
    for slot in cutlass.range(token_offsets[num_tokens] + block * threads + thread, token_index.shape[0], blocks * threads, unroll=1):
        token_index[slot] = num_tokens
        expert_index[slot] = num_experts


@cute.jit
def _count(kept: cute.Tensor, added: cute.Tensor, counts: cute.Tensor, stream: cuda.CUstream):
    _count_kernel(kept, added, counts).launch(
        grid=[(counts.shape[0] + WARPS - 2) // WARPS, 1, 1], block=[WARPS * LANES, 1, 1], stream=stream
    )


@cute.jit
def _write(
    kept: cute.Tensor,
    added: cute.Tensor,
    chosen: cute.Tensor,
    token_offsets: cute.Tensor,
    token_index: cute.Tensor,
    expert_index: cute.Tensor,
    k: Int32,
    stream: cuda.CUstream,
):
    _write_kernel(kept, added, chosen, token_offsets, token_index, expert_index, k).launch(
        grid=[(token_offsets.shape[0] + WARPS - 2) // WARPS, 1, 1], block=[WARPS * LANES, 1, 1], stream=stream
    )


def trace(*, step: str) -> tuple:
    """What is compiled: "count" is ``(kept (ceil(T / 32), E), added likewise, counts (T + 1,))``, "write" is ``(kept, added, chosen
    (T * K,), token_offsets (T + 1,), token_index (R,), expert_index (R,), K)``, all dense int32.
    """
    W, E, R = cute.sym_int(), cute.sym_int(), cute.sym_int()

    def vector(count: cute.SymInt) -> cute.Tensor:
        return make_fake_compact_tensor(Int32, (count,), assumed_align=4)

    def bits() -> cute.Tensor:
        return make_fake_compact_tensor(Int32, (W, E), stride_order=(1, 0), assumed_align=4)

    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if step == "count":
        return _count, (bits(), bits(), vector(cute.sym_int()), stream)
    return _write, (bits(), bits(), vector(cute.sym_int()), vector(cute.sym_int()), vector(R), vector(R), Int32(1), stream)
