"""Defects in dispatch and routing: counts, the plan, the sum of each token's rows, who is chosen and with what score.

T tokens, E experts, K experts per token, R routed rows.
"""

import itertools

import torch

from routing import Routing, top_k
from testing.matrix.planting import Registry

ROWS = Registry()


# --- Dispatch -----------------------------------------------------------------------------------------------------


@ROWS.add("score applied twice", "dispatch", "gather_sum", "tokens/t129")
def _score_twice(right):
    return lambda rows, score, plan, **options: right(rows, None if score is None else score * score, plan, **options)


@ROWS.add("score not applied", "dispatch", "gather_sum", "tokens/t129")
def _score_forgotten(right):
    return lambda rows, score, plan, **options: right(rows, score if rows.requires_grad else None, plan, **options)


@ROWS.add("zeros", "dispatch", "gather_sum", "tokens/t129")
def _zeros(right):
    return lambda rows, score, plan, **options: right(rows, score, plan, **options) * 0


@ROWS.add("last slot of each token not summed", "dispatch", "gather_sum", "per-token/k16")
def _lose_last_slot(right):
    def wrong(rows, score, plan, **options):
        rows = rows.clone()
        rows[plan.slot_to_row[plan.slots_per_token - 1 :: plan.slots_per_token].long()] = 0
        return right(rows, score, plan, **options)

    return wrong


@ROWS.add("products rounded before they are summed", "dispatch", "gather_sum", "per-token/k2")
def _round_products(right):
    def wrong(rows, score, plan, **options):
        if score is None or rows.dtype != torch.bfloat16:
            return right(rows, score, plan, **options)
        scaled = rows * score[plan.row_to_slot.clamp(min=0).long()].to(rows.dtype).unsqueeze(1)
        return right(scaled, None, plan, **options)

    return wrong


@ROWS.add("rows of no slot get a gradient", "dispatch", "gather_sum", "loads/sentinels-few")
def _unwritten_tail(right):
    def wrong(rows, score, plan, **options):
        if rows.requires_grad:
            rows = rows.clone()
            rows.register_hook(lambda gradient: gradient.masked_fill((plan.row_to_slot < 0).unsqueeze(1), 1e-6))
        return right(rows, score, plan, **options)

    return wrong


@ROWS.add("running sum off by one expert", "dispatch", "count_cumsum", "count/e8")
def _exclusive_sum(right):
    def wrong(expert_index, num_experts, *, cumsum=True):
        count, total = right(expert_index, num_experts, cumsum=cumsum)
        return count, None if total is None else total - count

    return wrong


@ROWS.add("last id not counted", "dispatch", "count_cumsum", "count/e8")
def _drop_last_id(right):
    return lambda expert_index, num_experts, **options: right(expert_index[:-1], num_experts, **options)


@ROWS.add("counts overflow 16 bits", "dispatch", "count_cumsum", "count/e4")
def _narrow_counts(right):
    def wrong(expert_index, num_experts, *, cumsum=True):
        count = right(expert_index, num_experts, cumsum=False)[0] & 0xFFFF
        return count, count.cumsum(0, dtype=torch.int32) if cumsum else None

    return wrong


@ROWS.add("rows of one expert in another order", "dispatch", "plan", "tokens/t129")
def _unstable_plan(right):
    def wrong(token_index, expert_index, **options):
        plan = right(token_index, expert_index, **options)
        order = torch.arange(len(plan.row_to_slot), device=plan.row_to_slot.device)
        order[:2] = order[:2].flip(0)
        slot_to_row = plan.slot_to_row.clone()
        slot_to_row[plan.row_to_slot[order[:2]].long()] = torch.arange(2, dtype=torch.int32, device=order.device)
        return plan._replace(row_to_slot=plan.row_to_slot[order], row_to_token=plan.row_to_token[order], slot_to_row=slot_to_row)

    return wrong


@ROWS.add("a token's slots in another order", "dispatch", "plan", "rounding/nearest")
def _reorder_slots(right):
    def wrong(*arguments, **options):
        plan = right(*arguments, **options)
        listed, used = plan.token_slots.clone(), int(plan.token_offsets[-1])
        listed[:used] = listed[:used].flip(0)
        return plan._replace(token_slots=listed)

    return wrong


@ROWS.add("row numbers of 16 bits", "dispatch", "plan", "route/high-throughput")
def _narrow_rows(right):
    def wrong(*arguments, **options):
        plan = right(*arguments, **options)
        return plan._replace(slot_to_row=torch.where(plan.slot_to_row < 0, -1, plan.slot_to_row & 0xFFFF))

    return wrong


