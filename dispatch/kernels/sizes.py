"""Sizes that the counting kernels and the code that launches them must agree on. No compiler import."""

THREADS = 512
"""Threads of a block."""
ITEMS = 4
"""Positions a thread has in flight."""
TILE = THREADS * ITEMS
"""Positions a block takes at a time; a chunk is a multiple of it."""
MAX_BINS = 2 * THREADS
"""Bins of one pass: a scan over them takes two a thread."""
FEW_ITEMS = 8
"""Positions a thread has in flight where one block plans all slots."""
FEW_SLOTS = THREADS * FEW_ITEMS
"""Slots that one block plans at once."""

TICKETS = 8
"""Counters of a plan, one for each of the experts' kernels that take tickets, and two to spare."""
