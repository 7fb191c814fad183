"""Gradient of the rows of x: dx_row[row] = dz[row] @ w_up[e], to be summed over each token's rows by gather_sum.

    dz (R, Z) ---------------TMA----------> A tile m x 64 --+
                                                            +-- wgmma, Z/64 stages --> n columns of dx rows (R, H), written once
    w_up (E, Z, H) ----TMA, multicast-----> B tile 64 x n --+                          (float32)

Z is 2I for a gated activation, else I; gate and up need not be told apart, dz's columns lie as w_up's rows do. The columns of
the output are contiguous in w_up, the reduction is not: wgmma reads B as it lies. ``transposed`` weights, stored (E, H, Z), are the
other way round.
FLOPs 2 R Z H. Bytes from memory: w_up once for every expert with rows, dz and the result once: 2 (E Z H + R Z + R H).
Roles, barriers and arrive counts: grouped_gemm.py.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_fake_stream

from sonicmoe.kernels.epilogue import ProjectionEpilogue
from sonicmoe.kernels.fake import DTYPES, row_major, tickets_of_plan
from sonicmoe.kernels.grouped_gemm import GroupedGemm, weight_tensor
from sonicmoe.kernels.scheduler import Counter
from sonicmoe.kernels.tiles import TILES, Tile


class DxRows:
    def __init__(self, *, tile: Tile, dtype: type[cutlass.Numeric], transposed: bool) -> None:
        self.transposed = transposed
        self.epilogue = ProjectionEpilogue(dtype=dtype, tile_n=tile.n, activation="identity", interleaved=False, store_z=False, bias=False)
        self.gemm = GroupedGemm(
            tile=tile, dtype=dtype, gather=False, gated=False, epilogue=self.epilogue, ticket=Counter.DX, transposed_b=not transposed
        )

    @cute.jit
    def __call__(
        self,
        dz: cute.Tensor,
        w_up: cute.Tensor,
        offsets: cute.Tensor,
        tickets: cute.Tensor,
        out: cute.Tensor,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        weight = weight_tensor(w_up, reduced_last=self.transposed)
        hidden = weight.shape[0]
        rows = cute.make_tensor(out.iterator, cute.make_layout((out.shape[0], hidden, 1), stride=(out.stride[0], 1, hidden)))
        self.gemm.launch(
            dz,
            None,
            weight,
            offsets,
            tickets,
            cute.ceil_div(hidden, self.gemm.tile.n),
            self.epilogue.prepare(rows, None, None),
            blocks,
            stream,
        )


def trace(*, dtype: str, tile: str, transposed: bool = False):
    """The kernel of one variant and the arguments to compile it with, for cute_runtime."""
    element = DTYPES[dtype]
    rows, experts, offsets = (cute.sym_int() for _ in range(3))
    hidden, reduced = (cute.sym_int(divisibility=8) for _ in range(2))
    fake = (
        row_major(element, rows, reduced),
        row_major(element, experts, *((hidden, reduced) if transposed else (reduced, hidden))),
        row_major(cutlass.Int32, offsets),
        tickets_of_plan(),
        row_major(element, rows, hidden),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return DxRows(tile=TILES[tile], dtype=element, transposed=transposed), fake
