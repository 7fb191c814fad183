"""The main loop of every grouped GEMM: out[rows of expert e] = A[rows of e] @ B[e]^T, written once.

Roles of one block (a warpgroup is 4 warps)::

    producers  warp 0     walks the tiles and publishes records (scheduler.py); TMA: the tile of weights, multicast to the
                          cluster, and a dense A
               warps 1-3  gathered A: eight lanes a row, 16 bytes a lane by cp.async; idle for a dense A
    consumers  2 or 3 warpgroups: wgmma into registers, then the epilogue

Barriers, all in shared memory, with the arrivals that complete a phase::

    full[s]     1 (warp 0, with the bytes it expects) + 96 (gathering lanes, when their copies have landed)
    empty[s]    4 warps of each consumer that reads the stage, x cluster: a stage is refilled by both blocks' multicast,
                so both blocks' consumers must have left it (x 32 lanes in fed_gemm.py)
    record full 1 (warp 0), record empty: 3 gathering warps + 4 warps of each consumer of the tile

Shared tiles by row (co): consumer w multiplies rows [64 w, 64 w + 64) of each block of 64 x consumers rows; a consumer whose
64 rows are all beyond the expert's end only follows the barriers, so that a tail costs the tensor cores what it holds.
Ping-pong (pp): consumer w takes tiles w, w + 2, ...; while one stores, the other multiplies. The stages of a tile follow those
of the tile before it in the ring. A wait tells two neighbouring laps of the ring apart, not more, so a consumer may only wait
for its tile once the other has seen all of the tile before: named barriers 4 and 5, 256 threads (128 arrive, 128 wait).

A stage is a tile of m x 64 of A and n x 64 of B, each row 128 bytes in the 128-byte swizzle. B comes as two boxes of n/2 rows:
for a gated activation the gate's and the up projection's rows (whether they alternate in memory or not is a stride of the
tensor map), so that one thread holds column j of both; block r of a cluster of two loads box r for both blocks.
A transposed B, whose columns are contiguous and not the reduction, lies in blocks of 64 columns x 32 of the reduction and comes as
two boxes of n columns x 32 (for gate and up of their own as four of n/2 x 32).

One launch behind another (the down-projection behind the up-projection, programmatic dependent launch): every block of the first says at
its start that the second may begin, which then takes each multiprocessor as the first leaves it. The second's warp 0 fills the ring's
stages with the weights of its first tile and only then waits for the first's end, before it reads a row of a. What it reads earlier,
weights and offsets, must have been complete before the first began: the first is launched the ordinary way.

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
from sonicmoe.kernels.scheduler import (
    TICKET_SLOTS,
    draw_ticket,
    find_tile,
    first_window,
    next_slot,
    publish_tile,
    read_tile,
    receive_ticket,
    send_ticket,
)
from sonicmoe.kernels.tiles import SCHEDULE_SLOTS, STORE_BUFFERS, TILE_K, Tile

GATHER_WARPS = 3
"""One cp.async of a warp (4 rows) took 53 cycles beside the tensor cores: 32 of them for 128 rows are too slow for one warp."""

TURN_BARRIER = 4
"""Named barriers 4 and 5: the turn of consumer 0 and 1 under ping-pong."""


def weight_tensor(weight: cute.Tensor, *, reduced_last: bool) -> cute.Tensor:
    """A weight (E, columns, K) with the reduction last, or (E, K, columns), as `GroupedGemm.launch` takes it: (columns, K, 1, E)."""
    experts, first, last = weight.shape
    shape, stride = ((first, last), (weight.stride[1], 1)) if reduced_last else ((last, first), (1, weight.stride[1]))
    return cute.make_tensor(weight.iterator, cute.make_layout((*shape, 1, experts), stride=(*stride, weight.stride[0], weight.stride[0])))


class GroupedGemm:
    """One grouped GEMM: ``tile``, where A comes from, how B is laid out, and an epilogue object.

    The epilogue (epilogue.py) has ``store``, called by each consumer for each block of 64 rows of which the expert has some, with
    ``epilogue_args``, a tuple of whatever its host half prepared, and ``finish``, called once at the end.
    """

    record = 4
    """int32 of a tile's record: (expert or -1 at the end, first row, end of the expert's rows, tile of columns)."""

    over_rows = False
    """Whether the reduction runs over an expert's rows (row_reduction.py) or over a weight's columns."""

    input_stages = 0
    """Stages of a tile, behind those of its products, that bring what its epilogue reads (fed_gemm.py)."""

    arrivals = 1
    """On ``empty``, of each warp that has read a stage: all lanes' where lanes read one themselves (fed_gemm.py)."""

    def __init__(
        self,
        *,
        tile: Tile,
        dtype: type[cutlass.Numeric],
        gather: bool,
        gated: bool,
        epilogue,
        ticket: int,
        transposed_b: bool = False,
        waits_for_a: bool = False,
        has_dependents: bool = False,
    ) -> None:
        tile.check()
        self.tile = tile
        self.dtype = dtype
        self.gather = gather
        self.gated = gated
        self.ticket = ticket
        self.transposed_b = transposed_b
        self.waits_for_a = waits_for_a
        self.has_dependents = has_dependents
        self.epilogue = epilogue
        self.group_size = 1 if tile.pingpong else tile.consumers  # consumers that share a tile
        self.row_blocks = tile.rows_per_consumer // 64

    def _swizzled(self, rows: int):
        """Layout of (rows, 64, stages) in shared memory, 128-byte swizzle, the reduction contiguous."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        return cute.tile_to_shape(atom, (rows, TILE_K, self.tile.stages), order=(0, 1, 2))

    def _layout_a(self):
        return self._swizzled(self.tile.m)

    def _layouts_b(self):
        """B in shared memory, all stages (two halves of the reduction each if transposed); one box of it; that box's shape."""
        n = self.tile.n
        if not self.transposed_b:
            return self._swizzled(n), cute.slice_(self._swizzled(n // 2), (None, None, 0)), (n // 2, TILE_K)
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.MN_SW128, self.dtype)
        box = (n // 2 if self.gated else n, TILE_K // 2)
        layout, one = (
            cute.tile_to_shape(atom, (columns, TILE_K // 2, count), order=(1, 0, 2))
            for columns, count in ((n, 2 * self.tile.stages), (box[0], 1))
        )
        return layout, cute.slice_(one, (None, None, 0)), box

    @cute.jit
    def launch(
        self,
        a: cute.Tensor,
        row_token: cute.Tensor | None,
        b: cute.Tensor,
        offsets: cute.Tensor,
        tickets: cute.Tensor,
        column_tiles: Int32,
        epilogue_args: tuple,
        blocks: Int32,
        stream: cuda.CUstream,
        dependent: Int32 | bool = False,
    ):
        """a (rows, K); b (columns, K, parts, experts), parts 2 for a gated activation; offsets (experts + 1,) int32; tickets of the plan,
        of which ``self.ticket`` is this kernel's.

        ``dependent`` of a kernel with ``waits_for_a``: whether the launch before on this stream writes a, and none of the rest.
        """
        tile = self.tile
        layout_a = self._layout_a()
        layout_b, layout_box, box_b = self._layouts_b()
        load = cpasync.CopyBulkTensorTileG2SOp() if const_expr(tile.cluster == 1) else cpasync.CopyBulkTensorTileG2SMulticastOp()
        tma_b, tensor_b = cpasync.make_tiled_tma_atom(load, b, layout_box, box_b)
        if const_expr(self.gather):
            tma_a, tensor_a = None, a
        else:
            tma_a, tensor_a = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(), a, cute.slice_(layout_a, (None, None, 0)), (tile.m, TILE_K)
            )
        major_a = OperandMajorMode.MN if const_expr(self.over_rows) else OperandMajorMode.K
        major_b = OperandMajorMode.MN if const_expr(self.transposed_b) else OperandMajorMode.K
        tiled_mma = hopper.make_trivial_tiled_mma(
            self.dtype, self.dtype, major_a, major_b, Float32, (self.group_size, 1, 1), tiler_mn=(64, tile.instruction_n)
        )

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, tile.stages]
            empty: cute.struct.MemRange[Int64, tile.stages]
            record_full: cute.struct.MemRange[Int64, SCHEDULE_SLOTS]
            record_empty: cute.struct.MemRange[Int64, SCHEDULE_SLOTS]
            ticket_full: cute.struct.MemRange[Int64, TICKET_SLOTS]
            ticket_empty: cute.struct.MemRange[Int64, TICKET_SLOTS]
            tickets: cute.struct.MemRange[Int32, TICKET_SLOTS]
            records: cute.struct.MemRange[Int32, self.record * SCHEDULE_SLOTS]
            a: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_a)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_b)], 1024]
            staging: cute.struct.Align[cute.struct.MemRange[self.dtype, tile.consumers * STORE_BUFFERS * 64 * 64], 1024]

        self.shared = Shared
        self.kernel(
            tma_a, tensor_a, row_token, tma_b, tensor_b, offsets, tickets, column_tiles, tiled_mma, layout_a, layout_b, epilogue_args
        ).launch(
            grid=[blocks, 1, 1],
            block=[tile.threads, 1, 1],
            cluster=[tile.cluster, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=dependent,
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
        tickets: cute.Tensor,
        column_tiles: Int32,
        tiled_mma: cute.TiledMma,
        layout_a: cute.ComposedLayout,
        layout_b: cute.ComposedLayout,
        epilogue_args: tuple,
    ):
        tile = self.tile
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = Int32(0)
        if const_expr(tile.cluster > 1):
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

        storage = cutlass.utils.SmemAllocator().allocate(self.shared)
        full = storage.full.data_ptr()
        empty = storage.empty.data_ptr()
        record_full = storage.record_full.data_ptr()
        record_empty = storage.record_empty.data_ptr()
        records = storage.records.get_tensor(cute.make_layout((self.record, SCHEDULE_SLOTS)))
        shared_a = storage.a.get_tensor(layout_a.outer, swizzle=layout_a.inner)
        shared_b = storage.b.get_tensor(layout_b.outer, swizzle=layout_b.inner)
        inputs = (epilogue_args, storage.a.data_ptr(), storage.b.data_ptr(), full, empty)

        if const_expr(self.has_dependents):
            cute.arch.griddepcontrol_launch_dependents()
        post = (storage.tickets.data_ptr(), storage.ticket_full.data_ptr(), storage.ticket_empty.data_ptr())
        readers = const_expr(4 * self.group_size + (GATHER_WARPS if self.gather else 0))
        if warp == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(tile.stages):
                    cute.arch.mbarrier_init(full + s, const_expr(1 + (GATHER_WARPS * 32 if self.gather else 0)))
                    cute.arch.mbarrier_init(empty + s, const_expr(4 * self.group_size * tile.cluster * self.arrivals))
                for s in cutlass.range_constexpr(SCHEDULE_SLOTS):
                    cute.arch.mbarrier_init(record_full + s, 1)
                    cute.arch.mbarrier_init(record_empty + s, readers)
                if const_expr(tile.cluster > 1):
                    for s in cutlass.range_constexpr(TICKET_SLOTS):
                        cute.arch.mbarrier_init(post[1] + s, 1)
                        cute.arch.mbarrier_init(post[2] + s, 1)
            cute.arch.mbarrier_init_fence()
        self._meet()

        if warp < 4:
            cute.arch.setmaxregister_decrease(tile.registers(gather=self.gather)[0])
            if warp == 0:
                if const_expr(not self.gather):
                    cpasync.prefetch_descriptor(tma_a)
                cpasync.prefetch_descriptor(tma_b)
                self._load(
                    tma_a,
                    a,
                    shared_a,
                    tma_b,
                    b,
                    shared_b,
                    full,
                    empty,
                    (records, record_full, record_empty),
                    (tickets.iterator + self.ticket, *post),
                    rank,
                    offsets,
                    column_tiles,
                    inputs,
                )
            elif const_expr(self.gather):
                self._gather(a, row_token, (records, record_full, record_empty), warp - 1, inputs)
        else:
            cute.arch.setmaxregister_increase(tile.registers(gather=self.gather)[1])
            self._consume(
                tiled_mma,
                shared_a,
                shared_b,
                (records, record_full, record_empty),
                a.shape[1],
                warp // 4 - 1,
                storage.staging.data_ptr(),
                inputs,
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
    def _load(self, tma_a, a, shared_a, tma_b, b, shared_b, full, empty, ring: tuple, tickets: tuple, rank, offsets, column_tiles, inputs):
        """Warp 0: publishes each tile's record, one tile ahead, and loads the boxes of B and, for a dense A, its rows."""
        tile = self.tile
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        clusters = grid // tile.cluster
        width = a.shape[1]
        stage = Int32(0)
        phase = Int32(0)
        slot = Int32(0)
        lap = Int32(0)
        drawn = Int32(0)  # of all blocks, by the first of a cluster; in lane 0 only
        if rank == 0:
            drawn = draw_ticket(tickets[0])
        # Tiles begun, the number of the one after this, and the last ticket.
        turn = (Int32(0), block // tile.cluster + clusters, drawn)
        walk, record = self._find(self._first(), block // tile.cluster, offsets, column_tiles, width, rank)
        publish_tile(record, *ring, slot, lap)
        ahead = Int32(0)
        if const_expr(self.waits_for_a):
            ahead = self._load_ahead(tma_b, b, shared_b, full, record, rank, width)
        while record[0] >= 0:
            row, row_end, column = record[1], record[2], record[3]
            k_tiles = self._k_tiles(record, width)
            boxes = self._boxes(tma_b, b, shared_b, record, rank)
            arriving = Int32(tile.n * TILE_K * 2)
            has_rows = row < row_end
            if const_expr(not self.gather):
                own_rows = cute.local_tile(cute.domain_offset((row, 0), a), (tile.m, TILE_K), (0, None))
                rows_to, rows_from = cpasync.tma_partition(
                    tma_a, 0, cute.make_layout(1), cute.group_modes(shared_a, 0, 2), cute.group_modes(own_rows, 0, 2)
                )
                if has_rows:
                    arriving += tile.m * TILE_K * 2
            # An expert without rows has no stage (row_reduction.py), and still one turn.
            for k in cutlass.range(cutlass.max(k_tiles, 1), unroll=1):
                if k < k_tiles:
                    to_load = k >= ahead if const_expr(self.waits_for_a) else True
                    if to_load:
                        cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                        self._load_weights(tma_b, boxes, full, stage, k, arriving)
                    if const_expr(not self.gather):
                        if has_rows:
                            cute.copy(tma_a, rows_from[None, k], rows_to[None, stage], tma_bar_ptr=full + stage)
                    stage += 1
                    if stage == tile.stages:
                        stage = Int32(0)
                        phase ^= 1
                if k == 0:
                    # Behind the first loads of this tile, where it delays none.
                    turn, wanted = self._take_turn(turn, tickets, clusters, rank)
                    slot, lap = next_slot(slot, lap, 1)
                    walk, record = self._find(walk, wanted, offsets, column_tiles, width, rank)
                    publish_tile(record, *ring, slot, lap)
            stage, phase = self._load_input(inputs, stage, phase, row, row_end, column)
            if const_expr(self.waits_for_a):
                ahead = Int32(0)
        if const_expr(tile.pingpong):
            slot, lap = next_slot(slot, lap, 1)
            publish_tile(record, *ring, slot, lap)
        self._last_turn(turn, tickets, clusters, rank, self._count(walk))

    @cute.jit
    def _take_turn(self, turn: tuple, tickets: tuple, clusters: Int32, rank: Int32):
        """The number of the tile after this one; draws the ticket after next."""
        begun, number, drawn = turn
        counter, *post = tickets
        if const_expr(self.tile.cluster > 1):
            if (rank > 0) & (begun > 0):
                number = 2 * clusters + receive_ticket(begun - 1, *post)
        wanted = number
        if rank == 0:
            ticket = cute.arch.shuffle_sync(drawn, 0)
            if const_expr(self.tile.cluster > 1):
                send_ticket(begun, ticket, *post)
            number = 2 * clusters + ticket
            drawn = draw_ticket(counter)
        return (begun + 1, number, drawn), wanted

    @cute.jit
    def _last_turn(self, turn: tuple, tickets: tuple, clusters: Int32, rank: Int32, tiles: Int32):
        """Whoever drew the last of the ``clusters + tiles`` tickets resets the counter; a ticket on its way is received."""
        begun, _, drawn = turn
        counter, *post = tickets
        if const_expr(self.tile.cluster > 1):
            if (rank > 0) & (begun > 0):
                receive_ticket(begun - 1, *post)
        if rank == 0:
            if (cute.arch.lane_idx() == 0) & (drawn == clusters + tiles - 1):
                cute.make_tensor(counter, cute.make_layout((1,)))[0] = 0

    def _load_input(self, inputs: tuple, stage, phase, row, row_end, column) -> tuple:
        """The tile's ``input_stages``, by warp 0; the ring's position behind them. ``inputs``: epilogue_args, where A's and where B's
        stages begin, full, empty."""
        return stage, phase

    def _gather_input(self, inputs: tuple, stage, phase, record: tuple, warp) -> tuple:
        """What the gathering warps add to them."""
        return stage, phase

    def _load_weights(self, tma_b, boxes: list[tuple], full, stage: Int32, k: Int32, arriving: Int32) -> None:
        """The boxes of B of an empty stage, which then expects ``arriving`` bytes."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, arriving)
        for box_to, box_from, half in boxes:
            source = box_from[None, k if half is None else k * 2 + half]
            target = box_to[None, stage if half is None else stage * 2 + half]
            multicast = {"mcast_mask": cutlass.Int16(3)} if self.tile.cluster > 1 else {}
            cute.copy(tma_b, source, target, tma_bar_ptr=full + stage, **multicast)

    @cute.jit
    def _load_ahead(self, tma_b, b, shared_b, full, record: tuple, rank, width):
        """The weights of the first tile's first stages, then the wait for a: how many stages. A block without a tile waits too, so that
        nothing behind this launch starts before the one before it has ended."""
        ahead = Int32(0)
        if record[0] >= 0:
            ahead = cutlass.min(self._k_tiles(record, width), self.tile.stages)
            boxes = self._boxes(tma_b, b, shared_b, record, rank)
            arriving = Int32(self.tile.n * TILE_K * 2)
            if record[1] < record[2]:
                arriving += self.tile.m * TILE_K * 2
            for stage in cutlass.range(ahead, unroll=1):
                self._load_weights(tma_b, boxes, full, stage, stage, arriving)
        cute.arch.griddepcontrol_wait()
        return ahead

    def _first(self):
        return first_window()

    def _count(self, walk):
        """Tiles of the whole list, of a walk that has passed its end."""
        return walk[1] + walk[2]

    def _find(self, walk, wanted, offsets, column_tiles, width, rank):
        return find_tile(walk, wanted, offsets, column_tiles, rank, self.tile.m, self.tile.cluster)

    def _k_tiles(self, record, width):
        """Stages of a tile."""
        return cute.ceil_div(width, TILE_K)

    def _boxes(self, tma_b, b, shared_b, record: tuple, rank) -> list[tuple]:
        """The boxes of a tile of B that this block loads: (shared memory, global memory, half of the reduction or None for all of it).

        A block of a cluster loads one half for both: of the columns (of a gated activation: gate or up), else of the reduction.
        """
        expert, column = record[0], record[3]
        halves = (0, 1) if self.tile.cluster == 1 else (rank,)
        if not self.transposed_b:
            return [
                self._box(tma_b, b, shared_b, expert, *((half, column) if self.gated else (0, column * 2 + half)), half, None)
                for half in halves
            ]
        if self.gated:
            return [self._box(tma_b, b, shared_b, expert, part, column, part, half) for part in halves for half in (0, 1)]
        return [self._box(tma_b, b, shared_b, expert, 0, column, 0, half) for half in halves]

    def _box(self, tma_b, b, shared_b, expert, part, index, place, half) -> tuple:
        """Box ``index`` along the columns of ``part``, to the ``place``-th box of a stage."""
        shape = self._layouts_b()[2]
        source = cute.local_tile(b[None, None, part, expert], shape, (index, None))
        target = cute.local_tile(shared_b, shape, (place, 0, None))
        return (*cpasync.tma_partition(tma_b, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(source, 0, 2)), half)

    @cute.jit
    def _gather(self, a, row_token, ring: tuple, warp: Int32, inputs: tuple):
        """Warps 1-3: passes of 4 rows in turn, eight lanes a row, so that 128 bytes of a row are one transaction."""
        tile = self.tile
        _, shared_a, _, full, empty = inputs
        passes = const_expr(tile.m // 4)
        turns = const_expr((passes + GATHER_WARPS - 1) // GATHER_WARPS)  # of each warp; the last one only of the first warps
        stride = const_expr(GATHER_WARPS * 4 * TILE_K * 2)  # bytes from a warp's pass to its next
        line = warp * 4 + cute.arch.lane_idx() // 8
        piece = cute.arch.lane_idx() % 8
        columns = a.shape[1]
        k_tiles = cute.ceil_div(columns, TILE_K)
        first = shared_a.toint() + line * (TILE_K * 2) + ((piece ^ (line % 8)) * 16)
        inside = cute.ceil_div(columns - piece * 8, TILE_K)  # k tiles in which this lane's piece is not beyond the last column
        begins = cute.make_rmem_tensor((turns,), Int32)  # where this lane's pieces of its rows begin, in units of 16 bytes

        stage = Int32(0)
        phase = Int32(0)
        slot = Int32(0)
        lap = Int32(0)
        record = read_tile(*ring, slot, lap)
        while record[0] >= 0:
            row, row_end = record[1], record[2]
            for i in cutlass.range_constexpr(turns):
                mine = row + (cute.arch.thread_idx()[0] // 8 - 4) + i * (GATHER_WARPS * 4)
                begins[i] = Int32(-1)
                if mine < row_end:
                    begins[i] = row_token[mine] * (columns // 8) + piece
            whole = row + tile.m <= row_end
            for k in cutlass.range(k_tiles, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                source = a.iterator.toint()
                wanted = Int32(0)
                if k < inside:
                    source += Int64(k) * (TILE_K * 2)
                    wanted = Int32(16)
                # A warp's rows are 12 apart, so the swizzle of a lane takes two values in turn.
                even = first + stage * (tile.m * TILE_K * 2)
                odd = even ^ 64
                if whole:
                    for i in cutlass.range_constexpr(passes // GATHER_WARPS):
                        at = (odd if const_expr(i % 2) else even) + const_expr(i * stride)
                        ptx.copy_16_bytes_async(at, source + Int64(begins[i]) * 16, wanted)
                    if const_expr(passes % GATHER_WARPS > 0):
                        if warp < const_expr(passes % GATHER_WARPS):
                            at = (odd if const_expr(turns % 2 == 0) else even) + const_expr((turns - 1) * stride)
                            ptx.copy_16_bytes_async(at, source + Int64(begins[turns - 1]) * 16, wanted)
                else:
                    for i in cutlass.range_constexpr(turns):
                        at = (odd if const_expr(i % 2) else even) + const_expr(i * stride)
                        if begins[i] >= 0:
                            ptx.copy_16_bytes_async(at, source + Int64(begins[i]) * 16, wanted)
                cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                stage += 1
                if stage == tile.stages:
                    stage = Int32(0)
                    phase ^= 1
            stage, phase = self._gather_input(inputs, stage, phase, record, warp)
            slot, lap = next_slot(slot, lap, 1)
            record = read_tile(*ring, slot, lap)

    @cute.jit
    def _consume(self, tiled_mma, shared_a, shared_b, ring: tuple, width, consumer, staging, inputs: tuple):
        epilogue_args, _, pointer_b, full, empty = inputs
        tile = self.tile
        place = Int32(0) if const_expr(tile.pingpong) else consumer  # among the consumers of one tile
        slice_of = tiled_mma.get_slice(place * 128)
        fragments_a = tiled_mma.make_fragment_A(slice_of.partition_A(shared_a))
        fragments_b = tiled_mma.make_fragment_B(slice_of.partition_B(shared_b))
        accumulators = cute.make_rmem_tensor(tiled_mma.partition_shape_C((tile.m, tile.n)), Float32)
        my_staging = staging + consumer * const_expr(STORE_BUFFERS * 64 * 64)

        stage = Int32(0)
        phase = Int32(0)
        slot = Int32(0)
        lap = Int32(0)
        step = const_expr(2 if tile.pingpong else 1)
        if const_expr(tile.pingpong):
            slot = consumer
            stage, phase = self._skip(stage, phase, cute.ceil_div(width, TILE_K) * consumer)
            if consumer == 1:
                self._pass_turn(consumer)
        record = read_tile(*ring, slot, lap)
        while record[0] >= 0:
            k_tiles = self._k_tiles(record, width)
            first, end = self._outputs(record, width)
            my_row = first + place * 64
            tail = (pointer_b, record[2] - record[1], end - first)
            if const_expr(tile.pingpong):
                cute.arch.barrier(barrier_id=TURN_BARRIER + consumer, number_of_threads=256)
            if my_row < end:
                held = self._begin(epilogue_args, my_row, end)
                stage, phase = self._multiply(
                    tiled_mma, accumulators, fragments_a, fragments_b, full, empty, stage, phase, k_tiles, consumer, tail
                )
                where = (record[0], my_row, end, record[3])
                stage, phase = self._store(accumulators, inputs, held, where, stage, phase, my_staging, consumer)
            else:
                stage, phase = self._follow(full, empty, stage, phase, k_tiles + self.input_stages, consumer)
            if const_expr(tile.pingpong):
                stage, phase = self._skip(stage, phase, k_tiles)
            slot, lap = next_slot(slot, lap, step)
            record = read_tile(*ring, slot, lap)
        self.epilogue.finish(consumer)

    def _begin(self, epilogue_args: tuple, row, row_end):
        """What a consumer loads for its epilogue before the products of a tile."""
        return ()

    @cute.jit
    def _store(self, accumulators, inputs: tuple, held: tuple, where: tuple, stage, phase, staging, consumer):
        """The epilogue of a tile: ``where`` is the expert, the first of this consumer's rows, their end, and the tile of columns."""
        expert, row, end, column = where
        for block in cutlass.range_constexpr(self.row_blocks):
            block_row = row + block * (64 * self.group_size)
            if block_row < end:
                self.epilogue.store(accumulators, block, inputs[0], expert, block_row, end, column, staging, consumer)
        return stage, phase

    def _outputs(self, record, width):
        """First and end of the rows of the output that this block's tile may store."""
        return record[1], record[2]

    def _clear_tail(self, tail, stage, k) -> None:
        """Before the products of a stage: nothing to do where the loads zero what lies beyond the reduction's end."""

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
                cute.arch.mbarrier_arrive(empty + stage, cute.arch.lane_idx(), self.arrivals)
            else:
                cute.arch.mbarrier_arrive(empty + stage, arrive_count=self.arrivals)

    @cute.jit
    def _multiply(
        self,
        tiled_mma,
        accumulators,
        fragments_a,
        fragments_b,
        full,
        empty,
        stage: Int32,
        phase: Int32,
        k_tiles: Int32,
        consumer: Int32,
        tail: tuple,
    ):
        """All k tiles into the accumulators.

        Consumers that share a tile keep the tensor cores busy for each other, so each gives a stage back as soon as it is done with
        it; alone (ping-pong), a consumer queues the next stage behind the one that runs.
        """
        queued = const_expr(1 if self.tile.pingpong else 0)
        previous = stage
        if const_expr(self.over_rows):
            accumulators.fill(0.0)  # an expert without rows has no stage
        for k in cutlass.range(k_tiles, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            self._clear_tail(tail, stage, k)
            if const_expr(self.gather):
                # cp.async wrote through the generic proxy, wgmma reads through the async one.
                cute.arch.fence_proxy("async.shared", space="cta")
            warpgroup.fence()
            mma = cute.make_mma_atom(tiled_mma.op)
            mma.set(warpgroup.Field.ACCUMULATE, True if const_expr(self.over_rows) else k > 0)
            for i in cutlass.range_constexpr(TILE_K // 16):
                fragment_b = (
                    fragments_b[None, None, i % 2, stage * 2 + i // 2]
                    if const_expr(self.transposed_b)
                    else fragments_b[None, None, i, stage]
                )
                cute.gemm(mma, accumulators, fragments_a[None, None, i, stage], fragment_b, accumulators)
                mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            warpgroup.wait_group(queued)
            if const_expr(queued == 0):
                self._release(empty, stage)
            elif k > 0:
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
