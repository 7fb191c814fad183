"""Every defect that the gate must catch, by name: in the operations on any machine, and in the kernels on a GPU."""

from testing.matrix.defects_experts import EXPERTS
from testing.matrix.defects_kernels import KERNEL_DEFECTS
from testing.matrix.defects_rows import ROWS
from testing.matrix.planting import Defect
from testing.matrix.planting_source import SourceDefect

DEFECTS: dict[str, Defect] = {**EXPERTS, **ROWS}
EVERY: dict[str, Defect | SourceDefect] = {**DEFECTS, **KERNEL_DEFECTS}
