"""Sort keys of the slots. T tokens, E experts, R slots.

A thread a slot: expert_key = its expert and token_key = its token, or E and T where either is out of range, so that later passes read
4 bytes and compare once. Without tokens only the experts count. Bytes: 4 or 8 in and 4 out for each id.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from dispatch.kernels.chunks import key_of
from dispatch.kernels.sizes import THREADS

_ELEMENT = {"int32": cutlass.Int32, "int64": cutlass.Int64}


@cute.kernel
def _keys_kernel(
    token_index: cute.Tensor | None,
    expert_index: cute.Tensor,
    token_key: cute.Tensor | None,
    expert_key: cute.Tensor,
    num_tokens: cutlass.Int32,
    num_experts: cutlass.Int32,
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    slot = block * THREADS + thread
    if slot < expert_key.shape[0]:
        expert = key_of(expert_index, slot, num_experts)
        if cutlass.const_expr(token_index is not None):
            token = key_of(token_index, slot, num_tokens)
            routed = (expert < num_experts) & (token < num_tokens)
            expert = cutlass.select_(routed, expert, num_experts)
            token_key[slot] = cutlass.select_(routed, token, num_tokens)
        expert_key[slot] = expert


@cute.jit
def _keys(
    token_index: cute.Tensor | None,
    expert_index: cute.Tensor,
    token_key: cute.Tensor | None,
    expert_key: cute.Tensor,
    num_tokens: cutlass.Int32,
    num_experts: cutlass.Int32,
    stream: cuda.CUstream,
):
    _keys_kernel(token_index, expert_index, token_key, expert_key, num_tokens, num_experts).launch(
        grid=[cute.ceil_div(expert_key.shape[0], THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )


def trace(*, index: str, paired: bool) -> tuple:
    """What is compiled: ``(token_index (R,) | None, expert_index (R,), token_key (R,) | None, expert_key (R,), T, E)``, the keys int32.

    Args:
        index: dtype of the ids, int32 or int64.
        paired: whether there are tokens.
    """
    R = cute.sym_int()

    def vector(element: type[cutlass.Numeric]) -> cute.Tensor:
        return make_fake_compact_tensor(element, (R,), assumed_align=element.width // 8)

    ids = _ELEMENT[index]
    arguments = (
        vector(ids) if paired else None,
        vector(ids),
        vector(cutlass.Int32) if paired else None,
        vector(cutlass.Int32),
        cutlass.Int32(1),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return _keys, arguments
