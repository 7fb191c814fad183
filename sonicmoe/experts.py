"""`routed_experts`: the experts' feed-forward network on a routing's rows, differentiable.

Forward, for every slot of the routing (token t, expert e, score s)::

    z = w_up[e] @ x[t] + b_up[e]      a = act(z)      y = w_down[e] @ a + b_down[e]      o[t] += s * y

Beyond inputs and parameters, backward keeps z (R, 2I) and indices and scores of O(R + T + E): not a, not y, no gathered copy of x.
The two custom operators below are opaque to torch.compile and choose the backend; the autograd function around them decides
what is stored and which gradients are worth computing.
Notation: T tokens, H hidden size, I intermediate size, E experts, R routed slots (and rows), Z = 2I with a gate, else I.
"""

from typing import NamedTuple

import torch

import dispatch
from dispatch.operators import fake, is_direct, needs_gradient, not_differentiable, operator, without_autocast
from routing import Routing
from sonicmoe import backends, validation
from sonicmoe.activations import is_gated


def routed_experts(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    routing: Routing,
    *,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    activation: str = "swiglu",
    gate_up_layout: str = "interleaved",
    backend: str = "auto",
    main_grads: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """Send every token to its experts and sum what they return, weighted by the routing's scores.

    Args:
        x: (T, H) bfloat16, float16, float32 or float64; H a multiple of 8.
        w_up: (E, 2I, H), or (E, I, H) for an activation without a gate; x's dtype; I a multiple of 8.
        w_down: (E, H, I), x's dtype.
        routing: who goes where, with what score; slots whose expert is outside [0, E) contribute nothing. Its score may have x's dtype,
            its token_index may be None where it has K slots a token.
        b_up: (E, 2I) or (E, I), like w_up's rows.
        b_down: (E, H).
        activation: swiglu, geglu, reglu, swiglu_oai (gated), silu, gelu, relu or relu_squared. gelu is the exact one;
            swiglu_oai is gpt-oss's, see `sonicmoe.activations`.
        gate_up_layout: "interleaved": rows 2i of w_up are gate and 2i + 1 up; "concatenated": the first I rows are gate.
        backend: "auto", "hopper" or "reference"; see `sonicmoe.backends.resolve`.
        main_grads: float32 buffers in the shapes of w_up and w_down, or None. Backward adds such a weight's gradient to its buffer,
            in float32 and without a copy of it in x's dtype, and autograd gets none for the weight.

    Returns:
        (T, H) in x's dtype; differentiable once in x, weights, biases and ``routing.score``.

    Low-precision inputs accumulate in float32; z, a, y and the result are rounded to x's dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value, in one sentence, before any work.
    """
    validation.check_experts(x, w_up, w_down, routing, b_up, b_down, activation, gate_up_layout, backend)
    if main_grads != (None, None):
        validation.check_main_grads(w_up, w_down, *main_grads)
    differentiable = (x, w_up, w_down, b_up, b_down, routing.score)
    indices = (routing.token_index, routing.expert_index, routing.slots_per_token)
    options = (activation, gate_up_layout, backends.resolve(backend, x.device, x.dtype))
    if torch.is_grad_enabled() and needs_gradient(differentiable):
        if routing.score.dtype not in validation.SCORE_DTYPES:
            differentiable = (*differentiable[:5], routing.score.float())  # its gradient is summed in float32
        return _RoutedExperts.apply(*differentiable, indices, options, main_grads)
    return _forward(*differentiable, *indices, *options, False)[0]


class Needs(NamedTuple):
    """Which of the differentiable inputs need a gradient."""

    x: bool
    w_up: bool
    w_down: bool
    b_up: bool
    b_down: bool
    score: bool

    @property
    def dz(self) -> bool:
        return self.x or self.w_up or self.b_up

    @property
    def z(self) -> bool:
        return self.dz or self.w_down or self.score

    def without(self, main_up: torch.Tensor | None, main_down: torch.Tensor | None) -> "Needs":
        """What is left to return where weights' gradients are added to buffers."""
        return self._replace(w_up=self.w_up and main_up is None, w_down=self.w_down and main_down is None)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_up, w_down, b_up, b_down, score, indices, options, main_grads):
        needs = Needs(*ctx.needs_input_grad[:6])
        out, plan, *z = _forward(x, w_up, w_down, b_up, b_down, score, *indices, *options, True, store_z=needs.z)
        ctx.save_for_backward(
            z[0] if z else None,
            x if needs.w_up else None,
            w_up if needs.x else None,
            w_down if needs.dz or needs.score else None,
            b_down if needs.score else None,
            score,
            plan,
        )
        ctx.sizes, ctx.options, ctx.main_grads = (x.shape[0], w_up.shape[0], indices[2]), options, main_grads
        return out

    @staticmethod
    def backward(ctx, dout):
        needs = Needs(*ctx.needs_input_grad[:6])
        arguments = (dout.contiguous(), *ctx.saved_tensors, *ctx.sizes, *ctx.options, list(needs))
        if ctx.main_grads == (None, None):
            return *gradients(*arguments), None, None, None
        if is_direct(arguments) and overwrites():
            return *_gradients(*arguments, *ctx.main_grads, overwrite_z=True), None, None, None
        if torch.is_grad_enabled():
            raise NotImplementedError("routed_experts: second derivatives (create_graph=True) are not available with main_grads")
        added = _backward_adding(*arguments, *ctx.main_grads)
        needs = needs.without(*ctx.main_grads)
        return *(gradient if needed else None for gradient, needed in zip(added, needs, strict=True)), None, None, None


