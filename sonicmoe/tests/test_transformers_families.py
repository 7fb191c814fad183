"""Every family from its config, small and with random weights, against its own eager experts."""

from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from sonicmoe import accuracy  # noqa: E402
from sonicmoe.integrations import transformers as integration  # noqa: E402
from sonicmoe.kernels.variants import layer_variants  # noqa: E402
from sonicmoe.tests.kernel_options import kernel_options  # noqa: E402

BFLOAT16 = accuracy.THRESHOLDS[torch.bfloat16]
LAYERS, EXPERTS, K = 2, 32, 2
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 63,
}
MLA = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
GROUPS = {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.5}
FAMILIES = {
    "mixtral": {"num_local_experts": EXPERTS, "sliding_window": None},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 8},
    "olmoe": {"num_experts": EXPERTS},
    "deepseek_v2": {"n_routed_experts": EXPERTS, "moe_intermediate_size": 24, "topk_method": "group_limited_greedy", **GROUPS, **MLA},
    "deepseek_v3": {"n_routed_experts": EXPERTS, "moe_intermediate_size": 24, **GROUPS, **MLA},
    "glm4_moe": {"n_routed_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8, **GROUPS},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
}

ON_CPU = [pytest.param(family, "cpu", id=family) for family in FAMILIES]
ON_GPU = [pytest.param(family, "cuda", id=f"{family}-cuda", marks=pytest.mark.gpu) for family in FAMILIES]
"""(family, device): bfloat16 on an sm_90 GPU is our kernels."""


def gpu_kernels():
    """What the families on a GPU load, for `build_defs.gpu_kernels`: what their experts declare, in bfloat16."""
    found = []
    for family in FAMILIES:
        experts = make_model(family, num_hidden_layers=1, layer_types=["full_attention"]).model.layers[0].mlp.experts
        activation, layout = integration._options(experts)
        found += layer_variants(**kernel_options(activation, layout, experts.has_bias), transposed=experts.is_transposed)
    return found


# Two rows, the second padded on the left; 7 positions times K = 2 are fewer slots than there are experts.
TOKENS = torch.tensor([[5, 9, 33, 2, 17, 60, 41], [0, 0, 0, 7, 12, 50, 28]])
MASK = (TOKENS != 0).long()
LABELS = TOKENS.masked_fill(MASK == 0, -100)


def make_model(family, **options):
    """In float32, with weights that let every part of the model count: the initial ones are so small that experts hardly matter.

    The same bits every time, gpt-oss's attention sinks and router biases included, which stay as transformers draws them.
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **COMMON | FAMILIES[family] | options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif tensor.dim() > 1:
                # gpt-oss clamps at 7: its z has a standard deviation of 4.
                scale = 4.0 if family == "gpt_oss" and "gate_up_proj" in name else 1.0
                tensor.copy_(scale * tensor.shape[-1] ** -0.5 * torch.randn(tensor.shape, generator=generator))
    return model.train()


def set_experts(model, implementation):
    model.set_experts_implementation(implementation)
    return model


def train_step(model):
    """loss, logits and every parameter's gradient."""
    model.zero_grad()
    tokens, mask, labels = (tensor.to(model.device) for tensor in (TOKENS, MASK, LABELS))
    out = model(input_ids=tokens, attention_mask=mask, labels=labels)
    out.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": out.loss.detach(), "logits": out.logits.detach()[mask.bool()], **gradients}


