"""Which tile, and how many parts of the reduction, the router's product takes. No compiler import: the launch path asks this module too.

Notation: T tokens, H hidden size, E experts.
"""

from math import ceil
from typing import NamedTuple

TILE_K = 64
"""Elements of the reduction a stage: 128 bytes, one row of the 128-byte swizzle."""
MOST_STAGES = 8
STAGE_BYTES = 192 * 1024
"""Of all stages at most: a block has a multiprocessor to itself."""
LARGEST_CLUSTER = 8
"""Blocks; what every GPU that has clusters takes."""

ROOM = {1: 128, 2: 128, 4: 120, 8: 120}
"""Blocks at a time by the blocks of a cluster, which need as many multiprocessors of one GPC: an H200's 132 did not hold 32 clusters of
four or 16 of eight, which took twice the time of one wave. A constant, since the choice, with it the order in which an element's products
are added, shall not hang on the GPU that is there."""
L2_BYTES = 40
EXCHANGE_BYTES = 12
"""A cycle and multiprocessor, from L2 and from other blocks' shared memory. These and the two below choose the fastest of all tiles and
parts at each of 17 measured sizes (docs/kernels/router_logits.md)."""
START_CYCLES = 2000
"""Of a block: launch, the first stage's way from memory, and the end."""
EXCHANGE_CYCLES = 1000
"""Of a cluster's two barriers and what the first of them waits for."""


class Tile(NamedTuple):
    """What a block computes; a cluster has ``columns`` of them beside each other, which share the tokens they load, for each part."""

    tokens: int
    """A multiple of 64: a consumer warpgroup each 64."""
    experts: int
    columns: int = 1

    @property
    def stage_bytes(self) -> int:
        return (self.tokens + self.experts) * TILE_K * 2

    @property
    def stages(self) -> int:
        return min(MOST_STAGES, STAGE_BYTES // self.stage_bytes)

    @property
    def parts(self) -> tuple[int, ...]:
        """Into how many the reduction may be split."""
        return tuple(parts for parts in (1, 2, 4, 8) if parts * self.columns <= LARGEST_CLUSTER)

    def clusters(self, tokens: int, experts: int) -> int:
        """Of a launch, for one part."""
        return ceil(tokens / self.tokens) * ceil(experts / (self.experts * self.columns))


TILES = (Tile(64, 64), Tile(128, 64), Tile(192, 128), Tile(256, 128), Tile(256, 128, columns=2))
"""Low ones for few tokens, which make more blocks; high ones, of all of 128 experts, load each expert's weights for more tokens."""


def choice(tokens: int, hidden: int, experts: int) -> tuple[Tile, int]:
    """The tile and the parts that should take least time, for at least one of each.

    A wave of blocks takes a block's start, its stages, and the exchange of partial sums. A stage takes the longer of its bytes from L2,
    rows beyond T and E not being loaded, and its products: 128 cycles for 64 x 64 x 64. The first of equals, so the fewest parts.
    """

    def cycles(tile: Tile, parts: int) -> float:
        blocks = tile.columns * parts
        waves = ceil(tile.clusters(tokens, experts) * blocks / ROOM[blocks])
        loaded = (min(tile.tokens, tokens) / tile.columns + min(tile.experts, experts)) * TILE_K * 2 / L2_BYTES
        stage = max(loaded, tile.tokens * tile.experts / 32)
        exchange = EXCHANGE_CYCLES + tile.tokens * tile.experts * 4 * (parts - 1) / parts / EXCHANGE_BYTES if parts > 1 else 0
        return waves * (START_CYCLES + ceil(ceil(hidden / TILE_K) / parts) * stage + exchange)

    return min(((tile, parts) for tile in TILES for parts in tile.parts), key=lambda pair: cycles(*pair))
