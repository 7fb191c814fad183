"""A weight's gradient: dw[e] = tokens[token of row]^T @ rows[row], summed over the rows of expert e.

    tokens (T, M) --cp.async by row_to_token--> A tile 64 rows x m --+
                                                                     +-- wgmma, C_e/64 stages --> m x n tile of dw[e], written once
    rows (R, N) --------TMA, multicast--------> B tile 64 rows x n --+                            (float32)

dw_down (E, H, I): tokens = dout (T, H), rows = scaled_a (R, I), stored as it is. dw_up (E, Z, H): tokens = x (T, H), rows = dz
(R, Z), stored ``transposed``, because the gathered operand is always the narrower A, which multicast could not help.

With ``add`` the product is added into a float32 buffer instead, unrounded (epilogue_add.py).

FLOPs 2 R M N. Bytes from memory: tokens and rows once, the gradient written once: 2 (T M + R N + E M N).
Roles, barriers and arrive counts: grouped_gemm.py and row_reduction.py.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_fake_stream

from sonicmoe.kernels import ptx
from sonicmoe.kernels.epilogue import RowStore, acquire_buffer, finish_stores
from sonicmoe.kernels.epilogue_add import WeightGradAdd
from sonicmoe.kernels.fake import DTYPES, row_major, tickets_of_plan
from sonicmoe.kernels.row_reduction import RowReduction
from sonicmoe.kernels.scheduler import Counter
from sonicmoe.kernels.tiles import TILES, Tile


class WeightGradEpilogue:
    """accumulator -> out, seen as (E * rows of one expert, columns, 1)."""

    def __init__(self, *, dtype: type[cutlass.Numeric], tile_n: int, transposed: bool) -> None:
        self.dtype = dtype
        self.tile_n = tile_n
        self.transposed = transposed
        self.out = RowStore(dtype, 64)

    def prepare(self, out: cute.Tensor) -> tuple:
        return self.out.prepare(out)

    def store(self, accumulators, block: int, args: tuple, expert, line, lines, column_tile, staging, consumer):
        """64 columns of A from ``line`` on, of ``lines``, times the n columns of a tile of B."""
        out_args, each = args  # each: rows of one expert's gradient
        base = block * self.tile_n // 2
        for chunk in range(self.tile_n // 64):
            acquire_buffer(chunk, consumer)
            put = self.out.put_transposed if self.transposed else self.out.put
            put(
                lambda group, half, first=base + chunk * 32: ptx.pack(
                    self.dtype, accumulators[first + group * 4 + half * 2], accumulators[first + group * 4 + half * 2 + 1]
                ),
                staging,
                chunk,
            )
            column = column_tile * self.tile_n + chunk * 64
            row, at = (column, line) if self.transposed else (line, column)
            self.out.send(out_args, staging, chunk, expert * each + row, (expert + 1) * each, at, 0, consumer)

    def finish(self, consumer) -> None:
        finish_stores()


class WeightGrad:
    def __init__(self, *, tile: Tile, dtype: type[cutlass.Numeric], transposed: bool, add: bool) -> None:
        self.epilogue = (
            WeightGradAdd(tile_n=tile.n, transposed=transposed)
            if add
            else WeightGradEpilogue(dtype=dtype, tile_n=tile.n, transposed=transposed)
        )
        counter = Counter.UP_WEIGHT_GRAD if transposed else Counter.DOWN_WEIGHT_GRAD
        self.gemm = RowReduction(tile=tile, dtype=dtype, epilogue=self.epilogue, ticket=counter)

    @cute.jit
    def __call__(
        self,
        tokens: cute.Tensor,
        rows: cute.Tensor,
        offsets: cute.Tensor,
        tickets: cute.Tensor,
        row_token: cute.Tensor,
        out: cute.Tensor,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        count, columns = rows.shape
        experts, each, width = out.shape
        b = cute.make_tensor(rows.iterator, cute.make_layout((columns, count), stride=(1, rows.stride[0])))
        flat = cute.make_tensor(out.iterator, cute.make_layout((experts * each, width, 1), stride=(out.stride[1], 1, width)))
        self.gemm.launch(
            tokens,
            row_token,
            b,
            offsets,
            tickets,
            cute.ceil_div(columns, self.gemm.tile.n),
            (self.epilogue.prepare(flat), each),
            blocks,
            stream,
        )


def trace(*, dtype: str, transposed: bool, tile: str, add: bool = False):
    """The kernel of one variant and the arguments to compile it with, for cute_runtime."""
    element = DTYPES[dtype]
    tokens, rows, experts, offsets = (cute.sym_int() for _ in range(4))
    width, columns = (cute.sym_int(divisibility=8) for _ in range(2))
    fake = (
        row_major(element, tokens, width),
        row_major(element, rows, columns),
        row_major(cutlass.Int32, offsets),
        tickets_of_plan(),
        row_major(cutlass.Int32, rows),
        row_major(cutlass.Float32 if add else element, experts, *((columns, width) if transposed else (width, columns))),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return WeightGrad(tile=TILES[tile], dtype=element, transposed=transposed, add=add), fake
