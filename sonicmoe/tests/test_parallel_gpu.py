"""Expert parallelism of two ranks: on one GPU with gloo, on two of one host with NCCL and, where torch has NVSHMEM, symmetric memory."""

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

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, this machine has {GPUS}")

SIZES = Thiek(T=0, H=512, I=256, E=16, K=4)
WHY_NOT = symmetric.why_not(torch.device("cuda"))
needs_symmetric_memory = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
SYMMETRIC = {"transport": "symmetric_memory", "max_tokens": 1200}
WAYS = [
    pytest.param("cuda:0", {}, id="one GPU"),
    pytest.param("cuda", {}, id="two GPUs", marks=needs_two_gpus),
    pytest.param("cuda", SYMMETRIC, id="symmetric memory", marks=[needs_two_gpus, needs_symmetric_memory]),
]
PADDED = pytest.param("cuda:0", {"capacity": None}, id="one GPU, sizes on the device")


@pytest.fixture(scope="module")
def group(request: pytest.FixtureRequest):
    with LocalGroup(2, device=request.param, timeout_s=60) as group:
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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("group", "way"), [*WAYS, PADDED], indirect=["group"])
def test_equals_the_single_device(ranks: LocalGroup, name: str, way: dict):
    split, options = CASES[name]
    limit = accuracy.THRESHOLDS[DTYPES["bf16"]]
    for found in ranks.run(checks.errors, 2, split, {"sizes": SIZES, "k": SIZES.K, "dtype": "bf16", **options, **way}):
        beyond = {name: errors for name, errors in found.items() if errors[0] > limit.whole or errors[1] > limit.worst_block}
        assert not beyond


@pytest.mark.parametrize(("group", "way"), WAYS[2:], indirect=["group"])
def test_forward_is_captured_in_a_cuda_graph(ranks: LocalGroup, way: dict):
    """A replay with other tokens, on other experts, equals the eager layer bit by bit."""
    assert all(ranks.run(checks.graph_replay_equals_eager, SIZES, way))


@pytest.mark.parametrize(("group", "way"), WAYS, indirect=["group"])
def test_gives_the_same_bits_again(ranks: LocalGroup, way: dict):
    assert all(ranks.run(checks.same_bits_again, SIZES, way))
