/* One launch from its first warp to its last: which warp runs when, in an order that a seed decides, and what is said when none can. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "opcodes.h"

struct engine engine;
static jmp_buf escape;
static char *message;
static size_t message_size;

#define NAME_2(name, suffix, ...) #name "_" #suffix,
#define NAME_FLOAT(name, ...) #name "_f32",
#define NAME_HALF(name, ...) #name "_half",
#define NAME_COMPARE(name, suffix, ...) "setp_" #name "_" #suffix,
#define NAME_1(name) #name,
const char *const emulator_opcodes[] = {
    BINARY(NAME_2) BINARY_FLOAT(NAME_FLOAT) UNARY_FLOAT(NAME_FLOAT) UNARY(NAME_2) TERNARY(NAME_2) MIXED(NAME_2)
    COMPARE(NAME_COMPARE) HALF_BINARY(NAME_HALF) OTHERS(NAME_1) NULL
};
const char *const emulator_types[] = {TYPES(NAME_1) NULL};

/* ---- memory of the emulator itself: every block is on a list, so that an error can free it all ---- */

struct allocation {
    struct allocation *previous, *next;
};
static struct allocation allocations = {&allocations, &allocations};

void *grow(size_t bytes) {
    struct allocation *block = calloc(1, sizeof *block + bytes);
    if (!block) fail("out of memory");
    block->previous = &allocations, block->next = allocations.next;
    allocations.next->previous = block, allocations.next = block;
    return block + 1;
}

void release(void *pointer) {
    struct allocation *block = (struct allocation *)pointer - 1;
    block->previous->next = block->next, block->next->previous = block->previous;
    free(block);
}

/* NaN in bfloat16, float16 and float32, and no valid address. */
void poison(u8 *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) bytes[i] = i & 1 ? 0x7f : 0xff;
}

const char *warp_name(const struct warp *warp) {
    static char text[2][64];
    static int turn;
    char *out = text[turn ^= 1];
    const s32 *index = warp->block->index;
    snprintf(out, sizeof text[0], "warp %d of block (%d,%d,%d)", warp->index, index[0], index[1], index[2]);
    return out;
}

/* "{line N}" becomes the text of that line in run.py. */
void fail(const char *format, ...) {
    int used = 0;
    if (engine.current && engine.at)
        used = snprintf(message, message_size, "{line %d} %s: ", engine.at->line, warp_name(engine.current));
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + used, message_size - (size_t)used, format, arguments);
    va_end(arguments);
    longjmp(escape, 1);
}

u32 draw(u32 below) {
    engine.random = engine.random * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)((engine.random >> 33) * below >> 31);
}

/* ---- starting and ending clusters ---- */

enum special {
    TID_X, TID_Y, TID_Z, NTID_X, NTID_Y, NTID_Z, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, LANEID, WARPID, NWARPID,
    LANEMASK_EQ, LANEMASK_LT, LANEMASK_LE, LANEMASK_GT, LANEMASK_GE, CLUSTER_CTARANK, CLUSTER_NCTARANK, CLUSTER_CTAID_X, CLUSTER_CTAID_Y,
    CLUSTER_CTAID_Z, CLUSTER_NCTAID_X, CLUSTER_NCTAID_Y, CLUSTER_NCTAID_Z, CLUSTERID_X, CLUSTERID_Y, CLUSTERID_Z, NCLUSTERID_X,
    NCLUSTERID_Y, NCLUSTERID_Z, SMID, DYNAMIC_SMEM_SIZE, TOTAL_SMEM_SIZE, SPECIALS
};

