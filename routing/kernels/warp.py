"""What the routing kernels do with one token in one warp. Notation: T tokens, E experts, K experts per token.

Numbers are those of routing/scoring.py: float32, non-finite logits replaced, of equals the lower index first.
"""

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute

LANES = 32
WARPS = 8
"""Warps of a block; each has a token of its own."""
PER_LANE = 4
CHUNK = LANES * PER_LANE
"""Experts that a warp looks at together: enough loads in flight, and few enough registers for 64 warps a multiprocessor."""

BELOW_ALL = -(2**31)
"""A key below that of every float."""
_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = 3.4028234663852886e38
LEAST_SUM = 1e-20
"""routing.scoring's: keeps what renormalisation divides by from zero."""

ELEMENT = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": Float32}


def row_of(matrix: cute.Tensor, row: Int32) -> cute.Tensor:
    """(E,) one row of a dense (T, E); T * E may pass 2^31."""
    width = matrix.shape[1]
    return cute.make_tensor(matrix.iterator + Int64(row) * width, cute.make_layout((width,)))


def part_of(vector: cute.Tensor, begin: Int64) -> cute.Tensor:
    """A dense vector from ``begin`` on."""
    return cute.make_tensor(vector.iterator + begin, cute.make_layout((vector.shape[0],)))


def finite(x: Float32) -> Float32:
    """NaN and -inf become the lowest finite number, +inf the highest."""
    return cute.arch.fmin(cute.arch.fmax(x, Float32(-_FLOAT32_MAX)), Float32(_FLOAT32_MAX))


def logit(row: cute.Tensor, expert: Int32) -> Float32:
    return finite(row[expert].to(Float32))


def is_finite(row: cute.Tensor, expert: Int32) -> cutlass.Boolean:
    x = row[expert].to(Float32)
    return (x <= Float32(_FLOAT32_MAX)) & (x >= Float32(-_FLOAT32_MAX))


def key_of(value: Float32) -> Int32:
    """An integer that orders as the float does, the two zeros as one."""
    bits = (value + Float32(0.0)).bitcast(Int32)
    return bits ^ ((bits >> 31) & _INT32_MAX)


def value_of(key: Int32) -> Float32:
    """The float of a key."""
    return (key ^ ((key >> 31) & _INT32_MAX)).bitcast(Float32)


def exp(x: Float32) -> Float32:
    """Within 2 units in the last place, as torch's; ex2.approx of a product would lose them for distant logits."""
    return cute.math.exp(x)


def sigmoid(x: Float32) -> Float32:
    return Float32(1.0) / (Float32(1.0) + exp(-x))


def highest(key: Int32) -> Int32:
    """The largest key of the warp, in every lane."""
    return cute.arch.warp_redux_sync(key, "max")


def total(x: Float32) -> Float32:
    """The sum over the warp, in every lane, always in the same order."""
    return cute.arch.warp_reduction_sum(x)


def from_lane(x: cutlass.Numeric, lane: Int32) -> cutlass.Numeric:
    return cute.arch.shuffle_sync(x, lane)


def from_lane_below(x: cutlass.Numeric, distance: int = 1) -> cutlass.Numeric:
    """The value of the lane ``distance`` below; the lowest lanes keep their own."""
    return cute.arch.shuffle_sync_up(x, distance, mask_and_clamp=0)


def ballot(condition: cutlass.Boolean) -> Uint32:
    """Bit l: whether the condition holds in lane l."""
    return Uint32(cute.arch.vote_ballot_sync(condition))


def set_below(mask: Uint32, lane: Int32) -> Int32:
    """How many of the mask's bits below this lane's are set."""
    return Int32(cute.arch.popc(mask & ((Uint32(1) << Uint32(lane)) - Uint32(1))))


@cute.jit
def softmax_of(row: cute.Tensor, lane: Int32) -> tuple[Float32, Float32]:
    """The largest logit of a token and the sum of ``exp(logit - largest)``."""
    num_experts = row.shape[0]
    largest = Float32(-_FLOAT32_MAX)
    for begin in cutlass.range(0, num_experts, CHUNK, unroll=1):
        for j in cutlass.range_constexpr(PER_LANE):
            # A position behind the end reads the last expert again: no branch, and nothing new for a maximum.
            expert = cutlass.min(begin + j * LANES + lane, num_experts - 1)
            largest = cute.arch.fmax(largest, logit(row, expert))
    largest = value_of(highest(key_of(largest)))
    return largest, exp_sum(row, largest, lane)


@cute.jit
def exp_sum(row: cute.Tensor, largest: Float32, lane: Int32) -> Float32:
    """The sum over a token's experts of ``exp(logit - largest)``, in every lane."""
    num_experts = row.shape[0]
    part = Float32(0.0)
    for begin in cutlass.range(0, num_experts, CHUNK, unroll=1):
        for j in cutlass.range_constexpr(PER_LANE):
            expert = begin + j * LANES + lane
            term = exp(logit(row, cutlass.min(expert, num_experts - 1)) - largest)
            part += cutlass.select_(expert < num_experts, term, Float32(0.0))
    return total(part)


def insert(list_key: Int32, list_index: Int32, key: Int32, index: Int32, lane: Int32) -> tuple[Int32, Int32]:
    """Put ``key`` (the same in all lanes) into the descending list that lane l holds the l-th entry of, behind its equals."""
    key_below, index_below = from_lane_below(list_key), from_lane_below(list_index)
    stays = list_key >= key
    here = (lane == 0) | (key_below >= key)
    new_key = cutlass.select_(stays, list_key, cutlass.select_(here, key, key_below))
    new_index = cutlass.select_(stays, list_index, cutlass.select_(here, index, index_below))
    return new_key, new_index
