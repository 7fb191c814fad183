/* What is issued now and completes later: cp.async, tiles and bulk copies, matrix products; and the groups by which they are awaited.
 *
 * An operation completes at a random moment between its issue and the wait that needs it. At its issue its accesses to shared memory
 * are recorded under the clock of the agent that performs it, which the issuing warp learns only by waiting, others through barriers.
 */
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "opcodes.h"

static struct operation *issue(struct warp *warp, const struct instruction *in, u8 kind, enum agent agent, u32 lanes) {
    if (engine.operation_count == engine.operation_capacity) {
        engine.operation_capacity = engine.operation_capacity ? 2 * engine.operation_capacity : 64;
        engine.operations = realloc(engine.operations, (size_t)engine.operation_capacity * sizeof *engine.operations);
        if (!engine.operations) fail("out of memory");
    }
    struct operation *operation = grow(sizeof *operation);
    operation->kind = kind, operation->lanes = lanes, operation->line = in->line;
    operation->warp = warp, operation->instruction = in;
    operation->group = OPEN_GROUP;
    operation->waited = waited_before(warp);
    operation->clock = ++warp->issued[agent];
    engine.operations[engine.operation_count++] = operation;
    return operation;
}

static void forget(s32 number) {
    release(engine.operations[number]);
    s32 behind = --engine.operation_count - number;
    memmove(engine.operations + number, engine.operations + number + 1, (size_t)behind * sizeof *engine.operations);
}

static void copy_lanes(struct operation *operation, u32 lanes) {
    struct warp *warp = operation->warp;
    FOR_LANES(l, operation->lanes & lanes) {
        u32 at = operation->target[l];
        struct block *block = block_of(warp, &at);
        memcpy(block->shared + at, (const void *)(uintptr_t)operation->source[l], operation->source_bytes[l]);
        memset(block->shared + at + operation->source_bytes[l], 0, (size_t)(operation->bytes - operation->source_bytes[l]));
    }
    operation->lanes &= ~lanes;
}

static void complete(s32 number) {
    struct operation *operation = engine.operations[number];
    struct warp *warp = operation->warp;
    switch (operation->kind) {
    case COPY_LANES: copy_lanes(operation, ALL_LANES); break;
    case COPY_ARRIVE:
        FOR_LANES(l, operation->lanes) {
            struct mbarrier *barrier = find_mbarrier(warp, operation->target[l], false);
            arrive_from(barrier, 1, 0, component(warp, COPY), operation->clock);
        }
        break;
    case TILE_LOAD: case TILE_STORE:
        engine.completing = operation;
        if (operation->kind == TILE_LOAD) load_tile(operation);
        else store_tile(operation);
        engine.completing = NULL;
        break;
    default:
        if (!operation->done) multiply(operation);
        operation->done = true; /* kept until it is waited for */
        return;
    }
    forget(number);
}

/* Completes an operation and what must come before it: products of a warp are in order, an arrival follows the warp's copies. */
void complete_one(s32 number) {
    struct operation *operation = engine.operations[number];
    u8 first = operation->kind == COPY_ARRIVE ? COPY_LANES : MATRIX_PRODUCT;
    if (operation->kind == COPY_ARRIVE || operation->kind == MATRIX_PRODUCT)
        for (s32 i = 0; i < number; i++) {
            if (engine.operations[i]->warp != operation->warp || engine.operations[i]->kind != first) continue;
            if (first == COPY_LANES && !(engine.operations[i]->lanes & operation->lanes)) continue;
            if (engine.operations[i]->kind == MATRIX_PRODUCT) complete(i);
            else complete(i--), number--;
        }
    engine.current = operation->warp;
    engine.at = operation->instruction;
    complete(number);
}

static bool in_groups(const struct operation *operation, enum group_kind kind) {
    static const u8 kinds[GROUP_KINDS] = {COPY_LANES, TILE_STORE, MATRIX_PRODUCT};
    return operation->kind == kinds[kind];
}

static void commit(struct warp *warp, u32 lanes, enum group_kind kind, enum agent agent) {
    FOR_LANES(l, lanes) warp->group_clock[kind][l][++warp->groups[kind][l] % GROUPS_KEPT] = warp->issued[agent];
    for (s32 i = 0; i < engine.operation_count; i++) {
        struct operation *operation = engine.operations[i];
        u32 mine = operation->lanes & lanes;
        if (operation->warp == warp && in_groups(operation, kind) && operation->group == OPEN_GROUP && mine)
            operation->group = warp->groups[kind][__builtin_ctz(mine)];
    }
}

