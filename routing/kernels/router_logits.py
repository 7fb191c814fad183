"""The router's product, logits = x @ weight.T in float32: x (T, H) and weight (E, H) of 16 bits, nothing rounded, in one launch.

A block has a tile of ``tokens`` x ``experts`` (logits_tiles.py) and one of S parts of the reduction. A cluster is the S parts of a tile,
or of two tiles beside each other, each of which loads one half of their tokens for both::

    last warp            TMA: boxes of 64 columns of x and of weight into stages of 128-byte rows in the 128-byte swizzle; what lies
                         beyond T, E or H arrives as zeros
    tokens / 64          wgmma, 64 tokens x experts each, into float32 registers, stage after stage
    consumer warpgroups  all:    meet, after which nobody needs the stages
                         sums to shared memory of the block that adds them: of part r for the rows [r m/S, (r + 1) m/S) of m tokens
                         all:    meet
                         warp w: rows w, w + warps, ...: the S sums of an element in the order of the parts, one store

Barriers, in shared memory, with the arrivals that complete a phase::

    full[s]     1 (the last warp, with the bytes it expects, half of the tokens' from the other block of a pair)
    empty[s]    4 warps of each consumer, of both blocks of a pair
    meeting     all threads of the cluster, or of the block where it is alone

An element's products are added in one order, the parts' sums too: the same bits every run. A part without columns adds zeros. The logits
are stored by 4 bytes a lane, 128 bytes a warp, so that E may be odd; those beyond T and E are not stored.

Bytes: 2*H*(T + E) + 4*T*E. FLOPs: 2*T*H*E. Floor: the longer of those bytes at device-copy bandwidth and those FLOPs at the tensor
cores' peak. From L2 a block loads (tokens + experts) * 128 bytes a stage, a block of a pair tokens * 64 fewer.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from routing.kernels import warp
from routing.kernels.logits_tiles import TILE_K, Tile

PADDING = 8
"""float32 between two rows of sums: the four rows that half a warp stores 8 bytes a lane to lie in banks of their own."""


def _address_in(block: Int32, shared: Int32) -> Int32:
    """Where another block of the cluster has what this one has at ``shared``."""
    return cute.arch.inline_ptx("mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[shared, block])


def _store_8_bytes(address: Int32, first: Float32, second: Float32) -> None:
    cute.arch.inline_ptx("st.shared::cluster.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, first, second])


class RouterLogits:
    """The kernels of one tile, one for each number of parts."""

    def __init__(self, *, dtype: type[cutlass.Numeric], tile: Tile) -> None:
        self.dtype = dtype
        self.tile = tile
        self.consumers = tile.tokens // 64
        self.row = tile.experts + PADDING
        assert tile.tokens * self.row * 4 <= tile.stages * tile.stage_bytes, "the sums lie where the stages were"

    def _layout(self, rows: int):
        """Of (rows, 64, stages) in shared memory, the reduction contiguous."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        return cute.tile_to_shape(atom, (rows, TILE_K, self.tile.stages), order=(0, 1, 2))

    @cute.jit
    def __call__(self, x: cute.Tensor, weight: cute.Tensor, logits: cute.Tensor, parts: Int32, stream: cuda.CUstream):
        tokens, experts, columns = self.tile
        load = cpasync.CopyBulkTensorTileG2SOp()
        load_shared = cpasync.CopyBulkTensorTileG2SMulticastOp() if const_expr(columns > 1) else load
        box = tokens // columns
        tma_x, boxes_x = cpasync.make_tiled_tma_atom(load_shared, x, cute.slice_(self._layout(box), (None, None, 0)), (box, TILE_K))
        tma_w, boxes_w = cpasync.make_tiled_tma_atom(load, weight, cute.slice_(self._layout(experts), (None, None, 0)), (experts, TILE_K))
        major = OperandMajorMode.K
        tiled_mma = hopper.make_trivial_tiled_mma(
            self.dtype, self.dtype, major, major, Float32, (self.consumers, 1, 1), tiler_mn=(64, experts)
        )

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, self.tile.stages]
            empty: cute.struct.MemRange[Int64, self.tile.stages]
            x: cute.struct.Align[cute.struct.MemRange[self.dtype, self.tile.stages * tokens * TILE_K], 1024]
            weight: cute.struct.Align[cute.struct.MemRange[self.dtype, self.tile.stages * experts * TILE_K], 1024]

        self.shared = Shared
        clusters = cute.ceil_div(logits.shape[0], tokens) * cute.ceil_div(logits.shape[1], experts * columns)
        for choice in cutlass.range_constexpr(len(self.tile.parts)):
            blocks = const_expr(self.tile.parts[choice] * columns)
            if parts == self.tile.parts[choice]:
                self.kernel(tma_x, boxes_x, tma_w, boxes_w, logits, tiled_mma, self.tile.parts[choice]).launch(
                    grid=[clusters * blocks, 1, 1],
                    block=[self.consumers * 128 + 32, 1, 1],
                    cluster=[blocks, 1, 1],
                    min_blocks_per_mp=1,
                    stream=stream,
                )

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        x: cute.Tensor,
        tma_w: cute.CopyAtom,
        weight: cute.Tensor,
        logits: cute.Tensor,
        tiled_mma: cute.TiledMma,
        parts: cutlass.Constexpr,
    ):
        tokens, experts, columns = self.tile
        blocks = const_expr(parts * columns)
        block, _, _ = cute.arch.block_idx()
        own_warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank, cluster = block % blocks, block // blocks
        part, place = rank // columns, rank % columns
        across = cute.ceil_div(logits.shape[1], experts * columns)
        row, column = cluster // across, cluster % across * columns + place
        k_tiles = cute.ceil_div(x.shape[1], TILE_K)
        begin, end = k_tiles * part // parts, k_tiles * (part + 1) // parts

        storage = cutlass.utils.SmemAllocator().allocate(self.shared)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        layout_x, layout_w = self._layout(tokens), self._layout(experts)
        shared_x = storage.x.get_tensor(layout_x.outer, swizzle=layout_x.inner)
        shared_w = storage.weight.get_tensor(layout_w.outer, swizzle=layout_w.inner)

        if own_warp == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(self.tile.stages):
                    cute.arch.mbarrier_init(full + s, 1)
                    cute.arch.mbarrier_init(empty + s, 4 * self.consumers * columns)
            cute.arch.mbarrier_init_fence()
        self._meet(columns)  # the other block of a pair, too, is about to load into this one

        loads = own_warp == 4 * self.consumers
        accumulators = cute.make_rmem_tensor(tiled_mma.partition_shape_C((tokens, experts)), Float32)
        if loads:
            self._load((tma_x, x, shared_x, row), (tma_w, weight, shared_w, column), full, empty, begin, end, part, place)
        else:
            self._multiply(tiled_mma, accumulators, shared_x, shared_w, full, empty, end - begin, part, own_warp // 4)
        sums = storage.x.data_ptr()
        self._meet(blocks)
        if not loads:
            self._hand_over(accumulators, sums.toint(), part, place, own_warp, parts)
        self._meet(blocks)
        if not loads:
            self._add(logits, cute.recast_ptr(sums, dtype=Float32), (row * tokens, column * experts), part, own_warp, parts)

    def _meet(self, blocks: int) -> None:
        if blocks > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def _load(self, from_x: tuple, from_w: tuple, full, empty, begin: Int32, end: Int32, part: Int32, place: Int32):
        """The last warp: both operands' boxes of every stage, of a pair's tokens its half for both blocks."""
        tokens, experts, columns = self.tile
        tma_x, x, shared_x, row = from_x
        tma_w, weight, shared_w, column = from_w
        cpasync.prefetch_descriptor(tma_x)
        cpasync.prefetch_descriptor(tma_w)
        box = const_expr(tokens // columns)
        x_to, x_from = self._copy(tma_x, x, shared_x, box, row * columns + place, place)
        w_to, w_from = self._copy(tma_w, weight, shared_w, experts, column, 0)
        multicast = {"mcast_mask": cutlass.Int16(3 << (part * 2))} if const_expr(columns > 1) else {}
        stage, phase = Int32(0), Int32(0)
        for k in cutlass.range(begin, end, unroll=1):
            cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.tile.stage_bytes)
            cute.copy(tma_x, x_from[None, k], x_to[None, stage], tma_bar_ptr=full + stage, **multicast)
            cute.copy(tma_w, w_from[None, k], w_to[None, stage], tma_bar_ptr=full + stage)
            stage, phase = self._next(stage, phase)

    def _copy(self, tma, tensor, shared, rows: int, index, place) -> tuple:
        """Box ``index`` of a tensor's rows and the ``place``-th of the stages' rows, as TMA copies one to the other."""
        source, target = cute.local_tile(tensor, (rows, TILE_K), (index, None)), cute.local_tile(shared, (rows, TILE_K), (place, 0, None))
        return cpasync.tma_partition(tma, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(source, 0, 2))

    @cute.jit
    def _next(self, stage: Int32, phase: Int32):
        stage += 1
        if stage == self.tile.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    @cute.jit
    def _multiply(self, tiled_mma, accumulators, shared_x, shared_w, full, empty, k_tiles: Int32, part: Int32, consumer: Int32):
        slice_of = tiled_mma.get_slice(consumer * 128)
        fragments_x = tiled_mma.make_fragment_A(slice_of.partition_A(shared_x))
        fragments_w = tiled_mma.make_fragment_B(slice_of.partition_B(shared_w))
        accumulators.fill(0.0)
        mma = cute.make_mma_atom(tiled_mma.op)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        stage, phase = Int32(0), Int32(0)
        for _ in cutlass.range(k_tiles, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            warpgroup.fence()
            for i in cutlass.range_constexpr(TILE_K // 16):
                cute.gemm(mma, accumulators, fragments_x[None, None, i, stage], fragments_w[None, None, i, stage], accumulators)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            if cute.arch.lane_idx() < self.tile.columns:
                if const_expr(self.tile.columns > 1):
                    cute.arch.mbarrier_arrive(empty + stage, part * 2 + cute.arch.lane_idx())
                else:
                    cute.arch.mbarrier_arrive(empty + stage)
            stage, phase = self._next(stage, phase)

    @cute.jit
    def _hand_over(self, accumulators, shared: Int32, part: Int32, place: Int32, own_warp: Int32, parts: cutlass.Constexpr):
        """This thread's sums, of two rows, to the blocks that add them. There, those of each part have m/S rows."""
        share = const_expr(self.tile.tokens // parts)
        lane = cute.arch.lane_idx()
        for half in cutlass.range_constexpr(2):
            row = own_warp * 16 + half * 8 + lane // 4
            address = shared + ((part * share + row % share) * self.row + lane % 4 * 2) * 4
            if const_expr(parts > 1):
                address = _address_in(row // share * self.tile.columns + place, address)
            for j in cutlass.range_constexpr(self.tile.experts // 8):
                _store_8_bytes(address + j * 32, accumulators[(0, half, j), 0, 0], accumulators[(1, half, j), 0, 0])

    @cute.jit
    def _add(self, logits, sums, first: tuple, part: Int32, own_warp: Int32, parts: cutlass.Constexpr):
        """The logits of this block's m/S rows."""
        share = const_expr(self.tile.tokens // parts)
        lane = cute.arch.lane_idx()
        sum_of = cute.make_tensor(sums, cute.make_layout((self.tile.experts, share, parts), stride=(1, self.row, share * self.row)))
        for own_row in cutlass.range(own_warp, share, 4 * self.consumers, unroll=1):
            row = first[0] + part * share + own_row
            if row < logits.shape[0]:
                target = warp.row_of(logits, row)
                for j in cutlass.range_constexpr(self.tile.experts // 32):
                    total = sum_of[j * 32 + lane, own_row, 0]
                    for other in cutlass.range_constexpr(1, parts):
                        total += sum_of[j * 32 + lane, own_row, other]
                    column = first[1] + j * 32 + lane
                    if column < logits.shape[1]:
                        target[column] = total


def trace(*, dtype: str, tokens: int, experts: int, columns: int) -> tuple:
    """What is compiled: ``(x (T, H), weight (E, H), logits (T, E) float32, parts)``, all dense, x and weight aligned to 16 bytes, H a
    multiple of 8, T, E and H at least 1, parts one of the tile's.

    Args:
        dtype: of x and weight: bfloat16 or float16.
        tokens, experts, columns: the tile.
    """
    T, E = cute.sym_int(), cute.sym_int()
    H = cute.sym_int(divisibility=8)
    element = warp.ELEMENT[dtype]

    def dense(dtype: type[cutlass.Numeric], align: int, *shape: cute.SymInt) -> cute.Tensor:
        return make_fake_compact_tensor(dtype, shape, stride_order=(1, 0), assumed_align=align)

    arguments = (
        dense(element, 16, T, H),
        dense(element, 16, E, H),
        dense(Float32, 4, T, E),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return RouterLogits(dtype=element, tile=Tile(tokens, experts, columns)), arguments
