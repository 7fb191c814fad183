/* Memories: where an address lies, who may touch it, and what is known of each word of shared memory.
 *
 * Races are found by vector clocks, whatever the order in which this run happened to execute. Every warp, and every piece of
 * hardware that acts for it later (enum agent), numbers what it does. A word remembers the number of its last write and of the last
 * read by each reader; a warp knows, through the barriers it has waited for, up to which number each other one has come. An access is
 * a race where the word was touched by something that the warp does not know to have happened.
 */
#include <stdio.h>
#include <string.h>

#include "core.h"
#include "opcodes.h"

static const int type_bytes[] = {1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 4};

struct block *block_of(struct warp *warp, u32 *address) {
    u32 rank = *address >> RANK_SHIFT;
    *address &= (1u << RANK_SHIFT) - 1;
    if (!rank) return warp->block;
    struct cluster *cluster = warp->block->cluster;
    if ((s32)rank > cluster->blocks) fail("shared address 0x%x of rank %u: the cluster has %d blocks", *address, rank - 1, cluster->blocks);
    struct block *block = &cluster->block[rank - 1];
    if (!block->live) fail("shared memory of rank %u of the cluster: that block has ended", rank - 1);
    return block;
}

u8 *shared_bytes(struct block *block, u32 address, u32 size) {
    if (address < SHARED_BASE || address + size > (u32)block->shared_bytes)
        fail("shared address 0x%x, %u bytes: the block has [0x%x, 0x%x)", address, size, SHARED_BASE, block->shared_bytes);
    return block->shared + address;
}

bool waited_before(const struct warp *warp) {
    const struct block *block = warp->block;
    return warp->waited || (block->waiter && warp->clocks[component(block->waiter, SELF)] >= block->waited_clock);
}

/* Between clusters of a launch there is no barrier: what one writes plainly, no other may touch, unless it acquires. */
static void note_global(const struct region *region, u64 address, u32 size, enum access access) {
    const struct block *block = engine.current->block;
    const char *verb = access == READ ? "reads" : "writes";
    s32 tensor = (s32)(region - engine.launch->regions);
    u32 own = block->cluster->number + 1;
    bool early = engine.launch->overlaps && !(engine.completing ? engine.completing->waited : waited_before(engine.current));
    for (u64 i = (address - region->base) >> 2; i <= (address + size - 1 - region->base) >> 2; i++) {
        u32 writer = region->writer[i], other = writer & ~ATOMIC_WRITE;
        bool both_atomic = access == ATOMIC && writer & ATOMIC_WRITE;
        if (early && region->before[i])
            fail("%s {tensor %d} at byte %llu, which the launch before writes, without a griddepcontrol.wait before", verb, tensor,
                 (unsigned long long)i * 4);
        if (other && other != own && !both_atomic && !block->cluster->acquires && size >= 4)
            fail("race: %s {tensor %d} at byte %llu, which cluster %u has written in this launch", verb, tensor,
                 (unsigned long long)i * 4, other - 1);
        if (access != READ && size >= 4) region->writer[i] = own | (access == ATOMIC ? ATOMIC_WRITE : 0);
    }
}

u8 *global_bytes(u64 address, u32 size, enum access access) {
    const struct launch *launch = engine.launch;
    u64 distance = ~0ull;
    s32 nearest = -1;
    for (s32 i = 0; i < launch->region_count; i++) {
        const struct region *region = &launch->regions[i];
        if (address >= region->base && address + size <= region->base + region->size) {
            if (launch->check_races) note_global(region, address, size, access);
            return (u8 *)(uintptr_t)address;
        }
        u64 gap = address < region->base ? region->base - address : address - region->base;
        if (gap < distance) distance = gap, nearest = i;
    }
    const char *verb = access == READ ? "reads" : "writes";
    if (nearest < 0) fail("%s %u bytes of global memory at 0x%llx: the launch has no tensor", verb, size, (unsigned long long)address);
    const struct region *region = &launch->regions[nearest];
    fail("%s %u bytes of global memory at 0x%llx, outside every tensor: the nearest is {tensor %d}, byte %lld of its %llu", verb, size,
         (unsigned long long)address, nearest, (long long)(address - region->base), (unsigned long long)region->size);
}

u32 component(const struct warp *warp, enum agent agent) { return (u32)(agent * engine.warps_per_cluster + warp->in_cluster); }

