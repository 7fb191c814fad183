/* Tensor memory access: boxes of a tensor between global and shared memory, and plain runs of bytes. */
#include <string.h>

#include "core.h"
#include "opcodes.h"

/* A tensor map, decoded from the 128 bytes that the host stub writes. */
struct map {
    u64 base, stride[MAX_RANK]; /* bytes */
    s64 size[MAX_RANK];
    s32 box[MAX_RANK], rank, element, type;
    u32 swizzle; /* log2 of the 16-byte pieces that are exchanged: 0 to 3 */
};

/* Bytes 0-7 address; 8-11 word: rank - 1 in bits 4-6, type in bits 7-10, swizzle in bits 13-14, in bit 21 whether the tensor has 128 KiB
 * or more; from 12 strides / 16 of the dimensions from 1; from 32 sizes - 1; 55-59 box - 1. Read off maps that the compiler's host stubs
 * wrote for known tensors. */
static struct map decode(struct warp *warp, u64 address) {
    static const u8 bytes_of_type[16] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 0, 2};
    struct map map = {0};
    u8 raw[128];
    if (address % 64) fail("tensor map at 0x%llx: must be aligned to 64 bytes", (unsigned long long)address);
    for (s32 i = 0; i < 8; i++) memcpy(raw + 16 * i, memory_bytes(warp, 0, GENERIC, address + 16 * (u64)i, 16, READ), 16);
    u32 word, value;
    memcpy(&map.base, raw, 8);
    memcpy(&word, raw + 8, 4);
    map.rank = (s32)(word >> 4 & 7) + 1;
    map.type = (s32)(word >> 7 & 15);
    map.element = bytes_of_type[map.type];
    map.swizzle = word >> 13 & 3;
    if ((word & ~0x2067f0u) != 0x40002 || map.rank > MAX_RANK || !map.element || raw[52] | raw[53] | raw[54])
        fail("tensor map at 0x%llx: of a kind that is not emulated (word 0x%x, strides of elements 0x%x)", (unsigned long long)address,
             word, raw[52]);
    memcpy(&value, raw + 28, 4);
    if (value) fail("tensor map: strides from 2**36 bytes are not emulated");
    if (map.base % 16) fail("tensor map: address 0x%llx: must be aligned to 16 bytes", (unsigned long long)map.base);
    map.stride[0] = (u64)map.element;
    for (s32 i = 0; i < map.rank; i++) {
        memcpy(&value, raw + 32 + 4 * i, 4);
        map.size[i] = (s64)value + 1;
        map.box[i] = raw[55 + i] + 1;
        if (!i) continue;
        memcpy(&value, raw + 12 + 4 * (i - 1), 4);
        map.stride[i] = (u64)value * 16;
    }
    return map;
}

static u32 box_bytes(const struct map *map) {
    u32 bytes = (u32)map->element;
    for (s32 i = 0; i < map->rank; i++) bytes *= (u32)map->box[i];
    return bytes;
}

/* One run of the box's dimension 0: where it lies in shared memory before the swizzle, in global memory, and what of it is inside. */
struct run {
    u32 shared, begin, end; /* begin, end: bytes of the run that lie inside the tensor */
    u64 global;             /* of the run's byte 0, perhaps outside */
};

static struct run run_of(const struct map *map, const s32 *coordinate, s32 number) {
    u32 bytes = (u32)(map->box[0] * map->element);
    struct run run = {(u32)number * bytes, 0, 0, map->base + (u64)((s64)coordinate[0] * map->element)};
    bool inside = true;
    for (s32 i = 1; i < map->rank; i++) {
        s64 at = coordinate[i] + number % map->box[i];
        number /= map->box[i];
        inside &= at >= 0 && at < map->size[i];
        run.global += (u64)at * map->stride[i];
    }
    s64 begin = coordinate[0] < 0 ? -(s64)coordinate[0] : 0, end = map->size[0] - coordinate[0];
    if (end > map->box[0]) end = map->box[0];
    if (inside && begin < end) run.begin = (u32)(begin * map->element), run.end = (u32)(end * map->element);
    return run;
}

static u32 swizzled(u32 address, u32 swizzle) { return address ^ ((address >> 7 & ((1u << swizzle) - 1)) << 4); }

static struct block *target_block(const struct operation *operation, s32 rank, u32 *at) {
    *at = operation->shared;
    struct block *block = block_of(operation->warp, at);
    return operation->multicast ? &block->cluster->block[rank] : block;
}

/* The blocks of the cluster that a load writes to. */
static u32 targets_of(const struct operation *operation) {
    u32 at;
    if (operation->multicast >> operation->warp->block->cluster->blocks)
        fail("multicast to 0x%x: the cluster is smaller", operation->multicast);
    return operation->multicast ? operation->multicast : 1u << target_block(operation, 0, &at)->rank;
}

static struct mbarrier *barrier_of(const struct operation *operation, s32 rank) {
    u32 address = operation->mbarrier & ((1u << RANK_SHIFT) - 1);
    return find_mbarrier(operation->warp, address | (u32)(rank + 1) << RANK_SHIFT, true);
}

/* What a store takes to global memory must have been written; what is clipped away need not. */
static void check_written(const struct operation *operation, const struct block *block, u32 at) {
    struct map map = {0};
    if (operation->map) map = decode(operation->warp, operation->map);
    u32 line = operation->map ? (u32)(map.box[0] * map.element) : operation->size;
    for (u32 r = 0; r < operation->size / line; r++) {
        struct run run = {0, 0, line, 0};
        if (operation->map) run = run_of(&map, operation->coordinate, (s32)r);
        for (u32 byte = run.begin & ~3u; byte < run.end; byte += 4) {
            u32 address = swizzled((at + run.shared + byte) & ~15u, map.swizzle) | ((at + run.shared + byte) & 12);
            if (!block->words[address >> 2].clock) fail("a bulk store reads shared memory at 0x%x that nobody has written", address);
        }
    }
}

