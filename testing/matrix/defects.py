"""Defects of the kinds that happen in such kernels, to be planted one at a time: each must make its cell fail.

A defect replaces one function of the reference backend, of dispatch or of routing by a wrong one. What the matrix does
not catch here it would not catch in a kernel either.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import dispatch
import routing
from dispatch import DispatchPlan
from routing import Routing
from sonicmoe.backends import reference


class Defect(NamedTuple):
    """`make` gets the right function and returns the wrong one, which replaces `attribute` of `owner`."""

    owner: Any
    attribute: str
    make: Callable[[Callable], Callable]
    cell: str
    """A cell of the matrix that must fail."""


DEFECTS: dict[str, Defect] = {}


@contextlib.contextmanager
def planted(name: str) -> Iterator[Defect]:
    """Run with the defect of that name; the right function is back afterwards."""
    defect = DEFECTS[name]
    right = getattr(defect.owner, defect.attribute)
    setattr(defect.owner, defect.attribute, defect.make(right))
    try:
        yield defect
    finally:
        setattr(defect.owner, defect.attribute, right)


def _defect(name: str, owner: Any, attribute: str, cell: str) -> Callable[[Callable], Callable]:
    def register(make: Callable[[Callable], Callable]) -> Callable:
        DEFECTS[name] = Defect(owner, attribute, make, cell)
        return make

    return register


def _last_rows(plan: DispatchPlan) -> list[int]:
    """The last row of each expert that has rows."""
    offsets = plan.offsets.tolist()
    return [end - 1 for begin, end in itertools.pairwise(offsets) if end > begin]


@_defect("gate and up swapped", reference, "up_projection", "activations/reglu")
def _swap_gate_and_up(right):
    def wrong(x, w_up, b_up, plan, *, activation, gate_up_layout, store_z):
        pairs = w_up.unflatten(1, (-1, 2)) if gate_up_layout == "interleaved" else w_up.unflatten(1, (2, -1)).transpose(1, 2)
        swapped = pairs.flip(2) if gate_up_layout == "interleaved" else pairs.flip(2).transpose(1, 2)
        return right(x, swapped.flatten(1, 2), b_up, plan, activation=activation, gate_up_layout=gate_up_layout, store_z=store_z)

    return wrong


@_defect("last row of each expert dropped", reference, "down_projection", "tokens/t1000")
def _drop_tail_rows(right):
    def wrong(a, w_down, b_down, plan):
        y = right(a, w_down, b_down, plan)
        y[_last_rows(plan)] = 0
        return y

    return wrong


@_defect("last row of one expert wrong", reference, "down_projection", "tokens/t1000")
def _one_tail_row_wrong(right):
    def wrong(a, w_down, b_down, plan):
        y = right(a, w_down, b_down, plan)
        row = _last_rows(plan)[0]
        y[row] = y[row - 1]
        return y

    return wrong


@_defect("output rows not written", reference, "down_projection", "tokens/t129")
def _leave_rows_unwritten(right):
    def wrong(a, w_down, b_down, plan):
        y = right(a, w_down, b_down, plan)
        out = torch.empty_like(y)
        written = torch.ones(len(y), dtype=torch.bool)
        written[_last_rows(plan)] = False
        out[written] = y[written]
        return out

    return wrong


@_defect("outputs tiny", reference, "down_projection", "tokens/t7")
def _tiny_outputs(right):
    return lambda a, w_down, b_down, plan: right(a, w_down, b_down, plan) * 1e-4


@_defect("bias of the wrong expert", reference, "up_projection", "biases/swiglu")
def _wrong_bias(right):
    return lambda x, w_up, b_up, plan, **options: right(x, w_up, None if b_up is None else b_up.roll(1, 0), plan, **options)


@_defect("router gradient without the down bias", reference, "activation_backward", "biases/swiglu")
def _forget_down_bias(right):
    return lambda dout, z, w_down, b_down, score, plan, **options: right(dout, z, w_down, None, score, plan, **options)


@_defect("derivative of another activation", reference, "activation_backward", "activations/geglu")
def _other_derivative(right):
    def wrong(*arguments, activation, **options):
        _, dscore, scaled_a = right(*arguments, activation=activation, **options)
        return right(*arguments, activation={"geglu": "swiglu"}.get(activation, activation), **options)[0], dscore, scaled_a

    return wrong


@_defect("stale pre-activation in one expert", reference, "activation_backward", "activations/relu")
def _stale_z(right):
    def wrong(dout, z, w_down, b_down, score, plan, **options):
        z = z.clone()
        end = int(plan.offsets[1])
        z[:end] = z[:end].roll(1, 0)
        return right(dout, z, w_down, b_down, score, plan, **options)

    return wrong


@_defect("weight gradient without the score", reference, "activation_backward", "activations/silu")
def _unscaled_a(right):
    def wrong(dout, z, w_down, b_down, score, plan, **options):
        dz, dscore, _ = right(dout, z, w_down, b_down, score, plan, **options)
        return dz, dscore, right(dout, z, w_down, b_down, torch.ones_like(score), plan, **options)[2]

    return wrong


@_defect("gradient of one slot lost", reference, "dx_rows", "tokens/t1000")
def _lose_one_gradient(right):
    def wrong(dz, w_up, plan):
        rows = right(dz, w_up, plan)
        rows[_last_rows(plan)[-1]] = 0
        return rows

    return wrong


@_defect("weight gradient of an empty expert not written", reference, "up_weight_grad", "rows/first-and-last-empty")
def _leave_empty_experts(right):
    def wrong(x, dz, plan, **options):
        weight, bias = right(x, dz, plan, **options)
        empty = plan.offsets[1:] == plan.offsets[:-1]
        weight[empty] = torch.empty_like(weight)[empty]
        return weight, bias

    return wrong


@_defect("a race that shows in every second run", reference, "up_weight_grad", "tokens/t7")
def _race(right):
    runs = itertools.count()

    def wrong(x, dz, plan, **options):
        weight, bias = right(x, dz, plan, **options)
        if next(runs) % 2:
            weight.view(-1)[weight.abs().argmax()] *= 1.01
        return weight, bias

    return wrong


@_defect("score applied twice", dispatch, "gather_sum", "tokens/t7")
def _score_twice(right):
    return lambda rows, score, plan, **options: right(rows, None if score is None else score * score, plan, **options)


@_defect("score not applied", dispatch, "gather_sum", "tokens/t7")
def _score_forgotten(right):
    return lambda rows, score, plan, **options: right(rows, score if rows.requires_grad else None, plan, **options)


@_defect("zeros", dispatch, "gather_sum", "tokens/t7")
def _zeros(right):
    return lambda rows, score, plan, **options: right(rows, score, plan, **options) * 0


@_defect("running sum off by one expert", dispatch, "count_cumsum", "count/e8")
def _exclusive_sum(right):
    def wrong(expert_index, num_experts, *, cumsum=True):
        count, total = right(expert_index, num_experts, cumsum=cumsum)
        return count, None if total is None else total - count

    return wrong


@_defect("last id not counted", dispatch, "count_cumsum", "count/e8")
def _drop_last_id(right):
    return lambda expert_index, num_experts, **options: right(expert_index[:-1], num_experts, **options)


@_defect("rows of one expert in another order", dispatch, "plan", "tokens/t129")
def _unstable_plan(right):
    def wrong(token_index, expert_index, **options):
        plan = right(token_index, expert_index, **options)
        begin = int(plan.offsets[0])
        order = torch.arange(len(plan.row_to_slot))
        order[[begin, begin + 1]] = order[[begin + 1, begin]]
        slot_to_row = plan.slot_to_row.clone()
        slot_to_row[plan.row_to_slot[order[:2]].long()] = torch.arange(2, dtype=torch.int32)
        return plan._replace(row_to_slot=plan.row_to_slot[order], row_to_token=plan.row_to_token[order], slot_to_row=slot_to_row)

    return wrong


@_defect("the higher expert wins a tie", routing, "top_k", "loads/ties")
def _other_tie_rule(right):
    def wrong(logits, k, **options):
        routed: Routing = right(logits.flip(1), k, **options)
        return routed._replace(expert_index=logits.shape[1] - 1 - routed.expert_index)

    return wrong


@_defect("rounding drops one row too many", routing, "token_rounding", "rounding/nearest")
def _one_row_short(right):
    def wrong(*arguments, **options):
        routed: Routing = right(*arguments, **options)
        last = int((routed.expert_index < routed.num_experts).sum()) - 1
        expert_index, score = routed.expert_index.clone(), routed.score.clone()
        expert_index[last], score[last] = routed.num_experts, 0
        return routed._replace(expert_index=expert_index, score=score)

    return wrong


@_defect("up rounds to the nearest", routing, "token_rounding", "rounding/up")
def _wrong_mode(right):
    return lambda logits, k, tile_m, mode, **options: right(logits, k, tile_m, "nearest" if mode == "up" else mode, **options)
