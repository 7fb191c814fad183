"""Index arithmetic of tokens that travel between W processes, each with E/W neighbouring experts, in C chunks. T tokens, R slots.

Three kernels of one launch each, `step` says which; a thread an element, nothing shared, int32 but for the ids. Token t is of chunk
``((t + 1) C - 1) // T``, expert e of process ``e // own``.

    pairs      a thread a slot, K of each token:       slot_pair = process C + chunk, or -1 for a sentinel
               a thread a token and a process w:       copy_pair = chunk W + w, or -1 where none of the token's K experts is there
    labels     a thread a row of the slots' plan:      the slot's copy, counted from the first of its chunk and process; its expert,
                                                       counted from the process's first; the bits of its score
    arrivals   a thread a place of a slot that comes:  which of `ends` (n,) it lies before (a binary search in L1), `shift` to its label,
                                                       and token, expert and score out of that; T tokens' worth of sentinels behind

Bytes: pairs reads 4 or 8 R, T W times K of them out of L1, and writes 4 (R + T W); labels reads up to 24 R and writes 12 R; arrivals
reads 12 M and writes 16 M. At T = 16384, K = 8, W = 2 that is 1, 5 and 4 MB: the floor of each is a launch.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from dispatch.kernels.sizes import THREADS

_ELEMENT = {"int32": cutlass.Int32, "int64": cutlass.Int64}


@cute.jit
def _position():
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    return block * THREADS + thread


@cute.jit
def _divided(value: cutlass.Int32, by: cutlass.Int32):
    return cutlass.Int32(cutlass.Uint32(value) // cutlass.Uint32(by))


@cute.jit
def _process_of(index: cute.Tensor, slot: cutlass.Int32, num_experts: cutlass.Int32, own: cutlass.Int32):
    """The process that has the slot's expert; -1 for a sentinel."""
    expert = index[slot]
    inside = (expert >= index.element_type(0)) & (expert < index.element_type(num_experts))
    return cutlass.select_(inside, _divided(cutlass.select_(inside, cutlass.Int32(expert), cutlass.Int32(0)), own), cutlass.Int32(-1))


@cute.jit
def _chunk_of(token: cutlass.Int32, num_tokens: cutlass.Int32, chunks: cutlass.Int32):
    return _divided((token + 1) * chunks - 1, num_tokens)


@cute.kernel
def _pairs_kernel(
    index: cute.Tensor,
    slot_pair: cute.Tensor,
    copy_pair: cute.Tensor,
    num_tokens: cutlass.Int32,
    num_experts: cutlass.Int32,
    slots_per_token: cutlass.Int32,
    processes: cutlass.Int32,
    chunks: cutlass.Int32,
):
    position = _position()
    own = _divided(num_experts, processes)
    if position < slot_pair.shape[0]:
        process = _process_of(index, position, num_experts, own)
        chunk = _chunk_of(_divided(position, slots_per_token), num_tokens, chunks)
        slot_pair[position] = cutlass.select_(process >= 0, process * chunks + chunk, cutlass.Int32(-1))
    if position < copy_pair.shape[0]:
        token = _divided(position, processes)
        process = position - token * processes
        pair = cutlass.Int32(-1)
        for choice in cutlass.range(slots_per_token, unroll=1):
            if _process_of(index, token * slots_per_token + choice, num_experts, own) == process:
                pair = _chunk_of(token, num_tokens, chunks) * processes + process
        copy_pair[position] = pair


