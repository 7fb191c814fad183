"""What transformers does with a model must not notice whose experts it has; what cannot be computed exactly is refused."""

import subprocess
import sys
import tomllib
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

from sonicmoe.integrations import transformers as integration  # noqa: E402

TOKENS = torch.arange(1, 25).reshape(2, 12)


def make_config(**options):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    return transformers.Qwen3MoeConfig(**sizes | options)


def make_model(experts=integration.NAME, **options):
    torch.manual_seed(0)
    config = make_config(initializer_range=0.2, **options)
    return transformers.Qwen3MoeForCausalLM._from_config(config, experts_implementation=experts, dtype=torch.float32)


def gradients(model, run=None):
    model.zero_grad()
    (model if run is None else run)(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def make_experts(cls=Qwen3MoeExperts, dtype=torch.float32, **options):
    """An experts module with random weights that runs through the integration."""
    if cls is GptOssExperts:
        config = transformers.GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=8)
    elif cls is NemotronHExperts:
        config = transformers.NemotronHConfig(hidden_size=32, moe_intermediate_size=24, n_routed_experts=8, **options)
    else:
        config = make_config(**options)
    config._experts_implementation = integration.NAME
    experts = cls(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return experts


def make_routing(tokens=6, experts=8, k=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 32, generator=generator)
    values, index = torch.randn(tokens, experts, generator=generator).softmax(1).topk(k)
    return x, index, values


def eager(experts, *inputs):
    return type(experts).forward.__wrapped__(experts, *inputs)


def test_name_is_registered_beside_those_of_transformers():
    assert ALL_EXPERTS_FUNCTIONS[integration.NAME] is integration.experts_forward
    assert ALL_EXPERTS_FUNCTIONS["sonicmoe"].__module__ == "transformers.integrations.sonicmoe"


def test_compiled_model_is_one_graph_with_the_same_gradients():
    model = make_model(num_hidden_layers=1)
    expected = gradients(model)
    assert_equal(gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager")), expected, rtol=1e-5, atol=1e-6)


def test_compiled_gpt_oss_experts_are_one_graph_with_the_same_gradients():
    experts, (x, index, weights) = make_experts(GptOssExperts), make_routing()
    leaves = [x.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
    expected = torch.autograd.grad(experts(x, index, weights).square().sum(), leaves)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, index, weights).square().sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_compiled_experts_serve_every_length_with_at_most_three_graphs():
    """The first length, any other one, and a single token: what a compiled generate() meets."""
    experts, graphs = make_experts(), []

    def backend(module, inputs):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (12, 7, 1, 9, 64):
            inputs = make_routing(tokens)
            assert torch.equal(compiled(*inputs), experts(*inputs))
    assert len(graphs) <= 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    model = make_model().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(gradients(model), expected, rtol=0, atol=0)


def test_saved_model_is_the_one_that_eager_saves(tmp_path):
    model = make_model()
    for name in (integration.NAME, "eager"):
        model.set_experts_implementation(name)
        model.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "eager").iterdir())
    assert files == sorted(path.name for path in (tmp_path / integration.NAME).iterdir())
    assert all((tmp_path / "eager" / name).read_bytes() == (tmp_path / integration.NAME / name).read_bytes() for name in files)


def test_loaded_model_gives_the_logits_of_the_saved_one(tmp_path):
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=integration.NAME)
    assert loaded.config._experts_implementation == integration.NAME
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_frozen_experts_let_gradients_through():
    """As with adapters: the tokens' and the router's gradients are the same, the experts get none."""
    model = make_model()
    expected = gradients(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_equal(got, {name: value for name, value in expected.items() if "experts" not in name}, rtol=0, atol=0)


@pytest.mark.parametrize("index", [8, 11, -1])
def test_ids_beyond_the_experts_are_sentinels(index):
    """They contribute nothing and get no gradient; what is left is eager without those choices."""
    experts, (x, chosen, weights) = make_experts(), make_routing()
    weights = weights.requires_grad_()
    lost = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0]], dtype=torch.bool)
    got = experts(x, chosen.masked_fill(lost, index), weights)
    torch.testing.assert_close(got, eager(experts, x, chosen, weights.masked_fill(lost, 0)), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.sum(), weights)
    assert not gradient[lost].any()
    assert gradient[~lost].all()


def test_rows_of_sentinels_are_never_read():
    """NaN in a token that went to sentinels alone, and in its output's gradient, reaches nothing: no product has seen them."""
    experts, (x, chosen, weights) = make_experts(GptOssExperts), make_routing()
    lost = torch.tensor([1, 4])
    chosen[lost], x[lost] = 8, float("nan")
    leaves = [x.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
    out = experts(x, chosen, weights)
    dout = torch.ones_like(out).index_fill(0, lost, float("nan"))
    gradients = torch.autograd.grad(out, leaves, dout)
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))
    assert not any(tensor[lost].any() for tensor in (out, *gradients[:2]))