static u32 special_value(const struct warp *warp, s32 lane, enum special which) {
    const struct launch *launch = engine.launch;
    const struct block *block = warp->block;
    s32 thread = warp->index * LANES + lane, x = which % 3;
    s32 width = launch->block[0], height = launch->block[1];
    const s32 place[] = {thread % width, thread / width % height, thread / width / height};
    if (which <= TID_Z) return (u32)place[x];
    if (which <= NTID_Z) return (u32)launch->block[x];
    if (which <= CTAID_Z) return (u32)block->index[x];
    if (which <= NCTAID_Z) return (u32)launch->grid[x];
    switch (which) {
    case LANEID: return (u32)lane;
    case WARPID: return (u32)warp->index;
    case NWARPID: return (u32)engine.warps_per_block;
    case LANEMASK_EQ: return 1u << lane;
    case LANEMASK_LT: return (1u << lane) - 1;
    case LANEMASK_LE: return (2u << lane) - 1;
    case LANEMASK_GT: return ~((2u << lane) - 1);
    case LANEMASK_GE: return ~((1u << lane) - 1);
    case CLUSTER_CTARANK: return (u32)block->rank;
    case CLUSTER_NCTARANK: return (u32)engine.blocks_per_cluster;
    case SMID: return (u32)block->cluster->index[0] % 132;
    case DYNAMIC_SMEM_SIZE: return (u32)launch->dynamic_bytes;
    case TOTAL_SMEM_SIZE: return (u32)(launch->dynamic_bytes + launch->static_bytes);
    default: break;
    }
    s32 axis = ((s32)which - CLUSTER_CTAID_X) % 3;
    if (which <= CLUSTER_CTAID_Z) return (u32)(block->index[axis] % launch->cluster[axis]);
    if (which <= CLUSTER_NCTAID_Z) return (u32)launch->cluster[axis];
    if (which <= CLUSTERID_Z) return (u32)block->cluster->index[axis];
    return (u32)(launch->grid[axis] / launch->cluster[axis]);
}

static void start_warp(struct block *block, s32 number) {
    const struct launch *launch = engine.launch;
    struct warp *warp = &block->warps[number];
    warp->block = block, warp->index = number;
    warp->in_cluster = block->rank * engine.warps_per_block + number;
    s32 threads = launch->block[0] * launch->block[1] * launch->block[2] - number * LANES;
    warp->live = threads >= LANES ? ALL_LANES : (1u << threads) - 1;
    warp->splits = 1;
    warp->split[0] = (struct split){.lanes = warp->live};
    warp->registers = grow((size_t)launch->register_bytes);
    poison(warp->registers, (size_t)launch->register_bytes);
    memcpy(warp->registers + launch->register_bytes - launch->constant_bytes, launch->constants, (size_t)launch->constant_bytes);
    warp->local = grow((size_t)launch->local_bytes * LANES);
    poison(warp->local, (size_t)launch->local_bytes * LANES);
    warp->busy = grow((size_t)launch->register_bytes / 64);
    warp->clocks = grow(2 * sizeof(u32) * (size_t)engine.clock_count);
    warp->clocks[component(warp, SELF)] = warp->clocks[component(warp, SOLO)] = 1;
    for (s32 which = 0; which < SPECIALS; which++)
        for (s32 l = 0; l < LANES && launch->specials[which] >= 0; l++)
            REGISTER(u32, warp, launch->specials[which])[l] = special_value(warp, l, which);
}

static void start_block(struct cluster *cluster, s32 rank) {
    const struct launch *launch = engine.launch;
    struct block *block = &cluster->block[rank];
    block->cluster = cluster, block->rank = rank, block->live = engine.warps_per_block;
    const s32 *shape = launch->cluster;
    s32 within[3] = {rank % shape[0], rank / shape[0] % shape[1], rank / shape[0] / shape[1]};
    for (s32 i = 0; i < 3; i++) block->index[i] = cluster->index[i] * shape[i] + within[i];
    block->shared_bytes = (SHARED_BASE + launch->static_bytes + launch->dynamic_bytes + 15) & ~15;
    size_t words = (size_t)block->shared_bytes >> 2, readers = READERS * (size_t)engine.warps_per_block;
    block->shared = grow((size_t)block->shared_bytes);
    poison(block->shared, (size_t)block->shared_bytes);
    block->words = grow(words * sizeof *block->words);
    block->readers = grow(words * readers * sizeof(u32));
    block->reader_last = grow(readers * sizeof(u32));
    block->mbarriers = grow((words / 2 + 1) * sizeof *block->mbarriers);
    for (s32 i = 0; i < NAMED_BARRIERS; i++) block->barrier[i].clocks = grow(2 * sizeof(u32) * (size_t)engine.clock_count);
    block->warps = grow(sizeof *block->warps * (size_t)engine.warps_per_block);
    for (s32 i = 0; i < engine.warps_per_block; i++) start_warp(block, i);
}

