"""The epilogue of activation_backward.py: activations with their derivatives, and the three results of one block of 64 rows.

A thread holds da where epilogue.py says; z it loads itself, the values of its own rows and columns: 8 bytes (gate, up, gate, up)
of the interleaved layout, else 4 bytes a part. Rows and columns beyond the end are clamped to the last one, not branched around:
a predicate a load would keep the loads from being in flight together, and what is computed there is never stored. One unit of
columns is loaded ahead of the one that is computed. dz may be z's own memory: an element of z is read by one thread only, before the
barrier behind which its unit of dz is stored.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from sonicmoe.kernels import ptx
from sonicmoe.kernels.epilogue import GATED, RowStore, acquire_buffer, finish_stores, put_interleaved, relu, sigmoid

ONE = 1.0


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


class ActivationBackwardEpilogue:
    """accumulator = da -> dz and scaled_a, stored; row sums of da * a -> partial. Each of the three may be left out."""

    def __init__(
        self, *, dtype: type[cutlass.Numeric], tile_n: int, activation: str, interleaved: bool, dz: bool, dscore: bool, scaled_a: bool
    ) -> None:
        self.dtype = dtype
        self.tile_n = tile_n
        self.gated = activation in GATED
        self.derive = DERIVED[activation]
        self.interleaved = interleaved and self.gated
        self.dz, self.dscore, self.scaled_a = dz, dscore, scaled_a
        self.width = 32 if self.gated else 64  # columns of a unit; with gate and up they are 64 columns of z
        self.dz_store = RowStore(dtype, 64 if self.interleaved else self.width)
        self.a_store = RowStore(dtype, self.width)

    def prepare(self, z, score, row_slot, columns, dz, scaled_a, partial) -> tuple:
        """dz (rows, columns, parts) and scaled_a (rows, columns, 1) as RowStore takes them, or None."""
        return (
            z,
            score,
            row_slot,
            columns,
            self.dz_store.prepare(dz) if const_expr(self.dz) else None,
            self.a_store.prepare(scaled_a) if const_expr(self.scaled_a) else None,
            partial,
        )

    def store(self, accumulators, block: int, args: tuple, expert, row, row_end, column_tile, staging, consumer):
        """One block of 64 rows, as many of them as lie before ``row_end``."""
        z, score, row_slot, columns, dz_args, a_args, partial = args
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        own = [row + warp * 16 + half * 8 + lane // 4 for half in range(2)]
        clamped = [cutlass.min(mine, row_end - 1) for mine in own]
        sources = [z.iterator.toint() + Int64(mine) * (z.stride[0] * 2) for mine in clamped]
        scores = [score[row_slot[mine]] for mine in clamped]
        sums = [Float32(0.0), Float32(0.0)]
        base = block * self.tile_n // 2
        first = column_tile * self.tile_n
        groups = self.width // 8
        starts = range(0, self.tile_n // 8, groups)
        ahead = self._load(sources, first, columns, starts[0])
        chunk = 0
        for start in starts:
            loaded = ahead
            if start + groups < self.tile_n // 8:
                ahead = self._load(sources, first, columns, start + groups)
            dz, scaled = {}, {}
            for group in range(groups):
                for half in range(2):
                    da = [accumulators[base + (start + group) * 4 + half * 2 + i] for i in range(2)]
                    values, *slopes = zip(*self._derived(loaded[group, half]), strict=True)
                    for i in range(2):
                        sums[half] = sums[half] + da[i] * values[i]
                    weighted = [scores[half] * da[i] for i in range(2)]
                    dz[group, half] = [[weighted[i] * slope[i] for i in range(2)] for slope in slopes]
                    scaled[group, half] = ptx.pack(self.dtype, *(scores[half] * value for value in values))
            column = first + start * 8
            if self.dz:
                chunk = self._store_dz(dz, dz_args, staging, chunk, row, row_end, column, consumer)
            if self.scaled_a:
                acquire_buffer(chunk, consumer)
                self.a_store.put(lambda group, half, scaled=scaled: scaled[group, half], staging, chunk)
                self.a_store.send(a_args, staging, chunk, row, row_end, column, 0, consumer)
                chunk += 1
        if self.dscore:
            for half in range(2):
                self._store_sum(partial, column_tile, own[half], row_end, sums[half])

    def _load(self, sources, first, columns, start: int) -> dict:
        """This thread's z of one unit of columns: for each (group, half) its registers, gate and up alternating or one after the other."""
        quarter = cute.arch.lane_idx() % 4
        loaded = {}
        for group in range(self.width // 8):
            column = cutlass.min(first + (start + group) * 8 + 2 * quarter, columns - 2)
            for half in range(2):
                if self.interleaved:
                    loaded[group, half] = ptx.load_8_bytes(sources[half] + Int64(column) * 4)
                else:
                    parts = [column, columns + column] if self.gated else [column]
                    loaded[group, half] = [ptx.load_4_bytes(sources[half] + Int64(part) * 2) for part in parts]
        return loaded

    def _derived(self, registers) -> list[tuple]:
        """(value, slopes...) for both of a thread's neighbouring columns."""
        pairs = [ptx.unpack(self.dtype, register) for register in registers]
        if not self.interleaved:
            pairs = list(zip(*pairs, strict=True))  # from (gate, gate), (up, up) to (gate, up), (gate, up)
        return [self.derive(*pair) for pair in pairs]

    def _store_dz(self, dz: dict, args, staging, chunk: int, row, row_end, column, consumer) -> int:
        """One unit of dz: a chunk, or one for each of gate and up; returns the number of the next chunk."""
        store = self.dz_store
        if self.interleaved:
            acquire_buffer(chunk, consumer)
            put_interleaved(
                store, lambda group, half: [ptx.pack(self.dtype, *pair) for pair in zip(*dz[group, half], strict=True)], staging, chunk
            )
            store.send(args, staging, chunk, row, row_end, 2 * column, 0, consumer)
            return chunk + 1
        for part in range(2 if self.gated else 1):
            acquire_buffer(chunk, consumer)
            store.put(lambda group, half, part=part: ptx.pack(self.dtype, *dz[group, half][part]), staging, chunk)
            store.send(args, staging, chunk, row, row_end, column, part, consumer)
            chunk += 1
        return chunk

    @cute.jit
    def _store_sum(self, partial: cute.Tensor, column_tile: Int32, row: Int32, row_end: Int32, total: Float32):
        """A row's sum over this tile's columns: of the four lanes that hold it, in a fixed order."""
        total = total + cute.arch.shuffle_sync_bfly(total, 1)
        total = total + cute.arch.shuffle_sync_bfly(total, 2)
        if (cute.arch.lane_idx() % 4 == 0) & (row < row_end):
            partial[column_tile, row] = total

    def finish(self, consumer) -> None:
        finish_stores()
