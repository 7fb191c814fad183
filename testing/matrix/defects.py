"""Every defect that the gate must catch, by name. What it does not catch here it would not catch in a kernel either."""

from testing.matrix.defects_experts import EXPERTS
from testing.matrix.defects_rows import ROWS
from testing.matrix.planting import Defect

DEFECTS: dict[str, Defect] = {**EXPERTS, **ROWS}
