"""token_rounding's kernels on an sm_90 GPU, from prebuilt objects: slots, scores, gradients, bits, graphs, torch.compile and speed.

The judge is the PyTorch version on the CPU. New memory is poisoned, NaN in float and the largest integer in int tensors.
"""

import functools
import math

import pytest
import torch

import routing.rounding
from cute_runtime.timing import graph_us
from dispatch import plan
from routing import expert_counts, token_rounding, top_k
from routing.rounding import MODES, capacity
from routing.rounding_hopper import rounded_slots
from routing.scores_hopper import slot_scores

pytestmark = pytest.mark.gpu

SCORINGS = ("softmax", "softmax_topk", "sigmoid")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty, see torch.utils.deterministic
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def same_draws(monkeypatch):
    """The same random numbers on both devices, for mode "stochastic"."""

    def draws(counts, generator):
        return torch.rand(counts.shape, generator=torch.Generator().manual_seed(5)).to(counts.device)

    monkeypatch.setattr(routing.rounding, "_draws", draws)


def random_logits(num_tokens, num_experts, seed=0, dtype=torch.float32):
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).mul_(2).to(dtype)


def distinct_logits(num_tokens, num_experts, seed=0):
    """Each expert's logits far enough apart that no rounding of a sigmoid reorders its tokens."""
    generator = torch.Generator().manual_seed(seed)
    ladder = torch.linspace(-3, 3, num_tokens)
    return torch.stack([ladder[torch.randperm(num_tokens, generator=generator)] for _ in range(num_experts)], 1)


def both(logits, *arguments, **options):
    return token_rounding(logits.cuda(), *arguments, **options), token_rounding(logits, *arguments, **options)


def assert_identical(got, want):
    assert got[3:] == want[3:]
    assert (got.token_index.dtype, got.expert_index.dtype, got.score.dtype) == (torch.int32, torch.int32, torch.float32)
    assert torch.equal(got.token_index.cpu(), want.token_index)
    assert torch.equal(got.expert_index.cpu(), want.expert_index)
    torch.testing.assert_close(got.score.cpu(), want.score, rtol=1e-6, atol=1e-37)


