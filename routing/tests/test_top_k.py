import math
import time

import numpy as np
import pytest
import torch

from dispatch import debug
from routing import Routing, expert_counts, top_k

SCORINGS = ["softmax", "softmax_topk", "sigmoid"]


def random_logits(num_tokens: int, num_experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_token(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Experts and scores as (T, K) numpy arrays."""
    shape = (routing.num_tokens, routing.slots_per_token)
    return routing.expert_index.view(shape).numpy(), routing.score.detach().view(shape).numpy()


def best(values: np.ndarray, k: int) -> list[int]:
    """The k largest, of equals the lower index first."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def mixtral(logits: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """Mixtral and Qwen3 with norm_topk_prob: softmax over all, the K best, divided by their sum."""
    probability = softmax(logits)
    experts = best(logits, k)
    return experts, probability[experts] / probability[experts].sum()


def deepseek_v3(
    logits: np.ndarray, k: int, bias: np.ndarray, num_groups: int, groups_per_token: int, scale: float
) -> tuple[list[int], np.ndarray]:
    """Sigmoid scores; groups by the sum of their two best biased scores; experts by biased, weights by unbiased score."""
    score = 1 / (1 + np.exp(-logits))
    size = len(logits) // num_groups
    groups = (score + bias).reshape(num_groups, size)
    allowed = best(np.sort(groups, axis=1)[:, -2:].sum(axis=1), groups_per_token)
    choice = [score[e] + bias[e] if e // size in allowed else -np.inf for e in range(len(logits))]
    experts = best(choice, k)
    return experts, scale * score[experts] / score[experts].sum()


def deepseek_v2(logits: np.ndarray, k: int, num_groups: int, groups_per_token: int, scale: float) -> tuple[list[int], np.ndarray]:
    """Softmax over all, groups by their best expert, no renormalisation."""
    probability = softmax(logits)
    size = len(logits) // num_groups
    allowed = best(probability.reshape(num_groups, size).max(axis=1), groups_per_token)
    choice = [probability[e] if e // size in allowed else -np.inf for e in range(len(logits))]
    experts = best(choice, k)
    return experts, scale * probability[experts]


def check(routing: Routing, expected: list[tuple[list[int], np.ndarray]]) -> None:
    experts, scores = by_token(routing)
    np.testing.assert_array_equal(experts, [e for e, _ in expected])
    np.testing.assert_allclose(scores, [s for _, s in expected], rtol=1e-12)


def test_docstring_example() -> None:
    routing = top_k(torch.tensor([[0, 1, 1], [math.log(3), 0, -5]]), 2, scoring="softmax_topk")
    assert routing.token_index.tolist() == [0, 0, 1, 1]
    assert routing.expert_index.tolist() == [1, 2, 0, 1]
    torch.testing.assert_close(routing.score, torch.tensor([0.5, 0.5, 0.75, 0.25]))
    assert (routing.num_tokens, routing.num_experts, routing.slots_per_token) == (2, 3, 2)


def test_softmax_before_selection_keeps_the_probabilities() -> None:
    logits = random_logits(20, 7, dtype=torch.float64)
    expected = [(best(row, 3), softmax(row)[best(row, 3)]) for row in logits.numpy()]
    check(top_k(logits, 3), expected)


def test_renormalised_softmax_is_mixtral() -> None:
    logits = random_logits(20, 8, dtype=torch.float64)
    check(top_k(logits, 2, renormalize=True), [mixtral(row, 2) for row in logits.numpy()])


def test_softmax_after_selection_is_mixtral_too() -> None:
    logits = random_logits(20, 8, dtype=torch.float64)
    check(top_k(logits, 2, scoring="softmax_topk"), [mixtral(row, 2) for row in logits.numpy()])


def test_sigmoid_with_bias_and_groups_is_deepseek_v3() -> None:
    logits = random_logits(50, 32, dtype=torch.float64)
    bias = random_logits(1, 32, seed=1, dtype=torch.float64)[0] * 0.3
    routing = top_k(logits, 6, scoring="sigmoid", renormalize=True, scale=2.5, selection_bias=bias, num_groups=8, groups_per_token=3)
    check(routing, [deepseek_v3(row, 6, bias.numpy(), 8, 3, 2.5) for row in logits.numpy()])


def test_softmax_with_groups_is_deepseek_v2() -> None:
    logits = random_logits(50, 20, dtype=torch.float64)
    routing = top_k(logits, 6, scale=16.0, num_groups=5, groups_per_token=2, group_score="max")
    check(routing, [deepseek_v2(row, 6, 5, 2, 16.0) for row in logits.numpy()])


def test_negative_biased_score_in_a_chosen_group_beats_everything_outside() -> None:
    # Group 0 wins by its two best; its third expert's biased score is far below all of group 1.
    bias = torch.tensor([5.0, 5.0, -50.0, 0.0, 0.0, 0.0])
    routing = top_k(torch.zeros(1, 6), 3, scoring="sigmoid", selection_bias=bias, num_groups=2)
    assert routing.expert_index.tolist() == [0, 1, 2]


def test_selection_bias_changes_the_choice_and_not_the_score() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 9.0], requires_grad=True)
    for scoring, score in (
        ("softmax", torch.softmax(logits, 1)[0, 2]),
        ("sigmoid", torch.tensor(0.5)),
        ("softmax_topk", torch.tensor(1.0)),
    ):
        routing = top_k(logits, 1, scoring=scoring, selection_bias=bias)
        assert routing.expert_index.tolist() == [2]
        torch.testing.assert_close(routing.score, score.view(1))
        assert not routing.score.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_are_float32_or_float64_whatever_the_logits(scoring: str, dtype: torch.dtype) -> None:
    logits = random_logits(9, 6, dtype=dtype)
    routing = top_k(logits, 2, scoring=scoring, renormalize=True)
    assert routing.score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert routing.token_index.dtype == routing.expert_index.dtype == torch.int32
    exact = top_k(logits.double(), 2, scoring=scoring, renormalize=True)
    assert torch.equal(routing.expert_index, exact.expert_index)
    torch.testing.assert_close(routing.score.double(), exact.score, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ties_go_to_the_lower_expert(dtype: torch.dtype) -> None:
    # Few distinct values, so that nearly every choice is a tie; both zeros among them.
    logits = torch.randint(-1, 2, (300, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[::2] = torch.where(logits[::2] == 0, -0.0, logits[::2])
    logits[:, ::3] = torch.where(logits[:, ::3] == 0, 0.0, logits[:, ::3])
    experts, _ = by_token(top_k(logits, 11))
    np.testing.assert_array_equal(experts, [best(row, 11) for row in logits.double().numpy()])


def test_tied_groups_go_to_the_lower_group() -> None:
    routing = top_k(torch.zeros(2, 12), 4, scoring="sigmoid", num_groups=4, groups_per_token=2)
    assert routing.expert_index.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("scoring", SCORINGS)
def test_k_equal_to_e_routes_every_token_everywhere(scoring: str) -> None:
    routing = top_k(random_logits(5, 4), 4, scoring=scoring, renormalize=True)
    experts, scores = by_token(routing)
    np.testing.assert_array_equal(np.sort(experts, axis=1), np.tile(np.arange(4), (5, 1)))
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_one_expert_takes_all(scoring: str) -> None:
    routing = top_k(random_logits(5, 1), 1, scoring=scoring, renormalize=True, scale=3.0)
    assert routing.expert_index.tolist() == [0] * 5
    torch.testing.assert_close(routing.score, torch.full((5,), 3.0))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_no_tokens_make_an_empty_routing(scoring: str) -> None:
    logits = torch.empty(0, 8, requires_grad=True)
    routing = top_k(logits, 2, scoring=scoring, renormalize=True, num_groups=4, groups_per_token=2)
    routing.score.sum().backward()
    assert routing.score.shape == routing.expert_index.shape == routing.token_index.shape == (0,)
    assert expert_counts(routing).tolist() == [0] * 8


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradients_agree_with_finite_differences(scoring: str, renormalize: bool) -> None:
    logits = random_logits(4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: top_k(x, 3, scoring=scoring, renormalize=renormalize, scale=1.5).score, (logits,))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_non_finite_logits_count_as_the_extreme_finite_ones(scoring: str) -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[nan, nan, nan, nan], [-inf, nan, 0.0, inf], [inf, 1.0, inf, -inf]], requires_grad=True)
    limits = torch.finfo(torch.float32)
    replaced = torch.nan_to_num(logits.detach(), nan=limits.min, posinf=limits.max, neginf=limits.min)
    assert top_k(logits, 3, scoring=scoring).expert_index.tolist() == [0, 1, 2, 3, 2, 0, 0, 2, 1]
    for options in ({}, {"selection_bias": torch.zeros(4)}, {"num_groups": 2, "groups_per_token": 2}):
        routing = top_k(logits, 3, scoring=scoring, renormalize=True, **options)
        expected = top_k(replaced, 3, scoring=scoring, renormalize=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(routing[:3], expected[:3], strict=True))
        assert routing.score.isfinite().all()
        (gradient,) = torch.autograd.grad(routing.score @ torch.arange(9.0), logits)
        assert gradient.isfinite().all()
        assert not gradient[~logits.isfinite()].any()


def test_bias_of_any_size_never_leaves_the_chosen_groups() -> None:
    # The sums of experts 3 and 4 overflow to -inf, the mark of the experts outside the chosen group.
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([[lowest, lowest, lowest, lowest, lowest, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, lowest, -math.inf, 0.0])
    routing = top_k(logits, 3, scoring="softmax_topk", selection_bias=bias, num_groups=2, group_score="max")
    assert routing.expert_index.tolist() == [5, 3, 4]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_debug_switch_reports_non_finite_logits(bad: float) -> None:
    with debug.checks(), pytest.raises(ValueError, match="logits: must be finite"):
        top_k(torch.tensor([[0.0, bad]]), 1)


def test_full_size_is_routed_within_seconds() -> None:
    logits = torch.randn(32_768, 512, generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    routing = top_k(logits, 10)
    # It takes 0.3 s on one core.
    assert time.perf_counter() - begin < 10
    expected = torch.topk(logits, 10).values
    assert torch.equal(logits.gather(1, routing.expert_index.view(-1, 10).long()), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 9}, ValueError, "k=9: must be between 1 and the number of experts, 8"),
        ({"k": 0}, ValueError, "k=0: must be between 1 and the number of experts, 8"),
        ({"k": 2.0}, TypeError, r"k=2\.0: must be an int"),
        ({"k": None}, TypeError, "k=None: must be an int"),
        ({"num_groups": "2"}, TypeError, "num_groups='2': must be an int"),
        ({"scoring": "tanh"}, ValueError, "scoring='tanh': must be one of softmax, softmax_topk, sigmoid"),
        ({"scale": math.nan}, ValueError, "scale=nan: must be finite"),
        ({"num_groups": 3}, ValueError, "num_groups=3: must be at least 1 and divide the number of experts, 8"),
        ({"num_groups": 0}, ValueError, "num_groups=0: must be at least 1"),
        ({"num_groups": 4, "groups_per_token": 5}, ValueError, "groups_per_token=5: must be between 1 and num_groups=4"),
        ({"num_groups": 4, "groups_per_token": 1, "k": 3}, ValueError, "groups_per_token=1: 1 groups of 2 experts must hold k=3"),
        ({"group_score": "mean"}, ValueError, "group_score='mean': must be one of top2, max"),
        ({"logits": torch.zeros(8)}, ValueError, r"logits: shape \(8,\): must be \(T, E\) with E >= 1"),
        ({"logits": torch.zeros(8, 0)}, ValueError, r"logits: shape \(8, 0\): must be \(T, E\) with E >= 1"),
        ({"logits": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "logits: dtype torch.int64: must be a floating-point dtype"),
        ({"selection_bias": torch.zeros(7)}, ValueError, r"selection_bias: shape \(7,\): must be \(E,\) with E=8"),
        ({"selection_bias": torch.zeros(8, dtype=torch.int64)}, TypeError, "selection_bias: dtype torch.int64: must be a floating"),
        ({"selection_bias": torch.zeros(8, device="meta")}, ValueError, "selection_bias: device meta: must be the logits' device cpu"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 8), "k": 2, **change}
    with pytest.raises(error, match=message):
        top_k(**arguments)
