"""The up-projection's epilogue where gate and up alternate along the tile: interleaved weights stored (E, H, 2I).

TMA can take every second row of a weight, not every second column, so such a tile holds 2j = gate and 2j + 1 = up of n/2 outputs,
and a thread has whole pairs: z leaves as it is, but a thread's outputs lie four columns apart. Two lanes exchange one of every two
values, so that each has two neighbouring columns to store::

    lane % 4 =          0        1        2        3            0           1           2           3
    group 2p            a0       a1       a2       a3    -->    (a0, a1)    (a4, a5)    (a2, a3)    (a6, a7)
    group 2p + 1        a4       a5       a6       a7
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from sonicmoe.kernels import ptx
from sonicmoe.kernels.epilogue import BUFFER_BYTES, GATED, RowStore, acquire_buffer, finish_stores
from sonicmoe.kernels.tiles import STORE_BUFFERS


class PairedEpilogue:
    """accumulator (+ bias) -> z, stored when training; activation(gate, up) -> out."""

    gated = True
    interleaved = True

    def __init__(self, *, dtype: type[cutlass.Numeric], tile_n: int, activation: str, store_z: bool, bias: bool) -> None:
        self.dtype = dtype
        self.tile_n = tile_n
        self.activation = GATED[activation]
        self.store_z = store_z
        self.bias = bias
        self.columns = tile_n // 2  # of the output
        self.out = RowStore(dtype, 32)
        self.z = RowStore(dtype, 64)

    def prepare(self, out: cute.Tensor, z: cute.Tensor | None, bias: cute.Tensor | None) -> tuple:
        """out (rows, columns, 1); z (rows, 2 * columns, 1); bias (columns, 2, experts) with gate and up next to each other."""
        return (
            self.out.prepare(out),
            self.z.prepare(z) if const_expr(self.store_z) else None,
            bias if const_expr(self.bias) else None,
        )

    def store(self, accumulators, block: int, args: tuple, expert, row, row_end, column_tile, staging, consumer):
        """One block of 64 rows, as many of them as lie before ``row_end``."""
        out_args, z_args, bias = args
        base = block * self.tile_n // 2
        chunk = 0
        for start in range(0, self.tile_n // 8, 8):  # in groups of 8 columns of the tile
            first = base + start * 4
            column = column_tile * self.columns + start * 4
            if self.bias:
                self._add_bias(accumulators, first, bias, expert, column)
            if self.store_z:
                acquire_buffer(chunk, consumer)
                self.z.put(
                    lambda group, half, first=first: ptx.pack(
                        self.dtype, accumulators[first + group * 4 + half * 2], accumulators[first + group * 4 + half * 2 + 1]
                    ),
                    staging,
                    chunk,
                )
                self.z.send(z_args, staging, chunk, row, row_end, 2 * column, 0, consumer)
                chunk += 1
            acquire_buffer(chunk, consumer)
            self._put(accumulators, first, staging, chunk)
            self.out.send(out_args, staging, chunk, row, row_end, column, 0, consumer)
            chunk += 1

    def _put(self, accumulators, first: int, staging: cute.Pointer, chunk: int) -> None:
        """32 columns of the output to the chunk's buffer."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        buffer = staging.toint() + chunk % STORE_BUFFERS * BUFFER_BYTES
        quarter = lane % 4
        odd = quarter % 2 == 1
        # Of the 8 columns of two groups: 0 and 2 in the even lanes, 4 and 6 in the odd ones.
        mine = quarter + cutlass.select_(odd, Int32(3), Int32(0))
        for pair in range(4):
            for half in range(2):
                at = first + pair * 8 + half * 2
                low, high = (self.activation(accumulators[at + group * 4], accumulators[at + group * 4 + 1]) for group in range(2))
                taken = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, low, high), 1)
                packed = ptx.pack(self.dtype, cutlass.select_(odd, taken, low), cutlass.select_(odd, high, taken))
                line = warp * 16 + half * 8 + lane // 4
                ptx.store_4_bytes(self.out.address(buffer, line, Int32(pair)) + mine * 2, packed)

    @cute.jit
    def _add_bias(self, accumulators: cute.Tensor, first: cutlass.Constexpr[int], bias: cute.Tensor, expert: Int32, column: Int32):
        """Adds the bias of 32 outputs from ``column`` on, whose accumulators begin at ``first``."""
        own = bias.iterator.toint() + Int64(expert) * (bias.stride[2] * 2)
        for group in cutlass.range_constexpr(8):
            mine = column + group * 4 + cute.arch.lane_idx() % 4
            if mine < bias.shape[0]:
                gate, up = ptx.load_pair(self.dtype, own + Int64(mine) * 4)
                for half in cutlass.range_constexpr(2):
                    at = const_expr(first + group * 4 + half * 2)
                    accumulators[at] = accumulators[at] + gate
                    accumulators[at + 1] = accumulators[at + 1] + up

    def finish(self, consumer) -> None:
        finish_stores()
