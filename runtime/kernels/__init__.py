"""Kernels, written once over an array namespace `xp` (NumPy or CuPy)."""