@pytest.mark.parametrize("cls", [Qwen3MoeExperts, GptOssExperts])
def test_no_tokens(cls):
    experts, (x, chosen, weights) = make_experts(cls), make_routing(tokens=0)
    out = experts(x.requires_grad_(), chosen, weights)
    assert out.shape == (0, 32)
    out.sum().backward()
    assert not any(parameter.grad.any() for parameter in experts.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_decode_steps_wait_for_no_host_and_replay_in_a_graph(tokens):
    experts = make_experts(dtype=torch.bfloat16).cuda()
    x, chosen, weights = (tensor.cuda() for tensor in make_routing(tokens))
    x, weights = x.bfloat16(), weights.bfloat16()
    with torch.no_grad():
        experts(x, chosen, weights)  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts(x, chosen, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(x, chosen, weights)
        x.copy_(torch.randn_like(x))
        chosen.copy_((chosen + 3) % 8)
        graph.replay()
        assert torch.equal(out, experts(x, chosen, weights))


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "gelu_python", "relu"])
def test_gated_activations_agree_with_eager(activation):
    experts, inputs = make_experts(hidden_act=activation), make_routing()
    torch.testing.assert_close(experts(*inputs), eager(experts, *inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [F.silu, F.gelu, F.relu])
def test_activations_that_are_functions_agree_with_eager(function):
    """As LFM2-MoE holds them."""
    experts, inputs = make_experts(), make_routing()
    del experts.act_fn
    experts.act_fn = function
    torch.testing.assert_close(experts(*inputs), eager(experts, *inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "relu2"])
def test_experts_without_a_gate_agree_with_eager(activation):
    experts, inputs = make_experts(NemotronHExperts, mlp_hidden_act=activation), make_routing()
    torch.testing.assert_close(experts(*inputs), eager(experts, *inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_experts_without_data_give_a_result_without_data(autocast):
    experts = make_experts().to("meta")
    x, chosen, weights = (tensor.to("meta") for tensor in make_routing())
    with torch.autocast("cpu", enabled=autocast):
        out = experts(x, chosen, weights)
    assert (out.shape, out.dtype, out.is_meta) == (x.shape, x.dtype, True)


@pytest.mark.parametrize("cls", [Qwen3MoeExperts, GptOssExperts])
def test_autocast_computes_in_its_dtype_and_returns_the_tokens(cls):
    experts, inputs = make_experts(cls), make_routing()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = experts(*inputs)
        expected = make_experts(cls, torch.bfloat16)(inputs[0].bfloat16(), *inputs[1:])
    assert got.dtype == torch.float32
    assert torch.equal(got, expected.float())


def test_swap_exchanges_every_experts_module():
    model = make_model("eager").eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        integration.swap(model)
        assert model.config._experts_implementation == integration.NAME
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def odd_gate(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.tanh(gate) * up


def spoil(experts, how):
    if how == "gate":
        experts._apply_gate = MethodType(odd_gate, experts)
    elif how == "limit":
        experts.limit = 6.0
    elif how == "norm":
        experts.has_post_expert_norm = True
    elif how == "layout":
        experts.is_concatenated = False
    else:
        experts.act_fn = ACT2FN[how]
    return experts


@pytest.mark.parametrize(
    ("cls", "how", "message"),
    [
        (Qwen3MoeExperts, "gate", "Qwen3MoeExperts has a gate function of its own: must be transformers' default one on"),
        (Qwen3MoeExperts, "layout", "Qwen3MoeExperts has a gate function of its own"),
        (Qwen3MoeExperts, "norm", "Qwen3MoeExperts has a norm behind its experts: must be experts without one, as Mixtral, Qwen2-MoE"),
        (Qwen3MoeExperts, "gelu_pytorch_tanh", r"has the activation GELUTanh: must be silu, gelu \(exact\) or relu, without a gate"),
        (Qwen3MoeExperts, "relu2", "Qwen3MoeExperts has the activation ReLUSquaredActivation: must be silu"),
        (GptOssExperts, "limit", r"GptOssExperts has alpha=1.702, limit=6.0, is_concatenated=False: must be gpt-oss's 1.702, 7.0 and"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused(cls, how, message):
    experts = spoil(make_experts(cls), how)
    with pytest.raises(ValueError, match=message):
        experts(*make_routing())


def test_a_refused_model_keeps_all_of_its_experts():
    model = make_model("eager")
    spoil(model.model.layers[1].mlp.experts, "gelu_pytorch_tanh")
    with pytest.raises(ValueError, match="GELUTanh"):
        integration.swap(model)
    assert model.config._experts_implementation == "eager"


def test_a_model_that_cannot_be_exchanged_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="Linear has no experts that can be exchanged: must be like Mixtral, Qwen2-MoE"):
        integration.swap(nn.Linear(8, 8))
    model = make_model("eager")
    monkeypatch.setattr(type(model), "_can_set_experts_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM does not let all of its experts be exchanged"):
        integration.swap(model)
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("version", ["5.13.1", "5.24.0", "6.0.0"])
def test_an_untested_version_of_transformers_is_refused(version):
    with pytest.raises(ImportError, match=rf"needs transformers 5\.14 to 5\.23: pip install 'sonicmoe\[transformers\]', not {version}"):
        integration._check_version(version)


def test_the_extra_asks_for_the_tested_versions():
    project = tomllib.loads((Path(__file__).absolute().parents[2] / "pyproject.toml").read_text())["project"]
    major, minor = integration.NEWEST.split(".")
    expected = f"transformers>={integration.OLDEST},<{major}.{int(minor) + 1}"
    assert project["optional-dependencies"]["transformers"] == [expected]


def test_missing_transformers_is_named():
    code = "import sys; sys.modules['transformers'] = None; import sonicmoe.integrations.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == f"ImportError: {integration._NEEDS}"
