"""Sizes of memory on a device."""

ALIGNMENT = 256
"""Bytes; what vectorised loads and collectives like best."""
WORKSPACE_BYTES = 64 << 20
"""What the kernels of a rank share as scratch memory, at most; staging memory of collectives comes on top."""


def aligned(size: int) -> int:
    """The bytes that a buffer of `size` bytes takes."""
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
