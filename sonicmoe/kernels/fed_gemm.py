"""The main loop of an epilogue that reads a tensor as large as it writes: its input comes through the ring, behind the operands.

A tile of m x n of the activation's backward reads m rows of z, up to 128 KiB that nobody can hold in registers while products run. So a
tile's stages go on behind its products: ``input_stages`` more of them hold z in boxes of m rows x 64 columns in the 128-byte swizzle,
the first box of a stage where A's tile lies, the others where B's does::

    stage   0 .. k-1          products                 full[s], empty[s] as in grouped_gemm.py
            k .. k+inputs-1   1 + n // m boxes of z    full[s] by TMA for a tile whose m rows are all the expert's; else the gathering
                              each                     warps copy the rows there are and put zeros where there are none

They are loaded while the last products run, so that the latency of memory is hidden; the consumers compute on shared memory, write
dz over z in place, and the stage is free when the TMA unit has read it. In the meantime the operands of the next tile's first
stages arrive. A tail's rows come by cp.async because a box would bring rows of the next expert, which another block may be
overwriting with its dz.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from sonicmoe.kernels import ptx
from sonicmoe.kernels.epilogue_backward import ActivationBackwardEpilogue, box_layout
from sonicmoe.kernels.grouped_gemm import GATHER_WARPS, GroupedGemm
from sonicmoe.kernels.tiles import TILE_K, Tile


class FedGemm(GroupedGemm):
    """Gathered A, consumers of 64 rows each, and an epilogue whose input is boxes (epilogue_backward.py)."""

    arrivals = 32

    def __init__(
        self, *, tile: Tile, dtype: type[cutlass.Numeric], epilogue: ActivationBackwardEpilogue, ticket: int, transposed_b: bool
    ) -> None:
        if tile.pingpong or tile.m != 64 * tile.consumers:
            raise ValueError(f"{tile.name}: an input through the stages needs consumers that share the tile, 64 rows each")
        super().__init__(tile=tile, dtype=dtype, gather=True, gated=False, epilogue=epilogue, ticket=ticket, transposed_b=transposed_b)
        self.input_stages = epilogue.input_stages

    @cute.jit
    def _give_back(self, empty: cute.Pointer, stage: Int32):
        """As `_release`, of a stage that the lanes have read and written themselves: each arrives for itself. One lane behind a __syncwarp
        would do too, but compute-sanitizer's racecheck does not follow that order."""
        cute.arch.mbarrier_arrive(empty + stage)
        if const_expr(self.tile.cluster > 1):
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive(empty + stage, cute.arch.block_idx_in_cluster() ^ 1, self.arrivals)

    def _box_at(self, inputs: tuple, box: int, stage):
        """Where the ``box``-th box of a stage begins."""
        if box == 0:
            return inputs[1] + stage * const_expr(self.tile.m * TILE_K)
        return inputs[2] + (stage * const_expr(self.tile.n * TILE_K) + const_expr((box - 1) * self.tile.m * TILE_K))

    @cute.jit
    def _next(self, stage: Int32, phase: Int32):
        stage += 1
        if stage == self.tile.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    @cute.jit
    def _load_input(self, inputs: tuple, stage, phase, row, row_end, column):
        tile = self.tile
        epilogue_args, _, _, full, empty = inputs
        atom, tensor, _ = epilogue_args[0]
        layout = box_layout(self.dtype, tile.m)
        whole = row + tile.m <= row_end
        per_stage = const_expr(self.epilogue.boxes_per_stage)
        for number in cutlass.range(self.input_stages, unroll=1):
            cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
            arriving = Int32(0)
            if whole:
                arriving = cutlass.min(self.epilogue.boxes - number * per_stage, per_stage) * const_expr(tile.m * TILE_K * 2)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, arriving)
            for place in cutlass.range_constexpr(per_stage):
                box = number * per_stage + place
                if whole & (box < self.epilogue.boxes):
                    pointer = self._box_at(inputs, place, stage)
                    shared = cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=self.dtype), layout.outer)
                    part = const_expr(place % self.epilogue.boxes_per_unit)
                    at = (row, self.epilogue.column_of_box(box, column))
                    source = cute.local_tile(cute.domain_offset(at, tensor[None, None, part]), (tile.m, TILE_K), (0, 0))
                    to_shared, from_memory = cpasync.tma_partition(
                        atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(source, 0, 2)
                    )
                    cute.copy(atom, from_memory, to_shared, tma_bar_ptr=full + stage)
            stage, phase = self._next(stage, phase)
        return stage, phase

    @cute.jit
    def _gather_input(self, inputs: tuple, stage, phase, record: tuple, warp: Int32):
        """Rows of a tail, passes of 4 as in `_gather`; of a whole tile only the arrivals."""
        tile = self.tile
        epilogue_args, _, _, full, empty = inputs
        _, _, z = epilogue_args[0]
        row, row_end, column = record[1], record[2], record[3]
        tail = (row < row_end) & (row + tile.m > row_end)
        piece = cute.arch.lane_idx() % 8
        per_stage = const_expr(self.epilogue.boxes_per_stage)
        for number in cutlass.range(self.input_stages, unroll=1):
            cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
            if tail:
                for turn in cutlass.range(warp, const_expr(tile.m // 4), GATHER_WARPS, unroll=1):
                    line = turn * 4 + cute.arch.lane_idx() // 8
                    mine = cutlass.min(row + line, row_end - 1)
                    source = z.iterator.toint() + Int64(mine) * (z.stride[0] * 2)
                    at = line * (TILE_K * 2) + ((piece ^ (line % 8)) * 16)
                    for place in cutlass.range_constexpr(per_stage):
                        box = number * per_stage + place
                        first = self.epilogue.column_of_box(box, column) + piece * 8
                        inside = (row + line < row_end) & (box < self.epilogue.boxes) & (first < z.shape[1])
                        wanted = cutlass.select_(inside, Int32(16), Int32(0))
                        part = const_expr(place % self.epilogue.boxes_per_unit)
                        begin = Int64(part) * z.stride[2] + cutlass.select_(inside, first, Int32(0))
                        ptx.copy_16_bytes_async(self._box_at(inputs, place, stage).toint() + at, source + begin * 2, wanted)
            cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
            stage, phase = self._next(stage, phase)
        return stage, phase

    def _begin(self, epilogue_args: tuple, row, row_end):
        return self.epilogue.begin(epilogue_args, row, row_end)

    @cute.jit
    def _store(self, accumulators, inputs: tuple, held: tuple, where: tuple, stage, phase, staging, consumer):
        """A stage is given back one unit of columns later than its last one is on its way to memory, so that nobody waits for that."""
        epilogue = self.epilogue
        epilogue_args, _, _, full, empty = inputs
        _, row, end, column = where
        last = stage
        for unit in cutlass.range_constexpr(epilogue.units):
            begins = const_expr(unit * epilogue.boxes_per_unit % epilogue.boxes_per_stage == 0)
            if const_expr(begins):
                if const_expr(unit > 0):
                    stage, phase = self._next(stage, phase)
                cute.arch.mbarrier_wait(full + stage, phase)
            first = const_expr(unit * epilogue.boxes_per_unit % epilogue.boxes_per_stage)
            boxes = [self._box_at(inputs, first + i, stage) + consumer * const_expr(64 * TILE_K) for i in range(epilogue.boxes_per_unit)]
            epilogue.compute(accumulators, unit, epilogue_args, held, boxes, staging)
            epilogue.send(unit, epilogue_args, boxes, staging, row, end, column)
            if const_expr(begins and unit > 0):
                epilogue.wait_until_read(1)
                self._give_back(empty, last)
            last = stage
        epilogue.wait_until_read(0)
        self._give_back(empty, last)
        epilogue.store_sums(epilogue_args, held, row, end, column)
        return self._next(stage, phase)
