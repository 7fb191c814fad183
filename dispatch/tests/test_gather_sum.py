import numpy as np
import pytest
import torch

from dispatch import DispatchPlan, gather_sum, plan

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def random_plan(seed: int, num_tokens: int = 37, num_experts: int = 7, slots: int = 150) -> DispatchPlan:
    """Slots in no order, some tokens without any, a fifth of them sentinels, so that the rows have a tail."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(0, num_tokens, (slots,), generator=generator)
    expert = torch.randint(-1, num_experts + 1, (slots,), generator=generator)
    return plan(token, expert, num_tokens=num_tokens, num_experts=num_experts)


def token_major_plan(seed: int, num_tokens: int = 37, num_experts: int = 7, k: int = 4) -> DispatchPlan:
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(-1, num_experts + 1, (num_tokens * k,), generator=generator)
    token = torch.arange(num_tokens).repeat_interleave(k)
    return plan(token, expert, num_tokens=num_tokens, num_experts=num_experts, slots_per_token=k)


def inputs(p: DispatchPlan, dtype: torch.dtype, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal rows, with NaN in the tail, and a score for every slot, sentinels included."""
    generator = torch.Generator().manual_seed(1)
    slots = p.slot_to_row.shape[0]
    rows = torch.randn(slots, width, generator=generator, dtype=torch.float64).to(dtype)
    rows[p.offsets[-1] :] = float("nan")
    return rows, torch.rand(slots, generator=generator)


def sum_one_by_one(rows: torch.Tensor, score: torch.Tensor | None, p: DispatchPlan, dtype: type) -> np.ndarray:
    """(T, H) numpy, one slot after the other in ``dtype``."""
    values = rows.double().numpy().astype(dtype)
    out = np.zeros((p.num_tokens, rows.shape[1]), dtype)
    for slot, row in enumerate(p.slot_to_row.tolist()):
        if row >= 0:
            weight = dtype(1) if score is None else score.double().numpy().astype(dtype)[slot]
            out[p.row_to_token[row]] += weight * values[row]
    return out


def test_docstring_example() -> None:
    p = plan(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 1]), num_tokens=2, num_experts=2, slots_per_token=2)
    assert p.slot_to_row.tolist() == [2, 0, 1, 3]
    out = gather_sum(torch.tensor([[10.0], [20.0], [30.0], [40.0]]), torch.tensor([1.0, 2.0, 3.0, 4.0]), p)
    assert out.tolist() == [[50.0], [220.0]]


@pytest.mark.parametrize("make_plan", [random_plan, token_major_plan])
@pytest.mark.parametrize("scored", [True, False])
def test_float32_bits_are_those_of_a_sum_in_slot_order(make_plan, scored: bool) -> None:
    p = make_plan(0)
    rows, score = inputs(p, torch.float32)
    score = score if scored else None
    np.testing.assert_array_equal(gather_sum(rows, score, p).numpy(), sum_one_by_one(rows, score, p, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    p = random_plan(2)
    rows, score = inputs(p, dtype)
    out = gather_sum(rows, score, p)
    wide = np.float64 if dtype == torch.float64 else np.float32
    assert out.dtype == dtype
    assert torch.equal(out, torch.from_numpy(sum_one_by_one(rows, score, p, wide)).to(dtype))


def test_bits_do_not_depend_on_threads() -> None:
    p = random_plan(3, num_tokens=500, num_experts=16, slots=2000)
    rows, score = inputs(p, torch.bfloat16, width=300)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = rows.clone().requires_grad_(), score.clone().requires_grad_()
            out = gather_sum(*leaves, p)
            results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_blocks_give_the_bits_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    p = random_plan(4)
    rows, score = inputs(p, torch.float32)
    whole = gather_sum(rows, score, p)
    monkeypatch.setattr("dispatch.gathering._BLOCK_ELEMENTS_CPU", 3 * rows.shape[1])
    assert torch.equal(gather_sum(rows, score, p), whole)


@pytest.mark.parametrize("make_plan", [random_plan, token_major_plan])
def test_gradients_agree_with_finite_differences(make_plan) -> None:
    p = make_plan(5, num_tokens=5, num_experts=3, **({"slots": 12} if make_plan is random_plan else {"k": 2}))
    rows, score = inputs(p, torch.float64, width=3)
    rows = rows.nan_to_num().requires_grad_()
    score = score.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows, score: gather_sum(rows, score, p), (rows, score))
    assert torch.autograd.gradcheck(lambda rows: gather_sum(rows, None, p), (rows,))


def test_tail_and_sentinels_get_zero_gradient_whatever_the_tail_holds() -> None:
    p = random_plan(6)
    rows, score = inputs(p, torch.float32)
    rows.requires_grad_()
    score.requires_grad_()
    gather_sum(rows, score, p).square().sum().backward()
    assert rows.grad[p.offsets[-1] :].eq(0).all()
    assert score.grad[p.slot_to_row < 0].eq(0).all()
    assert rows.grad.isfinite().all()
    assert score.grad[p.slot_to_row >= 0].ne(0).all()


@pytest.mark.parametrize("needed", ["rows", "score"])
def test_only_the_asked_gradient_is_computed_and_saved(needed: str) -> None:
    p = token_major_plan(7)
    rows, score = inputs(p, torch.float32)
    (rows if needed == "rows" else score).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor):
        out = gather_sum(rows, score, p)
    assert (rows.shape in saved) == (needed == "score")
    out.sum().backward()
    assert (rows.grad is not None, score.grad is not None) == (needed == "rows", needed == "score")


