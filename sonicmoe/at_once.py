"""The usual case of `sonicmoe.MoE`: eager, on an sm_90 GPU, top-K routing, all experts here. All of its launches are one call.

A layer takes this path where nothing but itself has a say in what happens between its input and its output; the conditions are those of
`output`. It is a shorter way to the same kernels, not another backend: the values have the same bits, and what no kernel takes is left to
the general path, which refuses it in its own words.
Notation: T tokens, H hidden size, E experts, K experts per token, R rows, Z = 2I for a gated activation, else I.
"""

from typing import TYPE_CHECKING

import torch

import cute_runtime
from dispatch import debug
from dispatch.operators import apply_of, is_direct, needs_gradient
from routing import RouterConfig
from routing.scores_hopper import slot_scores_grad_again
from sonicmoe import backends, experts
from sonicmoe.router import Router, router_logits_grad

if TYPE_CHECKING:
    from cute_runtime.launches import Part
    from sonicmoe.backends.hopper_layer import Forward
    from sonicmoe.moe import MoE


def output(layer: "MoE", x: torch.Tensor) -> torch.Tensor | None:
    """The layer's output (..., H), or None where this is not the usual case. The layer is called with x (..., H) and nothing else."""
    if torch.compiler.is_compiling():
        return None
    config, parameters, router = layer.router_config, layer._parameters, layer._modules.get("router")
    if layer.parallelism is not None or layer.main_grads or type(config) is not RouterConfig or config.method != "top_k":
        return None
    if not isinstance(router, Router) or router.is_watched():
        return None
    if router._backward_pre_hooks or router._backward_hooks or router._compiled_call_impl:
        return None
    try:
        weight, selection_bias = router._parameters["weight"], router._buffers["selection_bias"]
        w_up, w_down, b_up, b_down = parameters["w_up"], parameters["w_down"], parameters["b_up"], parameters["b_down"]
    except KeyError:  # a parametrization computes it when it is asked for
        return None
    if not is_direct((x, weight, w_up, w_down, b_up, b_down, selection_bias)):
        return None
    if torch._C._is_any_autocast_enabled() or backends.is_one_by_one() or debug.enabled():
        return None
    if not x.is_contiguous() or weight.dtype != x.dtype:
        return None
    gradient = torch.is_grad_enabled() and needs_gradient((x, weight, w_up, w_down, b_up, b_down))
    forward = backends.load("hopper_layer").forward(
        *(x.shape, w_up.shape, x.dtype, x.device, layer.backend, config.choice, layer.activation, layer.gate_up_layout),
        *(b_up is not None, b_down is not None, selection_bias is not None, gradient),
    )
    if forward is None:
        return None
    if not gradient:
        return _run(forward, x, weight, w_up, w_down, b_up, b_down, selection_bias)[0]
    if not (weight.requires_grad and w_up.requires_grad and w_down.requires_grad):
        return None  # a part is frozen: the general path knows what is not worth computing
    if b_up is not None and not (b_up.requires_grad and b_down.requires_grad):
        return None
    return _apply(x, weight, w_up, w_down, b_up, b_down, selection_bias, forward)


