"""The layer's short path, sonicmoe/at_once.py: the bits of the general one, and where it is not taken."""

import contextlib
import copy
import threading

import pytest
import torch
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dispatch import debug
from dispatch.kernels.sizes import TICKETS
from routing import RouterConfig
from sonicmoe import MoE, at_once, backends
from sonicmoe.backends import hopper, hopper_layer, hopper_layer_backward
from sonicmoe.memory import saved_mib
from sonicmoe.router import Router
from sonicmoe.tests.stand_ins import LAUNCHES, E, H, K, T, draw, make_layer, standing_in

BACKWARD = [
    *("activation_backward", "score_grad", "weight_grad", "weight_grad"),
    *("dx_rows", "gather_sum", "router_logits", "slot_scores_grad"),
]


@pytest.fixture(params=["z among what is kept", "z of its own"])
def stand_ins(monkeypatch, request):
    if request.param == "z of its own":
        monkeypatch.setattr(hopper_layer, "LARGE_Z", 0)
    yield from standing_in(monkeypatch)


@pytest.fixture
def taken(monkeypatch):
    """For each call of a layer, whether it took the short path."""
    found = []
    output = at_once.output

    def watched(layer, x):
        out = output(layer, x)
        found.append(out is not None)
        return out

    monkeypatch.setattr(at_once, "output", watched)
    return found


def run(layer, x, **options):
    """The output and the gradients of x, where it needs one, and of the parameters."""
    out = layer(x)
    leaves = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    return [out, *torch.autograd.grad((out.float() * out.detach().float().cos()).sum(), leaves, **options)]