@ROWS.add("sentinels go to the last expert", "dispatch", "plan", "loads/sentinels-few")
def _count_sentinels(right):
    def wrong(token_index, expert_index, *, num_experts, **options):
        return right(token_index, expert_index.clamp(max=num_experts - 1), num_experts=num_experts, **options)

    return wrong


# --- Routing ------------------------------------------------------------------------------------------------------


@ROWS.add("the higher expert wins a tie", "routing", "top_k", "loads/ties")
def _other_tie_rule(right):
    def wrong(logits, k, **options):
        routed: Routing = right(logits.flip(1), k, **options)
        return routed._replace(expert_index=logits.shape[1] - 1 - routed.expert_index)

    return wrong


@ROWS.add("a NaN logit is chosen first", "routing", "top_k", "loads/non-finite")
def _nan_wins(right):
    return lambda logits, k, **options: right(logits.nan_to_num(nan=3e38, posinf=3e38, neginf=-3e38), k, **options)


@ROWS.add("scores differ from run to run", "routing", "top_k", "loads/ties")
def _unsteady_scores(right):
    runs = itertools.count()

    def wrong(*arguments, **options):
        routed: Routing = right(*arguments, **options)
        return routed._replace(score=routed.score * (1 + next(runs) % 2 * 2**-23))

    return wrong


@ROWS.add("scores not renormalised", "routing", "top_k", "scorings/softmax-renormalized")
def _forget_renormalising(right):
    return lambda logits, k, *, renormalize, **options: right(logits, k, renormalize=False, **options)


@ROWS.add("expert groups ignored", "routing", "top_k", "scorings/groups-top2")
def _ignore_groups(right):
    return lambda logits, k, *, num_groups, groups_per_token, **options: right(logits, k, **options)


@ROWS.add("selection bias left out of the choice", "routing", "top_k", "scorings/groups-top2")
def _ignore_selection_bias(right):
    return lambda logits, k, *, selection_bias, **options: right(logits, k, **options)


@ROWS.add("rounding drops one row too many", "routing", "token_rounding", "rounding/nearest")
def _one_row_short(right):
    def wrong(*arguments, **options):
        routed: Routing = right(*arguments, **options)
        last = int((routed.expert_index < routed.num_experts).sum()) - 1
        expert_index, score = routed.expert_index.clone(), routed.score.clone()
        expert_index[last], score[last] = routed.num_experts, 0
        return routed._replace(expert_index=expert_index, score=score)

    return wrong


@ROWS.add("up rounds to the nearest", "routing", "token_rounding", "rounding/up")
def _nearest_for_up(right):
    return lambda logits, k, tile_m, mode, **options: right(logits, k, tile_m, "nearest" if mode == "up" else mode, **options)


@ROWS.add("rounding drops the highest-scoring rows", "routing", "token_rounding", "route/down-e256")
def _drop_highest(right):
    def wrong(logits, *arguments, **options):
        rows, chosen, scores = _rounded(right(logits, *arguments, **options), logits, *arguments)
        return _routing_of(_lowest(scores.where(chosen, torch.inf), rows), scores)

    return wrong


@ROWS.add("rounding adds the lowest-scoring tokens", "routing", "token_rounding", "route/up-e256")
def _add_lowest(right):
    def wrong(logits, *arguments, **options):
        rows, chosen, scores = _rounded(right(logits, *arguments, **options), logits, *arguments)
        return _routing_of(chosen | _lowest(scores.where(~chosen, torch.inf), rows - chosen.sum(dim=0)), scores)

    return wrong


def _rounded(routed: Routing, logits: torch.Tensor, k: int, *_) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(E,) rows of each expert after rounding, (T, E) whether top-K had chosen it, (T, E) softmax scores."""
    rows = torch.bincount(routed.expert_index.long(), minlength=routed.num_experts + 1)[: routed.num_experts]
    choice = top_k(logits, k).expert_index.view(-1, k).long()
    return rows, torch.zeros_like(logits, dtype=torch.bool).scatter(1, choice, True), torch.softmax(logits, dim=1)


def _lowest(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(T, E) True for each expert's rows[e] tokens of the lowest values."""
    return values.argsort(dim=0).argsort(dim=0) < rows


def _routing_of(given: torch.Tensor, scores: torch.Tensor) -> Routing:
    token, expert = given.nonzero(as_tuple=True)
    return Routing(token.int(), expert.int(), scores[token, expert], *scores.shape, None)


@ROWS.add("stochastic rounds to the nearest", "routing", "token_rounding", "route/stochastic-64-e512-skewed")
def _nearest_for_stochastic(right):
    return lambda logits, k, tile_m, mode, **options: right(logits, k, tile_m, "nearest" if mode == "stochastic" else mode, **options)