static const char *const doing[] = {"", "", "cp.async of ", "st.async of ", "wgmma of ", "bulk store of ", "bulk load of "};

static const char *component_name(u32 number) {
    static char text[2][96];
    static int turn;
    char *out = text[turn ^= 1];
    s32 agent = (s32)number / engine.warps_per_cluster, place = (s32)number % engine.warps_per_cluster;
    const struct cluster *cluster = engine.current->block->cluster;
    const struct warp *warp = &cluster->block[place / engine.warps_per_block].warps[place % engine.warps_per_block];
    snprintf(out, sizeof text[0], "%s%s", doing[agent], warp_name(warp));
    return out;
}

static const char *const verbs[] = {"", "", "cp.async writes", "st.async writes", "wgmma reads", "a bulk store reads", "a bulk load writes"};

static _Noreturn void race(enum agent agent, bool writes, u32 address, const char *what, u32 other, s32 line) {
    char at[48] = "";
    if (line) snprintf(at, sizeof at, " at line %d", line);
    const char *verb = agent > SOLO ? verbs[agent] : writes ? "writes" : "reads";
    fail("race: %s shared memory at 0x%x that %s %s%s, and no barrier orders the two", verb, address, component_name(other), what, at);
}

static _Noreturn void unfenced(enum agent agent, u32 address, u32 other, s32 line) {
    fail("proxy: %s shared memory at 0x%x that %s wrote at line %d, without a fence.proxy.async between", verbs[agent], address,
         component_name(other), line);
}

void note_read(struct warp *warp, struct block *block, u32 address, u32 size, enum agent agent, u32 clock, bool allow_unwritten) {
    u32 first = address >> 2, last = (address + size - 1) >> 2;
    for (u32 i = first; i <= last; i++) {
        const struct word *word = &block->words[i];
        u32 at = i << 2;
        if (!word->clock) {
            if (!allow_unwritten) fail("reads shared memory at 0x%x that nobody has written", at);
            continue;
        }
        if (!engine.launch->check_races || word->atomic) continue;
        if (warp->clocks[word->component] < word->clock) race(agent, false, at, "wrote", word->component, word->line);
        if (agent > SEND && word->component / (u32)engine.warps_per_cluster <= SEND
            && warp->clocks[engine.clock_count + word->component] < word->clock)
            unfenced(agent, at, word->component, word->line);
    }
    if (block != warp->block) return;
    s32 reader = (agent == PRODUCT ? 2 : agent == STORE ? 3 : (s32)agent) * engine.warps_per_block + warp->index;
    u32 *readers = block->readers + (size_t)reader * (size_t)(block->shared_bytes >> 2);
    for (u32 i = first; i <= last; i++) readers[i] = clock;
    block->reader_last[reader] = clock;
}

static void check_readers(struct warp *warp, struct block *block, u32 first, u32 last, enum agent agent) {
    static const enum agent kinds[READERS] = {SELF, SOLO, PRODUCT, STORE};
    for (s32 r = 0; r < READERS * engine.warps_per_block; r++) {
        const struct warp *reader = &block->warps[r % engine.warps_per_block];
        u32 other = component(reader, kinds[r / engine.warps_per_block]), known = warp->clocks[other];
        if (block->reader_last[r] <= known) continue;
        const u32 *readers = block->readers + (size_t)r * (size_t)(block->shared_bytes >> 2);
        for (u32 i = first; i <= last; i++)
            if (readers[i] > known) race(agent, true, i << 2, "reads", other, 0);
    }
}

void note_write(struct warp *warp, struct block *block, u32 address, u32 size, enum agent agent, u32 clock, bool atomic) {
    u32 first = address >> 2, last = (address + size - 1) >> 2, own = component(warp, agent);
    u8 bytes = size >= 4 ? 15 : (u8)(((1u << size) - 1) << (address & 3));
    if (engine.launch->check_races && size >= 4) check_readers(warp, block, first, last, agent);
    for (u32 i = first; i <= last; i++) {
        struct word *word = &block->words[i];
        if (engine.launch->check_races && word->clock && word->bytes & bytes) {
            if (!(atomic && word->atomic) && warp->clocks[word->component] < word->clock)
                race(agent, true, i << 2, "wrote", word->component, word->line);
            if (agent == LOAD && word->component / (u32)engine.warps_per_cluster <= SEND
                && warp->clocks[engine.clock_count + word->component] < word->clock)
                unfenced(agent, i << 2, word->component, word->line);
        }
        *word = (struct word){clock, (u16)own, word->bytes | bytes, atomic, engine.at->line};
    }
}

