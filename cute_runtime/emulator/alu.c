/* What a lane computes from its own registers. */
#include <fenv.h>
#include <math.h>
#include <string.h>

#include "core.h"
#include "opcodes.h"

static float flush(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value; }
static double least(double a, double b) { return isnan(a) ? b : isnan(b) ? a : a == b ? (signbit(a) ? a : b) : a < b ? a : b; }
static double greatest(double a, double b) { return isnan(a) ? b : isnan(b) ? a : a == b ? (signbit(a) ? b : a) : a > b ? a : b; }

static float finish(float value, s32 flags) {
    if (flags & FTZ) value = flush(value);
    if (flags & SATURATE) value = value > 0 ? (value < 1 ? value : 1.0f) : 0.0f; /* NaN becomes 0 */
    return value;
}

static u64 reverse(u64 value, int bits) {
    u64 result = 0;
    for (int i = 0; i < bits; i++) result |= (value >> i & 1) << (bits - 1 - i);
    return result;
}

static u32 find_bit(s64 value) {
    u64 bits = value < 0 ? ~(u64)value : (u64)value;
    return bits ? 63u - (u32)__builtin_clzll(bits) : ~0u;
}

static u64 extract(u64 value, u32 position, u32 length, u32 width) {
    position &= 255, length &= 255;
    if (position >= width || !length) return 0;
    value >>= position;
    return length < 64 ? value & ((1ull << length) - 1) : value;
}

static u64 extract_signed(u64 value, u32 position, u32 length, u32 width) {
    position &= 255, length &= 255;
    if (!length) return 0;
    u32 last = position + length - 1 < width - 1 ? position + length - 1 : width - 1;
    u64 result = extract(value, position, length, width);
    u32 kept = position > last ? 0 : last - position + 1;
    if (value >> last & 1 && kept < 64) result |= ~0ull << kept;
    return result;
}

static u64 insert(u64 piece, u64 into, u32 position, u32 length, u32 width) {
    position &= 255, length &= 255;
    if (position >= width || !length) return into;
    u64 mask = (length < 64 ? (1ull << length) - 1 : ~0ull) << position;
    return (into & ~mask) | (piece << position & mask);
}

static u32 permute(u32 a, u32 b, u32 selection) {
    u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 choice = selection >> (4 * i) & 15, byte = both >> (8 * (choice & 7)) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}

