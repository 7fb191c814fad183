"""Defects in the kernels themselves, for a GPU: the kernel is compiled with the fault and run in a cell that must fail.

None of them makes a kernel wait for ever or write outside its tensors: a cell that crashes proves nothing.
"""

from testing.matrix.planting_source import SourceDefect

_EPILOGUE = "sonicmoe/kernels/epilogue.py"
_GEMM = "sonicmoe/kernels/grouped_gemm.py"
_BACKWARD = "sonicmoe/kernels/epilogue_backward.py"
_OVER_ROWS = "sonicmoe/kernels/row_reduction.py"
_GATHER_SUM = "dispatch/kernels/gather_sum.py"
_COUNT = "dispatch/kernels/count.py"
_CLEARING = """\
            size = cutlass.select_(inside, wanted[block], Int32(0))
            ptx.copy_16_bytes_async(at + const_expr(block * BLOCK_BYTES), source + const_expr(block * 128), size)

    @cute.jit
    def _clear_tail(self, tail: tuple, stage: Int32, k: Int32):
        \"\"\"By the consumers that have columns of A, 64 each: the others read nothing and need not come to the barrier.\"\"\"
        tile = self.tile
        pointer, rows, columns = tail
        inside = rows - k * TILE_K
        if inside < TILE_K:
"""
"""Where both operands of a product over rows are kept from what lies beyond an expert's end: one of them would do for finite numbers."""

