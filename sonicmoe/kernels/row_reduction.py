"""The main loop of the weights' gradients: out[e] = A[tokens of e's rows]^T @ B[rows of e], the reduction over an expert's rows.

The roles, barriers and the ring are those of grouped_gemm.py. What differs:

* a tile is (expert, m columns of A, n columns of B); every expert has ceil(M / m) x ceil(N / n) of them, those without rows too,
  whose gradient is zero. A record has five numbers: (expert, first row, end of the rows, tile of B's columns, first column of A).
* a stage is 64 rows of both operands, each as it lies in memory, so wgmma reads both with the rows across: A as blocks of
  64 columns x 64 rows, B as two boxes of n columns x 32 rows, every row of a block 128 bytes in the 128-byte swizzle.
* gathered A: eight lanes a row of a block; a row's token is loaded one stage ahead.
* rows beyond the expert's end: A's are zeroed by cp.async; B's box brings rows of the next expert, or what nobody wrote, where
  zero times NaN would be NaN, so the consumers overwrite them with zeros before the products of a tile's last stage: named
  barriers 6 to 8, the threads of the consumers that have columns of A.
* two blocks of a cluster take neighbouring columns of A and share B's.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from sonicmoe.kernels import ptx
from sonicmoe.kernels.grouped_gemm import GATHER_WARPS, GroupedGemm
from sonicmoe.kernels.scheduler import next_slot, read_tile
from sonicmoe.kernels.tiles import TILE_K, Tile

TAIL_BARRIER = 6
"""Named barriers 6 to 8: where one, two or three consumers meet. Of their own, because a consumer without columns may be a tile ahead,
and two numbers of threads at one barrier are an illegal instruction."""

BLOCK_BYTES = 64 * TILE_K * 2
"""One block of A: 64 columns x 64 rows."""


class RowReduction(GroupedGemm):
    """A gathered by row_token from (T, M), B (N, R) with its columns contiguous, out written by ``epilogue``."""

    record = 5
    over_rows = True

    def __init__(self, *, tile: Tile, dtype: type[cutlass.Numeric], epilogue, ticket: int) -> None:
        if tile.pingpong:
            raise ValueError(f"{tile.name}: a reduction over rows has stages by the expert and takes no ping-pong")
        super().__init__(tile=tile, dtype=dtype, gather=True, gated=False, epilogue=epilogue, ticket=ticket, transposed_b=True)

    def _layout_a(self):
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.MN_SW128, self.dtype)
        return cute.tile_to_shape(atom, (self.tile.m, TILE_K, self.tile.stages), order=(1, 0, 2))

    def _first(self):
        return (Int32(0),)

    def _count(self, walk):
        return walk[0]

    @cute.jit
    def _find(self, walk: tuple, wanted: Int32, offsets: cute.Tensor, column_tiles: Int32, width: Int32, rank: Int32):
        """All tiles of an expert before the next one's; its columns of A vary fastest."""
        lines = cute.ceil_div(width, const_expr(self.tile.m * self.tile.cluster))
        expert = wanted // (lines * column_tiles)
        rest = wanted - expert * (lines * column_tiles)
        column = rest // lines
        line = ((rest - column * lines) * self.tile.cluster + rank) * self.tile.m
        start = Int32(0)
        end = Int32(0)
        if expert < offsets.shape[0] - 1:
            start = offsets[expert]
            end = offsets[expert + 1]
        else:
            expert = Int32(-1)
        return ((offsets.shape[0] - 1) * lines * column_tiles,), (expert, start, end, column, line)

    def _k_tiles(self, record, width):
        return cute.ceil_div(record[2] - record[1], TILE_K)

    def _outputs(self, record, width):
        return record[4], width

    def _boxes(self, tma_b, b, shared_b, record: tuple, rank) -> list[tuple]:
        source = cute.local_tile(cute.domain_offset((0, record[1]), b), (self.tile.n, TILE_K // 2), (record[3], None))
        box = cpasync.tma_partition(tma_b, 0, cute.make_layout(1), cute.group_modes(shared_b, 0, 2), cute.group_modes(source, 0, 2))
        return [(*box, half) for half in ((0, 1) if self.tile.cluster == 1 else (rank,))]

    @cute.jit
    def _gather(self, a, row_token, ring: tuple, warp: Int32, inputs: tuple):
        """Warps 1-3: passes of 4 rows in turn, eight lanes the 128 bytes of a row in each block of 64 columns."""
        tile = self.tile
        _, shared_a, _, full, empty = inputs
        passes = const_expr(TILE_K // 4)
        turns = const_expr((passes + GATHER_WARPS - 1) // GATHER_WARPS)  # of each warp; the last one only of the first warps
        line = warp * 4 + cute.arch.lane_idx() // 8
        piece = cute.arch.lane_idx() % 8
        width = a.shape[1]
        first = shared_a.toint() + line * 128 + ((piece ^ (line % 8)) * 16)
        begins = cute.make_rmem_tensor((turns,), Int32)  # where this lane's pieces of its rows begin, in units of 16 bytes
        wanted = cute.make_rmem_tensor((tile.m // 64,), Int32)

        stage = Int32(0)
        phase = Int32(0)
        slot = Int32(0)
        lap = Int32(0)
        record = read_tile(*ring, slot, lap)
        while record[0] >= 0:
            row = record[1] + line
            row_end = record[2]
            column = record[4] // 8 + piece
            for block in cutlass.range_constexpr(tile.m // 64):
                wanted[block] = Int32(16) if (column + block * 8) * 8 < width else Int32(0)
            self._find_rows(begins, row_token, row, row_end, column, width)
            for _ in cutlass.range(self._k_tiles(record, width), unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                # A warp's rows are 12 apart, so the swizzle of a lane takes two values in turn.
                even = first + stage * (tile.m * TILE_K * 2)
                odd = even ^ 64
                for i in cutlass.range_constexpr(turns):
                    at = (odd if const_expr(i % 2) else even) + const_expr(i * GATHER_WARPS * 4 * 128)
                    if const_expr((i + 1) * GATHER_WARPS <= passes):
                        self._copy_row(a, at, begins[i], wanted)
                    else:
                        if warp < const_expr(passes % GATHER_WARPS):
                            self._copy_row(a, at, begins[i], wanted)
                cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                row += TILE_K
                self._find_rows(begins, row_token, row, row_end, column, width)
                stage += 1
                if stage == tile.stages:
                    stage = Int32(0)
                    phase ^= 1
            slot, lap = next_slot(slot, lap, 1)
            record = read_tile(*ring, slot, lap)

    @cute.jit
    def _find_rows(self, begins: cute.Tensor, row_token: cute.Tensor, row: Int32, row_end: Int32, column: Int32, width: Int32):
        """Where this lane's pieces of the rows row, row + 12, ... begin; -1 beyond the expert's end."""
        for i in cutlass.range_constexpr(cute.size(begins)):
            mine = row + const_expr(i * GATHER_WARPS * 4)
            begins[i] = Int32(-1)
            if mine < row_end:
                begins[i] = row_token[mine] * (width // 8) + column

    @cute.jit
    def _copy_row(self, a: cute.Tensor, at: Int32, begin: Int32, wanted: cute.Tensor):
        """One piece of a row in each block of 64 columns; zeros for a row beyond the expert's end and a column beyond the last."""
        inside = begin >= 0
        source = a.iterator.toint() + Int64(cutlass.select_(inside, begin, Int32(0))) * 16
        for block in cutlass.range_constexpr(cute.size(wanted)):
            size = cutlass.select_(inside, wanted[block], Int32(0))
            ptx.copy_16_bytes_async(at + const_expr(block * BLOCK_BYTES), source + const_expr(block * 128), size)

    @cute.jit
    def _clear_tail(self, tail: tuple, stage: Int32, k: Int32):
        """By the consumers that have columns of A, 64 each: the others read nothing and need not come to the barrier."""
        tile = self.tile
        pointer, rows, columns = tail
        inside = rows - k * TILE_K
        if inside < TILE_K:
            consumers = cutlass.min(cute.ceil_div(columns, 64), self.group_size)
            threads = consumers * 128
            piece = cute.arch.thread_idx()[0] - 128  # of 16 bytes, 8 a line
            begin = pointer.toint() + stage * (tile.n * TILE_K * 2)
            # Not unrolled: with the accumulators there are no registers for the addresses of all turns.
            for _ in cutlass.range(cute.ceil_div(const_expr(tile.n * 8), threads), unroll=1):
                line = piece // 8  # of 64 rows of each block of 64 columns
                row = line % TILE_K
                block = line // TILE_K
                if (row >= inside) & (block < tile.n // 64):
                    at = begin + (row // 32) * (tile.n * 64) + block * (BLOCK_BYTES // 2) + (row % 32) * 128 + (piece % 8) * 16
                    ptx.store_16_zero_bytes(at)
                piece += threads
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.barrier(barrier_id=TAIL_BARRIER + consumers - 1, number_of_threads=threads)
