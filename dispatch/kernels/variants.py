"""The variants of this package's kernels that are built beforehand."""

from itertools import product

from cute_runtime import Variant


def gather_sum(*, dtype: str, form: str, scored: bool, score: str = "float32") -> Variant:
    """The variant of kernels/gather_sum.py: dtype bfloat16, float16 or float32; form uniform or csr; with or without score, whose
    dtype is float32 or ``dtype``."""
    params = {"dtype": dtype, "form": form, "scored": scored}
    return Variant("dispatch.kernels.gather_sum", params | ({"score": score} if score != "float32" else {}))


def place(*, index: str, ordered: bool, output: str) -> Variant:
    """The variant of kernels/place.py: index int32 or int64; slots in sorted order or not; output order, rows or uniform."""
    return Variant("dispatch.kernels.place", {"index": index, "ordered": ordered, "output": output})


def plan_few(*, index: str) -> Variant:
    """The variant of kernels/plan_few.py: index int32 or int64."""
    return Variant("dispatch.kernels.plan_few", {"index": index})


def count(*, index: str, form: str) -> Variant:
    """The variant of kernels/count.py: index int32 or int64; form shared or global."""
    return Variant("dispatch.kernels.count", {"index": index, "form": form})


def keys(*, index: str, paired: bool) -> Variant:
    """The variant of kernels/keys.py: index int32 or int64; with or without tokens."""
    return Variant("dispatch.kernels.keys", {"index": index, "paired": paired})


def bounds() -> Variant:
    """kernels/bounds.py has one variant."""
    return Variant("dispatch.kernels.bounds")


def travel(*, step: str, index: str = "int32", ordered: bool = True) -> Variant:
    """The variant of kernels/travel.py: step pairs, labels or arrivals; for the first two index int32 or int64, for labels with K slots a
    token or with their tokens."""
    options = {"pairs": {"index": index}, "labels": {"index": index, "ordered": ordered}, "arrivals": {}}
    return Variant("dispatch.kernels.travel", {"step": step, **options[step]})


def prebuilt_variants() -> list[Variant]:
    """All that the package can reach, 40-60 KB each."""
    sums = product(("bfloat16", "float16", "float32"), ("uniform", "csr"), (True, False))
    dtypes = ("int32", "int64")
    return [
        *(gather_sum(dtype=dtype, form=form, scored=scored) for dtype, form, scored in sums),
        # Scores of 16 bits are what transformers' routers hand over, K a token.
        *(gather_sum(dtype=dtype, form="uniform", scored=True, score=dtype) for dtype in ("bfloat16", "float16")),
        *(count(index=index, form=form) for index, form in product(dtypes, ("shared", "global"))),
        *(keys(index=index, paired=paired) for index, paired in product(dtypes, (True, False))),
        bounds(),
        *(plan_few(index=index) for index in dtypes),
        # Only a plan's first pass reads the caller's ids; passes over sorted slots, and the tokens' passes, read int32 keys.
        *(place(index=index, ordered=False, output="uniform") for index in dtypes),
        *(travel(step="pairs", index=index) for index in dtypes),
        *(travel(step="labels", index=index, ordered=ordered) for index, ordered in product(dtypes, (True, False))),
        travel(step="arrivals"),
        place(index="int32", ordered=False, output="order"),
        *(place(index="int32", ordered=True, output=output) for output in ("order", "rows", "uniform")),
    ]
