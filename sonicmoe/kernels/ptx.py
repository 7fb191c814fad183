"""The few instructions that the grouped GEMMs write out by hand, each under the name of what it does."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32


def copy_16_bytes_async(shared: Int32, source: Int64, source_bytes: Int32) -> None:
    """16 bytes from global to shared memory without registers; the part beyond ``source_bytes`` (0 or 16) is zeroed."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};",
        read_only_args=[shared, source, source_bytes],
    )


def store_four_matrices(shared: Int32, m0: Uint32, m1: Uint32, m2: Uint32, m3: Uint32) -> None:
    """Four 8x8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of matrix l // 8."""
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[shared, m0, m1, m2, m3],
    )


def store_4_bytes(shared: Int32, value: Uint32) -> None:
    cute.arch.inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[shared, value])


def store_8_bytes(shared: Int32, low: Uint32, high: Uint32) -> None:
    cute.arch.inline_ptx("st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[shared, low, high])


def store_four_matrices_transposed(shared: Int32, m0: Uint32, m1: Uint32, m2: Uint32, m3: Uint32) -> None:
    """As store_four_matrices, each matrix transposed: a row in memory is a column of the fragment."""
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[shared, m0, m1, m2, m3],
    )


def store_16_zero_bytes(shared: Int32) -> None:
    cute.arch.inline_ptx("{ .reg .b32 z; mov.b32 z, 0; st.shared.v4.b32 [{$r0}], {z, z, z, z}; }", read_only_args=[shared])


def copy_16_bytes_out(destination: Int64, shared: Int32) -> None:
    """16 bytes from shared to global memory through registers."""
    cute.arch.inline_ptx(
        "{ .reg .b32 a, b, c, d; ld.shared.v4.b32 {a, b, c, d}, [{$r1}]; st.global.v4.b32 [{$r0}], {a, b, c, d}; }",
        read_only_args=[destination, shared],
    )


def add_16_bytes_out(destination: Int64, shared: Int32) -> None:
    """Adds four float32 in shared memory to four in global memory, which nobody else writes meanwhile."""
    names = ("x", "y", "z", "w")
    adds = " ".join(f"add.f32 g{name}, g{name}, s{name};" for name in names)
    cute.arch.inline_ptx(
        "{ .reg .f32 sx, sy, sz, sw, gx, gy, gz, gw; ld.shared.v4.f32 {sx, sy, sz, sw}, [{$r1}]; "
        "ld.global.v4.f32 {gx, gy, gz, gw}, [{$r0}]; " + adds + " st.global.v4.f32 [{$r0}], {gx, gy, gz, gw}; }",
        read_only_args=[destination, shared],
    )


def exclusive_or(value: Int32, constant: int) -> Int32:
    """Computed where it is used, not kept in a register from an earlier use."""
    return cute.arch.inline_ptx(f"xor.b32 {{$w0}}, {{$r0}}, {constant};", write_only_types=[Int32], read_only_args=[value])


def bits(value: Float32) -> Uint32:
    """The register of a float32."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[value])


def pack(dtype: type[cutlass.Numeric], low: Float32, high: Float32) -> Uint32:
    """Two values rounded to the nearest of ``dtype`` (16 bits), the first in the low half."""
    suffix = "bf16x2" if dtype is cutlass.BFloat16 else "f16x2"
    return cute.arch.inline_ptx(f"cvt.rn.{suffix}.f32 {{$w0}}, {{$r0}}, {{$r1}};", write_only_types=[Uint32], read_only_args=[high, low])


def load_shared_4_bytes(address: Int32) -> Uint32:
    return cute.arch.inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address])


def load_shared_8_bytes(address: Int32) -> tuple[Uint32, Uint32]:
    return cute.arch.inline_ptx("ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Uint32, Uint32], read_only_args=[address])


def unpack(dtype: type[cutlass.Numeric], pair: Uint32) -> tuple[Float32, Float32]:
    """The two values of ``dtype`` (16 bits) in a register, the low half first."""
    if dtype is cutlass.BFloat16:
        split = "shl.b32 {$w0}, {$r0}, 16; and.b32 {$w1}, {$r0}, 0xffff0000;"
    else:
        split = "{ .reg .b16 low, high; mov.b32 {low, high}, {$r0}; cvt.f32.f16 {$w0}, low; cvt.f32.f16 {$w1}, high; }"
    return cute.arch.inline_ptx(split, write_only_types=[Float32, Float32], read_only_args=[pair])


def load_pair(dtype: type[cutlass.Numeric], address: Int64) -> tuple[Float32, Float32]:
    """Two neighbouring values of ``dtype`` (16 bits) from global memory that nobody writes meanwhile."""
    pair = cute.arch.inline_ptx("ld.global.nc.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address])
    return unpack(dtype, pair)
