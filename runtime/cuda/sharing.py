"""Which products leave multiprocessors to a collective that is under way beside them.

The library's kernels stay on every multiprocessor until their last tile is done. A collective that is issued before
them, or a little later, would then wait for the whole product, and nothing would run beside anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from onnxmesh.runtime.plan import Buffer, Collective, Launch, Program

LEFT = 24
"""Multiprocessors for a collective: as many blocks as NCCL starts for a few peers."""
_FLOPS, _BYTES = 650e6, 0.18e6
"""Of half precision, and sent by one rank, in a microsecond; they only compare the two."""
_WORTH = 0.3
"""A product is not slowed down for a collective that lasts less than this part of it."""


def multiprocessors(program: Program, available: int) -> dict[int, int]:
    """How many multiprocessors the products that stand beside collectives are to fill, by instruction."""
    result = {}
    for at, item in enumerate(program.instructions):
        if not isinstance(item, Collective) or not item.stream:
            continue
        left = sum(program.buffers[i].nbytes for i in item.ins) / _BYTES
        for index, time in _beside(program, at):
            if left > _WORTH * time:
                result[index] = max(available - LEFT, available // 2)
            left -= time
    return result


def _beside(program: Program, at: int) -> Iterator[tuple[int, float]]:
    """The products between a collective and the first that waits for it, with their microseconds."""
    for index, item in enumerate(program.instructions[at + 1 :], at + 1):
        if at in item.after and not item.stream:
            return
        if isinstance(item, Launch) and item.kernel in ("MatMul", "FusedMatMul"):
            yield index, _flops([program.buffers[i] for i in item.ins[:2]]) / _FLOPS


def _flops(factors: Sequence[Buffer]) -> float:
    a, b = (buffer.shape for buffer in factors)
    return 2.0 * prod(a) * (b[-1] if len(b) > 1 else 1)
