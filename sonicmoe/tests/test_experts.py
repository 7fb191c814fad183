import functools
import weakref

import pytest
import torch

import dispatch
from dispatch.kernels.sizes import TICKETS
from routing import Routing, token_rounding, top_k
from sonicmoe import accuracy, oracle, routed_experts, validation
from sonicmoe.activations import ACTIVATIONS, is_gated
from sonicmoe.backends import reference
from sonicmoe.names import LAYOUTS

H, I = 16, 8


def make_inputs(num_experts, *, tokens, dtype, activation="swiglu", seed=0):
    """x, w_up, w_down, b_up, b_down, all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    width = I * (2 if is_gated(activation) else 1)
    shapes = ((tokens, H), (num_experts, width, H), (num_experts, H, I), (num_experts, width), (num_experts, H))
    scales = (1, H**-0.5, I**-0.5, 0.5, 0.5)
    drawn = (torch.randn(*shape, generator=generator, dtype=dtype) * scale for shape, scale in zip(shapes, scales, strict=True))
    return [tensor.requires_grad_() for tensor in drawn]


def make_routing(experts, *, num_experts, dtype=torch.float32, slots_per_token=None, tokens=None):
    """One slot per entry of ``experts``, in token order where ``tokens`` does not say otherwise."""
    tokens = list(range(len(experts))) if tokens is None else tokens
    score = torch.rand(len(experts), generator=torch.Generator().manual_seed(1), dtype=dtype) + 0.5
    live = torch.tensor([0 <= expert < num_experts for expert in experts], dtype=torch.bool)
    score = torch.where(live, score, 0).requires_grad_()
    indices = (torch.tensor(values, dtype=torch.int32) for values in (tokens, experts))
    return Routing(*indices, score, max(tokens, default=-1) + 1, num_experts, slots_per_token)


def call(x, w_up, w_down, b_up, b_down, score, *, routing, **options):
    return routed_experts(x, w_up, w_down, routing._replace(score=score), b_up=b_up, b_down=b_down, **options)


ROUTINGS = {
    "empty_experts_and_sentinels": make_routing([1, 4, -1, 1, 3, 1], num_experts=5, dtype=torch.float64),
    "all_rows_to_one_expert": make_routing([2, 2, 2, 2], num_experts=3, dtype=torch.float64),
    "slots_out_of_token_order": make_routing([0, 1, 0, 2], tokens=[3, 0, 1, 3], num_experts=3, dtype=torch.float64),
    "nothing_but_sentinels": make_routing([7, -1], num_experts=2, dtype=torch.float64),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_finite_differences(activation):
    """Both layouts, with biases, on a routing with empty experts and sentinels."""
    routing = ROUTINGS["empty_experts_and_sentinels"]
    inputs = make_inputs(5, tokens=routing.num_tokens, dtype=torch.float64, activation=activation)
    for layout in LAYOUTS if is_gated(activation) else LAYOUTS[:1]:
        function = functools.partial(call, routing=routing, activation=activation, gate_up_layout=layout)
        assert torch.autograd.gradcheck(function, [*inputs, routing.score], fast_mode=True)


@pytest.mark.parametrize("method", [top_k, functools.partial(token_rounding, tile_m=4, mode="nearest")])
def test_gradients_reach_the_logits(method):
    inputs = make_inputs(4, tokens=12, dtype=torch.float64)
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)

    def function(logits, x):
        return routed_experts(x, *inputs[1:3], method(logits, 2))

    assert torch.autograd.gradcheck(function, (logits, inputs[0]), fast_mode=True)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_tensor_agrees_with_the_oracle(name, dtype):
    routing = ROUTINGS[name]
    if dtype != torch.float64:
        routing = routing._replace(score=routing.score.detach().float().requires_grad_())
    x, w_up, w_down, b_up, b_down = inputs = make_inputs(routing.num_experts, tokens=routing.num_tokens, dtype=dtype)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    out = call(*inputs, routing.score, routing=routing)
    gradients = torch.autograd.grad(out, [*inputs, routing.score], dout)
    got = dict(zip(("dx", "dw_up", "dw_down", "db_up", "db_down", "dscore"), gradients, strict=True), o=out.detach())
    expected = oracle.experts(x, w_up, w_down, routing, dout, b_up=b_up, b_down=b_down)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(got.pop("dscore").double(), expected.pop("dscore"), rtol=tolerance, atol=1e-2)
    assert accuracy.failures(accuracy.measure_all(got, expected), accuracy.THRESHOLDS[dtype]) == []


def test_layouts_give_the_same_values():
    routing = ROUTINGS["empty_experts_and_sentinels"]
    x, w_up, w_down, b_up, b_down = make_inputs(5, tokens=routing.num_tokens, dtype=torch.float64)
    interleaved = call(x, w_up, w_down, b_up, b_down, routing.score, routing=routing)
    apart = [torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1) for tensor in (w_up, b_up)]
    concatenated = call(x, apart[0], w_down, apart[1], b_down, routing.score, routing=routing, gate_up_layout="concatenated")
    torch.testing.assert_close(concatenated, interleaved)


def test_empty_expert_leaves_gradient_zero():
    routing = ROUTINGS["all_rows_to_one_expert"]
    inputs = make_inputs(3, tokens=4, dtype=torch.float64)
    for gradient in torch.autograd.grad(call(*inputs, routing.score, routing=routing).sum(), inputs[1:]):
        assert not gradient[[0, 1]].any()
        assert gradient[2].any()


def test_no_tokens_give_empty_output_and_zero_gradients():
    routing = make_routing([], num_experts=3)
    inputs = make_inputs(3, tokens=0, dtype=torch.float32)
    out = call(*inputs, routing.score, routing=routing)
    assert out.shape == (0, H)
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_tail_rows_are_never_read(monkeypatch):
    """Uninitialised memory is filled with NaN, and a third of the slots are sentinels, so the buffers have a tail."""
    routing = make_routing([0, 9, 1, 9, 0, 1], num_experts=2)
    inputs = make_inputs(2, tokens=6, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        assert torch.empty(3).isnan().all()
        out = call(*inputs, routing.score, routing=routing)
        gradients = torch.autograd.grad(out.sum(), [*inputs, routing.score])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))
    assert not out[[1, 3]].any()


def test_a_result_does_not_change_between_runs():
    routing = top_k(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), 2)
    inputs = make_inputs(4, tokens=64, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        out = call(*inputs, routing.score, routing=routing)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_output_gradient_may_be_expanded_or_transposed():
    routing = ROUTINGS["slots_out_of_token_order"]
    inputs = make_inputs(3, tokens=4, dtype=torch.float64)
    out = call(*inputs, routing.score, routing=routing)
    for dout in (torch.tensor(2.0, dtype=torch.float64).expand(4, H), torch.randn(H, 4, dtype=torch.float64).T):
        got = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        expected = torch.autograd.grad(out, inputs, dout.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_weights_may_be_transposed_views():
    """As gpt-oss stores them: (E, H, 2I) and (E, I, H)."""
    routing = ROUTINGS["slots_out_of_token_order"]
    x, w_up, w_down, b_up, b_down = make_inputs(3, tokens=4, dtype=torch.float64)
    expected = call(x, w_up, w_down, b_up, b_down, routing.score, routing=routing)
    stored = [weight.detach().mT.contiguous().mT for weight in (w_up, w_down)]
    torch.testing.assert_close(call(x, *stored, b_up, b_down, routing.score, routing=routing), expected, rtol=1e-12, atol=1e-12)


class Kept:
    """What autograd saves within the block, by storage."""

    def __enter__(self):
        self.bytes = {}

        def pack(tensor):
            self.bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def beyond(self, *tensors):
        own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return sum(size for pointer, size in self.bytes.items() if pointer not in own)


def test_saves_z_and_indices_only():
    tokens, k, experts = 256, 4, 8
    routing = top_k(torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)), k)
    routing = routing._replace(score=routing.score.detach().requires_grad_())
    inputs = make_inputs(experts, tokens=tokens, dtype=torch.bfloat16)
    with Kept() as kept:
        call(*inputs, routing.score, routing=routing)
    rows = tokens * k
    z = rows * 2 * I * 2
    indices = 4 * (2 * rows + experts + 1 + TICKETS)
    assert kept.beyond(*inputs, routing.score) == z + indices


def test_tokens_of_the_rows_are_free_when_the_rows_of_dx_are_made(monkeypatch):
    """That is the peak of a step; K slots a token say whose the rows are."""
    seen = []

    def spy(name):
        right = getattr(reference, name)

        def operation(*args, **options):
            (plan,) = (arg for arg in args if isinstance(arg, dispatch.DispatchPlan))
            seen.append(weakref.ref(plan.row_to_token) if name == "up_weight_grad" else seen[0]())
            return right(*args, **options)

        monkeypatch.setattr(reference, name, operation)

    spy("up_weight_grad")
    spy("dx_rows")
    inputs = make_inputs(4, tokens=6, dtype=torch.float32)
    routing = top_k(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 2)
    call(*inputs, routing.score, routing=routing).sum().backward()
    assert len(seen) == 2
    assert seen[1] is None


class Calls:
    """Counts the calls of the reference backend's operations."""

    OPERATIONS = ("up_projection", "down_projection", "activation_backward", "down_weight_grad", "up_weight_grad", "dx_rows")

    def __init__(self, monkeypatch):
        self.made = {}
        for name in self.OPERATIONS:
            monkeypatch.setattr(reference, name, functools.partial(self._record, name, getattr(reference, name)))

    def _record(self, name, operation, *args, **options):
        self.made[name] = options
        return operation(*args, **options)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_inference_does_not_store_z(monkeypatch, grad_mode):
    routing = ROUTINGS["slots_out_of_token_order"]
    inputs = make_inputs(3, tokens=4, dtype=torch.float64)
    calls = Calls(monkeypatch)
    with grad_mode(), Kept() as kept:
        out = call(*inputs, routing.score, routing=routing)
    assert calls.made["up_projection"]["store_z"] is False
    assert not out.requires_grad
    assert not kept.bytes


