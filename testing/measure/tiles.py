"""Suite ``tiles``: the suite ``kernels`` with every tile that a kernel may take, in turns; see kernels.py."""

from testing.measure.items import Item, Options
from testing.measure.kernels import items_of_all_tiles


def items(options: Options) -> list[Item]:
    return items_of_all_tiles(options)
