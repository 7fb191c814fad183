"""A router's settings in one place."""

import functools
from dataclasses import dataclass

import torch

from routing.choosing import top_k
from routing.recomputed import Origin
from routing.rounding import Targets, check_rounding, token_rounding
from routing.scoring import check_choice
from routing.types import Routing

METHODS = ("top_k", "token_rounding")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How logits become a Routing. The fields are the arguments of top_k and token_rounding, whose docstrings explain them."""

    k: int
    method: str = "top_k"
    scoring: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: str = "top2"
    tile_m: int = 128
    """Used by token_rounding, as is mode."""
    mode: str = "nearest"

    @functools.cached_property
    def choice(self) -> tuple[int, str, bool, float, int, int, str]:
        """What top_k's kernel is told, in its order: k, scoring, renormalize, scale, num_groups, groups_per_token, group_score."""
        return self.k, self.scoring, self.renormalize, self.scale, self.num_groups, self.groups_per_token, self.group_score

    def validate(self, num_experts: int) -> None:
        """Raise ValueError for what no logits (T, num_experts) could be routed with."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: must be one of {', '.join(METHODS)}")
        check_choice(num_experts, self.k, self.scoring, self.scale, self.num_groups, self.groups_per_token, self.group_score)
        check_rounding(self.tile_m, self.mode)

    def route(
        self,
        logits: torch.Tensor,
        *,
        selection_bias: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        targets: Targets | None = None,
        origin: Origin | None = None,
    ) -> Routing:
        """Route logits (T, E). The generator and the targets are token_rounding's, the origin either's."""
        scoring = {
            "scoring": self.scoring,
            "renormalize": self.renormalize,
            "scale": self.scale,
            "selection_bias": selection_bias,
            "num_groups": self.num_groups,
            "groups_per_token": self.groups_per_token,
            "group_score": self.group_score,
            "origin": origin,
        }
        if self.method == "top_k":
            return top_k(logits, self.k, **scoring)
        if self.method == "token_rounding":
            return token_rounding(logits, self.k, self.tile_m, self.mode, generator=generator, targets=targets, **scoring)
        raise ValueError(f"method={self.method!r}: must be one of {', '.join(METHODS)}")
