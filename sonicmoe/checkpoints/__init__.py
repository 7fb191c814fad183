"""Checkpoints whose experts are stored one by one, to and from this library's parameters: see `sonicmoe.checkpoints.convert`."""

from sonicmoe.checkpoints.convert import Converted, convert
from sonicmoe.checkpoints.layers import STYLES

__all__ = ["STYLES", "Converted", "convert"]
