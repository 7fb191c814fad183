/* Barriers: named, of a cluster, of a warp, in shared memory (mbarrier); and the clocks that waiting passes on. */
#include <stdio.h>
#include <string.h>

#include "core.h"
#include "opcodes.h"

void join(u32 *into, const u32 *from) {
    for (s32 i = 0; i < 2 * engine.clock_count; i++)
        if (from[i] > into[i]) into[i] = from[i];
}

static void clear(u32 *clocks) { memset(clocks, 0, 2 * sizeof(u32) * (size_t)engine.clock_count); }

/* After its clock was given away: what the warp does from here on is not covered by it. */
void release_clock(struct warp *warp) {
    warp->clocks[component(warp, SELF)]++;
    warp->clocks[component(warp, SOLO)]++;
}

/* All lanes of the warp are here, and know what the others have done. */
static void sync_warp(struct warp *warp) {
    warp->unsynced = 0;
    warp->synced_clock = warp->clocks[component(warp, SELF)]++;
}

static bool wait_for_warp(struct warp *warp, struct split *split, u32 lanes) {
    if (!lanes_ready(warp, split, lanes, warp->live)) return false;
    sync_warp(warp);
    return true;
}

/* Gives away what these lanes know: of the other lanes only what they did before the last barrier of the warp. */
static void release_to(u32 *clocks, struct warp *warp, u32 lanes) {
    u32 *own = &warp->clocks[component(warp, SELF)], all = *own, given = clocks[component(warp, SELF)];
    if (warp->unsynced & ~lanes) *own = warp->synced_clock > given ? warp->synced_clock : given;
    join(clocks, warp->clocks);
    *own = all;
}

/* ---- named barriers ---- */

static s32 number_of(const struct warp *warp, s32 offset, u32 lanes) { return (s32)REGISTER(u32, warp, offset)[__builtin_ctz(lanes)]; }

static void finish_named(struct block *block, s32 number) {
    struct named_barrier *barrier = &block->barrier[number];
    for (s32 w = 0; w < engine.warps_per_block; w++)
        for (s32 s = 0; s < block->warps[w].splits; s++) {
            struct split *split = &block->warps[w].split[s];
            if (split->state != WAIT_NAMED || (s32)split->wanted != number) continue;
            split->state = RUNNABLE;
            join(block->warps[w].clocks, barrier->clocks);
        }
    barrier->arrived = barrier->threads = 0;
    clear(barrier->clocks);
}

/* args: number, threads or -1 for all of the block. */
static bool named(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    if (!wait_for_warp(warp, split, lanes)) return false;
    struct block *block = warp->block;
    s32 number = number_of(warp, args[0], lanes);
    s32 threads = args[1] >= 0 ? number_of(warp, args[1], lanes) : engine.warps_per_block * LANES;
    if (number < 0 || number >= NAMED_BARRIERS) fail("barrier %d: must be from 0 to 15", number);
    if (threads <= 0 || threads % LANES) fail("barrier %d of %d threads: must be whole warps", number, threads);
    struct named_barrier *barrier = &block->barrier[number];
    if (barrier->arrived && barrier->threads != threads)
        fail("barrier %d: %d threads here, %d at an earlier arrival", number, threads, barrier->threads);
    barrier->threads = threads;
    barrier->arrived += LANES;
    join(barrier->clocks, warp->clocks);
    release_clock(warp);
    if (in->op == OP_bar_sync) split->state = WAIT_NAMED, split->wanted = (u32)number, engine.statistics[BARRIER_WAITS]++;
    if (barrier->arrived > threads) fail("barrier %d: more arrivals than its %d threads", number, threads);
    if (barrier->arrived == threads) finish_named(block, number);
    return true;
}

/* ---- barriers of a cluster: arrive, then wait ---- */

void cluster_progress(struct cluster *cluster) {
    u32 live = 0;
    for (s32 b = 0; b < cluster->blocks; b++)
        for (s32 w = 0; w < engine.warps_per_block; w++) live += (u32)__builtin_popcount(cluster->block[b].warps[w].live);
    if (!live || cluster->arrived < live) return;
    cluster->arrived = 0;
    cluster->phase++;
    memcpy(cluster->done, cluster->arriving, 2 * sizeof(u32) * (size_t)engine.clock_count);
    clear(cluster->arriving);
}

static bool cluster_arrive(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes) {
    if (!wait_for_warp(warp, split, lanes)) return false;
    struct cluster *cluster = warp->block->cluster;
    if (warp->cluster_phase == cluster->phase + 1) fail("barrier.cluster: arrives twice in one phase");
    warp->cluster_phase = cluster->phase + 1;
    cluster->arrived += (u32)__builtin_popcount(lanes);
    if (!in->a) join(cluster->arriving, warp->clocks), release_clock(warp); /* in->a: .relaxed */
    cluster_progress(cluster);
    return true;
}

