"""The epilogue of activation_backward.py, on z in shared memory (fed_gemm.py): every warp for itself, without a barrier.

A warp has 16 of its consumer's 64 rows, a thread da where epilogue.py says. A *unit* is what one box of 64 columns of z gives (both
boxes, of the gate and of the up projection, where those lie apart): 32 columns of da of the interleaved layout, else 64. A thread
reads its own elements of z, 8 bytes (gate, up, gate, up) or 4 a part, and writes dz over them; scaled_a goes to the warp's staging,
two chunks of 16 rows x 64 columns. Then the warp's 16 rows x 64 columns of each leave by TMA if they are all the expert's, else by
16-byte stores of the rows that are. So the registers beside the accumulators are few.

dz may be z's own memory: 64 columns of dz go where the box of z came from that they were computed on, and no block reads another
one's (of a tail only the rows there are: fed_gemm.py).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from sonicmoe.kernels import ptx
from sonicmoe.kernels.epilogue import GATED, relu, sigmoid
from sonicmoe.kernels.tiles import TILE_K, Tile

ONE = 1.0

ROWS = 16
"""Of a warp."""


def _silu(x: Float32) -> tuple[Float32, Float32]:
    s = sigmoid(x)
    value = x * s
    return value, s + value * (Float32(ONE) - s)


def _gelu(x: Float32) -> tuple[Float32, Float32]:
    """As epilogue.gelu; the derivative is cdf(x) + x * density(x)."""
    size = cute.arch.fmax(x, -x)
    t = cute.arch.rcp_approx(Float32(ONE) + Float32(0.3275911 * 0.7071067811865476) * size)
    series = Float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + Float32(coefficient)
    bell = cute.arch.exp2(Float32(-0.5 * 1.4426950408889634) * size * size)
    below = Float32(0.5) * series * t * bell  # the cdf at -|x|
    cdf = cutlass.select_(x > Float32(0.0), Float32(ONE) - below, below)
    return relu(x) - size * below, cdf + x * bell * Float32(0.3989422804014327)


def _relu(x: Float32) -> tuple[Float32, Float32]:
    return relu(x), cutlass.select_(x > Float32(0.0), Float32(ONE), Float32(0.0))


def _relu_squared(x: Float32) -> tuple[Float32, Float32]:
    value = relu(x)
    return value * value, Float32(2.0) * value


def _gated(function):
    """(a, da/dgate, da/dup) of function(gate) * up."""

    def derive(gate: Float32, up: Float32) -> tuple[Float32, Float32, Float32]:
        value, slope = function(gate)
        return value * up, slope * up, value

    return derive


def _clamped_swiglu(gate: Float32, up: Float32) -> tuple[Float32, Float32, Float32]:
    alpha, limit = Float32(1.702), Float32(7.0)
    g = cute.arch.fmin(gate, limit, nan=True)
    factor = cute.arch.fmax(cute.arch.fmin(up, limit, nan=True), -limit, nan=True) + Float32(ONE)
    s = sigmoid(alpha * g)
    value = g * s
    slope = s + alpha * value * (Float32(ONE) - s)
    slope = cutlass.select_(gate <= limit, slope, Float32(0.0))
    passes = cute.arch.fmax(up, -up) <= limit
    return value * factor, slope * factor, cutlass.select_(passes, value, Float32(0.0))


DERIVED = {
    "swiglu": _gated(_silu),
    "geglu": _gated(_gelu),
    "reglu": _gated(_relu),
    "swiglu_oai": _clamped_swiglu,
    "silu": _silu,
    "gelu": _gelu,
    "relu": _relu,
    "relu_squared": _relu_squared,
}
"""(value, derivative) of z, or (value, derivative by gate, derivative by up) of gate and up."""


def box_layout(dtype: type[cutlass.Numeric], rows: int):
    """Of rows x 64 columns in shared memory, 128-byte swizzle."""
    return cute.tile_to_shape(warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype), (rows, TILE_K), order=(0, 1))


class WarpStore:
    """Stores chunks of 16 rows x 64 columns, by one warp, of a row-major output seen as (rows, columns, parts)."""

    def __init__(self, dtype: type[cutlass.Numeric]) -> None:
        self.dtype = dtype

    def prepare(self, out: cute.Tensor) -> tuple:
        layout = box_layout(self.dtype, ROWS)
        atom, tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), out, layout, (ROWS, TILE_K))
        return atom, tensor, out

    @cute.jit
    def send(self, args: tuple, pointer: cute.Pointer, row: Int32, row_end: Int32, column: Int32, part: cutlass.Constexpr[int]):
        """What the warp has written at ``pointer`` to rows [row, min(row + 16, row_end)); joins the warp's next bulk group."""
        atom, tensor, out = args
        if row + ROWS <= row_end:
            layout = box_layout(self.dtype, ROWS)
            shared = cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=self.dtype), layout.outer)
            target = cute.local_tile(cute.domain_offset((row, column), tensor[None, None, part]), (ROWS, TILE_K), (0, 0))
            to_shared, to_memory = cpasync.tma_partition(
                atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(target, 0, 2)
            )
            cute.copy(atom, to_shared, to_memory)
        else:
            piece = cute.arch.lane_idx() % 8
            at = column + piece * 8
            destination = out.iterator.toint() + (Int64(part) * out.stride[2] + at) * 2
            for i in cutlass.range_constexpr(ROWS // 4):
                line = cute.arch.lane_idx() // 8 + i * 4
                if (row + line < row_end) & (at < out.shape[1]):
                    source = pointer.toint() + line * 128 + ((piece ^ (line % 8)) * 16)
                    ptx.copy_16_bytes_out(destination + Int64(row + line) * (out.stride[0] * 2), source)


class ActivationBackwardEpilogue:
    """accumulator = da -> dz and scaled_a, stored; row sums of da * a -> partial. Each of the three may be left out."""

    def __init__(
        self, *, dtype: type[cutlass.Numeric], tile: Tile, activation: str, interleaved: bool, dz: bool, dscore: bool, scaled_a: bool
    ) -> None:
        self.dtype = dtype
        self.tile = tile
        self.gated = activation in GATED
        self.derive = DERIVED[activation]
        self.interleaved = interleaved and self.gated
        self.dz, self.dscore, self.scaled_a = dz, dscore, scaled_a
        self.unit_columns = 32 if self.interleaved else 64
        self.units = tile.n // self.unit_columns
        self.boxes_per_unit = 2 if self.gated and not self.interleaved else 1
        self.boxes = self.units * self.boxes_per_unit
        room = 1 + tile.n // tile.m
        self.boxes_per_stage = room // self.boxes_per_unit * self.boxes_per_unit
        self.input_stages = -(-self.boxes // self.boxes_per_stage)
        self.chunk_units = TILE_K // self.unit_columns
        self.loaded_groups = 4 if tile.consumers == 2 else 1  # z of as many groups is in registers at a time
        self.warp_store = WarpStore(dtype)

    def column_of_box(self, box, column_tile):
        """The first column, in its part, of a tile's box; its part is the remainder by ``boxes_per_unit``."""
        if self.interleaved:
            return column_tile * (2 * self.tile.n) + box * TILE_K
        return column_tile * self.tile.n + box // self.boxes_per_unit * TILE_K

    def prepare(self, z, score, row_slot, dz, scaled_a, partial) -> tuple:
        """z and dz (rows, columns, parts), scaled_a (rows, columns, 1)."""
        rows = self.tile.m
        atom, tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), z, box_layout(self.dtype, rows), (rows, TILE_K))
        return (
            (atom, tensor, z),
            score,
            row_slot,
            self.warp_store.prepare(dz) if const_expr(self.dz) else None,
            self.warp_store.prepare(scaled_a) if const_expr(self.scaled_a) else None,
            partial,
        )

    def begin(self, args: tuple, row, row_end) -> tuple:
        """The scores of a thread's two rows, and their sums, zero."""
        _, score, row_slot, *_ = args
        scores = [score[row_slot[cutlass.min(mine, row_end - 1)]] for mine in self._own(row)]
        sums = cute.make_rmem_tensor((2,), Float32)
        for half in range(2):
            sums[half] = Float32(0.0)
        return scores[0], scores[1], sums

    def _own(self, row) -> list:
        """A thread's two rows."""
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4, self._lane()
        return [row + warp * ROWS + half * 8 + lane // 4 for half in range(2)]

    def _lane(self):
        """For three consumers by a shuffle, of which the compiler does not know that it gives the same lane each time: else it keeps
        what follows from it, addresses above all, in more registers than there are."""
        lane = cute.arch.lane_idx()
        return cute.arch.shuffle_sync_bfly(lane, 0) if self.tile.consumers == 3 else lane

    def _staging(self, staging: cute.Pointer, chunk: int):
        """The warp's buffer of a chunk of scaled_a."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        return staging + warp * (2 * ROWS * TILE_K) + chunk % 2 * ROWS * TILE_K

    def _own_bytes(self, lane):
        """Where a thread's elements of group 0, first half, lie in a box of its consumer's 64 rows. A group lies ``^ group * 32`` bytes
        from there (16 for a part of its own), for the swizzle is an exclusive or too; the second half 8 rows below."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        line, quarter = lane // 4, lane % 4
        begin = warp * (ROWS * 128) + line * 128
        if self.interleaved:
            return begin + ((quarter // 2 ^ line) * 16 + quarter % 2 * 8)
        return begin + (line * 16 + quarter * 4)

    def _load_group(self, boxes: list, own, group: int) -> dict:
        """z of a group of 8 columns of da: for each half the addresses and the registers."""
        within = ptx.exclusive_or(own, group * (32 if self.interleaved else 16))
        at = [box.toint() + within for box in boxes]
        found = {}
        for half in range(2):
            places = [begin + half * 8 * 128 for begin in at]
            registers = ptx.load_shared_8_bytes(places[0]) if self.interleaved else [ptx.load_shared_4_bytes(place) for place in places]
            found[half] = places, registers
        return found

    def compute(self, accumulators, unit: int, args: tuple, held: tuple, boxes: list, staging) -> None:
        """A unit: dz over z, scaled_a to the staging, the rows' sums."""
        groups = self.unit_columns // 8
        if self.scaled_a and unit % self.chunk_units == 0 and unit >= 2 * self.chunk_units:
            self.wait_until_read(self.chunk_units)  # the chunk before last, whose buffer this is
        lane = self._lane()
        own = self._own_bytes(lane)
        loaded, scaled = {}, {}
        for group in range(groups):
            if group % self.loaded_groups == 0:
                loaded = {ahead: self._load_group(boxes, own, ahead) for ahead in range(group, group + self.loaded_groups)}
            for half in range(2):
                places, registers = loaded[group][half]
                da = [accumulators[(unit * groups + group) * 4 + half * 2 + i] for i in range(2)]
                scaled[group % 2, half] = self._compute_pair(da, places, registers, held, half)
            if self.scaled_a and group % 2 == 1:
                line, chunk = lane % 16, unit // self.chunk_units
                begin = self._staging(staging, chunk).toint() + line * 128 + (lane // 16 ^ line % 8) * 16
                at = ptx.exclusive_or(begin, (unit % self.chunk_units * groups + group - 1) * 16)
                ptx.store_four_matrices(at, scaled[0, 0], scaled[0, 1], scaled[1, 0], scaled[1, 1])

    def _compute_pair(self, da: list, places: list, registers, held: tuple, half: int):
        """A thread's two neighbouring columns of a row: stores dz, adds to the row's sum, returns scaled_a in one register."""
        score, sums = held[half], held[2]
        values, *slopes = zip(*self._derived(registers), strict=True)
        for i in range(2):
            sums[half] = sums[half] + da[i] * values[i]
        weighted = [score * da[i] for i in range(2)]
        gradient = [[weighted[i] * slope[i] for i in range(2)] for slope in slopes]
        if self.dz and self.interleaved:
            ptx.store_8_bytes(places[0], *(ptx.pack(self.dtype, *both) for both in zip(*gradient, strict=True)))
        elif self.dz:
            for place, both in zip(places, gradient, strict=True):
                ptx.store_4_bytes(place, ptx.pack(self.dtype, *both))
        return ptx.pack(self.dtype, *(score * value for value in values))

    def _derived(self, registers) -> list[tuple]:
        """(value, slopes...) for both of a thread's neighbouring columns."""
        pairs = [ptx.unpack(self.dtype, register) for register in registers]
        if not self.interleaved:
            pairs = list(zip(*pairs, strict=True))  # from (gate, gate), (up, up) to (gate, up), (gate, up)
        return [self.derive(*pair) for pair in pairs]

    @cute.jit
    def send(self, unit: cutlass.Constexpr[int], args: tuple, boxes: list, staging, row, row_end, column_tile):
        """The unit's dz, and a chunk of scaled_a that it completes, in one bulk group."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        mine = row + warp * ROWS
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if const_expr(self.dz):
            for i in cutlass.range_constexpr(self.boxes_per_unit):
                column = self.column_of_box(unit * self.boxes_per_unit + i, column_tile)
                self.warp_store.send(args[3], boxes[i] + warp * const_expr(ROWS * TILE_K), mine, row_end, column, i)
        if const_expr(self.scaled_a and (unit + 1) % self.chunk_units == 0):
            chunk = const_expr(unit // self.chunk_units)
            column = column_tile * self.tile.n + const_expr(chunk * TILE_K)
            self.warp_store.send(args[4], self._staging(staging, chunk), mine, row_end, column, 0)
        cute.arch.cp_async_bulk_commit_group()

    def wait_until_read(self, groups: int) -> None:
        """Until the TMA unit has read what this warp sent, but for its last ``groups`` bulk groups."""
        cute.arch.cp_async_bulk_wait_group(groups, read=True)
        cute.arch.sync_warp()

    def store_sums(self, args: tuple, held: tuple, row, row_end, column_tile) -> None:
        if self.dscore:
            for half, mine in enumerate(self._own(row)):
                self._store_sum(args[5], column_tile, mine, row_end, held[2][half])

    @cute.jit
    def _store_sum(self, partial: cute.Tensor, column_tile: Int32, row: Int32, row_end: Int32, total: Float32):
        """A row's sum over this tile's columns: of the four lanes that hold it, in a fixed order."""
        total = total + cute.arch.shuffle_sync_bfly(total, 1)
        total = total + cute.arch.shuffle_sync_bfly(total, 2)
        if (cute.arch.lane_idx() % 4 == 0) & (row < row_end):
            partial[column_tile, row] = total

    def finish(self, consumer) -> None:
        """A tile's stores have left shared memory before its last stage is given back."""
