"""The router's logits: float32 sums of unrounded operands, gradients rounded once, under torch.compile and CUDA graphs alike."""

import pytest
import torch

from routing.linalg import bfloat16_pair
from sonicmoe import router
from sonicmoe.router import router_logits

T, H, E = 300, 64, 24


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_and_gradients_against_float64(dtype):
    x, weight = draw(T, H, dtype=dtype).requires_grad_(), draw(E, H, seed=1, dtype=dtype).requires_grad_()
    dlogits = draw(T, E, seed=2, dtype=torch.promote_types(dtype, torch.float32))
    logits = router_logits(x, weight)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    wide = [tensor.detach().double() for tensor in (x, weight, dlogits)]
    # One rounding, or of float32 the 300 sums in whatever order a BLAS takes.
    limit = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6, torch.float64: 1e-15}[dtype]
    assert (logits.dtype, dx.dtype, dweight.dtype) == (dlogits.dtype, dtype, dtype)
    assert relative_error(logits, wide[0] @ wide[1].T) < (1e-15 if dtype == torch.float64 else 5e-7)
    assert relative_error(dx, wide[2] @ wide[1]) < limit
    assert relative_error(dweight, wide[2].T @ wide[0]) < limit


def test_values_on_a_cpu_are_the_float32_product_of_widened_operands():
    x, weight = draw(T, H, dtype=torch.bfloat16), draw(E, H, seed=1, dtype=torch.bfloat16)
    assert torch.equal(router_logits(x, weight), torch.mm(x.float(), weight.float().mT))


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_a_pair_of_bfloat16_keeps_seventeen_bits(scale):
    values = draw(50, 40) * scale
    high, low = bfloat16_pair(values).float().chunk(2, dim=1)
    assert ((high + low - values).abs() <= 2**-16 * values.abs()).all()
    assert ((high - values).abs() > 2**-12 * values.abs()).any()


def test_paired_gradients_are_the_float32_ones_after_one_rounding():
    """The products that a GPU takes in bfloat16, here on a CPU."""
    x, weight = draw(T, H, dtype=torch.bfloat16), draw(E, H, seed=1, dtype=torch.bfloat16)
    dlogits = draw(T, E, seed=2) * torch.logspace(-8, 0, T).unsqueeze(1)
    dx, dweight = router._paired_grad(dlogits, x, weight, True, True)
    for got, expected in ((dx, dlogits.double() @ weight.double()), (dweight, dlogits.double().T @ x.double())):
        exact = expected.to(torch.bfloat16)
        assert got.dtype == torch.bfloat16
        assert relative_error(got, expected) < 1.01 * relative_error(exact, expected)
        assert (got == exact).float().mean() > 0.98
    assert router._paired_grad(dlogits, x, weight, False, False) == (None, None)


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_a_gradient_that_nobody_needs_is_not_computed(monkeypatch, needed):
    x, weight = draw(T, H), draw(E, H, seed=1)
    products = []
    logits = router_logits(x.requires_grad_(needed == "x"), weight.requires_grad_(needed == "weight"))
    monkeypatch.setattr(router, "matmul", lambda a, b: products.append((a.shape, b.shape)) or a @ b)
    logits.sum().backward()
    assert products == [((T, E), (E, H)) if needed == "x" else ((E, T), (T, H))]


def test_second_derivatives_are_refused():
    x, weight = draw(4, H).requires_grad_(), draw(E, H, seed=1)
    (dx,) = torch.autograd.grad(router_logits(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^router_logits: second derivatives .* are not available$"):
        dx.sum().backward()


def test_operators_pass_the_checks_of_torch_library():
    x, weight = draw(5, H, dtype=torch.bfloat16).requires_grad_(), draw(E, H, seed=1, dtype=torch.bfloat16).requires_grad_()
    torch.library.opcheck(router._logits.op, (x, weight))
    with torch.no_grad():
        for needs in ((True, True), (False, True)):
            torch.library.opcheck(router.router_logits_grad.op, (draw(5, E), x.detach(), weight.detach(), *needs))


def test_traced_code_holds_one_operator():
    graphs = []

    def backend(graph, example):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    x, weight = draw(5, H), draw(E, H, seed=1)
    compiled = torch.compile(router_logits, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, weight), router_logits(x, weight))
    assert graphs == [[torch.ops.sonicmoe.router_logits.default]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_gives_unrounded_logits_and_the_oracles_gradients(dtype):
    x, weight = draw(4096, 1024, dtype=dtype).cuda().requires_grad_(), draw(128, 1024, seed=1, dtype=dtype).cuda().requires_grad_()
    dlogits = draw(4096, 128, seed=2).cuda() * 1e-4
    router_logits(x, weight)  # loads the kernel
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits = router_logits(x, weight)
    assert torch.cuda.max_memory_allocated() - before < 2**20 + 4 * logits.numel() + 2 * weight.numel(), "x was copied"
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    wide = [tensor.detach().double() for tensor in (x, weight, dlogits)]
    assert logits.dtype == torch.float32
    assert relative_error(logits, wide[0] @ wide[1].T) < 5e-6  # the tensor cores' sums; rounding to dtype would cost a hundred times that
    one_rounding = {torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    assert relative_error(dx, wide[2] @ wide[1]) < one_rounding
    assert relative_error(dweight, wide[2].T @ wide[0]) < one_rounding


@pytest.mark.gpu
def test_gpu_logits_compile_and_replay_in_a_graph():
    x, weight = draw(512, 256, dtype=torch.bfloat16).cuda(), draw(64, 256, seed=1, dtype=torch.bfloat16).cuda()
    expected = router_logits(x, weight)
    assert torch.equal(torch.compile(router_logits, fullgraph=True)(x, weight), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router_logits(x, weight)
    x.neg_()
    graph.replay()
    assert torch.equal(captured, router_logits(x, weight))
