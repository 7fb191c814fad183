"""Which experts: top-K in its variants, token rounding in its variants, and the losses and counts that go with them."""

from routing.choosing import top_k
from routing.config import RouterConfig
from routing.losses import expert_counts, load_balance_loss, router_z_loss, wasted_row_ratio
from routing.rounding import token_rounding
from routing.types import Routing

__all__ = [
    "RouterConfig",
    "Routing",
    "expert_counts",
    "load_balance_loss",
    "router_z_loss",
    "token_rounding",
    "top_k",
    "wasted_row_ratio",
]
