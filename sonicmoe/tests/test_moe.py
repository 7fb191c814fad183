import copy
import io

import pytest
import torch

from routing import RouterConfig, expert_counts, load_balance_loss, router_z_loss
from sonicmoe import MoE, RouterOutput, accuracy, cases
from sonicmoe.thiek import Thiek

H, I, E, K = 16, 8, 6, 2


def make_layer(seed=0, **options):
    torch.manual_seed(seed)
    return MoE(H, I, E, K, **options)


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(k=2),
        RouterConfig(k=2, scoring="sigmoid", renormalize=True, scale=2.5, num_groups=4, groups_per_token=2),
        RouterConfig(k=2, scoring="softmax_topk", method="token_rounding", tile_m=8, mode="balanced"),
    ],
    ids=["softmax", "grouped_sigmoid", "rounded_softmax_topk"],
)
def test_layer_and_router_agree_with_the_oracle(dtype, router):
    case = cases.make_case(Thiek(150, 32, 16, 8, 2), seed=5, router=router, dtype=dtype, bias=True)
    got, routing = cases.run(case.layer(), case)
    assert accuracy.failures(accuracy.measure_all(got, case.oracle(routing)), accuracy.THRESHOLDS[dtype]) == []


@pytest.mark.parametrize("shape", [(H,), (5, H), (2, 3, H), (0, H), (2, 0, 4, H)])
def test_any_leading_shape(shape):
    layer, x = make_layer(), draw(*shape)
    out = layer(x)
    assert out.shape == x.shape
    if x.numel():
        torch.testing.assert_close(out.reshape(-1, H), layer(x.reshape(-1, H)), rtol=0, atol=0)
    out.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


def test_no_tokens_with_token_rounding():
    layer = make_layer(router=RouterConfig(k=K, method="token_rounding", tile_m=4))
    out, router = layer(draw(0, H), return_router=True)
    assert out.shape == (0, H)
    assert not router.counts.any()


def test_non_contiguous_input():
    layer, x = make_layer(), draw(H, 5).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_router_output_holds_what_monitoring_needs():
    layer, x = make_layer(dtype=torch.bfloat16), draw(7, H, dtype=torch.bfloat16)
    out, router = layer(x, return_router=True)
    assert isinstance(router, RouterOutput)
    assert torch.equal(out, layer(x))
    assert router.logits.dtype == torch.float32
    torch.testing.assert_close(router.logits, x.float() @ layer.router.weight.float().T)
    assert torch.equal(router.counts, expert_counts(router.routing))
    assert router.counts.sum() == 7 * K
    assert torch.equal(router.load_balance_loss, load_balance_loss(router.logits, router.routing))
    assert torch.equal(router.z_loss, router_z_loss(router.logits))
    (router.load_balance_loss + router.z_loss).backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_layer_keeps_no_widened_copy_of_its_input():
    """Beyond x, parameters and what scales with T*E or R, the layer saves z alone."""
    tokens, hidden = 64, 512
    layer = MoE(hidden, I, E, K, dtype=torch.bfloat16)
    x = draw(tokens, hidden, dtype=torch.bfloat16).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.untyped_storage().data_ptr() not in own}
    z = tokens * K * 2 * I * 2
    assert z in sizes.values()
    assert sum(sizes.values()) - z < 8 * (tokens * E * 3 + 8 * tokens * K)
    assert max(sizes.values()) < tokens * hidden * 2


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"bias": True, "activation": "relu_squared", "selection_bias": True}])
def test_state_dict_survives_saving_and_loading(options):
    layer, other = make_layer(0, **options), make_layer(1, **options)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = draw(9, H)
    assert torch.equal(layer(x), other(x))


def test_state_dict_loads_into_another_dtype():
    layer, narrow = make_layer(0, bias=True), make_layer(1, bias=True, dtype=torch.bfloat16)
    narrow.load_state_dict(layer.state_dict())
    assert narrow.w_up.dtype == torch.bfloat16
    x = draw(9, H, dtype=torch.bfloat16)
    assert torch.equal(narrow(x), copy.deepcopy(layer).to(torch.bfloat16)(x))


