from build_defs import variant_lists


def test_names_are_grouped_by_package_and_kernel():
    variants = [
        {"name": "dispatch.gather_sum-scored.true", "kernel": "dispatch.kernels.gather_sum"},
        {"name": "dispatch.gather_sum-scored.false", "kernel": "dispatch.kernels.gather_sum"},
        {"name": "sonicmoe.up-tile.128", "kernel": "sonicmoe.kernels.up"},
    ]
    more = [{"name": "sonicmoe.up-tile.64", "kernel": "sonicmoe.kernels.up"}]
    texts = variant_lists.variant_lists({"VARIANTS": variants, "MATRIX_VARIANTS": more})
    assert texts["dispatch/kernels/variants.bzl"] == (
        f'{variant_lists.HEADER}\n\nVARIANTS = {{\n    "gather_sum": [\n        "dispatch.gather_sum-scored.false",\n'
        '        "dispatch.gather_sum-scored.true",\n    ],\n}\n'
    )
    assert texts["sonicmoe/kernels/variants.bzl"] == (
        f'{variant_lists.HEADER}\n\nVARIANTS = {{\n    "up": [\n        "sonicmoe.up-tile.128",\n    ],\n}}\n'
        '\nMATRIX_VARIANTS = {\n    "up": [\n        "sonicmoe.up-tile.64",\n    ],\n}\n'
    )


def test_bazel_builds_exactly_what_is_prebuilt_and_what_the_matrix_needs():
    lists = {title: variant_lists.listed(variant_lists.ROOT, command) for title, command in variant_lists.LISTS.items()}
    assert all(lists.values())
    for path, text in variant_lists.variant_lists(lists).items():
        assert (variant_lists.ROOT / path).read_text() == text, f"{path} is stale: run python -m build_defs.variant_lists"