NEEDED = {
    "x": {"activation_backward", "dx_rows"},
    "w_up": {"activation_backward", "up_weight_grad"},
    "w_down": {"activation_backward", "down_weight_grad"},
    "b_up": {"activation_backward", "up_weight_grad"},
    "b_down": {"down_weight_grad"},
    "score": {"activation_backward"},
}


@pytest.mark.parametrize("only", NEEDED)
def test_inputs_that_need_no_gradient_cost_nothing(monkeypatch, only):
    routing = ROUTINGS["empty_experts_and_sentinels"]
    names = list(NEEDED)
    everything = [*make_inputs(5, tokens=routing.num_tokens, dtype=torch.float64), routing.score]
    full = torch.autograd.grad(call(*everything, routing=routing).sum(), everything[names.index(only)])[0]
    frozen = [tensor.detach().requires_grad_(name == only) for name, tensor in zip(names, everything, strict=True)]
    calls = Calls(monkeypatch)
    out = call(*frozen, routing=routing)
    assert calls.made["up_projection"]["store_z"] is (only != "b_down")
    calls.made.clear()
    out.sum().backward()
    assert set(calls.made) == NEEDED[only]
    asked = calls.made.get("activation_backward", {})
    assert asked.get("need_dscore", False) is (only == "score")
    assert asked.get("need_scaled_a", False) is (only == "w_down")
    assert torch.equal(frozen[names.index(only)].grad, full)


