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


def store_8_bytes(shared: Int32, low: Uint32, high: Uint32) -> None:
    cute.arch.inline_ptx("st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[shared, low, high])


def copy_16_bytes_out(destination: Int64, shared: Int32) -> None:
    """16 bytes from shared to global memory through registers."""
    cute.arch.inline_ptx(
        "{ .reg .b32 a, b, c, d; ld.shared.v4.b32 {a, b, c, d}, [{$r1}]; st.global.v4.b32 [{$r0}], {a, b, c, d}; }",
        read_only_args=[destination, shared],
    )


def pack(dtype: type[cutlass.Numeric], low: Float32, high: Float32) -> Uint32:
    """Two values rounded to the nearest of ``dtype`` (16 bits), the first in the low half."""
    suffix = "bf16x2" if dtype is cutlass.BFloat16 else "f16x2"
    return cute.arch.inline_ptx(f"cvt.rn.{suffix}.f32 {{$w0}}, {{$r0}}, {{$r1}};", write_only_types=[Uint32], read_only_args=[high, low])


def load_pair(dtype: type[cutlass.Numeric], address: Int64) -> tuple[Float32, Float32]:
    """Two neighbouring values of ``dtype`` (16 bits) from global memory that nobody writes meanwhile."""
    if dtype is cutlass.BFloat16:
        split = "shl.b32 {$w0}, pair, 16; and.b32 {$w1}, pair, 0xffff0000;"
    else:
        split = ".reg .b16 low, high; mov.b32 {low, high}, pair; cvt.f32.f16 {$w0}, low; cvt.f32.f16 {$w1}, high;"
    return cute.arch.inline_ptx(
        "{ .reg .b32 pair; ld.global.nc.b32 pair, [{$r0}]; " + split + " }",
        write_only_types=[Float32, Float32],
        read_only_args=[address],
    )
