"""The weights' gradient added into a float32 buffer, as trainers with float32 main gradients want it: out += accumulator.

Nothing is rounded to 16 bits on the way. Each element belongs to one tile and is added once a launch, by the TMA unit or, in a block
that is cut off at the end, by a load, an addition and a store: no order of additions is left to chance.

Chunks of 64 rows x 32 columns (or, transposed, of 32 rows x 64 columns as two boxes side by side) go through shared memory, rows of
128 bytes in the TMA's swizzle, two buffers deep.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from sonicmoe.kernels import ptx
from sonicmoe.kernels.epilogue import BUFFER_BYTES, STORE_BARRIER, acquire_buffer, finish_stores
from sonicmoe.kernels.tiles import STORE_BUFFERS

COLUMNS = 32
"""float32 of one row of a box: 128 bytes."""


class WeightGradAdd:
    """out (E, rows, columns) float32, seen as (E * rows, columns, 1), += accumulator."""

    def __init__(self, *, tile_n: int, transposed: bool) -> None:
        self.tile_n = tile_n
        self.transposed = transposed
        self.rows = 32 if transposed else 64  # of a box

    def _layout(self):
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, Float32)
        return cute.tile_to_shape(atom, (self.rows, COLUMNS), order=(0, 1))

    def prepare(self, out: cute.Tensor) -> tuple:
        """What the kernel needs to add into ``out`` (rows, columns, 1)."""
        atom, tensor = cpasync.make_tiled_tma_atom(cpasync.CopyReduceBulkTensorTileS2GOp(), out, self._layout(), (self.rows, COLUMNS))
        return atom, tensor, out

    def store(self, accumulators, block: int, args: tuple, expert, line, lines, column_tile, staging, consumer):
        """As `WeightGradEpilogue.store`."""
        out_args, each = args
        base = block * self.tile_n // 2
        for chunk in range(self.tile_n // 32):
            acquire_buffer(chunk, consumer)
            self._put(accumulators, base + chunk * 16, staging, chunk)
            column = column_tile * self.tile_n + chunk * 32
            row, at = (column, line) if self.transposed else (line, column)
            self._send(out_args, staging, chunk, expert * each + row, (expert + 1) * each, at, consumer)

    def _put(self, accumulators, first: int, staging: cute.Pointer, chunk: int) -> None:
        """32 columns of the accumulator to the chunk's buffer."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        quarter = lane % 4
        buffer = staging.toint() + chunk % STORE_BUFFERS * BUFFER_BYTES
        for group in range(4):
            for half in range(2):
                pair = [accumulators[first + group * 4 + half * 2 + i] for i in range(2)]
                if not self.transposed:
                    row = warp * 16 + half * 8 + lane // 4
                    piece = 2 * group + quarter // 2
                    ptx.store_8_bytes(buffer + row * 128 + ((piece ^ (row % 8)) * 16) + (quarter % 2) * 8, *map(ptx.bits, pair))
                    continue
                column = (warp % 2) * 16 + half * 8 + lane // 4
                box = buffer + (warp // 2) * (BUFFER_BYTES // 2)
                for i in range(2):
                    row = group * 8 + 2 * quarter + i
                    ptx.store_4_bytes(box + row * 128 + (((column // 4) ^ (row % 8)) * 16) + (column % 4) * 4, ptx.bits(pair[i]))

    @cute.jit
    def _send(
        self,
        args: tuple,
        staging: cute.Pointer,
        chunk: cutlass.Constexpr[int],
        row: Int32,
        row_end: Int32,
        column: Int32,
        consumer: Int32,
    ):
        """The chunk's boxes to rows [row, min(row + rows, row_end)), columns from ``column`` on."""
        atom, tensor, out = args
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        layout = self._layout()
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=STORE_BARRIER + consumer, number_of_threads=128)
        for box in cutlass.range_constexpr(64 // self.rows):
            at = column + const_expr(box * COLUMNS)
            offset = const_expr(chunk % STORE_BUFFERS * BUFFER_BYTES + box * self.rows * 128)
            pointer = staging + const_expr(offset // 2)
            if row + self.rows <= row_end:
                if warp == 0:
                    shared = cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=Float32), layout.outer)
                    target = cute.local_tile(cute.domain_offset((row, at), tensor[None, None, 0]), (self.rows, COLUMNS), (0, 0))
                    to_shared, to_memory = cpasync.tma_partition(
                        atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(target, 0, 2)
                    )
                    cute.copy(atom, to_shared, to_memory)
            else:
                thread = cute.arch.thread_idx()[0] % 128
                for i in cutlass.range_constexpr(self.rows * 8 // 128):
                    line = (thread + i * 128) // 8
                    piece = thread % 8
                    if (row + line < row_end) & (at + piece * 4 < out.shape[1]):
                        destination = out.iterator.toint() + (Int64(row + line) * out.stride[0] + at + piece * 4) * 4
                        ptx.add_16_bytes_out(destination, pointer.toint() + line * 128 + ((piece ^ (line % 8)) * 16))
        if warp == 0:
            cute.arch.cp_async_bulk_commit_group()

    def finish(self, consumer) -> None:
        finish_stores()
