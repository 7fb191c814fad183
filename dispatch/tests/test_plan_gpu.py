"""count_cumsum and the plan on an sm_90 GPU, from prebuilt objects: the bits of PyTorch's version, graphs, and times beside it."""

import itertools

import pytest
import torch

from cute_runtime.timing import captured, eager_us, graph_us, host_us
from dispatch import count_cumsum, debug, plan, plan_hopper
from dispatch.kernels.sizes import FEW_SLOTS

pytestmark = pytest.mark.gpu

LENGTHS = [*(2**i + i % 10 for i in range(20)), 2017, 2560, 3001, 3999, 4096, 262_144, 2_097_152]
EXPERTS = [1, 2, 128, 257, 1023, 1024, 5000, 50_000]


def draw(count, size, dtype, *, seed, sentinels=True):
    """Ids on the GPU, about a tenth of them sentinels on both sides; for int64 some that would wrap into [0, size) as int32."""
    generator = torch.Generator("cuda").manual_seed(seed)
    margin = max(1, size // 20) if sentinels else 0
    ids = torch.randint(-margin, size + margin, (count,), generator=generator, device="cuda", dtype=dtype)
    if sentinels and dtype == torch.int64:
        ids[::37] += 2**32
    return ids


def poisoned(function):
    """The function's tensors, from memory that held -858993460 before."""
    for size in (2**10, 2**14, 2**18, 2**21, 2**22):
        torch.full((size,), -858993460, dtype=torch.int32, device="cuda")
    return function()


def assert_same(got, want, what):
    for name, one, other in zip(getattr(want, "_fields", ("count", "cumsum")), got, want, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype, (what, name)
            assert torch.equal(one, other), (what, name, (one != other).nonzero()[:4].flatten().tolist())
        else:
            assert one == other, (what, name)


def both_plans(token, expert, what, **sizes):
    want = plan(token, expert, **sizes, backend="reference")
    assert_same(poisoned(lambda: plan(token, expert, **sizes, backend="hopper")), want, what)
    return want


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", EXPERTS)
def test_counts_equal_pytorchs(experts, dtype):
    for length in LENGTHS:
        ids = draw(length, experts, dtype, seed=length)
        want = count_cumsum(ids, experts, backend="reference")
        assert_same(poisoned(lambda: count_cumsum(ids, experts, backend="hopper")), want, length)  # noqa: B023
        inside = ids[(ids >= 0) & (ids < experts)].cpu()
        assert torch.equal(want[0].cpu().long(), torch.bincount(inside, minlength=experts))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", EXPERTS)
def test_uniform_plan_equals_pytorchs(experts, dtype):
    for slots, k in zip(LENGTHS, itertools.cycle((1, 8, 3)), strict=False):
        tokens = max(1, slots // k)
        token = torch.arange(tokens, device="cuda", dtype=dtype).repeat_interleave(k)
        expert = draw(tokens * k, experts, dtype, seed=slots)
        both_plans(token, expert, slots, num_tokens=tokens, num_experts=experts, slots_per_token=k)


@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("expert_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", [1, 128, 1024, 50_000])
def test_plan_of_slots_in_any_order_equals_pytorchs(experts, token_dtype, expert_dtype):
    for slots, tokens in [(1, 1), (33, 5), (2017, 700), (4096, 1023), (4097, 1024), (70_001, 32_768), (262_144, 3_000_000)]:
        token = draw(slots, tokens, token_dtype, seed=slots)
        expert = draw(slots, experts, expert_dtype, seed=slots + 1)
        both_plans(token, expert, (slots, tokens), num_tokens=tokens, num_experts=experts)


def test_plan_of_rounded_slots_equals_pytorchs():
    """Ascending tokens and sentinels at the end, as token rounding leaves them."""
    slots, used, tokens, experts = 163_840, 131_000, 16_384, 256
    token = draw(slots, tokens, torch.int32, seed=0, sentinels=False).sort().values
    expert = draw(slots, experts, torch.int32, seed=1, sentinels=False)
    token[used:], expert[used:] = tokens, experts
    both_plans(token, expert, "rounded", num_tokens=tokens, num_experts=experts)


@pytest.mark.parametrize("slots_per_token", [8, None])
@pytest.mark.parametrize("experts", [4, 2000])
@pytest.mark.parametrize("value", [0, 3, -1, 2**40])
def test_one_expert_for_all_slots(value, experts, slots_per_token):
    token = torch.arange(20_000, device="cuda").repeat_interleave(8)
    expert = torch.full((160_000,), value, device="cuda")
    want = both_plans(token, expert, value, num_tokens=20_000, num_experts=experts, slots_per_token=slots_per_token)
    assert want.offsets[-1].item() == (160_000 if 0 <= value < experts else 0)
    assert_same(count_cumsum(expert, experts), count_cumsum(expert, experts, backend="reference"), value)


@pytest.mark.parametrize("experts", [3, 3000])
@pytest.mark.parametrize("slots_per_token", [2, None])
def test_nothing_to_plan_or_count(experts, slots_per_token):
    nothing = torch.zeros(0, dtype=torch.int32, device="cuda")
    both_plans(nothing, nothing, "no tokens", num_tokens=0, num_experts=experts, slots_per_token=slots_per_token)
    assert_same(count_cumsum(nothing, experts), count_cumsum(nothing, experts, backend="reference"), "no slots")
    if slots_per_token is None:
        both_plans(nothing, nothing, "no slots", num_tokens=7, num_experts=experts)
        some = torch.zeros(9, dtype=torch.int32, device="cuda")
        both_plans(some, some, "slots without a token", num_tokens=0, num_experts=experts)


def test_strided_ids_are_taken():
    pairs = torch.stack([draw(5000, 300, torch.int64, seed=0), draw(5000, 64, torch.int64, seed=1)], dim=1)
    both_plans(pairs[:, 0], pairs[:, 1], "strided", num_tokens=300, num_experts=64)
    assert_same(count_cumsum(pairs[:, 1], 64), count_cumsum(pairs[:, 1], 64, backend="reference"), "strided")


@pytest.mark.parametrize("experts", [128, 50_000])
@pytest.mark.parametrize("slots_per_token", [8, None])
def test_runs_repeat_their_bits_and_do_not_wait(experts, slots_per_token):
    token = torch.arange(32_768, device="cuda", dtype=torch.int32).repeat_interleave(8)
    expert = draw(262_144, experts, torch.int32, seed=5)
    sizes = {"num_tokens": 32_768, "num_experts": experts, "slots_per_token": slots_per_token}
    first = plan(token, expert, **sizes), count_cumsum(expert, experts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        later = [(plan(token, expert, **sizes), count_cumsum(expert, experts)) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one_plan, one_count in later:
        assert_same(one_plan, first[0], "plan")
        assert_same(one_count, first[1], "count")


@pytest.mark.parametrize("experts", [128, 3000])
@pytest.mark.parametrize("slots_per_token", [4, None])
def test_graph_replays_on_new_ids(experts, slots_per_token):
    token = torch.arange(5000, device="cuda").repeat_interleave(4)
    expert = draw(20_000, experts, torch.int64, seed=0)
    sizes = {"num_tokens": 5000, "num_experts": experts, "slots_per_token": slots_per_token}
    graph, (got_plan, got_count) = captured([lambda: (plan(token, expert, **sizes), count_cumsum(expert, experts))])
    for seed in range(1, 4):
        expert.copy_(draw(20_000, experts, torch.int64, seed=seed))
        graph.replay()
        assert_same(got_plan, plan(token, expert, **sizes, backend="reference"), seed)
        assert_same(got_count, count_cumsum(expert, experts, backend="reference"), seed)


def test_compiled_with_fullgraph_gives_the_same_bits():
    def both(token, expert):
        return *plan(token, expert, num_tokens=1000, num_experts=64, slots_per_token=4)[:4], *count_cumsum(expert, 64)

    token = torch.arange(1000, device="cuda").repeat_interleave(4)
    expert = draw(4000, 64, torch.int64, seed=0)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(one, other) for one, other in zip(compiled(token, expert), both(token, expert), strict=True))


def test_launches_go_to_the_current_stream():
    token = torch.arange(32_768, device="cuda").repeat_interleave(8)
    expert = draw(262_144, 128, torch.int64, seed=0)
    want = plan(token, expert, num_tokens=32_768, num_experts=128, slots_per_token=8, backend="reference")
    late = torch.zeros_like(expert)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(expert)
        got = plan(token, late, num_tokens=32_768, num_experts=128, slots_per_token=8)
    stream.synchronize()
    assert_same(got, want, "stream")


def test_debug_switch_still_checks_the_tokens():
    ids = torch.zeros(8, dtype=torch.int32, device="cuda")
    with debug.checks(), pytest.raises(ValueError, match=r"token_index: a routed slot's token is outside \[0, 0\)"):
        plan(ids, ids, num_tokens=0, num_experts=1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("length", "experts"), [(262_144, 128), (2_097_152, 128), (262_144, 50_000), (2_097_152, 50_000)])
def test_counting_is_faster_than_bincount_and_cumsum(length, experts, dtype, capsys):
    ids = draw(length, experts, dtype, seed=0, sentinels=False)
    ours = graph_us([lambda: count_cumsum(ids, experts)] * 20)
    body = graph_us([lambda: count_cumsum(ids, experts, backend="reference")] * 20)
    eager = eager_us(lambda: count_cumsum(ids, experts))
    bincount = eager_us(lambda: torch.bincount(ids, minlength=experts).cumsum(0))
    with capsys.disabled():
        print(
            f"\ncount_cumsum N={length} E={experts} {dtype}: graph {ours:.1f}, eager {eager:.1f}; "
            f"PyTorch body in a graph {body:.1f}; bincount + cumsum eager {bincount:.1f} microseconds"
        )
    assert eager < bincount
    assert ours < body


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "uniform", "most_us"),
    [(64, 128, 8, True, 8), (32_768, 128, 8, True, 40), (4096, 256, 8, True, 40), (32_768, 256, 16, True, 60), (262_144, 128, 8, True, 120),
     (32_768, 50_000, 8, True, 120), (32_768, 128, 8, False, 120), (16_384, 256, 8, False, 120)],
)  # fmt: skip
def test_planning_is_faster_than_pytorch(tokens, experts, k, uniform, most_us, capsys):
    token = torch.arange(tokens, device="cuda", dtype=torch.int32).repeat_interleave(k)
    expert = draw(tokens * k, experts, torch.int32, seed=0, sentinels=False)
    sizes = {"num_tokens": tokens, "num_experts": experts, "slots_per_token": k if uniform else None}
    ours = graph_us([lambda: plan(token, expert, **sizes)] * 20)
    body = graph_us([lambda: plan(token, expert, **sizes, backend="reference")] * 5)
    eager = eager_us(lambda: plan(token, expert, **sizes))
    eager_body = eager_us(lambda: plan(token, expert, **sizes, backend="reference"))
    host = host_us(lambda: plan(token, expert, **sizes))
    with capsys.disabled():
        form = "uniform" if uniform else "any order"
        print(
            f"\nplan T={tokens} E={experts} K={k} {form}: graph {ours:.1f}, eager {eager:.1f}, host {host:.1f}; "
            f"PyTorch body graph {body:.1f}, eager {eager_body:.1f} microseconds"
        )
    assert ours < most_us
    assert ours < body


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 128, 8), (64, 128, 8), (128, 128, 8), (128, 1023, 8), (512, 8, 2)])
def test_few_slots_are_planned_faster_by_one_block_than_by_two_launches(monkeypatch, tokens, experts, k, capsys):
    """The rule of plan_hopper.uniform_launch, on int64 ids as a router has them; with the same bits."""
    expert = draw(tokens * k, experts, torch.int64, seed=0).view(tokens, k)
    sizes = {"num_tokens": tokens, "num_experts": experts, "slots_per_token": k}
    plans, times = [], []
    try:
        for few_slots in (FEW_SLOTS, 0):
            monkeypatch.setattr(plan_hopper, "ONE_BLOCK_SLOTS", few_slots)
            plan_hopper.uniform_launch.cache_clear()
            plans.append(poisoned(lambda: plan(None, expert, **sizes)))
            times.append(graph_us([lambda: plan(None, expert, **sizes)] * 20))
    finally:
        plan_hopper.uniform_launch.cache_clear()
    assert_same(*plans, (tokens, experts, k))
    with capsys.disabled():
        print(f"\nplan T={tokens} E={experts} K={k}: one block {times[0]:.1f}, two launches {times[1]:.1f} microseconds in a graph")
    assert times[0] < times[1]
