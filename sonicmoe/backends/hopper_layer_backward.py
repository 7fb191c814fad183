"""The backward of hopper_layer.py, where it is the graph's last one, as two calls: up to dx, and the logits' second product with
the scores' gradient, whose tensors take the memory that the first call needs no more.

It overwrites what it has no more use for, z by dz and, in ``kept``, the score by dscore, and puts the rows of dx where scaled_a was. So it
takes no more memory than the operations one by one, provided that scaled_a is not the larger one; where it is, they do it.
Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R rows, Z = 2I for a gated activation, else I.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from cute_runtime.launches import Given, Parts, one_call
from dispatch import gather_sum_hopper
from routing import router_logits_hopper
from routing.scores_hopper import grad_launch_of
from sonicmoe.backends import hopper_backward as kernels
from sonicmoe.backends.arguments import blocks, check_gradient_reach
from sonicmoe.backends.hopper_layer import keeping


class Backward(NamedTuple):
    """The launches of a backward, and the size of what it is given beside results."""

    experts: Callable[..., int | None]
    """Of (dout, x, w_up, w_down, b_down, z, kept, row_to_token, scratch, dx, dw_up, dw_down, db_up, db_down); dx, biases and a z that is a
    part of kept are None."""
    scores: Callable[..., int | None]
    """Of (x, router_weight, logits, kept, dlogits)."""
    scratch: int
    """Elements of x's dtype."""


@functools.lru_cache(maxsize=1024)
def backward(
    tokens: int, w_up: torch.Size, w_down: torch.Size, dtype: torch.dtype, device: torch.device, choice: tuple, activation: str,
    gate_up_layout: str, bias: bool, need_x: bool,
) -> Backward | None:  # fmt: skip
    """The launches for w_up (E, Z, H), w_down (E, H, I) and, with ``bias``, both biases, all of which need a gradient, as the router's
    weight does; None where the operations one by one take less memory. ``choice`` is `RouterConfig.choice`.

    Raises:
        ValueError: sizes that cannot be, in one sentence.
    """
    (experts, width, hidden), columns, (k, scoring, renormalize, scale, *_) = w_up, w_down[2], choice
    rows = tokens * k
    for name, of_expert in (("dw_down", hidden), ("dw_up", width)):
        check_gradient_reach(rows, name, experts, of_expert)
    (kept, z), scratch = keeping(experts, rows, (rows, width), dtype), Parts("scratch")
    kept.add_over("dscore", "score", torch.float32, rows)
    scratch.add("scaled_a", dtype, rows, columns)
    scratch.add("partial", torch.float32, kernels.partial_lines(rows, experts, columns, device), rows)
    if scratch.bytes > rows * hidden * dtype.itemsize:
        return None
    if need_x:
        scratch.add_over("rows", "scaled_a", dtype, rows, hidden)

    given = {
        "dout": Given(dtype, (tokens, hidden)),
        "x": Given(dtype, (tokens, hidden)),
        "w_up": Given(dtype, tuple(w_up)),
        "w_down": Given(dtype, tuple(w_down)),
        "b_down": Given(dtype, (experts, hidden)) if bias else None,
        **z,
        "kept": kept.given(dtype),
        "row_to_token": Given(torch.int32, (rows,)),
        "scratch": scratch.given(dtype),
        "dx": Given(dtype, (tokens, hidden)) if need_x else None,
        "dw_up": Given(dtype, tuple(w_up)),
        "dw_down": Given(dtype, tuple(w_down)),
        "db_up": Given(dtype, (experts, width)) if bias else None,
        "db_down": Given(dtype, (experts, hidden)) if bias else None,
    }
    work, each = ("offsets", "tickets"), blocks(device)
    wanted = {"dz": True, "dscore": True, "scaled_a": True}
    first = kernels.activation_backward_kernel(rows, experts, dtype, device, activation, gate_up_layout, **wanted)
    with_bias = ("dout", "b_down", "offsets", "row_to_token") if bias else (None,) * 4
    calls = [(first, ("dout", "w_down", "z", "score", *work, "row_to_token", "row_to_slot", "z", "scaled_a", "partial", each))]
    if bias:
        calls += [
            (kernels.bias_grad_kernel(dtype, True), ("dout", "offsets", "row_to_token", "row_to_slot", "score", "db_down")),
            (kernels.bias_grad_kernel(dtype, False), ("z", "offsets", None, None, None, "db_up")),
        ]
    calls += [
        # From here on the scores are their gradients.
        (kernels.score_grad_kernel(dtype, bias), ("partial", "slot_to_row", *with_bias, "dscore")),
        (kernels.weight_grad_kernel(dtype, False), ("dout", "scaled_a", *work, "row_to_token", "dw_down", each)),
        (kernels.weight_grad_kernel(dtype, True), ("x", "z", *work, "row_to_token", "dw_up", each)),
    ]
    if need_x:
        calls += [
            (kernels.dx_rows_kernel(rows, experts, dtype, device), ("z", "w_up", *work, "rows", each)),
            (gather_sum_hopper.kernel(dtype, True, None), ("rows", None, "slot_to_row", None, None, "dx", k, 0)),
        ]

    logits = Given(torch.float32, (tokens, experts))
    scores = {"x": given["x"], "router_weight": Given(dtype, (experts, hidden))}
    scores |= {"logits": logits, "kept": kept.given(dtype), "dlogits": logits}
    product, parts = router_logits_hopper.launch_of(dtype, tokens, hidden, experts)
    kernel, numbers = grad_launch_of(torch.float32, True, k, scoring, renormalize, scale)
    again = [(product, ("x", "router_weight", "logits", *parts)), (kernel, ("logits", "expert_index", None, "dscore", "dlogits", *numbers))]
    return Backward(one_call(given, (kept, scratch), calls), one_call(scores, (kept,), again), *scratch.shape(dtype))
