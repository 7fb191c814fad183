/* wgmma: each warp computes its 16 of the 64 rows. Operands by shared-memory descriptors as PTX defines them, or a from registers. */
#include <string.h>

#include "core.h"
#include "opcodes.h"

enum { K = 16, ROWS = 16, MAX_N = 256 };

/* in->a: n; in->b: bits of what follows. */
enum { FLOAT16 = 1, TRANSPOSED_A = 2, TRANSPOSED_B = 4, NEGATED_A = 8, NEGATED_B = 16, A_IN_REGISTERS = 32 };

/* A matrix operand in shared memory: bits 0-13 the start / 16, 16-29 the leading and 32-45 the stride byte offset / 16, 49-51 the base
 * offset, 62-63 the swizzle. Its unit is a run of 16 bytes, 8 elements, along k (K-major) or along m or n (MN-major). */
struct matrix {
    u32 start, leading, stride, pieces; /* pieces: runs that the swizzle exchanges; 1 is no swizzle */
    bool mn_major;
};

static struct matrix decode(u64 descriptor, bool transposed) {
    static const u8 pieces[] = {1, 8, 4, 2};
    if (descriptor >> 49 & 7) fail("wgmma: descriptor 0x%llx: a base offset is not emulated", (unsigned long long)descriptor);
    return (struct matrix){(u32)(descriptor & 0x3fff) << 4, (u32)(descriptor >> 16 & 0x3fff) << 4, (u32)(descriptor >> 32 & 0x3fff) << 4,
                           pieces[descriptor >> 62], transposed};
}

/* Where a run lies. K-major: ``outer`` is the row (m or n), ``run`` its eight columns of k. MN-major: ``outer`` is k, ``run`` counts
 * eights of m or n. In core matrices of 8 runs of 16 bytes each 8 rows apart by the pitch of the swizzle. */
static u32 run_address(const struct matrix *matrix, u32 outer, u32 run) {
    u32 pitch = 16 * matrix->pieces, address = matrix->start + outer % 8 * pitch;
    if (matrix->pieces == 1) {
        u32 along_outer = matrix->mn_major ? matrix->leading : matrix->stride;
        u32 along_run = matrix->mn_major ? matrix->stride : matrix->leading;
        return (address + outer / 8 * along_outer + run * along_run) & 0x3ffff;
    }
    address += outer / 8 * matrix->stride + run % matrix->pieces * 16 + (matrix->mn_major ? run / matrix->pieces * matrix->leading : 0);
    if (!matrix->mn_major && run >= matrix->pieces) fail("wgmma: K-major operand of 32 bytes a row in a swizzle of %u", pitch);
    return (address ^ ((address >> 7 & (matrix->pieces - 1)) << 4)) & 0x3ffff;
}

/* Calls ``visit`` for each run of rows [first, first + count). */
typedef void visitor(const struct operation *operation, u32 address, u32 outer, u32 run, bool mn_major, void *context);

static void each_run(const struct operation *operation, const struct matrix *matrix, u32 first, u32 count, visitor *visit, void *context) {
    u32 outers = matrix->mn_major ? K : count, runs = matrix->mn_major ? count / 8 : K / 8;
    for (u32 outer = 0; outer < outers; outer++)
        for (u32 run = 0; run < runs; run++) {
            u32 row = matrix->mn_major ? outer : first + outer, at = matrix->mn_major ? first / 8 + run : run;
            visit(operation, run_address(matrix, row, at), outer, run, matrix->mn_major, context);
        }
}

static void record(const struct operation *operation, u32 address, u32 outer, u32 run, bool mn_major, void *context) {
    (void)outer, (void)run, (void)mn_major, (void)context;
    struct warp *warp = operation->warp;
    shared_bytes(warp->block, address, 16);
    note_read(warp, warp->block, address, 16, PRODUCT, operation->clock, true);
}

/* Into [k][row], ``context`` a matrix of MAX_N columns. */
static void fetch(const struct operation *operation, u32 address, u32 outer, u32 run, bool mn_major, void *context) {
    float(*values)[MAX_N] = context;
    u16 elements[8];
    memcpy(elements, operation->warp->block->shared + address, 16);
    bool half = operation->instruction->b & FLOAT16;
    for (u32 i = 0; i < 8; i++) {
        float value = half ? half_to_float(elements[i]) : bfloat_to_float(elements[i]);
        if (mn_major) values[outer][run * 8 + i] = value;
        else values[run * 8 + i][outer] = value;
    }
}

static void operands(const struct operation *operation, visitor *visit, void *a, void *b) {
    const struct instruction *in = operation->instruction;
    if (!(in->b & A_IN_REGISTERS)) {
        struct matrix matrix = decode(operation->descriptor_a, in->b & TRANSPOSED_A);
        each_run(operation, &matrix, (u32)(operation->warp->index % 4) * ROWS, ROWS, visit, a);
    }
    struct matrix matrix = decode(operation->descriptor_b, in->b & TRANSPOSED_B);
    each_run(operation, &matrix, 0, (u32)in->a, visit, b);
}

