import time

import numpy as np
import pytest
import torch

from dispatch import DispatchPlan, debug, plan
from dispatch.kernels.sizes import TICKETS

UNROUTED = -1


def oracle(token: list[int], expert: list[int], num_tokens: int, num_experts: int) -> dict[str, list[int]]:
    """The plan by sorting Python tuples; token lists hold routed slots only."""
    slots = [s for s in range(len(token)) if 0 <= expert[s] < num_experts and 0 <= token[s] < num_tokens]
    rows = sorted(slots, key=lambda s: (expert[s], token[s], s))
    tail = [UNROUTED] * (len(token) - len(rows))
    slot_to_row = [UNROUTED] * len(token)
    for row, slot in enumerate(rows):
        slot_to_row[slot] = row
    return {
        "offsets": [sum(expert[s] < e for s in rows) for e in range(num_experts + 1)],
        "row_to_slot": rows + tail,
        "row_to_token": [token[s] for s in rows] + tail,
        "slot_to_row": slot_to_row,
    }


def check(result: DispatchPlan, token: torch.Tensor, expert: torch.Tensor) -> None:
    expected = oracle(token.tolist(), expert.tolist(), result.num_tokens, result.num_experts)
    for field, values in expected.items():
        got = getattr(result, field)
        assert got.dtype == torch.int32
        assert got.tolist() == values, field
    assert result.tickets.dtype == torch.int32
    assert result.tickets.tolist() == [0] * TICKETS
    if result.slots_per_token is not None:
        assert result.token_offsets is None
        assert result.token_slots is None
        return
    # Each token lists its routed slots in slot order; the lists are a permutation of all slots.
    assert sorted(result.token_slots.tolist()) == list(range(len(token)))
    offsets = result.token_offsets.tolist()
    assert offsets[0] == 0
    assert result.token_offsets.dtype == result.token_slots.dtype == torch.int32
    for t in range(result.num_tokens):
        listed = [s for s in result.token_slots[offsets[t] : offsets[t + 1]].tolist() if expected["slot_to_row"][s] != UNROUTED]
        assert listed == [s for s in range(len(token)) if expected["slot_to_row"][s] != UNROUTED and token[s] == t]


def token_major(num_tokens: int, k: int) -> torch.Tensor:
    return torch.arange(num_tokens).repeat_interleave(k)


def test_docstring_example_of_the_type() -> None:
    slots = token_major(3, 2).int(), torch.tensor([1, 0, 1, 2, 0, 1], dtype=torch.int32)
    for k in (2, None):
        result = plan(*slots, num_tokens=3, num_experts=2, slots_per_token=k)
        assert result.offsets.tolist() == [0, 2, 5]
        assert result.row_to_slot.tolist() == [1, 4, 0, 2, 5, -1]
        assert result.row_to_token.tolist() == [0, 2, 0, 1, 2, -1]
        assert result.slot_to_row.tolist() == [2, 0, 3, -1, 1, 4]
    assert result.token_offsets.tolist() == [0, 2, 3, 5]
    assert result.token_slots.tolist() == [0, 1, 2, 4, 5, 3]


def test_docstring_example_of_the_function() -> None:
    result = plan(torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 9, 1]), num_tokens=2, num_experts=2)
    assert result.offsets.tolist() == [0, 2, 3]
    assert result.row_to_slot.tolist() == [1, 0, 3, -1]
    assert result.row_to_token.tolist() == [0, 1, 0, -1]
    assert result.slot_to_row.tolist() == [1, 0, -1, 2]
    assert result.token_offsets.tolist() == [0, 2, 3]
    assert result.token_slots.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("seed", range(20))
def test_slots_in_any_order_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens, num_experts, slots = (int(n) for n in rng.integers(1, [12, 9, 60]))
    token = torch.from_numpy(rng.integers(0, num_tokens + 1, slots))
    expert = torch.from_numpy(rng.integers(-1, num_experts + 2, slots))
    if seed % 2:
        token, expert = token.int(), expert.int()
    check(plan(token, expert, num_tokens=num_tokens, num_experts=num_experts), token, expert)


