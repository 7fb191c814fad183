"""How a defect is planted: one function of the code under test is replaced by a wrong one, and put back afterwards."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import dispatch
import routing
from dispatch import DispatchPlan
from sonicmoe import backends

Right = Callable
"""The function that a defect replaces."""


class Defect(NamedTuple):
    """`make` gets the right function and returns the wrong one, which replaces `attribute` of `owner`."""

    owner: str
    """experts (the backends that run on the device), dispatch or routing."""
    attribute: str
    cell: str
    """The cell of the matrix that must fail."""
    make: Callable[[Right], Callable]


class Registry(dict[str, Defect]):
    """Defects by name, in the order in which they were written down."""

    def add(self, name: str, owner: str, attribute: str, cell: str) -> Callable[[Callable], Callable]:
        """Decorator: register the function below as what makes the wrong function from the right one."""

        def register(make: Callable[[Right], Callable]) -> Callable[[Right], Callable]:
            if name in self:
                raise ValueError(f"defect {name!r}: was already given")
            self[name] = Defect(owner, attribute, cell, make)
            return make

        return register


@contextlib.contextmanager
def planted(defect: Defect, device: str = "cpu") -> Iterator[None]:
    """Run with the defect; the right functions are back afterwards."""
    owners = owner_modules(defect.owner, device)
    rights = [getattr(owner, defect.attribute) for owner in owners]
    for owner, right in zip(owners, rights, strict=True):
        setattr(owner, defect.attribute, defect.make(right))
    try:
        with backends.one_by_one():
            yield
    finally:
        for owner, right in zip(owners, rights, strict=True):
            setattr(owner, defect.attribute, right)


def owner_modules(owner: str, device: str) -> list[ModuleType]:
    """The modules whose function is replaced; for the experts, every backend that can run on the device."""
    if owner == "experts":
        return [backends.load(name) for name in (("reference", "hopper") if device == "cuda" else ("reference",))]
    return [{"dispatch": dispatch, "routing": routing}[owner]]


def expert_rows(plan: DispatchPlan) -> list[tuple[int, int, int]]:
    """(expert, first row, row behind the last) of each expert that has rows."""
    bounds = itertools.pairwise(plan.offsets.tolist())
    return [(expert, begin, end) for expert, (begin, end) in enumerate(bounds) if end > begin]


def last_rows(plan: DispatchPlan) -> list[int]:
    """The last row of each expert that has rows."""
    return [end - 1 for _, _, end in expert_rows(plan)]