static u32 logic(u32 a, u32 b, u32 c, s32 table) {
    u32 result = 0;
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

static float widened(u16 value) {
    int exponent = value >> 10 & 31, mantissa = value & 1023;
    float size = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? ldexpf(1024 + mantissa, exponent - 25) : ldexpf(mantissa, -24);
    return value >> 15 ? -size : size;
}

float half_to_float(u16 value) {
    static float table[1 << 16];
    static bool filled;
    if (!filled)
        for (int i = 0; i < 1 << 16; i++) table[i] = widened((u16)i);
    filled = true;
    return table[value];
}

/* Rounds once from float64 to a format of 16 bits or less (bfloat16: 7 and 8, float16: 10 and 5). */
u16 float_to_half(double value, int mantissa_bits, int exponent_bits, bool toward_zero) {
    u16 sign = (u16)(signbit(value) ? 1u << (mantissa_bits + exponent_bits) : 0);
    int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
    if (isnan(value)) return 0x7fff;
    double size = fabs(value);
    if (isinf(size)) return sign | (u16)(top << mantissa_bits);
    if (size == 0) return sign;
    int exponent = ilogb(size);
    if (exponent < 1 - bias) exponent = 1 - bias;
    double units = ldexp(size, mantissa_bits - exponent); /* exact */
    u64 whole = (u64)(toward_zero ? trunc(units) : nearbyint(units));
    u64 bits = whole + ((u64)(exponent + bias - 1) << mantissa_bits); /* a subnormal has no leading one, a carry raises the exponent */
    u64 infinity = (u64)top << mantissa_bits;
    if (bits >= infinity) bits = toward_zero ? infinity - 1 : infinity;
    return sign | (u16)bits;
}

static double half_value(u16 value, s32 type) { return type == TYPE_f16 ? half_to_float(value) : bfloat_to_float(value); }
static u16 half_bits(double value, s32 type, bool toward_zero) {
    return type == TYPE_f16 ? float_to_half(value, 10, 5, toward_zero) : float_to_half(value, 7, 8, toward_zero);
}

/* A register of ``width`` bytes a lane, zero-extended. */
static u64 get(const struct warp *warp, s32 offset, s32 width, s32 lane) {
    u64 value = 0;
    memcpy(&value, warp->registers + offset + lane * width, (size_t)width);
    return value;
}

static void set(struct warp *warp, s32 offset, s32 width, s32 lane, u64 value) {
    memcpy(warp->registers + offset + lane * width, &value, (size_t)width);
}

static const int type_bytes[] = {1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 4};
static bool is_float(s32 type) { return type >= TYPE_f16; }
static bool is_signed(s32 type) { return type >= TYPE_s8 && type <= TYPE_s64; }

static double float_value(u64 bits, s32 type) {
    float single;
    double wide;
    u32 low = (u32)bits;
    switch (type) {
    case TYPE_f16: case TYPE_bf16: return half_value((u16)bits, type);
    case TYPE_f64: return memcpy(&wide, &bits, 8), wide;
    default: return memcpy(&single, &low, 4), single;
    }
}

/* cvt.rn.x2: one element of a pair. */
static double rounded_to_integer(double value, s32 rounding) {
    return rounding == 1 ? trunc(value) : rounding == 2 ? floor(value) : rounding == 3 ? ceil(value) : nearbyint(value);
}

static u64 convert(u64 bits, s32 to, s32 from, s32 flags) {
    s32 rounding = flags >> 4 & 3;
    bool integral = flags >> 6 & 1, relu = flags >> 7 & 1;
    int size = type_bytes[to];
    if (!is_float(from)) {
        s64 value = is_signed(from) ? (s64)(bits << (64 - 8 * type_bytes[from])) >> (64 - 8 * type_bytes[from])
                                    : (s64)(type_bytes[from] == 8 ? bits : bits & ((1ull << (8 * type_bytes[from])) - 1));
        if (is_float(to)) {
            if (to == TYPE_f64) {
                double wide = is_signed(from) ? (double)value : (double)(u64)value;
                return memcpy(&bits, &wide, 8), bits;
            }
            float single = is_signed(from) ? (float)value : (float)(u64)value;
            if (to == TYPE_f32) {
                u32 low;
                return memcpy(&low, &single, 4), low;
            }
            return half_bits(is_signed(from) ? (double)value : (double)(u64)value, to, rounding == 1);
        }
        if (flags & SATURATE) {
            bool negative = is_signed(from) && value < 0;
            u64 most = is_signed(to) ? ~0ull >> (65 - 8 * size) : ~0ull >> (64 - 8 * size);
            s64 least_value = is_signed(to) ? -(s64)most - 1 : 0;
            if (negative ? value < least_value : (u64)value > most) value = negative ? least_value : (s64)most;
        }
        return (u64)value;
    }
    double value = float_value(bits, from);
    if (flags & FTZ && from == TYPE_f32) value = flush((float)value);
    if (!is_float(to)) {
        if (isnan(value)) return size == 8 ? 1ull << 63 : is_signed(to) && size == 4 ? 0x80000000u : 0;
        value = rounded_to_integer(value, rounding);
        double most = ldexp(1, 8 * size - is_signed(to));
        if (is_signed(to)) return value >= most ? ~0ull >> (65 - 8 * size) : value < -most ? (u64)(s64)-most : (u64)(s64)value;
        return value >= most ? ~0ull >> (64 - 8 * size) : value < 0 ? 0 : (u64)value;
    }
    if (integral) value = rounded_to_integer(value, rounding);
    if (flags & SATURATE) value = value > 0 ? (value < 1 ? value : 1) : 0;
    if (relu && value < 0) value = 0;
    if (to == TYPE_f64) return memcpy(&bits, &value, 8), bits;
    if (to == TYPE_f16 || to == TYPE_bf16) return half_bits(value, to, rounding == 1);
    float single = (float)value;
    if (flags & FTZ) single = flush(single);
    u32 low;
    memcpy(&low, &single, 4);
    if (to == TYPE_tf32) low = (low + 0x1000) & ~0x1fffu; /* .rna: the nearest, ties away from zero */
    return low;
}

/* Elements of 16 bits; in->a their type, in->b how many a register holds. */
#define HALF_LANES(body) \
    FOR_LANES(l, lanes) \
        for (s32 i = 0; i < in->b; i++) { \
            s32 at = l * in->b + i; \
            double result; \
            body; \
            REGISTER(u16, warp, args[0])[at] = half_bits(result, in->a, false); \
        }
#define HALF(n) half_value(REGISTER(u16, warp, args[n])[at], in->a)

static void compare_into(struct warp *warp, const struct instruction *in, u32 lanes, u32 result) {
    const s32 *args = engine.launch->args + in->first;
    u32 other = ~result;
    if (args[4] >= 0) {
        u32 third = *REGISTER(u32, warp, args[4]) ^ (in->b ? ALL_LANES : 0);
        result = in->a == 1 ? result & third : in->a == 2 ? result | third : result ^ third;
        other = in->a == 1 ? other & third : in->a == 2 ? other | third : other ^ third;
    }
    for (int i = 0; i < 2; i++) {
        if (args[i] < 0) continue;
        u32 *target = REGISTER(u32, warp, args[i]);
        *target = (*target & ~lanes) | ((i ? other : result) & lanes);
    }
}

static void repack(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    s32 targets = in->count - in->count * in->a / (in->a + in->b); /* in->a, in->b: bytes of a target and of a source register */
    FOR_LANES(l, lanes) {
        u8 bytes[16];
        for (s32 i = 0; i < in->count - targets; i++)
            memcpy(bytes + i * in->b, warp->registers + args[targets + i] + l * in->b, (size_t)in->b);
        for (s32 i = 0; i < targets; i++)
            if (args[i] >= 0) memcpy(warp->registers + args[i] + l * in->a, bytes + i * in->a, (size_t)in->a);
    }
}

static const int rounding_modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};

