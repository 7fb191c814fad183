"""top_k's kernels on an sm_90 GPU, from prebuilt objects: choice, scores, gradients, bits, graphs, torch.compile and speed.

The judge is the PyTorch version on the CPU. New memory is poisoned, NaN in float and the largest integer in int tensors.
"""

import functools
import math
from itertools import product

import pytest
import torch

from cute_runtime.timing import graph_us
from dispatch import debug
from routing import hopper, top_k
from routing.scores_hopper import slot_scores_grad
from routing.top_k_hopper import top_k_hopper

pytestmark = pytest.mark.gpu

SCORINGS = ("softmax", "softmax_topk", "sigmoid")
SCORE_TOLERANCE = 1e-6
"""Of scores, relative: two exponentials, a sum and a division in float32, on both sides."""


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty, see torch.utils.deterministic
    yield
    torch.use_deterministic_algorithms(False)


def random_logits(num_tokens, num_experts, seed=0, dtype=torch.float32):
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).mul_(2).to(dtype)


def check(logits, k, **options):
    """The GPU's routing has the CPU's experts and tokens, and its scores."""
    want = top_k(logits, k, **options)
    bias = options.pop("selection_bias", None)
    got = top_k(logits.cuda(), k, selection_bias=None if bias is None else bias.cuda(), **options)
    assert got[3:] == want[3:]
    assert (got.token_index.dtype, got.expert_index.dtype, got.score.dtype) == (torch.int32, torch.int32, torch.float32)
    assert torch.equal(got.token_index.cpu(), want.token_index)
    assert torch.equal(got.expert_index.cpu(), want.expert_index)
    torch.testing.assert_close(got.score.cpu(), want.score, rtol=SCORE_TOLERANCE, atol=1e-37)


def far_from_ties(logits, k, **options):
    """The tokens whose choice does not hang on the rounding of a score, as (T,) bool: it stays when all scores are changed a little."""
    bias = options.pop("selection_bias")
    same = torch.ones(logits.shape[0], dtype=torch.bool)
    exact = top_k(logits.double(), k, selection_bias=bias, **options).expert_index.view(-1, k)
    for seed in range(4):
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) * 4e-6 - 2e-6
        changed = top_k(logits.double() + noise, k, selection_bias=bias, **options).expert_index.view(-1, k)
        same &= (changed == exact).all(1)
    return same


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        (1000, 128, 8),
        (257, 8, 2),
        (1, 1, 1),
        (333, 64, 6),
        (130, 512, 10),
        (100, 32, 32),
        (7, 1000, 16),
        (65, 33, 5),
        (9, 160, 31),
        (3, 50000, 8),
    ],
)
def test_random_logits_are_routed_as_on_the_cpu(T, E, K, scoring):
    for dtype, renormalize in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, True)):
        check(random_logits(T, E, T + E, dtype), K, scoring=scoring, renormalize=renormalize, scale=2.5)


def test_more_than_two_to_the_31_logits_are_addressed():
    T, E = 33000, 65536  # 4.3 GB
    logits = torch.zeros(T, E, dtype=torch.bfloat16, device="cuda")
    place = torch.arange(T, device="cuda") * 7919 % E
    logits[torch.arange(T, device="cuda"), place] = 8.0
    routing = top_k(logits, 2, scoring="softmax_topk")
    assert torch.equal(routing.expert_index.view(T, 2)[:, 0].long(), place)
    assert torch.equal(routing.expert_index.view(T, 2)[:, 1].long(), (place == 0).long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("E", "K"), [(40, 11), (512, 16), (300, 32)])
def test_ties_go_to_the_lower_expert(E, K, dtype):
    logits = torch.randint(-1, 2, (500, E), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[::2] = torch.where(logits[::2] == 0, -0.0, logits[::2])
    logits[:, ::3] = torch.where(logits[:, ::3] == 0, 0.0, logits[:, ::3])
    for scoring in SCORINGS:
        check(logits, K, scoring=scoring)


def test_ascending_logits_replace_the_whole_list_in_every_chunk():
    check(torch.arange(2000.0).repeat(3, 1) / 200, 16)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_non_finite_logits_count_as_the_extreme_finite_ones(scoring):
    logits = random_logits(400, 48)
    kind = torch.randint(0, 8, logits.shape, generator=torch.Generator().manual_seed(1))
    for code, value in enumerate((math.nan, math.inf, -math.inf)):
        logits[kind == code] = value
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2] = math.inf
    for dtype in (torch.float32, torch.bfloat16):
        check(logits.to(dtype), 7, scoring=scoring, renormalize=True)
        check(logits.to(dtype), 7, scoring=scoring, num_groups=6, groups_per_token=2, group_score="max")


