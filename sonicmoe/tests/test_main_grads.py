"""Weights' gradients added to float32 buffers, for trainers that keep main gradients in float32."""

import pytest
import torch

from sonicmoe import MoE

H, I, E, K, T = 16, 24, 4, 2, 30


def make_layer(dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    return MoE(H, I, E, K, dtype=dtype, bias=True, **options)


def make_tokens(seed, dtype=torch.bfloat16):
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_buffers(layer):
    for weight in (layer.w_up, layer.w_down):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    return layer


def step(layer, seed):
    layer(make_tokens(seed)).float().square().mean().backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_several_steps_add_up_in_float32(compiled):
    """Where a bfloat16 .grad rounds after every step; all other gradients are what they are without buffers."""
    plain, layer, alone = make_layer(), with_buffers(make_layer(main_grads=True)), make_layer(main_grads=True)
    wanted = {name: torch.zeros(getattr(layer, name).shape, dtype=torch.float64) for name in ("w_up", "w_down")}
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for seed in range(16):
        step(run, seed)
        step(plain, seed)
        step(with_buffers(alone), seed)
        for name, want in wanted.items():
            want += getattr(alone, name).main_grad
    for name, want in wanted.items():
        weight = getattr(layer, name)
        ours, theirs = ((got.double() - want).norm() / want.norm() for got in (weight.main_grad, getattr(plain, name).grad))
        assert weight.grad is None
        assert ours < 1e-6
        assert theirs > 1e-3
    others = {name: parameter.grad for name, parameter in layer.named_parameters() if name not in ("w_up", "w_down")}
    for name, gradient in others.items():
        assert torch.equal(gradient, plain.get_parameter(name).grad), name


def test_the_first_gradient_is_not_rounded_to_the_weights_dtype():
    layer, plain = with_buffers(make_layer(main_grads=True)), make_layer()
    step(layer, 0)
    step(plain, 0)
    for name in ("w_up", "w_down"):
        main, rounded = getattr(layer, name).main_grad, getattr(plain, name).grad
        assert torch.equal(main.bfloat16(), rounded)
        assert not torch.equal(main, rounded.float())


def test_one_weight_alone_may_be_frozen_or_need_no_gradient():
    layer = with_buffers(make_layer(main_grads=True))
    layer.w_up.requires_grad_(False)
    step(layer, 0)
    assert layer.w_up.main_grad.count_nonzero() == 0
    assert layer.w_down.main_grad.count_nonzero() > 0
    with torch.no_grad():
        del layer.w_down.main_grad
        layer(make_tokens(0))


@pytest.mark.parametrize(
    ("buffer", "error", "message"),
    [
        (None, ValueError, "^w_down has no main_grad: must be a float32 tensor of the weight's shape with main_grads=True$"),
        (torch.zeros(E, H, I, dtype=torch.bfloat16), TypeError, "^main_grads: w_down's has dtype torch.bfloat16: must be torch.float32$"),
        (torch.zeros(E, I, H), ValueError, r"^main_grads: w_down's has shape \(4, 24, 16\): must be the weight's \(4, 16, 24\)$"),
        (torch.zeros(E, I, H).mT, ValueError, r"^main_grads: w_down's has strides .*: must be contiguous, without a gradient$"),
        (torch.zeros(E, H, I, device="meta"), ValueError, "^main_grads: w_down's has device meta: must be the weight's cpu$"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused_in_forward(buffer, error, message):
    layer = with_buffers(make_layer(main_grads=True))
    layer.w_down.main_grad = buffer
    with pytest.raises(error, match=message):
        layer(make_tokens(0))


def test_second_derivatives_are_refused():
    layer = with_buffers(make_layer(main_grads=True))
    x = make_tokens(0).requires_grad_()
    with pytest.raises(
        NotImplementedError, match=r"routed_experts: second derivatives \(create_graph=True\) are not available with main_grads"
    ):
        torch.autograd.grad(layer(x).float().sum(), x, create_graph=True)