def test_meta_construction_then_reset_equals_direct_construction():
    layer = MoE(H, I, E, K, bias=True, selection_bias=True, device="meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    torch.manual_seed(3)
    layer.to_empty(device="cpu").reset_parameters()
    direct = make_layer(3, bias=True, selection_bias=True)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("router", [None, RouterConfig(k=K, method="token_rounding", tile_m=4)], ids=["top_k", "token_rounding"])
def test_layer_without_data_has_the_shapes_and_dtypes_of_one_with_data(router, autocast):
    """Under autocast a tensor without data keeps its dtype, as in `torch.nn.Linear`: PyTorch's autocast does not know the meta device."""
    layer = MoE(H, I, E, K, bias=True, router=router, dtype=torch.bfloat16, device="meta")
    x = torch.empty(3, 5, H, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        out, routed = layer(x, return_router=True, shared_expert=torch.nn.functional.silu)
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(out.sum() + routed.load_balance_loss, leaves)
    assert (out.shape, out.dtype, out.is_meta) == (x.shape, torch.bfloat16, True)
    assert (routed.logits.shape, routed.logits.dtype) == ((15, E), torch.float32)
    assert [(gradient.shape, gradient.dtype) for gradient in gradients] == [(leaf.shape, leaf.dtype) for leaf in leaves]


def test_parameters_start_within_one_over_root_fan_in():
    layer = MoE(64, 256, 4, 2, bias=True)
    for name, bound in {"w_up": 1 / 8, "b_up": 1 / 8, "w_down": 1 / 16, "b_down": 1 / 16, "router.weight": 1 / 8}.items():
        values = layer.get_parameter(name)
        assert 0.9 * bound < values.abs().max() <= bound, name


def test_selection_bias_changes_the_choice_and_not_the_score():
    layer, x = make_layer(selection_bias=True), draw(7, H)
    layer.router.selection_bias[4] = 10.0
    routing = layer(x, return_router=True)[1].routing
    chosen = routing.expert_index.reshape(7, K)
    assert (chosen == 4).any(dim=1).all()
    scores = torch.softmax(layer.router(x), dim=1)
    torch.testing.assert_close(routing.score, scores[routing.token_index.long(), routing.expert_index.long()])


def test_autocast_runs_in_its_dtype_with_float32_logits():
    layer, x = make_layer(bias=True), draw(9, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, router = layer(x, return_router=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(router.logits, x @ layer.router.weight.T)
    torch.testing.assert_close(out.float(), layer(x), rtol=5e-2, atol=2e-2)
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("method", ["top_k", "token_rounding"])
def test_compiled_training_step_equals_eager(method):
    layer = make_layer(bias=True, router=RouterConfig(k=K, method=method, tile_m=4))
    x = draw(3, 7, H).requires_grad_()

    def loss(x):
        out, router = layer(x, return_router=True)
        return out.square().sum() + router.load_balance_loss + router.z_loss

    leaves = [x, *layer.parameters()]
    eager = torch.autograd.grad(loss(x), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), leaves)
    assert all(torch.equal(first, second) for first, second in zip(eager, compiled, strict=True))


def test_activation_checkpointing_gives_the_same_gradients():
    layer, x = make_layer(), draw(9, H).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    got = torch.autograd.grad(checkpointed.square().sum(), leaves)
    assert all(torch.equal(first, second) for first, second in zip(expected, got, strict=True))


def test_repr_names_the_settings():
    text = repr(make_layer(bias=True, gate_up_layout="concatenated"))
    for part in ("hidden_size=16", "num_experts=6", "num_experts_per_tok=2", "bias=True", "gate_up_layout=concatenated", "routing=top_k"):
        assert part in text


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((100, 8, 4, 2), {}, "hidden_size=100: must be a multiple of 8"),
        ((16, 12, 4, 2), {}, "intermediate_size=12: must be a multiple of 8"),
        ((16, 8, 4, 5), {}, "num_experts_per_tok=5: must be at most num_experts=4"),
        ((16, 8, 0, 1), {}, "num_experts=0: must be at least 1"),
        ((16, 8, 4, 2), {"activation": "swish"}, "activation='swish': must be one of swiglu"),
        ((16, 8, 4, 2), {"gate_up_layout": "mixed"}, "gate_up_layout='mixed': must be one of interleaved"),
        ((16, 8, 4, 2), {"backend": "cuda"}, "backend='cuda': must be one of auto"),
        ((16, 8, 4, 2), {"router": RouterConfig(k=3)}, "router.k=3: must be num_experts_per_tok=2"),
        ((16, 8, 4, 2), {"router": RouterConfig(k=2, method="hash")}, "method='hash': must be one of"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        MoE(*sizes, **options)


def test_bad_types_are_refused_in_one_sentence():
    with pytest.raises(TypeError, match=r"hidden_size=16.0: must be an int"):
        MoE(16.0, I, E, K)
    with pytest.raises(TypeError, match=r"dtype=torch.int8: must be one of"):
        MoE(H, I, E, K, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"router='token_rounding': must be a routing.RouterConfig or None"):
        MoE(H, I, E, K, router="token_rounding")
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\): must be \(..., 16\)"):
        make_layer()(draw(3, 8))
    with pytest.raises(TypeError, match=r"x has dtype torch.bfloat16: must be the weights' torch.float32"):
        make_layer()(draw(3, H, dtype=torch.bfloat16))