#define LOOP_BINARY(name, suffix, type, value) \
    case OP_##name##_##suffix: { \
        type *d = REGISTER(type, warp, args[0]), *x = REGISTER(type, warp, args[1]), *y = REGISTER(type, warp, args[2]); \
        FOR_LANES(l, lanes) { type a = x[l], b = y[l]; d[l] = (type)(value); } \
        break; \
    }
#define LOOP_BINARY_FLOAT(name, value) \
    case OP_##name##_f32: { \
        float *d = REGISTER(float, warp, args[0]), *x = REGISTER(float, warp, args[1]), *y = REGISTER(float, warp, args[2]); \
        FOR_LANES(l, lanes) { \
            float a = x[l], b = y[l]; \
            if (in->flags & FTZ) a = flush(a), b = flush(b); \
            float result = (float)(value); \
            d[l] = in->flags & (FTZ | SATURATE) ? finish(result, in->flags) : result; \
        } \
        break; \
    }
#define LOOP_UNARY_FLOAT(name, value) \
    case OP_##name##_f32: { \
        float *d = REGISTER(float, warp, args[0]), *x = REGISTER(float, warp, args[1]); \
        FOR_LANES(l, lanes) { float a = in->flags & FTZ ? flush(x[l]) : x[l]; d[l] = finish((float)(value), in->flags); } \
        break; \
    }
#define LOOP_UNARY(name, suffix, result_type, type, value) \
    case OP_##name##_##suffix: { \
        result_type *d = REGISTER(result_type, warp, args[0]); \
        type *x = REGISTER(type, warp, args[1]); \
        FOR_LANES(l, lanes) { type a = x[l]; d[l] = (result_type)(value); } \
        break; \
    }
#define LOOP_MIXED(name, suffix, result_type, type_a, type_b, value) \
    case OP_##name##_##suffix: { \
        result_type *d = REGISTER(result_type, warp, args[0]); \
        type_a *x = REGISTER(type_a, warp, args[1]); \
        type_b *y = REGISTER(type_b, warp, args[2]); \
        FOR_LANES(l, lanes) { type_a a = x[l]; type_b b = y[l]; d[l] = (result_type)(value); } \
        break; \
    }
#define LOOP_TERNARY(name, suffix, result_type, type_a, type_b, type_c, value) \
    case OP_##name##_##suffix: { \
        result_type *d = REGISTER(result_type, warp, args[0]); \
        type_a *x = REGISTER(type_a, warp, args[1]); \
        type_b *y = REGISTER(type_b, warp, args[2]); \
        type_c *z = REGISTER(type_c, warp, args[3]); \
        FOR_LANES(l, lanes) { type_a a = x[l]; type_b b = y[l]; type_c c = z[l]; d[l] = (result_type)(value); } \
        break; \
    }
#define LOOP_COMPARE(name, suffix, type, condition) \
    case OP_setp_##name##_##suffix: { \
        type *x = REGISTER(type, warp, args[2]), *y = REGISTER(type, warp, args[3]); \
        u32 result = 0; \
        FOR_LANES(l, lanes) { type a = x[l], b = y[l]; result |= (u32)(condition) << l; } \
        compare_into(warp, in, lanes, result); \
        break; \
    }
#define LOOP_HALF(name, value) \
    case OP_##name##_half: HALF_LANES(double a = HALF(1); double b = HALF(2); result = (value)) break;
#define LOOP_MOVE(op, type) \
    case OP_mov_##op: { \
        type *d = REGISTER(type, warp, args[0]), *x = REGISTER(type, warp, args[1]); \
        FOR_LANES(l, lanes) d[l] = x[l]; \
        break; \
    }
#define LOOP_SELECT(op, type) \
    case OP_selp_##op: { \
        type *d = REGISTER(type, warp, args[0]), *x = REGISTER(type, warp, args[1]), *y = REGISTER(type, warp, args[2]); \
        u32 chosen = *REGISTER(u32, warp, args[3]) ^ (in->a ? ALL_LANES : 0); \
        FOR_LANES(l, lanes) d[l] = chosen >> l & 1 ? x[l] : y[l]; \
        break; \
    }
