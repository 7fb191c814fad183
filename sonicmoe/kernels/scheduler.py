"""Who computes which tile: a static order that every block works out for itself from the experts' row offsets.

Rows come in *bands*: up to ``cluster * m`` neighbouring rows of one expert, shared out evenly to the blocks of the cluster in
whole blocks of 64 rows (270 rows and two blocks of 192: 192 and 78, not 192 and nothing for one expert in two). Expert e has
``ceil(C_e / (cluster * m))`` bands and ``ceil(N / n)`` tiles of columns; cluster c of G takes the tiles c, c + G, c + 2G, ... of
the list below. No atomics, no host, and the same list on every run::

    expert 0: [band 0..7] x column 0, the same bands x column 1, ...; then [band 8..15] ...; expert 1: ...

Bands vary fastest inside a group of :data:`GROUP`, so that the clusters running at one time cover a square of rows and
columns: a gathered row and a weight come from memory once and from L2 the other times.

One warp walks the list, one tile ahead of the loads. It holds 32 experts at a time, one a lane: the tiles of each by its row
count, their prefix sum by shuffles, and finds the owner of a tile by a ballot. The others read the result from a ring in shared
memory of ``SCHEDULE_SLOTS`` records of four int32: (expert or -1 at the end, first row of this block's tile, end of its rows,
tile of columns).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from sonicmoe.kernels.tiles import SCHEDULE_SLOTS

GROUP = 8
"""Bands that run through all columns before the next ones: 8 bands of 2 x 128 rows are 16 MiB of x at H = 4096."""


@cute.jit
def first_window():
    """The walk before its first tile: (window, tiles before it, tiles in it, and of this lane's expert: start, end, tiles, prefix)."""
    return Int32(-32), Int32(0), Int32(0), Int32(0), Int32(0), Int32(0), Int32(0)


@cute.jit
def find_tile(
    walk: tuple,
    wanted: Int32,
    offsets: cute.Tensor,
    column_tiles: Int32,
    rank: Int32,
    tile_m: cutlass.Constexpr[int],
    cluster: cutlass.Constexpr[int],
):
    """The walk moved to tile ``wanted`` (never less than before), and that tile's record for block ``rank`` of the cluster."""
    window, before, total, start, end, tiles, inclusive = walk
    lane = cute.arch.lane_idx()
    experts = offsets.shape[0] - 1
    band = const_expr(tile_m * cluster)
    while (wanted >= before + total) & (window + 32 < experts):
        before += total
        window += 32
        mine = window + lane
        start = Int32(0)
        end = Int32(0)
        if mine < experts:
            start = offsets[mine]
            end = offsets[mine + 1]
        tiles = cute.ceil_div(end - start, band) * column_tiles
        inclusive = tiles
        for i in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(inclusive, const_expr(1 << i))
            if lane >= const_expr(1 << i):
                inclusive += below
        total = cute.arch.shuffle_sync(inclusive, 31)

    inside = wanted < before + total
    owner = cute.arch.popc(cute.arch.vote_ballot_sync(wanted >= before + inclusive)) % 32
    expert_start = cute.arch.shuffle_sync(start, owner)
    expert_end = cute.arch.shuffle_sync(end, owner)
    tile = wanted - before - cute.arch.shuffle_sync(inclusive - tiles, owner)
    bands = cute.ceil_div(expert_end - expert_start, band)
    group = tile // (GROUP * column_tiles)
    rest = tile - group * (GROUP * column_tiles)
    width = cutlass.max(cutlass.min(bands - group * GROUP, GROUP), 1)
    column = rest // width
    band_start = expert_start + (group * GROUP + rest - column * width) * band
    share = cute.ceil_div(cutlass.min(expert_end - band_start, band), const_expr(64 * cluster)) * 64
    row = band_start + rank * share
    expert = window + owner if inside else Int32(-1)
    walk = (window, before, total, start, end, tiles, inclusive)
    return walk, (expert, row, cutlass.min(row + share, expert_end), column)


@cute.jit
def next_slot(slot: Int32, lap: Int32, step: cutlass.Constexpr[int]):
    """The ring's position ``step`` records on: slot and parity of the lap."""
    slot += step
    if slot >= SCHEDULE_SLOTS:
        slot -= SCHEDULE_SLOTS
        lap ^= 1
    return slot, lap


@cute.jit
def publish_tile(record: tuple, records: cute.Tensor, full: cute.Pointer, empty: cute.Pointer, slot: Int32, lap: Int32):
    """A record into the ring, by one warp."""
    cute.arch.mbarrier_wait(empty + slot, lap ^ 1)
    if cute.arch.lane_idx() == 0:
        for i in cutlass.range_constexpr(len(record)):
            records[i, slot] = record[i]
        cute.arch.mbarrier_arrive(full + slot)
    cute.arch.sync_warp()


@cute.jit
def read_tile(records: cute.Tensor, full: cute.Pointer, empty: cute.Pointer, slot: Int32, lap: Int32):
    """A record of the ring, by all lanes of a warp; frees its slot."""
    cute.arch.mbarrier_wait(full + slot, lap)
    record = tuple([records[i, slot] for i in range(records.shape[0])])
    cute.arch.sync_warp()
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive(empty + slot)
    return record