def errors(got, expected):
    """Relative Frobenius errors by name; infinite where only one side is zero."""
    assert got.keys() == expected.keys()
    norms = {
        name: (torch.linalg.norm((got[name] - value).double()).item(), torch.linalg.norm(value.double()).item())
        for name, value in expected.items()
    }
    return {name: error / norm if norm else (float("inf") if error else 0.0) for name, (error, norm) in norms.items()}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of all calls of routed_experts."""
    made, function = [], integration.routed_experts

    def record(*args, **kwargs):
        made.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(integration, "routed_experts", record)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_every_gradient_agree_with_eager_experts(family, calls):
    """Float32, with padding and experts without rows."""
    model = set_experts(make_model(family), "eager")
    expected = train_step(model)
    assert not calls
    got = train_step(set_experts(model, integration.NAME))
    assert len(calls) == LAYERS
    down = expected["model.layers.0.mlp.experts.down_proj"]
    assert 0 < (down.flatten(1).norm(dim=1) == 0).sum() < EXPERTS
    assert not {name: error for name, error in errors(got, expected).items() if not error <= 1e-5}


def in_float64(experts, parameters, x, index, weights):
    """The family's own eager forward, all in float64."""
    stand_in = SimpleNamespace(
        num_experts=experts.num_experts,
        act_fn=getattr(experts, "act_fn", None),
        _apply_gate=experts._apply_gate,
        **{name: parameter.double() for name, parameter in parameters.items()},
    )
    return type(experts).forward.__wrapped__(stand_in, x.double(), index, weights.double())


def make_rows(experts, tokens=24):
    """Bfloat16 x (tokens, H), index and weights (tokens, K) and the output's gradient: the same bits on every machine.

    The gradient jumps where z meets a clamp: a token with a z so near to one that rounding may decide on its side is not taken.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3 * tokens, COMMON["hidden_size"], generator=generator).bfloat16()
    weights, index = torch.randn(3 * tokens, EXPERTS, generator=generator).softmax(1).bfloat16().topk(K)
    if limit := getattr(experts, "limit", None):
        z = torch.einsum("th,tkhz->tkz", x.double(), experts.gate_up_proj[index].double()) + experts.gate_up_proj_bias[index].double()
        clear = ((z.abs() - limit).abs() > 2**-5).flatten(1).all(1)
        x, index, weights, z = (tensor[clear] for tensor in (x, index, weights, z))
        gate, up = z[:tokens, :, 0::2], z[:tokens, :, 1::2]
        assert all(beyond.any() for beyond in (gate > limit, gate < -limit, up > limit, up < -limit))
    return x[:tokens], index[:tokens], weights[:tokens], torch.randn(tokens, x.shape[1], generator=generator).bfloat16()


def by_block(tensors):
    """Each token of x and the output, each expert of the parameters.

    Not of the scores' gradients: two numbers that are sums of both signs are at times so small that any rounding shows.
    """
    return {f"{name}[{place}]": block for name, tensor in tensors.items() if name != "weights" for place, block in enumerate(tensor)}


@pytest.mark.parametrize(("family", "device"), ON_CPU + ON_GPU)
def test_bfloat16_experts_are_exact_but_for_their_roundings(family, device, calls):
    """The experts alone, called as a bfloat16 model calls them: values and all gradients, each token and each expert.

    A whole bfloat16 model would measure its attention and router instead: their roundings depend on the CPU's matmul kernels and
    threads. Here products accumulate in float32, and all that rounds is z, a, y and the results.
    """
    model = set_experts(make_model(family, num_hidden_layers=1, layer_types=["full_attention"]).bfloat16(), integration.NAME)
    x, index, weights, dout = (tensor.to(device) for tensor in make_rows(model.model.layers[0].mlp.experts))
    assert model.to(device)(input_ids=TOKENS.to(device), attention_mask=MASK.to(device)).logits.dtype == torch.bfloat16
    assert [tensor.dtype for tensor in calls[0][0][:3]] == 3 * [torch.bfloat16]
    experts = model.model.layers[0].mlp.experts
    inputs = {"x": x, "weights": weights, **{name: parameter.detach() for name, parameter in experts.named_parameters()}}

    def run(function, dtype):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
        parameters = {name: leaf for name, leaf in leaves.items() if name not in ("x", "weights")}
        out = function(experts, parameters, leaves["x"], index, leaves["weights"])
        gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(dtype))
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    def ours(experts, parameters, *rows):
        return torch.func.functional_call(experts, parameters, rows)

    got, exact = run(ours, torch.bfloat16), run(in_float64, torch.float64)
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    assert 0 < (exact["down_proj"].flatten(1).norm(dim=1) == 0).sum() < EXPERTS
    assert not {name: error for name, error in errors(got, exact).items() if not error <= BFLOAT16.whole}
    found = errors(by_block(got), by_block(exact))
    assert not {name: error for name, error in found.items() if not error <= BFLOAT16.worst_block}


def exact_implementation(experts, x, index, weights):
    parameters = {name: parameter.bfloat16() for name, parameter in experts.named_parameters()}
    return in_float64(experts, parameters, x.bfloat16(), index, weights).to(x.dtype)


def bfloat16_implementation(experts, x, index, weights):
    with torch.autocast(x.device.type, torch.bfloat16):
        return integration.experts_forward(experts, x, index, weights)


@pytest.fixture
def exact_and_bfloat16(monkeypatch):
    """Names of two experts implementations for a float32 model, which differ by the experts' roundings to bfloat16 alone."""
    functions = (exact_implementation, bfloat16_implementation)
    for function in functions:
        monkeypatch.setitem(integration.ALL_EXPERTS_FUNCTIONS._global_mapping, function.__name__, function)
    return [function.__name__ for function in functions]


