"""The variants of this package that are built beforehand."""

from cute_runtime import Variant


def prebuilt_variants() -> list[Variant]:
    """kernels/launches.c, 16 KB, has one variant."""
    return [Variant("cute_runtime.kernels.launches")]
