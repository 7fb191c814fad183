"""A kernel and the parameters it is compiled for, and the one name that both have on disk."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.kernels\.[A-Za-z_]\w*", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]*", re.ASCII)
_BOOL = {"false": False, "true": True}


@dataclass(frozen=True, init=False)
class Variant:
    """One compiled form of a kernel; equal and hashed by name.

    Attributes:
        name: ``<package>.<kernel>-<param>.<value>-...`` with the parameters in alphabetical order, made of letters, digits, ``.``,
            ``_`` and ``-``, so that it is a file name, and reversible (:meth:`from_name`). For example
            ``dispatch.gather_sum-dtype.bfloat16-form.uniform-scored.true``.
        kernel: the device half's module, ``<package>.kernels.<kernel>``.
        params: the keyword arguments of that module's ``trace``: identifiers (not ``true`` or ``false``), integers from 0, booleans.
    """

    name: str
    kernel: str = field(compare=False)
    params: Mapping[str, str | int | bool] = field(compare=False, repr=False)

    def __init__(self, kernel: str, params: Mapping[str, str | int | bool] | None = None) -> None:
        params = dict(sorted((params or {}).items()))
        if not _MODULE.fullmatch(kernel):
            raise ValueError(f"kernel={kernel!r}: must be a module path <package>.kernels.<name>")
        parts = [kernel.replace(".kernels.", ".")]
        for key, value in params.items():
            if not _IDENTIFIER.fullmatch(key):
                raise ValueError(f"params: name {key!r}: must be an identifier")
            parts.append(f"{key}.{_encode(key, value)}")
        object.__setattr__(self, "name", "-".join(parts))
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "params", MappingProxyType(params))

    def __reduce__(self) -> tuple:
        return Variant, (self.kernel, dict(self.params))

    @classmethod
    def from_name(cls, name: str) -> "Variant":
        """The variant that has this name; ValueError where no variant could have it."""
        path, *pairs = name.split("-")
        package, _, kernel = path.rpartition(".")
        params = {}
        for pair in pairs:
            key, _, value = pair.partition(".")
            params[key] = int(value) if _NUMBER.fullmatch(value) else _BOOL.get(value, value)
        variant = None
        if package:
            variant = cls(f"{package}.kernels.{kernel}", params)
        if variant is None or variant.name != name:
            raise ValueError(f"variant={name!r}: must be <package>.<kernel>-<param>.<value>-... with the parameters in alphabetical order")
        return variant


def _encode(key: str, value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value >= 0:
        return str(value)
    if isinstance(value, str) and _IDENTIFIER.fullmatch(value) and value not in _BOOL:
        return value
    raise ValueError(f"params: {key}={value!r}: must be an identifier other than true and false, an integer from 0, or a bool")