@pytest.mark.parametrize("seed", range(10))
def test_token_major_slots_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens, num_experts, k = (int(n) for n in rng.integers(1, [12, 9, 6]))
    token = token_major(num_tokens, k).int()
    expert = torch.from_numpy(rng.integers(-1, num_experts + 2, len(token))).int()
    check(plan(token, expert, num_tokens=num_tokens, num_experts=num_experts, slots_per_token=k), token, expert)


@pytest.mark.parametrize("length", [2000, 3001, 4000])
def test_both_paths_agree_on_token_major_slots(length: int) -> None:
    expert = torch.randint(-1, 301, (length,), generator=torch.Generator().manual_seed(length))
    sizes = {"num_tokens": length, "num_experts": 300}
    fast, general = plan(torch.arange(length), expert, **sizes, slots_per_token=1), plan(torch.arange(length), expert, **sizes)
    for field in ("offsets", "row_to_token", "row_to_slot", "slot_to_row"):
        assert torch.equal(getattr(fast, field), getattr(general, field)), field


@pytest.mark.parametrize("slots_per_token", [2, None])
@pytest.mark.parametrize(
    "expert",
    [[0, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3], [-1, 4, -1, 2**40, -(2**63), 4], [2**32, 1, 2**32 + 1, 3, 0, -(2**32)]],
    ids=["all to the first", "all to the last", "only sentinels", "sentinels that wrap in int32"],
)
def test_edges_equal_brute_force(expert: list[int], slots_per_token: int | None) -> None:
    token, expert = token_major(3, 2), torch.tensor(expert)
    check(plan(token, expert, num_tokens=3, num_experts=4, slots_per_token=slots_per_token), token, expert)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_k_slots_a_token_need_no_tokens(dtype: torch.dtype) -> None:
    expert = torch.tensor([[1, 0], [1, 2], [0, 1]], dtype=dtype)
    sizes = {"num_tokens": 3, "num_experts": 2, "slots_per_token": 2}
    want = plan(token_major(3, 2), expert.flatten(), **sizes)
    strided = expert.T.contiguous().T
    for ids in (expert.flatten(), expert, strided):
        got = plan(None, ids, **sizes)
        for field, one, other in zip(want._fields, got, want, strict=True):
            assert torch.equal(one, other) if torch.is_tensor(other) else one == other, field


def test_slots_whose_token_is_out_of_range_get_no_row() -> None:
    token, expert = torch.tensor([0, 2, -1, 2**32, 1]), torch.tensor([0, 0, 0, 0, 0])
    check(plan(token, expert, num_tokens=2, num_experts=1), token, expert)


@pytest.mark.parametrize("slots_per_token", [3, None])
def test_no_tokens_make_an_empty_plan(slots_per_token: int | None) -> None:
    nothing = torch.empty(0, dtype=torch.int32)
    result = plan(nothing, nothing, num_tokens=0, num_experts=3, slots_per_token=slots_per_token)
    assert result.offsets.tolist() == [0, 0, 0, 0]
    lists = [result.row_to_token, result.row_to_slot, result.slot_to_row]
    if slots_per_token is None:
        assert result.token_offsets.tolist() == [0]
        lists.append(result.token_slots)
    assert all(tensor.shape == (0,) for tensor in lists)


def test_one_expert_takes_all_tokens_in_order() -> None:
    result = plan(torch.tensor([2, 1, 0]), torch.zeros(3, dtype=torch.int64), num_tokens=3, num_experts=1)
    assert result.row_to_token.tolist() == [0, 1, 2]
    assert result.row_to_slot.tolist() == [2, 1, 0]


def test_many_experts_and_tokens_do_not_overflow_the_sort_key() -> None:
    # expert * T is far beyond int32 here.
    num_tokens, num_experts = 2_000_000, 50_000
    result = plan(torch.tensor([1_999_999, 0, 1]), torch.tensor([49_999, 49_999, 30_000]), num_tokens=num_tokens, num_experts=num_experts)
    assert result.row_to_slot.tolist() == [2, 1, 0]
    assert result.offsets[30_000:30_002].tolist() == [0, 1]
    assert result.offsets[-2:].tolist() == [1, 3]