static void start_cluster(u64 number) {
    const struct launch *launch = engine.launch;
    struct cluster *cluster = grow(sizeof *cluster);
    cluster->number = (u32)number;
    u64 counts[3];
    for (s32 i = 0; i < 3; i++) counts[i] = (u64)(launch->grid[i] / launch->cluster[i]);
    cluster->index[0] = (s32)(number % counts[0]);
    cluster->index[1] = (s32)(number / counts[0] % counts[1]);
    cluster->index[2] = (s32)(number / counts[0] / counts[1]);
    cluster->blocks = engine.blocks_per_cluster;
    cluster->live_warps = engine.warps_per_cluster;
    cluster->block = grow(sizeof *cluster->block * (size_t)cluster->blocks);
    cluster->arriving = grow(4 * sizeof(u32) * (size_t)engine.clock_count);
    cluster->done = cluster->arriving + 2 * engine.clock_count;
    for (s32 i = 0; i < cluster->blocks; i++) start_block(cluster, i);
    engine.clusters[engine.cluster_count++] = cluster;
}

static void end_cluster(s32 number) {
    struct cluster *cluster = engine.clusters[number];
    for (s32 i = 0; i < engine.operation_count; i++) /* cp.async that nobody waited for */
        if (engine.operations[i]->warp->block->cluster == cluster) complete_one(i), i = -1;
    for (s32 b = 0; b < cluster->blocks; b++) {
        struct block *block = &cluster->block[b];
        for (s32 w = 0; w < engine.warps_per_block; w++) {
            struct warp *warp = &block->warps[w];
            engine.warp_instructions[w] += warp->instructions;
            engine.statistics[INSTRUCTIONS] += warp->instructions;
            release(warp->registers), release(warp->local), release(warp->busy), release(warp->clocks);
        }
        for (s32 i = 0; i <= block->shared_bytes >> 3; i++)
            if (block->mbarriers[i]) release(block->mbarriers[i]->clocks), release(block->mbarriers[i]);
        for (s32 i = 0; i < NAMED_BARRIERS; i++) release(block->barrier[i].clocks);
        release(block->shared), release(block->words), release(block->readers), release(block->reader_last), release(block->mbarriers);
        release(block->warps);
    }
    release(cluster->block), release(cluster->arriving < cluster->done ? cluster->arriving : cluster->done), release(cluster);
    engine.clusters[number] = engine.clusters[--engine.cluster_count];
}

/* ---- running a warp ---- */

/* Splits at the same instruction become one; one that waited there for its other lanes looks again. */
static struct split *merge(struct warp *warp, struct split *split) {
    for (s32 i = 0; i < warp->splits; i++) {
        struct split *other = &warp->split[i];
        if (other == split || other->pc != split->pc || (other->state != RUNNABLE && other->state != WAIT_LANES)) continue;
        other->lanes |= split->lanes;
        other->state = RUNNABLE;
        *split = warp->split[--warp->splits];
        return other == &warp->split[warp->splits] ? split : other;
    }
    return split;
}

static void leave(struct warp *warp, struct split *split, u32 lanes) {
    warp->live &= ~lanes;
    split->lanes &= ~lanes;
    if (!split->lanes) *split = warp->split[--warp->splits];
    for (s32 i = 0; i < warp->splits; i++)
        if (warp->split[i].state == WAIT_LANES) warp->split[i].state = RUNNABLE;
    cluster_progress(warp->block->cluster);
    if (warp->live) return;
    warp->block->live--;
    warp->block->cluster->live_warps--;
    check_exit(warp);
}

