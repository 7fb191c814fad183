"""Grouped GEMMs for Hopper in CuTe-DSL. Everything here but ``tiles`` and ``variants`` needs the compiler, and only to compile."""
