"""Where each key's run begins among sorted slots: ``offsets[key]`` = first position whose key is not less. R slots.

A thread a key, a binary search: log2(R) dependent reads of order and of key, about 0.5 microseconds each. Its time does not depend on how
the keys are spread, and nothing has to be zeroed, unlike a histogram.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

THREADS = 128
"""Small blocks, so that a few thousand searches use every multiprocessor."""


@cute.kernel
def _bounds_kernel(key: cute.Tensor, order: cute.Tensor, offsets: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    wanted = block * THREADS + thread
    if wanted < offsets.shape[0]:
        low, high = cutlass.Int32(0), order.shape[0]
        while low < high:
            middle = low + ((high - low) >> 1)
            slot = order[middle]
            less = (slot >= 0) & (key[cutlass.max(slot, 0)] < wanted)
            low = cutlass.select_(less, middle + 1, low)
            high = cutlass.select_(less, high, middle)
        offsets[wanted] = low


@cute.jit
def _bounds(key: cute.Tensor, order: cute.Tensor, offsets: cute.Tensor, stream: cuda.CUstream):
    _bounds_kernel(key, order, offsets).launch(grid=[cute.ceil_div(offsets.shape[0], THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream)


def trace() -> tuple:
    """What is compiled: ``(key (R,), order (R,), offsets (size + 1,))``, int32; slots below 0 come last in order and have no key."""
    R = cute.sym_int()
    key, order, offsets = (make_fake_compact_tensor(cutlass.Int32, (count,), assumed_align=4) for count in (R, R, cute.sym_int()))
    return _bounds, (key, order, offsets, make_fake_stream(use_tvm_ffi_env_stream=True))