def test_gradients_keep_their_dtypes() -> None:
    p = token_major_plan(8)
    rows, score = inputs(p, torch.bfloat16)
    rows.requires_grad_()
    score.requires_grad_()
    gather_sum(rows, score, p).sum().backward()
    assert (rows.grad.dtype, score.grad.dtype) == (torch.bfloat16, torch.float32)


def test_token_without_rows_gets_zeros() -> None:
    p = plan(torch.tensor([0, 2, 1]), torch.tensor([0, 0, -1]), num_tokens=4, num_experts=1)
    out = gather_sum(torch.tensor([[1.0], [2.0], [float("nan")]]), None, p)
    assert out.tolist() == [[1.0], [0.0], [2.0], [0.0]]


def test_only_sentinels_give_zeros_and_zero_gradients() -> None:
    p = plan(torch.arange(3), torch.full((3,), -1), num_tokens=3, num_experts=2, slots_per_token=1)
    rows, score = torch.full((3, 2), float("nan"), requires_grad=True), torch.ones(3, requires_grad=True)
    out = gather_sum(rows, score, p)
    out.sum().backward()
    assert not out.any()
    assert not rows.grad.any()
    assert not score.grad.any()


def test_no_tokens_give_an_empty_sum() -> None:
    nothing = torch.empty(0, dtype=torch.int32)
    p = plan(nothing, nothing, num_tokens=0, num_experts=2, slots_per_token=4)
    rows, score = torch.empty(0, 5, requires_grad=True), torch.empty(0, requires_grad=True)
    out = gather_sum(rows, score, p)
    out.sum().backward()
    assert out.shape == (0, 5)
    assert (rows.grad.shape, score.grad.shape) == ((0, 5), (0,))


def test_sentinel_slots_without_tokens_are_no_trouble() -> None:
    p = plan(torch.zeros(2, dtype=torch.int32), torch.full((2,), -1), num_tokens=0, num_experts=2)
    rows, score = torch.ones(2, 5, requires_grad=True), torch.ones(2, requires_grad=True)
    gather_sum(rows, score, p).sum().backward()
    assert not rows.grad.any()
    assert not score.grad.any()


@pytest.mark.parametrize(
    ("rows", "score", "error", "message"),
    [
        (torch.zeros(148, 8, dtype=torch.int32), None, TypeError, "rows: dtype torch.int32: must be a floating-point dtype"),
        (torch.zeros(147, 8), None, ValueError, r"rows: shape \(147, 8\): must be \(R, H\) with the plan's R=148"),
        (torch.zeros(148), None, ValueError, r"rows: shape \(148,\): must be \(R, H\)"),
        (torch.zeros(148, 8, device="meta"), None, ValueError, "rows: device meta: must be the plan's device cpu"),
        (torch.zeros(148, 8), torch.zeros(148, dtype=torch.int64), TypeError, "score: dtype torch.int64: must be a floating-point"),
        (torch.zeros(148, 8), torch.zeros(148, 1), ValueError, r"score: shape \(148, 1\): must be \(R,\) with the plan's R=148"),
        (torch.zeros(148, 8), torch.zeros(148, device="meta"), ValueError, "score: device meta: must be rows' device cpu"),
    ],
)
def test_bad_input_is_refused_by_name(rows: torch.Tensor, score: torch.Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gather_sum(rows, score, token_major_plan(0))


@pytest.mark.parametrize("count", [3, 9])
def test_any_number_of_rows_will_do_that_holds_those_in_use(count: int):
    expert = torch.tensor([0, 5, 1, 0, 5, 5])  # three of six slots have a row
    layout = plan(None, expert, num_tokens=3, num_experts=2, slots_per_token=2)
    rows = torch.arange(count * 8, dtype=torch.float32).view(count, 8)
    want = torch.stack([rows[0], rows[2] + rows[1], torch.zeros(8)])
    assert torch.equal(gather_sum(rows, None, layout, any_rows=True), want)
    with pytest.raises(ValueError, match=r"^rows: shape \(\d, 8\): must be \(R, H\) with the plan's R=6$"):
        gather_sum(rows, None, layout)
    with pytest.raises(ValueError, match=r"^any_rows=True: rows and score must need no gradient$"):
        gather_sum(rows.requires_grad_(), None, layout, any_rows=True)
