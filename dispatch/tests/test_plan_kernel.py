"""The counting kernels without a GPU: built for sm_90a, read back, emulated, their passes replayed in numpy, and refused where they
cannot run."""

import contextlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import cute_runtime
from cute_runtime import emulator
from dispatch import count_cumsum, count_hopper, plan, plan_hopper
from dispatch.chunk_counts import MAX_SIZE
from dispatch.kernels import variants
from dispatch.kernels.sizes import FEW_SLOTS, MAX_BINS, THREADS

REGISTERS_PER_MULTIPROCESSOR = 65536


@pytest.fixture(scope="module")
def resources():
    """What the machine code of one variant of each kernel uses, by kernel."""
    chosen = {
        "place": variants.place(index="int64", ordered=False, output="uniform"),
        "count": variants.count(index="int64", form="global"),
        "keys": variants.keys(index="int64", paired=True),
        "bounds": variants.bounds(),
        "plan_few": variants.plan_few(index="int64"),
    }
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda variant: cute_runtime.read_resources(emulator.compiled(variant).object), chosen.values())
        return dict(zip(chosen, built, strict=True))


def test_kernels_keep_everything_in_registers(resources):
    assert [len(functions) for functions in resources.values()] == [2, 2, 1, 1, 1]
    for function in (function for functions in resources.values() for function in functions):
        assert not function.uses_local_memory, function


@pytest.mark.parametrize("kernel", ["place", "count"])
def test_second_launch_fits_beside_the_first(resources, kernel):
    """It starts while the first drains, so a block of each must have registers on one multiprocessor."""
    assert sum(function.registers for function in resources[kernel]) * THREADS <= REGISTERS_PER_MULTIPROCESSOR


def test_every_form_is_built_beforehand_once():
    names = [variant.name for variant in variants.prebuilt_variants()]
    assert len(set(names)) == len(names) == 38
    assert {"dispatch.bounds", "dispatch.place-index.int64-ordered.false-output.uniform"} < set(names)


def draw(count: int, size: int, seed: int) -> torch.Tensor:
    """int64 ids, some of them sentinels on both sides, some that would wrap into [0, size) as int32."""
    ids = torch.randint(-2, size + 2, (count,), generator=torch.Generator().manual_seed(seed))
    ids[::37] += 2**32
    return ids


def assert_emulated(function: Callable[[str], tuple], *, launches: int) -> None:
    """The kernels give the bits of PyTorch's version, whatever the order in which warps and blocks run."""
    want = function("reference")
    for seed in range(3):
        with emulator.emulation(seed=seed) as statistics, poisoned_memory():
            got = function("hopper")
        assert len(statistics) == launches
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


