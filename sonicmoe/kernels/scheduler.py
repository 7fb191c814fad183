"""Who computes which tile: a static order that every block works out for itself from the experts' row offsets.

Work comes in *bands*: ``cluster`` neighbouring tiles along the rows of one expert, one for each block of the cluster,
times one tile of columns. Expert e has ``ceil(C_e / (cluster * m))`` bands of rows and ``ceil(N / n)`` of columns; cluster c
of G takes the tiles c, c + G, c + 2G, ... of the list below. No atomics, no host, and the same list on every run::

    expert 0: [band 0..7 of rows] x column 0, the same rows x column 1, ...; then [band 8..15] ...; expert 1: ...

Rows vary fastest inside a group of :data:`GROUP` bands, so that the clusters running at one time cover a square of rows and
columns: a gathered row and a weight come from memory once and from L2 the other times.

One warp walks the list ahead of everyone else. It holds 32 experts at a time, one a lane: the tiles of each by its row count,
their prefix sum by shuffles, and finds the owner of a tile by a ballot. The result goes to the others through a ring in shared
memory of ``SCHEDULE_SLOTS`` records of four int32: (expert or -1 at the end, first row of this block's tile, end of the
expert's rows, tile of columns).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

GROUP = 8
"""Bands of rows that run through all columns before the next rows: 8 bands of 2 x 128 rows, 16 MiB of x at H = 4096."""

RECORD = 4
"""int32 of one record."""


@cute.jit
def publish_tiles(
    offsets: cute.Tensor,
    records: cute.Tensor,
    full: cute.Pointer,
    empty: cute.Pointer,
    column_tiles: Int32,
    block_rank: Int32,
    first: Int32,
    step: Int32,
    tile_m: cutlass.Constexpr[int],
    cluster: cutlass.Constexpr[int],
    slots: cutlass.Constexpr[int],
    ends: cutlass.Constexpr[int],
):
    """The scheduler warp: writes the tiles ``first, first + step, ...`` and then ``ends`` end records into the ring."""
    lane = cute.arch.lane_idx()
    experts = offsets.shape[0] - 1
    band = const_expr(tile_m * cluster)

    window = Int32(-32)  # the 32 experts of the lanes are window .. window + 31
    before = Int32(0)  # tiles before the window
    total = Int32(0)  # tiles inside it
    start = Int32(0)
    end = Int32(0)
    tiles = Int32(0)
    inclusive = Int32(0)

    wanted = first
    slot = Int32(0)
    phase = Int32(0)
    more = Int32(1)
    left = Int32(ends)
    while left > 0:
        # Move to the window that holds the wanted tile, or past the last expert.
        while (wanted >= before + total) & (window + 32 < experts):
            before += total
            window += 32
            expert = window + lane
            start = Int32(0)
            end = Int32(0)
            if expert < experts:
                start = offsets[expert]
                end = offsets[expert + 1]
            tiles = cute.ceil_div(end - start, band) * column_tiles
            inclusive = tiles
            for i in cutlass.range_constexpr(5):
                other = cute.arch.shuffle_sync_up(inclusive, const_expr(1 << i))
                if lane >= const_expr(1 << i):
                    inclusive += other
            total = cute.arch.shuffle_sync(inclusive, 31)
        more = Int32(1) if wanted < before + total else Int32(0)
        if more == 0:
            left -= 1

        owner = Int32(0)
        if more == 1:
            mine = wanted < before + inclusive
            owner = cute.arch.popc(~cute.arch.vote_ballot_sync(mine))
        expert_start = cute.arch.shuffle_sync(start, owner)
        expert_end = cute.arch.shuffle_sync(end, owner)
        tile = wanted - before - cute.arch.shuffle_sync(inclusive - tiles, owner)
        bands = cute.ceil_div(expert_end - expert_start, band)
        group = tile // (GROUP * column_tiles)
        rest = tile - group * (GROUP * column_tiles)
        width = cutlass.max(cutlass.min(bands - group * GROUP, GROUP), 1)
        column = rest // width
        row_band = group * GROUP + (rest - column * width)

        cute.arch.mbarrier_wait(empty + slot, phase ^ 1)
        if lane == 0:
            records[0, slot] = window + owner if more == 1 else Int32(-1)
            records[1, slot] = expert_start + (row_band * cluster + block_rank) * tile_m
            records[2, slot] = expert_end
            records[3, slot] = column
            cute.arch.mbarrier_arrive(full + slot)
        cute.arch.sync_warp()
        slot += 1
        if slot == slots:
            slot = Int32(0)
            phase ^= 1
        wanted += step


@cute.jit
def read_tile(
    records: cute.Tensor,
    full: cute.Pointer,
    empty: cute.Pointer,
    tile: Int32,
    slots: cutlass.Constexpr[int],
):
    """The ``tile``-th record of the ring, by all lanes of a warp; frees its slot."""
    slot = tile % slots
    cute.arch.mbarrier_wait(full + slot, (tile // slots) & 1)
    expert = records[0, slot]
    row = records[1, slot]
    row_end = records[2, slot]
    column = records[3, slot]
    cute.arch.sync_warp()
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive(empty + slot)
    return expert, row, row_end, column
