"""The judge is judged: each way of being wrong that it exists for must fail."""

import dataclasses
import math

import pytest
import torch

from routing import RouterConfig
from sonicmoe import accuracy, cases
from sonicmoe.accuracy import Error, Threshold, failures, measure
from sonicmoe.thiek import Thiek

THRESHOLD = accuracy.THRESHOLDS[torch.bfloat16]


@pytest.fixture(scope="module")
def result():
    """A correct bfloat16 result and its oracle; 300 tokens are two whole blocks and a tail."""
    case = cases.make_case(Thiek(300, 32, 16, 8, 2), seed=0)
    got, routing = cases.run(case.layer("reference"), case)
    return got, case.oracle(routing)


def judged(result, name, change):
    got, oracle = result
    changed = got[name].clone()
    change(changed)
    return failures({name: measure(name, changed, oracle[name])}, THRESHOLD)


def test_a_correct_result_passes(result):
    got, oracle = result
    assert failures(accuracy.measure_all(got, oracle), THRESHOLD) == []


@pytest.mark.parametrize("name", ["o", "dx", "dw_up", "dw_down", "drouter"])
def test_zeros_fail(result, name):
    found = judged(result, name, lambda tensor: tensor.zero_())
    assert found == [f"{name} whole 1.00e+00 is above 8.0e-03", f"{name} worst_block 1.00e+00 is above 1.6e-02"]


@pytest.mark.parametrize("name", ["dw_up", "dw_down", "drouter"])
def test_two_swapped_experts_fail(result, name):
    assert judged(result, name, lambda tensor: tensor.copy_(tensor[[0, 1, 5, 3, 4, 2, 6, 7]]))


@pytest.mark.parametrize("name", ["o", "dx"])
def test_one_dropped_tail_row_fails(result, name):
    assert judged(result, name, lambda tensor: tensor[-1].zero_())


def test_one_wrong_expert_cannot_hide_in_the_average():
    """4096 experts, of which one is wrong: 1.6% of the whole norm, 100% of its own."""
    oracle = torch.ones(4096, 8, dtype=torch.float64)
    got = oracle.clone()
    got[17] = 0
    error = measure("db_down", got, oracle)
    assert error.whole == pytest.approx(1 / 64)
    assert error.worst_block == 1.0


def test_tiny_values_are_not_excused_by_an_absolute_tolerance(result):
    _, oracle = result
    tiny = oracle["o"] * 1e-9
    assert failures({"o": measure("o", torch.zeros_like(tiny), tiny)}, THRESHOLD)
    assert failures({"o": measure("o", tiny * 1.1, tiny)}, THRESHOLD)
    assert not failures({"o": measure("o", tiny * 1.001, tiny)}, THRESHOLD)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(result, poison):
    found = judged(result, "o", lambda tensor: tensor[7].fill_(poison))
    assert found == ["o whole inf is above 8.0e-03", "o worst_block inf is above 1.6e-02"]
    assert failures({"o": Error(math.nan, math.nan, math.nan)}, Threshold(1.0, 1.0))


def test_an_expert_without_rows_must_be_exactly_zero():
    oracle = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    assert measure("db_down", oracle.clone(), oracle) == Error(0.0, 0.0, 0.0)
    got = torch.tensor([[1.0], [1e-30]], dtype=torch.float64)
    error = measure("db_down", got, oracle)
    assert error.worst_block == math.inf


def test_an_empty_tensor_has_no_error():
    assert measure("o", torch.empty(0, 8), torch.empty(0, 8, dtype=torch.float64)) == Error(0.0, 0.0, 0.0)


def test_shapes_dtypes_and_names_must_agree():
    oracle = torch.zeros(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"o has shape \(4, 1\): must be the oracle's \(4, 8\)"):
        measure("o", torch.zeros(4, 1), oracle)
    with pytest.raises(TypeError, match=r"o has dtype torch.int32"):
        measure("o", torch.zeros(4, 8, dtype=torch.int32), oracle)
    with pytest.raises(TypeError, match=r"no wider than the oracle's torch.float32"):
        measure("o", torch.zeros(4, 8, dtype=torch.float64), oracle.float())
    with pytest.raises(ValueError, match=r"name='dz': must be one of o, dx"):
        measure("dz", oracle, oracle)
    with pytest.raises(ValueError, match=r"got dx, o: must be the oracle's tensors o"):
        accuracy.measure_all({"o": oracle, "dx": oracle}, {"o": oracle})
    with pytest.raises(ValueError, match=r"o: the oracle is not finite"):
        measure("o", oracle, oracle.clone().fill_(math.nan))


ROUTERS = {
    "softmax": RouterConfig(k=2),
    "softmax of one": RouterConfig(k=1),
    "softmax of all": RouterConfig(k=8),
    "renormalized": RouterConfig(k=2, renormalize=True),
    "renormalized over one, no gradient": RouterConfig(k=1, renormalize=True),
    "sigmoid": RouterConfig(k=2, scoring="sigmoid", renormalize=True),
}


def few_tokens(router, seed, tokens=5):
    case = cases.make_case(Thiek(tokens, 32, 16, 8, router.k), seed=seed, router=router)
    got, routing = cases.run(case.layer("reference"), case)
    return case, got, routing, case.oracle(routing)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_a_correct_router_of_few_tokens_passes(router, tokens):
    """Relative to itself alone each second of these gradients would be above the threshold."""
    for seed in range(10):
        _, got, _, oracle = few_tokens(router, seed, tokens)
        assert failures(accuracy.measure_all(got, oracle), THRESHOLD) == [], seed


@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_router_of_few_tokens_fails(seed):
    case, got, routing, oracle = few_tokens(ROUTERS["softmax"], seed)
    right = got["drouter"]
    without = dataclasses.replace(case, dout=case.dout.index_fill(0, torch.tensor([3]), 0)).oracle(routing)["drouter"]
    planted = {
        "5 % too large": right.float() * 1.05,
        "5 % too small": right.float() * 0.95,
        "a token dropped": right.double() - oracle["drouter"] + without,
        "rows exchanged": right[[0, 1, 5, 3, 4, 2, 6, 7]],
        "not a number": right.clone().fill_(math.nan),
    }
    for name, wrong in planted.items():
        error = measure("drouter", wrong.to(right.dtype), oracle["drouter"], oracle["drouter size"])
        assert failures({"drouter": error}, THRESHOLD), name


def test_a_row_counts_as_its_size_and_as_a_share_of_the_typical_row():
    """Rows of norm 10, 1 and 0 and sizes 2, 4 and 0, each off by 0.1; the typical row is 0.3 of sqrt(101 / 3) = 1.74."""
    oracle = torch.tensor([[10.0], [1.0], [0.0]], dtype=torch.float64)
    size = torch.tensor([2.0, 4.0, 0.0], dtype=torch.float64)
    error = measure("drouter", oracle + 0.1, oracle, size)
    assert error.whole == pytest.approx(0.1 * math.sqrt(3 / 101))
    assert error.worst_block == pytest.approx(0.1 / (0.3 * math.sqrt(101 / 3)))
    only = torch.tensor([[0.0], [0.1], [0.0]], dtype=torch.float64)
    assert measure("drouter", oracle + only, oracle, size).worst_block == pytest.approx(0.1 / 4)
    assert measure("drouter", oracle + only, oracle, 10 * size).whole == pytest.approx(0.1 / math.sqrt(20**2 + 40**2))