@pytest.mark.parametrize(("family", "device"), ON_CPU + ON_GPU)
def test_a_model_with_bfloat16_experts_is_near_to_one_with_exact_ones(family, device, exact_and_bfloat16):
    """Loss, logits and every gradient, with padding. One layer, so that no token changes its experts."""
    model = make_model(family, num_hidden_layers=1, layer_types=["full_attention"]).to(device)
    exact, got = (train_step(set_experts(model, name)) for name in exact_and_bfloat16)
    assert not {name: error for name, error in errors(got, exact).items() if not error <= BFLOAT16.whole}


@pytest.mark.parametrize(("family", "device"), ON_GPU)
def test_generation_with_bfloat16_experts_is_near_to_that_with_exact_ones(family, device, exact_and_bfloat16):
    """Logits of a padded prompt and of the steps behind it, one token a row."""
    model = make_model(family, num_hidden_layers=1, layer_types=["full_attention"]).to(device).eval()
    prompt = {"input_ids": TOKENS.to(device), "attention_mask": MASK.to(device)}
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    exact, got = (set_experts(model, name).generate(**prompt, **options) for name in exact_and_bfloat16)
    assert torch.equal(got.sequences, exact.sequences)
    found = errors(dict(enumerate(got.logits)), dict(enumerate(exact.logits)))
    assert not {step: error for step, error in found.items() if not error <= BFLOAT16.whole}


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_agrees_with_eager_experts(family, calls):
    """Greedy, from a padded batch: one step of prefill, then one token a row; and one row alone, T=1."""
    model = set_experts(make_model(family).eval(), "eager")
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    for rows in (slice(0, 2), slice(0, 1)):
        prompt = {"input_ids": TOKENS[rows], "attention_mask": MASK[rows]}
        expected = set_experts(model, "eager").generate(**prompt, **options)
        calls.clear()
        got = set_experts(model, integration.NAME).generate(**prompt, **options)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert [len(args[0]) for args, _ in calls] == LAYERS * [TOKENS[rows].numel()] + 4 * LAYERS * [len(TOKENS[rows])]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_used_in_place(family, calls):
    model = set_experts(make_model(family), integration.NAME)
    train_step(model)
    parameters = dict(model.named_parameters())
    for layer, (args, kwargs) in enumerate(calls):
        used = {"gate_up_proj": args[1], "down_proj": args[2], "gate_up_proj_bias": kwargs["b_up"], "down_proj_bias": kwargs["b_down"]}
        for name, tensor in used.items():
            parameter = parameters.get(f"model.layers.{layer}.mlp.experts.{name}")
            assert (tensor is None) == (parameter is None)
            assert tensor is None or tensor.data_ptr() == parameter.data_ptr()