/* Completes all but the last ``pending`` groups of each lane. */
static void wait_groups(struct warp *warp, u32 lanes, enum group_kind kind, enum agent agent, u32 pending) {
    const struct instruction *at = engine.at;
    if (pending >= GROUPS_KEPT) fail("waits for all but %u groups: at most %d are emulated", pending, GROUPS_KEPT - 1);
    u32 *known = &warp->clocks[component(warp, agent)];
    FOR_LANES(l, lanes) {
        if (warp->groups[kind][l] <= pending) continue;
        u32 newest = warp->groups[kind][l] - pending, clock = warp->group_clock[kind][l][newest % GROUPS_KEPT];
        for (s32 i = 0; i < engine.operation_count; i++) {
            struct operation *operation = engine.operations[i];
            if (operation->warp != warp || !in_groups(operation, kind)) continue;
            if (!(operation->lanes >> l & 1) || operation->group > newest) continue;
            engine.at = operation->instruction;
            if (kind == PRODUCT_GROUPS) {
                complete(i);
                forget(i--);
                warp->products--;
            } else if (kind == COPY_GROUPS) {
                copy_lanes(operation, 1u << l);
                if (!operation->lanes) forget(i--);
            } else {
                complete(i--);
            }
        }
        if (*known < clock) *known = clock;
    }
    engine.at = at;
    if (kind == PRODUCT_GROUPS) mark_busy(warp);
    engine.statistics[BARRIER_WAITS]++;
}

/* args: target, source, source bytes or -1; in->a the bytes. */
static void copy_async(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    struct operation *operation = issue(warp, in, COPY_LANES, COPY, lanes);
    operation->bytes = (u8)in->a;
    FOR_LANES(l, lanes) {
        u32 target = (u32)address_operand(warp, args, l), at = target;
        u64 source = address_operand(warp, args + 3, l);
        u32 wanted = args[6] >= 0 ? REGISTER(u32, warp, args[6])[l] : (u32)in->a;
        if (wanted > (u32)in->a) fail("cp.async: source of %u bytes: at most %d", wanted, in->a);
        if (target % (u32)in->a) fail("cp.async: shared address 0x%x: must be aligned to %d bytes", target, in->a);
        if (wanted && source % (u32)in->a)
            fail("cp.async: global address 0x%llx: must be aligned to %d bytes", (unsigned long long)source, in->a);
        if (wanted) global_bytes(source, wanted, READ);
        struct block *block = block_of(warp, &at);
        poison(shared_bytes(block, at, (u32)in->a), (size_t)in->a);
        note_write(warp, block, at, (u32)in->a, COPY, operation->clock, false);
        operation->target[l] = target, operation->source[l] = source, operation->source_bytes[l] = (u8)wanted;
        engine.statistics[BYTES_COPIED] += wanted;
    }
}

/* args: mbarrier; in->a: .noinc. */
static void copy_arrive(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    struct operation *operation = issue(warp, in, COPY_ARRIVE, COPY, lanes);
    FOR_LANES(l, lanes) {
        operation->target[l] = (u32)address_operand(warp, args, l);
        struct mbarrier *barrier = find_mbarrier(warp, operation->target[l], false);
        if (!in->a) barrier->pending++;
    }
}

static u64 operand64(const struct warp *warp, s32 offset, s32 lane) { return offset < 0 ? 0 : REGISTER(u64, warp, offset)[lane]; }

/* Tiles. args: shared address, map address, mbarrier address, multicast mask or -1 (16 bits), coordinates; in->a: rank, in->b: reduction.
 * Bulk copies. args: shared address, global address, mbarrier address, multicast, bytes. Lanes with the same operands count as one. */
static void bulk(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    bool tile = in->op == OP_tile_load || in->op == OP_tile_store, load = in->op == OP_tile_load || in->op == OP_bulk_load;
    s32 first = engine.operation_count;
    FOR_LANES(l, lanes) {
        struct operation *operation = issue(warp, in, load ? TILE_LOAD : TILE_STORE, load ? LOAD : STORE, 1u << l);
        operation->shared = (u32)address_operand(warp, args, l);
        *(tile ? &operation->map : &operation->global) = address_operand(warp, args + 3, l);
        operation->mbarrier = load ? (u32)address_operand(warp, args + 6, l) : 0;
        operation->multicast = args[9] >= 0 ? REGISTER(u16, warp, args[9])[l] : 0;
        operation->reduce = tile && in->b;
        if (tile) for (s32 i = 0; i < in->a; i++) operation->coordinate[i] = (s32)REGISTER(u32, warp, args[10 + i])[l];
        else operation->size = REGISTER(u32, warp, args[10])[l];
        s32 same = first;
        for (; !load && !operation->reduce && same < engine.operation_count - 1; same++) {
            struct operation *other = engine.operations[same];
            if (other->shared == operation->shared && other->map == operation->map && other->global == operation->global
                && !memcmp(other->coordinate, operation->coordinate, sizeof other->coordinate) && (tile || other->size == operation->size))
                break;
        }
        if (!load && !operation->reduce && same < engine.operation_count - 1) {
            engine.operations[same]->lanes |= 1u << l;
            forget(engine.operation_count - 1);
            continue;
        }
        issue_tile(operation);
    }
}

