"""Every family from its config, small and with random weights, against its own eager experts."""

from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from sonicmoe.integrations import transformers as integration  # noqa: E402

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

# Two rows, the second padded on the left; 7 positions times K = 2 are fewer slots than there are experts.
TOKENS = torch.tensor([[5, 9, 33, 2, 17, 60, 41], [0, 0, 0, 7, 12, 50, 28]])
MASK = (TOKENS != 0).long()
LABELS = TOKENS.masked_fill(MASK == 0, -100)


def make_model(family, **options):
    """In float32, with weights that let every part of the model count: the initial ones are so small that experts hardly matter."""
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
    out = model(input_ids=TOKENS, attention_mask=MASK, labels=LABELS)
    out.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": out.loss.detach(), "logits": out.logits.detach()[MASK.bool()], **gradients}


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


def exact_experts(experts, hidden_states, index, weights):
    """The family's own eager forward in float64, rounded once."""
    wide = {name: parameter.double() for name, parameter in experts.named_parameters()}
    stand_in = SimpleNamespace(
        num_experts=experts.num_experts, act_fn=getattr(experts, "act_fn", None), _apply_gate=experts._apply_gate, **wide
    )
    out = type(experts).forward.__wrapped__(stand_in, hidden_states.double(), index, weights.double())
    return out.to(hidden_states.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_exact_experts_as_eager_is(family, monkeypatch):
    """One layer, so that every router sees the same bits and no token changes its experts."""
    monkeypatch.setitem(integration.ALL_EXPERTS_FUNCTIONS._global_mapping, "exact", exact_experts)
    model = make_model(family, num_hidden_layers=1, layer_types=["full_attention"]).bfloat16()
    exact, eager, got = (train_step(set_experts(model, name)) for name in ("exact", "eager", integration.NAME))
    eager_errors, got_errors = errors(eager, exact), errors(got, exact)
    assert max(got_errors.values()) < 3e-2
    # 4e-3 is one rounding to bfloat16; attention's own roundings move its gradients by up to twice eager's error.
    assert not {name: error for name, error in got_errors.items() if not error <= max(2.5 * eager_errors[name], 4e-3)}


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
