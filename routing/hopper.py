"""When routing runs on the GPU kernels. Notation: T tokens, E experts, K experts per token."""

import torch

from dispatch.operators import is_hopper

MOST_CHOSEN = 32
"""Largest K, and largest groups_per_token, of the top-K kernel: its list of the best has one entry a lane."""

DTYPE_NAME = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def supports(logits: torch.Tensor, k: int, groups_per_token: int) -> bool:
    """The rule by which top_k and token_rounding choose between the kernels and PyTorch, in eager mode and under torch.compile.

    Kernels: logits in float32, bfloat16 or float16 on an sm_90 GPU, K <= 32 and groups_per_token <= 32; any T, E, scoring, bias and
    rounding. Everything else, float64 and CPU tensors among it, is PyTorch's. Nothing is decided by an error: where a kernel is
    missing or fails, that is raised.
    """
    within = logits.dtype in DTYPE_NAME and k <= MOST_CHOSEN and groups_per_token <= MOST_CHOSEN
    return within and is_hopper(logits.device)