def test_w_down_alone_needs_no_product_of_the_activation_backward(monkeypatch):
    """Its gradient needs score * a, which is elementwise: dout . w_down is not computed."""
    routing = ROUTINGS["all_rows_to_one_expert"]
    x, w_up, w_down, *_ = (tensor.detach() for tensor in make_inputs(3, tokens=4, dtype=torch.float64))
    calls = Calls(monkeypatch)
    out = routed_experts(x, w_up, w_down.requires_grad_(), routing._replace(score=routing.score.detach()))
    products = []
    monkeypatch.setattr(reference, "matmul", lambda a, b: products.append((a.shape, b.shape)) or a @ b)
    out.sum().backward()
    assert calls.made["activation_backward"]["need_dz"] is False
    assert products == [((H, 4), (4, I))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_breaks_to_the_same_bits(dtype):
    inputs = make_inputs(4, tokens=12, dtype=dtype)
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def function(logits, x, w_up, w_down, b_up, b_down):
        return routed_experts(x, w_up, w_down, top_k(logits, 2), b_up=b_up, b_down=b_down)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for form in (function, compiled):
        out = form(logits, *inputs)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [logits, *inputs])])
    assert all(torch.equal(eager, traced) for eager, traced in zip(*results, strict=True))
    frozen = [tensor.detach() for tensor in (logits, *inputs)]
    assert torch.equal(compiled(*frozen), function(*frozen))


