/* Every opcode of the core. lower.py finds their numbers by name (emulator_opcodes) and turns PTX's modifiers into these names. */

/* name, suffix, C type, value of (a, b) */
#define BINARY(X) \
    X(add, b16, u16, a + b) X(add, b32, u32, a + b) X(add, b64, u64, a + b) \
    X(sub, b16, u16, a - b) X(sub, b32, u32, a - b) X(sub, b64, u64, a - b) \
    X(mul_lo, b16, u16, (u32)a * b) X(mul_lo, b32, u32, a * b) X(mul_lo, b64, u64, a * b) \
    X(mul_hi, s32, s32, (s32)((s64)a * b >> 32)) X(mul_hi, u32, u32, (u32)((u64)a * b >> 32)) \
    X(mul_hi, s64, s64, (s64)((__int128)a * b >> 64)) X(mul_hi, u64, u64, (u64)((unsigned __int128)a * b >> 64)) \
    X(and, b16, u16, a & b) X(and, b32, u32, a & b) X(and, b64, u64, a & b) \
    X(or, b16, u16, a | b) X(or, b32, u32, a | b) X(or, b64, u64, a | b) \
    X(xor, b16, u16, a ^ b) X(xor, b32, u32, a ^ b) X(xor, b64, u64, a ^ b) \
    X(min, s16, s16, a < b ? a : b) X(min, u16, u16, a < b ? a : b) X(min, s32, s32, a < b ? a : b) \
    X(min, u32, u32, a < b ? a : b) X(min, s64, s64, a < b ? a : b) X(min, u64, u64, a < b ? a : b) \
    X(max, s16, s16, a > b ? a : b) X(max, u16, u16, a > b ? a : b) X(max, s32, s32, a > b ? a : b) \
    X(max, u32, u32, a > b ? a : b) X(max, s64, s64, a > b ? a : b) X(max, u64, u64, a > b ? a : b) \
    X(div, s32, s32, b == 0 ? -1 : b == -1 ? (s32)-(u32)a : a / b) X(div, u32, u32, b ? a / b : ~0u) \
    X(div, s64, s64, b == 0 ? -1 : b == -1 ? (s64)-(u64)a : a / b) X(div, u64, u64, b ? a / b : ~0ull) \
    X(rem, s32, s32, b == 0 || b == -1 ? 0 : a % b) X(rem, u32, u32, b ? a % b : a) \
    X(rem, s64, s64, b == 0 || b == -1 ? 0 : a % b) X(rem, u64, u64, b ? a % b : a) \
    X(add, f64, double, a + b) X(sub, f64, double, a - b) X(mul, f64, double, a * b) X(div, f64, double, a / b) \
    X(min, f64, double, fmin(a, b)) X(max, f64, double, fmax(a, b))

/* The same in float32, with .ftz and .sat. */
#define BINARY_FLOAT(X) \
    X(add, a + b) X(sub, a - b) X(mul, a * b) X(div, a / b) X(min, least(a, b)) X(max, greatest(a, b)) \
    X(min_nan, isnan(a) || isnan(b) ? NAN : least(a, b)) X(max_nan, isnan(a) || isnan(b) ? NAN : greatest(a, b)) \
    X(copysign, copysignf(b, a))

#define UNARY_FLOAT(X) \
    X(neg, -a) X(abs, fabsf(a)) X(rcp, 1.0f / a) X(sqrt, sqrtf(a)) X(rsqrt, (float)(1.0 / sqrt(a))) X(ex2, exp2f(a)) X(lg2, log2f(a)) \
    X(sin, sinf(a)) X(cos, cosf(a)) X(tanh, tanhf(a))

/* name, suffix, C type of the result, C type of a, value */
#define UNARY(X) \
    X(not, b16, u16, u16, ~a) X(not, b32, u32, u32, ~a) X(not, b64, u64, u64, ~a) \
    X(neg, s16, u16, u16, -a) X(neg, s32, u32, u32, -a) X(neg, s64, u64, u64, -a) X(neg, f64, double, double, -a) \
    X(abs, s16, s16, s16, a < 0 ? -a : a) X(abs, s32, u32, s32, a < 0 ? -(u32)a : (u32)a) X(abs, s64, u64, s64, a < 0 ? -(u64)a : (u64)a) \
    X(abs, f64, double, double, fabs(a)) X(rcp, f64, double, double, 1.0 / a) X(sqrt, f64, double, double, sqrt(a)) \
    X(cnot, b32, u32, u32, !a) X(cnot, b64, u64, u64, !a) \
    X(popc, b32, u32, u32, (u32)__builtin_popcount(a)) X(popc, b64, u32, u64, (u32)__builtin_popcountll(a)) \
    X(clz, b32, u32, u32, a ? (u32)__builtin_clz(a) : 32) X(clz, b64, u32, u64, a ? (u32)__builtin_clzll(a) : 64) \
    X(brev, b32, u32, u32, (u32)reverse(a, 32)) X(brev, b64, u64, u64, reverse(a, 64)) \
    X(bfind, u32, u32, u32, a ? 31u - (u32)__builtin_clz(a) : ~0u) X(bfind, u64, u32, u64, a ? 63u - (u32)__builtin_clzll(a) : ~0u) \
    X(bfind, s32, u32, s32, find_bit((s64)a)) X(bfind, s64, u32, s64, find_bit(a))

