"""The routing kernels without a GPU: one variant of each built for sm_90a and read back, and the rule that says when they run."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cute_runtime
from routing import hopper
from routing.kernels import variants

LONGEST = {
    "top_k": variants.top_k(dtype="bfloat16", scoring="softmax", by="bias"),
    "slot_scores": variants.slot_scores(scoring="softmax"),
    "slot_scores_grad": variants.slot_scores_grad(dtype="bfloat16", form="csr", scoring="softmax"),
    "rounding_keys": variants.rounding_keys(scoring="softmax"),
    "rounding_select": variants.rounding_select(mode="balanced"),
    "rounding_slots": variants.rounding_slots(step="write"),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """All of them, two at a time: a compilation is a process of its own."""
    folder = tmp_path_factory.mktemp("out")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LONGEST, pool.map(lambda variant: cute_runtime.build(variant, folder), LONGEST.values()), strict=True))


@pytest.mark.parametrize("kernel", LONGEST)
def test_kernel_keeps_everything_in_registers(objects, kernel):
    (resources,) = cute_runtime.read_resources(objects[kernel])
    assert not resources.uses_local_memory, resources
    # Of 65536 registers: 48 warps of the kernels with a token a warp, two blocks of 1024 threads of the one with an expert a block.
    assert resources.registers <= (32 if kernel == "rounding_select" else 40), resources


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
