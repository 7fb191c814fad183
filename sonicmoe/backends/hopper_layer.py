"""All of a layer's forward as one call on an sm_90 GPU: the launches of the router's product, `top_k`, the plan, both projections and
gather_sum, in the same kernels with the same numbers as one by one. Its backward is in hopper_layer_backward.py.

Host time is what this is for: one call from Python in place of six, two to four allocations in place of ten, no views. What does not
outlive the call lies in one tensor, ``scratch``; what backward needs lies in another, ``kept``, but for a large z, which has its own,
because its size is often a whole number of MiB, of which PyTorch's allocator wastes nothing. All have x's dtype, for `new_empty` without
one takes half the time; what lies where is said in bytes by `cute_runtime.launches.Parts`.

    scratch: a (R, I), y (R, H), before it the logits (T, E), token_index (R,), row_to_token (R,), the plan's counts; in inference also
             the parts below
    kept:    the plan as `dispatch.pack` has it, expert_index (R,), score (R,), a small z (R, Z)

Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R rows, Z = 2I for a gated activation, else I.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from cute_runtime.launches import Given, Part, Parts, one_call
from dispatch.kernels.sizes import TICKETS
from routing import router_logits_hopper
from routing.hopper import MOST_CHOSEN
from routing.scoring import check_choice
from routing.top_k_hopper import launch_of
from sonicmoe import backends, validation
from sonicmoe.activations import is_gated
from sonicmoe.backends import hopper

LARGE_Z = 8 * 2**20
"""Bytes from which z has a tensor of its own. Below, PyTorch's allocator cuts from larger blocks, so that nothing is lost together."""


class Forward(NamedTuple):
    """The launches of a forward, and the sizes of what it is given to write to."""

    launch: Callable[..., int | None]
    """Of (x, router_weight, w_up, w_down, b_up, b_down, selection_bias, scratch, z, kept, out); biases, z and kept may be None.

    None, or which of them the kernels cannot take as it is: then nothing was launched, and the operations one by one say why."""
    scratch: int
    """Elements of x's dtype."""
    z: tuple[int, int] | None
    """None without a backward, and where z is a part of ``kept``."""
    kept: int
    """Elements of x's dtype, 0 without a backward."""
    parts: dict[str, Part]
    """Of ``kept``."""
    choice: tuple
    options: tuple[str, str, str]
    """activation, gate_up_layout, backend."""


