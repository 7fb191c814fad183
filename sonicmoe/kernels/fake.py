"""Stand-ins for tensors, to compile a kernel without a GPU and without data."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_compact_tensor

DTYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}


def row_major(dtype: type[cutlass.Numeric], *shape):
    """A contiguous tensor of the given (possibly symbolic) shape, 16-byte aligned if its elements are 16 bits."""
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=16 if dtype.width == 16 else dtype.width // 8)


def tickets_of_plan():
    return row_major(cutlass.Int32, cute.sym_int())