/* name, suffix, C types of d, a, b, c, value */
#define TERNARY(X) \
    X(mad_lo, b16, u16, u16, u16, u16, (u32)a * b + c) X(mad_lo, b32, u32, u32, u32, u32, a * b + c) \
    X(mad_lo, b64, u64, u64, u64, u64, a * b + c) X(mad_hi, s32, s32, s32, s32, s32, (s32)((u32)((s64)a * b >> 32) + (u32)c)) \
    X(mad_hi, u32, u32, u32, u32, u32, (u32)((u64)a * b >> 32) + c) X(mad_wide, s32, u64, s32, s32, u64, (u64)((s64)a * b) + c) \
    X(mad_wide, u32, u64, u32, u32, u64, (u64)a * b + c) X(mad_wide, s16, u32, s16, s16, u32, (u32)((s32)a * b) + c) \
    X(mad_wide, u16, u32, u16, u16, u32, (u32)a * b + c) X(fma, f64, double, double, double, double, fma(a, b, c)) \
    X(bfe, u32, u32, u32, u32, u32, (u32)extract(a, b, c, 32)) X(bfe, u64, u64, u64, u32, u32, extract(a, b, c, 64)) \
    X(bfe, s32, u32, u32, u32, u32, (u32)extract_signed(a, b, c, 32)) X(bfe, s64, u64, u64, u32, u32, extract_signed(a, b, c, 64)) \
    X(shf_l, wrap, u32, u32, u32, u32, (u32)((((u64)b << 32 | a) << (c & 31)) >> 32)) \
    X(shf_l, clamp, u32, u32, u32, u32, c >= 32 ? a : (u32)((((u64)b << 32 | a) << c) >> 32)) \
    X(shf_r, wrap, u32, u32, u32, u32, (u32)(((u64)b << 32 | a) >> (c & 31))) \
    X(shf_r, clamp, u32, u32, u32, u32, c >= 32 ? b : (u32)(((u64)b << 32 | a) >> c)) \
    X(prmt, b32, u32, u32, u32, u32, permute(a, b, c)) X(lop3, b32, u32, u32, u32, u32, logic(a, b, c, in->a)) \
    X(slct, b32, u32, u32, u32, s32, c >= 0 ? a : b) X(slct, b64, u64, u64, u64, s32, c >= 0 ? a : b) \
    X(slct_f32, b32, u32, u32, u32, float, c >= 0 ? a : b)

/* name, suffix, C types of d, a, b, value */
#define MIXED(X) \
    X(mul_wide, s16, u32, s16, s16, (u32)((s32)a * b)) X(mul_wide, u16, u32, u16, u16, (u32)a * b) \
    X(mul_wide, s32, u64, s32, s32, (u64)((s64)a * b)) X(mul_wide, u32, u64, u32, u32, (u64)a * b) \
    X(shl, b16, u16, u16, u32, b > 15 ? 0 : (u32)a << b) X(shl, b32, u32, u32, u32, b > 31 ? 0 : a << b) \
    X(shl, b64, u64, u64, u32, b > 63 ? 0 : a << b) X(shr, u16, u16, u16, u32, b > 15 ? 0 : a >> b) \
    X(shr, u32, u32, u32, u32, b > 31 ? 0 : a >> b) X(shr, u64, u64, u64, u32, b > 63 ? 0 : a >> b) \
    X(shr, s16, s16, s16, u32, a >> (b > 15 ? 15 : b)) X(shr, s32, s32, s32, u32, a >> (b > 31 ? 31 : b)) \
    X(shr, s64, s64, s64, u32, a >> (b > 63 ? 63 : b))

/* setp: comparison, suffix, C type, condition */
#define INTEGER_COMPARE(X, suffix, type) \
    X(eq, suffix, type, a == b) X(ne, suffix, type, a != b) X(lt, suffix, type, a < b) X(le, suffix, type, a <= b) \
    X(gt, suffix, type, a > b) X(ge, suffix, type, a >= b)
