"""The operations that a layer consists of, and the places where they are looked up, so that each call can be wrapped."""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType

import dispatch
from sonicmoe import backends

EXPERT_OPERATIONS = ("up_projection", "down_projection", "activation_backward", "down_weight_grad", "up_weight_grad", "dx_rows")
"""Functions of a backend."""


@contextlib.contextmanager
def wrapped(wrap: Callable[[str, Callable], Callable], *, backend_names: tuple[str, ...]) -> Iterator[None]:
    """Within the block every operation's function is ``wrap(name, function)``: those of the backends, and gather_sum."""
    modules: list[ModuleType] = [backends.load(name) for name in backend_names]
    places = [(module, name) for module in modules for name in EXPERT_OPERATIONS] + [(dispatch, "gather_sum")]
    rights = [getattr(module, name) for module, name in places]
    for (module, name), right in zip(places, rights, strict=True):
        setattr(module, name, wrap(name, right))
    try:
        with backends.one_by_one():
            yield
    finally:
        for (module, name), right in zip(places, rights, strict=True):
            setattr(module, name, right)