def _run(
    forward: "Forward",
    x: torch.Tensor,
    weight: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    selection_bias: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The output, None where a tensor is not as the kernels take it, and what backward needs: z, None where it is a part of the other, and
    the other, None without a backward."""
    z = kept = None
    with cute_runtime.on_device(x.device):
        scratch = x.new_empty(forward.scratch)
        out = torch.empty_like(x)
        if forward.kept:
            kept = x.new_empty(forward.kept)
        if forward.z:
            z = x.new_empty(forward.z)
        refused = forward.launch(x, weight, w_up, w_down, b_up, b_down, selection_bias, scratch, z, kept, out)
    return (out, z, kept) if refused is None else (None, None, None)


class _Layer(torch.autograd.Function):
    """Router and experts in one: all parameters need a gradient, x may."""

    @staticmethod
    def forward(ctx, x, weight, w_up, w_down, b_up, b_down, selection_bias, forward):
        out, z, kept = _run(forward, x, weight, w_up, w_down, b_up, b_down, selection_bias)
        if out is not None:
            ctx.save_for_backward(x, weight, w_up, w_down, b_down, z, kept)
            ctx.made, ctx.bias = forward, b_up is not None
        return out

    @staticmethod
    def backward(ctx, dout):
        """The gradients of `routed_experts`, of the choice and of the router's product, as autograd would have chained them."""
        x, weight, w_up, w_down, b_down, z, kept = saved = ctx.saved_tensors  # once: a checkpoint gives them once
        hidden = x.shape[-1]
        tokens, dout = x if x.dim() == 2 else x.view(-1, hidden), dout.contiguous().view(-1, hidden)
        found = None
        if is_direct((dout, *saved)) and experts.overwrites():
            found = _backward_at_once(ctx, dout, tokens, weight, w_up, w_down, b_down, z, kept)
        if found is None:
            found = _backward_one_by_one(ctx, dout, tokens, weight, w_up, w_down, b_down, z, kept)
        (dx, dw_up, dw_down, db_up, db_down), dlogits = found
        need_x = ctx.needs_input_grad[0]
        routed_dx, dweight = router_logits_grad(dlogits, tokens, weight, need_x, True)
        if need_x:
            dx = dx + routed_dx if torch.is_grad_enabled() else dx.add_(routed_dx)
            dx = dx.view(x.shape)
        return dx, dweight, dw_up, dw_down, db_up, db_down, None, None


_apply = apply_of(_Layer)

_Gradients = tuple[tuple[torch.Tensor | None, ...], torch.Tensor]
"""dx (T, H) of the experts, dw_up, dw_down, db_up, db_down, and the logits' gradient (T, E)."""


def _backward_at_once(ctx, dout, tokens, weight, w_up, w_down, b_down, z, kept) -> _Gradients | None:
    """None where the launches are not made at once."""
    need_x, sizes = ctx.needs_input_grad[0], (tokens.shape[0], w_up.shape, w_down.shape, tokens.dtype, tokens.device)
    backward = backends.load("hopper_layer_backward").backward(*sizes, ctx.made.choice, *ctx.made.options[:2], ctx.bias, need_x)
    if backward is None:
        return None
    with cute_runtime.on_device(tokens.device):
        scratch = tokens.new_empty(backward.scratch)
        dw_up, dw_down = torch.empty_like(w_up), torch.empty_like(w_down)
        dx = torch.empty_like(tokens) if need_x else None
        db_up = w_up.new_empty(w_up.shape[:2]) if ctx.bias else None
        db_down = torch.empty_like(b_down) if ctx.bias else None
        row_to_token = _part(kept, ctx.made.parts["row_to_slot"]) // ctx.made.choice[0]  # as dispatch.unpack makes it
        results = dx, dw_up, dw_down, db_up, db_down
        refused = backward.experts(dout, tokens, w_up, w_down, b_down, z, kept, row_to_token, scratch, *results)
        if refused is not None:
            return None
        del scratch, row_to_token  # their memory is free for the logits
        dlogits = tokens.new_empty(tokens.shape[0], weight.shape[0], dtype=torch.float32)
        if (refused := backward.scores(tokens, weight, torch.empty_like(dlogits), kept, dlogits)) is not None:
            raise RuntimeError(f"the layer's backward: tensor {refused} of the scores' gradient is not what its forward had")
    return results, dlogits


def _backward_one_by_one(ctx, dout, tokens, weight, w_up, w_down, b_down, z, kept) -> _Gradients:
    k, scoring, renormalize, scale, *_ = ctx.made.choice
    if z is None:
        z = _part(kept, ctx.made.parts["z"]).view(ctx.made.parts["z"].shape)
    plan, expert_index, score = _parts(kept, ctx.made.parts)
    needs = experts.Needs(ctx.needs_input_grad[0], True, True, ctx.bias, ctx.bias, True)
    sizes = (tokens.shape[0], w_up.shape[0], k)
    *of_experts, dscore = experts.gradients(dout, z, tokens, w_up, w_down, b_down, score, plan, *sizes, *ctx.made.options, list(needs))
    return of_experts, slot_scores_grad_again(tokens, weight, expert_index, None, dscore, k, scoring, renormalize, scale)


def _parts(kept: torch.Tensor, layout: dict[str, "Part"]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plan as `dispatch.unpack` takes it, expert_index (R,) and score (R,): views of ``kept``."""
    begin, tickets = layout["row_to_slot"], layout["tickets"]
    plan = begin._replace(shape=((tickets.offset + tickets.bytes - begin.offset) // 4,))
    return _part(kept, plan), _part(kept, layout["expert_index"]), _part(kept, layout["score"])


def _part(kept: torch.Tensor, part: "Part") -> torch.Tensor:
    size = kept.element_size()
    return kept[part.offset // size : (part.offset + part.bytes) // size].view(part.dtype)
