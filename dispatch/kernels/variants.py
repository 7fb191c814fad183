"""The variants of this package's kernels that are built beforehand."""

from itertools import product

from cute_runtime import Variant


def gather_sum(*, dtype: str, form: str, scored: bool) -> Variant:
    """The variant of kernels/gather_sum.py: dtype bfloat16, float16 or float32; form uniform or csr; with or without score."""
    return Variant("dispatch.kernels.gather_sum", {"dtype": dtype, "form": form, "scored": scored})


def prebuilt_variants() -> list[Variant]:
    """All twelve forms of gather_sum: 40 KB each, and all of them reachable from dispatch.gather_sum."""
    choices = product(("bfloat16", "float16", "float32"), ("uniform", "csr"), (True, False))
    return [gather_sum(dtype=dtype, form=form, scored=scored) for dtype, form, scored in choices]