def members(routing):
    """(T, E) bool: the pairs in use."""
    used = (routing.expert_index < routing.num_experts).cpu()
    matrix = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
    matrix[routing.token_index.cpu()[used].long(), routing.expert_index.cpu()[used].long()] = True
    return matrix


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("T", "E", "K", "tile_m"),
    [
        (1000, 64, 6, 32),
        (2500, 16, 4, 128),
        (129, 8, 2, 128),
        (700, 33, 5, 7),
        (1500, 300, 8, 16),
        (40, 1, 1, 8),
        (64, 5, 5, 10),
        (3000, 9, 3, 1),
    ],
)
def test_distinct_scores_are_rounded_as_on_the_cpu(same_draws, T, E, K, tile_m, mode):
    got, want = both(distinct_logits(T, E, T), K, tile_m, mode, scoring="sigmoid", renormalize=True, scale=2.0)
    assert_identical(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_equal_scores_go_to_the_lower_token(same_draws, mode):
    for logits in (torch.randint(-2, 3, (3000, 24), generator=torch.Generator().manual_seed(0)).float(), torch.zeros(1000, 6)):
        assert_identical(*both(logits, 4, 128, mode, scoring="sigmoid"))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_non_finite_logits_are_rounded_as_on_the_cpu(scoring):
    logits = distinct_logits(900, 20)
    kind = torch.randint(0, 30, logits.shape, generator=torch.Generator().manual_seed(1))
    for code, value in enumerate((math.nan, math.inf, -math.inf)):
        logits[kind == code] = value
    got, want = both(logits, 3, 64, "nearest", scoring=scoring)
    if scoring == "sigmoid":
        assert_identical(got, want)
    assert torch.equal(members(got).sum(0), members(want).sum(0))
    assert got.score.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", ["softmax", "softmax_topk"])
def test_random_softmax_scores_are_rounded_as_on_the_cpu_but_for_ties_in_the_last_bits(scoring, dtype):
    logits = random_logits(4096, 128, dtype=dtype)
    for mode in ("nearest", "balanced"):
        got, want = both(logits, 8, 128, mode, scoring=scoring, renormalize=True)
        assert torch.equal(expert_counts(got).cpu(), expert_counts(want))
        differs = members(got) != members(want)
        assert differs.float().mean() < 1e-4
        score = torch.softmax(logits.double(), 1)
        for expert in differs.any(0).nonzero().flatten().tolist():
            values = score[differs[:, expert], expert]
            assert (values.max() - values.min()) / values.max() < 1e-6
        same = ~differs.any(1)
        dense_got, dense_want = (torch.zeros(4096, 128) for _ in range(2))
        for dense, routed in ((dense_got, got), (dense_want, want)):
            used = (routed.expert_index < 128).cpu()
            dense[routed.token_index.cpu()[used].long(), routed.expert_index.cpu()[used].long()] = routed.score.detach().cpu()[used]
        torch.testing.assert_close(dense_got[same], dense_want[same], rtol=2e-6, atol=1e-37)
        order = got.token_index.cpu()
        assert (order[1:] >= order[:-1]).all()
        assert got.score[got.expert_index == 128].eq(0).all()


def test_bias_groups_and_many_experts_per_token():
    logits = distinct_logits(800, 64)
    bias = torch.linspace(-0.05, 0.05, 64)
    options = {"num_groups": 8, "groups_per_token": 4, "group_score": "max"}
    assert_identical(*both(logits, 32, 64, "nearest", scoring="sigmoid"))
    got = token_rounding(logits.cuda(), 8, 64, selection_bias=bias.cuda(), scoring="sigmoid", **options)
    want = token_rounding(logits, 8, 64, selection_bias=bias, scoring="sigmoid", **options)
    assert torch.equal(expert_counts(got).cpu(), expert_counts(want))
    assert (members(got) != members(want)).float().mean() < 1e-3


@pytest.mark.parametrize("T", [0, 5])
def test_too_few_tokens_for_a_tile_leave_no_rows(T):
    logits = random_logits(T, 8).cuda().requires_grad_()
    got = token_rounding(logits, 2, 128)
    assert got.token_index.shape == got.expert_index.shape == got.score.shape == (0,)
    got.score.sum().backward()
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradients_agree_with_float64(scoring, renormalize):
    logits = random_logits(600, 40)
    logits[0, 0] = math.nan
    leaf = logits.cuda().requires_grad_()
    got = token_rounding(leaf, 4, 64, "up", scoring=scoring, renormalize=renormalize, scale=1.5)
    weight = torch.randn(got.score.shape, generator=torch.Generator().manual_seed(3))
    got.score.backward(weight.cuda())
    exact = logits.nan_to_num(nan=torch.finfo(torch.float32).min).double().requires_grad_()
    final = members(got)
    masked = exact.masked_fill(~final & final.any(1, keepdim=True), -math.inf) if scoring == "softmax_topk" else exact
    score = torch.sigmoid(masked) if scoring == "sigmoid" else torch.softmax(masked, 1)
    if renormalize and scoring != "softmax_topk":
        score = score / ((score * final).sum(1, keepdim=True) + 1e-20)
    used = (got.expert_index < 40).cpu()
    token, expert = (index.cpu()[used].long() for index in got[:2])
    chosen = score[token, expert] * 1.5
    torch.testing.assert_close(got.score.detach().cpu()[used].double(), chosen.detach(), rtol=2e-6, atol=1e-37)
    (chosen * weight[used]).sum().backward()
    assert ((leaf.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()).item() < 2e-6
    assert leaf.grad[0, 0] == 0


def test_two_runs_give_the_same_bits():
    logits = random_logits(4096, 128).cuda()
    first = token_rounding(logits, 8, 128)
    for _ in range(4):
        again = token_rounding(logits, 8, 128)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


def test_graph_replays_on_new_data():
    logits = distinct_logits(1000, 32).cuda()
    token_rounding(logits, 4, 64, scoring="sigmoid")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routed = token_rounding(logits, 4, 64, scoring="sigmoid")
    fresh = distinct_logits(1000, 32, seed=8)
    logits.copy_(fresh)
    graph.replay()
    assert_identical(routed, token_rounding(fresh, 4, 64, scoring="sigmoid"))


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_compiled_with_fullgraph_gives_eager_values_and_gradients(mode):
    def route(logits):
        return token_rounding(logits, 4, 8, mode, renormalize=True)[:3]

    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (50, 31):
        logits = random_logits(num_tokens, 16).cuda().requires_grad_()
        results = []
        for function in (route, compiled):
            torch.manual_seed(0)
            outputs = function(logits)
            results.append((*outputs, *torch.autograd.grad(outputs[2].square().sum(), logits)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_pass_the_checks_of_torch_library():
    logits = random_logits(12, 8).cuda()
    chosen = top_k(logits, 2).expert_index
    counts = torch.bincount(chosen, minlength=8).int()
    arguments = (logits, chosen, counts, None, capacity(12, 8, 2, 4, "nearest"), 4, "nearest", "softmax")
    torch.library.opcheck(rounded_slots.op, arguments)
    _, expert_index, token_offsets = rounded_slots(*arguments)
    torch.library.opcheck(slot_scores.op, (logits.requires_grad_(), expert_index, token_offsets, "softmax", True, 1.0, None, None))


@pytest.mark.parametrize(("T", "E", "K", "most_us"), [(32768, 128, 8, 400), (16384, 256, 8, 400)])
def test_takes_microseconds(T, E, K, most_us, capsys):
    torch.use_deterministic_algorithms(False)  # the poison's own launches are not to be timed
    inputs = [torch.randn(T, E, device="cuda") for _ in range(8)]
    by_tile = graph_us([functools.partial(token_rounding, logits, K, 128) for logits in inputs])
    by_token = graph_us([functools.partial(top_k, logits, K) for logits in inputs])

    def planned(logits, rounds):
        routed = token_rounding(logits, K, 128) if rounds else top_k(logits, K)
        return plan(routed.token_index, routed.expert_index, num_tokens=T, num_experts=E, slots_per_token=routed.slots_per_token)

    to_plan = [graph_us([functools.partial(planned, logits, rounds) for logits in inputs]) for rounds in (False, True)]
    with capsys.disabled():
        print(
            f"\nT,E,K={T},{E},{K}: top_k {by_token:.1f} us, with plan {to_plan[0]:.1f} us; "
            f"token_rounding {by_tile:.1f} us, with plan {to_plan[1]:.1f} us"
        )
    assert by_tile < most_us
    assert to_plan[0] < most_us
    assert to_plan[1] < 2 * most_us
