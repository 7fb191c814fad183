import numpy as np
import pytest
import torch

from dispatch import debug
from routing import Routing, expert_counts, load_balance_loss, router_z_loss, token_rounding, top_k, wasted_row_ratio


def random_logits(num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def mixtral_loss(logits: np.ndarray, k: int) -> float:
    """Mixtral's auxiliary loss from one-hot masks: E * sum over j and e of mean_t(mask[t, j, e]) * mean_t(P[t, e])."""
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = np.argsort(-probability, axis=1)[:, :k]
    mask = np.eye(logits.shape[1])[chosen]
    return logits.shape[1] * (mask.mean(axis=0) * probability.mean(axis=0)).sum()


@pytest.mark.parametrize("k", [1, 3])
def test_load_balance_loss_is_that_of_switch_and_mixtral(k: int) -> None:
    logits = random_logits(40, 6)
    loss = load_balance_loss(logits, top_k(logits, k))
    np.testing.assert_allclose(loss, mixtral_loss(logits.numpy(), k), rtol=1e-12)


def test_load_balance_loss_of_sigmoids_uses_their_shares() -> None:
    logits = random_logits(40, 6)
    routing = top_k(logits, 2, scoring="sigmoid")
    score = 1 / (1 + np.exp(-logits.numpy()))
    share = (score / score.sum(axis=1, keepdims=True)).mean(axis=0)
    frequency = np.bincount(routing.expert_index.numpy(), minlength=6) / 40
    np.testing.assert_allclose(load_balance_loss(logits, routing, scoring="sigmoid"), 6 * (frequency * share).sum(), rtol=1e-12)


def test_load_balance_loss_is_k_when_balanced_and_e_when_one_expert_takes_all() -> None:
    balanced = torch.zeros(4, 4)
    cycle = Routing(torch.arange(4).int(), torch.arange(4).int(), torch.ones(4), 4, 4, 1)
    torch.testing.assert_close(load_balance_loss(balanced, cycle), torch.tensor(1.0))
    collapsed = torch.tensor([[100.0, 0, 0, 0]]).expand(4, 4)
    torch.testing.assert_close(load_balance_loss(collapsed, top_k(collapsed, 1)), torch.tensor(4.0))


def test_load_balance_loss_does_not_count_sentinels() -> None:
    logits = random_logits(50, 4)
    routing = token_rounding(logits, 2, 8, "nearest")
    counts = expert_counts(routing)
    assert len(routing.score) > counts.sum() == counts.sum() // 8 * 8
    expected = 4 * (counts / 50 * torch.softmax(logits, 1).mean(0)).sum()
    torch.testing.assert_close(load_balance_loss(logits, routing), expected)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradients_of_the_losses_agree_with_finite_differences(scoring: str) -> None:
    logits = random_logits(5, 4).requires_grad_()
    routing = top_k(logits.detach(), 2)
    assert torch.autograd.gradcheck(lambda x: load_balance_loss(x, routing, scoring=scoring), (logits,))
    assert torch.autograd.gradcheck(router_z_loss, (logits,))


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = random_logits(7, 5)
    np.testing.assert_allclose(router_z_loss(logits), (np.log(np.exp(logits.numpy()).sum(axis=1)) ** 2).mean(), rtol=1e-12)


def test_z_loss_shows_a_logit_that_is_not_finite() -> None:
    assert router_z_loss(torch.tensor([[0.0, float("nan")]])).isnan()
    assert router_z_loss(torch.tensor([[0.0, float("inf")]])).isinf()


def test_losses_of_low_precision_logits_are_float32() -> None:
    logits = random_logits(9, 4, torch.bfloat16)
    for loss, exact in (
        (router_z_loss(logits), router_z_loss(logits.double())),
        (load_balance_loss(logits, top_k(logits, 2)), load_balance_loss(logits.double(), top_k(logits, 2))),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_losses_are_zero_without_tokens() -> None:
    logits = torch.empty(0, 4, requires_grad=True)
    loss = load_balance_loss(logits, top_k(logits, 2)) + router_z_loss(logits)
    loss.backward()
    assert loss == 0


def test_expert_counts_skip_sentinels() -> None:
    routing = Routing(torch.zeros(5).int(), torch.tensor([0, 2, -1, 2, 3]).int(), torch.zeros(5), 1, 3, None)
    counts = expert_counts(routing)
    assert counts.tolist() == [1, 0, 2]
    assert counts.dtype == torch.int32


@pytest.mark.parametrize(("counts", "tile", "ratio"), [([4, 1, 0, 3], 4, 1 / 3), ([8, 4], 4, 0.0), ([0, 0], 4, 0.0), ([1], 128, 127 / 128)])
def test_wasted_row_ratio_is_padding_over_hardware_rows(counts: list[int], tile: int, ratio: float) -> None:
    result = wasted_row_ratio(torch.tensor(counts, dtype=torch.int32), tile)
    torch.testing.assert_close(result, torch.tensor(ratio))


def test_bad_input_is_refused_by_name() -> None:
    logits = torch.zeros(3, 4)
    routing = top_k(logits, 1)
    with pytest.raises(ValueError, match=r"logits: shape \(2, 4\): must be the routing's \(T, E\) = \(3, 4\)"):
        load_balance_loss(logits[:2], routing)
    with pytest.raises(ValueError, match="scoring='x': must be one of"):
        load_balance_loss(logits, routing, scoring="x")
    with pytest.raises(ValueError, match=r"logits: shape \(4,\): must be \(T, E\)"):
        router_z_loss(torch.zeros(4))
    with pytest.raises(ValueError, match="tile_m=0: must be at least 1"):
        wasted_row_ratio(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match=r"counts: shape \(1,\), dtype torch.float32: must be \(E,\) integers"):
        wasted_row_ratio(torch.tensor([1.0]), 4)


def test_debug_switch_reports_non_finite_logits_of_the_balance_loss() -> None:
    logits = random_logits(4, 3)
    routing = top_k(logits, 1)
    logits[2, 1] = float("nan")
    assert load_balance_loss(logits, routing).isfinite()
    with debug.checks(), pytest.raises(ValueError, match="logits: must be finite"):
        load_balance_loss(logits, routing)