/* args: shared address, value, mbarrier address. A load of what is in a register. */
static void store_async(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    FOR_LANES(l, lanes) {
        struct operation *operation = issue(warp, in, TILE_LOAD, SEND, 1u << l);
        operation->shared = (u32)address_operand(warp, args, l);
        operation->value = REGISTER(u32, warp, args[3])[l];
        operation->mbarrier = (u32)address_operand(warp, args + 4, l);
        operation->size = 4, operation->inlined = true;
        issue_tile(operation);
    }
}

static void product(struct warp *warp, const struct instruction *in) {
    const s32 *args = engine.launch->args + in->first;
    struct operation *operation = issue(warp, in, MATRIX_PRODUCT, PRODUCT, ALL_LANES);
    /* args: predicate of scale-d or -1, its negation, descriptor of a or -1, descriptor of b, then registers of d and of a */
    u32 accumulate = args[0] < 0 ? (u32)args[1] : *REGISTER(u32, warp, args[0]) ^ (args[1] ? ALL_LANES : 0);
    if (args[0] >= 0 && accumulate != 0 && accumulate != ALL_LANES) fail("wgmma: scale-d differs between lanes");
    operation->accumulate = accumulate != 0;
    operation->descriptor_a = operand64(warp, args[2], 0);
    operation->descriptor_b = operand64(warp, args[3], 0);
    for (s32 l = 1; l < LANES; l++)
        if (operand64(warp, args[2], l) != operation->descriptor_a || operand64(warp, args[3], l) != operation->descriptor_b)
            fail("wgmma: descriptors differ between lanes");
    issue_product(operation);
    warp->products++;
}

bool asynchronous(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    if (in->op >= OP_wgmma && !lanes_ready(warp, split, lanes, warp->live)) return false;
    switch (in->op) {
    case OP_cp_async: copy_async(warp, in, lanes); break;
    case OP_cp_async_commit: commit(warp, lanes, COPY_GROUPS, COPY); break;
    case OP_cp_async_wait: wait_groups(warp, lanes, COPY_GROUPS, COPY, (u32)in->a); break;
    case OP_cp_async_arrive: copy_arrive(warp, in, lanes); break;
    case OP_st_async: store_async(warp, in, lanes); break;
    case OP_bulk_commit: commit(warp, lanes, STORE_GROUPS, STORE); break;
    case OP_bulk_wait: wait_groups(warp, lanes, STORE_GROUPS, STORE, (u32)in->a); break;
    case OP_wgmma: product(warp, in); break;
    case OP_wgmma_fence:
        warp->fenced = true;
        for (s32 i = 0; i < engine.launch->register_bytes / 64; i++) warp->busy[i] &= (u8)~4;
        break;
    case OP_wgmma_commit: commit(warp, ALL_LANES, PRODUCT_GROUPS, PRODUCT); break;
    case OP_wgmma_wait: wait_groups(warp, 1, PRODUCT_GROUPS, PRODUCT, (u32)in->a); break;
    default: bulk(warp, in, lanes); break;
    }
    (void)args;
    return true;
}

/* A warp has ended, perhaps its block: nothing may still act for it on shared memory, and what comes behind this launch must find that the
 * one before it has ended too. */
void check_exit(struct warp *warp) {
    if (engine.launch->overlaps && engine.launch->check_races && !warp->block->live && !warp->block->waiter)
        fail("the block ends without a griddepcontrol.wait, so that this launch may end before the one before it");
    for (s32 i = 0; i < engine.operation_count; i++) {
        const struct operation *operation = engine.operations[i];
        if (operation->warp == warp && operation->kind == MATRIX_PRODUCT)
            fail("the warp ends before its wgmma at line %d was waited for", operation->line);
        if (operation->warp == warp && operation->kind == TILE_STORE)
            fail("the warp ends before its bulk store at line %d has read shared memory", operation->line);
        if (operation->kind != TILE_LOAD || operation->warp->block->cluster != warp->block->cluster || warp->block->live) continue;
        u32 at = operation->shared, rank = at >> RANK_SHIFT ? (at >> RANK_SHIFT) - 1 : (u32)operation->warp->block->rank;
        u32 targets = operation->multicast ? operation->multicast : 1u << rank;
        if (targets >> warp->block->rank & 1)
            fail("the block ends while the %s of line %d still writes its shared memory", operation->inlined ? "st.async" : "bulk load",
                 operation->line);
    }
}
