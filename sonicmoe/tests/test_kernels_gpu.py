"""The forward's kernels on an sm_90 GPU: values against float64, tails, bits, and the layer through the `hopper` backend.

Outputs are poisoned with NaN before each launch and inputs are fresh normal data.
"""

import itertools

import pytest
import torch

from dispatch import DispatchPlan
from routing import Routing
from sonicmoe import accuracy, backends, oracle, routed_experts
from sonicmoe.activations import activate, is_gated
from sonicmoe.backends import hopper
from sonicmoe.backends.arguments import DTYPES
from sonicmoe.kernel_cases import poison_new_tensors
from sonicmoe.kernels import variants
from sonicmoe.tests.kernel_options import kernel_options

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
"""Rounding the output costs 1.7e-3 and 2.1e-4 of many normal values; float32 accumulation next to nothing."""

ONE_ROUNDING = {torch.bfloat16: 2**-8 + 1e-4, torch.float16: 2**-11 + 1e-5}
"""What it can cost at most, and does when a few values hold most of a small block's norm, as after relu_squared."""

SMALL_BLOCK = 1024
"""Elements below which a block is judged by ONE_ROUNDING."""

COUNTS = {
    "one full tile": (192, 128, 192, [192]),
    "empty, one row, tails": (136, 72, 100, [5, 0, 130, 64, 1, 300, 128, 0]),
    "all rows in one expert": (512, 264, 700, [0, 1000, 0]),
    "smallest sizes": (8, 8, 9, [3, 0, 9]),
    "more experts than lanes": (200, 328, 333, [(7 * e) % 200 for e in range(70)]),
    "no row": (64, 64, 4, [0, 0]),
}
"""H, I, T and the experts' rows."""

UP = [
    ("swiglu", "interleaved", False, torch.bfloat16),
    ("swiglu", "concatenated", False, torch.bfloat16),
    ("geglu", "interleaved", True, torch.float16),
    ("relu_squared", "interleaved", True, torch.bfloat16),
]
DOWN = [(False, torch.bfloat16), (True, torch.float16)]
LAYOUTS = ["interleaved", "concatenated"]
EXCHANGED = "swiglu_oai"
"""The activation of weights whose last dimensions are exchanged."""


def gpu_kernels():
    """What these tests load, for `build_defs.gpu_kernels`; the layers among them have prebuilt kernels."""
    ups = [kernel_options(*variant) for variant in UP]
    downs = [{"dtype": DTYPES[dtype], "bias": bias} for bias, dtype in DOWN]
    for transposed in (True, False):
        ups += [kernel_options(EXCHANGED, layout, bias=True) | {"transposed": transposed} for layout in LAYOUTS]
        downs.append({"dtype": "bfloat16", "bias": False, "transposed": transposed})
    found = [variants.up_variants(**options) for options in ups] + [variants.down_variants(**options) for options in downs]
    return list(itertools.chain.from_iterable(found))


TAIL = 37
"""Rows behind the last expert's."""


def make_plan(T, counts):
    """Random tokens for every row; only what the projections read."""
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device="cuda")
    rows = int(offsets[-1])
    tokens = torch.randint(0, T, (rows + TAIL,), dtype=torch.int32, device="cuda")
    tokens[rows:] = -1
    return DispatchPlan(offsets, tokens, None, None, None, None, T, len(counts), None)