/* The runnable split with the lowest pc, or now and then any other; NULL where all wait. */
static struct split *choose(struct warp *warp) {
    struct split *chosen = NULL;
    bool any = warp->splits > 1 && !draw(16);
    for (s32 i = 0; i < warp->splits; i++) {
        struct split *split = &warp->split[i];
        if (split->state != RUNNABLE && !wait_over(warp, split)) continue;
        if (!chosen || (any ? draw(2) : split->pc < chosen->pc)) chosen = split;
    }
    return chosen;
}

/* Returns false where the split cannot go on at once. */
static bool step(struct warp *warp, struct split *split) {
    const struct instruction *in = &engine.launch->code[split->pc];
    u32 lanes = split->lanes;
    engine.at = in;
    warp->instructions++;
    if (in->guard >= 0) lanes &= *REGISTER(u32, warp, in->guard) ^ (in->negated ? ALL_LANES : 0);
    if (in->op == OP_bra) {
        if (lanes == split->lanes) split->pc = in->a;
        else if (!lanes) split->pc++;
        else {
            struct split *other = &warp->split[warp->splits++];
            *other = (struct split){.pc = in->a, .lanes = lanes};
            split->lanes &= ~lanes;
            split->pc++;
        }
        return true;
    }
    if (!lanes) return split->pc++, true;
    if (in->op == OP_ret) {
        if (lanes != split->lanes) split->pc++;
        leave(warp, split, lanes);
        return false;
    }
    if ((warp->products || in->flags & TOUCHES_PRODUCT) && in->op != OP_wgmma) check_registers(warp, in);
    if (in->op < OP_ld) compute(warp, in, lanes);
    else if (in->op < OP_shfl) memory_access(warp, in, lanes);
    else {
        bool done = in->op < OP_bar_warp ? across_lanes(warp, split, in, lanes)
                    : in->op < OP_cp_async ? synchronise(warp, split, in, lanes)
                    : in->op < OP_bra ? asynchronous(warp, split, in, lanes) : (fail("trap"), false);
        if (!done) return false;
    }
    split->pc++;
    return split->state == RUNNABLE;
}

static void run_warp(struct warp *warp, u32 quantum) {
    engine.current = warp;
    warp->yields = false;
    struct split *split = choose(warp);
    while (split && quantum-- && !warp->yields) {
        bool runs = step(warp, split);
        if (!warp->live) return;
        if (warp->splits > 1) {
            for (s32 i = 0; i < warp->splits; i++)
                if (warp->split[i].state == RUNNABLE) merge(warp, &warp->split[i]);
            split = choose(warp);
        } else if (!runs) {
            split = choose(warp);
        }
    }
}

static bool can_run(struct warp *warp) {
    for (s32 i = 0; i < warp->splits; i++)
        if (warp->split[i].state == RUNNABLE || wait_over(warp, &warp->split[i])) return true;
    return false;
}

/* ---- the launch ---- */

static _Noreturn void deadlock(void) {
    size_t used = (size_t)snprintf(message, message_size, "deadlock: no warp can go on");
    for (s32 c = 0; c < engine.cluster_count; c++)
        for (s32 w = 0; w < engine.warps_per_cluster; w++) {
            struct warp *warp = &engine.clusters[c]->block[w / engine.warps_per_block].warps[w % engine.warps_per_block];
            for (s32 i = 0; i < warp->splits; i++) {
                const struct split *split = &warp->split[i];
                bool behind = split->state == WAIT_NAMED || split->state == WAIT_CLUSTER; /* its pc is that of the next instruction */
                char wait[160];
                describe_wait(wait, sizeof wait, warp, split);
                if (used + 320 < message_size)
                    used += (size_t)snprintf(message + used, message_size - used, "\n  %s, lanes 0x%x, waits at {line %d} for %s",
                                             warp_name(warp), split->lanes, engine.launch->code[split->pc - behind].line, wait);
            }
        }
    longjmp(escape, 1);
}