u8 *memory_bytes(struct warp *warp, s32 lane, enum space space, u64 address, u32 size, enum access access) {
    if (space == GENERIC) {
        u64 window = WINDOW(address);
        space = window == SHARED_WINDOW ? SHARED : window == PARAM_WINDOW ? PARAM : window == LOCAL_WINDOW ? LOCAL : GLOBAL;
    }
    if (address & (size - 1))
        fail("address 0x%llx: must be aligned to the %u bytes accessed (lane %d)", (unsigned long long)address, size, lane);
    if (space == SHARED) {
        u32 at = (u32)address;
        struct block *block = block_of(warp, &at);
        u8 *bytes = shared_bytes(block, at, size);
        u32 clock = warp->clocks[component(warp, warp->agent)];
        if (warp->agent == SELF) warp->unsynced |= 1u << lane;
        if (access == READ) note_read(warp, block, at, size, warp->agent, clock, false);
        else note_write(warp, block, at, size, warp->agent, clock, access == ATOMIC);
        engine.statistics[access == READ ? SHARED_READ : SHARED_WRITTEN] += size;
        return bytes;
    }
    if (space == PARAM || space == LOCAL) {
        u64 offset = address & ~(0xffffull << 48);
        u32 limit = (u32)(space == PARAM ? engine.launch->param_bytes : engine.launch->local_bytes);
        const char *name = space == PARAM ? "parameters" : "local memory";
        if (offset + size > limit) fail("address 0x%llx: beyond the %u bytes of %s", (unsigned long long)offset, limit, name);
        if (space == PARAM && access != READ) fail("writes to the parameters");
        return space == PARAM ? (u8 *)engine.launch->params + offset : warp->local + (u64)lane * limit + offset;
    }
    engine.statistics[access == READ ? GLOBAL_READ : GLOBAL_WRITTEN] += size;
    return global_bytes(address, size, access);
}

/* args: register or -1, its bytes, a constant to add. */
u64 address_operand(const struct warp *warp, const s32 *args, s32 lane) {
    u64 address = args[0] < 0 ? 0 : args[1] == 8 ? REGISTER(u64, warp, args[0])[lane] : REGISTER(u32, warp, args[0])[lane];
    address += (u64)(s64)args[2];
    return args[1] == 8 ? address : (u32)address;
}

/* args: address, strong, then (register, its bytes) of each element; in->a the space, in->b the type. A register of -1 is not wanted. */
static void load_or_store(struct warp *warp, const struct instruction *in, u32 lanes, bool store) {
    const s32 *args = engine.launch->args + in->first;
    s32 count = (in->count - 4) / 2;
    u32 size = (u32)type_bytes[in->b];
    bool is_signed = in->b >= TYPE_s8 && in->b <= TYPE_s64, whole = true;
    enum access access = !store ? READ : args[3] ? ATOMIC : WRITE;
    for (s32 i = 0; i < count; i++) whole &= args[4 + 2 * i] >= 0;
    FOR_LANES(l, lanes) {
        u64 address = address_operand(warp, args, l);
        u8 *bytes = whole ? memory_bytes(warp, l, in->a, address, size * (u32)count, access) : NULL;
        if (!whole && address & (size * (u32)count - 1))
            fail("address 0x%llx: must be aligned to %u bytes", (unsigned long long)address, size * (u32)count);
        for (s32 i = 0; i < count; i++) {
            s32 offset = args[4 + 2 * i], width = args[5 + 2 * i];
            if (offset < 0) continue;
            u8 *element = whole ? bytes + i * (s32)size : memory_bytes(warp, l, in->a, address + (u64)i * size, size, access);
            if (store) {
                memcpy(element, warp->registers + offset + l * width, size);
                continue;
            }
            u64 value = 0;
            memcpy(&value, element, size);
            if (is_signed && size < 8) value = (u64)((s64)(value << (64 - 8 * size)) >> (64 - 8 * size));
            memcpy(warp->registers + offset + l * width, &value, (size_t)width);
        }
    }
}

