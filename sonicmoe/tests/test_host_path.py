"""What a forward costs the host besides its launches: counted on a CPU with kernels of PyTorch in place of the GPU's, timed on a GPU.

The kernels are those of stand_ins.py.
"""

import compileall
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import cute_runtime
import dispatch
from dispatch import DispatchPlan, plan_hopper
from routing import Routing, top_k
from sonicmoe import MoE, backends, routed_experts
from sonicmoe.backends import hopper, hopper_backward, reference
from sonicmoe.tests.stand_ins import CACHES, LAUNCHES, E, H, I, K, T, draw, make_layer, standing_in

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stand_ins(monkeypatch):
    yield from standing_in(monkeypatch)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "activation": "geglu", "gate_up_layout": "concatenated"}, {"activation": "relu_squared"}],
    ids=["swiglu", "geglu_with_bias", "relu_squared"],
)
def test_forward_launches_each_kernel_once_with_the_right_tensors(stand_ins, options):
    x = draw()
    layer = make_layer(**options)
    with torch.no_grad():
        inference = layer(x)
    assert stand_ins.launched == LAUNCHES
    stand_ins.launched.clear()
    trained = layer(x)
    assert stand_ins.launched == LAUNCHES
    with backends.one_by_one():
        apart = layer(x)
    expected = make_layer("reference", **options)(x)
    for got in (inference, trained, apart):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
    assert torch.equal(inference, trained)
    assert torch.equal(inference, apart)


def make_arguments(layer, **grad):
    """routed_experts' arguments for the layer's weights, and a routing made beforehand."""
    with torch.no_grad():
        routing = layer.router_config.route(layer.router(draw()))
    routing = routing._replace(score=routing.score.clone().requires_grad_())
    return [draw().requires_grad_(), layer.w_up, layer.w_down, routing], {"b_up": layer.b_up, "b_down": layer.b_down}


def test_gradients_of_the_fused_forward_are_those_of_its_operations(stand_ins, monkeypatch):
    for name in ("activation_backward", "down_weight_grad", "up_weight_grad", "dx_rows"):  # test_backward_kernels.py emulates the kernels
        monkeypatch.setattr(hopper, name, getattr(reference, name))
    args, biases = make_arguments(make_layer(bias=True))
    leaves = [*args[:3], args[3].score, *biases.values()]
    fused = torch.autograd.grad(routed_experts(*args, **biases).float().square().sum(), leaves)
    assert stand_ins.launched.count("up_projection") == 1
    with backends.one_by_one():
        apart = torch.autograd.grad(routed_experts(*args, **biases).float().square().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(fused, apart, strict=True))


