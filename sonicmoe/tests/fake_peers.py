"""Stand-ins for the optional peers: their names and signatures, in plain PyTorch, so that the adapters' calls are checked by values.

T tokens, H hidden size, I intermediate size, E experts, K experts per token. Needs nothing but torch, and is copied into folders of its
own for the tests that start processes.
"""

import enum
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F


def grouped(rows, weights, expert):
    """rows (R, in) times ``weights[expert[r]]`` (E, in, out), row by row in float32."""
    return torch.einsum("ri,rio->ro", rows.float(), weights[expert].float()).to(rows.dtype)


# --- ScatterMoE ---------------------------------------------------------------------------------------------------


def flatten_sort_count(expert_idxs, num_experts):
    sorted_expert_idxs, sorted_scattered_idxs = torch.sort(expert_idxs.flatten())
    return sorted_expert_idxs, sorted_scattered_idxs, expert_idxs.flatten().bincount(minlength=num_experts).cumsum(-1)


def parallel_linear(
    inputs,
    expert_weights,
    k,
    sorted_expert_idxs,
    sorted_scattered_idxs,
    expert_offsets,
    expert_biases=None,
    gates=None,
    grouped_in=False,
    grouped_out=False,
):
    assert len(expert_offsets) == len(expert_weights)
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    out = grouped(rows, expert_weights, sorted_expert_idxs)
    if expert_biases is not None:
        out = out + expert_biases[sorted_expert_idxs]
    if not grouped_out:
        out = out[sorted_scattered_idxs.argsort()]
    if gates is None:
        return out
    assert gates.dtype == out.dtype
    return (gates.unsqueeze(1) @ out.view(*gates.shape, -1)).squeeze(1)


# --- sonic-moe ----------------------------------------------------------------------------------------------------


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"
    RELU_SQ = "relu_sq"


def count_cumsum(x, E, do_cumsum=True):
    assert x.dim() == 1
    count = x.bincount(minlength=E).int()
    return (count, count.cumsum(0).int()) if do_cumsum else count


def TC_topk_router_metadata(topk_router_indices, expert_frequency_offset, K):  # noqa: N802 (the peer's name)
    s_scatter_idx = torch.argsort(topk_router_indices.view(-1)).int()
    offsets = torch.cat([expert_frequency_offset.new_zeros(1), expert_frequency_offset])
    by_token = torch.arange(0, topk_router_indices.shape[0] * K + 1, K, dtype=torch.int32)
    return offsets, s_scatter_idx // K, s_scatter_idx, torch.argsort(s_scatter_idx).int(), by_token


def _experts_of(offsets):
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


def _interleaved(z, activation):
    if activation is ActivationType.RELU_SQ:
        return F.relu(z).square()
    act = {ActivationType.SWIGLU: F.silu, ActivationType.GEGLU: F.gelu}[activation]
    return act(z[:, 0::2]) * z[:, 1::2]


class _UpProjection:
    @staticmethod
    def apply(
        x,
        w1,
        b1,
        expert_frequency_offset,
        total_expert_freq,
        K,
        stream_id,
        x_gather_idx,
        s_scatter_idx,
        s_reverse_scatter_idx,
        num_activated_expert_per_token_offset,
        is_varlen_K,
        activation_type,
        is_inference_mode_enabled,
    ):
        assert not is_varlen_K
        assert len(x_gather_idx) == total_expert_freq
        expert = _experts_of(expert_frequency_offset)
        z = grouped(x[x_gather_idx], w1.permute(2, 1, 0), expert)
        z = z if b1 is None else z + b1[expert]
        return _interleaved(z, activation_type).detach(), z  # a has no gradient: the peer recomputes it from z


def convert_torch_tensor_to_cute_tensor(x, stride_order, leading_dim, alignment, divisibility):
    """In place of the peer's: refuses what DLPack's export refuses."""
    assert not x.requires_grad
    return x


class _DownProjection:
    @staticmethod
    def apply(
        y1,
        z,
        w2,
        b2,
        topk_scores,
        expert_frequency_offset,
        T,
        K,
        stream_id,
        x_gather_idx,
        s_scatter_idx,
        s_reverse_scatter_idx,
        num_activated_expert_per_token_offset,
        is_varlen_K,
        activation_type,
    ):
        assert not is_varlen_K
        expert = _experts_of(expert_frequency_offset)
        y = grouped(_interleaved(z, activation_type), w2.permute(2, 1, 0), expert)
        y = y if b2 is None else y + b2[expert]
        return (topk_scores.unsqueeze(2) * y[s_reverse_scatter_idx].view(T, K, -1)).sum(1).to(z.dtype)


# --- MegaBlocks ---------------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    hidden_size: int
    ffn_hidden_size: int
    bias: bool
    return_bias: bool
    activation_fn: object
    moe_num_experts: int
    moe_top_k: int
    moe_loss_weight: float
    mlp_type: str
    mlp_impl: str
    fp16: bool
    bf16: bool
    device: object


class ParallelDroplessMLP(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.mlp = args, torch.nn.Module()
        for name in ("w1", "v1", "w2") if args.mlp_type == "glu" else ("w1", "w2"):
            setattr(self.mlp, name, torch.nn.Parameter(torch.empty(args.moe_num_experts * args.ffn_hidden_size, args.hidden_size)))

    def forward(self, x, scores, expert_weights, top_experts):
        args = self.args
        assert scores is None
        by_expert = {name: weight.view(args.moe_num_experts, -1, args.hidden_size) for name, weight in self.mlp.named_parameters()}
        order = top_experts.flatten().argsort(stable=True)
        expert, rows = top_experts.flatten()[order], x[order // args.moe_top_k]
        a = args.activation_fn(grouped(rows, by_expert["w1"].mT, expert))
        if "v1" in by_expert:
            a = a * grouped(rows, by_expert["v1"].mT, expert)
        y = grouped(a, by_expert["w2"], expert)[order.argsort()]
        return (y * expert_weights.flatten().unsqueeze(1)).view(len(x), args.moe_top_k, -1).sum(1)


def modules() -> dict[str, ModuleType]:
    """What `sys.modules` would hold where the peers are installed."""
    here = sys.modules[__name__]
    names = (
        "scattermoe",
        "sonicmoe.functional",
        "sonicmoe.functional.backward",
        "sonicmoe.enums",
        "megablocks.layers.arguments",
        "megablocks.layers.dmoe",
    )
    return {**dict.fromkeys(names, here), "sonicmoe.count_cumsum": SimpleNamespace(count_cumsum=count_cumsum)}