/* At issue: checks the operands, and records the access to shared memory. */
void issue_tile(struct operation *operation) {
    struct warp *warp = operation->warp;
    bool load = operation->kind == TILE_LOAD;
    u32 bytes = operation->size, alignment = 16;
    if (operation->map) {
        struct map map = decode(warp, operation->map);
        if (map.rank != operation->instruction->a)
            fail("tensor map of rank %d: the instruction takes rank %d", map.rank, operation->instruction->a);
        u32 line = (u32)(map.box[0] * map.element);
        if (line % 16 || (map.swizzle && line > 16u << map.swizzle))
            fail("tensor map: a box of %u bytes in dimension 0 with this swizzle", line);
        bytes = box_bytes(&map);
        alignment = 128;
        operation->size = bytes;
    } else if (operation->inlined) {
        alignment = bytes;
    } else {
        if (bytes % 16 || !bytes) fail("bulk copy of %u bytes: must be a multiple of 16", bytes);
        global_bytes(operation->global, bytes, load ? READ : WRITE);
    }
    if (operation->shared % alignment)
        fail("%s: shared address 0x%x: must be aligned to %u bytes", operation->inlined ? "st.async" : "bulk copy", operation->shared,
             alignment);
    if (!operation->inlined) engine.statistics[load ? BYTES_LOADED : BYTES_STORED] += bytes;
    if (!load) {
        u32 at = operation->shared;
        struct block *block = block_of(warp, &at);
        shared_bytes(block, at, bytes);
        note_read(warp, block, at, bytes, STORE, operation->clock, true);
        check_written(operation, block, at);
        return;
    }
    u32 targets = targets_of(operation);
    FOR_LANES(rank, targets) {
        u32 at;
        struct block *block = target_block(operation, rank, &at);
        if (!block->live) fail("multicast to rank %d of the cluster: that block has ended", rank);
        poison(shared_bytes(block, at, bytes), bytes);
        note_write(warp, block, at, bytes, operation->inlined ? SEND : LOAD, operation->clock, false);
        barrier_of(operation, rank);
    }
}

void load_tile(const struct operation *operation) {
    struct warp *warp = operation->warp;
    struct map map = {0};
    if (operation->map) map = decode(warp, operation->map);
    FOR_LANES(rank, targets_of(operation)) {
        u32 at;
        struct block *block = target_block(operation, rank, &at);
        if (operation->inlined) memcpy(block->shared + at, &operation->value, operation->size);
        else if (!operation->map) memcpy(block->shared + at, (const void *)(uintptr_t)operation->global, operation->size);
        else {
            u32 line = (u32)(map.box[0] * map.element);
            for (u32 r = 0; r < operation->size / line; r++) {
                struct run run = run_of(&map, operation->coordinate, (s32)r);
                const u8 *source = run.end > run.begin ? global_bytes(run.global + run.begin, run.end - run.begin, READ) : NULL;
                u8 bytes[4096] = {0}; /* the longest line: 256 elements of 16 bytes */
                if (source) memcpy(bytes + run.begin, source, run.end - run.begin);
                for (u32 piece = 0; piece < line; piece += 16)
                    memcpy(block->shared + swizzled(at + run.shared + piece, map.swizzle), bytes + piece, 16);
            }
        }
        u32 from = component(warp, operation->inlined ? SEND : LOAD);
        arrive_from(barrier_of(operation, rank), 0, -(s64)operation->size, from, operation->clock);
    }
}

static void add_into(u8 *target, const u8 *source, u32 bytes, s32 type) {
    for (u32 i = 0; i < bytes;) {
        if (type == 7) {
            float a, b;
            memcpy(&a, target + i, 4), memcpy(&b, source + i, 4), a += b, memcpy(target + i, &a, 4), i += 4;
        } else if (type == 6 || type == 10) {
            u16 a, b;
            memcpy(&a, target + i, 2), memcpy(&b, source + i, 2);
            a = type == 6 ? float_to_half((double)half_to_float(a) + half_to_float(b), 10, 5, false)
                          : float_to_half((double)bfloat_to_float(a) + bfloat_to_float(b), 7, 8, false);
            memcpy(target + i, &a, 2), i += 2;
        } else {
            fail("cp.reduce.async.bulk.tensor: add of this type is not emulated");
        }
    }
}

void store_tile(const struct operation *operation) {
    u32 at = operation->shared;
    struct block *block = block_of(operation->warp, &at);
    if (!operation->map) {
        memcpy((void *)(uintptr_t)operation->global, block->shared + at, operation->size);
        return;
    }
    struct map map = decode(operation->warp, operation->map);
    u32 line = (u32)(map.box[0] * map.element);
    for (u32 r = 0; r < operation->size / line; r++) {
        struct run run = run_of(&map, operation->coordinate, (s32)r);
        if (run.end <= run.begin) continue;
        u8 bytes[4096];
        for (u32 piece = 0; piece < line; piece += 16)
            memcpy(bytes + piece, block->shared + swizzled(at + run.shared + piece, map.swizzle), 16);
        u8 *target = global_bytes(run.global + run.begin, run.end - run.begin, operation->reduce ? ATOMIC : WRITE);
        if (operation->reduce) add_into(target, bytes + run.begin, run.end - run.begin, map.type);
        else memcpy(target, bytes + run.begin, run.end - run.begin);
    }
}
