"""Expert parallelism on two GPUs of one host with NCCL, and with symmetric memory where torch has NVSHMEM."""

import pytest
import torch

from sonicmoe import accuracy
from sonicmoe.cases import DTYPES
from sonicmoe.kernels.variants import layer_variants
from sonicmoe.parallel import symmetric
from sonicmoe.tests import parallel_checks as checks
from sonicmoe.tests.kernel_options import kernel_options
from sonicmoe.tests.local_group import LocalGroup
from sonicmoe.thiek import Thiek

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two GPUs, this machine has {torch.cuda.device_count()}"),
]

SIZES = Thiek(T=0, H=512, I=256, E=16, K=4)
WHY_NOT = symmetric.why_not(torch.device("cuda"))
needs_symmetric_memory = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
SYMMETRIC = {"transport": "symmetric_memory", "max_tokens": 1200}


@pytest.fixture(scope="module")
def group():
    with LocalGroup(2, device_type="cuda", timeout_s=60) as group:
        yield group


@pytest.fixture
def ranks(group: LocalGroup) -> LocalGroup:
    return group.renewed()


CASES = {
    "top-K": ([1000, 1200], {}),
    "in chunks": ([1000, 1200], {"chunks": 3, "bias": True}),
    "token rounding": ([1000, 1200], {"router": {"method": "token_rounding", "tile_m": 128}, "chunks": 2}),
    "a rank without tokens": ([0, 500], {}),
    "few tokens": ([1, 4], {}),
    "everyone to one rank": ([300, 400], {"everyone_to": 1}),
}


def gpu_kernels():
    """What these tests load, for `build_defs.gpu_kernels`."""
    biases = {options.get("bias", False) for _, options in CASES.values()}
    return [variant for bias in biases for variant in layer_variants(**kernel_options(bias=bias))]


@pytest.mark.parametrize("transport", ["all_to_all", pytest.param("symmetric_memory", marks=needs_symmetric_memory)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_single_device(ranks: LocalGroup, name: str, transport: str):
    split, options = CASES[name]
    options = {**options, **(SYMMETRIC if transport == "symmetric_memory" else {})}
    limit = accuracy.THRESHOLDS[DTYPES["bf16"]]
    for found in ranks.run(checks.errors, 2, split, {"sizes": SIZES, "k": SIZES.K, "dtype": "bf16", **options}):
        beyond = {name: errors for name, errors in found.items() if errors[0] > limit.whole or errors[1] > limit.worst_block}
        assert not beyond


@needs_symmetric_memory
def test_forward_is_captured_in_a_cuda_graph(ranks: LocalGroup):
    """A replay with other tokens, on other experts, equals the eager layer bit by bit."""
    assert all(ranks.run(checks.graph_replay_equals_eager, SIZES, SYMMETRIC))


def test_gives_the_same_bits_again(ranks: LocalGroup):
    assert all(ranks.run(checks.same_bits_again, SIZES))