#define MASKS(op, value) \
    case OP_##op##_pred: { \
        u32 a = *REGISTER(u32, warp, args[1]) ^ (in->a & 1 ? ALL_LANES : 0); \
        u32 b = *REGISTER(u32, warp, args[2]) ^ (in->a & 2 ? ALL_LANES : 0); \
        u32 *d = REGISTER(u32, warp, args[0]); \
        *d = (*d & ~lanes) | ((value) & lanes); \
        break; \
    }

void compute(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    s32 rounding = in->flags >> 4 & 3;
    if (rounding) fesetround(rounding_modes[rounding]);
    switch (in->op) {
        BINARY(LOOP_BINARY)
        BINARY_FLOAT(LOOP_BINARY_FLOAT)
        UNARY_FLOAT(LOOP_UNARY_FLOAT)
        UNARY(LOOP_UNARY)
        TERNARY(LOOP_TERNARY)
        MIXED(LOOP_MIXED)
        COMPARE(LOOP_COMPARE)
        HALF_BINARY(LOOP_HALF)
        LOOP_MOVE(b16, u16)
        LOOP_MOVE(b32, u32)
        LOOP_MOVE(b64, u64)
        LOOP_SELECT(b16, u16)
        LOOP_SELECT(b32, u32)
        LOOP_SELECT(b64, u64)
        MASKS(and, a & b)
        MASKS(or, a | b)
        MASKS(xor, a ^ b)
    case OP_not_pred: case OP_mov_pred: {
        u32 *d = REGISTER(u32, warp, args[0]), a = *REGISTER(u32, warp, args[1]) ^ (in->a ? ALL_LANES : 0);
        *d = (*d & ~lanes) | ((in->op == OP_not_pred ? ~a : a) & lanes);
        break;
    }
    case OP_fma_f32: {
        float *d = REGISTER(float, warp, args[0]), *x = REGISTER(float, warp, args[1]), *y = REGISTER(float, warp, args[2]);
        float *z = REGISTER(float, warp, args[3]);
        FOR_LANES(l, lanes) {
            float a = x[l], b = y[l], c = z[l];
            if (in->flags & FTZ) a = flush(a), b = flush(b), c = flush(c);
            float result = fmaf(a, b, c);
            d[l] = in->flags & (FTZ | SATURATE) ? finish(result, in->flags) : result;
        }
        break;
    }
    case OP_bfi_b32: case OP_bfi_b64: {
        s32 width = in->op == OP_bfi_b32 ? 4 : 8;
        FOR_LANES(l, lanes) {
            u32 position = REGISTER(u32, warp, args[3])[l], length = REGISTER(u32, warp, args[4])[l];
            u64 piece = get(warp, args[1], width, l), into = get(warp, args[2], width, l);
            set(warp, args[0], width, l, insert(piece, into, position, length, 8 * (u32)width));
        }
        break;
    }
    case OP_cvt: /* d, its width, a, its width */
        FOR_LANES(l, lanes) {
            u64 value = convert(get(warp, args[2], args[3], l), in->a, in->b, in->flags);
            int spare = 64 - 8 * type_bytes[in->a];
            value = is_signed(in->a) ? (u64)((s64)(value << spare) >> spare) : value << spare >> spare;
            set(warp, args[0], args[1], l, value);
        }
        break;
    case OP_cvt_pack: /* d, high, low */
        FOR_LANES(l, lanes) {
            u32 high = (u32)convert(REGISTER(u32, warp, args[1])[l], in->a, in->b, in->flags);
            u32 low = (u32)convert(REGISTER(u32, warp, args[2])[l], in->a, in->b, in->flags);
            REGISTER(u32, warp, args[0])[l] = high << 16 | (low & 0xffff);
        }
        break;
    case OP_fma_half: HALF_LANES(result = fma(HALF(1), HALF(2), HALF(3))) break;
    case OP_neg_half: HALF_LANES(result = -HALF(1)) break;
    case OP_abs_half: HALF_LANES(result = fabs(HALF(1))) break;
    case OP_repack: repack(warp, in, lanes); break;
    case OP_activemask: FOR_LANES(l, lanes) REGISTER(u32, warp, args[0])[l] = lanes; break;
    case OP_clock: FOR_LANES(l, lanes) set(warp, args[0], in->a, l, warp->instructions); break;
    case OP_setmaxnreg:
        if (in->a % 8 || in->a < 24 || in->a > 256) fail("setmaxnreg of %d: must be a multiple of 8 from 24 to 256", in->a);
        break;
    case OP_nothing: break;
    default: fail("no such computation");
    }
    if (rounding) fesetround(FE_TONEAREST);
}
