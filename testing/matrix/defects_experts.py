"""Defects in the experts' six operations, of the kinds that happen in grouped products and their epilogues.

T tokens, H hidden size, I intermediate size, E experts, R routed rows.
"""

import random

import torch

from testing.matrix.planting import Registry, expert_rows, last_rows

EXPERTS = Registry()
TILE = 128
"""Rows of an output tile."""
K_SLAB = 64
"""Width of the slabs that a product's main loop walks."""
RACE = 0.1
"""Share of runs in which the planted race shows."""


# --- Forward ------------------------------------------------------------------------------------------------------


@EXPERTS.add("gate and up swapped", "experts", "up_projection", "activations/reglu")
def _swap_gate_and_up(right):
    def wrong(x, w_up, b_up, plan, *, gate_up_layout, **options):
        pairs = w_up.unflatten(1, (-1, 2)) if gate_up_layout == "interleaved" else w_up.unflatten(1, (2, -1)).transpose(1, 2)
        swapped = pairs.flip(2) if gate_up_layout == "interleaved" else pairs.flip(2).transpose(1, 2)
        return right(x, swapped.flatten(1, 2).contiguous(), b_up, plan, gate_up_layout=gate_up_layout, **options)

    return wrong


@EXPERTS.add("concatenated layout read as interleaved", "experts", "up_projection", "biases/swiglu-concatenated")
def _other_layout(right):
    return lambda *arguments, gate_up_layout, **options: right(*arguments, gate_up_layout="interleaved", **options)


@EXPERTS.add("up bias of the wrong expert", "experts", "up_projection", "biases/swiglu")
def _wrong_up_bias(right):
    return lambda x, w_up, b_up, plan, **options: right(x, w_up, None if b_up is None else b_up.roll(1, 0), plan, **options)


@EXPERTS.add("down bias of the wrong expert", "experts", "down_projection", "biases/swiglu")
def _wrong_down_bias(right):
    return lambda a, w_down, b_down, plan: right(a, w_down, None if b_down is None else b_down.roll(1, 0), plan)


@EXPERTS.add("bias missing in inference only", "experts", "up_projection", "biases/swiglu")
def _inference_differs(right):
    return lambda x, w_up, b_up, plan, *, store_z, **options: right(
        x, w_up, b_up if store_z else None, plan, store_z=store_z, **options
    )  # fmt: skip


