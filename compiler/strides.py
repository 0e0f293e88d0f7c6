"""Which op takes which strides well, on a GPU. A CPU takes all.

What is not in the table reads and writes row-major memory. Vectors are loaded 16 bytes at a time, which the libraries'
products and attentions insist on. Collectives send row-major memory, but what they pack and unpack may lie anyhow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from onnxmesh.compiler.ir.rule import itemsize
from onnxmesh.compiler.ir.view import dtype_of, plain_attrs, shape_of
from onnxmesh.compiler.ir.window import Window
from onnxmesh.compiler.ops.collectives import COLLECTIVES
from onnxmesh.runtime.exchange import staged
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE

ALIGNMENT = 16
"""Bytes."""


def takes(node: ir.Node, index: int, window: Window) -> bool:
    """Whether a node reads input `index` from `window` as well as from memory of its own."""
    value = node.inputs[index]
    assert value is not None
    return _fits(node, index, window, itemsize(dtype_of(value)), writes=False)


def writes(node: ir.Node, index: int, window: Window) -> bool:
    """Whether a node writes output `index` to `window` as well as to memory of its own."""
    return _fits(node, index, window, itemsize(dtype_of(node.outputs[index])), writes=True)


def _fits(node: ir.Node, index: int, window: Window, size: int, *, writes: bool) -> bool:
    if window.is_row_major and window.offset * size % ALIGNMENT == 0:
        return True
    if node.op_type in COLLECTIVES:
        value = node.inputs[index]
        assert value is not None
        sides = staged(node.op_type, plain_attrs(node), shape_of(value), shape_of(node.outputs[index]))
        return sides[writes] and _rows(window, index, 1, writes)
    rule = _TABLE.get(node.op_type)
    return rule is not None and rule(window, index, ALIGNMENT // size or 1, writes)


Rule = Callable[[Window, int, int, bool], bool]
"""(window, number of the input or output, elements of a vector, whether it is written) -> whether it is taken."""


def _any(window: Window, index: int, vector: int, writes: bool) -> bool:
    """Copies: whatever it is."""
    return True


def _rows(window: Window, index: int, vector: int, writes: bool) -> bool:
    """Generated kernels: the last dim is contiguous, or one element repeated."""
    last = window.strides[-1] if window.shape and window.shape[-1] > 1 else 1
    return last == 1 or (last == 0 and not writes)


def _first(window: Window, index: int, vector: int, writes: bool) -> bool:
    """Gather: the table, not the indices."""
    return index == 0 and _rows(window, index, vector, writes)


def _matrix(window: Window, index: int, vector: int, writes: bool) -> bool:
    """cuBLASLt: a leading dimension, one stride from matrix to matrix; of inputs a and b also transposed."""
    if len(window.shape) < 2 or not _aligned(window, vector) or len(window.dims(0, -2).runs()) > 1:
        return False
    (rows, columns), (row, column) = window.shape[-2:], window.strides[-2:]
    if (column == 1 or columns == 1) and (row >= columns or rows == 1):
        return True
    return index < 2 and not writes and (row == 1 or rows == 1) and (column >= rows or columns == 1)


def _heads(window: Window, index: int, vector: int, writes: bool) -> bool:
    """cuDNN: any strides but the last dim's; q, k, v and the result, not masks and positions."""
    if index > (0 if writes else 2) or len(window.shape) != 4:
        return False
    repeats = any(stride == 0 and size > 1 for size, stride in zip(window.shape, window.strides))
    return window.inner == 1 and window.shape[-1] > 1 and not repeats and _aligned(window, vector)


def _aligned(window: Window, vector: int) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    starts = [stride for size, stride in zip(window.shape, window.strides) if size > 1 and stride != 1]
    return all(start % vector == 0 for start in (window.offset, *starts))


_REDUCTIONS = "Sum Mean Max Min Prod L1 L2 LogSum LogSumExp SumSquare".split()
_TABLE: Mapping[str, Rule] = {
    **dict.fromkeys(("Concat", "Transpose", "Slice", "Split", "Expand", "Reshape", "Identity"), _any),
    **dict.fromkeys(ELEMENTWISE, _rows),
    **dict.fromkeys(("Fused", "FusedNorm", "LayerNormalization", "RMSNormalization", "Softmax", "Rotary"), _rows),
    **dict.fromkeys(("AttentionMerge", "AttentionFinish"), _rows),
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCTIONS), _rows),
    **dict.fromkeys(("MatMul", "FusedMatMul"), _matrix),
    **dict.fromkeys(("Attention", "AttentionBlock"), _heads),
    "Gather": _first,
}