@contextlib.contextmanager
def poisoned_memory():
    """New tensors hold the largest integer, not zeros that happen to be right."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty, see torch.utils.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("slots", "experts"), [(1, 1500), (2049, MAX_BINS), (5000, 2500)])
def test_emulated_count_of_many_experts_has_pytorchs_bits(slots, experts):
    assert_emulated(lambda backend: count_cumsum(draw(slots, experts, 1), experts, backend=backend), launches=2)


@pytest.mark.parametrize(("slots", "experts"), [(1, 1), (2047, 5), (6001, 300)])
def test_emulated_count_of_few_experts_has_pytorchs_bits(slots, experts):
    assert_emulated(lambda backend: count_cumsum(draw(slots, experts, 2), experts, backend=backend), launches=2)


@pytest.fixture
def few_slots(monkeypatch):
    """Sets how many slots one block plans."""

    def choose(count: int) -> None:
        monkeypatch.setattr(plan_hopper, "ONE_BLOCK_SLOTS", count)
        plan_hopper.uniform_launch.cache_clear()

    yield choose
    plan_hopper.uniform_launch.cache_clear()


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (700, 3, 40), (FEW_SLOTS // 4, 4, MAX_BINS - 1)])
def test_emulated_uniform_plan_has_pytorchs_bits(few_slots, tokens, k, experts, launches):
    """Chunks of 2048 slots, or all slots by one block, with tails; half of the experts empty, one with many rows."""
    few_slots(FEW_SLOTS if launches == 1 else 0)
    token, expert = torch.arange(tokens).repeat_interleave(k), draw(tokens * k, experts, 3) // 2 * 2
    expert[::5] = 0
    sizes = {"num_tokens": tokens, "num_experts": experts, "slots_per_token": k}
    assert_emulated(lambda backend: plan(token, expert, **sizes, backend=backend), launches=launches)


@pytest.mark.parametrize(("tokens", "launches"), [(plan_hopper.ONE_BLOCK_SLOTS // 2, 1), (plan_hopper.ONE_BLOCK_SLOTS // 2 + 1, 2)])
def test_emulated_plan_of_a_routers_ids_takes_one_launch_if_they_are_few(tokens, launches):
    """(T, K) ids of int32 without their tokens."""
    expert = draw(tokens * 2, 60, 8).int().view(tokens, 2)
    sizes = {"num_tokens": tokens, "num_experts": 60, "slots_per_token": 2}
    assert_emulated(lambda backend: plan(None, expert, **sizes, backend=backend), launches=launches)


def test_emulated_plan_of_slots_in_any_order_has_pytorchs_bits():
    token, expert = draw(3000, 500, 4), draw(3000, 30, 5)
    assert_emulated(lambda backend: plan(token, expert, num_tokens=500, num_experts=30, backend=backend), launches=6)


@pytest.mark.parametrize(("launches", "barrier"), [*((2, barrier) for barrier in range(4)), *((1, barrier) for barrier in (0, 1, 3, 4))])
def test_emulated_plan_without_a_barrier_is_a_race(few_slots, launches, barrier):
    """Of histogram or placement, or of the one launch, whose third only keeps a scan from the one before: there is none."""
    few_slots(FEW_SLOTS if launches == 1 else 0)

    def edit(ptx: str) -> str:
        parts = re.split(r"bar\.sync\s+0;", ptx)
        return "bar.sync 0;".join(parts[: barrier + 1]) + " " + "bar.sync 0;".join(parts[barrier + 1 :])

    with emulator.emulation(edit=edit), pytest.raises(emulator.EmulationError, match=r"race: (reads|writes)|nobody has written"):
        plan(torch.arange(1000) // 2, draw(1000, 40, 6), num_tokens=500, num_experts=40, slots_per_token=2, backend="hopper")


@pytest.mark.parametrize("experts", [40, 1500])
def test_emulated_second_launch_must_wait_for_the_first(experts):
    """It starts while the first still writes the counts that it reads."""
    edit = partial(re.sub, r"griddepcontrol\.wait;", "")
    message = r"(reads|writes) argument \d .*, which the launch before writes, without a griddepcontrol.wait before"
    with emulator.emulation(edit=edit), pytest.raises(emulator.EmulationError, match=message):
        count_cumsum(draw(3000, experts, 7), experts, backend="hopper")


@pytest.mark.parametrize("size", [0, 1, 128, MAX_BINS - 1, MAX_BINS, 50_000, 4_000_000, MAX_SIZE])
def test_stable_passes_by_digit_sort_whole_keys(size):
    key = np.random.default_rng(size).integers(0, size + 1, 3000)
    key[:2] = 0, size
    order = np.arange(len(key))
    for digit in plan_hopper.digits(size):
        part = (key[order] >> digit.shift) & digit.mask
        assert 0 <= part.min() <= part.max() < digit.bins <= MAX_BINS
        order = order[np.argsort(part, kind="stable")]
    np.testing.assert_array_equal(order, np.argsort(key, kind="stable"))


def test_passes_are_as_few_as_the_bins_allow():
    assert [len(plan_hopper.digits(size)) for size in (MAX_BINS - 1, MAX_BINS, 50_000, 2**20 - 1, 2**20)] == [1, 2, 2, 2, 3]


def test_only_whole_keys_make_the_mask_reach_the_size():
    """The place kernel writes the offsets where mask >= size, which must be where its bins are the keys."""
    for size in (0, 1, MAX_BINS - 1, MAX_BINS, 50_000, MAX_SIZE):
        passes = plan_hopper.digits(size)
        assert all((digit.mask >= size) == (len(passes) == 1) for digit in passes)


def test_cpu_tensors_are_refused():
    ids = torch.tensor([0, 1])
    message = "^" + re.escape("expert_index: device cpu: must be a GPU of compute capability 9.0 (sm_90)")
    with pytest.raises(ValueError, match=message):
        count_cumsum(ids, 2, backend="hopper")
    with pytest.raises(ValueError, match=message):
        plan(ids, ids, num_tokens=2, num_experts=2, backend="hopper")
    assert not count_hopper.supports(ids, 2)
    assert not plan_hopper.supports(ids, 2, 2)


def test_sizes_beyond_the_kernels_are_refused():
    ids = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=f"^num_experts={2**20 + 1}: must be at most {2**20} for the kernel$"):
        count_cumsum(ids, 2**20 + 1, backend="hopper")
    with pytest.raises(ValueError, match=f"^num_tokens={2**30 + 1}: must be at most {2**30} for the kernel$"):
        plan(ids, ids, num_tokens=2**30 + 1, num_experts=2, backend="hopper")


def test_unknown_backend_is_refused():
    ids = torch.tensor([0, 1])
    message = r"^backend='cuda': must be one of auto, hopper, reference$"
    with pytest.raises(ValueError, match=message):
        count_cumsum(ids, 2, backend="cuda")
    with pytest.raises(ValueError, match=message):
        plan(ids, ids, num_tokens=2, num_experts=2, backend="cuda")