static void shuffle_clusters(u64 count) {
    engine.waiting = grow(count * sizeof *engine.waiting);
    engine.waiting_count = count;
    for (u64 i = 0; i < count; i++) engine.waiting[i] = i;
    for (u64 i = count; i > 1; i--) {
        u64 other = draw((u32)i), swap = engine.waiting[i - 1];
        engine.waiting[i - 1] = engine.waiting[other], engine.waiting[other] = swap;
    }
}

static s32 pending_operation(void) {
    s32 count = engine.operation_count, first = count ? (s32)draw((u32)count) : 0;
    for (s32 i = 0; i < count; i++)
        if (!engine.operations[(first + i) % count]->done) return (first + i) % count;
    return -1;
}

/* Runs warps and completes operations in random order until all clusters have ended. */
static void schedule(void) {
    struct warp **ready = grow(sizeof *ready * (size_t)(engine.launch->resident * engine.warps_per_cluster));
    while (engine.waiting_count || engine.cluster_count) {
        while (engine.cluster_count < engine.launch->resident && engine.waiting_count)
            start_cluster(engine.waiting[--engine.waiting_count]);
        u32 count = 0;
        for (s32 c = 0; c < engine.cluster_count; c++)
            for (s32 w = 0; w < engine.warps_per_cluster; w++) {
                struct warp *warp = &engine.clusters[c]->block[w / engine.warps_per_block].warps[w % engine.warps_per_block];
                if (warp->live && can_run(warp)) ready[count++] = warp;
            }
        s32 operation = !count || draw(256) < engine.eagerness ? pending_operation() : -1;
        if (operation >= 0) complete_one(operation);
        else if (!count) deadlock();
        if (count) {
            u32 quantum = 1u << draw(10);
            run_warp(ready[draw(count)], quantum);
            engine.statistics[STEPS] += quantum;
            if (engine.statistics[STEPS] > engine.launch->limit)
                fail("the launch has taken %llu steps", (unsigned long long)engine.launch->limit);
        }
        for (s32 c = 0; c < engine.cluster_count; c++)
            if (!engine.clusters[c]->live_warps) end_cluster(c--);
    }
}

/* Runs a launch. Returns 0, or 1 with a message. Fills INSTRUCTIONS ... of ``statistics`` and the instructions of each warp of a block. */
int emulator_run(const struct launch *launch, u64 *statistics, u64 *warp_instructions, char *text, u64 text_size) {
    static const u32 eagerness[] = {2, 24, 128, 250};
    memset(&engine, 0, sizeof engine);
    engine.launch = launch;
    message = text, message_size = text_size;
    engine.random = launch->seed * 0x9e3779b97f4a7c15ull + 1;
    engine.warp_instructions = warp_instructions;
    for (int i = 0; i < 8; i++) draw(2);
    engine.eagerness = eagerness[draw(4)];
    engine.warps_per_block = (launch->block[0] * launch->block[1] * launch->block[2] + LANES - 1) / LANES;
    engine.blocks_per_cluster = launch->cluster[0] * launch->cluster[1] * launch->cluster[2];
    engine.warps_per_cluster = engine.warps_per_block * engine.blocks_per_cluster;
    engine.clock_count = AGENTS * engine.warps_per_cluster;
    int failed = setjmp(escape);
    if (!failed) {
        u64 clusters = (u64)launch->grid[0] * (u64)launch->grid[1] * (u64)launch->grid[2] / (u64)engine.blocks_per_cluster;
        engine.clusters = grow(sizeof *engine.clusters * (size_t)launch->resident);
        shuffle_clusters(clusters);
        schedule();
    }
    while (allocations.next != &allocations) release(allocations.next + 1);
    free(engine.operations);
    memcpy(statistics, engine.statistics, sizeof engine.statistics);
    return failed;
}