static u64 updated(s32 op, s32 type, u64 old, u64 value, u64 other) {
    if (type == TYPE_f32 && op == OP_atom_add) {
        float a, b;
        u32 low = (u32)old;
        memcpy(&a, &low, 4), low = (u32)value, memcpy(&b, &low, 4);
        a += b;
        return memcpy(&low, &a, 4), low;
    }
    if (type >= TYPE_f16 && op != OP_atom_exch) fail("an atomic operation on this floating-point type is not emulated");
    bool is_signed = type >= TYPE_s8 && type <= TYPE_s64;
    int spare = 64 - 8 * type_bytes[type];
    s64 a = (s64)(old << spare) >> spare, b = (s64)(value << spare) >> spare;
    switch (op) {
    case OP_atom_add: return old + value;
    case OP_atom_min: return (is_signed ? a < b : old < value) ? old : value;
    case OP_atom_max: return (is_signed ? a > b : old > value) ? old : value;
    case OP_atom_and: return old & value;
    case OP_atom_or: return old | value;
    case OP_atom_xor: return old ^ value;
    case OP_atom_exch: return value;
    case OP_atom_cas: return old == value ? other : old;
    case OP_atom_inc: return old >= value ? 0 : old + 1;
    default: return old == 0 || old > value ? value : old - 1; /* dec */
    }
}

/* args: address, then register or -1 for the old value, operand, second operand of cas or -1. */
static void atomic(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u32 size = (u32)type_bytes[in->b];
    FOR_LANES(l, lanes) {
        u8 *bytes = memory_bytes(warp, l, in->a, address_operand(warp, args, l), size, ATOMIC);
        u64 old = 0, value = 0, other = 0;
        memcpy(&old, bytes, size);
        memcpy(&value, warp->registers + args[4] + l * (s32)size, size);
        if (args[5] >= 0) memcpy(&other, warp->registers + args[5] + l * (s32)size, size);
        u64 result = updated(in->op, in->b, old, value, other);
        memcpy(bytes, &result, size);
        if (args[3] >= 0) memcpy(warp->registers + args[3] + l * (s32)size, &old, size);
    }
}

/* args: address, then a register a matrix; in->a: transposed. Lane 8 m + r has the address of row r of matrix m. */
static void move_matrices(struct warp *warp, const struct instruction *in, bool store) {
    const s32 *args = engine.launch->args + in->first;
    u8 *row[LANES];
    for (s32 l = 0; l < 8 * (in->count - 3); l++)
        row[l] = memory_bytes(warp, l, SHARED, (u32)address_operand(warp, args, l), 16, store ? WRITE : READ);
    for (s32 m = 0; m < in->count - 3; m++)
        for (s32 l = 0; l < LANES; l++)
            for (s32 i = 0; i < 2; i++) {
                s32 r = in->a ? 2 * (l % 4) + i : l / 4, c = in->a ? l / 4 : 2 * (l % 4) + i;
                u8 *element = row[8 * m + r] + 2 * c, *mine = warp->registers + args[3 + m] + 4 * l + 2 * i;
                memcpy(store ? element : mine, store ? mine : element, 2);
            }
}

void memory_access(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    warp->agent = lanes & (lanes - 1) ? SELF : SOLO;
    switch (in->op) {
    case OP_ld: case OP_st: load_or_store(warp, in, lanes, in->op == OP_st); return;
    case OP_atom_add: case OP_atom_min: case OP_atom_max: case OP_atom_and: case OP_atom_or: case OP_atom_xor: case OP_atom_exch:
    case OP_atom_cas: case OP_atom_inc: case OP_atom_dec: atomic(warp, in, lanes); return;
    case OP_ldmatrix: case OP_stmatrix: move_matrices(warp, in, in->op == OP_stmatrix); return;
    case OP_mapa: /* d, a, rank; in->a: bytes of d and a */
        FOR_LANES(l, lanes) {
            u64 address = in->a == 8 ? REGISTER(u64, warp, args[1])[l] : REGISTER(u32, warp, args[1])[l];
            u32 rank = REGISTER(u32, warp, args[2])[l];
            if ((s32)rank >= engine.blocks_per_cluster) fail("mapa: rank %u: the cluster has %d blocks", rank, engine.blocks_per_cluster);
            address = (address & ~(0xffull << RANK_SHIFT)) | (u64)(rank + 1) << RANK_SHIFT;
            if (in->a == 8) REGISTER(u64, warp, args[0])[l] = address;
            else REGISTER(u32, warp, args[0])[l] = (u32)address;
        }
        return;
    default: fail("no such memory access");
    }
}
