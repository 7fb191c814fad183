"""Written by `python -m build_defs.variant_lists`: the variants that are built ahead of time, by kernel."""

VARIANTS = {
    "gather_sum": [
        "dispatch.gather_sum-dtype.bfloat16-form.csr-scored.false",
        "dispatch.gather_sum-dtype.bfloat16-form.csr-scored.true",
        "dispatch.gather_sum-dtype.bfloat16-form.uniform-scored.false",
        "dispatch.gather_sum-dtype.bfloat16-form.uniform-scored.true",
        "dispatch.gather_sum-dtype.float16-form.csr-scored.false",
        "dispatch.gather_sum-dtype.float16-form.csr-scored.true",
        "dispatch.gather_sum-dtype.float16-form.uniform-scored.false",
        "dispatch.gather_sum-dtype.float16-form.uniform-scored.true",
        "dispatch.gather_sum-dtype.float32-form.csr-scored.false",
        "dispatch.gather_sum-dtype.float32-form.csr-scored.true",
        "dispatch.gather_sum-dtype.float32-form.uniform-scored.false",
        "dispatch.gather_sum-dtype.float32-form.uniform-scored.true",
    ],
}
