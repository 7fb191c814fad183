import pytest
import torch

from routing import RouterConfig
from sonicmoe import cases
from sonicmoe.activations import ACTIVATIONS
from sonicmoe.thiek import Thiek

THIEK = Thiek(200, 64, 32, 8, 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_outputs_are_of_order_one(activation, scoring):
    case = cases.make_case(THIEK, seed=0, router=RouterConfig(k=2, scoring=scoring), dtype=torch.float32, activation=activation)
    with torch.no_grad():
        assert 0.7 < case.layer()(case.x).std() < 1.4


def test_a_seed_gives_the_same_values_and_another_gives_others():
    first, again, other = (cases.make_case(THIEK, seed=seed, bias=True) for seed in (0, 0, 1))
    for name in ("x", "router_weight", "w_up", "w_down", "b_up", "b_down", "dout"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_fresh_tokens_keep_the_experts():
    case = cases.make_case(THIEK, seed=0)
    fresh = case.with_fresh_tokens(1)
    assert fresh.w_up is case.w_up
    for name in ("x", "router_weight", "dout"):
        assert not torch.equal(getattr(fresh, name), getattr(case, name))


def test_layer_shares_the_cases_memory():
    case = cases.make_case(THIEK, seed=0, bias=True)
    layer = case.layer()
    assert layer.w_up.data_ptr() == case.w_up.data_ptr()
    assert {name for name, _ in layer.named_parameters()} == {"router.weight", "w_up", "w_down", "b_up", "b_down"}


def test_memory_estimate_covers_the_tensors_that_must_exist():
    T, H, I, E, K = thiek = Thiek(4096, 4096, 1024, 256, 8)
    weights = 3 * E * H * I
    timed = cases.memory_bytes(thiek, dtype=torch.bfloat16, activation="swiglu", test=False)
    tested = cases.memory_bytes(thiek, dtype=torch.bfloat16, activation="swiglu", test=True)
    must_exist = 2 * (2 * weights + T * K * 2 * I)
    assert must_exist + 2 * weights < timed < 2 * must_exist
    assert must_exist + 8 * weights < tested < 60 * 2**30  # fits an 80 GB GPU


def test_impossible_cases_are_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok=9: must be at most num_experts=8"):
        cases.make_case(THIEK._replace(K=9), seed=0)
    with pytest.raises(ValueError, match=r"activation='swish'"):
        cases.make_case(THIEK, seed=0, activation="swish")
