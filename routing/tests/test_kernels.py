"""The routing kernels without a GPU: one variant of each built for sm_90a, read back and emulated, and the rule that says when they run."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cute_runtime
from cute_runtime import emulator
from dispatch import count_cumsum
from routing import hopper, token_rounding, top_k
from routing.kernels import variants
from routing.rounding import capacity
from routing.rounding_hopper import rounded_slots
from routing.scores_hopper import slot_scores, slot_scores_grad
from routing.top_k_hopper import top_k_hopper

LONGEST = {
    "top_k": variants.top_k(dtype="bfloat16", scoring="softmax", by="bias"),
    "slot_scores": variants.slot_scores(scoring="softmax"),
    "slot_scores_grad": variants.slot_scores_grad(dtype="bfloat16", form="csr", scoring="softmax"),
    "rounding_keys": variants.rounding_keys(scoring="softmax"),
    "rounding_select": variants.rounding_select(mode="balanced"),
    "rounding_slots": variants.rounding_slots(step="write"),
}


SEEDS = range(3)


@pytest.fixture(scope="module")
def objects():
    """All of them, two at a time: a compilation is a process of its own."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LONGEST, pool.map(lambda variant: emulator.compiled(variant).object, LONGEST.values()), strict=True))


@pytest.mark.parametrize("kernel", LONGEST)
def test_kernel_keeps_everything_in_registers(objects, kernel):
    (resources,) = cute_runtime.read_resources(objects[kernel])
    assert not resources.uses_local_memory, resources
    # Of 65536 registers: 48 warps of the kernels with a token a warp, two blocks of 1024 threads of the one with an expert a block.
    assert resources.registers <= (32 if kernel == "rounding_select" else 40), resources


def random_logits(tokens: int, experts: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).mul_(2).to(dtype)


def same_in_every_order(function) -> tuple[torch.Tensor, ...]:
    """What the kernels that ``function`` launches give; the same bits for every order of warps and blocks."""
    results = []
    for seed in SEEDS:
        with emulator.emulation(seed=seed) as statistics:
            results.append(function())
        assert statistics
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    return results[0]


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "groups"), [(1, 1, 1, (1, 1)), (13, 300, 8, (1, 1)), (40, 96, 5, (8, 3)), (3, 33, 32, (1, 1))]
)
def test_emulated_top_k_has_pytorchs_choice_and_scores(tokens, experts, k, groups):
    """Chunks of 128 experts with tails, blocks with fewer tokens than warps, groups; every third logit of a token is tied."""
    logits = random_logits(tokens, experts, 1, torch.bfloat16)
    logits[:, ::3] = logits[:, :1].clone()
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(2)) / 100
    bias[::3] = bias[0]
    options = {"renormalize": True, "scale": 2.5, "num_groups": groups[0], "groups_per_token": groups[1]}
    want = top_k(logits, k, selection_bias=bias, **options)
    settings = (k, "softmax", *options.values(), "top2")
    token_index, expert_index, score = same_in_every_order(lambda: top_k_hopper(logits, bias, *settings, None, None))
    assert torch.equal(token_index, want.token_index)
    assert torch.equal(expert_index, want.expert_index)
    torch.testing.assert_close(score, want.score, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize(("tokens", "experts", "k", "tile_m"), [(70, 12, 2, 16), (130, 5, 1, 8)])
def test_emulated_token_rounding_has_pytorchs_slots_and_scores(tokens, experts, k, tile_m):
    logits = random_logits(tokens, experts, 3)
    want = token_rounding(logits, k, tile_m=tile_m, mode="balanced")
    chosen = top_k(logits, k).expert_index
    counts, _ = count_cumsum(chosen, experts)
    slots = capacity(tokens, experts, k, tile_m, "balanced")
    settings = (None, slots, tile_m, "balanced", "softmax")
    token_index, expert_index, token_offsets = same_in_every_order(lambda: rounded_slots(logits, chosen, counts, *settings))
    assert torch.equal(token_index, want.token_index)
    assert torch.equal(expert_index, want.expert_index)
    assert torch.equal(token_offsets, torch.searchsorted(want.token_index, torch.arange(tokens + 1, dtype=torch.int32)).int())
    (score,) = same_in_every_order(lambda: (slot_scores(logits, expert_index, token_offsets, "softmax", False, 1.0, None, None),))
    torch.testing.assert_close(score, want.score, rtol=2e-6, atol=1e-37)


def test_emulated_gradient_of_the_scores_has_float64s_values():
    """Tokens with no slot, one and several."""
    tokens, experts = 21, 70
    counts = torch.arange(tokens) % 4
    token_offsets = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
    generator = torch.Generator().manual_seed(4)
    expert_index = torch.cat([torch.randperm(experts, generator=generator)[:count] for count in counts.tolist()]).int()
    grad = torch.randn(len(expert_index), generator=generator)
    logits = random_logits(tokens, experts, 5, torch.bfloat16)
    exact = logits.double().requires_grad_()
    token = torch.arange(tokens).repeat_interleave(counts)
    (torch.softmax(exact, dim=1)[token, expert_index.long()] * 1.5 * grad).sum().backward()
    (got,) = same_in_every_order(lambda: (slot_scores_grad(logits, expert_index, token_offsets, grad, 0, "softmax", False, 1.5),))
    torch.testing.assert_close(got.double(), exact.grad, rtol=2**-8, atol=1e-6)


def test_every_prebuilt_variant_is_named_once_and_covers_the_layer():
    names = [variant.name for variant in variants.prebuilt_variants()]
    assert len(set(names)) == len(names)
    for scoring in variants.SCORINGS:
        assert f"routing.top_k-by.logit-dtype.float32-scoring.{scoring}" in names
        assert f"routing.slot_scores_grad-dtype.float32-form.csr-scoring.{scoring}" in names
    assert "routing.top_k-by.bias-dtype.float32-scoring.sigmoid" in names


class OnHopper:
    """What the rule asks of logits, for a GPU that is not here."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device, self.is_cuda = dtype, torch.device("cuda", 0), True


@pytest.mark.parametrize(
    ("dtype", "k", "groups_per_token", "supported"),
    [
        (torch.float32, 32, 32, True),
        (torch.bfloat16, 1, 1, True),
        (torch.float16, 8, 4, True),
        (torch.float64, 8, 1, False),
        (torch.float32, 33, 1, False),
        (torch.float32, 8, 33, False),
    ],
)
def test_rule_of_the_kernels(monkeypatch, dtype, k, groups_per_token, supported):
    monkeypatch.setattr(cute_runtime, "is_supported_device", lambda device: True)
    assert hopper.supports(OnHopper(dtype), k, groups_per_token) is supported
    monkeypatch.setattr(cute_runtime, "is_supported_device", lambda device: False)
    assert not hopper.supports(OnHopper(dtype), k, groups_per_token)
    assert not hopper.supports(torch.zeros(2, 2, dtype=dtype), k, groups_per_token)
