"""Space where windows do not overlap: so many entries of the input's dim belong to so many of the output's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnxmesh.compiler.ir import segments as algebra
from onnxmesh.compiler.ir.rule import OpView, Port, Strategy
from onnxmesh.runtime.placement import R, Shard


def tiled(view: OpView, port: Port, placement: Shard, before: int, after: int) -> Iterable[Strategy]:
    """The cut of a dim of the first input and the output: `before` entries of the one make `after` of the other."""
    given, other = (after, before) if port.is_output else (before, after)
    derived = algebra.scaled(placement.segments, view.ranks, given, other)
    if derived is None:
        return
    x, y = placement, Shard(placement.dim, derived)
    if port.is_output:
        x, y = y, x
    shape = view.ins[0]
    assert shape is not None
    if (x.size, y.size) == (shape[x.dim], view.outs[0][y.dim]):
        yield Strategy("space", (x, *(R,) * (len(view.ins) - 1)), (y,))


def stands_apart(view: OpView, kernel: Sequence[int], dim: int) -> bool:
    """Whether the windows of a dim stand side by side: the kernel is the stride, and nothing is padded."""
    i, spatial = dim - 2, len(kernel)
    strides = view.attr("strides") or (1,) * spatial
    pads = view.attr("pads") or (0,) * 2 * spatial
    dilations = view.attr("dilations") or (1,) * spatial
    plain = pads[i] == pads[i + spatial] == 0 and dilations[i] == 1
    return bool(plain and strides[i] == kernel[i] and view.attr("auto_pad", "NOTSET") in ("NOTSET", "VALID"))
