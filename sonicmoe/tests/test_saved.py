"""What a layer keeps of its routing for backward: nothing of size (T, E), with the gradients that it would have if it did."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cute_runtime
from routing import RouterConfig, hopper, scores_hopper, top_k, top_k_hopper
from sonicmoe import MoE
from sonicmoe.memory import saved_mib
from sonicmoe.router import Router
from sonicmoe.tests.stand_ins import StandIns

T, H, I, E, K = 96, 16, 8, 64, 4

CONFIGS = {
    "softmax": RouterConfig(k=K),
    "renormalized": RouterConfig(k=K, renormalize=True, scale=2.0),
    "softmax_topk": RouterConfig(k=K, scoring="softmax_topk"),
    "sigmoid": RouterConfig(k=K, scoring="sigmoid", renormalize=True),
    "groups": RouterConfig(k=K, scoring="sigmoid", num_groups=8, groups_per_token=2),
    "rounding": RouterConfig(k=K, method="token_rounding", tile_m=8),
    "rounding, softmax_topk": RouterConfig(k=K, method="token_rounding", tile_m=8, scoring="softmax_topk"),
    "rounding, renormalized": RouterConfig(k=K, method="token_rounding", tile_m=8, mode="up", renormalize=True),
}


def make(config, *, dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    layer = MoE(H, I, E, K, router=config, selection_bias=bias, dtype=dtype)
    if bias:
        layer.router.selection_bias.normal_(0, 0.1)
    return layer, torch.randn(T, H, dtype=dtype, requires_grad=True)


def gradients(layer, x, run=None, **options):
    out = layer(x) if run is None else run(x)
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    return [out, *torch.autograd.grad((out * out.detach().cos()).sum(), inputs, **options)]


def same(got, want):
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def keeps_logits(monkeypatch):
    monkeypatch.setattr(Router, "origin", lambda self, x: None)


def kept_bytes(layer, x):
    return saved_mib(lambda: layer(x), [x, *layer.parameters(), *layer.buffers()]) * 2**20


def bytes_of_top_k(rows):
    """z, both directions of the plan, expert_index and the score of each row, and once the experts' first rows and eight counters."""
    return rows * (4 * 2 * I + 16) + 4 * (E + 1 + 8)


@pytest.mark.parametrize("name", CONFIGS)
def test_keeps_z_and_indices_only(name):
    layer, x = make(CONFIGS[name])
    rows = layer.router_config.route(layer.router(x)).score.shape[0]
    if CONFIGS[name].method == "top_k":
        assert kept_bytes(layer, x) == bytes_of_top_k(rows)
    else:  # token_index, token_slots and row_to_token beside top-K's, and where the tokens' slots begin, twice
        assert kept_bytes(layer, x) <= bytes_of_top_k(rows) + 12 * rows + 12 * T + 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_kept_logits(name, dtype, monkeypatch):
    layer, x = make(CONFIGS[name], dtype=dtype, bias=True)
    got = gradients(layer, x)
    twice = layer(x)
    first, again = (torch.autograd.grad(twice.sum(), [x, layer.router.weight], retain_graph=True) for _ in range(2))
    same(first, again)
    keeps_logits(monkeypatch)
    same(got, gradients(layer, x))


@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_a_part_without_a_gradient(frozen, monkeypatch):
    layer, x = make(CONFIGS["softmax"])
    (layer.router.weight if frozen == "weight" else x).requires_grad_(False)
    got = gradients(layer, x)
    keeps_logits(monkeypatch)
    same(got, gradients(layer, x))


def test_autocast_and_checkpointing(monkeypatch):
    layer, x = make(CONFIGS["softmax"])

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(layer, x, use_reentrant=False)

    got = gradients(layer, x, run)
    keeps_logits(monkeypatch)
    same(got, gradients(layer, x, run))


def test_losses_of_the_logits_add_their_gradient(monkeypatch):
    layer, x = make(CONFIGS["softmax"])

    def run():
        out, router = layer(x, return_router=True)
        loss = out.sum() + router.load_balance_loss + router.z_loss + router.logits.square().mean()
        return torch.autograd.grad(loss, [x, layer.router.weight])

    got = run()
    keeps_logits(monkeypatch)
    same(got, run())


def test_logits_that_a_hook_changed_are_kept():
    """A product made again would not know of them."""
    layer, x = make(CONFIGS["softmax"])
    noise = torch.randn(T, E)
    layer.router.register_forward_hook(lambda router, inputs, logits: logits + noise)
    got = gradients(layer, x)[-3:]
    assert layer.router.origin(x) is None

    class Noisy(Router):
        def forward(self, x):
            return super().forward(x) + noise

    other = make(CONFIGS["softmax"])[0]
    other.router.__class__ = Noisy
    same(got, gradients(other, x)[-3:])
    plain = make(CONFIGS["softmax"])[0]
    assert not torch.equal(got[0], gradients(plain, x)[-3])


def test_second_derivatives_are_refused():
    layer, x = make(CONFIGS["softmax"])
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"second derivatives|once_differentiable"):
        dx.sum().backward()


@pytest.fixture
def kernels(monkeypatch):
    """The kernels' host halves on a CPU, with PyTorch in the kernels' place."""

    def top(dtype, scoring, by):
        def kernel(logits, bias, token_index, expert_index, score, k, groups, of_group, groups_per_token, top2, divides, scale):
            with monkeypatch.context() as plain:
                plain.setattr(hopper, "supports", lambda *_: False)
                routing = top_k(logits.detach(), k, scoring=scoring, selection_bias=bias, renormalize=bool(divides), scale=scale)
            for out, value in zip((token_index, expert_index, score), routing[:3], strict=True):
                out.copy_(value)

        return kernel

    def gradient(dtype, uniform, scoring):
        return partial(StandIns().slot_scores_grad, {"scoring": scoring})

    monkeypatch.setattr(hopper, "supports", lambda *_: True)
    monkeypatch.setattr(cute_runtime, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(top_k_hopper, "_kernel", top)
    monkeypatch.setattr(scores_hopper, "_grad_kernel", gradient)
    top_k_hopper.launch_of.cache_clear()
    yield
    top_k_hopper.launch_of.cache_clear()


@pytest.mark.parametrize("name", ["softmax", "renormalized", "softmax_topk", "sigmoid"])
def test_the_kernels_keep_z_and_indices_only(name, kernels, monkeypatch):
    layer, x = make(CONFIGS[name])
    assert kept_bytes(layer, x) == bytes_of_top_k(T * K)
    got = gradients(layer, x)
    keeps_logits(monkeypatch)
    assert kept_bytes(layer, x) == bytes_of_top_k(T * K) + 4 * T * E
    same(got, gradients(layer, x))
    monkeypatch.setattr(hopper, "supports", lambda *_: False)
    torch.testing.assert_close(got, gradients(layer, x))


def test_the_kernels_keep_as_little_under_torch_compile(kernels):
    layer, x = make(CONFIGS["softmax"])
    torch._dynamo.reset()
    # The partitioner of the default backend, which decides what is kept, without its code generation.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    same(gradients(layer, x, compiled), gradients(layer, x))
    assert saved_mib(lambda: compiled(x), [x, *layer.parameters()]) * 2**20 == bytes_of_top_k(T * K)
