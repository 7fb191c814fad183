"""Small parts of which the epilogues are made: activations, bias, and the way of a block of rows to memory.

A consumer warpgroup holds blocks of 64 rows. In the accumulator of one block, thread ``warp * 32 + lane`` has, for each group of
8 columns g and each half r, columns ``8 g + 2 (lane % 4) + {0, 1}`` of row ``16 warp + 8 r + lane / 4``: registers
``4 g + 2 r + {0, 1}``. Stores go through shared memory in chunks of 64 rows x 64 (or 32) columns in the TMA's swizzle, two
buffers deep: a chunk whose 64 rows all belong to the expert leaves by TMA, a tail by 16-byte stores of the rows that do.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from sonicmoe.kernels import ptx
from sonicmoe.kernels.tiles import STORE_BUFFERS

STORE_BARRIER = 1
"""Named barriers 1, 2, 3: the 128 threads of consumer 0, 1, 2."""

BUFFER_BYTES = 64 * 64 * 2


@cute.jit
def acquire_buffer(chunk: cutlass.Constexpr[int], consumer: Int32):
    """Waits until the buffer of the ``chunk``-th store of a block of rows may be overwritten."""
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
    if const_expr(chunk == 0 or chunk >= STORE_BUFFERS):
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0 if chunk == 0 else STORE_BUFFERS - 1, read=True)
        cute.arch.barrier(barrier_id=STORE_BARRIER + consumer, number_of_threads=128)


class RowStore:
    """Stores chunks of 64 rows x ``width`` columns of a row-major output seen as (rows, columns, parts)."""

    def __init__(self, dtype: type[cutlass.Numeric], width: int) -> None:
        self.dtype = dtype
        self.width = width

    def _layout(self):
        kinds = {64: warpgroup.SmemLayoutAtomKind.K_SW128, 32: warpgroup.SmemLayoutAtomKind.K_SW64}
        atom = warpgroup.make_smem_layout_atom(kinds[self.width], self.dtype)
        return cute.tile_to_shape(atom, (64, self.width), order=(0, 1))

    def prepare(self, out: cute.Tensor) -> tuple:
        """What the kernel needs to store into ``out`` (rows, columns, parts)."""
        atom, tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), out, self._layout(), (64, self.width))
        return atom, tensor, out

    @cute.jit
    def address(self, buffer: Int32, row: Int32, piece: Int32):
        """Address of 16-byte ``piece`` of ``row`` in the swizzle of ``width``."""
        if const_expr(self.width == 64):
            return buffer + row * 128 + ((piece ^ (row % 8)) * 16)
        return buffer + row * 64 + ((piece ^ ((row // 2) % 4)) * 16)

    def put(self, values, staging: cute.Pointer, chunk: int) -> None:
        """Writes a chunk to its buffer; ``values(group, half)`` gives the packed pair of columns of this thread."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        buffer = staging.toint() + chunk % STORE_BUFFERS * BUFFER_BYTES
        row = warp * 16 + lane % 16
        for i in range(self.width // 16):
            at = self.address(buffer, row, 2 * i + lane // 16)
            ptx.store_four_matrices(at, values(2 * i, 0), values(2 * i, 1), values(2 * i + 1, 0), values(2 * i + 1, 1))

    def put_transposed(self, values, staging: cute.Pointer, chunk: int) -> None:
        """Writes 64 columns of the accumulator as 64 rows of the output, this block's 64 rows as its columns."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        buffer = staging.toint() + chunk % STORE_BUFFERS * BUFFER_BYTES
        for i in range(4):
            at = self.address(buffer, 16 * i + lane // 16 * 8 + lane % 8, 2 * warp + lane // 8 % 2)
            ptx.store_four_matrices_transposed(at, values(2 * i, 0), values(2 * i, 1), values(2 * i + 1, 0), values(2 * i + 1, 1))

    @cute.jit
    def send(
        self,
        args: tuple,
        staging: cute.Pointer,
        chunk: cutlass.Constexpr[int],
        row: Int32,
        row_end: Int32,
        column: Int32,
        part,
        consumer: Int32,
    ):
        """The chunk's buffer to rows [row, min(row + 64, row_end)), columns [column, column + width) of ``part``."""
        atom, tensor, out = args
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        pointer = staging + const_expr(chunk % STORE_BUFFERS * BUFFER_BYTES // 2)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=STORE_BARRIER + consumer, number_of_threads=128)
        if row + 64 <= row_end:
            if warp == 0:
                layout = self._layout()
                shared = cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=self.dtype), layout.outer)
                target = cute.local_tile(cute.domain_offset((row, column), tensor[None, None, part]), (64, self.width), (0, 0))
                to_shared, to_memory = cpasync.tma_partition(
                    atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(target, 0, 2)
                )
                cute.copy(atom, to_shared, to_memory)
        else:
            thread = cute.arch.thread_idx()[0] % 128
            pieces = const_expr(self.width // 8)
            destination = out.iterator.toint() + Int64(part) * (out.stride[2] * 2)
            for i in cutlass.range_constexpr(64 * pieces // 128):
                line = (thread + i * 128) // pieces
                piece = thread % pieces
                at = column + piece * 8
                if (row + line < row_end) & (at < out.shape[1]):
                    ptx.copy_16_bytes_out(
                        destination + (Int64(row + line) * out.stride[0] + at) * 2, self.address(pointer.toint(), line, piece)
                    )
        if warp == 0:
            cute.arch.cp_async_bulk_commit_group()


def put_interleaved(store: RowStore, pairs, staging: cute.Pointer, chunk: int) -> None:
    """64 columns of z from 32 gate and 32 up columns: ``pairs(group, half)``, the packed (gate, up) of a thread's two columns, are
    8 neighbouring bytes."""
    lane = cute.arch.lane_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
    quarter = lane % 4
    buffer = staging.toint() + chunk % STORE_BUFFERS * BUFFER_BYTES
    for group in range(4):
        for half in range(2):
            line = warp * 16 + half * 8 + lane // 4
            at = store.address(buffer, line, 2 * group + quarter // 2) + (quarter % 2) * 8
            ptx.store_8_bytes(at, *pairs(group, half))


@cute.jit
def finish_stores():
    """Before the block ends: its buffers must have been read."""
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 == 0:
        cute.arch.cp_async_bulk_wait_group(0, read=True)


def sigmoid(x: Float32) -> Float32:
    return cute.arch.rcp_approx(Float32(1.0) + cute.arch.exp2(x * Float32(-1.4426950408889634)))


def relu(x: Float32) -> Float32:
    """NaN stays NaN, as in PyTorch."""
    return cute.arch.fmax(x, Float32(0.0), nan=True)


def gelu(x: Float32) -> Float32:
    """x times the normal distribution function, by erfc's approximation 7.1.26 of Abramowitz and Stegun: in float32 3.3e-7 off
    at most, far below the rounding of the result, in fewer instructions and registers than a full erf."""
    size = cute.arch.fmax(x, -x)
    t = cute.arch.rcp_approx(Float32(1.0) + Float32(0.3275911 * 0.7071067811865476) * size)
    series = Float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + Float32(coefficient)
    half_erfc = Float32(0.5) * series * t * cute.arch.exp2(Float32(-0.5 * 1.4426950408889634) * size * size)
    return relu(x) - size * half_erfc


def clamped_swiglu(gate: Float32, up: Float32) -> Float32:
    gate = cute.arch.fmin(gate, Float32(7.0), nan=True)
    up = cute.arch.fmax(cute.arch.fmin(up, Float32(7.0), nan=True), Float32(-7.0), nan=True)
    return gate * sigmoid(Float32(1.702) * gate) * (up + Float32(1.0))


GATED = {
    "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "reglu": lambda gate, up: relu(gate) * up,
    "swiglu_oai": clamped_swiglu,
}
PLAIN = {
    "identity": lambda x: x,
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "relu": relu,
    "relu_squared": lambda x: relu(x) * relu(x),
}


class ProjectionEpilogue:
    """accumulator (+ bias) -> z, stored when training; activation(z) -> out.

    Gated: the tile's n columns are n/2 of the gate and the same n/2 of the up projection, in this order, whatever the layout
    in memory; z goes back in that layout. ``identity`` with no z is the down-projection.
    """

    def __init__(self, *, dtype: type[cutlass.Numeric], tile_n: int, activation: str, interleaved: bool, store_z: bool, bias: bool) -> None:
        self.dtype = dtype
        self.tile_n = tile_n
        self.gated = activation in GATED
        self.activation = GATED[activation] if self.gated else PLAIN[activation]
        self.interleaved = interleaved and self.gated
        self.store_z = store_z
        self.bias = bias
        self.columns = tile_n // 2 if self.gated else tile_n  # of the output
        self.width = 64 if self.columns % 64 == 0 else 32
        self.out = RowStore(dtype, self.width)
        # Interleaved: one chunk of z holds the gate and up columns of half as many outputs.
        self.z = RowStore(dtype, 64 if self.interleaved else self.width)

    def prepare(self, out: cute.Tensor, z: cute.Tensor | None, bias: cute.Tensor | None) -> tuple:
        """out (rows, columns, 1); z (rows, columns, parts): interleaved one part of twice the columns; bias (columns, parts, experts)."""
        return (
            self.out.prepare(out),
            self.z.prepare(z) if const_expr(self.store_z) else None,
            bias if const_expr(self.bias) else None,
        )

    def store(self, accumulators, block: int, args: tuple, expert, row, row_end, column_tile, staging, consumer):
        """One block of 64 rows, as many of them as lie before ``row_end``."""
        out_args, z_args, bias = args
        base = block * self.tile_n // 2  # first register of this block
        up_at = self.columns // 2  # from a gate's register to that of its up column
        first = column_tile * self.columns

        def gate(group, half, i):
            return accumulators[base + group * 4 + half * 2 + i]

        def up(group, half, i):
            return accumulators[base + up_at + group * 4 + half * 2 + i]

        def activated(group, half, i):
            if self.gated:
                return self.activation(gate(group, half, i), up(group, half, i))
            return self.activation(gate(group, half, i))

        chunk = 0
        for start in range(0, self.columns // 8, self.width // 8):  # in groups of 8 output columns
            column = first + start * 8
            if self.bias:
                self._add_bias(accumulators, base, bias, expert, first, start)
            if self.store_z and self.interleaved:
                for half_start in range(start, start + self.width // 8, 4):
                    acquire_buffer(chunk, consumer)
                    put_interleaved(
                        self.z,
                        lambda group, half, start=half_start: [
                            ptx.pack(self.dtype, gate(start + group, half, i), up(start + group, half, i)) for i in range(2)
                        ],
                        staging,
                        chunk,
                    )
                    self.z.send(z_args, staging, chunk, row, row_end, 2 * (first + half_start * 8), 0, consumer)
                    chunk += 1
            elif self.store_z:
                for part in range(2 if self.gated else 1):
                    acquire_buffer(chunk, consumer)
                    source = gate if part == 0 else up
                    self.z.put(
                        lambda group, half, source=source, start=start: ptx.pack(
                            self.dtype, source(start + group, half, 0), source(start + group, half, 1)
                        ),
                        staging,
                        chunk,
                    )
                    self.z.send(z_args, staging, chunk, row, row_end, column, part, consumer)
                    chunk += 1
            acquire_buffer(chunk, consumer)
            self.out.put(
                lambda group, half, start=start: ptx.pack(self.dtype, activated(start + group, half, 0), activated(start + group, half, 1)),
                staging,
                chunk,
            )
            self.out.send(out_args, staging, chunk, row, row_end, column, 0, consumer)
            chunk += 1

    @cute.jit
    def _add_bias(
        self,
        accumulators: cute.Tensor,
        base: cutlass.Constexpr[int],
        bias: cute.Tensor,
        expert: Int32,
        first: Int32,
        start: cutlass.Constexpr[int],
    ):
        """Adds the bias of the chunk whose first group of 8 output columns is ``start``."""
        mine = first + 2 * (cute.arch.lane_idx() % 4)
        own = bias.iterator.toint() + Int64(expert) * (bias.stride[2] * 2)
        for group in cutlass.range_constexpr(start, start + self.width // 8):
            column = mine + group * 8
            if column < bias.shape[0]:
                # Two loads of two neighbours: (gate, up) of each column, or both columns of the gate and of the up projection.
                for i in cutlass.range_constexpr(2 if self.gated else 1):
                    offset = column * bias.stride[0] + i * (bias.stride[0] if const_expr(self.interleaved) else bias.stride[1])
                    pair = ptx.load_pair(self.dtype, own + Int64(offset) * 2)
                    for j in cutlass.range_constexpr(2):
                        part, which = (j, i) if const_expr(self.interleaved) else (i, j)
                        at = const_expr(base + part * self.columns // 2 + group * 4 + which)
                        accumulators[at] = accumulators[at] + pair[j]
                        accumulators[at + 2] = accumulators[at + 2] + pair[j]

    def finish(self, consumer) -> None:
        finish_stores()
