"""Routing as a cell's spec says, and the checks of routing and dispatch at the cell's own sizes."""

from typing import Any

import numpy as np
import torch

import dispatch
import routing
from routing import Routing
from routing.recomputed import Origin
from testing.matrix.cells import RoutingSpec
from testing.matrix.checks_dispatch import check_gather_sum, check_plan
from testing.matrix.checks_routing import check_rounding, check_top_k
from testing.matrix.inputs import router_logits, selection_bias
from testing.matrix.results import Check


def route(logits: torch.Tensor, k: int, spec: RoutingSpec, bias: torch.Tensor | None, seed: int, origin: Origin | None = None) -> Routing:
    """Call `routing` with a spec's arguments; `seed` draws for stochastic rounding; `origin` as routing.top_k has it."""
    arguments: dict[str, Any] = {
        "scoring": spec.scoring,
        "renormalize": spec.renormalize,
        "scale": spec.scale,
        "selection_bias": bias,
        "num_groups": spec.num_groups,
        "groups_per_token": spec.groups_per_token,
        "group_score": spec.group_score,
        "origin": origin,
    }
    if spec.method == "top_k":
        return routing.top_k(logits, k, **arguments)
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    return routing.token_rounding(logits, k, spec.tile_m, spec.mode, generator=generator, **arguments)


def with_sentinels(routed: Routing, share: float, seed: int) -> Routing:
    """Turn a share of the slots into sentinels: half of them -1, half E, as a rank that owns part of the experts would."""
    if not share:
        return routed
    generator = np.random.default_rng([seed, 2])
    count = len(routed.expert_index)
    away = torch.from_numpy(generator.random(count) < share)
    names = torch.from_numpy(np.where(generator.random(count) < 0.5, -1, routed.num_experts).astype(np.int32))
    device = routed.expert_index.device
    expert_index = torch.where(away.to(device), names.to(device), routed.expert_index)
    return routed._replace(expert_index=expert_index, score=torch.where(away.to(device), 0, routed.score))


def check_route(
    spec: RoutingSpec,
    load: str,
    tokens: int,
    experts: int,
    per_token: int,
    seed: int,
    device: str,
    *,
    counts: tuple[int, ...] | None = None,
    sentinels: float = 0.0,
) -> list[Check]:
    """Route at full size and judge the routing, its plan and the gather-sum; run twice, the routing must not change."""
    logits = router_logits(load, tokens, experts, seed, counts)
    bias = selection_bias(spec, experts, seed)
    tensors = [None if array is None else torch.from_numpy(array).to(device) for array in (logits, bias)]
    routed, again = (route(tensors[0], per_token, spec, tensors[1], seed) for _ in range(2))
    same = all(torch.equal(getattr(routed, name), getattr(again, name)) for name in ("token_index", "expert_index", "score"))
    if spec.method == "top_k":
        checks = check_top_k(routed, logits, spec, per_token, bias)
    else:
        checks = check_rounding(routed, logits, spec, per_token)
    routed = with_sentinels(routed, sentinels, seed)
    plan = dispatch.plan(
        routed.token_index,
        routed.expert_index,
        num_tokens=routed.num_tokens,
        num_experts=routed.num_experts,
        slots_per_token=routed.slots_per_token,
    )
    checks.append(Check("same routing twice", same, "" if same else "two runs on the same logits differ"))
    plan_checks = check_plan(plan, routed)
    checks += plan_checks
    if all(item.passed for item in plan_checks):
        checks += check_gather_sum(plan, routed, seed)
    return checks
