"""Custom operators, which torch.compile puts into its graph as they are instead of tracing their bodies."""

from collections.abc import Callable

import torch

BACKENDS = ("auto", "hopper", "reference")

_libraries: list[torch.library.Library] = []  # an operator lives as long as its library


def operator(name: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Turn a function with type hints into the operator ``name`` ("namespace::operator"), which then stands in its place.

    The body runs on every device, below autograd, and must neither change nor return an argument. A fake implementation is added
    with torch.library.register_fake and a gradient with torch.library.register_autograd, both by name.

    torch.library.custom_op does the same, but the first call of its operators imports torch.compile (3 s on one core), and
    every call costs 8 microseconds more.
    """

    def register(body: Callable) -> torch._ops.OpOverload:
        namespace, _, base = name.partition("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(base + torch.library.infer_schema(body, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(base, body, "CompositeExplicitAutograd")
        _libraries.append(library)
        return getattr(getattr(torch.ops, namespace), base).default

    return register


def check_backend(backend: str) -> None:
    """Refuse a backend that no operator has."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
