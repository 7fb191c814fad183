"""Every token's weighted sum of its rows: o[t] = sum over t's slots s, in slot order, of score[s] * rows[slot_to_row[s]].

Data flow, one thread for 16 bytes of one token's output (V = 8 bf16/fp16 or 4 fp32 columns), threads numbered along o, so
that a warp reads 512 consecutive bytes of a row and no thread is idle at any H:

    thread -> (token, column)                    one 64-bit division a block, one 32-bit division a thread
    for each chunk of 8 slots, the rest by 4:    slots t*K .. t*K+K-1 (uniform) or token_slots[token_offsets[t] ..] (csr)
        row[8]    <- slot_to_row[slot]           4 bytes, the same for all of the token's threads: broadcast, then L1
        weight[8] <- score[slot]                 likewise, 2 or 4 bytes
        value[8]  <- rows[row, column]           16 bytes each, all issued before the first is used; none where row < 0
        total[V] += weight[j] * value[j]         float32, j in slot order: the bits do not depend on the run
    o[token, column] <- total                    16 bytes, rounded once

With ``dependent`` the launch may start before the one before it on the stream has ended, which must write nothing but rows; every
thread waits for its end before it reads anything.

No shared memory, no barrier: what hides the latency is 32 warps a multiprocessor with several rows in flight each.

Bytes: R*H*w of rows + T*H*w of o (w bytes an element) + O(R) of indices and scores, each moved once. FLOPs: 2*R*H, 1 per byte
at w = 2: far below the machine's ratio. Floor: those bytes at device-copy bandwidth. What was measured is in docs/kernels/gather_sum.md.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

THREADS = 256
ROWS_IN_FLIGHT = 8
ROWS_IN_FLIGHT_AT_END = 4
"""For what is left of a token's slots: at K = 2 a chunk of 8 spends more instructions on absent rows than the memory takes."""
VECTOR_BITS = 128

_ELEMENT = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": cutlass.Float32}


