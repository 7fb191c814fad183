"""Which tile a grouped GEMM uses, in one place. No compiler is imported here: the launch path asks this module too."""

from dataclasses import dataclass

SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on sm_90."""

TILE_K = 64
"""Elements of the reduction per pipeline stage: 128 bytes, one row of the 128-byte swizzle."""

SCHEDULE_SLOTS = 4
"""Tiles that the scheduler warp may be ahead of the slowest reader."""

_REGISTERS = {2: (40, 232), 3: (32, 160)}
"""Consumer warpgroups -> registers a thread of (producers, consumers); all warpgroups together must fit 512 a lane."""


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
    def store_buffers(self) -> int:
        """Staging buffers of 64 x 64 elements that each consumer has for its stores."""
        return 2

    @property
    def shared_bytes(self) -> int:
        staging = self.consumers * self.store_buffers * 64 * 64 * 2
        return self.stages * self.stage_bytes + staging + 1024

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of (producers, consumers)."""
        return _REGISTERS[self.consumers]

    @property
    def threads(self) -> int:
        return (1 + self.consumers) * 128

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}_{'pp' if self.pingpong else 'co'}{self.consumers}_c{self.cluster}_s{self.stages}"

    def check(self) -> None:
        """Raises ValueError naming the rule that this tile breaks."""
        rules = {
            f"consumers={self.consumers}: must be 2 or 3": self.consumers in _REGISTERS,
            "ping-pong needs two consumers": not self.pingpong or self.consumers == 2,
            f"m={self.m}: each consumer needs whole blocks of 64 rows": self.m % (64 if self.pingpong else 64 * self.consumers) == 0,
            f"n={self.n}: must be 128, 192 or 256": self.n in (128, 192, 256),
            f"cluster={self.cluster}: must be 1 or 2": self.cluster in (1, 2),
            f"{self.accumulators} accumulators of {self.registers[1]} registers leave too few": self.accumulators + 32 <= self.registers[1],
            f"{self.shared_bytes} bytes of shared memory: at most {SHARED_MEMORY_BYTES}": self.shared_bytes <= SHARED_MEMORY_BYTES,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"{self.name}: {broken[0]}")
