from build_defs import variant_lists


def test_names_are_grouped_by_package_and_kernel():
    variants = [
        {"name": "dispatch.gather_sum-scored.true", "kernel": "dispatch.kernels.gather_sum"},
        {"name": "dispatch.gather_sum-scored.false", "kernel": "dispatch.kernels.gather_sum"},
        {"name": "sonicmoe.up-tile.128", "kernel": "sonicmoe.kernels.up"},
    ]
    texts = variant_lists.variant_lists(variants)
    assert texts["dispatch/kernels/variants.bzl"] == (
        f'{variant_lists.HEADER}\n\nVARIANTS = {{\n    "gather_sum": [\n        "dispatch.gather_sum-scored.false",\n'
        '        "dispatch.gather_sum-scored.true",\n    ],\n}\n'
    )
    assert '"sonicmoe.up-tile.128"' in texts["sonicmoe/kernels/variants.bzl"]


def test_bazel_builds_exactly_the_prebuilt_variants():
    texts = variant_lists.variant_lists(variant_lists.prebuilt_variants(variant_lists.ROOT))
    assert texts
    for path, text in texts.items():
        assert (variant_lists.ROOT / path).read_text() == text, f"{path} is stale: run python -m build_defs.variant_lists"
