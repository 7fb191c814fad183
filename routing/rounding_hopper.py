"""Host half of kernels/rounding_keys.py, rounding_select.py and rounding_slots.py. Notation: T tokens, E experts, R slots."""

import functools
from collections.abc import Callable

import torch

import cute_runtime
from cute_runtime import Variant
from dispatch.operators import fake, operator
from routing.kernels import variants

_TOKENS_PER_WORD = 32


@operator("sonicmoe_routing::rounded_slots")
def rounded_slots(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    draws: torch.Tensor | None,
    num_slots: int,
    tile_m: int,
    mode: str,
    scoring: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slots of a token-rounded routing from its top-K choice: token_index, expert_index (R,) and token_offsets (T + 1,), int32.

    Args:
        logits: (T, E) float32 on an sm_90 GPU.
        chosen: (T * K,) int32, the experts of the top-K choice.
        counts: (E,) int32, how often each is among them.
        draws: (E,) float32 uniform in [0, 1) for mode "stochastic", else None.
        num_slots: R, routing.rounding.capacity's.
        tile_m, mode, scoring: as in routing.token_rounding.
    """
    num_tokens, num_experts = logits.shape
    token_index, expert_index, token_offsets = _outputs(logits, num_slots)
    if num_slots == 0:
        return token_index, expert_index, token_offsets.zero_()
    keys = token_offsets.new_empty(num_experts, num_tokens)
    words = (num_tokens + _TOKENS_PER_WORD - 1) // _TOKENS_PER_WORD
    kept, added = token_offsets.new_empty(words, num_experts), token_offsets.new_empty(words, num_experts)
    slot_counts = torch.empty_like(token_offsets)
    slots_per_token = chosen.shape[0] // num_tokens
    # With the softmax taken after the choice, an expert still ranks its tokens by the softmax over all experts.
    ranked_by = "sigmoid" if scoring == "sigmoid" else "softmax"
    with cute_runtime.on_device(logits.device):
        _kernel(variants.rounding_keys, scoring=ranked_by)(logits.contiguous(), chosen, keys, slots_per_token)
        _kernel(variants.rounding_select, mode=mode)(keys, counts, draws, kept, added, tile_m)
        _kernel(variants.rounding_slots, step="count")(kept, added, slot_counts)
        torch.cumsum(slot_counts, 0, dtype=torch.int32, out=token_offsets)
        _kernel(variants.rounding_slots, step="write")(kept, added, chosen, token_offsets, token_index, expert_index, slots_per_token)
    return token_index, expert_index, token_offsets


@fake(rounded_slots)
def _(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    draws: torch.Tensor | None,
    num_slots: int,
    tile_m: int,
    mode: str,
    scoring: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(logits, num_slots)


def _outputs(logits: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    token_index = logits.new_empty(num_slots, dtype=torch.int32)
    # Without a dtype, of an int32 tensor: half the host time.
    return token_index, torch.empty_like(token_index), token_index.new_empty(logits.shape[0] + 1)


@functools.cache
def _kernel(variant: Callable[..., Variant], **params: str) -> Callable[..., None]:
    return cute_runtime.load(variant(**params))