def randn(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def is_rounded(got, want):
    """Whether no block of 128 rows is further from float64 than one rounding to got's dtype; NaN never passes."""
    pairs = zip(got.split(128), want.split(128), strict=True)
    return all(
        bool((g.double() - w).norm() <= w.norm() * (TOLERANCE if g.numel() >= SMALL_BLOCK else ONE_ROUNDING)[got.dtype]) for g, w in pairs
    )


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_tensors(monkeypatch)


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize(("activation", "layout", "bias", "dtype"), UP)
@pytest.mark.usefixtures("poisoned")
def test_up_projection_matches_float64(case, activation, layout, bias, dtype):
    H, I, T, counts = COUNTS[case]
    width = 2 * I if is_gated(activation) else I
    plan, rows = make_plan(T, counts), sum(counts)
    x, w = randn(T, H, dtype=dtype), randn(len(counts), width, H, dtype=dtype, scale=H**-0.5)
    b = randn(len(counts), width, dtype=dtype) if bias else None
    want = torch.cat([x[own.long()].double() @ w[e].double().mT + (b[e].double() if bias else 0) for e, own in enumerate(_by_expert(plan))])
    results = [hopper.up_projection(x, w, b, plan, activation=activation, gate_up_layout=layout, store_z=True) for _ in range(2)]
    alone, none = hopper.up_projection(x, w, b, plan, activation=activation, gate_up_layout=layout, store_z=False)
    a, z = results[0]
    assert is_rounded(z[:rows], want)
    assert is_rounded(a[:rows], activate(want, activation, layout))
    assert a[rows:].isnan().all()
    assert z[rows:].isnan().all()
    assert none is None
    assert torch.equal(a[:rows], results[1][0][:rows])
    assert torch.equal(z[:rows], results[1][1][:rows])
    assert torch.equal(a[:rows], alone[:rows])


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize(("bias", "dtype"), DOWN)
@pytest.mark.usefixtures("poisoned")
def test_down_projection_matches_float64(case, bias, dtype):
    H, I, T, counts = COUNTS[case]
    plan, rows = make_plan(T, counts), sum(counts)
    a, w = randn(rows + TAIL, I, dtype=dtype), randn(len(counts), H, I, dtype=dtype, scale=I**-0.5)
    b = randn(len(counts), H, dtype=dtype) if bias else None
    want = torch.cat([part.double() @ w[e].double().mT + (b[e].double() if bias else 0) for e, part in enumerate(a[:rows].split(counts))])
    y, again = (hopper.down_projection(a, w, b, plan) for _ in range(2))
    assert is_rounded(y[:rows], want)
    assert y[rows:].isnan().all()
    assert torch.equal(y[:rows], again[:rows])


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_weights_may_be_stored_with_their_last_dimensions_exchanged(case, layout):
    H, I, T, counts = COUNTS[case]
    plan, rows = make_plan(T, counts), sum(counts)
    x, b = randn(T, H, dtype=torch.bfloat16), randn(len(counts), 2 * I, dtype=torch.bfloat16)
    w_up = randn(len(counts), H, 2 * I, dtype=torch.bfloat16, scale=H**-0.5).mT
    w_down = randn(len(counts), I, H, dtype=torch.bfloat16, scale=I**-0.5).mT
    options = {"activation": EXCHANGED, "gate_up_layout": layout, "store_z": True}
    got, want = (hopper.up_projection(x, w, b, plan, **options) for w in (w_up, w_up.contiguous()))
    y, expected = (hopper.down_projection(want[0], w, None, plan) for w in (w_down, w_down.contiguous()))
    assert not want[0][:rows].isnan().any()
    for one, other in zip((*got, y), (*want, expected), strict=True):
        assert is_rounded(one[:rows], other[:rows].double())
        assert one[rows:].isnan().all()


@pytest.mark.parametrize("rows_per_expert", [4, 16, 128, 256, 1200])
def test_layer_matches_the_oracle_in_every_tile(rows_per_expert):
    T, H, I, E, K = rows_per_expert * 4, 264, 520, 8, 2
    token = torch.arange(T, device="cuda", dtype=torch.int32).repeat_interleave(K)
    expert = torch.stack([torch.randperm(E, device="cuda")[:K] for _ in range(T)]).flatten().int()
    score = torch.rand(T * K, device="cuda").requires_grad_()
    routing = Routing(token, expert, score, T, E, K)
    x = randn(T, H, dtype=torch.bfloat16).requires_grad_()
    w_up = randn(E, 2 * I, H, dtype=torch.bfloat16, scale=H**-0.5).requires_grad_()
    w_down = randn(E, H, I, dtype=torch.bfloat16, scale=I**-0.5).requires_grad_()
    dout = randn(T, H, dtype=torch.bfloat16)
    want = oracle.experts(x, w_up, w_down, routing, dout)
    with torch.no_grad():
        inference = routed_experts(x, w_up, w_down, routing, backend="hopper")
    out = routed_experts(x, w_up, w_down, routing, backend="hopper")
    out.backward(dout)
    assert torch.equal(inference, out)
    assert accuracy.measure("o", out, want["o"]).worst_block < 4e-3
    for name, got in {"dx": x.grad, "dw_up": w_up.grad, "dw_down": w_down.grad}.items():
        assert accuracy.measure(name, got, want[name]).worst_block < 8e-3, name


def test_forward_does_not_wait_for_the_host_and_replays_in_a_graph():
    T, H, I, E, K = 256, 128, 64, 8, 2
    expert = torch.randint(0, E, (T * K,), device="cuda", dtype=torch.int32)
    token = torch.arange(T, device="cuda", dtype=torch.int32).repeat_interleave(K)
    routing = Routing(token, expert, torch.rand(T * K, device="cuda"), T, E, K)
    x = randn(T, H, dtype=torch.bfloat16)
    w_up, w_down = randn(E, 2 * I, H, dtype=torch.bfloat16), randn(E, H, I, dtype=torch.bfloat16)
    routed_experts(x, w_up, w_down, routing, backend="hopper")  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = routed_experts(x, w_up, w_down, routing, backend="hopper")
    x.copy_(randn(T, H, dtype=torch.bfloat16))
    expert.copy_(torch.randint(0, E, (T * K,), device="cuda", dtype=torch.int32))
    graph.replay()
    assert torch.equal(out, routed_experts(x, w_up, w_down, routing, backend="hopper"))


@pytest.mark.parametrize("tokens", [1, 8, 64, 4096])
def test_dependent_launches_have_the_bits_of_launches_one_by_one(tokens):
    """In a row, eager and in a graph, each on rows of its own: a row read before it was written would be one of the step before."""
    H, I, E, K = 1024, 768, 32, 4
    w_up = randn(E, 2 * I, H, dtype=torch.bfloat16, scale=H**-0.5)
    w_down = randn(E, H, I, dtype=torch.bfloat16, scale=I**-0.5)
    x, expert = randn(tokens, H, dtype=torch.bfloat16), torch.empty(tokens * K, device="cuda", dtype=torch.int64)
    score = torch.empty(tokens * K, device="cuda", dtype=torch.bfloat16)
    routing = Routing(None, expert, score, tokens, E, K)

    def draw():
        x.normal_()
        score.uniform_()
        expert.copy_(torch.rand(tokens, E, device="cuda").argsort(1)[:, :K].flatten())

    def step():
        return routed_experts(x, w_up, w_down, routing, backend="hopper")

    draw()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(50):
        draw()
        eager = step()
        graph.replay()
        with backends.one_by_one():
            apart = step()
        assert torch.equal(eager, apart)
        assert torch.equal(captured, apart)


def test_what_a_kernel_cannot_take_is_refused_before_launch():
    plan = make_plan(4, [2, 2])
    x, w = randn(4, 16, dtype=torch.bfloat16), randn(2, 16, 16, dtype=torch.bfloat16)
    options = {"activation": "swiglu", "gate_up_layout": "interleaved", "store_z": False}
    with pytest.raises(ValueError, match=r"^x: shape \(4, 16\) with strides \(1, 4\): must be contiguous"):
        hopper.up_projection(randn(16, 4, dtype=torch.bfloat16).mT, w, None, plan, **options)
    with pytest.raises(TypeError, match=r"^w_up: dtype torch.float16: must be x's dtype torch.bfloat16"):
        hopper.up_projection(x, w.half(), None, plan, **options)
    with pytest.raises(ValueError, match=r"^w_down: device cpu: must be a's device cuda:0"):
        hopper.down_projection(randn(4, 16, dtype=torch.bfloat16), w.cpu(), None, plan)


def _by_expert(plan):
    """The tokens of each expert's rows."""
    bounds = plan.offsets.tolist()
    return [plan.row_to_token[begin:end] for begin, end in itertools.pairwise(bounds)]