#define FLOAT_COMPARE(X, suffix, type) \
    X(eq, suffix, type, a == b) X(ne, suffix, type, a < b || a > b) X(lt, suffix, type, a < b) X(le, suffix, type, a <= b) \
    X(gt, suffix, type, a > b) X(ge, suffix, type, a >= b) X(equ, suffix, type, !(a < b || a > b)) X(neu, suffix, type, !(a == b)) \
    X(ltu, suffix, type, !(a >= b)) X(leu, suffix, type, !(a > b)) X(gtu, suffix, type, !(a <= b)) X(geu, suffix, type, !(a < b)) \
    X(num, suffix, type, !isnan(a) && !isnan(b)) X(nan, suffix, type, isnan(a) || isnan(b))
#define COMPARE(X) \
    INTEGER_COMPARE(X, s16, s16) INTEGER_COMPARE(X, u16, u16) INTEGER_COMPARE(X, s32, s32) INTEGER_COMPARE(X, u32, u32) \
    INTEGER_COMPARE(X, s64, s64) INTEGER_COMPARE(X, u64, u64) FLOAT_COMPARE(X, f32, float) FLOAT_COMPARE(X, f64, double)

/* Elements of 16 bits, one or two a register, computed in float64 and rounded once: name, value */
#define HALF_BINARY(X) \
    X(add, a + b) X(sub, a - b) X(mul, a * b) X(min, least(a, b)) X(max, greatest(a, b)) \
    X(min_nan, isnan(a) || isnan(b) ? NAN : least(a, b)) X(max_nan, isnan(a) || isnan(b) ? NAN : greatest(a, b))

/* Kept in groups, each the business of one file: alu.c, memory.c, lanes.c, barriers.c, async.c. */
#define OTHERS(X) \
    X(mov_b16) X(mov_b32) X(mov_b64) X(mov_pred) X(repack) X(selp_b16) X(selp_b32) X(selp_b64) X(and_pred) X(or_pred) X(xor_pred) \
    X(not_pred) X(fma_f32) X(bfi_b32) X(bfi_b64) X(cvt) X(cvt_pack) X(fma_half) X(neg_half) X(abs_half) X(activemask) X(clock) \
    X(setmaxnreg) X(nothing) \
    X(ld) X(st) X(atom_add) X(atom_min) X(atom_max) X(atom_and) X(atom_or) X(atom_xor) X(atom_exch) X(atom_cas) X(atom_inc) X(atom_dec) \
    X(mapa) X(ldmatrix) X(stmatrix) \
    X(shfl) X(vote) X(match_any) X(match_all) X(redux) X(elect) \
    X(bar_warp) X(bar_sync) X(bar_arrive) X(cluster_arrive) X(cluster_wait) X(mbarrier_init) X(mbarrier_inval) X(mbarrier_arrive) \
    X(mbarrier_expect) X(mbarrier_wait) X(fence_async) X(fence_mbarrier_init) X(fence_device) X(grid_wait) \
    X(cp_async) X(cp_async_commit) X(cp_async_wait) X(cp_async_arrive) X(tile_load) X(tile_store) X(bulk_load) X(bulk_store) X(st_async) \
    X(bulk_commit) X(bulk_wait) X(wgmma) X(wgmma_fence) X(wgmma_commit) X(wgmma_wait) \
    X(bra) X(ret) X(trap)

/* Types of memory accesses and conversions. */
#define TYPES(X) X(u8) X(u16) X(u32) X(u64) X(s8) X(s16) X(s32) X(s64) X(f16) X(bf16) X(f32) X(f64) X(tf32)
#define TYPE_ENTRY(name) TYPE_##name,
enum type { TYPES(TYPE_ENTRY) TYPE_COUNT };

#define ENTRY_2(name, suffix, ...) OP_##name##_##suffix,
#define ENTRY_FLOAT(name, ...) OP_##name##_f32,
#define ENTRY_HALF(name, ...) OP_##name##_half,
#define ENTRY_COMPARE(name, suffix, ...) OP_setp_##name##_##suffix,
#define ENTRY_1(name) OP_##name,
enum opcode {
    BINARY(ENTRY_2) BINARY_FLOAT(ENTRY_FLOAT) UNARY_FLOAT(ENTRY_FLOAT) UNARY(ENTRY_2) TERNARY(ENTRY_2) MIXED(ENTRY_2)
    COMPARE(ENTRY_COMPARE) HALF_BINARY(ENTRY_HALF) OTHERS(ENTRY_1) OPCODE_COUNT
};