@EXPERTS.add("last slab of the hidden size not multiplied", "experts", "up_projection", "hidden/h1000")
def _drop_last_slab(right):
    def wrong(x, w_up, b_up, plan, **options):
        masked = x.clone()
        masked[:, x.shape[1] // K_SLAB * K_SLAB :] = 0
        return right(masked, w_up, b_up, plan, **options)

    return wrong


@EXPERTS.add("one row gathers its neighbour's token", "experts", "up_projection", "tokens/t1000")
def _gather_the_neighbour(right):
    def wrong(x, w_up, b_up, plan, **options):
        tokens = plan.row_to_token.clone()
        row = last_rows(plan)[0]
        tokens[row] = (tokens[row] + 1) % x.shape[0]
        return right(x, w_up, b_up, plan._replace(row_to_token=tokens), **options)

    return wrong


@EXPERTS.add("last row of each expert dropped", "experts", "down_projection", "tokens/t1000")
def _drop_tail_rows(right):
    def wrong(a, w_down, b_down, plan):
        y = right(a, w_down, b_down, plan)
        y[last_rows(plan)] = 0
        return y

    return wrong


@EXPERTS.add("last partial tile dropped", "experts", "down_projection", "rows/one-row-past-a-tile")
def _drop_partial_tile(right):
    def wrong(a, w_down, b_down, plan):
        y = right(a, w_down, b_down, plan)
        _, begin, end = expert_rows(plan)[-1]
        y[begin + (end - begin) // TILE * TILE : end] = 0
        return y

    return wrong


@EXPERTS.add("last row of one expert wrong", "experts", "down_projection", "tokens/t1000")
def _one_tail_row_wrong(right):
    def wrong(a, w_down, b_down, plan):
        y = right(a, w_down, b_down, plan)
        row = last_rows(plan)[0]
        y[row] = y[row - 1]
        return y

    return wrong


@EXPERTS.add("output rows not written", "experts", "down_projection", "tokens/t129")
def _leave_rows_unwritten(right):
    def wrong(a, w_down, b_down, plan):
        y = right(a, w_down, b_down, plan)
        out = torch.empty_like(y)
        written = torch.ones(len(y), dtype=torch.bool, device=y.device)
        written[last_rows(plan)] = False
        out[written] = y[written]
        return out

    return wrong


@EXPERTS.add("outputs tiny", "experts", "down_projection", "tokens/t129")
def _tiny_outputs(right):
    """An absolute tolerance would pass them."""
    return lambda a, w_down, b_down, plan: right(a, w_down, b_down, plan) * 1e-4


# --- Backward -----------------------------------------------------------------------------------------------------


@EXPERTS.add("router gradient without the down bias", "experts", "activation_backward", "biases/swiglu")
def _forget_down_bias(right):
    return lambda dout, z, w_down, b_down, score, plan, **options: right(dout, z, w_down, None, score, plan, **options)


@EXPERTS.add("router gradient of another row", "experts", "activation_backward", "tokens/t1000")
def _shifted_dscore(right):
    def wrong(*arguments, **options):
        dz, dscore, scaled_a = right(*arguments, **options)
        return dz, dscore.roll(1), scaled_a

    return wrong


@EXPERTS.add("derivative of another activation", "experts", "activation_backward", "activations/geglu")
def _other_derivative(right):
    def wrong(*arguments, activation, **options):
        _, dscore, scaled_a = right(*arguments, activation=activation, **options)
        return right(*arguments, activation={"geglu": "swiglu"}.get(activation, activation), **options)[0], dscore, scaled_a

    return wrong


@EXPERTS.add("stale pre-activation in one expert", "experts", "activation_backward", "activations/relu")
def _stale_z(right):
    def wrong(dout, z, w_down, b_down, score, plan, **options):
        z = z.clone()
        end = int(plan.offsets[1])
        z[:end] = z[:end].roll(1, 0)
        return right(dout, z, w_down, b_down, score, plan, **options)

    return wrong


@EXPERTS.add("pre-activation gradient without the score", "experts", "activation_backward", "tokens/t129")
def _unscaled_dz(right):
    def wrong(dout, z, w_down, b_down, score, plan, **options):
        _, dscore, scaled_a = right(dout, z, w_down, b_down, score, plan, **options)
        return right(dout, z, w_down, b_down, torch.ones_like(score), plan, **options)[0], dscore, scaled_a

    return wrong


@EXPERTS.add("weight gradient without the score", "experts", "activation_backward", "activations/silu")
def _unscaled_a(right):
    def wrong(dout, z, w_down, b_down, score, plan, **options):
        dz, dscore, _ = right(dout, z, w_down, b_down, score, plan, **options)
        return dz, dscore, right(dout, z, w_down, b_down, torch.ones_like(score), plan, **options)[2]

    return wrong


@EXPERTS.add("gradient of one slot lost", "experts", "dx_rows", "tokens/t1000")
def _lose_one_gradient(right):
    def wrong(dz, w_up, plan):
        rows = right(dz, w_up, plan)
        rows[last_rows(plan)[-1]] = 0
        return rows

    return wrong


@EXPERTS.add("weight gradient of an empty expert not written", "experts", "up_weight_grad", "rows/first-and-last-empty")
def _leave_empty_experts(right):
    def wrong(x, dz, plan, **options):
        weight, bias = right(x, dz, plan, **options)
        empty = plan.offsets[1:] == plan.offsets[:-1]
        weight[empty] = torch.empty_like(weight)[empty]
        return weight, bias

    return wrong


@EXPERTS.add("weight gradient reads a row of the next expert", "experts", "up_weight_grad", "rows/around-tiles")
def _reduce_past_the_end(right):
    """The last slab of rows is not masked: the largest expert also adds the row behind its own."""

    def wrong(x, dz, plan, **options):
        weight, bias = right(x, dz, plan, **options)
        inner = [(end - begin, expert, end) for expert, begin, end in expert_rows(plan) if end < int(plan.offsets[-1])]
        _, expert, row = max(inner)
        weight[expert] += torch.outer(dz[row], x[plan.row_to_token[row]])
        return weight, bias

    return wrong


@EXPERTS.add("weight gradient loses the last row of an expert", "experts", "down_weight_grad", "tokens/t1000")
def _reduce_short(right):
    def wrong(dout, scaled_a, score, plan, **options):
        short = scaled_a.clone()
        short[last_rows(plan)[-1]] = 0
        return right(dout, short, score, plan, **options)

    return wrong


@EXPERTS.add("bias gradient without the score", "experts", "down_weight_grad", "biases/relu-squared")
def _unscaled_bias_gradient(right):
    def wrong(dout, scaled_a, score, plan, **options):
        return right(dout, scaled_a, score, plan, **options)[0], right(dout, scaled_a, torch.ones_like(score), plan, **options)[1]

    return wrong


@EXPERTS.add("a race that shows in one run of ten", "experts", "up_weight_grad", "races/many-runs")
def _race(right):
    """One element is a hundredth off, far below any limit on errors: only a comparison of many runs can show it."""
    generator = random.Random(0)

    def wrong(x, dz, plan, **options):
        weight, bias = right(x, dz, plan, **options)
        if generator.random() < RACE:
            weight.view(-1)[weight.abs().argmax()] *= 1.01
        return weight, bias

    return wrong
