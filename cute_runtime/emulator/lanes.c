/* Exchanges between the lanes of a warp: each waits until all lanes of its member mask have come to it. */
#include <string.h>

#include "core.h"
#include "opcodes.h"

/* Whether the members are all here; if not, the split waits for them. A member that has left by `ret` is not waited for. */
bool lanes_ready(struct warp *warp, struct split *split, u32 lanes, u32 members) {
    u32 missing = members & warp->live & ~lanes;
    if (!(lanes & members)) fail("member mask 0x%x does not contain the executing lanes 0x%x", members, lanes);
    if (!missing) return true;
    if (missing & split->lanes) fail("lanes 0x%x are in the member mask but do not execute (predicate)", missing & split->lanes);
    split->state = WAIT_LANES;
    split->wanted = members;
    return false;
}

static void shuffle(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u32 *d = REGISTER(u32, warp, args[0]), *b = REGISTER(u32, warp, args[3]), *c = REGISTER(u32, warp, args[4]), source[LANES], valid = 0;
    memcpy(source, REGISTER(u32, warp, args[2]), sizeof source);
    u32 result[LANES];
    FOR_LANES(l, lanes) {
        u32 segment = c[l] >> 8 & 31, clamp = c[l] & 31, most = (l & segment) | (clamp & ~segment), least = l & segment, offset = b[l] & 31;
        s32 from;
        bool inside;
        switch (in->a) {
        case 0: from = l - (s32)offset, inside = from >= (s32)most; break;                            /* up */
        case 1: from = l + (s32)offset, inside = from <= (s32)most; break;                            /* down */
        case 2: from = l ^ (s32)offset, inside = from <= (s32)most; break;                            /* bfly */
        default: from = (s32)(least | (offset & ~segment)), inside = from <= (s32)most; break;        /* idx */
        }
        if (!inside) from = l;
        if (!(lanes >> from & 1)) fail("shfl: lane %d reads lane %d, which does not take part", l, from);
        result[l] = source[from];
        valid |= (u32)inside << l;
    }
    FOR_LANES(l, lanes) d[l] = result[l];
    if (args[1] >= 0) *REGISTER(u32, warp, args[1]) = (*REGISTER(u32, warp, args[1]) & ~lanes) | (valid & lanes);
}

static void set_predicate(struct warp *warp, s32 offset, u32 lanes, bool value) {
    u32 *predicate = REGISTER(u32, warp, offset);
    *predicate = value ? *predicate | lanes : *predicate & ~lanes;
}

static void vote(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u32 ballot = (*REGISTER(u32, warp, args[1]) ^ (in->b ? ALL_LANES : 0)) & lanes;
    switch (in->a) {
    case 0: set_predicate(warp, args[0], lanes, ballot == lanes); break;            /* all */
    case 1: set_predicate(warp, args[0], lanes, ballot != 0); break;                /* any */
    case 2: set_predicate(warp, args[0], lanes, ballot == lanes || !ballot); break; /* uni */
    default: FOR_LANES(l, lanes) REGISTER(u32, warp, args[0])[l] = ballot;          /* ballot */
    }
}

static u64 value_of(const struct warp *warp, s32 offset, s32 bytes, s32 lane) {
    return bytes == 8 ? REGISTER(u64, warp, offset)[lane] : REGISTER(u32, warp, offset)[lane];
}

static void match_any(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u32 peers[LANES] = {0};
    FOR_LANES(l, lanes) FOR_LANES(other, lanes) {
        if (value_of(warp, args[1], in->a, l) == value_of(warp, args[1], in->a, other)) peers[l] |= 1u << other;
    }
    FOR_LANES(l, lanes) REGISTER(u32, warp, args[0])[l] = peers[l];
}

static void match_all(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u64 first = value_of(warp, args[2], in->a, __builtin_ctz(lanes));
    bool equal = true;
    FOR_LANES(l, lanes) equal &= value_of(warp, args[2], in->a, l) == first;
    FOR_LANES(l, lanes) REGISTER(u32, warp, args[0])[l] = equal ? lanes : 0;
    if (args[1] >= 0) set_predicate(warp, args[1], lanes, equal);
}

static void reduce(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u32 *source = REGISTER(u32, warp, args[1]), result = source[__builtin_ctz(lanes)];
    bool is_signed = in->b == TYPE_s32;
    FOR_LANES(l, lanes & (lanes - 1)) {
        u32 value = source[l];
        bool below = is_signed ? (s32)value < (s32)result : value < result;
        switch (in->a) {
        case 0: result += value; break;
        case 1: result = below ? value : result; break;
        case 2: result = below ? result : value; break;
        case 3: result &= value; break;
        case 4: result |= value; break;
        default: result ^= value;
        }
    }
    FOR_LANES(l, lanes) REGISTER(u32, warp, args[0])[l] = result;
}

/* Which lane leads is the hardware's choice, the same each time for the same mask: here the seed's. */
static void elect(struct warp *warp, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u32 turn = (u32)(engine.launch->seed * 7 % LANES), rotated = turn ? lanes >> turn | lanes << (LANES - turn) : lanes;
    u32 leader = ((u32)__builtin_ctz(rotated) + turn) % LANES;
    if (args[0] >= 0) FOR_LANES(l, lanes) REGISTER(u32, warp, args[0])[l] = leader;
    set_predicate(warp, args[1], lanes, false);
    set_predicate(warp, args[1], 1u << leader, true);
}

bool across_lanes(struct warp *warp, struct split *split, const struct instruction *in, u32 lanes) {
    const s32 *args = engine.launch->args + in->first;
    u32 members = REGISTER(u32, warp, args[in->count - 1])[__builtin_ctz(lanes)];
    if (!lanes_ready(warp, split, lanes, members)) return false;
    switch (in->op) {
    case OP_shfl: shuffle(warp, in, lanes); break;
    case OP_vote: vote(warp, in, lanes); break;
    case OP_match_any: match_any(warp, in, lanes); break;
    case OP_match_all: match_all(warp, in, lanes); break;
    case OP_redux: reduce(warp, in, lanes); break;
    default: elect(warp, in, lanes);
    }
    return true;
}
