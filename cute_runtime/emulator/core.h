/* The emulator's core: the state of one launch. One warp runs at a time, 32 lanes in a loop; see docs/emulator.md.
 *
 * core.c schedules, alu.c computes, memory.c holds the memories and what is known of each word, lanes.c exchanges between lanes,
 * barriers.c waits, async.c starts and ends what completes later: copies, tiles.c, and matrix products, wgmma.c. Register files are laid
 * out by program.py; every operand is a byte offset into one.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

enum { LANES = 32, NAMED_BARRIERS = 16, MAX_RANK = 5 };
#define ALL_LANES 0xffffffffu

/* Shared addresses: 24 bits within a block, above them 0 for the block itself or 1 + the rank of a block of the cluster. As a
 * device does, the first KiB is kept from the kernel. Generic addresses: host addresses are global, the rest are windows. */
enum { SHARED_BASE = 1024, RANK_SHIFT = 24 };
#define SHARED_WINDOW (1ull << 48)
#define PARAM_WINDOW (2ull << 48)
#define LOCAL_WINDOW (3ull << 48)
#define WINDOW(address) ((address) & (0xffffull << 48))

enum access { READ, WRITE, ATOMIC };
enum space { GENERIC, GLOBAL, SHARED, PARAM, LOCAL };

/* Who does a thing to shared memory: lanes of a warp, one lane of it alone, or hardware that acts for it later. Clocks count what
 * each has done. The one lane is apart because it may release its own accesses at any time, those of the others only after a
 * bar.warp.sync. Those up to SEND use the generic proxy, the others the async one. */
enum agent { SELF, SOLO, COPY, SEND, PRODUCT, STORE, LOAD, AGENTS };
enum { READERS = 4 }; /* of a word: SELF, SOLO, PRODUCT, STORE */

/* Mirrored by program.py's INSTRUCTION. */
struct instruction {
    s32 op, line;
    s32 guard;   /* offset of a predicate register, or -1 */
    s32 negated; /* of the guard */
    s32 flags, first, count, a, b; /* a, b: further constants of the opcode */
    s32 registers, reads, writes;  /* into ``touched``: offsets of registers read, then written */
};

enum { FTZ = 1, SATURATE = 2, TOUCHES_PRODUCT = 4 };

/* A tensor. Of each of its 4-byte words: which cluster of this launch wrote it, and whether the launch before did. */
struct region {
    u64 base, size;
    u32 *writer; /* 1 + the cluster's number, with ATOMIC_WRITE; 0: none */
    const u32 *before;
};
#define ATOMIC_WRITE 0x80000000u

/* Mirrored by run.py's _Launch. */
struct launch {
    const struct instruction *code;
    const s32 *args, *touched;
    const u8 *constants, *params;
    const struct region *regions;
    const s32 *specials;
    u64 seed, limit;
    s32 code_count, constant_bytes, register_bytes, param_bytes, region_count, static_bytes, dynamic_bytes, local_bytes;
    s32 resident, check_races;
    s32 overlaps; /* may start before the launch before it has ended (programmatic dependent launch) */
    s32 grid[3], block[3], cluster[3];
};

enum statistic {
    INSTRUCTIONS, PRODUCTS, BYTES_LOADED, BYTES_STORED, BYTES_COPIED, GLOBAL_READ, GLOBAL_WRITTEN, SHARED_READ, SHARED_WRITTEN,
    BARRIER_WAITS, STEPS, STATISTICS
};

/* The last write of a 4-byte word of shared memory. */
struct word {
    u32 clock; /* 0: nobody has written it */
    u16 component;
    u8 bytes;  /* which of the four */
    u8 atomic;
    s32 line;
};

struct mbarrier {
    u32 expected, pending;
    s64 bytes;
    u32 phase;
    s32 line;         /* of its init */
    u32 init_component, init_clock;
    bool fenced;      /* its init, for the async proxy */
    u32 *clocks, *arriving, *done; /* of this phase's arrivals and of the last complete one; both lie in ``clocks`` */
};

struct named_barrier {
    s32 threads, arrived;
    u32 *clocks;
};

enum state { RUNNABLE, WAIT_LANES, WAIT_MBARRIER, WAIT_NAMED, WAIT_CLUSTER };

enum group_kind { COPY_GROUPS, STORE_GROUPS, PRODUCT_GROUPS, GROUP_KINDS };
enum { GROUPS_KEPT = 16 };

/* Lanes of a warp that are at one instruction. */
struct split {
    s32 pc;
    u32 lanes;
    u8 state;
    u32 wanted; /* members of a warp, number of a named barrier, or the phase of an mbarrier */
    struct mbarrier *mbarrier;
    u32 address;
};

struct warp {
    struct block *block;
    s32 index;          /* in the block */
    s32 in_cluster;     /* in the cluster */
    u32 live;
    s32 splits;
    struct split split[LANES];
    u8 *registers, *local;
    u8 *busy;           /* of each 64 bytes of registers: 1 a product writes it, 2 a product reads it, 4 touched since wgmma.fence */
    u32 *clocks;        /* what this warp knows to have happened; the second half: of that, what is fenced for the async proxy */
    u32 issued[AGENTS]; /* operations given to each agent */
    u32 groups[GROUP_KINDS][LANES]; /* committed, by each lane */
    u32 group_clock[GROUP_KINDS][LANES][GROUPS_KEPT]; /* operations issued when the group was committed */
    s32 products;       /* under way */
    bool fenced;        /* a wgmma.fence was executed */
    enum agent agent;   /* of the access under way: SELF or SOLO */
    u32 unsynced;       /* lanes that have accessed shared memory as SELF since the last barrier of the whole warp */
    u32 synced_clock;   /* of SELF, at that barrier */
    u32 cluster_phase;  /* of barrier.cluster, at the last arrival; + 1 */
    bool yields;        /* has polled in vain */
    bool waited;        /* for the launch before */
    u64 instructions;
};

