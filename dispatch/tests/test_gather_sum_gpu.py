"""The gather_sum kernel on an sm_90 GPU, from prebuilt objects: values, bits, graphs, errors, and its speed beside a device copy.

Outputs are poisoned with NaN before each launch, the tail of rows holds NaN, and inputs are fresh normal data.
"""

import functools
import itertools
import json
import statistics
import subprocess
import sys
import time

import pytest
import torch

import cute_runtime
from cute_runtime.timing import captured
from dispatch import DispatchPlan, gather_sum, plan
from dispatch.gather_sum_hopper import gather_sum_hopper
from dispatch.kernels import variants

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4, torch.float32: 3e-7}
"""Rounding the output costs at most 2^-9 (bf16), 2^-12 (fp16) and 2^-24 (fp32) of each value; the sum in float32 a little more."""

LEAST_SHARE = {(True, True): 0.85, (False, True): 0.75, (True, False): 0.63, (False, False): 0.5}
"""Of a device copy's bandwidth, by (uniform, K > 2): a tenth below what docs/kernels/gather_sum.md records for the slowest shape."""


def make(T, H, K, dtype=torch.bfloat16, *, experts=64, sentinels=False, uniform=True, seed=0):
    """rows, score, plan and the token of every slot. Without ``uniform`` the slots come in no order and some tokens have none."""
    generator = torch.Generator("cuda").manual_seed(seed)
    R = T * K
    low = -(experts // 8) if sentinels else 0
    expert = torch.randint(low, experts, (R,), generator=generator, device="cuda")
    if uniform:
        token = torch.arange(T, device="cuda").repeat_interleave(K)
    else:
        token = torch.randint(0, max(T - 1, 1), (R,), generator=generator, device="cuda")
    p = plan(token, expert, num_tokens=T, num_experts=experts, slots_per_token=K if uniform else None)
    rows = torch.randn(R, H, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
    rows[p.offsets[-1] :] = float("nan")
    score = torch.rand(R, generator=generator, device="cuda")
    score[p.slot_to_row < 0] = float("nan")
    return rows, score, p, token


def oracle(rows, score, p: DispatchPlan, token):
    """float64, over the list of slots: nothing of the plan but slot_to_row is used."""
    out = torch.zeros(p.num_tokens, rows.shape[1], dtype=torch.float64, device="cuda")
    valid = (p.slot_to_row >= 0).nonzero().squeeze(1)
    terms = rows[p.slot_to_row[valid].long()].double()
    if score is not None:
        terms *= score[valid].double().unsqueeze(1)
    return out.index_add_(0, token[valid].long(), terms)


def worst_block_error(got, want, block=128):
    """Largest relative Frobenius error of any 128 tokens; NaN stays NaN."""
    errors = []
    for begin in range(0, want.shape[0], block):
        difference = (got[begin : begin + block].double() - want[begin : begin + block]).norm()
        size = want[begin : begin + block].norm()
        errors.append((difference / size if size > 0 else difference).item())
    return max(errors, key=lambda error: float("inf") if error != error else error, default=0.0)


def run(rows, score, p):
    out = torch.full((p.num_tokens, rows.shape[1]), float("nan"), dtype=rows.dtype, device="cuda")
    return gather_sum_hopper(rows, score, p, out)


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_variant_agrees_with_the_oracle(dtype, uniform, scored):
    rows, score, p, token = make(1000, 1544, 6, dtype, sentinels=True, uniform=uniform)
    score = score if scored else None
    assert worst_block_error(run(rows, score, p), oracle(rows, score, p, token)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("T", "H", "K"),
    [(1, 8, 1), (3, 8, 3), (257, 24, 2), (129, 7168, 8), (1000, 768, 1), (777, 4096, 16), (63, 2056, 17), (65537, 16, 4)],
)
def test_sizes_with_tails_agree_with_the_oracle(T, H, K):
    rows, score, p, token = make(T, H, K, seed=T)
    assert worst_block_error(run(rows, score, p), oracle(rows, score, p, token)) < TOLERANCE[torch.bfloat16]


def test_one_token_with_all_slots_agrees_with_the_oracle():
    rows, score, p, _ = make(1, 512, 5000, torch.float32)
    everything = torch.full((5000,), 3, device="cuda")
    p = plan(everything, torch.arange(5000, device="cuda") % 64, num_tokens=7, num_experts=64)
    out = run(rows, score, p)
    assert worst_block_error(out, oracle(rows, score, p, everything)) < 2e-6
    assert out[[0, 1, 2, 4, 5, 6]].eq(0).all()


def test_tokens_without_rows_get_zeros():
    rows, score, p, _ = make(50, 64, 4)
    p = plan(torch.arange(200, device="cuda") // 4, torch.full((200,), -1, device="cuda"), num_tokens=50, num_experts=8, slots_per_token=4)
    rows.fill_(float("nan"))
    assert run(rows, score, p).eq(0).all()


@pytest.mark.parametrize("uniform", [True, False])
def test_no_tokens_and_no_rows(uniform):
    nothing = torch.zeros(0, dtype=torch.int32, device="cuda")
    p = plan(nothing, nothing, num_tokens=0, num_experts=8, slots_per_token=2 if uniform else None)
    assert run(torch.zeros(0, 64, device="cuda"), None, p).shape == (0, 64)
    if not uniform:
        p = plan(nothing, nothing, num_tokens=5, num_experts=8)
        assert run(torch.zeros(0, 64, device="cuda"), None, p).eq(0).all()


def test_rows_beyond_two_to_the_31_elements_are_addressed():
    T, H, K = 40000, 7168, 8  # 2.3e9 elements, 4.6 GB
    generator = torch.Generator("cuda").manual_seed(3)
    p = plan(
        torch.arange(T, device="cuda").repeat_interleave(K),
        torch.randint(0, 64, (T * K,), generator=generator, device="cuda"),
        num_tokens=T, num_experts=64, slots_per_token=K,
    )  # fmt: skip
    rows = torch.empty(T * K, H, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    out = run(rows, None, p)
    some = torch.randint(0, T, (256,), generator=generator, device="cuda")
    want = rows[p.slot_to_row.view(T, K)[some].long()].double().sum(1)
    assert worst_block_error(out[some], want) < TOLERANCE[torch.bfloat16]
    assert not out.isnan().any()


def test_two_runs_give_the_same_bits():
    rows, score, p, _ = make(4096, 4096, 8)
    first = run(rows, score, p)
    for _ in range(5):
        assert torch.equal(run(rows, score, p).view(torch.int16), first.view(torch.int16))


def test_graph_replays_on_new_data():
    rows, score, p, token = make(512, 1024, 8)
    out = run(rows, score, p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_sum_hopper(rows, score, p, out)
    rows.normal_()
    out.fill_(float("nan"))
    graph.replay()
    assert worst_block_error(out, oracle(rows, score, p, token)) < TOLERANCE[torch.bfloat16]


def test_launch_goes_to_the_current_stream():
    rows, score, p, token = make(4096, 1024, 8)
    want = oracle(rows, score, p, token)
    out = torch.full((4096, 1024), float("nan"), dtype=torch.bfloat16, device="cuda")
    late = torch.empty_like(rows)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(rows)
        gather_sum_hopper(late, score, p, out)
    stream.synchronize()
    assert worst_block_error(out, want) < TOLERANCE[torch.bfloat16]


def test_operator_uses_the_kernel_and_its_gradient_agrees():
    rows, score, p, token = make(256, 512, 4, torch.float32)
    rows.requires_grad_()
    score.requires_grad_()
    out = gather_sum(rows, score, p)
    assert torch.equal(out, run(rows.detach(), score.detach(), p))
    weight = torch.randn_like(out)
    out.backward(weight)
    rows64, score64 = rows.detach().double().requires_grad_(), score.detach().double().requires_grad_()
    (oracle(rows64, score64, p, token) * weight).sum().backward()
    assert ((rows.grad - rows64.grad).norm() / rows64.grad.norm()).item() < 1e-6
    assert ((score.grad - score64.grad).norm() / score64.grad.norm()).item() < 1e-6


def test_misaligned_and_strided_rows_are_refused():
    rows, score, p, _ = make(8, 64, 2)
    flat = torch.empty(rows.numel() + 1, dtype=rows.dtype, device="cuda")
    with pytest.raises(ValueError, match=r"rows: data pointer 0x[0-9a-f]+: must be a multiple of 16 bytes"):
        gather_sum_hopper(flat[1:].view_as(rows), score, p)
    with pytest.raises(ValueError, match=r"rows: shape .* with strides .*: must be contiguous"):
        gather_sum_hopper(torch.empty(16, 128, dtype=rows.dtype, device="cuda")[:, :64], score, p)


def median_ms(functions, rounds=12):
    """Median over rounds of the GPU time of each function, in turns, the first rounds left out."""
    times = {name: [] for name in functions}
    for name, function in list(functions.items()) * rounds:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values[3:]) for name, values in times.items()}


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("T", "H", "K"), [(32768, 4096, 8), (24576, 1536, 8), (4096, 4096, 8), (8192, 4096, 2), (32768, 4096, 16)])
def test_runs_at_device_copy_bandwidth(T, H, K, uniform, capsys):
    rows, score, p, _ = make(T, H, K)
    if not uniform:
        p = p._replace(slots_per_token=None)
    moved = (T * K + T) * H * 2
    inputs = [rows, *(rows.clone() for _ in range(2**30 // rows.nbytes))]  # rotate through more memory than L2
    outputs = [torch.empty(T, H, dtype=torch.bfloat16, device="cuda") for _ in inputs]
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    launches = [functools.partial(gather_sum_hopper, one, score, p, out) for one, out in zip(inputs, outputs, strict=True)]
    # The copy is not captured: a graph would give it to the copy engines, which reach two thirds of the bandwidth (2.76 TB/s on an H200).
    ms = median_ms({"kernel": captured(launches)[0].replay, "copy": lambda: target.copy_(source)})
    ms["kernel"] /= len(launches)
    rate = moved / ms["kernel"] * 1e-9
    copy_rate = 2 * source.nbytes / ms["copy"] * 1e-9
    with capsys.disabled():
        form = "uniform" if uniform else "csr"
        print(
            f"\nT,H,K={T},{H},{K} {form}: {ms['kernel']:.4f} ms, {rate:.2f} TB/s, copy {copy_rate:.2f} TB/s, share {rate / copy_rate:.3f}"
        )
    assert rate > LEAST_SHARE[uniform, K > 2] * copy_rate


def test_loads_in_milliseconds_and_launches_in_microseconds(capsys):
    code = """
import json, time, torch
torch.cuda.init(); torch.zeros(1, device="cuda")
from dispatch import plan
from dispatch.gather_sum_hopper import gather_sum_hopper
import cute_runtime, dispatch.kernels.variants as variants
p = plan(torch.arange(64, device="cuda") // 4, torch.arange(64, device="cuda") % 8, num_tokens=16, num_experts=8, slots_per_token=4)
rows, out = (torch.ones(n, 64, device="cuda", dtype=torch.bfloat16) for n in (64, 16))
score = torch.ones(64, device="cuda")
torch.cuda.synchronize(); t0 = time.perf_counter()
for dtype in ("float32", "bfloat16"):
    t1 = time.perf_counter(); cute_runtime.load(variants.gather_sum(dtype=dtype, form="uniform", scored=True)); t2 = time.perf_counter()
gather_sum_hopper(rows, score, p, out); torch.cuda.synchronize(); t3 = time.perf_counter()
for _ in range(200): gather_sum_hopper(rows, score, p, out)
torch.cuda.synchronize(); t4 = time.perf_counter()
for _ in range(500): gather_sum_hopper(rows, score, p, out)
t5 = time.perf_counter()
kernel = cute_runtime.load(variants.gather_sum(dtype="bfloat16", form="uniform", scored=True))
torch.cuda.synchronize(); t6 = time.perf_counter()
for _ in range(500): kernel(rows, score, p.slot_to_row, None, None, out, 4, 0)
t7 = time.perf_counter()
print(json.dumps({"first_load_ms": (t1 - t0) * 1e3, "second_load_ms": (t2 - t1) * 1e3, "first_call_ms": (t3 - t2) * 1e3,
                  "host_us": (t5 - t4) / 500 * 1e6, "bare_launch_us": (t7 - t6) / 500 * 1e6}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers = json.loads(result.stdout)
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {value:.2f}" for name, value in numbers.items()))
    assert numbers["first_load_ms"] + numbers["second_load_ms"] + numbers["first_call_ms"] < 200
    assert numbers["host_us"] < 40


def test_finding_a_loaded_kernel_costs_under_two_microseconds():
    variant = variants.gather_sum(dtype="bfloat16", form="uniform", scored=True)
    cute_runtime.load(variant)
    begin = time.perf_counter()
    for _ in itertools.repeat(None, 10000):
        cute_runtime.load(variant)
    assert (time.perf_counter() - begin) / 10000 < 2e-6
