"""A decode step on the kernels, emulated: four launches from a router's ids and scores to the output, with the bits of the long way."""

import pytest
import torch

from cute_runtime import emulator
from dispatch import plan_hopper
from routing import Routing
from sonicmoe import accuracy, backends, oracle, routed_experts

H, I, E, K = 136, 72, 6, 2


@pytest.fixture
def on_hopper(monkeypatch):
    """CPU tensors pass for those of an sm_90 GPU, wherever a backend is chosen."""
    monkeypatch.setattr(backends, "is_hopper", lambda device: True)
    plan_hopper.uniform_launch.cache_clear()
    yield
    plan_hopper.uniform_launch.cache_clear()


def draw(tokens):
    """x, w_up, w_down in bfloat16, int64 ids with a sentinel, and scores in bfloat16."""
    generator = torch.Generator().manual_seed(tokens)
    shapes, scales = ((tokens, H), (E, 2 * I, H), (E, H, I)), (1, H**-0.5, I**-0.5)
    inputs = [(torch.randn(shape, generator=generator) * scale).bfloat16() for shape, scale in zip(shapes, scales, strict=True)]
    scores, ids = torch.rand(tokens, E, generator=generator).bfloat16().topk(K)
    ids[0, 1] = E
    return *inputs, ids, scores


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_step_takes_four_launches_and_has_the_long_ways_bits(on_hopper, monkeypatch, tokens):
    *inputs, ids, scores = draw(tokens)
    routing = Routing(None, ids.flatten(), scores.flatten(), tokens, E, K)
    written_out = routing._replace(token_index=routing.tokens(), expert_index=routing.expert_index.int(), score=routing.score.float())
    outs = []
    for seed in range(3):
        with torch.no_grad(), emulator.emulation(seed=seed) as launches:
            outs.append(routed_experts(*inputs, routing, gate_up_layout="concatenated"))
        assert len(launches) == 4
    monkeypatch.setattr(plan_hopper, "ONE_BLOCK_SLOTS", 0)
    plan_hopper.uniform_launch.cache_clear()
    with torch.no_grad(), emulator.emulation() as launches, backends.one_by_one():
        outs.append(routed_experts(*inputs, written_out, gate_up_layout="concatenated"))
    assert len(launches) == 5
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    want = oracle.experts(*inputs, routing, torch.zeros_like(inputs[0]), gate_up_layout="concatenated")
    assert accuracy.measure("o", outs[0], want["o"]).worst_block < accuracy.THRESHOLDS[torch.bfloat16].worst_block


@pytest.mark.parametrize("tiled", [True, False], ids=["down-projection", "gather_sum"])
def test_a_launch_that_does_not_wait_for_the_one_before_is_caught(on_hopper, tiled):
    """Of the four kernels these two have a griddepcontrol.wait; one with tiles, one without."""
    *inputs, ids, scores = draw(8)
    routing = Routing(None, ids.flatten(), scores.flatten(), 8, E, K)

    def edit(ptx):
        return ptx.replace("griddepcontrol.wait;", "") if ("cp.async.bulk.tensor" in ptx) == tiled else ptx

    message = "reads argument 0 .*, which the launch before writes, without a griddepcontrol.wait before"
    with torch.no_grad(), emulator.emulation(edit=edit), pytest.raises(emulator.EmulationError, match=message):
        routed_experts(*inputs, routing, gate_up_layout="concatenated")


def test_a_wait_that_a_block_without_a_tile_leaves_out_is_caught(on_hopper):
    """Its launch could end before the one before it, and what follows start too early."""
    *inputs, ids, scores = draw(1)
    routing = Routing(None, torch.full_like(ids, E).flatten(), scores.flatten(), 1, E, K)  # sentinels alone

    def edit(ptx):
        return ptx.replace("griddepcontrol.wait;", "") if "cp.async.bulk.tensor" in ptx else ptx

    message = r"the block ends without a griddepcontrol\.wait"
    with torch.no_grad(), emulator.emulation(edit=edit), pytest.raises(emulator.EmulationError, match=message):
        routed_experts(*inputs, routing, gate_up_layout="concatenated")


def test_a_step_of_transformers_experts_takes_four_launches(on_hopper):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from sonicmoe.integrations.transformers import NAME

    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = NAME
    experts = Qwen3MoeExperts(config).bfloat16()
    x, w_up, w_down, ids, scores = draw(3)
    ids = ids.clamp(max=E - 1)
    experts.gate_up_proj.data, experts.down_proj.data = w_up, w_down
    with torch.no_grad(), emulator.emulation() as launches:
        got = experts(x, ids, scores)
    assert len(launches) == 4
    want = type(experts).forward.__wrapped__(experts.double(), x.double(), ids, scores.double())
    assert accuracy.measure("o", got, want.detach()).worst_block < accuracy.THRESHOLDS[torch.bfloat16].worst_block