struct block {
    struct cluster *cluster;
    s32 index[3], rank, live;
    const struct warp *waiter; /* the first warp that has waited for the launch before, and its clock then */
    u32 waited_clock;
    u8 *shared;
    s32 shared_bytes;
    struct word *words;
    u32 *readers;      /* [kind of reader][warp][word]: clock of the last read */
    u32 *reader_last;  /* [reader]: the largest of them */
    struct mbarrier **mbarriers;
    struct named_barrier barrier[NAMED_BARRIERS];
    struct warp *warps;
};

struct cluster {
    u32 number;
    bool acquires; /* has a fence or an acquiring load of the device's scope: what other clusters wrote may then be read */
    s32 index[3], blocks, live_warps;
    struct block *block;
    u32 arrived, phase; /* of barrier.cluster */
    u32 *arriving, *done;
};

enum kind { COPY_LANES, COPY_ARRIVE, TILE_LOAD, TILE_STORE, MATRIX_PRODUCT };

/* Something asynchronous that has been issued. */
struct operation {
    u8 kind;
    u8 bytes, source_bytes[LANES];
    u32 lanes, clock, group;
    s32 line;
    bool waited; /* its warp, for the launch before, when it was issued */
    struct warp *warp;
    const struct instruction *instruction;
    u64 source[LANES];
    u32 target[LANES];
    /* tiles */
    u32 shared, mbarrier, multicast, size;
    u64 global, map;
    u32 value; /* of st.async, which writes it where a load would write what it read */
    bool inlined;
    s32 coordinate[MAX_RANK];
    bool reduce;
    /* products */
    u64 descriptor_a, descriptor_b;
    bool accumulate, done;
};

#define OPEN_GROUP 0xffffffffu

struct engine {
    const struct launch *launch;
    u64 random;
    s32 warps_per_block, warps_per_cluster, blocks_per_cluster, clock_count; /* of one half */
    struct cluster **clusters;
    s32 cluster_count;
    u64 *waiting; /* numbers of clusters that have not started, in random order */
    u64 waiting_count;
    const struct operation *completing;
    struct operation **operations;
    s32 operation_count, operation_capacity;
    u32 eagerness; /* of 256: how often something asynchronous completes before it must */
    u64 statistics[STATISTICS];
    u64 *warp_instructions;
    struct warp *current;
    const struct instruction *at;
};

extern struct engine engine;

/* core.c */
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
u32 draw(u32 below);
const char *warp_name(const struct warp *warp);
void *grow(size_t bytes);
void release(void *pointer);
void poison(u8 *bytes, size_t count);

/* alu.c */
void compute(struct warp *warp, const struct instruction *in, u32 lanes);
float half_to_float(u16 value);
u16 float_to_half(double value, int mantissa_bits, int exponent_bits, bool toward_zero);
static inline float bfloat_to_float(u16 value) {
    union { u32 bits; float value; } both = {(u32)value << 16};
    return both.value;
}

/* memory.c */

struct block *block_of(struct warp *warp, u32 *shared_address);
u8 *shared_bytes(struct block *block, u32 address, u32 size);
u8 *global_bytes(u64 address, u32 size, enum access access);
bool waited_before(const struct warp *warp); /* whether the launch before has ended for it: it, or one that it has heard of, has waited */
u8 *memory_bytes(struct warp *warp, s32 lane, enum space space, u64 address, u32 size, enum access access);
void note_read(struct warp *warp, struct block *block, u32 address, u32 size, enum agent agent, u32 clock, bool allow_unwritten);
void note_write(struct warp *warp, struct block *block, u32 address, u32 size, enum agent agent, u32 clock, bool atomic);
void memory_access(struct warp *warp, const struct instruction *in, u32 lanes);
u64 address_operand(const struct warp *warp, const s32 *args, s32 lane);

/* lanes.c, barriers.c, async.c: return whether the split goes on to the next instruction; false: it waits, or tries again */
bool lanes_ready(struct warp *warp, struct split *split, u32 lanes, u32 members);
bool across_lanes(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes);
bool synchronise(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes);
bool asynchronous(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes);

void join(u32 *into, const u32 *from);
void release_clock(struct warp *warp);
u32 component(const struct warp *warp, enum agent agent);
struct mbarrier *find_mbarrier(struct warp *warp, u32 address, bool asynchronous);
void arrive_from(struct mbarrier *barrier, u32 count, s64 bytes, u32 component, u32 clock);
void cluster_progress(struct cluster *cluster);
bool wait_over(struct warp *warp, struct split *split);
void describe_wait(char *text, size_t size, const struct warp *warp, const struct split *split);

void complete_one(s32 number);
void check_exit(struct warp *warp);

/* tiles.c */
void issue_tile(struct operation *operation);
void load_tile(const struct operation *operation);
void store_tile(const struct operation *operation);

/* wgmma.c */
void issue_product(struct operation *operation);
void multiply(const struct operation *operation);
void mark_busy(struct warp *warp);
void check_registers(struct warp *warp, const struct instruction *in);

#define REGISTER(type, warp, offset) ((type *)((warp)->registers + (offset)))
#define FOR_LANES(l, lanes) \
    for (s32 l = 0; l < LANES; l++) \
        if ((lanes) >> l & 1)
