"""Written by `python -m build_defs.variant_lists`: the variants that are built ahead of time, by kernel."""

VARIANTS = {
    "bounds": [
        "dispatch.bounds",
    ],
    "count": [
        "dispatch.count-form.global-index.int32",
        "dispatch.count-form.global-index.int64",
        "dispatch.count-form.shared-index.int32",
        "dispatch.count-form.shared-index.int64",
    ],
    "gather_sum": [
        "dispatch.gather_sum-dtype.bfloat16-form.csr-scored.false",
        "dispatch.gather_sum-dtype.bfloat16-form.csr-scored.true",
        "dispatch.gather_sum-dtype.bfloat16-form.uniform-score.bfloat16-scored.true",
        "dispatch.gather_sum-dtype.bfloat16-form.uniform-scored.false",
        "dispatch.gather_sum-dtype.bfloat16-form.uniform-scored.true",
        "dispatch.gather_sum-dtype.float16-form.csr-scored.false",
        "dispatch.gather_sum-dtype.float16-form.csr-scored.true",
        "dispatch.gather_sum-dtype.float16-form.uniform-score.float16-scored.true",
        "dispatch.gather_sum-dtype.float16-form.uniform-scored.false",
        "dispatch.gather_sum-dtype.float16-form.uniform-scored.true",
        "dispatch.gather_sum-dtype.float32-form.csr-scored.false",
        "dispatch.gather_sum-dtype.float32-form.csr-scored.true",
        "dispatch.gather_sum-dtype.float32-form.uniform-scored.false",
        "dispatch.gather_sum-dtype.float32-form.uniform-scored.true",
    ],
    "keys": [
        "dispatch.keys-index.int32-paired.false",
        "dispatch.keys-index.int32-paired.true",
        "dispatch.keys-index.int64-paired.false",
        "dispatch.keys-index.int64-paired.true",
    ],
    "place": [
        "dispatch.place-index.int32-ordered.false-output.order",
        "dispatch.place-index.int32-ordered.false-output.uniform",
        "dispatch.place-index.int32-ordered.true-output.order",
        "dispatch.place-index.int32-ordered.true-output.rows",
        "dispatch.place-index.int32-ordered.true-output.uniform",
        "dispatch.place-index.int64-ordered.false-output.uniform",
    ],
    "plan_few": [
        "dispatch.plan_few-index.int32",
        "dispatch.plan_few-index.int64",
    ],
    "travel": [
        "dispatch.travel-index.int32-ordered.false-step.labels",
        "dispatch.travel-index.int32-ordered.true-step.labels",
        "dispatch.travel-index.int32-step.pairs",
        "dispatch.travel-index.int64-ordered.false-step.labels",
        "dispatch.travel-index.int64-ordered.true-step.labels",
        "dispatch.travel-index.int64-step.pairs",
        "dispatch.travel-step.arrivals",
    ],
}