static bool cluster_wait(struct warp *warp, struct split *split, u32 lanes) {
    if (!wait_for_warp(warp, split, lanes)) return false;
    if (!warp->cluster_phase) fail("barrier.cluster.wait before any arrive");
    split->state = WAIT_CLUSTER;
    engine.statistics[BARRIER_WAITS]++;
    return true;
}

/* ---- bar.warp.sync ---- */

static bool meet_lanes(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes) {
    u32 members = REGISTER(u32, warp, engine.launch->args[in->first])[__builtin_ctz(lanes)];
    if (!lanes_ready(warp, split, lanes, members)) return false;
    if (!(warp->live & ~members)) sync_warp(warp);
    return true;
}

/* ---- mbarriers ---- */

static struct mbarrier **mbarrier_place(struct warp *warp, u32 address, struct block **block) {
    u32 at = address;
    *block = block_of(warp, &at);
    if (at % 8) fail("mbarrier at 0x%x: must be aligned to 8 bytes", at);
    shared_bytes(*block, at, 8);
    return &(*block)->mbarriers[at >> 3];
}

struct mbarrier *find_mbarrier(struct warp *warp, u32 address, bool for_async) {
    struct block *block;
    struct mbarrier *barrier = *mbarrier_place(warp, address, &block);
    address &= (1u << RANK_SHIFT) - 1;
    if (!barrier) fail("mbarrier at 0x%x: is not initialised", address);
    if (!engine.launch->check_races) return barrier;
    if (warp->clocks[barrier->init_component] < barrier->init_clock)
        fail("race: mbarrier at 0x%x was initialised at line %d, and no barrier orders the two", address, barrier->line);
    if (for_async && !barrier->fenced && warp->clocks[engine.clock_count + (s32)barrier->init_component] < barrier->init_clock)
        fail("proxy: mbarrier at 0x%x, initialised at line %d, without a fence.mbarrier_init or fence.proxy.async between", address,
             barrier->line);
    return barrier;
}

static void initialise(struct warp *warp, u32 address, u32 count) {
    struct block *block;
    struct mbarrier **place = mbarrier_place(warp, address, &block);
    if (*place) fail("mbarrier at 0x%x: is initialised already, at line %d", address, (*place)->line);
    if (!count || count >= 1u << 20) fail("mbarrier at 0x%x: count %u: must be from 1 to 2**20 - 1", address, count);
    u32 own = component(warp, SELF), bytes = 4 * sizeof(u32) * (u32)engine.clock_count;
    note_write(warp, block, address & ((1u << RANK_SHIFT) - 1), 8, SELF, warp->clocks[own], false);
    struct mbarrier *barrier = grow(sizeof *barrier);
    *barrier = (struct mbarrier){.expected = count, .pending = count, .line = engine.at->line};
    barrier->init_component = own, barrier->init_clock = warp->clocks[own];
    barrier->clocks = barrier->arriving = grow(bytes);
    barrier->done = barrier->arriving + 2 * engine.clock_count;
    *place = barrier;
}

static void invalidate(struct warp *warp, u32 address) {
    struct block *block;
    struct mbarrier **place = mbarrier_place(warp, address, &block);
    if (!*place) fail("mbarrier at 0x%x: is not initialised", address);
    release((*place)->clocks);
    release(*place);
    *place = NULL;
}

static void progress(struct mbarrier *barrier) {
    if (barrier->pending || barrier->bytes) return;
    barrier->phase++;
    barrier->pending = barrier->expected;
    u32 *done = barrier->done;
    barrier->done = barrier->arriving;
    barrier->arriving = done;
    clear(done);
}

static void arrive(struct mbarrier *barrier, u32 count, s64 bytes) {
    if (count > barrier->pending)
        fail("mbarrier initialised at line %d with %u arrivals: %u more arrivals in one phase", barrier->line, barrier->expected,
             count - barrier->pending);
    barrier->pending -= count;
    barrier->bytes += bytes;
    if (barrier->bytes >= 1 << 20 || barrier->bytes <= -(1 << 20))
        fail("mbarrier initialised at line %d: expects %lld bytes", barrier->line, (long long)barrier->bytes);
    progress(barrier);
}

/* From hardware that acts for a warp: it passes on only what it has itself done. */
void arrive_from(struct mbarrier *barrier, u32 count, s64 bytes, u32 from, u32 clock) {
    if (barrier->arriving[from] < clock) barrier->arriving[from] = clock;
    arrive(barrier, count, bytes);
}

/* args: state register or -1, address, count or -1, bytes or -1. The state is the number of the phase. */
static void mbarrier_arrive(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    FOR_LANES(l, lanes) {
        struct mbarrier *barrier = find_mbarrier(warp, (u32)address_operand(warp, args + 1, l), false);
        if (args[0] >= 0) REGISTER(u64, warp, args[0])[l] = barrier->phase;
        s64 bytes = args[5] >= 0 ? REGISTER(u32, warp, args[5])[l] : 0;
        u32 count = in->op == OP_mbarrier_expect ? 0 : args[4] >= 0 ? REGISTER(u32, warp, args[4])[l] : 1;
        if (count) release_to(barrier->arriving, warp, lanes);
        arrive(barrier, count, bytes);
    }
    if (in->op == OP_mbarrier_arrive) release_clock(warp);
}

