"""What the layer promises beside speed: dispatch, rounding, start, memory and whole steps, measured and recorded.

``python -m testing.measure NAME...``; docs/measure.md says what each suite measures.
"""
