"""The oracle against numbers worked out by hand: it must not depend on what it judges."""

import math

import pytest
import torch

from routing import Routing, top_k
from sonicmoe import oracle


def make_routing(tokens, experts, score, *, num_tokens, num_experts):
    indices = (torch.tensor(values, dtype=torch.int32) for values in (tokens, experts))
    return Routing(*indices, torch.tensor(score), num_tokens, num_experts, None)


def test_two_tokens_two_experts_by_hand():
    """reglu, H = I = 1: o = sum of s * w_down * relu(w_gate x) * (w_up x)."""
    x = torch.tensor([[2.0], [3.0]])
    w_up = torch.tensor([[[1.0], [2.0]], [[-1.0], [1.0]]])
    w_down = torch.tensor([[[5.0]], [[7.0]]])
    routing = make_routing([0, 1, 1, 0], [0, 0, 1, 9], [0.5, 0.25, 0.75, 0.0], num_tokens=2, num_experts=2)
    result = oracle.experts(x, w_up, w_down, routing, torch.ones(2, 1), activation="reglu")
    # Token 0 at expert 0: 0.5 * 5 * relu(2) * 4. Token 1 at expert 0: 0.25 * 5 * 3 * 6; its expert 1 has a negative gate.
    assert result["o"].tolist() == [[20.0], [22.5]]
    assert result["dx"].tolist() == [[20.0], [15.0]]  # derivative of s * 5 * 2 x^2
    assert result["dscore"].tolist() == [40.0, 90.0, 0.0, 0.0]
    assert result["dw_down"].tolist() == [[[0.5 * 8 + 0.25 * 18]], [[0.0]]]
    # Gate and up get each other's value times x: token 0 gives 2.5 * (4, 2) * 2, token 1 gives 1.25 * (6, 3) * 3.
    assert result["dw_up"].tolist() == [[[42.5], [21.25]], [[0.0], [0.0]]]


def test_biases_take_part_in_value_and_gradient():
    routing = make_routing([0], [1], [0.5], num_tokens=1, num_experts=2)
    result = oracle.experts(
        torch.tensor([[1.0]]),
        torch.tensor([[[1.0]], [[2.0]]]),
        torch.tensor([[[1.0]], [[3.0]]]),
        routing,
        torch.tensor([[10.0]]),
        b_up=torch.tensor([[9.0], [1.0]]),
        b_down=torch.tensor([[9.0], [4.0]]),
        activation="relu_squared",
    )
    assert result["o"].tolist() == [[0.5 * (3 * 9 + 4)]]
    assert result["db_down"].tolist() == [[0.0], [5.0]]
    assert result["db_up"].tolist() == [[0.0], [10 * 0.5 * 3 * 2 * 3]]
    assert result["dscore"].tolist() == [10.0 * 31]


def test_concatenated_layout_splits_in_halves():
    routing = make_routing([0], [0], [1.0], num_tokens=1, num_experts=1)
    w_up = torch.tensor([[[1.0], [2.0], [10.0], [20.0]]])
    arguments = (torch.tensor([[1.0]]), w_up, torch.tensor([[[1.0, 1.0]]]), routing, torch.ones(1, 1))
    assert oracle.experts(*arguments, activation="reglu", gate_up_layout="concatenated")["o"].item() == 1 * 10 + 2 * 20
    assert oracle.experts(*arguments, activation="reglu", gate_up_layout="interleaved")["o"].item() == 1 * 2 + 10 * 20


def test_swiglu_oai_by_hand():
    """Rows of x select (gate, up): inside, gate beyond 7, up beyond -7 (where up + 1 = -6)."""
    gate_up = torch.tensor([[1.0, 2.0], [9.0, 0.5], [1.0, -8.0]])
    routing = make_routing([0, 1, 2], [0, 0, 0], [1.0, 1.0, 1.0], num_tokens=3, num_experts=1)
    down = torch.tensor([[[1.0], [0.0]]])
    result = oracle.experts(gate_up, torch.eye(2)[None], down, routing, torch.ones(3, 2), activation="swiglu_oai")
    one, seven = 1 / (1 + math.exp(-1.702)), 7 / (1 + math.exp(-1.702 * 7))
    assert result["o"][:, 0].tolist() == pytest.approx([3 * one, 1.5 * seven, -6 * one])
    slope = one * (1 + 1.702 * (1 - one))
    assert result["dx"].flatten().tolist() == pytest.approx([3 * slope, one, 0, seven, -6 * slope, 0])


def test_scores_by_hand():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]], dtype=torch.float64)
    routing = make_routing([0, 0, 1], [1, 2, 3], [0.0, 0.0, 0.0], num_tokens=1, num_experts=3)
    make = {"renormalize": False, "scale": 1.0}
    assert oracle.scores(logits, routing, scoring="softmax", **make).tolist() == pytest.approx([2 / 8, 5 / 8, 0])
    assert oracle.scores(logits, routing, scoring="softmax_topk", **make).tolist() == pytest.approx([2 / 7, 5 / 7, 0])
    assert oracle.scores(logits, routing, scoring="sigmoid", **make).tolist() == pytest.approx([2 / 3, 5 / 6, 0])
    assert oracle.scores(logits, routing, scoring="sigmoid", renormalize=True, scale=3.0).tolist() == pytest.approx([4 / 3, 5 / 3, 0])


def test_router_gradient_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight, w_up, w_down, dout = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 2), (3, 2), (3, 4, 2), (3, 2, 2), (4, 2))
    )
    routing = top_k(x @ weight.T, 2)
    result = oracle.layer(x, weight, w_up, w_down, routing, dout)

    def loss(x, weight):
        return (oracle.layer(x, weight, w_up, w_down, routing, dout)["o"] * dout).sum().item()

    step = 1e-6
    for name, tensor in (("dx", x), ("drouter", weight)):
        nudge = torch.zeros_like(tensor)
        nudge[2, 1] = step
        ends = [(x + sign * nudge, weight) if name == "dx" else (x, weight + sign * nudge) for sign in (1, -1)]
        slope = (loss(*ends[0]) - loss(*ends[1])) / (2 * step)
        assert result[name][2, 1].item() == pytest.approx(slope, rel=1e-6)


def test_sizes_by_hand():
    """Of one token and one expert whose y is (3, 4), with dout (1, -1): dscore is -1, and 5 on average over signs, times 1 + 4 / 1."""
    x = torch.tensor([[2.0, 0.0]])
    w_up, w_down = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([[[3.0 / 4], [4.0 / 4]], [[0.0], [0.0]]])
    routing = make_routing([0], [0], [1.0], num_tokens=1, num_experts=2)
    arguments = (routing, torch.tensor([[1.0, -1.0]]))
    result = oracle.experts(x, w_up, w_down, *arguments, activation="relu_squared")
    assert (result["dscore"].item(), result["dscore size"].item()) == (-1, 25)
    # A sigmoid of 0 has the derivative 1/4: drouter is x / 4 * dscore in row 0. Both rows have half the floor of 1e-3 * 25 * |x| squared.
    result = oracle.layer(x, torch.zeros(2, 2), w_up, w_down, *arguments, scoring="sigmoid", activation="relu_squared")
    assert result["drouter"].tolist() == [[-0.5, 0.0], [0.0, 0.0]]
    floor = 1e-3 * 50 / math.sqrt(2)
    assert result["drouter size"].tolist() == pytest.approx([math.hypot(12.5, floor), floor])
    assert "dscore size" not in result
