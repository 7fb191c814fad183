"""Written by `python -m build_defs.variant_lists`: the variants that are built ahead of time, by kernel."""

VARIANTS = {
    "launches": [
        "cute_runtime.launches",
    ],
}