static const s32 *product_registers(const struct instruction *in, s32 *accumulators) {
    *accumulators = in->a / 2;
    return engine.launch->args + in->first + 4;
}

static void mark(struct warp *warp, const struct instruction *in) {
    s32 accumulators;
    const s32 *registers = product_registers(in, &accumulators);
    for (s32 i = 0; i < in->count - 4; i++) warp->busy[registers[i] / 64] |= i < accumulators ? 1 : 2;
}

void issue_product(struct operation *operation) {
    struct warp *warp = operation->warp;
    const struct instruction *in = operation->instruction;
    s32 accumulators;
    const s32 *registers = product_registers(in, &accumulators);
    if (!warp->fenced) fail("wgmma without any wgmma.fence before");
    for (s32 i = 0; i < in->count - 4; i++) {
        u8 busy = warp->busy[registers[i] / 64];
        if (busy & 4) fail("wgmma: {register %d} was accessed since the last wgmma.fence", registers[i]);
        if (busy & (i < accumulators ? 2 : 1)) fail("wgmma: {register %d} is used by a wgmma that was not waited for", registers[i]);
    }
    mark(warp, in);
    operands(operation, record, NULL, NULL);
    engine.statistics[PRODUCTS] += (u64)(ROWS * K) * (u64)in->a;
}

static void multiply_add(float (*c)[MAX_N], float (*a)[MAX_N], float (*b)[MAX_N], s32 n) {
    for (s32 i = 0; i < ROWS; i++)
        for (s32 k = 0; k < K; k++) {
            float factor = a[k][i], *restrict row = c[i];
            const float *restrict other = b[k];
            for (s32 j = 0; j < n; j++) row[j] += factor * other[j];
        }
}

void multiply(const struct operation *operation) {
    static float a[K][MAX_N], b[K][MAX_N], c[ROWS][MAX_N];
    struct warp *warp = operation->warp;
    const struct instruction *in = operation->instruction;
    s32 accumulators, n = in->a;
    const s32 *registers = product_registers(in, &accumulators);
    operands(operation, fetch, a, b);
    if (in->b & A_IN_REGISTERS) {
        for (s32 r = 0; r < 4; r++)
            for (s32 l = 0; l < LANES; l++)
                for (s32 i = 0; i < 2; i++) {
                    u16 element = REGISTER(u16, warp, registers[accumulators + r])[2 * l + i];
                    float *value = &a[8 * (r / 2) + 2 * (l % 4) + i][l / 4 + 8 * (r % 2)];
                    *value = in->b & FLOAT16 ? half_to_float(element) : bfloat_to_float(element);
                }
    }
    if (!(in->b & NEGATED_A) != !(in->b & NEGATED_B))
        for (s32 k = 0; k < K; k++)
            for (s32 i = 0; i < ROWS; i++) a[k][i] = -a[k][i];
    for (s32 l = 0; l < LANES; l++)
        for (s32 r = 0; r < accumulators; r++) {
            float *element = &c[l / 4 + r / 2 % 2 * 8][r / 4 * 8 + l % 4 * 2 + r % 2];
            *element = operation->accumulate ? REGISTER(float, warp, registers[r])[l] : 0;
        }
    multiply_add(c, a, b, n);
    for (s32 l = 0; l < LANES; l++)
        for (s32 r = 0; r < accumulators; r++)
            REGISTER(float, warp, registers[r])[l] = c[l / 4 + r / 2 % 2 * 8][r / 4 * 8 + l % 4 * 2 + r % 2];
}

/* After some products were waited for: which registers the others still use. */
void mark_busy(struct warp *warp) {
    for (s32 i = 0; i < engine.launch->register_bytes / 64; i++) warp->busy[i] &= 4;
    for (s32 i = 0; i < engine.operation_count; i++)
        if (engine.operations[i]->warp == warp && engine.operations[i]->kind == MATRIX_PRODUCT)
            mark(warp, engine.operations[i]->instruction);
}

/* Before an ordinary instruction: a register that a product uses must not be touched before the product was waited for. */
void check_registers(struct warp *warp, const struct instruction *in) {
    const s32 *touched = engine.launch->touched + in->registers;
    for (s32 i = 0; i < in->reads + in->writes; i++) {
        u8 *busy = &warp->busy[touched[i] / 64];
        if (*busy & 1) fail("{register %d} is written by a wgmma that was not waited for", touched[i]);
        if (*busy & 2 && i >= in->reads) fail("{register %d} is read by a wgmma that was not waited for", touched[i]);
        if (in->flags & TOUCHES_PRODUCT) *busy |= 4;
    }
}