def gradients(*arguments) -> tuple[torch.Tensor | None, ...]:
    """All gradients in the order of Needs, None where none is needed. The arguments are those of `_backward`, in a backward: z is
    overwritten where this one is the graph's last."""
    if is_direct(arguments) and overwrites():
        return _gradients(*arguments, overwrite_z=True)
    found = iter(_backward(*arguments))
    return tuple(next(found) if needed else None for needed in arguments[-1])


def overwrites() -> bool:
    """Whether the backward that runs may overwrite what was saved: it is not itself differentiated, and will not run again, as it may
    with retain_graph=True."""
    return not (torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())


@operator("sonicmoe::routed_experts")
def _forward(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    score: torch.Tensor,
    token_index: torch.Tensor | None,
    expert_index: torch.Tensor,
    slots_per_token: int | None,
    activation: str,
    gate_up_layout: str,
    backend: str,
    keep: bool,
    store_z: bool = False,
) -> list[torch.Tensor]:
    """[o]; for backward, with ``keep``, also the packed plan, and with ``store_z`` z behind it."""
    results = None
    if forward := backends.fused_forward(backend):
        routed = (score, token_index, expert_index, slots_per_token)
        results = forward(x, w_up, w_down, b_up, b_down, *routed, activation, gate_up_layout, store_z)
    if results is None:
        operations = backends.load(backend)
        sizes = {"num_tokens": x.shape[0], "num_experts": w_up.shape[0], "slots_per_token": slots_per_token}
        plan = dispatch.plan(token_index, expert_index, **sizes)
        with without_autocast(x.device):
            a, z = operations.up_projection(x, w_up, b_up, plan, activation=activation, gate_up_layout=gate_up_layout, store_z=store_z)
            y = operations.down_projection(a, w_down, b_down, plan)
            results = dispatch.gather_sum(y, score, plan, backend=backend), dispatch.pack(plan) if keep else None, z
    return list(results[: 1 + keep + store_z])


@fake(_forward)
def _(x, w_up, w_down, b_up, b_down, score, token_index, expert_index, slots_per_token, activation, layout, backend, keep, store_z=False):
    slots, results = expert_index.shape[0], [x.new_empty(x.shape)]
    if keep:
        size = dispatch.packed_size(slots, x.shape[0], w_up.shape[0], slots_per_token)
        results.append(expert_index.new_empty(size, dtype=torch.int32))
    if store_z:
        results.append(x.new_empty(slots, w_up.shape[1]))
    return results