@pytest.mark.parametrize("slots_per_token", [10, None])
def test_full_size_is_planned_within_seconds(slots_per_token: int | None) -> None:
    num_tokens, num_experts, k = 32_768, 512, 10
    expert = torch.randint(0, num_experts, (num_tokens * k,), generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    result = plan(token_major(num_tokens, k), expert, num_tokens=num_tokens, num_experts=num_experts, slots_per_token=slots_per_token)
    # It takes 0.02 s; anything of size R x E would take minutes.
    assert time.perf_counter() - begin < 5
    expected = np.argsort(expert.numpy(), kind="stable")
    np.testing.assert_array_equal(result.row_to_slot.numpy(), expected)


def test_debug_switch_reports_a_token_out_of_range() -> None:
    token, expert = torch.tensor([0, 2]), torch.tensor([0, 0])
    with debug.checks(), pytest.raises(ValueError, match=r"token_index: a routed slot's token is outside \[0, 2\)"):
        plan(token, expert, num_tokens=2, num_experts=1)


def test_debug_switch_lets_a_sentinel_have_any_token() -> None:
    with debug.checks():
        result = plan(torch.tensor([0, 2]), torch.tensor([0, -1]), num_tokens=2, num_experts=1)
    assert result.slot_to_row.tolist() == [0, -1]


def test_debug_switch_reports_slots_that_are_not_token_major() -> None:
    with debug.checks(), pytest.raises(ValueError, match=r"slots_per_token=1: slot t \* 1 \+ j must belong to token t"):
        plan(torch.tensor([1, 0]), torch.tensor([0, 0]), num_tokens=2, num_experts=1, slots_per_token=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_index": torch.zeros(4)}, TypeError, "token_index: dtype torch.float32: must be torch.int32 or torch.int64"),
        ({"expert_index": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"expert_index: shape \(2, 2\): must have one dimension"),
        ({"token_index": torch.zeros(3, dtype=torch.int32)}, ValueError, "token_index: length 3: must equal expert_index's length 4"),
        ({"token_index": torch.zeros(4, dtype=torch.int32, device="meta")}, ValueError, "token_index: device meta: must equal .* cpu"),
        ({"num_tokens": -1}, ValueError, "num_tokens=-1: must be between 0 and"),
        ({"num_tokens": 2.0}, TypeError, "^num_tokens=2.0: must be an int$"),
        ({"num_experts": 2.5}, TypeError, "^num_experts=2.5: must be an int$"),
        ({"slots_per_token": 2.0}, TypeError, "^slots_per_token=2.0: must be an int$"),
        ({"num_experts": 0}, ValueError, "num_experts=0: must be between 1 and"),
        ({"slots_per_token": 3}, ValueError, r"slots_per_token=3: num_tokens \* slots_per_token must equal the 4 slots, num_tokens is 2"),
        ({"token_index": None}, ValueError, "token_index=None: must be a tensor where slots_per_token is None"),
        (
            {"token_index": None, "expert_index": torch.zeros(4, 1, dtype=torch.int32), "slots_per_token": 2},
            ValueError,
            r"expert_index: shape \(4, 1\): must be \(num_tokens, slots_per_token\) = \(2, 2\) or flat",
        ),
        (
            {"token_index": None, "expert_index": torch.zeros(2, 2), "slots_per_token": 2},
            TypeError,
            "expert_index: dtype torch.float32: must be torch.int32 or torch.int64",
        ),
        (
            {"token_index": None, "expert_index": torch.zeros(2, 1, 2, dtype=torch.int32), "slots_per_token": 2},
            ValueError,
            r"expert_index: shape \(2, 1, 2\): must have one dimension",
        ),
        ({"token_index": None, "slots_per_token": 3}, ValueError, r"slots_per_token=3: num_tokens \* slots_per_token must equal the 4"),
        ({"slots_per_token": 0}, ValueError, "slots_per_token=0: must be between 1 and"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, error: type[Exception], message: str) -> None:
    slots = torch.zeros(4, dtype=torch.int32)
    arguments = {"token_index": slots, "expert_index": slots, "num_tokens": 2, "num_experts": 2, **change}
    with pytest.raises(error, match=message):
        plan(**arguments)
