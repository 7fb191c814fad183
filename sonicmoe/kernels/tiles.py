"""Which tile a grouped GEMM uses, in one place. No compiler is imported here: the launch path asks this module too."""

from dataclasses import dataclass

SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on sm_90."""

TILE_K = 64
"""Elements of the reduction per pipeline stage: 128 bytes, one row of the 128-byte swizzle."""

SCHEDULE_SLOTS = 4
"""Tiles that the scheduler may be ahead of the slowest reader; a power of two."""

STORE_BUFFERS = 2
"""Staging buffers of 64 x 64 elements that each consumer has for its stores."""

_REGISTERS = {(2, True): (40, 232), (2, False): (24, 240), (3, True): (32, 160), (3, False): (24, 160)}
"""(Consumer warpgroups, gathered A) -> registers a thread of (producers, consumers), together at most 512 for each lane."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one block computes one output tile; :meth:`check` states every rule."""

    m: int
    """Rows of the tile."""
    n: int
    """Columns of the accumulator (for a gated activation: n/2 gate and n/2 up columns)."""
    consumers: int = 2
    """Consumer warpgroups."""
    pingpong: bool = False
    """Each consumer owns whole tiles in turn (one multiplies while the other stores); otherwise all share each tile by rows."""
    cluster: int = 1
    """Blocks along the rows that share each tile of weights by multicast."""
    stages: int = 4
    """Depth of the operand pipeline."""

    @property
    def rows_per_consumer(self) -> int:
        return self.m if self.pingpong else self.m // self.consumers

    @property
    def accumulators(self) -> int:
        """float32 registers a consumer thread spends on its part of the tile."""
        return self.rows_per_consumer * self.n // 128

    @property
    def instruction_n(self) -> int:
        """Columns of one wgmma: its operands must fit the registers a thread has at launch, 128 of 512 threads."""
        return self.n if self.consumers == 2 else self.n // 2

    @property
    def stage_bytes(self) -> int:
        return (self.m + self.n) * TILE_K * 2

    @property
    def shared_bytes(self) -> int:
        staging = self.consumers * STORE_BUFFERS * 64 * 64 * 2
        return self.stages * self.stage_bytes + staging + 1024

    def registers(self, *, gather: bool) -> tuple[int, int]:
        """Registers a thread of (producers, consumers)."""
        return _REGISTERS[self.consumers, gather]

    @property
    def threads(self) -> int:
        return (1 + self.consumers) * 128

    @property
    def name(self) -> str:
        """Also the name of the tile in a variant: an identifier."""
        return f"m{self.m}n{self.n}{'pp' if self.pingpong else 'co'}{self.consumers}c{self.cluster}s{self.stages}"

    def check(self) -> None:
        """Raises ValueError naming the rule that this tile breaks."""
        if self.consumers not in (2, 3):
            raise ValueError(f"{self.name}: consumers={self.consumers}: must be 2 or 3")
        rules = {
            "ping-pong needs two consumers": not self.pingpong or self.consumers == 2,
            f"m={self.m}: each consumer needs whole blocks of 64 rows": self.m % (64 if self.pingpong else 64 * self.consumers) == 0,
            f"n={self.n}: must be 128, 192 or 256": self.n in (128, 192, 256),
            f"cluster={self.cluster}: must be 1 or 2": self.cluster in (1, 2),
            f"{self.accumulators} accumulators leave too few registers": self.accumulators + 32 <= self.registers(gather=True)[1],
            f"{self.shared_bytes} bytes of shared memory: at most {SHARED_MEMORY_BYTES}": self.shared_bytes <= SHARED_MEMORY_BYTES,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"{self.name}: {broken[0]}")


TALL = Tile(m=192, n=256, consumers=3, stages=3)
"""Fewest bytes from L2 a product, 36 a multiplying cycle, of which cp.async brings 16; takes an expert of up to 192 rows at one
reading of its weights, in steps of 64 rows."""

PAIR = Tile(m=192, n=256, consumers=3, stages=3, cluster=2)
"""Two blocks share an expert of up to 384 rows evenly, 64 rows apart at most, and each weight is read once for both."""

SQUARE = Tile(m=128, n=128, pingpong=True, cluster=2, stages=5)
"""Stores hidden behind the other consumer's products; 16 + 8 KiB a stage of 512 cycles. A candidate, in no rule."""

BROAD = Tile(m=128, n=192, pingpong=True)
"""The same with fewer bytes a product and no cluster, so that an odd number of row tiles leaves no block idle."""

WIDE = Tile(m=128, n=256, cluster=2)
"""31 bytes from L2 a multiplying cycle with half of them multicast, and 100 registers beside the accumulators for the epilogue."""

LONE = Tile(m=128, n=256)
"""WIDE without the cluster, so that an odd number of row tiles leaves no block idle."""

SMALL = Tile(m=64, n=128, pingpong=True, stages=8)
"""For experts of a few rows each, whose weights are all that takes time: twice TALL's tiles of columns, so that more multiprocessors read
them, 128 KiB of weights in flight, and no consumer without rows."""

