import math
import time

import numpy as np
import pytest
import torch

from dispatch import debug, plan
from routing import Routing, expert_counts, token_rounding, top_k, wasted_row_ratio
from routing.rounding import MODES, capacity, rounded_counts

SCORINGS = ["softmax", "softmax_topk", "sigmoid"]


def random_logits(num_tokens: int, num_experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal logits with an uneven load: expert e's are shifted by up to one."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(num_experts, generator=generator, dtype=torch.float64)
    return (torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64) + shift).to(dtype)


def random_case(seed: int) -> tuple[torch.Tensor, int, int, dict]:
    """Logits, k, tile_m and scoring options: every kind of tile, fewer tokens than a tile among them, ties in every third."""
    rng = np.random.default_rng(seed)
    num_tokens, num_experts = int(rng.integers(1, 60)), int(rng.integers(1, 7)) * 2
    logits = random_logits(num_tokens, num_experts, seed)
    if seed % 3 == 0:
        logits = logits.round()
    options = {"scoring": SCORINGS[seed % len(SCORINGS)]}
    k = int(rng.integers(1, num_experts + 1))
    if seed % 4 == 0:
        options |= {"selection_bias": torch.randn(num_experts), "num_groups": 2, "groups_per_token": 1}
        k = min(k, num_experts // 2)
    return logits, k, int(rng.integers(1, 20)), options


def rounded(count: int, num_tokens: int, tile: int, mode: str) -> set[int]:
    """The row counts that the definition allows for one expert."""
    below, above = count // tile * tile, -(-count // tile) * tile
    if above > num_tokens or mode == "down":
        return {below}
    if mode == "up":
        return {above}
    if mode == "nearest":
        return {above if 2 * (count - below) >= tile else below}
    return {below, above}


def expected_members(scores: np.ndarray, chosen: np.ndarray, expert: int, rows: int) -> set[int]:
    """The tokens of an expert with that many rows: its choosers first, then the others, by score and then by token."""
    choosers = (chosen == expert).any(axis=1)
    order = sorted(range(len(scores)), key=lambda t: (not choosers[t], -scores[t, expert], t))
    return set(order[:rows])


def used(routing: Routing) -> int:
    return int(expert_counts(routing).sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_of_the_definition(seed: int, mode: str) -> None:
    logits, k, tile, options = random_case(seed)
    num_tokens, num_experts = logits.shape
    routing = token_rounding(logits, k, tile, mode, generator=torch.Generator().manual_seed(seed), **options)
    chosen = top_k(logits, k, **options).expert_index.view(num_tokens, k).numpy()
    scores = (torch.sigmoid(logits) if options["scoring"] == "sigmoid" else torch.softmax(logits, 1)).numpy()
    members = [set() for _ in range(num_experts)]
    for token, expert in zip(routing.token_index.tolist(), routing.expert_index.tolist(), strict=True):
        if expert < num_experts:
            assert token not in members[expert]
            members[expert].add(token)
    for expert in range(num_experts):
        rows = len(members[expert])
        assert rows in rounded(int((chosen == expert).sum()), num_tokens, tile, mode)
        assert members[expert] == expected_members(scores, chosen, expert, rows)


@pytest.mark.parametrize("mode", MODES)
def test_slots_in_use_come_first_by_token_and_the_rest_are_sentinels(mode: str) -> None:
    for seed in range(12):
        logits, k, tile, options = random_case(seed)
        num_tokens, num_experts = logits.shape
        routing = token_rounding(logits, k, tile, mode, **options)
        rows = used(routing)
        assert len(routing.score) == capacity(num_tokens, num_experts, k, tile, mode)
        assert routing.token_index[:rows].diff().ge(0).all()
        assert routing.expert_index[:rows].lt(num_experts).all()
        assert routing.token_index[rows:].eq(num_tokens).all()
        assert routing.expert_index[rows:].eq(num_experts).all()
        assert not routing.score[rows:].any()
        assert routing.slots_per_token is None


def test_within_a_token_the_choice_comes_first_and_added_experts_follow() -> None:
    logits = random_logits(64, 8)
    routing = token_rounding(logits, 3, 16, "up")
    choice = top_k(logits, 3).expert_index.view(64, 3).tolist()
    for token in range(64):
        experts = routing.expert_index[routing.token_index == token].tolist()
        assert experts[:3] == choice[token]
        assert experts[3:] == sorted(experts[3:])


@pytest.mark.parametrize("mode", MODES)
def test_capacity_holds_the_worst_case(mode: str) -> None:
    # All count vectors of three experts with T * K rows between them.
    num_tokens, k = 7, 2
    for tile in range(1, 10):
        worst = 0
        for first in range(num_tokens + 1):
            for second in range(num_tokens + 1):
                third = num_tokens * k - first - second
                if 0 <= third <= num_tokens:
                    counts = torch.tensor([first, second, third])
                    for seed in range(10 if mode == "stochastic" else 1):
                        rows = rounded_counts(counts, num_tokens, tile, mode, torch.Generator().manual_seed(seed))
                        worst = max(worst, int(rows.sum()))
        assert worst <= capacity(num_tokens, 3, k, tile, mode)


def test_capacity_of_real_sizes() -> None:
    assert capacity(16_384, 256, 8, 128, "down") == capacity(16_384, 256, 8, 128, "balanced") == 131_072
    assert capacity(16_384, 256, 8, 128, "nearest") == 131_072 + 256 * 64
    assert capacity(16_384, 256, 8, 128, "up") == (131_072 + 256 * 127) // 128 * 128


def test_balanced_keeps_the_total_within_half_a_tile() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        tile = int(rng.integers(1, 50))
        counts = torch.from_numpy(rng.integers(0, 1000, 64))
        rows = rounded_counts(counts, 1_000 + tile, tile, "balanced")
        assert abs(int(rows.sum() - counts.sum())) <= tile / 2
        # Also for the experts up to any point, so that the errors never pile up on the way.
        assert (rows.cumsum(0) - counts.cumsum(0)).abs().max() <= tile / 2


def test_balanced_leaves_out_experts_that_cannot_round_up() -> None:
    # T=10, tile 4: experts with 9 or 10 rows would need 12. The others' total stays within half a tile.
    counts = torch.tensor([9, 3, 10, 3, 9, 2, 10, 1])
    rows = rounded_counts(counts, 10, 4, "balanced")
    forced = counts > 8
    assert rows[forced].tolist() == [8, 8, 8, 8]
    assert abs(int(rows[~forced].sum() - counts[~forced].sum())) <= 2
    assert ((rows - counts).abs() < 4).all()


def test_nearest_rounds_halves_up() -> None:
    counts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    assert rounded_counts(counts, 100, 4, "nearest").tolist() == [0, 0, 4, 4, 4, 4, 8, 8]
    assert rounded_counts(counts, 100, 3, "nearest").tolist() == [0, 0, 3, 3, 3, 6, 6, 6]


def test_stochastic_is_unbiased() -> None:
    counts, tile, draws = torch.arange(0, 128), 32, 4000
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([rounded_counts(counts, 1000, tile, "stochastic", generator) for _ in range(draws)]).double()
    # Five standard errors of a mean whose draws differ by at most one tile.
    assert (rows.mean(0) - counts).abs().max() < 5 * (tile / 2) / math.sqrt(draws)
    assert rows[:, ::tile].eq(counts[::tile]).all()


def test_stochastic_is_reproducible_by_seed() -> None:
    logits = random_logits(500, 32)

    def draw(seed: int) -> Routing:
        return token_rounding(logits, 4, 16, "stochastic", generator=torch.Generator().manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(draw(1)[:3], draw(1)[:3], strict=True))
    assert not torch.equal(expert_counts(draw(1)), expert_counts(draw(2)))
    torch.manual_seed(3)
    default = token_rounding(logits, 4, 16, "stochastic")
    torch.manual_seed(3)
    assert torch.equal(token_rounding(logits, 4, 16, "stochastic").expert_index, default.expert_index)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("mode", MODES)
def test_tile_of_one_is_top_k(mode: str, scoring: str) -> None:
    logits = random_logits(30, 6)
    expected = top_k(logits, 2, scoring=scoring, renormalize=True, scale=2.0)
    routing = token_rounding(logits, 2, 1, mode, scoring=scoring, renormalize=True, scale=2.0)
    assert torch.equal(routing.token_index, expected.token_index)
    assert torch.equal(routing.expert_index, expected.expert_index)
    torch.testing.assert_close(routing.score, expected.score)


@pytest.mark.parametrize("mode", ["up", "down"])
def test_scores_are_normalised_over_the_final_rows(mode: str) -> None:
    logits = random_logits(200, 8, dtype=torch.float64)
    full = torch.softmax(logits, 1)
    plain = token_rounding(logits, 2, 16, mode, scale=3.0)
    rows = used(plain)
    token, expert = plain.token_index[:rows].long(), plain.expert_index[:rows].long()
    torch.testing.assert_close(plain.score[:rows], 3 * full[token, expert])
    total = torch.zeros(200, dtype=torch.float64).index_add_(0, token, full[token, expert])
    for options in ({"renormalize": True}, {"scoring": "softmax_topk"}):
        routing = token_rounding(logits, 2, 16, mode, scale=3.0, **options)
        assert torch.equal(routing.expert_index, plain.expert_index)
        torch.testing.assert_close(routing.score[:rows], 3 * full[token, expert] / total[token])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradients_agree_with_finite_differences(scoring: str, renormalize: bool) -> None:
    # "down" leaves tokens without rows, "up" adds rows and ends in sentinels.
    for mode in ("up", "down"):
        logits = random_logits(9, 4, dtype=torch.float64).requires_grad_()
        routing = token_rounding(logits, 1, 4, mode, scoring=scoring)
        assert used(routing) > 0

        def score(x: torch.Tensor, mode: str = mode) -> torch.Tensor:
            return token_rounding(x, 1, 4, mode, scoring=scoring, renormalize=renormalize).score

        assert torch.autograd.gradcheck(score, (logits,))


def test_unrouted_tokens_get_no_gradient() -> None:
    logits = random_logits(50, 4).requires_grad_()
    routing = token_rounding(logits, 1, 16, "down", scoring="softmax_topk", renormalize=True)
    (routing.score * torch.arange(len(routing.score))).sum().backward()
    routed = torch.zeros(51, dtype=torch.bool)
    routed[routing.token_index.long()] = True
    assert 0 < int((~routed[:50]).sum()) < 50
    assert not logits.grad[~routed[:50]].any()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_fewer_tokens_than_a_tile_are_all_dropped(mode: str) -> None:
    logits = random_logits(7, 4).requires_grad_()
    routing = token_rounding(logits, 2, 8, mode, renormalize=True)
    routing.score.sum().backward()
    assert routing.score.shape == (0,)
    assert not logits.grad.any()


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_make_an_empty_routing(mode: str, scoring: str) -> None:
    logits = torch.empty(0, 4, requires_grad=True)
    routing = token_rounding(logits, 2, 8, mode, scoring=scoring, renormalize=True)
    routing.score.sum().backward()
    assert routing.score.shape == (0,)


@pytest.mark.parametrize("mode", MODES)
def test_all_tokens_to_one_expert_keep_whole_tiles(mode: str) -> None:
    logits = torch.zeros(20, 3)
    logits[:, 1] = 5
    counts = expert_counts(token_rounding(logits, 1, 8, mode))
    # 24 rows would be needed to round up, there are 20 tokens.
    assert counts.tolist() == [0, 16, 0]


@pytest.mark.parametrize("mode", MODES)
def test_k_equal_to_e_and_one_expert(mode: str) -> None:
    assert expert_counts(token_rounding(random_logits(21, 3), 3, 8, mode)).tolist() == [16, 16, 16]
    assert expert_counts(token_rounding(random_logits(21, 1), 1, 7, mode)).tolist() == [21]


def test_equal_scores_keep_and_add_the_lower_tokens() -> None:
    # Tokens 0..5 choose expert 0, tokens 6..9 expert 1, all with the same score; tile 4, nearest: C = [6, 4], N = [8, 4].
    logits = torch.zeros(10, 2)
    logits[:6, 0] = 1
    logits[6:, 1] = 1
    routing = token_rounding(logits, 1, 4, "nearest")
    assert routing.token_index[routing.expert_index == 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    routing = token_rounding(logits, 1, 4, "down")
    assert routing.token_index[routing.expert_index == 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", MODES)
def test_non_finite_logits_give_a_finite_routing_in_range(mode: str) -> None:
    logits = random_logits(64, 8)
    logits[::5] = math.nan
    logits[1::7, 3] = math.inf
    logits[2::7, 4] = -math.inf
    logits.requires_grad_()
    for scoring in SCORINGS:
        routing = token_rounding(logits, 2, 8, mode, scoring=scoring, renormalize=True, generator=torch.Generator().manual_seed(0))
        again = token_rounding(logits, 2, 8, mode, scoring=scoring, renormalize=True, generator=torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(routing[:3], again[:3], strict=True))
        assert routing.token_index.ge(0).all()
        assert routing.token_index.le(64).all()
        assert routing.expert_index.ge(0).all()
        assert routing.expert_index.le(8).all()
        assert routing.score.isfinite().all()
        (gradient,) = torch.autograd.grad(routing.score.square().sum(), logits)
        assert gradient.isfinite().all()
        assert not gradient[~logits.isfinite()].any()


def test_debug_switch_reports_non_finite_logits() -> None:
    with debug.checks(), pytest.raises(ValueError, match="logits: must be finite"):
        token_rounding(torch.tensor([[0.0, math.nan]]), 1, 1)


def test_full_size_is_rounded_and_planned_within_seconds_without_waste() -> None:
    num_tokens, num_experts, tile = 32_768, 512, 128
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    routing = token_rounding(logits, 10, tile, "nearest")
    result = plan(routing.token_index, routing.expert_index, num_tokens=num_tokens, num_experts=num_experts)
    # It takes 0.7 s on one core.
    assert time.perf_counter() - begin < 15
    counts = result.offsets.diff()
    assert wasted_row_ratio(counts, tile) == 0
    assert (counts - expert_counts(top_k(logits, 10))).abs().max() < tile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_m": 0}, "tile_m=0: must be at least 1"),
        ({"tile_m": 1.5}, r"tile_m=1\.5: must be an int"),
        ({"mode": "ceil"}, "mode='ceil': must be one of nearest, up, down, stochastic, balanced"),
        ({"k": 5}, "k=5: must be between 1 and the number of experts, 4"),
        ({"scoring": "none"}, "scoring='none': must be one of"),
        ({"logits": torch.zeros(4)}, r"logits: shape \(4,\): must be \(T, E\)"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(8, 4), "k": 2, "tile_m": 4, "mode": "up", **change}
    with pytest.raises((ValueError, TypeError), match=message):
        token_rounding(**arguments)