KERNEL_DEFECTS = {
    "kernel: gate and up swapped": SourceDefect(
        _EPILOGUE,
        "return self.activation(gate(group, half, i), up(group, half, i))",
        "return self.activation(up(group, half, i), gate(group, half, i))",
        "activations/reglu",
    ),
    "kernel: another activation": SourceDefect(
        _EPILOGUE, '"relu_squared": lambda x: relu(x) * relu(x),', '"relu_squared": lambda x: x * x,', "activations/relu-squared"
    ),
    "kernel: bias of the expert before": SourceDefect(
        _EPILOGUE,
        "own = bias.iterator.toint() + Int64(expert) * (bias.stride[2] * 2)",
        "own = bias.iterator.toint() + Int64(cutlass.max(expert - 1, 0)) * (bias.stride[2] * 2)",
        "biases/swiglu",
    ),
    "kernel: no bias in training": SourceDefect(
        _EPILOGUE, "            if self.bias:\n", "            if self.bias and not self.store_z:\n", "biases/swiglu"
    ),
    "kernel: last row of a partial block not stored": SourceDefect(
        _EPILOGUE,
        "if (row + line < row_end) & (at < out.shape[1]):",
        "if (row + line + 1 < row_end) & (at < out.shape[1]):",
        "tokens/t1000",
    ),
    "kernel: last columns of the output not stored": SourceDefect(
        _EPILOGUE, "if (row + line < row_end) & (at < out.shape[1]):", "if (row + line < row_end) & (at + 8 < out.shape[1]):", "tokens/t129"
    ),
    "kernel: a store leaves before all warps have written": SourceDefect(
        _EPILOGUE,
        '        cute.arch.fence_proxy("async.shared", space="cta")\n'
        "        cute.arch.barrier(barrier_id=STORE_BARRIER + consumer, number_of_threads=128)\n"
        "        if row + 64 <= row_end:\n",
        '        cute.arch.fence_proxy("async.shared", space="cta")\n        if row + 64 <= row_end:\n',
        "tokens/t8193",
    ),
    "kernel: last row of an expert gathers the row before": SourceDefect(
        _GEMM,
        "begins[i] = row_token[mine] * (columns // 8) + piece",
        "begins[i] = row_token[cutlass.max(cutlass.min(mine, row_end - 2), 0)] * (columns // 8) + piece",
        "tokens/t1000",
    ),
    "kernel: last partial slab of the hidden size not gathered": SourceDefect(
        _GEMM, "inside = cute.ceil_div(columns - piece * 8, TILE_K)", "inside = (columns - piece * 8) // TILE_K", "hidden/h1000"
    ),
    "kernel: products of one tile added to the next one's": SourceDefect(
        _GEMM,
        "mma.set(warpgroup.Field.ACCUMULATE, True if const_expr(self.over_rows) else k > 0)",
        "mma.set(warpgroup.Field.ACCUMULATE, True)",
        "tokens/t8193",
    ),
    "kernel: every ticket is the next one's": SourceDefect(
        _GEMM, "ticket = cute.arch.shuffle_sync(drawn, 0)", "ticket = cute.arch.shuffle_sync(drawn, 0) + 1", "tokens/t8193"
    ),
    "kernel: derivative of another activation": SourceDefect(
        _BACKWARD,
        "    return value * value, Float32(2.0) * value\n",
        "    return value * value, cutlass.select_(x > Float32(0.0), Float32(ONE), Float32(0.0))\n",
        "activations/relu-squared",
    ),
    "kernel: gradient of the pre-activation without the score": SourceDefect(
        _BACKWARD, "weighted = [score * da[i] for i in range(2)]", "weighted = [da[i] for i in range(2)]", "activations/reglu"
    ),
    "kernel: activation for the weight's gradient without the score": SourceDefect(
        _BACKWARD, "*(score * value for value in values)", "*values", "activations/reglu"
    ),
    "kernel: row sum of a tile's last row not stored": SourceDefect(
        _BACKWARD,
        "if (cute.arch.lane_idx() % 4 == 0) & (row < row_end):",
        "if (cute.arch.lane_idx() % 4 == 0) & (row + 1 < row_end):",
        "tokens/t1000",
    ),
    "kernel: row sums of the last tile of columns not added": SourceDefect(
        "sonicmoe/kernels/score_grad.py",
        "for tile in cutlass.range(partial.shape[0], unroll=4):",
        "for tile in cutlass.range(partial.shape[0] - 1, unroll=4):",
        "tokens/t129",
    ),
    "kernel: score's gradient without the bias": SourceDefect(
        "sonicmoe/kernels/score_grad.py",
        "total += _bias_term(dout, b_down, offsets, row_token, row)",
        "total += Float32(0.0) * _bias_term(dout, b_down, offsets, row_token, row)",
        "biases/swiglu",
    ),
    "kernel: rows beyond an expert's end not cleared": SourceDefect(
        _OVER_ROWS,
        _CLEARING,
        _CLEARING.replace("cutlass.select_(inside, wanted[block], Int32(0))", "wanted[block]").replace("inside < TILE_K", "inside < 0"),
        "tokens/t1000",
    ),
    "kernel: last partial stage of an expert's rows not added": SourceDefect(
        _OVER_ROWS,
        "return cute.ceil_div(record[2] - record[1], TILE_K)",
        "return (record[2] - record[1]) // TILE_K",
        "tokens/t1000",
    ),
    "kernel: weight's gradient stored as its neighbour's": SourceDefect(
        "sonicmoe/kernels/weight_grad.py",
        "self.out.send(out_args, staging, chunk, expert * each + row, (expert + 1) * each, at, 0, consumer)",
        "self.out.send(out_args, staging, chunk, (expert ^ 1) * each + row, ((expert ^ 1) + 1) * each, at, 0, consumer)",
        "tokens/t1000",
    ),
    "kernel: bias gradient of the expert before": SourceDefect(
        "sonicmoe/kernels/bias_grad.py",
        "cutlass.range(offsets[expert] + warp, offsets[expert + 1], WARPS, unroll=4)",
        "cutlass.range(offsets[cutlass.max(expert - 1, 0)] + warp, offsets[cutlass.max(expert - 1, 0) + 1], WARPS, unroll=4)",
        "biases/swiglu",
    ),
    "kernel: last partial tile of columns of dx not computed": SourceDefect(
        "sonicmoe/kernels/dx_rows.py",
        "cute.ceil_div(hidden, self.gemm.tile.n),",
        "hidden // self.gemm.tile.n,",
        "hidden/h1000",
    ),
    "kernel: score not applied in the sum": SourceDefect(
        _GATHER_SUM, "term = weight[j] * term", "term = weight[j] * 0 + term", "tokens/t129"
    ),
    "kernel: last slot of a token not summed": SourceDefect(
        _GATHER_SUM, "        if begin + j < end:\n", "        if begin + j < end - 1:\n", "per-token/k16"
    ),
    "kernel: running sum without its own expert": SourceDefect(
        _COUNT, "cumsum[expert] = first[expert] + total[expert]", "cumsum[expert] = first[expert]", "count/e8"
    ),
    "kernel: last id not counted among many experts": SourceDefect(
        _COUNT,
        "routed = (first + j * THREADS < slots) & (key[j] < size)",
        "routed = (first + j * THREADS < slots - 1) & (key[j] < size)",
        "count/e50000",
    ),
    "kernel: slots of a warp placed backwards": SourceDefect(
        "dispatch/kernels/chunks.py", "below = peers & cute.arch.lanemask_lt()", "below = peers & cute.arch.lanemask_gt()", "tokens/t129"
    ),
    "kernel: last part of the logits' reduction not added": SourceDefect(
        "routing/kernels/router_logits.py",
        "for other in cutlass.range_constexpr(1, parts):",
        "for other in cutlass.range_constexpr(1, max(1, parts - 1)):",
        "tokens/t129",
    ),
    "kernel: the higher expert wins a tie": SourceDefect(
        "routing/kernels/top_k.py",
        'cutlass.select_(key[0] == best, index[0], Int32(_INT32_MAX)), "min")',
        'cutlass.select_(key[0] == best, index[0], Int32(-1)), "max")',
        "loads/ties",
    ),
    "kernel: rounds up from a quarter of a tile": SourceDefect(
        "routing/kernels/rounding_select.py",
        "result = Int64(excess) * 2 >= tile_m",
        "result = Int64(excess) * 4 >= tile_m",
        "rounding/nearest",
    ),
}
