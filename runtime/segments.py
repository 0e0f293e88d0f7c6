"""Segments as they stand in attributes."""

from __future__ import annotations

from typing import Any

from onnxmesh.runtime.placement import Segment, Segments


def segments_of(value: Any) -> Segments:
    """The segments in an attribute: `[[size, copies], ...]`, or the same numbers flat, as ONNX holds them.

    Raises ValueError where `value` is neither.
    """
    try:
        flat = [int(n) for item in value for n in (item if isinstance(item, list | tuple) else (item,))]
    except (TypeError, ValueError):
        raise ValueError(f"not segments: {value!r}") from None
    if not flat or len(flat) % 2 or min(flat) < 0 or 0 in flat[1::2]:
        raise ValueError(f"not segments: {value!r}")
    return tuple(Segment(size, copies) for size, copies in zip(flat[::2], flat[1::2]))