TILES = {tile.name: tile for tile in (TALL, PAIR, SQUARE, BROAD, WIDE, LONE, SMALL)}

FAST_MEMORY = 4e12
"""Bytes a second, as the memory's clock and width promise, from which a device has *fast memory*: an H200 (4.8e12), no H100 (3.35e12).
With an H100 the weights of 128 and 256 rows an expert take as long to come from memory as anything a tile does about them, and a cluster
reads each of them once; with an H200 what counts is that no consumer goes without rows."""

FITS_SMALL = 8
FITS_SMALL_FAST = 32
"""Rows an expert has on average up to which SMALL is taken: decoding. On an H100 nothing between 8 and 64 was measured."""
FITS_BROAD = 96
FITS_TALL = 160
FITS_TWO_BROAD = 264
FITS_PAIR = 320
"""Rows an expert has on average up to which nearly all fit one tile of 128 rows, one of 192, half of them two of 128, or nearly all two of
192 or a PAIR, under random routing (the deviation of C_e is about its root: 96 +- 29, 128 +- 34 and 256 +- 48 at three deviations)."""
MANY_ROWS_FAST = 448
MANY_ROWS = 1024
"""Rows an expert has on average from which a partly filled last tile of 192 rows costs less than TALL's fewer bytes a product save."""


def up_tile(*, rows: int, experts: int, store_z: bool, fast_memory: bool, halves: bool) -> Tile:
    """The tile of the up-projection, whose long reduction (H) hides the epilogue: the one that loads least.

    ``halves``: the columns of gate and of up are contiguous and apart, so that a box of either must be whole blocks of 64: not BROAD's 96.

    ms in training, TALL / PAIR / WIDE, on one H100 in one run: (32768,4096,1024,128,8), C_e 2048: 6.86 / 7.22 / 7.21;
    (4096,4096,1024,128,8), C_e about 256: 1.80 / 1.24 / 1.29; (4096,4096,1024,256,8), about 128: 1.83 / 1.94 / 1.73;
    (24576,1536,256,128,8), 1536: 0.58 / 0.61 / 0.60; (32768,4096,256,256,16), 2048: 3.69 / 3.94 / 3.84.
    TALL / BROAD / PAIR / WIDE on one H200: 7.07 / 7.39 / 7.41 / 7.38; 1.28 / 1.21 / 1.32 / 1.32; 1.39 / 1.39 / 2.05 / 1.56;
    0.57 / 0.61 / 0.59 / 0.59; 3.71 / 4.21 / 3.88 / 3.85. Of (16 C_e,4096,1024,128,8) there, C_e 32, 96, 160, 192, 384, 512:
    0.54 / 0.54 / 0.82 / 0.63; 0.64 / 0.60 / 1.00 / 0.70; 0.78 / 0.91 / 1.18 / 0.92; 1.11 / 0.97 / 1.25 / 0.99; 1.81 / 1.72 / 2.04 / 1.82;
    2.13 / 2.17 / 2.52 / 2.28; TALL / BROAD at C_e 240, 272, 304, 320, 352: 1.37 / 1.09; 1.35 / 1.38; 1.38 / 1.45; 1.50 / 1.49; 1.56 / 1.49.

    SMALL in inference alone, for training does not decode. us, TALL / WIDE / SMALL: Mixtral-8x7B at 1, 8, 64 tokens 167 / 172 / 162,
    588 / 570 / 572, 655 / 637 / 637; Qwen3-30B-A3B 25.6 / 25.9 / 22.8, 119 / 118 / 111, 277 / 273 / 268. On an H200, TALL / BROAD / SMALL
    at (16 C_e,4096,1024,128,8), C_e 16, 32, 64: 521 / 523 / 502; 531 / 536 / 514; 589 / 554 / 660.
    """
    if rows <= (FITS_SMALL_FAST if fast_memory else FITS_SMALL) * experts and not store_z:
        return SMALL
    if fast_memory:
        return TALL if halves or _fills_tall(rows, experts) or rows >= MANY_ROWS_FAST * experts else BROAD
    if FITS_TALL * experts < rows <= FITS_PAIR * experts:
        return PAIR
    return WIDE if rows < MANY_ROWS * experts else TALL


