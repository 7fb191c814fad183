"""Up-projection: z[row] = w_up[e] @ x[token of row] (+ b_up[e]), a[row] = activation(z[row]), rows of x gathered while loading.

    x (T, H) --cp.async by row_to_token-->  A tile m x 64 --+
                                                            +-- wgmma, H/64 stages --> n columns of z --> a (R, I)
    w_up (E, 2I, H) ------TMA, multicast--> B tile n x 64 --+                          (float32)    '--> z (R, 2I), training only

``transposed`` weights are stored (E, H, 2I); interleaved ones of them have an epilogue of their own, epilogue_paired.py.
FLOPs 4 R H I (gated). Bytes from memory: w_up once for every expert with rows, x once, a and z once:
2 (2 E H I + T H + R I + 2 R I); the floor is the larger of FLOPs / measured matrix rate and bytes / measured copy bandwidth.
Bytes a stage reads from L2 over its multiplying cycles decide the tile; tiles.py holds the table. Roles, barriers and arrive counts:
grouped_gemm.py.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.runtime import make_fake_stream

from sonicmoe.kernels.epilogue import ProjectionEpilogue
from sonicmoe.kernels.epilogue_paired import PairedEpilogue
from sonicmoe.kernels.fake import DTYPES, row_major, tickets_of_plan
from sonicmoe.kernels.grouped_gemm import GroupedGemm
from sonicmoe.kernels.scheduler import Counter
from sonicmoe.kernels.tiles import TILES, Tile


class UpProjection:
    def __init__(
        self,
        *,
        tile: Tile,
        dtype: type[cutlass.Numeric],
        activation: str,
        interleaved: bool,
        store_z: bool,
        bias: bool,
        transposed: bool,
    ) -> None:
        self.transposed = transposed
        self.paired = transposed and interleaved
        options = {"dtype": dtype, "tile_n": tile.n, "activation": activation, "store_z": store_z, "bias": bias}
        self.epilogue = PairedEpilogue(**options) if self.paired else ProjectionEpilogue(**options, interleaved=interleaved)
        self.gemm = GroupedGemm(
            tile=tile,
            dtype=dtype,
            gather=True,
            gated=self.epilogue.gated and not self.paired,
            epilogue=self.epilogue,
            ticket=Counter.UP,
            transposed_b=transposed,
            has_dependents=True,
        )

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        w_up: cute.Tensor,
        b_up: cute.Tensor | None,
        offsets: cute.Tensor,
        tickets: cute.Tensor,
        row_token: cute.Tensor,
        a: cute.Tensor,
        z: cute.Tensor | None,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        hidden, rows = (w_up.shape[1], w_up.shape[2]) if const_expr(self.transposed) else (w_up.shape[2], w_up.shape[1])
        parts = const_expr(2 if self.epilogue.gated else 1)
        columns = rows // parts
        interleaved = const_expr(self.epilogue.interleaved)
        # One step along the outputs, the reduction, from gate to up, and to the next expert.
        shape, stride = (columns, hidden, parts, w_up.shape[0]), (hidden, 1, hidden * columns, w_up.stride[0])
        if const_expr(self.paired):
            shape, stride = (rows, hidden, 1, w_up.shape[0]), (1, rows, rows, w_up.stride[0])
        elif const_expr(self.transposed):
            stride = (1, rows, columns, w_up.stride[0])
        elif const_expr(interleaved):
            stride = (hidden * parts, 1, hidden, w_up.stride[0])
        weight = cute.make_tensor(w_up.iterator, cute.make_layout(shape, stride=stride))
        out = cute.make_tensor(a.iterator, cute.make_layout((a.shape[0], columns, 1), stride=(a.stride[0], 1, columns)))
        pre = None
        if const_expr(z is not None):
            z_parts = const_expr(1 if interleaved else parts)
            z_columns = rows // z_parts
            pre = cute.make_tensor(z.iterator, cute.make_layout((z.shape[0], z_columns, z_parts), stride=(z.stride[0], 1, z_columns)))
        bias = None
        if const_expr(b_up is not None):
            bias = cute.make_tensor(
                b_up.iterator,
                cute.make_layout(
                    (columns, parts, w_up.shape[0]),
                    stride=(parts, 1, b_up.stride[0]) if const_expr(interleaved) else (1, columns, b_up.stride[0]),
                ),
            )
        self.gemm.launch(
            x,
            row_token,
            weight,
            offsets,
            tickets,
            cute.ceil_div(columns, self.epilogue.columns),
            self.epilogue.prepare(out, pre, bias),
            blocks,
            stream,
        )


def trace(
    *,
    dtype: str,
    activation: str,
    interleaved: bool,
    store_z: bool,
    bias: bool,
    tile: str,
    transposed: bool = False,
):
    """The kernel of one variant and the arguments to compile it with, for cute_runtime."""
    element = DTYPES[dtype]
    kernel = UpProjection(
        tile=TILES[tile],
        dtype=element,
        activation=activation,
        interleaved=interleaved,
        store_z=store_z,
        bias=bias,
        transposed=transposed,
    )

    tokens, rows, experts, offsets = (cute.sym_int() for _ in range(4))
    hidden, columns, z_columns = (cute.sym_int(divisibility=8) for _ in range(3))
    fake = (
        row_major(element, tokens, hidden),
        row_major(element, experts, *((hidden, z_columns) if transposed else (z_columns, hidden))),
        row_major(element, experts, z_columns) if bias else None,
        row_major(cutlass.Int32, offsets),
        tickets_of_plan(),
        row_major(cutlass.Int32, rows),
        row_major(element, rows, columns),
        row_major(element, rows, z_columns) if store_z else None,
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return kernel, fake