@pytest.mark.parametrize(
    ("E", "K", "options"),
    [
        (256, 8, {"scoring": "sigmoid", "num_groups": 8, "groups_per_token": 4, "renormalize": True, "scale": 2.5}),
        (256, 8, {"scoring": "sigmoid"}),
        (64, 6, {"scoring": "softmax", "num_groups": 4, "groups_per_token": 3}),
        (64, 6, {"scoring": "softmax_topk", "num_groups": 32, "groups_per_token": 32, "group_score": "max"}),
        (300, 5, {"scoring": "softmax", "num_groups": 300, "groups_per_token": 7}),
        (1200, 16, {"scoring": "sigmoid", "num_groups": 3, "groups_per_token": 2}),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_bias_and_groups_choose_as_on_the_cpu(E, K, options, biased):
    logits = random_logits(700, E, E)
    bias = torch.randn(E, generator=torch.Generator().manual_seed(2)) * 0.2 if biased else None
    keep = far_from_ties(logits, K, selection_bias=bias, **options)
    assert keep.float().mean() > 0.9
    check(logits[keep], K, selection_bias=bias, **options)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_groups_judged_by_their_best_logit_choose_the_same_bits(scoring):
    logits = random_logits(700, 160)
    check(logits, 6, scoring=scoring, num_groups=8, groups_per_token=3, group_score="max", scale=16.0)


def test_tied_groups_go_to_the_lower_group():
    check(torch.zeros(3, 12), 4, scoring="sigmoid", num_groups=4, groups_per_token=2)


def test_bias_of_any_size_never_leaves_the_chosen_groups():
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([[lowest, lowest, lowest, lowest, lowest, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, lowest, -math.inf, 0.0])
    check(logits, 3, scoring="softmax_topk", selection_bias=bias, num_groups=2, group_score="max")


@pytest.mark.parametrize("scoring", SCORINGS)
def test_no_tokens_make_an_empty_routing(scoring):
    logits = torch.empty(0, 8, device="cuda", requires_grad=True)
    routing = top_k(logits, 2, scoring=scoring, renormalize=True)
    routing.score.sum().backward()
    assert routing.score.shape == routing.expert_index.shape == routing.token_index.shape == (0,)
    assert logits.grad.shape == (0, 8)


def test_strided_logits_are_taken():
    wide = random_logits(60, 128).cuda()
    for view in (wide[:, ::2], wide[:, 3:40], wide.T):
        assert torch.equal(top_k(view, 4).expert_index, top_k(view.contiguous(), 4).expert_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scoring", "renormalize"), list(product(SCORINGS, (True, False))))
def test_gradients_agree_with_float64(scoring, renormalize, dtype):
    for T, E, K in ((300, 128, 8), (40, 33, 32), (5, 1, 1)):
        logits = random_logits(T, E, dtype=dtype)
        logits[0, 0] = math.nan
        logits[1, -1] = math.inf
        weight = torch.randn(T * K, generator=torch.Generator().manual_seed(3))
        leaf = logits.cuda().requires_grad_()
        options = {"scoring": scoring, "renormalize": renormalize, "scale": 1.5}
        top_k(leaf, K, **options).score.backward(weight.cuda())
        exact = logits.double().requires_grad_()
        top_k(exact, K, **options).score.backward(weight.double())
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.cpu().double() - exact.grad).norm()
        size = exact.grad.norm()  # may vanish with one expert
        assert error <= (2e-6 if dtype == torch.float32 else 4e-3) * size + 1e-6, (error, size)
        assert not leaf.grad.cpu()[~logits.isfinite()].any()


def test_expanded_gradient_is_taken():
    leaf = random_logits(50, 16).cuda().requires_grad_()
    top_k(leaf, 2).score.sum().backward()
    exact = leaf.detach().cpu().double().requires_grad_()
    top_k(exact, 2).score.sum().backward()
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, atol=1e-7, rtol=1e-5)


def test_beyond_the_kernels_limits_pytorch_computes_the_same():
    for logits, k, options in (
        (random_logits(20, 64), 33, {}),
        (random_logits(20, 64).double(), 4, {}),
        (random_logits(20, 80), 8, {"num_groups": 80, "groups_per_token": 40, "group_score": "max"}),
    ):
        assert not hopper.supports(logits.cuda(), k, options.get("groups_per_token", 1))
        want, got = top_k(logits, k, **options), top_k(logits.cuda(), k, **options)
        assert torch.equal(got.expert_index.cpu(), want.expert_index)
        torch.testing.assert_close(got.score.cpu(), want.score, rtol=SCORE_TOLERANCE, atol=0)


def test_two_runs_give_the_same_bits():
    logits = random_logits(4096, 256).cuda().requires_grad_()
    results = []
    for _ in range(4):
        routing = top_k(logits, 8, renormalize=True)
        (grad,) = torch.autograd.grad(routing.score.square().sum(), logits)
        results.append((routing.expert_index, routing.score.detach().view(torch.int32), grad.view(torch.int32)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_graph_replays_on_new_data():
    logits = random_logits(512, 128).cuda()
    top_k(logits, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = top_k(logits, 8)
    fresh = random_logits(512, 128, seed=9)
    logits.copy_(fresh)
    graph.replay()
    assert torch.equal(routing.expert_index.cpu(), top_k(fresh, 8).expert_index)


def test_compiled_with_fullgraph_gives_eager_values_and_gradients():
    def route(logits, bias):
        routing = top_k(logits, 4, scoring="sigmoid", selection_bias=bias, renormalize=True)
        return routing.expert_index, routing.score

    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, dynamic=True, backend="aot_eager")
    bias = torch.linspace(-0.1, 0.1, 16, device="cuda")
    for num_tokens in (50, 31):
        logits = random_logits(num_tokens, 16).cuda().requires_grad_()
        results = []
        for function in (route, compiled):
            experts, score = function(logits, bias)
            results.append((experts, score, *torch.autograd.grad(score.square().sum(), logits)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_passes_the_checks_of_torch_library():
    logits = random_logits(12, 8).cuda().requires_grad_()
    arguments = (logits, None, 2, "softmax", True, 1.0, 1, 1, "top2", None, None)
    # Its aot_dispatch test cannot add up outputs that are integers first and floats then; the test above is for that.
    torch.library.opcheck(top_k_hopper.op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_debug_switch_reports_non_finite_logits():
    with debug.checks(), pytest.raises(ValueError, match="logits: must be finite"):
        top_k(torch.tensor([[0.0, math.nan]], device="cuda"), 1)


def copy_rate(size, copies=10):
    """Bytes a microsecond, read and written, of a device copy; not in a graph, where it would go to the copy engines."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    begin.record()
    for _ in range(copies):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * size * copies / (begin.elapsed_time(end) * 1e3)


@pytest.mark.parametrize(("T", "E", "K", "most_us"), [(32768, 128, 8, 60), (4096, 256, 8, 25), (32768, 512, 10, 200)])
def test_takes_microseconds(T, E, K, most_us, capsys):
    torch.use_deterministic_algorithms(False)  # the poison's own launches are not to be timed
    count = max(2, 2**28 // (T * E * 4))  # rotate through more memory than L2
    inputs = [torch.randn(T, E, device="cuda") for _ in range(count)]
    options = {"renormalize": True}
    forward = graph_us([functools.partial(top_k, logits, K, **options) for logits in inputs])
    weight = torch.randn(T * K, device="cuda")
    experts = [top_k(logits, K, **options).expert_index for logits in inputs]
    backward = graph_us(
        [
            functools.partial(slot_scores_grad, logits, expert, None, weight, K, "softmax", True, 1.0)
            for logits, expert in zip(inputs, experts, strict=True)
        ]
    )
    rate = copy_rate(2**29)
    floors = [(T * E * 4 + 12 * T * K) / rate, (2 * T * E * 4 + 8 * T * K) / rate]
    with capsys.disabled():
        print(
            f"\ntop_k T,E,K={T},{E},{K}: forward {forward:.1f} us, {floors[0] / forward:.2f} of the byte floor; "
            f"backward {backward:.1f} us, {floors[1] / backward:.2f}"
        )
    assert forward < most_us
    assert backward < most_us