@functools.lru_cache(maxsize=1024)
def forward(
    x: torch.Size,
    w_up: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    choice: tuple,
    activation: str,
    gate_up_layout: str,
    up_bias: bool,
    down_bias: bool,
    selection_bias: bool,
    keep: bool,
) -> Forward | None:
    """The launches of a router, top-K routing and the experts for tokens x (..., H) and w_up (E, Z, H); None for what is to be done one
    by one: no sm_90 GPU, no tokens, very many experts, more chosen experts than the kernel of `top_k` takes.

    Args:
        choice: `RouterConfig.choice`.
        up_bias, down_bias: whether the projections have theirs.
        selection_bias: whether the router has one.
        keep: whether z and ``kept`` are written, for a backward; else they are not given.

    Raises:
        ValueError: settings or sizes that cannot be, in one sentence.
    """
    validation.check_options(activation, gate_up_layout, backend)
    hidden, tokens = x[-1], math.prod(x[:-1])
    if (
        backends.resolve(backend, device, dtype) != "hopper"
        or len(w_up) != 3
        or up_bias is not down_bias
        or hidden % 8
        or w_up[1] % (16 if is_gated(activation) else 8)
    ):
        return None
    experts, width, _ = w_up
    k, scoring, _, scale, *groups = choice
    check_choice(experts, k, scoring, scale, *groups)
    if max(k, groups[1]) > MOST_CHOSEN:
        return None
    rows = tokens * k
    kinds = (dtype, torch.int32, torch.float32, device, activation, gate_up_layout)
    apart = hopper._forward_launch(torch.Size((tokens, hidden)), w_up, rows, k, *kinds, keep, up_bias, down_bias, False, False)
    if apart is None or apart.plan is None:
        return None
    scratch, given_x, given_out = (Parts(name) for name in ("scratch", "x", "out"))
    kept, z = keeping(experts, rows, apart.z, dtype) if keep else (Parts("kept"), {"z": None})
    given_x.add("tokens", dtype, tokens, hidden)
    given_out.add("tokens_out", dtype, tokens, hidden)
    scratch.add("a", dtype, *apart.a)
    scratch.add("y", dtype, *apart.y)
    scratch.add_over("logits", "y", torch.float32, tokens, experts)  # read by the choice, long before y is written
    for name in ("token_index", "row_to_token"):
        scratch.add(name, torch.int32, rows)
    if apart.plan.counts is not None:
        scratch.add("counts", torch.int32, *apart.plan.counts)
    if not keep:
        _add_indices(scratch, experts, rows)

    biased = Given(torch.float32, (experts,), alignment=4)
    given = {
        "x": Given(dtype, tuple(x)),
        "router_weight": Given(dtype, (experts, hidden)),
        "w_up": Given(dtype, (experts, width, hidden)),
        "w_down": Given(dtype, (experts, hidden, apart.a[1])),
        "b_up": Given(dtype, (experts, width)) if up_bias else None,
        "b_down": Given(dtype, (experts, hidden)) if down_bias else None,
        "selection_bias": biased if selection_bias else None,
        "scratch": scratch.given(dtype),
        **z,
        "kept": kept.given(dtype) if keep else None,
        "out": Given(dtype, tuple(x)),
    }
    product, parts = router_logits_hopper.launch_of(dtype, tokens, hidden, experts)
    top_k, numbers = launch_of(torch.float32, experts, selection_bias, *choice)
    plan_rows = ("offsets", "row_to_slot", "row_to_token", "slot_to_row", "tickets")
    counts = () if apart.plan.counts is None else (None, "counts", None, None)
    work = ("offsets", "tickets")
    calls = [
        (product, ("tokens", "router_weight", "logits", *parts)),
        (top_k, ("logits", "selection_bias", "token_index", "expert_index", "score", *numbers)),
        (apart.plan.kernel, ("expert_index", *counts, *plan_rows, *apart.plan.numbers)),
        (apart.up, ("tokens", "w_up", "b_up", *work, "row_to_token", "a", "z", apart.blocks)),
        # The last two start while the launch before drains: nothing comes between.
        (apart.down, ("a", "w_down", "b_down", *work, "y", apart.blocks, 1)),
        (apart.gather_sum, ("y", "score", "slot_to_row", None, None, "tokens_out", k, 1)),
    ]
    launch = one_call(given, (given_x, given_out, scratch, kept), calls)
    options = (activation, gate_up_layout, "hopper")
    return Forward(launch, *scratch.shape(dtype), apart.z if z.get("z") else None, *kept.shape(dtype), kept.parts, choice, options)


def keeping(experts: int, rows: int, z: tuple[int, int], dtype: torch.dtype) -> tuple[Parts, dict[str, Given | None]]:
    """What lies where in ``kept``, and the place of z among the given tensors: where it is a part, None under another name."""
    kept = Parts("kept")
    _add_indices(kept, experts, rows)
    if math.prod(z) * dtype.itemsize >= LARGE_Z:
        return kept, {"z": Given(dtype, z)}
    kept.add("z", dtype, *z)
    return kept, {"no z": None}


def _add_indices(parts: Parts, experts: int, rows: int) -> None:
    """The plan's fields in the order of `dispatch.pack`, and the routing's."""
    parts.add("row_to_slot", torch.int32, rows)
    parts.add("slot_to_row", torch.int32, rows, apart=False)
    parts.add("offsets", torch.int32, experts + 1, apart=False)
    parts.add("tickets", torch.int32, TICKETS, apart=False)
    parts.add("expert_index", torch.int32, rows)
    parts.add("score", torch.float32, rows)
