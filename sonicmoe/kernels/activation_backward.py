"""Back through score, down-projection and activation: da = dout[token of row] @ w_down[e], and everything that follows from it.

    dout (T, H) ---cp.async by row_to_token--> A tile m x 64 --+
                                                               +-- wgmma, H/64 stages --> n columns of da (R, I)   (float32)
    w_down (E, H, I) -------TMA, multicast---> B tile 64 x n --+                             |
    z (R, Z) ---TMA, a tail's rows by cp.async---> boxes m x 64 in the stages behind ------> epilogue
    score (R,), by slot --------------------------------------------------------------------'  |
        a = act(z)   dz = score * da * act'(z) --> dz (R, Z)   score * a --> scaled_a (R, I)   row sum of da * a --> partial (tiles, R)

a is recomputed from the stored z, so neither a nor y is kept for backward. ``partial`` has one row for each tile of columns, added
up in a fixed order by score_grad.py. FLOPs 2 R H I. Bytes from memory: w_down once for every expert with rows, dout and z
once, dz and scaled_a once: 2 (E H I + T H + 2 R Z + R I) + 4 R I / n.
``transposed`` weights are stored (E, I, H). Roles, barriers and arrive counts of the main loop: grouped_gemm.py, and of
the stages of z: fed_gemm.py.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.runtime import make_fake_stream

from sonicmoe.kernels.epilogue_backward import ActivationBackwardEpilogue
from sonicmoe.kernels.fake import DTYPES, row_major, tickets_of_plan
from sonicmoe.kernels.fed_gemm import FedGemm
from sonicmoe.kernels.grouped_gemm import weight_tensor
from sonicmoe.kernels.scheduler import Counter
from sonicmoe.kernels.tiles import TILES, Tile


class ActivationBackward:
    def __init__(
        self,
        *,
        tile: Tile,
        dtype: type[cutlass.Numeric],
        activation: str,
        interleaved: bool,
        dz: bool,
        dscore: bool,
        scaled_a: bool,
        transposed: bool,
    ) -> None:
        self.transposed = transposed
        self.epilogue = ActivationBackwardEpilogue(
            tile=tile, dtype=dtype, activation=activation, interleaved=interleaved, dz=dz, dscore=dscore, scaled_a=scaled_a
        )
        self.gemm = FedGemm(tile=tile, dtype=dtype, epilogue=self.epilogue, ticket=Counter.ACTIVATION_BACKWARD, transposed_b=not transposed)

    @cute.jit
    def __call__(
        self,
        dout: cute.Tensor,
        w_down: cute.Tensor,
        z: cute.Tensor,
        score: cute.Tensor,
        offsets: cute.Tensor,
        tickets: cute.Tensor,
        row_token: cute.Tensor,
        row_slot: cute.Tensor,
        dz: cute.Tensor | None,
        scaled_a: cute.Tensor | None,
        partial: cute.Tensor | None,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        weight = weight_tensor(w_down, reduced_last=self.transposed)
        columns = weight.shape[0]
        parts = const_expr(2 if self.epilogue.gated and not self.epilogue.interleaved else 1)
        rows, width = z.shape
        layout = cute.make_layout((rows, width // parts, parts), stride=(z.stride[0], 1, width // parts))
        gradient = None
        if const_expr(dz is not None):
            gradient = cute.make_tensor(dz.iterator, layout)
        scaled = None
        if const_expr(scaled_a is not None):
            scaled = cute.make_tensor(scaled_a.iterator, cute.make_layout((rows, columns, 1), stride=(scaled_a.stride[0], 1, columns)))
        self.gemm.launch(
            dout,
            row_token,
            weight,
            offsets,
            tickets,
            cute.ceil_div(columns, self.gemm.tile.n),
            self.epilogue.prepare(cute.make_tensor(z.iterator, layout), score, row_slot, gradient, scaled, partial),
            blocks,
            stream,
        )


def trace(*, dtype: str, activation: str, interleaved: bool, dz: bool, dscore: bool, scaled_a: bool, tile: str, transposed: bool = False):
    """The kernel of one variant and the arguments to compile it with, for cute_runtime."""
    element = DTYPES[dtype]
    kernel = ActivationBackward(
        tile=TILES[tile],
        dtype=element,
        activation=activation,
        interleaved=interleaved,
        dz=dz,
        dscore=dscore,
        scaled_a=scaled_a,
        transposed=transposed,
    )
    tokens, rows, experts, offsets, tiles = (cute.sym_int() for _ in range(5))
    hidden, columns, width = (cute.sym_int(divisibility=8) for _ in range(3))
    fake = (
        row_major(element, tokens, hidden),
        row_major(element, experts, *((columns, hidden) if transposed else (hidden, columns))),
        row_major(element, rows, width),
        row_major(cutlass.Float32, rows),
        row_major(cutlass.Int32, offsets),
        tickets_of_plan(),
        row_major(cutlass.Int32, rows),
        row_major(cutlass.Int32, rows),
        row_major(element, rows, width) if dz else None,
        row_major(element, rows, columns) if scaled_a else None,
        row_major(cutlass.Float32, tiles, rows) if dscore else None,
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return kernel, fake