@cute.jit
def _pairs(
    index: cute.Tensor,
    slot_pair: cute.Tensor,
    copy_pair: cute.Tensor,
    num_tokens: cutlass.Int32,
    num_experts: cutlass.Int32,
    slots_per_token: cutlass.Int32,
    processes: cutlass.Int32,
    chunks: cutlass.Int32,
    stream: cuda.CUstream,
):
    threads = cutlass.max(slot_pair.shape[0], copy_pair.shape[0])
    _pairs_kernel(index, slot_pair, copy_pair, num_tokens, num_experts, slots_per_token, processes, chunks).launch(
        grid=[cute.ceil_div(threads, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )


@cute.kernel
def _labels_kernel(
    index: cute.Tensor,
    token_index: cute.Tensor | None,
    score: cute.Tensor,
    row_to_slot: cute.Tensor,
    copy_row: cute.Tensor,
    copy_offsets: cute.Tensor,
    labels: cute.Tensor,
    num_tokens: cutlass.Int32,
    num_experts: cutlass.Int32,
    slots_per_token: cutlass.Int32,
    processes: cutlass.Int32,
    chunks: cutlass.Int32,
):
    row = _position()
    if row < row_to_slot.shape[0]:
        slot = row_to_slot[row]
        position, expert, bits = cutlass.Int32(0), cutlass.Int32(0), cutlass.Int32(0)
        if slot >= 0:
            own = _divided(num_experts, processes)
            process = _process_of(index, slot, num_experts, own)
            expert = cutlass.Int32(index[slot]) - process * own
            bits = score[slot]
            token = _divided(slot, cutlass.max(slots_per_token, 1))
            if cutlass.const_expr(token_index is not None):
                token = cutlass.Int32(token_index[slot])
            pair = _chunk_of(token, num_tokens, chunks) * processes + process
            position = copy_row[token * processes + process] - copy_offsets[pair]
        labels[row, 0] = position
        labels[row, 1] = expert
        labels[row, 2] = bits


@cute.jit
def _labels(
    index: cute.Tensor,
    token_index: cute.Tensor | None,
    score: cute.Tensor,
    row_to_slot: cute.Tensor,
    copy_row: cute.Tensor,
    copy_offsets: cute.Tensor,
    labels: cute.Tensor,
    num_tokens: cutlass.Int32,
    num_experts: cutlass.Int32,
    slots_per_token: cutlass.Int32,
    processes: cutlass.Int32,
    chunks: cutlass.Int32,
    stream: cuda.CUstream,
):
    plans = (row_to_slot, copy_row, copy_offsets)
    _labels_kernel(
        index, token_index, score, *plans, labels, num_tokens, num_experts, slots_per_token, processes, chunks
    ).launch(grid=[cute.ceil_div(row_to_slot.shape[0], THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream)  # fmt: skip


@cute.kernel
def _arrivals_kernel(
    labels: cute.Tensor,
    ends: cute.Tensor,
    shift: cute.Tensor,
    first: cute.Tensor,
    token: cute.Tensor,
    expert: cute.Tensor,
    bits: cute.Tensor,
    at: cute.Tensor,
    num_experts: cutlass.Int32,
):
    place = _position()
    if place < token.shape[0]:
        low, high = cutlass.Int32(0), ends.shape[0]
        while low < high:
            middle = low + ((high - low) >> 1)
            before = ends[middle] <= place
            low = cutlass.select_(before, middle + 1, low)
            high = cutlass.select_(before, high, middle)
        begin = first[low]
        label = place + shift[low]
        own_token, own_expert, own_bits = cutlass.Int32(0), num_experts, cutlass.Int32(0)
        if begin >= 0:
            own_token = begin + labels[label, 0]
            own_expert = labels[label, 1]
            own_bits = labels[label, 2]
        token[place] = own_token
        expert[place] = own_expert
        bits[place] = own_bits
        at[place] = cutlass.select_(begin >= 0, label, labels.shape[0])


@cute.jit
def _arrivals(
    labels: cute.Tensor,
    ends: cute.Tensor,
    shift: cute.Tensor,
    first: cute.Tensor,
    token: cute.Tensor,
    expert: cute.Tensor,
    bits: cute.Tensor,
    at: cute.Tensor,
    num_experts: cutlass.Int32,
    stream: cuda.CUstream,
):
    _arrivals_kernel(labels, ends, shift, first, token, expert, bits, at, num_experts).launch(
        grid=[cute.ceil_div(token.shape[0], THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )


def trace(*, step: str, index: str = "int32", ordered: bool = True) -> tuple:
    """What is compiled; int32 but for index::

        pairs      (index (R,), slot_pair (R,), copy_pair (T W,), T, E, K, W, C)
        labels     (index (R,), token_index (R,) | None, score (R,), row_to_slot (R,), copy_row (T W,), copy_offsets (C W + 1,),
                    labels (R, 3), T, E, K, W, C)
        arrivals   (labels (N, 3), ends (n,), shift (n,), first (n,), token (M,), expert (M,), bits (M,), at (M,), experts of a process)

    Args:
        step: pairs, labels or arrivals.
        index: dtype of the ids, int32 or int64.
        ordered: whether a token has K slots side by side; else labels reads token_index, of the ids' dtype.
    """
    R, M, n = (cute.sym_int() for _ in range(3))

    def vector(count: cute.SymInt, element: type[cutlass.Numeric] = cutlass.Int32) -> cute.Tensor:
        return make_fake_compact_tensor(element, (count,), assumed_align=element.width // 8)

    def rows_of_three(count: cute.SymInt) -> cute.Tensor:
        return make_fake_compact_tensor(cutlass.Int32, (count, 3), stride_order=(1, 0), assumed_align=4)

    ids, sizes, stream = _ELEMENT[index], [cutlass.Int32(1) for _ in range(5)], make_fake_stream(use_tvm_ffi_env_stream=True)
    if step == "pairs":
        return _pairs, (vector(R, ids), vector(R), vector(cute.sym_int()), *sizes, stream)
    if step == "labels":
        plans = (vector(R), vector(cute.sym_int()), vector(cute.sym_int()))
        return _labels, (vector(R, ids), None if ordered else vector(R, ids), vector(R), *plans, rows_of_three(R), *sizes, stream)
    tables, places = [vector(n) for _ in range(3)], [vector(M) for _ in range(4)]
    return _arrivals, (rows_of_three(cute.sym_int()), *tables, *places, cutlass.Int32(1), stream)