static bool passed(const struct mbarrier *barrier, const struct instruction *in, const struct warp *warp, s32 offset, s32 lane) {
    if (in->a) return (barrier->phase & 1) != (REGISTER(u32, warp, offset)[lane] & 1); /* in->a: parity, else a state */
    return barrier->phase != (u32)REGISTER(u64, warp, offset)[lane];
}

/* args: predicate, address, state or parity. in->b: try_wait, which may suspend; as on a device it returns early now and then.
   Lanes that have diverged may meet here in different laps of a ring: a lane that can go on must not wait for one that cannot. */
static bool mbarrier_wait(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u32 ready = 0;
    struct mbarrier *awaited = NULL;
    bool several = false, impatient = in->b && !draw(32);
    if (!impatient) FOR_LANES(l, lanes) {
        u32 address = (u32)address_operand(warp, args + 1, l);
        struct mbarrier *barrier = find_mbarrier(warp, address, false);
        if (passed(barrier, in, warp, args[4], l)) {
            join(warp->clocks, barrier->done);
            ready |= 1u << l;
        } else {
            several |= awaited && awaited != barrier;
            awaited = barrier;
            split->address = address;
        }
    }
    if (awaited && in->b && !ready && !several) {
        split->state = WAIT_MBARRIER;
        split->mbarrier = awaited;
        split->wanted = awaited->phase;
        return false;
    }
    engine.statistics[BARRIER_WAITS] += ready != 0;
    warp->yields = ready != lanes;
    u32 *result = REGISTER(u32, warp, args[0]);
    *result = (*result & ~lanes) | ready;
    return true;
}

/* Whether what a split waits for has happened; if so it is runnable. */
bool wait_over(struct warp *warp, struct split *split) {
    if (split->state == WAIT_MBARRIER && split->mbarrier->phase != split->wanted) split->state = RUNNABLE;
    if (split->state == WAIT_CLUSTER && warp->block->cluster->phase >= warp->cluster_phase) {
        join(warp->clocks, warp->block->cluster->done);
        split->state = RUNNABLE;
    }
    return split->state == RUNNABLE;
}

void describe_wait(char *text, size_t size, const struct warp *warp, const struct split *split) {
    const struct mbarrier *barrier = split->mbarrier;
    switch (split->state) {
    case WAIT_MBARRIER:
        snprintf(text, size, "mbarrier at 0x%x, phase %u: %u of %u arrivals and %lld bytes are missing", split->address, barrier->phase,
                 barrier->pending, barrier->expected, (long long)barrier->bytes);
        break;
    case WAIT_NAMED: {
        const struct named_barrier *other = &warp->block->barrier[split->wanted];
        snprintf(text, size, "barrier %u: %d of %d threads are missing", split->wanted, other->threads - other->arrived, other->threads);
        break;
    }
    case WAIT_CLUSTER: snprintf(text, size, "the cluster's barrier: %u threads have arrived", warp->block->cluster->arrived); break;
    default: snprintf(text, size, "lanes 0x%x of its own warp", split->wanted & ~split->lanes); break;
    }
}

bool synchronise(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    switch (in->op) {
    case OP_bar_warp: return meet_lanes(warp, split, in, lanes);
    case OP_bar_sync: case OP_bar_arrive: return named(warp, split, in, lanes);
    case OP_cluster_arrive: return cluster_arrive(warp, split, in, lanes);
    case OP_cluster_wait: return cluster_wait(warp, split, lanes);
    case OP_mbarrier_init: /* address, count */
        FOR_LANES(l, lanes) initialise(warp, (u32)address_operand(warp, args, l), REGISTER(u32, warp, args[3])[l]);
        return true;
    case OP_mbarrier_inval: FOR_LANES(l, lanes) invalidate(warp, (u32)address_operand(warp, args, l)); return true;
    case OP_mbarrier_arrive: case OP_mbarrier_expect: mbarrier_arrive(warp, in, lanes); return true;
    case OP_mbarrier_wait: return mbarrier_wait(warp, split, in, lanes);
    case OP_fence_async:
        for (s32 i = 0; i < engine.clock_count; i++)
            if (warp->clocks[engine.clock_count + i] < warp->clocks[i]) warp->clocks[engine.clock_count + i] = warp->clocks[i];
        release_clock(warp);
        return true;
    case OP_fence_device: warp->block->cluster->acquires = true; return true;
    case OP_grid_wait:
        warp->waited = true;
        if (!warp->block->waiter) warp->block->waiter = warp, warp->block->waited_clock = warp->clocks[component(warp, SELF)];
        return true;
    default: /* fence_mbarrier_init */
        for (s32 i = 0; i < warp->block->shared_bytes >> 3; i++) {
            struct mbarrier *barrier = warp->block->mbarriers[i];
            if (barrier && barrier->init_component == component(warp, SELF)) barrier->fenced = true;
        }
        return true;
    }
}
