"""Defects in the kernels themselves, for a GPU: the kernel is compiled with the fault and run in a cell that must fail.

None of them makes a kernel wait for ever or write outside its tensors: a cell that crashes proves nothing.
"""

from testing.matrix.planting_source import SourceDefect

_EPILOGUE = "sonicmoe/kernels/epilogue.py"
_GEMM = "sonicmoe/kernels/grouped_gemm.py"
_GATHER_SUM = "dispatch/kernels/gather_sum.py"
_COUNT = "dispatch/kernels/count.py"

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