def test_slots_in_any_order_take_the_fused_forward_too(stand_ins, monkeypatch):
    def plan_any(token_index, expert_index, plan):
        made = dispatch.plan(token_index, expert_index, num_tokens=T, num_experts=E, backend="reference")
        for out, value in zip((*plan[:6], plan.tickets), (*made[:6], made.tickets), strict=True):
            out.copy_(value)

    monkeypatch.setattr(plan_hopper, "_plan_any", plan_any)
    (x, w_up, w_down, routing), _ = make_arguments(make_layer())
    order = torch.randperm(T * K, generator=torch.Generator().manual_seed(0))
    shuffled = routing._replace(
        token_index=routing.token_index[order], expert_index=routing.expert_index[order], score=routing.score[order], slots_per_token=None
    )
    stand_ins.launched.clear()
    with torch.no_grad():
        got = routed_experts(x, w_up, w_down, shuffled)
    assert stand_ins.launched == ["up_projection", "down_projection", "gather_sum"]
    torch.testing.assert_close(got, routed_experts(x, w_up, w_down, routing, backend="reference"), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("change", ["strided x", "misaligned w_up", "strided w_down", "strided b_down"])
def test_tensors_that_no_kernel_takes_are_refused_before_any_launch(stand_ins, change):
    (x, w_up, w_down, routing), biases = make_arguments(make_layer(bias=True))
    x, w_up, w_down, b_down = (tensor.detach() for tensor in (x, w_up, w_down, biases["b_down"]))
    stand_ins.launched.clear()
    if change == "strided x":
        x, message = torch.cat((x, x), dim=1)[:, :H], r"^x: shape \(40, 32\) with strides \(64, 1\): must be contiguous$"
    elif change == "misaligned w_up":
        w_up = torch.cat((torch.zeros(1, dtype=w_up.dtype), w_up.flatten()))[1:].view_as(w_up)
        message = r"^w_up: data pointer 0x[0-9a-f]+: must be a multiple of 16 bytes$"
    elif change == "strided b_down":
        b_down, message = b_down.mT.contiguous().mT, r"^b_down: shape \(8, 32\) with strides \(1, 8\): must be contiguous$"
    else:
        w_down = torch.cat((w_down, w_down), dim=2)[..., :I]
        message = r"^w_down: shape \(8, 32, 16\) with strides \(1024, 32, 1\): must be contiguous, or be so with its last two"
    with pytest.raises(ValueError, match=message):
        routed_experts(x, w_up, w_down, routing, b_down=b_down)
    assert stand_ins.launched == []


def launch_of(tokens=T, hidden=H, width=2 * I, k=K):
    """`hopper.forward`'s choice for these sizes."""
    sizes = (torch.Size((tokens, hidden)), torch.Size((E, width, hidden)), tokens * k, k)
    kinds = (torch.bfloat16, torch.int32, torch.float32, torch.device("cpu"), "swiglu", "interleaved")
    return hopper._forward_launch(*sizes, *kinds, False, False, False, False, False)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tokens": 2**21, "hidden": 2**13}, "x: 17179869184 elements: must be at most 17179869120"),
        ({"tokens": 2**20, "k": 1025}, "routing: 1074790400 slots: must be at most 1073741824 for the kernels"),
        ({"hidden": 2**16, "width": 2**15}, "w_up: 2147483648 elements an expert: must be at most 2147483647"),
    ],
    ids=["x", "slots", "w_up"],
)
def test_sizes_that_overflow_an_index_are_refused_before_any_launch(stand_ins, sizes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        launch_of(**sizes)
    assert launch_of(tokens=2**20, k=1024).a == (2**30, I)


MANY = 2**30 + 8
"""Rows: eight more than the kernels take."""


def backward_of(operation, rows=64, hidden=H, intermediate=I, experts=E):
    """The operation on tensors of these sizes without memory."""

    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    index = [make(count, dtype=torch.int32) for count in (experts + 1, rows, rows, rows)]
    plan = DispatchPlan(*index, None, None, T, experts, None)
    dout, score, z, a = make(T, hidden), make(rows, dtype=torch.float32), make(rows, 2 * intermediate), make(rows, intermediate)
    w_up, w_down = make(experts, 2 * intermediate, hidden), make(experts, hidden, intermediate)
    if operation == "activation_backward":
        wanted = {"need_dz": True, "need_dscore": True, "need_scaled_a": True, "activation": "swiglu", "gate_up_layout": "interleaved"}
        return hopper_backward.activation_backward(dout, z, w_down, None, score, plan, **wanted)
    if operation == "dx_rows":
        return hopper_backward.dx_rows(z, w_up, plan)
    weight_grad, *args = {"dw_down": ("down", dout, a, score), "dw_up": ("up", dout, z)}[operation]
    return getattr(hopper_backward, f"{weight_grad}_weight_grad")(*args, plan, need_weight=True, need_bias=False)


@pytest.mark.parametrize(
    ("operation", "sizes", "message"),
    [
        ("activation_backward", {"rows": MANY}, "routing: 1073741832 slots: must be at most 1073741824 for the kernels"),
        ("dx_rows", {"rows": MANY}, "routing: 1073741832 slots: must be at most 1073741824 for the kernels"),
        ("dw_up", {"rows": MANY}, "routing: 1073741832 slots: must be at most 1073741824 for the kernels"),
        (
            "activation_backward",
            {"hidden": 2**16, "intermediate": 2**15},
            "w_down: 2147483648 elements an expert: must be at most 2147483647",
        ),
        ("dx_rows", {"hidden": 2**16, "intermediate": 2**14}, "w_up: 2147483648 elements an expert: must be at most 2147483647"),
        (
            "dw_down",
            {"experts": 2**25 + 1},
            "dw_down: 33554433 experts of 32 rows: must be at most 1073741824 rows together for the kernel",
        ),
        ("dw_up", {"experts": 2**25 + 1}, "dw_up: 33554433 experts of 32 rows: must be at most 1073741824 rows together for the kernel"),
    ],
)
def test_sizes_that_overflow_an_index_of_the_backward_are_refused_before_any_launch(stand_ins, monkeypatch, operation, sizes, message):
    monkeypatch.setattr(hopper_backward, "_kernel", lambda variant: lambda *_: stand_ins.launched.append(variant.kernel))
    with pytest.raises(ValueError, match=f"^{message}$"):
        backward_of(operation, **sizes)
    assert stand_ins.launched == []
    for most in ({"rows": 2**30}, {"experts": 2**25}):
        backward_of(operation, **most)
    assert stand_ins.launched


def test_more_chosen_slots_than_an_index_reaches_are_refused_before_any_launch(stand_ins):
    logits = torch.zeros(1, 1).expand(2**28, 8)
    with pytest.raises(ValueError, match=r"^logits: shape \(268435456, 8\): T \* k=2147483648 must be at most 2147483647$"):
        top_k(logits, 8)
    assert stand_ins.launched == []


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_weights_stored_with_their_last_dimensions_exchanged_are_used_in_place(stand_ins, monkeypatch, layout):
    (x, w_up, w_down, routing), biases = make_arguments(make_layer(bias=True, gate_up_layout=layout))
    expected = routed_experts(x, w_up, w_down, routing, **biases, gate_up_layout=layout)
    stored = [weight.detach().mT.contiguous() for weight in (w_up, w_down)]
    seen = []
    load = stand_ins.load
    monkeypatch.setattr(
        cute_runtime,
        "load",
        lambda variant: lambda *args: (seen.extend(map(torch.Tensor.data_ptr, filter(torch.is_tensor, args))), load(variant)(*args)),
    )
    for cache in CACHES:
        cache.cache_clear()
    got = routed_experts(x, *(weight.mT for weight in stored), routing, **biases, gate_up_layout=layout)
    assert torch.equal(got, expected)
    assert {weight.data_ptr() for weight in stored} <= set(seen)


def operators_of(function):
    """How often a warm function calls each of PyTorch's operators, those that operators call among themselves left out."""
    function()
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        function()
    own = [event for event in profile.function_events if event.name.startswith("aten::")]
    return Counter(event.name for event in own if event.cpu_parent is None or event.cpu_parent not in own)


def calls_of(function):
    """How many of this project's Python functions a warm function calls; a virtual environment may lie inside the checkout."""
    packages = [ROOT / name for name in ("cute_runtime", "dispatch", "routing", "sonicmoe")]
    calls = 0

    def observe(frame, event, _):
        nonlocal calls
        file = frame.f_code.co_filename
        calls += event == "call" and Path(file).parent != Path(__file__).parent and any(map(Path(file).is_relative_to, packages))

    sys.setprofile(observe)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.fixture
def counted_layer(stand_ins):
    """A layer whose kernels cost nothing."""
    stand_ins.work = False
    return make_layer()


def test_inference_makes_no_more_operators_and_calls_than_this(counted_layer):
    x = draw()
    with torch.no_grad():
        operators, calls = operators_of(lambda: counted_layer(x)), calls_of(lambda: counted_layer(x))
    assert operators == {"aten::new_empty": 1, "aten::empty_like": 1}
    assert calls <= 7


def test_experts_on_a_routers_ids_and_scores_make_no_more_operators_than_this(stand_ins):
    """int64 ids without their tokens and bfloat16 scores, as transformers hands them over: nothing is written out or cast."""
    layer = make_layer()
    ids = torch.rand(T, E, generator=torch.Generator().manual_seed(2)).topk(K).indices.reshape(-1)
    score = torch.rand(T * K, generator=torch.Generator().manual_seed(3)).bfloat16()
    routing = Routing(None, ids, score, num_tokens=T, num_experts=E, slots_per_token=K)
    x = draw()

    def forward(routing=routing, **options):
        with torch.no_grad():
            return routed_experts(x, layer.w_up, layer.w_down, routing, **options)

    written_out = routing._replace(token_index=routing.tokens(), expert_index=ids.int(), score=score.float())
    got = forward()
    assert stand_ins.launched == LAUNCHES[2:]
    torch.testing.assert_close(got, forward(written_out, backend="reference"), rtol=1e-2, atol=1e-3)
    stand_ins.work = False
    assert operators_of(forward) == {"aten::split_with_sizes": 1, "aten::new_empty": 4, "aten::empty_like": 1}
    assert calls_of(forward) <= 18


def test_training_forward_makes_no_more_operators_and_calls_than_this(counted_layer):
    """Beside inference's: what backward keeps, and one autograd function."""
    x = draw().requires_grad_()
    operators, calls = operators_of(lambda: counted_layer(x)), calls_of(lambda: counted_layer(x))
    assert operators == {"aten::new_empty": 2, "aten::empty_like": 1}
    assert calls <= 9


def test_choice_and_plan_make_no_more_operators_and_calls_than_this(counted_layer):
    """What a user of the functions alone pays: three allocations for the routing, two and the four views for the plan."""
    logits = torch.zeros(T, E)

    def choose_and_plan():
        routing = top_k(logits, K)
        return dispatch.plan(routing.token_index, routing.expert_index, num_tokens=T, num_experts=E, slots_per_token=K)

    operators, calls = operators_of(choose_and_plan), calls_of(choose_and_plan)
    assert operators == {"aten::new_empty": 3, "aten::empty_like": 2, "aten::split_with_sizes": 1}
    assert calls <= 23


LIMIT_US = 60


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["inference", "training forward"])
def test_host_time_per_forward_is_under_60_microseconds(mode):
    """Issuing a warm layer's forward; with 64 tokens, so that the GPU never makes the host wait. The best of 30 batches of 20 calls:
    other work of the machine can only add to it."""
    layer = MoE(1024, 512, 64, 8, dtype=torch.bfloat16, device="cuda", backend="hopper")
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    times = []
    with torch.set_grad_enabled(mode != "inference"):
        for _ in range(31):  # the first one loads the kernels
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                layer(x)
            times.append((time.perf_counter() - begin) / 20 * 1e6)
    print(f"{mode}: {min(times[1:]):.1f} us at best, median {statistics.median(times[1:]):.1f} us")
    assert min(times[1:]) < LIMIT_US


FIRST_CALL = """
import time, torch
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
begin = time.perf_counter()
from sonicmoe import MoE
imported = time.perf_counter()
layer = MoE(1024, 512, 64, 8, dtype=torch.bfloat16, device="cuda", backend="hopper")
x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
made = time.perf_counter()
with torch.no_grad():
    layer(x)
torch.cuda.synchronize()
print(imported - begin, time.perf_counter() - made)
"""


@pytest.mark.gpu
def test_first_call_of_a_fresh_process_is_under_a_fifth_of_a_second():
    """Importing the package, its bytecode written before, and the first forward, with the kernels prebuilt, once torch is imported and
    has its CUDA context. The best of three processes."""
    for package in ("cute_runtime", "dispatch", "routing", "sonicmoe"):
        compileall.compile_dir(Path(__file__).absolute().parents[2] / package, quiet=2)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [
        subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True, check=True) for _ in range(3)
    ]
    parts = [[float(seconds) for seconds in run.stdout.split()] for run in runs]
    print("import and first forward, seconds:", parts)
    assert min(map(sum, parts)) < 0.2