def test_traced_forward_holds_one_operator():
    graphs = []

    def backend(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes if str(node.target).startswith("sonicmoe")])
        return graph

    routing = ROUTINGS["all_rows_to_one_expert"]
    routing = routing._replace(score=routing.score.detach())
    inputs = [tensor.detach() for tensor in make_inputs(3, tokens=4, dtype=torch.float64)]
    compiled = torch.compile(lambda *tensors: call(*tensors, routing.score, routing=routing), fullgraph=True, backend=backend)
    assert torch.equal(compiled(*inputs), call(*inputs, routing.score, routing=routing))
    assert graphs == [["sonicmoe.routed_experts.default"]]


def test_second_derivatives_are_refused():
    routing = ROUTINGS["all_rows_to_one_expert"]
    inputs = make_inputs(3, tokens=4, dtype=torch.float64)
    (dx,) = torch.autograd.grad(call(*inputs, routing.score, routing=routing).sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivatives .* are not available"):
        dx.sum().backward()


def test_a_routers_ids_and_scores_are_taken_as_they_are():
    """Without tokens, in int64 and bfloat16: the bits of the same written out in float32, in values and gradients."""
    inputs = make_inputs(5, tokens=3, dtype=torch.bfloat16)
    score = torch.rand(6, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    ids = torch.tensor([1, 4, -1, 1, 3, 2])
    routing = Routing(None, ids, score, num_tokens=3, num_experts=5, slots_per_token=2)
    written_out = routing._replace(token_index=routing.tokens(), expert_index=ids.int(), score=score.float())
    assert routing.tokens().tolist() == [0, 0, 1, 1, 2, 2]
    results = []
    for one in (routing, written_out):
        out = call(*inputs, one.score, routing=one)
        with torch.no_grad():
            assert torch.equal(out, call(*inputs, one.score, routing=one))
        results.append((out, *torch.autograd.grad(out.float().square().sum(), [*inputs, score])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_autocast_does_not_reach_inside():
    routing = ROUTINGS["all_rows_to_one_expert"]
    routing = routing._replace(score=routing.score.detach().float())
    inputs = [tensor.detach() for tensor in make_inputs(3, tokens=4, dtype=torch.float32)]
    expected = call(*inputs, routing.score, routing=routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(*inputs, routing.score, routing=routing), expected)


GOOD = ROUTINGS["all_rows_to_one_expert"]
BAD = {
    "w_up_3d": (lambda a: a.update(w_up=a["w_up"][0]), ValueError, r"w_up has shape \(16, 16\): must be \(E, 2I, H\)"),
    "hidden_size": (lambda a: a.update(x=a["x"][:, :12]), ValueError, "hidden_size=12: must be a multiple of 8"),
    "w_up_shape": (lambda a: a.update(activation="relu"), ValueError, r"w_up has shape \(3, 16, 16\): must be \(3, 8, 16\)"),
    "w_down_shape": (lambda a: a.update(w_down=a["w_down"][:, :8]), ValueError, r"w_down has shape \(3, 8, 8\): must be \(3, 16, 8\)"),
    "b_up_shape": (lambda a: a.update(b_up=torch.zeros(3, 8)), ValueError, r"b_up has shape \(3, 8\): must be \(3, 16\)"),
    "dtype": (lambda a: a.update(w_down=a["w_down"].float()), TypeError, r"w_down has dtype torch.float32: must be x's torch.float64"),
    "x_dtype": (lambda a: a.update(x=a["x"].long()), TypeError, r"dtype=torch.int64: must be one of torch.bfloat16"),
    "device": (lambda a: a.update(w_up=a["w_up"].to("meta")), ValueError, "w_up is on meta: must be on x's device cpu"),
    "bias_device": (
        lambda a: a.update(b_down=torch.zeros(3, 16, dtype=torch.float64, device="meta")),
        ValueError,
        "b_down is on meta: must",
    ),
    "routing_device": (
        lambda a: a.update(routing=GOOD._replace(score=GOOD.score.detach().to("meta"))),
        ValueError,
        "routing.score is on meta: must be on x's device cpu",
    ),
    "activation": (lambda a: a.update(activation="swish"), ValueError, r"activation='swish': must be one of swiglu, geglu"),
    "layout": (lambda a: a.update(gate_up_layout="mixed"), ValueError, r"gate_up_layout='mixed': must be one of interleaved, conc"),
    "backend": (lambda a: a.update(backend="cuda"), ValueError, r"backend='cuda': must be one of auto, hopper, reference"),
    "num_tokens": (lambda a: a.update(routing=GOOD._replace(num_tokens=5)), ValueError, r"routing.num_tokens=5: must be 4"),
    "num_experts": (lambda a: a.update(routing=GOOD._replace(num_experts=2)), ValueError, r"routing.num_experts=2: must be 3"),
    "score_shape": (lambda a: a.update(routing=GOOD._replace(score=torch.ones(3))), ValueError, r"routing.score has shape \(3,\)"),
    "score_dtype": (lambda a: a.update(routing=GOOD._replace(score=torch.ones(4).half())), TypeError, r"routing.score has dtype torch.f"),
    "no_tokens": (lambda a: a.update(routing=GOOD._replace(token_index=None)), ValueError, "routing.token_index is None: must be a tensor"),
    "no_tokens_k": (
        lambda a: a.update(routing=GOOD._replace(token_index=None, slots_per_token=2)),
        ValueError,
        r"routing.slots_per_token=2: must be the 4 slots of each of 4 tokens",
    ),
    "index_dtype": (lambda a: a.update(routing=GOOD._replace(token_index=torch.ones(4))), TypeError, r"routing.token_index has dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_any_work(monkeypatch, name):
    change, error, message = BAD[name]
    x, w_up, w_down, *_ = make_inputs(3, tokens=4, dtype=torch.float64)
    arguments = {"x": x, "w_up": w_up, "w_down": w_down, "routing": GOOD}
    change(arguments)
    calls = Calls(monkeypatch)
    with pytest.raises(error, match=message) as caught:
        routed_experts(**arguments)
    assert "\n" not in str(caught.value)
    assert not calls.made


@pytest.mark.parametrize("name", BAD)
def test_the_quick_check_refuses_what_the_explaining_one_does(name):
    x, w_up, w_down, b_up, b_down = make_inputs(3, tokens=4, dtype=torch.float64)
    arguments = {"x": x, "w_up": w_up, "w_down": w_down, "routing": GOOD, "b_up": b_up, "b_down": b_down}
    options = {"activation": "swiglu", "gate_up_layout": "interleaved", "backend": "auto"}
    assert validation._is_sound(**arguments, **options)
    validation._refuse(**arguments, **options)
    changed = arguments | options
    BAD[name][0](changed)
    assert not validation._is_sound(**changed)
