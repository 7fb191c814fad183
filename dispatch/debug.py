"""The debug switch: checks of values that cost time or a host synchronisation, off by default.

It starts as the environment says (``SONICMOE_DEBUG=1``) when the package is imported, and can be changed for a region::

    with dispatch.debug.checks():
        routing = top_k(logits, 8)   # raises if a logit is not finite

The switch belongs to the process, not to a thread.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_enabled = os.environ.get("SONICMOE_DEBUG", "0") not in ("", "0")


def enabled() -> bool:
    """Whether values are checked."""
    return _enabled


@contextmanager
def checks(enable: bool = True) -> Iterator[None]:
    """Turn the checks on (or off) inside a ``with`` block."""
    global _enabled
    before, _enabled = _enabled, enable
    try:
        yield
    finally:
        _enabled = before


def check_values(holds: torch.Tensor, message: str) -> None:
    """Raise ValueError(message) unless every element of the boolean tensor ``holds`` is true. Synchronises with the device.

    In code that torch.compile traces, the check becomes an assertion in the graph, which raises RuntimeError(message).
    """
    if torch.compiler.is_compiling():
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        raise ValueError(message)