def down_tile(*, rows: int, experts: int, reduced: int, fast_memory: bool) -> Tile:
    """The tile of the down-projection, ``reduced`` = I: its few stages do not hide the epilogue unless another tile does.

    ms, TALL / BROAD / WIDE, same shapes and run: 3.19 / 3.83 / 3.29; 0.61 / 0.58 / 0.60; 0.90 / 0.89 / 0.86; 0.34 / 0.31 / 0.33;
    2.27 / 2.09 / 2.21. On the H200: 3.41 / 3.32 / 3.55; 0.59 / 0.56 / 0.64; 0.65 / 0.71 / 0.78; 0.33 / 0.28 / 0.33; 2.22 / 1.95 / 2.23;
    of (16 C_e,4096,1024,128,8), C_e 32, 96, 160, 192, 384: 0.28 / 0.28 / 0.32; 0.33 / 0.32 / 0.36; 0.37 / 0.44 / 0.47; 0.50 / 0.48 / 0.51;
    0.80 / 0.78 / 0.86; TALL / BROAD at C_e 240, 272, 304, 320, 352: 0.60 / 0.50; 0.61 / 0.63; 0.63 / 0.67; 0.67 / 0.68; 0.70 / 0.67.

    us, TALL / WIDE / SMALL: Mixtral-8x7B 153 / 110 / 98, 328 / 310 / 301, 345 / 326 / 325; Qwen3-30B-A3B 17.1 / 15.8 / 13.4,
    65 / 63 / 59, 148 / 143 / 139. On the H200, TALL / BROAD / SMALL, C_e 16, 32, 64: 277 / 273 / 264; 281 / 277 / 269; 294 / 291 / 322.
    """
    if rows <= (FITS_SMALL_FAST if fast_memory else FITS_SMALL) * experts:
        return SMALL
    if fast_memory:
        return TALL if _fills_tall(rows, experts) else BROAD
    if reduced <= 512 or FITS_TALL * experts < rows <= FITS_PAIR * experts:
        return BROAD
    return WIDE if rows < MANY_ROWS * experts else TALL


def activation_backward_tile(*, rows: int, experts: int, fast_memory: bool) -> Tile:
    """The tile of the activation's backward, whose consumers share the tile, 64 rows each (fed_gemm.py).

    ms, LONE / WIDE / PAIR / TALL, same shapes, another run: 3.96 / 4.06 / 4.29 / 4.07; 1.00 / 0.79 / 0.72 / 1.00;
    1.36 / 0.97 / 1.15 / 1.00; 0.43 / 0.43 / 0.45 / 0.45; 2.27 / 2.29 / 2.46 / 2.33. The best of all tiles while the epilogue loaded z
    itself, SQUARE but for the last, LONE: 4.32; 0.75; 1.02; 0.46; 2.39.
    On the H200: 3.96 / 4.01 / 4.40 / 4.19; 0.71 / 0.72 / 0.76 / 0.76; 0.90 / 0.81 / 1.17 / 0.77; 0.38 / 0.38 / 0.42 / 0.41;
    2.10 / 2.14 / 2.33 / 2.24; of (16 C_e,4096,1024,128,8), C_e 32, 96, 160, 192, 384, 512: 0.28 / 0.31 / 0.43 / 0.30;
    0.32 / 0.35 / 0.54 / 0.34; 0.56 / 0.46 / 0.66 / 0.42; 0.58 / 0.50 / 0.73 / 0.65; 1.00 / 0.98 / 1.23 / 1.07; 1.17 / 1.23 / 1.49 / 1.24.
    """
    if fast_memory:
        if rows <= FITS_BROAD * experts or rows >= MANY_ROWS_FAST * experts:
            return LONE
        return TALL if rows <= FITS_TALL * experts else WIDE
    if FITS_TALL * experts < rows <= FITS_PAIR * experts:
        return PAIR
    return WIDE if rows < MANY_ROWS * experts else LONE


def dx_tile(*, rows: int, experts: int, fast_memory: bool) -> Tile:
    """The tile of dx's rows.

    ms, TALL / WIDE / BROAD, same shapes and run: 6.28 / 6.47 / 8.24; 1.30 / 1.17 / 1.21; 1.62 / 1.60 / 1.85; 0.54 / 0.56 / 0.50;
    3.57 / 3.79 / 3.99. On the H200: 6.64 / 6.88 / 6.68; 1.15 / 1.20 / 1.11; 1.22 / 1.50 / 1.39; 0.55 / 0.58 / 0.49; 3.73 / 3.98 / 3.42;
    of (16 C_e,4096,1024,128,8), C_e 32, 96, 160, 192, 384: 0.53 / 0.60 / 0.53; 0.60 / 0.66 / 0.59; 0.68 / 0.89 / 0.86; 0.94 / 0.93 / 0.91;
    1.55 / 1.63 / 1.53; TALL / BROAD at C_e 240, 272, 304, 320, 352: 1.18 / 0.98; 1.21 / 1.28; 1.22 / 1.33; 1.32 / 1.37; 1.36 / 1.34.
    """
    if fast_memory:
        return TALL if _fills_tall(rows, experts) else BROAD
    return WIDE if rows < MANY_ROWS * experts else TALL


def _fills_tall(rows: int, experts: int) -> bool:
    """Whether most experts need one tile of 192 rows where they need two of 128, or two where they need three."""
    return FITS_BROAD * experts < rows <= FITS_TALL * experts or FITS_TWO_BROAD * experts < rows <= FITS_PAIR * experts


def weight_grad_tile() -> Tile:
    """The tile of the weights' gradients: the gathered operand is the narrower one.

    ms of dW_up, WIDE / TALL / PAIR, same shapes and run: 7.42 / 6.99 / 7.06; 1.51 / 1.33 / 1.38; 2.19 / 1.82 / 1.85; 0.60 / 0.55 / 0.55;
    4.05 / 3.62 / 3.69; of dW_down alike. On an H200 too TALL was first at every shape.
    """
    return TALL
