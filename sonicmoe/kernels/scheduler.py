"""Who computes which tile: a list that every block works out for itself from the experts' row offsets, and tickets.

Rows come in *bands*: up to ``cluster * m`` neighbouring rows of one expert, shared out evenly to the blocks of the cluster in
whole blocks of 64 rows (270 rows and two blocks of 192: 192 and 78, not 192 and nothing for one expert in two). Expert e has
``ceil(C_e / (cluster * m))`` bands and ``ceil(N / n)`` tiles of columns; the same list on every run, without the host::

    expert 0: [band 0..7] x column 0, the same bands x column 1, ...; then [band 8..15] ...; expert 1: ...

Bands vary fastest inside a group of :data:`GROUP`, so that the clusters running at one time cover a square of rows and
columns: a gathered row and a weight come from memory once and from L2 the other times.

Cluster c of G takes the tiles c and c + G, then whatever is next when it begins a tile, by a ticket from a counter in memory. Whoever
computes a tile, its bits are the same. With fixed shares c + 2G, c + 3G, ... the clusters drift apart until those that read the
same rows at the same time do so no more: on an H100 the up-projection at (32768,4096,1024,128,8) read 10-18 GB from memory
instead of 4.3. The counter starts at zero and is zero again at the end: G first tickets and one for each tile are drawn, and who
draws the last one resets it. A ticket is drawn one tile before it is needed, so that nobody waits for memory; the first block of
a cluster draws and sends it to the second (`send_ticket`, `receive_ticket`: two slots, each with a full barrier in the second
block and an empty one in the first).

One warp walks the list, one tile ahead of the loads. It holds 32 experts at a time, one a lane: the tiles of each by its row
count, their prefix sum by shuffles, and finds the owner of a tile by a ballot. The others read the result from a ring in shared
memory of ``SCHEDULE_SLOTS`` records of four int32: (expert or -1 at the end, first row of this block's tile, end of its rows,
tile of columns).
"""

import enum

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from sonicmoe.kernels.tiles import SCHEDULE_SLOTS

GROUP = 8
"""Bands that run through all columns before the next ones: 8 bands of 2 x 128 rows are 16 MiB of x at H = 4096."""


TICKET_SLOTS = 2


class Counter(enum.IntEnum):
    """A plan's counters (``DispatchPlan.tickets``), one for each kernel that takes them."""

    UP = 0
    DOWN = 1
    ACTIVATION_BACKWARD = 2
    DOWN_WEIGHT_GRAD = 3
    DX = 4
    UP_WEIGHT_GRAD = 5


@cute.jit
def draw_ticket(counter: cute.Pointer):
    """The next ticket, in lane 0 only."""
    ticket = Int32(0)
    if cute.arch.lane_idx() == 0:
        ticket = cute.arch.atomic_add(counter, Int32(1), sem="relaxed", scope="gpu")
    return ticket


@cute.jit
def send_ticket(number: Int32, ticket: Int32, slots: cute.Pointer, full: cute.Pointer, empty: cute.Pointer):
    """The cluster's ticket ``number`` to its second block, by a warp of the first."""
    slot = number % TICKET_SLOTS
    cute.arch.mbarrier_wait(empty + slot, (number // TICKET_SLOTS) % 2 ^ 1)
    if cute.arch.lane_idx() == 0:
        cute.arch.store_async_dsmem(slots + slot, ticket, full + slot, 1)


@cute.jit
def receive_ticket(number: Int32, slots: cute.Pointer, full: cute.Pointer, empty: cute.Pointer):
    """The same ticket, by all lanes of a warp of the second block; frees its slot."""
    slot = number % TICKET_SLOTS
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive_and_expect_tx(full + slot, 4)
    cute.arch.mbarrier_wait(full + slot, (number // TICKET_SLOTS) % 2)
    ticket = cute.make_tensor(slots, cute.make_layout((TICKET_SLOTS,)))[slot]
    cute.arch.sync_warp()
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive(empty + slot, 0)
    return ticket


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
    """A record of the ring, for all lanes of a warp; frees its slot. Lane 0 alone reads it, so that who frees it is who has read it."""
    cute.arch.mbarrier_wait(full + slot, lap)
    record = [Int32(0) for _ in range(records.shape[0])]
    if cute.arch.lane_idx() == 0:
        for i in cutlass.range_constexpr(len(record)):
            record[i] = records[i, slot]
        cute.arch.mbarrier_arrive(empty + slot)
    return tuple([cute.arch.shuffle_sync(number, 0) for number in record])
