"""The main loop of every grouped GEMM: out[rows of expert e] = A[rows of e] @ B[e]^T, written once.

Roles of one block (a warpgroup is 4 warps)::

    producers  warp 0  scheduler: walks the tiles, publishes records                     (scheduler.py)
               warp 1  TMA: the tile of weights, multicast to the cluster; dense A as well
               warps 2-3  gathered A: one row of x a lane group, 16 bytes a lane by cp.async; idle for dense A
    consumers  2 or 3 warpgroups: wgmma into registers, then the epilogue

Barriers, all in shared memory, with the arrivals that complete a phase::

    full[s]     1 (TMA warp, with the bytes it expects) + 64 (gathering lanes, when their copies have landed)
    empty[s]    4 warps of each consumer that reads the stage, x cluster: a stage is refilled by both blocks' multicast,
                so both blocks' consumers must have left it
    record full 1 (scheduler), record empty: each warp that reads the record

Shared tiles by row (co): consumer w multiplies rows [64 w, 64 w + 64) of each block of 64 x consumers rows; a consumer whose
64 rows are all beyond the expert's end only follows the barriers, so that a tail costs the tensor cores what it holds.
Ping-pong (pp): consumer w takes tiles w, w + 2, ...; while one stores, the other multiplies. The stages of a tile follow those
of the tile before it in the ring. A wait tells two neighbouring laps of the ring apart, not more, so a consumer may only wait
for its tile once the other has seen all of the tile before: named barriers 4 and 5, 256 threads (128 arrive, 128 wait).

A stage is a tile of m x 64 of A and n x 64 of B, each row 128 bytes in the 128-byte swizzle. B comes as two boxes of n/2 rows:
for a gated activation the gate's and the up projection's rows (whether they alternate in memory or not is a stride of the
tensor map), so that one thread holds column j of both; block r of a cluster of two loads box r for both blocks.

The last columns of the reduction are zero in both operands (TMA bounds, cp.async of 0 bytes). Rows beyond an expert's end are
computed from whatever is there and never stored.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from sonicmoe.kernels import ptx
from sonicmoe.kernels.scheduler import RECORD, publish_tiles, read_tile
from sonicmoe.kernels.tiles import SCHEDULE_SLOTS, TILE_K, Tile

SCHEDULER_WARP = 0
TMA_WARP = 1
GATHER_WARP = 2
GATHER_WARPS = 2

TURN_BARRIER = 4
"""Named barriers 4 and 5: the turn of consumer 0 and 1 under ping-pong."""


class GroupedGemm:
    """One grouped GEMM: ``tile``, where A comes from, how B is laid out, and an epilogue object.

    The epilogue has ``store(self, accumulators, args, where)`` called by each consumer warpgroup that has rows to store, and
    is a small part of its own (epilogue.py); ``args`` is a tuple of whatever its host half prepared.
    """

    def __init__(self, *, tile: Tile, dtype: type[cutlass.Numeric], gather: bool, gated: bool, epilogue) -> None:
        tile.check()
        self.tile = tile
        self.dtype = dtype
        self.gather = gather
        self.gated = gated
        self.epilogue = epilogue
        self.group_size = 1 if tile.pingpong else tile.consumers  # consumers that share a tile
        self.row_blocks = tile.rows_per_consumer // 64

    def _swizzled(self, rows: int):
        """Layout of (rows, 64, stages) in shared memory, 128-byte swizzle."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        return cute.tile_to_shape(atom, (rows, TILE_K, self.tile.stages), order=(0, 1, 2))

    @cute.jit
    def launch(
        self,
        a: cute.Tensor,
        row_token: cute.Tensor | None,
        b: cute.Tensor,
        offsets: cute.Tensor,
        column_tiles: Int32,
        epilogue_args: tuple,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        """a (rows, K); b (columns, K, parts, experts), parts 2 for a gated activation; offsets (experts + 1,) int32."""
        tile = self.tile
        layout_a = self._swizzled(tile.m)
        layout_b = self._swizzled(tile.n)
        box_b = (tile.n // 2, TILE_K)
        load = cpasync.CopyBulkTensorTileG2SOp() if const_expr(tile.cluster == 1) else cpasync.CopyBulkTensorTileG2SMulticastOp()
        tma_b, tensor_b = cpasync.make_tiled_tma_atom(
            load, b, cute.slice_(self._swizzled(tile.n // 2), (None, None, 0)), box_b
        )
        if const_expr(self.gather):
            tma_a, tensor_a = None, a
        else:
            tma_a, tensor_a = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(), a, cute.slice_(layout_a, (None, None, 0)), (tile.m, TILE_K)
            )
        tiled_mma = hopper.make_trivial_tiled_mma(
            self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, (self.group_size, 1, 1), tiler_mn=(64, tile.instruction_n)
        )

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, tile.stages]
            empty: cute.struct.MemRange[Int64, tile.stages]
            record_full: cute.struct.MemRange[Int64, SCHEDULE_SLOTS]
            record_empty: cute.struct.MemRange[Int64, SCHEDULE_SLOTS]
            records: cute.struct.MemRange[Int32, RECORD * SCHEDULE_SLOTS]
            a: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_a)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_b)], 1024]
            staging: cute.struct.Align[cute.struct.MemRange[self.dtype, tile.consumers * tile.store_buffers * 64 * 64], 1024]

        self.shared = Shared
        self.kernel(
            tma_a, tensor_a, row_token, tma_b, tensor_b, offsets, column_tiles, tiled_mma, layout_a, layout_b, epilogue_args
        ).launch(
            grid=[blocks, 1, 1],
            block=[tile.threads, 1, 1],
            cluster=[tile.cluster, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        tma_a: cute.CopyAtom | None,
        a: cute.Tensor,
        row_token: cute.Tensor | None,
        tma_b: cute.CopyAtom,
        b: cute.Tensor,
        offsets: cute.Tensor,
        column_tiles: Int32,
        tiled_mma: cute.TiledMma,
        layout_a: cute.ComposedLayout,
        layout_b: cute.ComposedLayout,
        epilogue_args: tuple,
    ):
        tile = self.tile
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        rank = Int32(0)
        if const_expr(tile.cluster > 1):
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

        storage = cutlass.utils.SmemAllocator().allocate(self.shared)
        full = storage.full.data_ptr()
        empty = storage.empty.data_ptr()
        record_full = storage.record_full.data_ptr()
        record_empty = storage.record_empty.data_ptr()
        records = storage.records.get_tensor(cute.make_layout((RECORD, SCHEDULE_SLOTS)))
        shared_a = storage.a.get_tensor(layout_a.outer, swizzle=layout_a.inner)
        shared_b = storage.b.get_tensor(layout_b.outer, swizzle=layout_b.inner)

        loaders = const_expr(1 + (GATHER_WARPS if self.gather else 0))  # warps that read records beside the consumers
        if warp == SCHEDULER_WARP:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(tile.stages):
                    cute.arch.mbarrier_init(full + s, const_expr(1 + (GATHER_WARPS * 32 if self.gather else 0)))
                    cute.arch.mbarrier_init(empty + s, const_expr(4 * self.group_size * tile.cluster))
                for s in cutlass.range_constexpr(SCHEDULE_SLOTS):
                    cute.arch.mbarrier_init(record_full + s, 1)
                    cute.arch.mbarrier_init(record_empty + s, const_expr(loaders + 4 * self.group_size))
            cute.arch.mbarrier_init_fence()
        self._meet()

        k_tiles = cute.ceil_div(a.shape[1], TILE_K)
        if warp < 4:
            cute.arch.setmaxregister_decrease(tile.registers[0])
            if warp == SCHEDULER_WARP:
                block, _, _ = cute.arch.block_idx()
                grid, _, _ = cute.arch.grid_dim()
                publish_tiles(
                    offsets,
                    records,
                    record_full,
                    record_empty,
                    column_tiles,
                    rank,
                    block // tile.cluster,
                    grid // tile.cluster,
                    tile.m,
                    tile.cluster,
                    SCHEDULE_SLOTS,
                    2 if tile.pingpong else 1,
                )
            elif warp == TMA_WARP:
                if const_expr(not self.gather):
                    cpasync.prefetch_descriptor(tma_a)
                cpasync.prefetch_descriptor(tma_b)
                self._load(tma_a, a, shared_a, tma_b, b, shared_b, full, empty, records, record_full, record_empty, k_tiles, rank)
            else:
                if const_expr(self.gather):
                    self._gather(a, row_token, storage.a.data_ptr(), full, empty, records, record_full, record_empty, k_tiles)
        else:
            cute.arch.setmaxregister_increase(tile.registers[1])
            self._consume(
                tiled_mma,
                shared_a,
                shared_b,
                full,
                empty,
                records,
                record_full,
                record_empty,
                k_tiles,
                warp // 4 - 1,
                storage.staging.data_ptr(),
                epilogue_args,
            )
        if const_expr(tile.cluster > 1):
            # The other block may still have copies or arrivals under way to this one.
            self._meet()

    @cute.jit
    def _meet(self):
        if const_expr(self.tile.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def _load(self, tma_a, a, shared_a, tma_b, b, shared_b, full, empty, records, record_full, record_empty, k_tiles, rank):
        """The TMA warp: the boxes of B and, for a dense A, its rows."""
        tile = self.tile
        one = cute.make_layout(1)
        stage = Int32(0)
        phase = Int32(0)
        count = Int32(0)
        expert, row, row_end, column = read_tile(records, record_full, record_empty, count, SCHEDULE_SLOTS)
        while expert >= 0:
            boxes = []
            for i in cutlass.range_constexpr(2 // tile.cluster):
                half = rank if const_expr(tile.cluster > 1) else i
                part, index = (half, column) if const_expr(self.gated) else (0, column * 2 + half)
                weights = cute.local_tile(b[None, None, part, expert], (tile.n // 2, TILE_K), (index, None))
                target = cute.local_tile(shared_b, (tile.n // 2, TILE_K), (half, 0, None))
                boxes.append(cpasync.tma_partition(tma_b, 0, one, cute.group_modes(target, 0, 2), cute.group_modes(weights, 0, 2)))
            arriving = Int32(tile.n * TILE_K * 2)
            has_rows = row < row_end
            if const_expr(not self.gather):
                own_rows = cute.local_tile(cute.domain_offset((row, 0), a), (tile.m, TILE_K), (0, None))
                rows_to, rows_from = cpasync.tma_partition(
                    tma_a, 0, one, cute.group_modes(shared_a, 0, 2), cute.group_modes(own_rows, 0, 2)
                )
                if has_rows:
                    arriving += tile.m * TILE_K * 2
            for k in cutlass.range(k_tiles, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, arriving)
                for box_to, box_from in boxes:
                    if const_expr(tile.cluster > 1):
                        cute.copy(tma_b, box_from[None, k], box_to[None, stage], tma_bar_ptr=full + stage, mcast_mask=cutlass.Int16(3))
                    else:
                        cute.copy(tma_b, box_from[None, k], box_to[None, stage], tma_bar_ptr=full + stage)
                if const_expr(not self.gather):
                    if has_rows:
                        cute.copy(tma_a, rows_from[None, k], rows_to[None, stage], tma_bar_ptr=full + stage)
                stage += 1
                if stage == tile.stages:
                    stage = Int32(0)
                    phase ^= 1
            count += 1
            expert, row, row_end, column = read_tile(records, record_full, record_empty, count, SCHEDULE_SLOTS)

    @cute.jit
    def _gather(self, a, row_token, shared_a, full, empty, records, record_full, record_empty, k_tiles):
        """Two warps, each half of the tile's rows: eight lanes a row and pass, so that 128 bytes of a row are one transaction.

        Lane l keeps where rows l, l + 32, ... of its warp's half begin, in units of 16 bytes; -1 for a row beyond the end.
        """
        tile = self.tile
        rows = const_expr(tile.m // GATHER_WARPS)
        held = const_expr((rows + 31) // 32)
        lane = cute.arch.lane_idx()
        my_rows = (cute.arch.make_warp_uniform(cute.arch.warp_idx()) - GATHER_WARP) * rows
        piece = lane % 8
        columns = a.shape[1]
        base = shared_a.toint() + my_rows * (TILE_K * 2)
        source = a.iterator.toint()
        begins = cute.make_rmem_tensor((held,), Int32)

        stage = Int32(0)
        phase = Int32(0)
        count = Int32(0)
        expert, row, row_end, column = read_tile(records, record_full, record_empty, count, SCHEDULE_SLOTS)
        while expert >= 0:
            for i in cutlass.range_constexpr(held):
                mine = row + my_rows + i * 32 + lane
                begins[i] = Int32(-1)
                if mine < row_end:
                    begins[i] = row_token[mine] * (columns // 8)
            for k in cutlass.range(k_tiles, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                at = base + stage * (tile.m * TILE_K * 2)
                first = k * TILE_K + piece * 8
                for step in cutlass.range_constexpr(rows // 4):
                    begin = cute.arch.shuffle_sync(begins[step * 4 // 32], step * 4 % 32 + lane // 8)
                    line = step * 4 + lane // 8
                    inside = (begin >= 0) & (first < columns)
                    wanted = Int32(16) if inside else Int32(0)
                    offset = begin + k * (TILE_K // 8) + piece if inside else Int32(0)
                    ptx.copy_16_bytes_async(
                        at + line * (TILE_K * 2) + ((piece ^ (line % 8)) * 16), source + Int64(offset) * 16, wanted
                    )
                cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                stage += 1
                if stage == tile.stages:
                    stage = Int32(0)
                    phase ^= 1
            count += 1
            expert, row, row_end, column = read_tile(records, record_full, record_empty, count, SCHEDULE_SLOTS)

    @cute.jit
    def _consume(
        self,
        tiled_mma,
        shared_a,
        shared_b,
        full,
        empty,
        records,
        record_full,
        record_empty,
        k_tiles,
        consumer,
        staging,
        epilogue_args,
    ):
        tile = self.tile
        place = Int32(0) if const_expr(tile.pingpong) else consumer  # among the consumers of one tile
        slice_of = tiled_mma.get_slice(place * 128)
        fragments_a = tiled_mma.make_fragment_A(slice_of.partition_A(shared_a))
        fragments_b = tiled_mma.make_fragment_B(slice_of.partition_B(shared_b))
        accumulators = cute.make_rmem_tensor(tiled_mma.partition_shape_C((tile.m, tile.n)), Float32)
        my_staging = staging + consumer * const_expr(tile.store_buffers * 64 * 64)

        stage = Int32(0)
        phase = Int32(0)
        count = Int32(0)
        step = const_expr(2 if tile.pingpong else 1)
        if const_expr(tile.pingpong):
            count = consumer
            stage, phase = self._skip(stage, phase, k_tiles * consumer)
            if consumer == 1:
                self._pass_turn(consumer)
        expert, row, row_end, column = read_tile(records, record_full, record_empty, count, SCHEDULE_SLOTS)
        while expert >= 0:
            my_row = row + place * 64
            if const_expr(tile.pingpong):
                cute.arch.barrier(barrier_id=TURN_BARRIER + consumer, number_of_threads=256)
            if my_row < row_end:
                stage, phase = self._multiply(
                    tiled_mma, accumulators, fragments_a, fragments_b, full, empty, stage, phase, k_tiles, consumer
                )
                for block in cutlass.range_constexpr(self.row_blocks):
                    block_row = my_row + block * (64 * self.group_size)
                    if block_row < row_end:
                        self.epilogue.store(
                            accumulators, block, epilogue_args, expert, block_row, row_end, column, my_staging, consumer
                        )
            else:
                stage, phase = self._follow(full, empty, stage, phase, k_tiles, consumer)
            if const_expr(tile.pingpong):
                stage, phase = self._skip(stage, phase, k_tiles)
            count += step
            expert, row, row_end, column = read_tile(records, record_full, record_empty, count, SCHEDULE_SLOTS)
        self.epilogue.finish(consumer)

    @cute.jit
    def _skip(self, stage: Int32, phase: Int32, k_tiles: Int32):
        """The ring's position after the other consumer's tile."""
        position = stage + k_tiles
        laps = position // self.tile.stages
        return position - laps * self.tile.stages, phase ^ (laps & 1)

    def _pass_turn(self, consumer: Int32) -> None:
        cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - consumer, number_of_threads=256)

    @cute.jit
    def _release(self, empty: cute.Pointer, stage: Int32):
        """Each warp tells its own block, and the one that multicasts to it, that it has read the stage."""
        if cute.arch.lane_idx() < self.tile.cluster:
            if const_expr(self.tile.cluster > 1):
                cute.arch.mbarrier_arrive(empty + stage, cute.arch.lane_idx())
            else:
                cute.arch.mbarrier_arrive(empty + stage)

    @cute.jit
    def _multiply(
        self, tiled_mma, accumulators, fragments_a, fragments_b, full, empty, stage: Int32, phase: Int32, k_tiles: Int32, consumer: Int32
    ):
        """All k tiles into the accumulators; one stage of wgmma stays in flight while the next is waited for."""
        previous = stage
        for k in cutlass.range(k_tiles, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            if const_expr(self.gather):
                # cp.async wrote through the generic proxy, wgmma reads through the async one.
                cute.arch.fence_proxy("async.shared", space="cta")
            warpgroup.fence()
            mma = cute.make_mma_atom(tiled_mma.op)
            mma.set(warpgroup.Field.ACCUMULATE, k > 0)
            for i in cutlass.range_constexpr(TILE_K // 16):
                cute.gemm(mma, accumulators, fragments_a[None, None, i, stage], fragments_b[None, None, i, stage], accumulators)
                mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            if k > 0:
                warpgroup.wait_group(1)
                self._release(empty, previous)
            previous = stage
            stage += 1
            if stage == self.tile.stages:
                stage = Int32(0)
                phase ^= 1
        if const_expr(self.tile.pingpong):
            self._pass_turn(consumer)
        warpgroup.wait_group(0)
        self._release(empty, previous)
        return stage, phase

    @cute.jit
    def _follow(self, full, empty, stage: Int32, phase: Int32, k_tiles: Int32, consumer: Int32):
        """Leaves every stage of a tile unread, keeping the barriers' count."""
        for _ in cutlass.range(k_tiles, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            self._release(empty, stage)
            stage += 1
            if stage == self.tile.stages:
                stage = Int32(0)
                phase ^= 1
        if const_expr(self.tile.pingpong):
            self._pass_turn(consumer)
        return stage, phase
