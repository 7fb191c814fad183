"""Down-projection: y[row] = w_down[e] @ a[row] (+ b_down[e]); the rows of an expert lie next to each other.

    a (R, I) --------------TMA--------------> A tile m x 64 --+
                                                              +-- wgmma, I/64 stages --> n columns of y (R, H), written once
    w_down (E, H, I) ------TMA, multicast---> B tile n x 64 --+                          (float32)

FLOPs 2 R H I. Bytes from memory: w_down once for every expert with rows, a and y once: 2 (E H I + R I + R H). At small I the
writes of y bound it (I = 256: 4 stages of products for every 64 KiB tile of y), which is what ping-pong is for.
A box of A may run past the expert's last row into the next expert's; those rows are computed and not stored.
``transposed`` weights are stored (E, I, H). Roles, barriers and arrive counts: grouped_gemm.py.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.runtime import make_fake_stream

from sonicmoe.kernels.epilogue import ProjectionEpilogue
from sonicmoe.kernels.fake import DTYPES, row_major, tickets_of_plan
from sonicmoe.kernels.grouped_gemm import GroupedGemm, weight_tensor
from sonicmoe.kernels.scheduler import Counter
from sonicmoe.kernels.tiles import TILES, Tile


class DownProjection:
    def __init__(self, *, tile: Tile, dtype: type[cutlass.Numeric], bias: bool, transposed: bool) -> None:
        self.transposed = transposed
        self.epilogue = ProjectionEpilogue(dtype=dtype, tile_n=tile.n, activation="identity", interleaved=False, store_z=False, bias=bias)
        self.gemm = GroupedGemm(
            tile=tile,
            dtype=dtype,
            gather=False,
            gated=False,
            epilogue=self.epilogue,
            ticket=Counter.DOWN,
            transposed_b=transposed,
            waits_for_a=True,
            has_dependents=True,
        )

    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        w_down: cute.Tensor,
        b_down: cute.Tensor | None,
        offsets: cute.Tensor,
        tickets: cute.Tensor,
        y: cute.Tensor,
        blocks: Int32,
        dependent: Int32,
        stream: cuda.CUstream,
    ):
        weight = weight_tensor(w_down, reduced_last=not self.transposed)
        hidden, _, _, experts = weight.shape
        out = cute.make_tensor(y.iterator, cute.make_layout((y.shape[0], hidden, 1), stride=(y.stride[0], 1, hidden)))
        bias = None
        if const_expr(b_down is not None):
            bias = cute.make_tensor(b_down.iterator, cute.make_layout((hidden, 1, experts), stride=(1, hidden, b_down.stride[0])))
        self.gemm.launch(
            a,
            None,
            weight,
            offsets,
            tickets,
            cute.ceil_div(hidden, self.gemm.tile.n),
            self.epilogue.prepare(out, None, bias),
            blocks,
            stream,
            dependent,
        )


def trace(*, dtype: str, bias: bool, tile: str, transposed: bool = False):
    """The kernel of one variant and the arguments to compile it with, for cute_runtime."""
    element = DTYPES[dtype]
    rows, experts, offsets = (cute.sym_int() for _ in range(3))
    hidden, reduced = (cute.sym_int(divisibility=8) for _ in range(2))
    fake = (
        row_major(element, rows, reduced),
        row_major(element, experts, *((reduced, hidden) if transposed else (hidden, reduced))),
        row_major(element, experts, hidden) if bias else None,
        row_major(cutlass.Int32, offsets),
        tickets_of_plan(),
        row_major(element, rows, hidden),
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return DownProjection(tile=TILES[tile], dtype=element, bias=bias, transposed=transposed), fake