def _gradients(
    dout, z, x, w_up, w_down, b_down, score, packed, num_tokens, num_experts, slots_per_token, activation, gate_up_layout, backend,
    needs, main_up=None, main_down=None, overwrite_z=False,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """The body of the two operators below, whose arguments these are: all gradients in the order of Needs, None where there is none.

    With ``overwrite_z`` dz takes z's memory: beside the gradients there are then never more than one (R, Z) and one (R, H), or
    an (R, Z) and an (R, I).
    """
    plan = dispatch.unpack(packed, score.shape[0], num_tokens, num_experts, slots_per_token)
    need = Needs(*needs)
    operations = backends.load(backend)
    dx = dw_up = dw_down = db_up = db_down = dscore = dz = scaled_a = None
    with without_autocast(dout.device):
        if need.z:
            dz, dscore, scaled_a = operations.activation_backward(
                dout,
                z,
                w_down,
                b_down,
                score,
                plan,
                activation=activation,
                gate_up_layout=gate_up_layout,
                need_dz=need.dz,
                need_dscore=need.score,
                need_scaled_a=need.w_down,
                overwrite_z=overwrite_z,
            )
        if need.w_down or need.b_down:
            dw_down, db_down = operations.down_weight_grad(
                dout, scaled_a, score, plan, need_weight=need.w_down, need_bias=need.b_down, add_to=main_down
            )
            scaled_a = None  # its memory is free for the rows of dx
        if need.w_up or need.b_up:
            dw_up, db_up = operations.up_weight_grad(x, dz, plan, need_weight=need.w_up, need_bias=need.b_up, add_to=main_up)
        if slots_per_token is not None:
            plan = plan._replace(row_to_token=None)  # made here; nothing below needs it, and the peak is below
        if need.x:
            dx = dispatch.gather_sum(operations.dx_rows(dz, w_up, plan), None, plan, backend=backend)
    return dx, dw_up, dw_down, db_up, db_down, dscore


@operator("sonicmoe::routed_experts_backward")
def _backward(
    dout: torch.Tensor,
    z: torch.Tensor | None,
    x: torch.Tensor | None,
    w_up: torch.Tensor | None,
    w_down: torch.Tensor | None,
    b_down: torch.Tensor | None,
    score: torch.Tensor,
    packed: torch.Tensor,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
    activation: str,
    gate_up_layout: str,
    backend: str,
    needs: list[bool],
) -> list[torch.Tensor]:
    """The gradients that ``needs`` (see Needs) asks for, in its order. Inputs that they do not depend on may be None."""
    return [gradient for gradient, needed in zip(_gradients(**locals()), needs, strict=True) if needed]


def _fake_gradients(
    dout, z, x, w_up, w_down, b_down, score, packed, num_tokens, experts, slots_per_token, activation, layout, backend, needs
):
    hidden_size = dout.shape[1]
    up_rows = 0 if z is None else z.shape[1]
    intermediate_size = up_rows // 2 if is_gated(activation) else up_rows
    shapes = (
        dout.shape,
        (experts, up_rows, hidden_size),
        (experts, hidden_size, intermediate_size),
        (experts, up_rows),
        (experts, hidden_size),
    )
    return *(dout.new_empty(shape) if needed else None for shape, needed in zip(shapes, needs, strict=False)), (
        torch.empty_like(score) if needs[5] else None
    )


@fake(_backward)
def _(*arguments):
    return [gradient for gradient in _fake_gradients(*arguments) if gradient is not None]


not_differentiable(_backward, "routed_experts")


@operator("sonicmoe::routed_experts_backward_adding", changes=("main_up", "main_down"))
def _backward_adding(
    dout: torch.Tensor,
    z: torch.Tensor | None,
    x: torch.Tensor | None,
    w_up: torch.Tensor | None,
    w_down: torch.Tensor | None,
    b_down: torch.Tensor | None,
    score: torch.Tensor,
    packed: torch.Tensor,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
    activation: str,
    gate_up_layout: str,
    backend: str,
    needs: list[bool],
    main_up: torch.Tensor | None,
    main_down: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As _backward, but a weight's gradient is added to its float32 buffer, where it has one.

    All six are returned, without elements where there is none: torch.compile takes no list from an operator that changes an argument.
    """
    return tuple(dout.new_empty(0) if gradient is None else gradient for gradient in _gradients(**locals()))


@fake(_backward_adding)
def _(*arguments):
    *arguments, needs, main_up, main_down = arguments
    gradients = _fake_gradients(*arguments, Needs(*needs).without(main_up, main_down))
    return tuple(arguments[0].new_empty(0) if gradient is None else gradient for gradient in gradients)
