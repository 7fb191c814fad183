"""A small decoder-only language model whose feed-forward parts are ``sonicmoe.MoE`` layers.

Pre-norm blocks: x += attention(norm(x)); x += MoE(norm(x)). RMSNorm, rotary positions, causal
``scaled_dot_product_attention``, the embedding shared with the output layer.
Letters: B sequences, S positions, T = B * S tokens, H hidden, E experts, L layers, V = 256 byte values.
"""

from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from routing import RouterConfig
from sonicmoe import MoE
from sonicmoe.training.config import TrainConfig
from sonicmoe.training.text import VOCABULARY

_ROTARY_BASE = 10_000.0


class Output(NamedTuple):
    logits: torch.Tensor
    """(B, S, V) in the model's dtype."""
    routers: list
    """One RouterOutput per layer, first layer first."""


def router_config(config: TrainConfig, routing: str) -> RouterConfig:
    """Softmax over all experts, then the routing: plain top-K or token rounding in the named mode."""
    method = {"method": "top_k"} if routing == "top_k" else {"method": "token_rounding", "mode": routing, "tile_m": config.tile_m}
    return RouterConfig(k=config.experts_per_token, scoring="softmax", renormalize=True, **method)


class LanguageModel(nn.Module):
    """Bytes (B, S) int64 -> next-byte logits (B, S, 256)."""

    def __init__(self, config: TrainConfig, routing: str, *, backend: str = "auto") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, routing, backend=backend) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        angles = _rotary_angles(config.context, config.hidden_size // config.heads)
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        nn.init.normal_(self.embedding.weight, std=config.hidden_size**-0.5)

    def forward(self, tokens: torch.Tensor) -> Output:
        x = self.embedding(tokens)
        rotary = self.rotary[:, : tokens.shape[1]]
        routers = []
        for block in self.blocks:
            x, router = block(x, rotary)
            routers.append(router)
        return Output(F.linear(self.norm(x), self.embedding.weight), routers)

    @contextmanager
    def routed_by_top_k(self):
        """Within the context every layer routes by plain top-K, whatever it trains with."""
        layers = [block.experts for block in self.blocks]
        before = [layer.router_config for layer in layers]
        try:
            for layer in layers:
                layer.router_config = replace(layer.router_config, method="top_k")
            yield self
        finally:
            for layer, config in zip(layers, before, strict=True):
                layer.router_config = config


class Block(nn.Module):
    def __init__(self, config: TrainConfig, routing: str, *, backend: str) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attention = Attention(config)
        self.experts_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.experts = MoE(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.experts_per_token,
            router=router_config(config, routing),
            backend=backend,
        )

    def forward(self, x: torch.Tensor, rotary: torch.Tensor):
        x = x + self.attention(self.attention_norm(x), rotary)
        update, router = self.experts(self.experts_norm(x), return_router=True)
        return x + update, router


class Attention(nn.Module):
    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.normal_(self.qkv.weight, std=config.hidden_size**-0.5)
        nn.init.normal_(self.output.weight, std=(2 * config.layers * config.hidden_size) ** -0.5)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(q, rotary), _rotate(k, rotary), v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


def _rotary_angles(positions: int, head_size: int) -> torch.Tensor:
    """(positions, head_size / 2) float32: position * base**(-2i / head_size) (RoFormer, arXiv 2104.09864, section 3.2)."""
    frequencies = _ROTARY_BASE ** (-torch.arange(0, head_size, 2).float() / head_size)
    return torch.outer(torch.arange(positions).float(), frequencies)


def _rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of (B, heads, S, D) by their position's angles, in float32."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)
