"""Operators: their bodies are called straight where nobody looks at operators, and through PyTorch's dispatcher where someone does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dispatch.operators import differentiable, fake, not_differentiable, operator, without_autocast

bodies = []


@operator("sonicmoe_test::scale")
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    bodies.append(torch.is_grad_enabled())
    return x * factor


@fake(scale)
def _(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


@operator("sonicmoe_test::scale_grad")
def scale_grad(grad: torch.Tensor, factor: float) -> torch.Tensor:
    return grad * factor


def _setup_context(ctx, inputs, output) -> None:
    ctx.factor = inputs[1]


def _backward(ctx, grad):
    return scale_grad(grad, ctx.factor), None


differentiable(scale, _backward, _setup_context)
not_differentiable(scale_grad, "scale")


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def takes_dispatcher(function):
    """Whether a call reaches the operator itself."""
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        function()
    return "sonicmoe_test::scale" in [event.name for event in profile.function_events]


def test_eager_calls_do_not_take_the_dispatcher():
    x = torch.ones(3)
    assert not takes_dispatcher(lambda: scale(x, 2.0))
    assert not takes_dispatcher(lambda: scale(x.requires_grad_(), 2.0))
    assert takes_dispatcher(lambda: scale.op(x, 2.0))


def test_who_handles_operators_gets_the_operator():
    x = torch.ones(3)
    with Seen() as seen:
        scale(x, 2.0)
    assert "sonicmoe_test::scale" in seen.names
    assert takes_dispatcher(lambda: scale(x.as_subclass(Subclass), 2.0))
    assert "scale" in str(torch.fx.experimental.proxy_tensor.make_fx(lambda x: scale(x, 2.0))(x).code)


def test_tensors_without_data_get_what_the_fake_makes():
    bodies.clear()
    assert scale(torch.empty(3, device="meta"), 2.0).is_meta
    assert not bodies


def test_gradients_are_the_same_straight_and_through_the_dispatcher():
    x = torch.arange(3.0, requires_grad=True)
    for function in (scale, scale.op):
        out = function(x, 3.0)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(out, 3 * x)
        assert torch.equal(grad, torch.full((3,), 3.0))
    assert scale(x.detach(), 3.0).grad_fn is None


def test_bodies_run_below_autograd():
    bodies.clear()
    assert scale(torch.ones(2, requires_grad=True), 2.0).grad_fn is not None
    assert bodies == [False]


def test_second_derivatives_are_refused_on_both_ways():
    x = torch.arange(3.0, requires_grad=True)
    for function in (scale, scale.op):
        out = function(x, 3.0)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(
            NotImplementedError, match=r"^scale: second derivatives \(create_graph=True, double backward\) are not available$"
        ):
            grad.sum().backward()


def test_context_without_autocast_is_one_inside_autocast_only():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert not isinstance(without_autocast(torch.device("cpu")), torch.autocast)
