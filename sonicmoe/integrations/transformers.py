"""Hugging Face transformers: a model's experts run through `sonicmoe.routed_experts`, in place, on the weights that it has.

Importing this module registers the experts implementation "sonicmoe_experts" (transformers' own "sonicmoe" is another one)::

    import sonicmoe.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="sonicmoe_experts")

`swap` does the same to a model that exists, after checking all of its experts. Any experts class is taken whose declared
properties (transformers' `use_experts_implementation`) say what it computes; what cannot be computed exactly is refused.
Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import nn

from routing import Routing
from sonicmoe.experts import routed_experts

OLDEST, NEWEST = "5.14", "5.23"
"""The tested minor versions of transformers. A later one may add properties of experts that this module would not know."""

_NEEDS = f"sonicmoe.integrations.transformers needs transformers {OLDEST} to {NEWEST}: pip install 'sonicmoe[transformers]'"

try:
    from transformers import __version__ as _version
    from transformers.activations import GELUActivation, ReLUSquaredActivation, SiLUActivation
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
except ImportError as error:
    raise ImportError(_NEEDS) from error


def _check_version(version: str) -> None:
    oldest, found, newest = (tuple(map(int, text.split(".")[:2])) for text in (OLDEST, version, NEWEST))
    if not oldest <= found <= newest:
        raise ImportError(f"{_NEEDS}, not {version}")


_check_version(_version)

__all__ = ["NAME", "experts_forward", "swap"]

NAME = "sonicmoe_experts"

FAMILIES = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "DeepSeek-V2", "DeepSeek-V3", "GLM-4-MoE", "gpt-oss")
"""What the tests build, run and train."""

_PLAIN = {
    SiLUActivation: "silu",
    nn.SiLU: "silu",
    F.silu: "silu",
    GELUActivation: "gelu",
    F.gelu: "gelu",
    nn.ReLU: "relu",
    F.relu: "relu",
    ReLUSquaredActivation: "relu_squared",
}
"""By class or, where experts hold a function, by function."""
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
"""What an activation is called with a gate."""
_SUPPORTED_ACTIVATIONS = "silu, gelu (exact) or relu, without a gate also relu2, or gpt-oss's clamped swiglu"


def experts_forward(self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The forward of a transformers experts module ``self``.

    Under autocast, tokens, weights and biases are cast to autocast's dtype, as `torch.nn.functional.linear` would cast them.

    Args:
        hidden_states: (T, H), the weights' dtype outside of autocast.
        top_k_index: (T, K) experts; a value outside [0, E) is a sentinel, costs nothing and contributes nothing.
        top_k_weights: (T, K) scores.

    Returns:
        (T, H) in ``hidden_states``' dtype.

    Raises:
        ValueError, TypeError: the experts compute what `routed_experts` does not, in one sentence, before any work.
    """
    activation, layout = _options(self)
    tokens, k = top_k_index.shape
    up = "gate_up_proj" if self.has_gate else "up_proj"
    w_up, w_down = getattr(self, up), self.down_proj
    if self.is_transposed:
        w_up, w_down = w_up.mT, w_down.mT
    b_up, b_down = (getattr(self, f"{up}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    x = hidden_states
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_up, w_down, b_up, b_down = (None if tensor is None else tensor.to(dtype) for tensor in (x, w_up, w_down, b_up, b_down))
    scores = top_k_weights.reshape(-1)
    if scores.dtype not in (torch.float32, torch.float64, x.dtype):
        scores = scores.float()
    sizes = {"num_tokens": tokens, "num_experts": w_down.shape[0], "slots_per_token": k}
    routing = Routing(None, top_k_index.reshape(-1), scores, **sizes)
    out = routed_experts(x, w_up, w_down, routing, b_up=b_up, b_down=b_down, activation=activation, gate_up_layout=layout)
    return out.to(hidden_states.dtype)


def swap(model: nn.Module) -> None:
    """Let all experts of a transformers model run through `routed_experts` from now on; all of them or, on an error, none.

    Raises:
        ValueError: the model has no experts that transformers can exchange, or some that `routed_experts` does not compute.
    """
    experts = [module for module in model.modules() if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")]
    if not experts:
        raise ValueError(f"{type(model).__name__} has no experts that can be exchanged: must be like {', '.join(FAMILIES)}")
    for module in experts:
        _options(module)
    before = [(module.config, module.config._experts_implementation) for module in experts]
    model.set_experts_implementation(NAME)
    if any(config._experts_implementation != NAME for config, _ in before):
        for config, implementation in before:
            config._experts_implementation = implementation
        raise ValueError(f"{type(model).__name__} does not let all of its experts be exchanged: must be like {', '.join(FAMILIES)}")


def _options(experts: nn.Module) -> tuple[str, str]:
    """(activation, gate_up_layout) with which `routed_experts` computes exactly what the experts declare.

    Raises ValueError where there are none.
    """
    name = type(experts).__name__
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"{name} has a norm behind its experts: must be experts without one, as {', '.join(FAMILIES)} have")
    gate = getattr(experts._apply_gate, "__func__", experts._apply_gate)
    if experts.has_gate and gate is GptOssExperts._apply_gate:
        if (experts.alpha, experts.limit) != (1.702, 7.0) or experts.is_concatenated:
            raise ValueError(
                f"{name} has alpha={experts.alpha}, limit={experts.limit}, is_concatenated={experts.is_concatenated}: "
                "must be gpt-oss's 1.702, 7.0 and False"
            )
        return "swiglu_oai", "interleaved"
    if experts.has_gate and (gate is not _default_apply_gate or not experts.is_concatenated):
        raise ValueError(
            f"{name} has a gate function of its own: must be transformers' default one on concatenated weights, "
            f"or gpt-oss's, as {', '.join(FAMILIES)} have"
        )
    kind = type(experts.act_fn) if isinstance(experts.act_fn, nn.Module) else experts.act_fn
    activation = _PLAIN.get(kind)
    if experts.has_gate:
        activation = _GATED.get(activation)
    if activation is None:
        raise ValueError(f"{name} has the activation {getattr(kind, '__name__', kind)}: must be {_SUPPORTED_ACTIVATIONS}")
    return activation, "concatenated"


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
