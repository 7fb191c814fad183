"""Which type each field of a result has: asked once, when a file is read, so that nothing behind it meets another."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a field may hold; `words` end the sentence that begins with "must be"."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_sizes(value: Any, *, whole: bool) -> bool:
    """Five sizes, ``whole`` where all must be there and at least 1."""
    if not isinstance(value, list) or len(value) != 5:
        return False
    return all((item is None and not whole) or (_is_integer(item) and item >= whole) for item in value)


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


TEXT = Kind("a text", lambda value: isinstance(value, str))
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and math.isfinite(value) and value > 0)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
SIZES = Kind("a list of five integers from 0 or nulls", lambda value: _are_sizes(value, whole=False))
ALL_SIZES = Kind("a list of five positive integers", lambda value: _are_sizes(value, whole=True))
SEED = Kind(
    "an integer or a list of them",
    lambda value: _is_integer(value) or (isinstance(value, list) and all(map(_is_integer, value))),
)

RESULT = {
    "profile": TEXT,
    "sources": TEXT,
    "seed": SEED,
    "shard": TEXT,
    "seconds": NUMBER,
    "device": _or_null(TEXT),
    "power_limit_w": _or_null(NUMBER),
    "date": _or_null(TEXT),
    "versions": _or_null(OBJECT),
    "cells": LIST,
}
"""Fields of a whole result. What is not listed, here and below, is only printed, or compared."""

MEASURED = {**dict.fromkeys(("ms", "ms_spread", "bound_ms", "tflops", "ratio_spread"), NUMBER), "trials": POSITIVE}
"""What belongs to the ratio of a speed cell."""

CELL = {
    "name": TEXT,
    "why": TEXT,
    "thiek": SIZES,
    "thiek_experts": SIZES,
    **dict.fromkeys(("routing", "load", "dtype", "mode", "activation", "layout"), _or_null(TEXT)),
    "seconds": NUMBER,
    "peak_mib": _or_null(NUMBER),
    "saved_mib": _or_null(NUMBER),
    **{field: _or_null(kind) for field, kind in MEASURED.items()},
    "ratio": _or_null(POSITIVE),
    "checks": LIST,
    "errors": _or_null(OBJECT),
    "kernels": _or_null(OBJECT),
}
CHECK = {"name": TEXT, "why": TEXT}
ERROR = {"whole": _or_null(NUMBER), "worst_block": _or_null(NUMBER)}
KERNEL = {"ms": POSITIVE, "ratio": POSITIVE, "ratio_spread": NUMBER}

RECORD = {"device": TEXT, "date": TEXT, "power_limit_w": _or_null(NUMBER), "cells": LIST}
RECORD_CELL = {"name": _or_null(TEXT), "ratio": _or_null(POSITIVE)}
"""What the history reads of a recorded result, of whichever command."""


def result_problem(result: dict[str, Any]) -> str | None:
    """The first field of a result, cells left out, that has another type, as a sentence; None where there is none."""
    return _wrong(result, RESULT)


def cell_problem(cell: Any) -> str | None:
    """The same of one cell of a result, the cell named."""
    if not isinstance(cell, dict) or not isinstance(cell.get("name"), str):
        return "has a cell without a name"
    where = f"cell {cell['name']}: "
    parts = []
    if not (wrong := _wrong(cell, CELL, "", {"thiek"} if "thiek_experts" in cell else set())):
        parts += [(check, CHECK, f"checks[{index}]", {*CHECK}) for index, check in enumerate(cell.get("checks", []))]
        parts += [(error, ERROR, f"errors.{name}", set()) for name, error in (cell.get("errors") or {}).items()]
        parts += [(kernel, KERNEL, f"kernels.{name}", {*KERNEL}) for name, kernel in (cell.get("kernels") or {}).items()]
        if cell.get("ratio") is not None:
            speed = {**MEASURED, "mode": TEXT, "thiek": ALL_SIZES}
            parts.append((cell, speed, "", {*speed}))
    for part, kinds, prefix, required in parts:
        wrong = wrong or _wrong(part, kinds, prefix, required)
    return where + wrong if wrong else None


def record_problem(record: dict[str, Any]) -> str | None:
    """The same of what the history reads of a recorded result."""
    if wrong := _wrong(record, RECORD):
        return wrong
    return next(filter(None, (_wrong(cell, RECORD_CELL, f"cells[{index}]") for index, cell in enumerate(record["cells"]))), None)


def _wrong(part: Any, kinds: dict[str, Kind], prefix: str = "", required: set[str] = frozenset()) -> str | None:
    """The first field of an object that is missing or of another kind."""
    if not OBJECT.holds(part):
        return f"{prefix}={_shown(part)}: must be {OBJECT.words}"
    prefix = prefix and f"{prefix}."
    for field in sorted(required):
        if field not in part:
            return f"{prefix}{field} is missing"
    for field, kind in kinds.items():
        if field in part and not kind.holds(part[field]):
            return f"{prefix}{field}={_shown(part[field])}: must be {kind.words}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