def same(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


LAYERS = {
    "swiglu": {},
    "geglu_with_biases": {"bias": True, "activation": "geglu", "gate_up_layout": "concatenated"},
    "relu_squared_with_selection_bias": {
        "activation": "relu_squared",
        "selection_bias": True,
        "router": RouterConfig(k=K, scoring="sigmoid", renormalize=True, scale=2.5),
    },
}


@pytest.mark.parametrize("shape", [(T, H), (4, T // 4, H)], ids=["2d", "3d"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_have_the_bits_of_the_general_path(stand_ins, taken, name, shape):
    layer, x = make_layer(**LAYERS[name]), draw().view(shape).requires_grad_()
    if layer.router.selection_bias is not None:
        layer.router.selection_bias.normal_(0, 0.2)
    got = run(layer, x)
    assert [launch for launch in stand_ins.launched if launch != "bias_grad"] == LAUNCHES + BACKWARD
    with torch.no_grad():
        inference = layer(x)
    assert taken == [True, True]
    assert got[0].shape == got[1].shape == inference.shape == shape
    assert not inference.requires_grad
    with backends.one_by_one():
        want = run(layer, x)
    assert taken == [True, True, False]
    same([*got, inference], [*want, want[0]])


def test_tokens_without_a_gradient_get_none_and_cost_none(stand_ins, taken):
    layer, x = make_layer(), draw()
    got = run(layer, x)
    assert stand_ins.launched == LAUNCHES + [launch for launch in BACKWARD if launch not in ("dx_rows", "gather_sum")]
    with backends.one_by_one():
        same(got, run(layer, x))
    assert taken == [True, False]


def test_more_slots_than_one_block_plans(stand_ins, taken):
    layer, x = make_layer(), draw(tokens=1000)
    with torch.no_grad():
        got = layer(x)
        assert stand_ins.launched == ["router_logits", "top_k", "place", *LAUNCHES[3:]]
        with backends.one_by_one():
            same([got], [layer(x)])
    assert taken == [True, False]


def test_a_graph_that_is_kept_gives_its_gradients_again(stand_ins, taken):
    layer, x = make_layer(bias=True), draw().requires_grad_()
    out, leaves = layer(x), [x, *layer.parameters()]
    first, second = (torch.autograd.grad(out.float().sum(), leaves, retain_graph=True) for _ in range(2))
    last = torch.autograd.grad(out.float().sum(), leaves)
    same(first, second)
    same(first, last)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    assert taken == [True]


def test_a_checkpoint_has_the_same_gradients(stand_ins, taken):
    layer, x = make_layer(), draw().requires_grad_()
    want = run(layer, x)
    out = checkpoint(layer, x, use_reentrant=False)
    got = torch.autograd.grad((out.float() * out.detach().float().cos()).sum(), [x, *layer.parameters()])
    same([out, *got], want)
    assert taken == [True, True], "the third call ends as soon as backward has what it needs"
    assert stand_ins.launched == LAUNCHES + BACKWARD + 2 * LAUNCHES + BACKWARD


def test_second_derivatives_are_refused(stand_ins, taken):
    layer, x = make_layer(), draw().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()
    assert taken == [True]


def test_a_backward_that_would_take_more_memory_is_made_one_by_one(stand_ins, monkeypatch):
    """Its scaled_a would be larger than the rows of dx that take its place."""
    torch.manual_seed(0)
    layer, x = MoE(16, 64, E, K, dtype=torch.bfloat16), torch.randn(T, 16).bfloat16().requires_grad_()
    got = run(layer, x)
    arguments = (T, layer.w_up.shape, layer.w_down.shape, x.dtype, x.device, layer.router_config.choice, "swiglu", "interleaved")
    assert hopper_layer_backward.backward(*arguments, False, True) is None
    with backends.one_by_one():
        same(got, run(layer, x))


class Doubling(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


class OtherRouter(Router):
    def forward(self, x):
        return super().forward(x) * 2


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def replaced(layer, name):
    """The layer, changed or watched as ``name`` says."""
    router = layer.router
    changes = {
        "forward hook": lambda: router.register_forward_hook(lambda module, inputs, logits: logits * 2),
        "forward pre-hook": lambda: router.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
        "backward hook": lambda: router.register_full_backward_hook(lambda module, dinputs, doutputs: None),
        "another forward": lambda: setattr(router, "forward", lambda x: Router.forward(router, x) * 2),
        "another router": lambda: setattr(router, "__class__", OtherRouter),
        "parametrized weight": lambda: parametrize.register_parametrization(layer, "w_up", Doubling()),
        "parametrized router": lambda: parametrize.register_parametrization(router, "weight", Doubling()),
        "reference": lambda: setattr(layer, "backend", "reference"),
        "frozen weight": lambda: layer.w_down.requires_grad_(False),
        "frozen router": lambda: router.requires_grad_(False),
        "one bias of two": lambda: setattr(layer, "b_down", None),
    }
    changes[name]()
    return layer


@pytest.mark.parametrize(
    "name",
    [
        *("forward hook", "forward pre-hook", "backward hook", "another forward", "another router", "parametrized weight"),
        *("parametrized router", "reference", "frozen weight", "frozen router", "one bias of two"),
    ],
)
def test_what_others_have_a_say_in_takes_the_general_path(stand_ins, taken, name):
    layer, x = replaced(make_layer(bias="bias" in name), name), draw().requires_grad_()
    got = run(layer, x)
    with backends.one_by_one():
        same(got, run(layer, x))
    assert taken == [False, False]


@contextlib.contextmanager
def global_hook():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


CONTEXTS = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "debug": debug.checks, "mode": Watching, "global hook": global_hook}


@pytest.mark.parametrize("name", CONTEXTS)
def test_where_others_look_on_the_general_path_is_taken(stand_ins, taken, name):
    layer, x = make_layer(), draw()
    want = layer(x)
    with CONTEXTS[name]():
        same([layer(x)], [want])
    assert taken == [True, False]


def test_what_more_is_asked_of_a_layer_takes_the_general_path(stand_ins, taken):
    layer, x = make_layer(), draw()
    want = layer(x)
    out, router = layer(x, return_router=True)
    same([out], [want])
    assert router.logits.shape == (T, E)
    same([layer(x, shared_expert=torch.zeros_like)], [want])
    assert taken == [True]


def test_a_compiled_layer_takes_the_general_path(stand_ins, taken):
    layer, x = make_layer(), draw().requires_grad_()
    want = run(layer, x)
    stand_ins.launched.clear()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    same([out, *torch.autograd.grad((out.float() * out.detach().float().cos()).sum(), [x, *layer.parameters()])], want)
    assert stand_ins.launched == LAUNCHES + BACKWARD
    assert not any(taken[1:])


@pytest.mark.parametrize("change", ["strided x", "misaligned x", "strided w_down", "w_down of another dtype", "w_down of another shape"])
def test_tensors_that_no_kernel_takes_are_refused_by_the_general_path_before_any_launch(stand_ins, taken, change):
    layer, x = make_layer(), draw()
    if change == "strided x":
        x, message = torch.cat((x, x), dim=1)[:, :H], r"^x: shape \(40, 32\) with strides \(64, 1\): must be contiguous$"
    elif change == "misaligned x":
        x = torch.cat((torch.zeros(1, dtype=x.dtype), x.flatten()))[1:].view_as(x)
        message = r"^x: data pointer 0x[0-9a-f]+: must be a multiple of 16 bytes$"
    elif change == "strided w_down":
        layer.w_down.data = torch.cat((layer.w_down.data, layer.w_down.data), dim=2)[..., : layer.intermediate_size]
        message = r"^w_down: shape \(8, 32, 16\) with strides \(1024, 32, 1\): must be contiguous, or be so with its last two"
    elif change == "w_down of another dtype":
        layer.w_down.data, message = layer.w_down.data.half(), "^w_down has dtype torch.float16: must be x's torch.bfloat16$"
    else:
        layer.w_down.data, message = layer.w_down.data[:, :, :8].contiguous(), r"^w_up has shape \(8, 32, 32\): must be \(8, 16, 32\)"
    for no_gradient in (True, False):
        with torch.set_grad_enabled(not no_gradient), pytest.raises((TypeError, ValueError), match=message):
            layer(x)
    assert taken == [False, False]
    assert set(stand_ins.launched) <= {"router_logits", "top_k"}


def test_an_error_of_a_kernel_is_the_layers_and_ends_its_launches(stand_ins, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error 700")

    monkeypatch.setattr(stand_ins, "up_projection", broken)
    with torch.no_grad(), pytest.raises(RuntimeError, match="CUDA error 700"):
        make_layer()(draw())
    assert stand_ins.launched == LAUNCHES[:4]


def test_no_tokens_and_a_deep_copy(stand_ins):
    layer = make_layer()
    want = layer(draw())
    assert layer(draw(tokens=1)[:0]).shape == (0, H)
    same([copy.deepcopy(layer)(draw())], [want])


def test_threads_may_call_one_layer_at_once(stand_ins):
    layer, inputs = make_layer(), [draw(seed=seed) for seed in range(4)]
    with torch.no_grad():
        want = [layer(x) for x in inputs]
    got = [None] * len(inputs)

    def work(index):
        with torch.no_grad():
            for _ in range(5):
                got[index] = layer(inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(got, want)


def test_backward_keeps_z_and_indices_only(stand_ins, taken):
    layer, x = make_layer(), draw(tokens=1000).requires_grad_()
    kept = saved_mib(lambda: layer(x), [x, *layer.parameters()]) * 2**20
    assert taken
    assert all(taken)
    rows, z = 1000 * K, 2 * 2 * layer.intermediate_size
    assert 0 <= kept - rows * (z + 16) - 4 * (E + 1 + TICKETS) <= 3 * 256


def test_inference_takes_no_more_memory_than_the_operations_one_by_one(stand_ins):
    """Bytes of what is allocated at once: the plan, a, y and the rest, and the output."""
    layer, x = make_layer(), draw(tokens=1000)
    arguments = (x.shape, layer.w_up.shape, x.dtype, x.device, "auto", layer.router_config.choice, "swiglu", "interleaved")
    forward = hopper_layer.forward(*arguments, False, False, False, False)
    rows, a, y = 1000 * K, 2 * layer.intermediate_size, 2 * H
    launch = hopper._forward_launch(
        x.shape, layer.w_up.shape, rows, K, x.dtype, torch.int32, torch.float32, x.device, *arguments[6:], *[False] * 5
    )
    apart = rows * (a + y + 4 * 4) + 4 * launch.plan.size + 4 * launch.plan.counts[0] * launch.plan.counts[1]
    assert apart <= 2 * forward.scratch <= apart + 8 * 256


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 1000], ids=["one_block_plans", "two_launches_plan"])
def test_on_a_gpu_bits_streams_and_capture_are_those_of_the_general_path(taken, tokens):
    torch.manual_seed(0)
    layer = MoE(1024, 512, 64, 8, dtype=torch.bfloat16, device="cuda", backend="hopper")
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    got = run(layer, x)
    with backends.one_by_one():
        want = run(layer, x)
    same(got, want)
    assert taken == [True, False]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        late = x.detach() * 0
        torch.cuda._sleep(10_000_000)
        late += x  # a launch on another stream would read zeros
        other = layer(late)
    torch.cuda.current_stream().wait_stream(stream)
    same([other], [want[0]])

    graph, into = torch.cuda.CUDAGraph(), x.detach().clone()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = layer(into)
    into.copy_(x.detach().flip(0))
    graph.replay()
    with torch.no_grad():
        same([captured], [layer(x.detach().flip(0).contiguous())])