@cute.jit
def _add_chunk(
    count: cutlass.Constexpr,
    rows: cute.Tensor,
    score: cute.Tensor | None,
    slot_to_row: cute.Tensor,
    token_slots: cute.Tensor | None,
    begin: cutlass.Int32,
    end: cutlass.Int32,
    column: cutlass.Int32,
    total: cute.Tensor,
):
    """Add ``count`` slots from ``begin``, those before ``end``, to the thread's ``total``."""
    width = cutlass.const_expr(VECTOR_BITS // rows.element_type.width)
    row = cute.make_rmem_tensor((count,), cutlass.Int32)
    weight = cute.make_rmem_tensor((count,), cutlass.Float32)
    value = cute.make_rmem_tensor((width, count), rows.element_type)
    present = cute.make_rmem_tensor((count,), cutlass.Boolean)
    row.fill(-1)
    weight.fill(0.0)
    value.fill(0.0)
    for j in cutlass.range_constexpr(count):
        if begin + j < end:
            slot = begin + j
            if cutlass.const_expr(token_slots is not None):
                slot = token_slots[begin + j]
            row[j] = slot_to_row[slot]
            if cutlass.const_expr(score is not None):
                weight[j] = cutlass.Float32(score[slot])
    load = cute.make_copy_atom(cute.nvgpu.CopyG2ROp(), rows.element_type, num_bits_per_copy=VECTOR_BITS)
    for j in cutlass.range_constexpr(count):
        present[j] = row[j] >= 0
        if cutlass.const_expr(score is not None):
            # A sentinel's value is zero, but its score may be anything.
            weight[j] = cutlass.select_(present[j], weight[j], cutlass.Float32(0.0))
        source = cute.local_tile(rows, (1, width), (row[j], column))[0, None]
        # One predicate for the whole vector. A predicated load, unlike a branch, leaves the others in flight.
        predicate = cute.make_tensor(present.iterator + j, cute.make_layout((width,), stride=(0,)))
        cute.copy(load, source, value[None, j], pred=predicate)
    for j in cutlass.range_constexpr(count):
        term = value[None, j].load().to(cutlass.Float32)
        if cutlass.const_expr(score is not None):
            term = weight[j] * term
        total.store(total.load() + term)


@cute.kernel
def _gather_sum_kernel(
    rows: cute.Tensor,
    score: cute.Tensor | None,
    slot_to_row: cute.Tensor,
    token_offsets: cute.Tensor | None,
    token_slots: cute.Tensor | None,
    out: cute.Tensor,
    slots_per_token: cutlass.Int32,
):
    width = cutlass.const_expr(VECTOR_BITS // rows.element_type.width)
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    num_tokens, hidden = out.shape

    # T * H / V may pass 2^32, what a block adds to its first token does not.
    vectors = hidden // width
    first_vector = cutlass.Int64(block) * THREADS
    first_token = first_vector // vectors
    offset = cutlass.Uint32(first_vector - first_token * vectors) + cutlass.Uint32(thread)
    token_in_block = offset // cutlass.Uint32(vectors)
    column = cutlass.Int32(offset - token_in_block * cutlass.Uint32(vectors))
    token = cutlass.Int32(first_token) + cutlass.Int32(token_in_block)

    cute.arch.griddepcontrol_wait()
    if token < num_tokens:
        begin = token * slots_per_token
        end = begin + slots_per_token
        if cutlass.const_expr(token_offsets is not None):
            begin = token_offsets[token]
            end = token_offsets[token + 1]

        total = cute.make_rmem_tensor((width,), cutlass.Float32)
        total.fill(0.0)
        rest = end - (end - begin) % ROWS_IN_FLIGHT
        for chunk in cutlass.range(begin, rest, ROWS_IN_FLIGHT, unroll=1):
            _add_chunk(ROWS_IN_FLIGHT, rows, score, slot_to_row, token_slots, chunk, rest, column, total)
        for chunk in cutlass.range(rest, end, ROWS_IN_FLIGHT_AT_END, unroll=1):
            _add_chunk(ROWS_IN_FLIGHT_AT_END, rows, score, slot_to_row, token_slots, chunk, end, column, total)

        result = cute.make_rmem_tensor((width,), out.element_type)
        result.store(total.load().to(out.element_type))
        cute.autovec_copy(result, cute.local_tile(out, (1, width), (token, column))[0, None])


@cute.jit
def _gather_sum(
    rows: cute.Tensor,
    score: cute.Tensor | None,
    slot_to_row: cute.Tensor,
    token_offsets: cute.Tensor | None,
    token_slots: cute.Tensor | None,
    out: cute.Tensor,
    slots_per_token: cutlass.Int32,
    dependent: cutlass.Int32,
    stream: cuda.CUstream,
):
    vectors = cutlass.Int64(out.shape[0]) * (out.shape[1] * out.element_type.width // VECTOR_BITS)
    blocks = cutlass.Int32((vectors + (THREADS - 1)) // THREADS)
    _gather_sum_kernel(rows, score, slot_to_row, token_offsets, token_slots, out, slots_per_token).launch(
        grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=dependent
    )


def trace(*, dtype: str, form: str, scored: bool, score: str = "float32") -> tuple:
    """What is compiled: ``(rows (N, H), score (R,) | None, slot_to_row (R,), token_offsets (T + 1,) | None, token_slots (R,) | None,
    out (T, H), K, dependent)``, with H a multiple of 8, all dense and the matrices aligned to 16 bytes.

    Args:
        dtype: of rows and out: bfloat16, float16 or float32.
        form: "uniform", every token has the K slots from t * K, or "csr", token_offsets and token_slots list them and K is ignored.
        scored: whether there is a score.
        score: its dtype: float32, bfloat16 or float16.
    """
    N, R, T, H = cute.sym_int(), cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=8)
    csr = form == "csr"

    def matrix(count: cute.SymInt) -> cute.Tensor:
        return make_fake_compact_tensor(_ELEMENT[dtype], (count, H), stride_order=(1, 0), assumed_align=16)

    def vector(element: type[cutlass.Numeric], count: cute.SymInt) -> cute.Tensor:
        return make_fake_compact_tensor(element, (count,), assumed_align=element.width // 8)

    arguments = (
        matrix(N),
        vector(_ELEMENT[score], R) if scored else None,
        vector(cutlass.Int32, R),
        vector(cutlass.Int32, cute.sym_int()) if csr else None,
        vector(cutlass.Int32, R) if csr else None,
        matrix(T),
        *(cutlass.Int32(1) for _ in range(2)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _gather_sum, arguments
