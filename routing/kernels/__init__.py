"""Device halves of this package's kernels; imported by the compile step only, except for variants.py."""
