"""Suite ``tiles``: the suite ``kernels`` with every tile that a kernel may take, in turns, and the projections of decode steps likewise;
see kernels.py and decode.py."""

from testing.measure import decode, kernels
from testing.measure.items import Item, Options


def items(options: Options) -> list[Item]:
    return kernels.items_of_all_tiles(options) + decode.items_of_all_tiles(options)
