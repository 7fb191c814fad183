"""The gather_sum kernel without a GPU: built for sm_90a, read back, emulated, and refused where it cannot run."""

import re

import pytest
import torch

import cute_runtime
from cute_runtime import emulator
from dispatch import gather_sum, plan
from dispatch.gather_sum_hopper import gather_sum_hopper, reads, supports
from dispatch.kernels import variants


@pytest.fixture(scope="module")
def resources():
    """What the machine code of the longest variant uses."""
    variant = variants.gather_sum(dtype="bfloat16", form="csr", scored=True)
    (resources,) = cute_runtime.read_resources(emulator.compiled(variant).object)
    return resources


@pytest.mark.parametrize(("tokens", "slots", "hidden"), [(40, 333, 72), (3, 100, 2056), (300, 299, 8)])
def test_emulated_kernel_has_float64s_values_in_every_order(tokens, slots, hidden):
    """Tokens with no rows, with one, with more than are in flight; sentinel rows are not read: they hold NaN."""
    generator = torch.Generator().manual_seed(tokens)
    token = torch.randint(0, tokens, (slots,), generator=generator)
    token[: slots // 3] = 1
    expert = torch.randint(-1, 5, (slots,), generator=generator)
    own = plan(token, expert, num_tokens=tokens, num_experts=4)
    rows = torch.randn(slots, hidden, generator=generator).bfloat16()
    rows[int(own.offsets[-1]) :] = float("nan")
    score = torch.rand(slots, generator=generator)
    want = gather_sum(rows.double(), score.double(), own)
    results = []
    for seed in range(3):
        out = torch.full((tokens, hidden), float("nan"), dtype=torch.bfloat16)
        with emulator.emulation(seed=seed) as (statistics):
            gather_sum_hopper(rows, score, own, out)
        assert len(statistics) == 1
        results.append(out)
    torch.testing.assert_close(results[0].double(), want, rtol=2**-8, atol=1e-5)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_kernel_reads_scores_of_16_bits_as_they_are(dtype):
    """The bits of the same scores in float32; a sentinel's score may be anything."""
    T, K, H = 37, 3, 72
    generator = torch.Generator().manual_seed(K)
    own = plan(None, torch.randint(-1, 5, (T, K), generator=generator), num_tokens=T, num_experts=4, slots_per_token=K)
    rows = torch.randn(T * K, H, generator=generator).to(dtype)
    score = torch.rand(T * K, generator=generator).to(dtype).masked_fill(own.slot_to_row < 0, float("nan"))
    outs = []
    for weights in (score, score.float()):
        with emulator.emulation(seed=len(outs)):
            outs.append(gather_sum(rows, weights, own, backend="hopper"))
    want = gather_sum(rows.double(), score.double(), own)
    torch.testing.assert_close(outs[0].double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(*outs)


def test_scores_are_read_as_they_are_or_cast():
    assert reads(torch.float32, torch.float16, False)
    assert reads(torch.float16, torch.float16, True)
    assert not reads(torch.float16, torch.float16, False)
    assert not reads(torch.float16, torch.bfloat16, True)
    assert not reads(torch.float64, torch.float32, True)


def test_kernel_keeps_everything_in_registers(resources):
    assert not resources.uses_local_memory, resources
    assert resources.static_shared_bytes == 0


def test_four_blocks_of_256_threads_fit_on_a_multiprocessor(resources):
    assert resources.registers <= 64


def test_every_form_is_built_beforehand_once():
    names = [variant.name for variant in variants.prebuilt_variants() if variant.kernel == "dispatch.kernels.gather_sum"]
    assert len(set(names)) == len(names) == 14
    assert "dispatch.gather_sum-dtype.bfloat16-form.uniform-scored.true" in names


@pytest.fixture
def four_slots():
    return plan(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 1]), num_tokens=2, num_experts=2, slots_per_token=2)


def test_cpu_tensors_are_refused(four_slots):
    message = "rows: device cpu: must be a GPU of compute capability 9.0 (sm_90)"
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_sum_hopper(torch.zeros(4, 8), None, four_slots)
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_sum(torch.zeros(4, 8), None, four_slots, backend="hopper")
    assert not supports(torch.zeros(4, 8))


def test_unknown_backend_is_refused(four_slots):
    with pytest.raises(ValueError, match=r"^backend='cuda': must be one of auto, hopper, reference$"):
        gather_sum(torch.zeros(4, 8), None, four_slots, backend="cuda")


@pytest.mark.parametrize(
    ("rows", "score", "out", "error", "message"),
    [
        (torch.zeros(4, 12), None, None, ValueError, "rows: shape (4, 12): must be (R, H) with H a multiple of 8"),
        (torch.zeros(4, 8).double(), None, None, TypeError, "rows: dtype torch.float64: must be bfloat16, float16 or float32"),
        (torch.zeros(3, 8), None, None, ValueError, "rows: shape (3, 8): must be (R, H) with the plan's R=4"),
        (torch.zeros(4, 8), torch.zeros(2, 2), None, ValueError, "score: shape (2, 2): must be (R,) with the plan's R=4"),
        (torch.zeros(4, 8), None, torch.zeros(3, 8), ValueError, "out: shape (3, 8) in torch.float32: must be (2, 8)"),
        (
            torch.zeros(4, 8),
            None,
            torch.zeros(2, 8).half(),
            ValueError,
            "out: shape (2, 8) in torch.float16: must be (2, 8) in rows' dtype",
        ),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(four_slots, rows, score, out, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        gather_sum_hopper(rows, score, four_slots, out)
