"""Runs the items of suites, one after the other: what breaks is a failed cell with its reason, and the others still run."""

import fnmatch
import gc
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from sonicmoe.commands import tables
from testing.measure import registry
from testing.measure.items import Item, NotRunError, Options, as_json, broken, not_run


def run_suites(names: list[str], options: Options, *, pattern: str | None = None) -> Iterator[list[dict[str, Any]]]:
    """The cells of each item of all suites as it ends, behind a progress display on stderr.

    Raises:
        ValueError: the pattern matches no item.
    """
    items = [item for name in names for item in registry.load(name).items(options)]
    chosen = [item for item in items if pattern is None or fnmatch.fnmatchcase(item.name, pattern)]
    if not chosen:
        raise ValueError(f"items={pattern!r}: matches none of the {len(items)} items, such as {items[0].name}")
    with tables.progress() as bar:
        task = bar.add_task("", total=len(chosen))
        for item in chosen:
            bar.update(task, description=item.name)
            if item.begin is not None:
                _begin(chosen, item.name.split("/")[0])
            yield run_item(item)
            bar.advance(task)


def _begin(items: list[Item], suite: str) -> None:
    for item in items:
        if item.begin is not None and item.name.split("/")[0] == suite:
            item.begin()


def run_item(item: Item) -> list[dict[str, Any]]:
    """The cells of one item, with the seconds that they took together; its memory is given back."""
    if item.not_run:
        return [not_run(item.name, item.not_run)]
    begin = time.perf_counter()
    try:
        cells = item.run()
    except NotRunError as error:
        cells = [not_run(item.name, str(error))]
    except Exception as error:  # whatever it is, it must not lose what the other items measured
        traceback.print_exc(file=sys.stderr)
        cells = [broken(item.name, f"{type(error).__name__}: {error}".splitlines()[0])]
    seconds = time.perf_counter() - begin
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return [as_json({**cell, "seconds": seconds}) for cell in cells]
