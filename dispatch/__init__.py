"""Who goes where: counting the experts' rows, the dispatch plan, and the sum of each token's rows."""

from dispatch import debug
from dispatch.counting import count_cumsum
from dispatch.gathering import gather_sum
from dispatch.planning import plan
from dispatch.types import DispatchPlan, pack, packed_size, unpack

__all__ = ["DispatchPlan", "count_cumsum", "debug", "gather_sum", "pack", "packed_size", "plan", "unpack"]
