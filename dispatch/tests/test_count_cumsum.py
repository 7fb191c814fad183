import numpy as np
import pytest
import torch

from dispatch import count_cumsum


def oracle(ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    count = np.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)
    return count, np.cumsum(count)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("length", "num_experts"),
    [(0, 1), (1, 1), (2000, 8), (3001, 50_000), (3999, 128), (4000, 2000), (2_097_152, 128), (2_097_155, 50_000)],
)
def test_counts_equal_numpy(length: int, num_experts: int, dtype: torch.dtype) -> None:
    # A tenth of the ids are sentinels, on both sides of [0, E).
    margin = max(1, num_experts // 20)
    ids = np.random.default_rng(length).integers(-margin, num_experts + margin, size=length)
    count, cumsum = count_cumsum(torch.from_numpy(ids).to(dtype), num_experts)
    expected_count, expected_cumsum = oracle(ids, num_experts)
    np.testing.assert_array_equal(count.numpy(), expected_count)
    np.testing.assert_array_equal(cumsum.numpy(), expected_cumsum)
    assert count.dtype == cumsum.dtype == torch.int32


def test_int64_id_that_would_wrap_in_int32_is_a_sentinel() -> None:
    ids = torch.tensor([2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63), 1])
    count, _ = count_cumsum(ids, 2)
    assert count.tolist() == [0, 1]


def test_extreme_int32_ids_are_sentinels() -> None:
    ids = torch.tensor([2**31 - 1, -(2**31), -1, 0], dtype=torch.int32)
    assert count_cumsum(ids, 1)[0].tolist() == [1]


def test_only_sentinels_count_nothing() -> None:
    count, cumsum = count_cumsum(torch.full((3000,), -1), 4)
    assert count.tolist() == cumsum.tolist() == [0, 0, 0, 0]


def test_all_ids_on_one_expert() -> None:
    count, cumsum = count_cumsum(torch.full((3001,), 2), 4)
    assert count.tolist() == [0, 0, 3001, 0]
    assert cumsum.tolist() == [0, 0, 3001, 3001]


def test_strided_ids_are_read_where_they_are() -> None:
    ids = torch.tensor([[0, 1], [2, 1], [0, 1]])
    assert count_cumsum(ids[:, 0], 3)[0].tolist() == [2, 0, 1]


def test_cumsum_is_left_out_on_request() -> None:
    count, cumsum = count_cumsum(torch.tensor([0, 2, 2]), 3, cumsum=False)
    assert count.tolist() == [1, 0, 2]
    assert cumsum is None


@pytest.mark.parametrize(
    ("ids", "num_experts", "error", "message"),
    [
        (torch.zeros(3), 2, TypeError, r"expert_index: dtype torch.float32: must be torch.int32 or torch.int64"),
        (torch.zeros(3, 1, dtype=torch.int32), 2, ValueError, r"expert_index: shape \(3, 1\): must have one dimension"),
        (torch.zeros(3, dtype=torch.int32), 0, ValueError, r"num_experts=0: must be between 1 and"),
        (torch.zeros(3, dtype=torch.int32), 2.5, TypeError, r"num_experts=2\.5: must be an int"),
    ],
)
def test_bad_input_is_refused_by_name(ids: torch.Tensor, num_experts: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        count_cumsum(ids, num_experts)
