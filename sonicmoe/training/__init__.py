"""Training of a small MoE language model: what ``sonicmoe train`` is made of. Importing this package imports nothing."""
