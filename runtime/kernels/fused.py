"""Fused: a tree of elementwise ops as one instruction.

The attribute `expr` is JSON: an int is an input's index, `["Mul", ["Sigmoid", 0], 1]` an op over operands, and
`["Cast", {"to": "float32"}, 0]` an op with attributes. Every op computes and rounds as it would alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE, PREDICATES
from onnxmesh.runtime.kernels.registry import Array, Call, TensorType, find, kernel


@kernel("Fused")
def fused(call: Call, *inputs: Array) -> Array:
    """The value of `expr` over `inputs`. Raises PlanError for an expression that is not one."""
    return _evaluate(call, call.attrs["expr"], inputs).astype(call.outs[0].dtype, copy=False)


def _evaluate(call: Call, expression: Any, inputs: Sequence[Array]) -> Array:
    if isinstance(expression, int) and 0 <= expression < len(inputs):
        return inputs[expression]
    op, attrs, operands = parts(expression)
    arrays = [_evaluate(call, operand, inputs) for operand in operands]
    shape = call.xp.broadcast_shapes(*(x.shape for x in arrays))
    out = TensorType(result_dtype(op, attrs, [x.dtype for x in arrays]), shape)
    return find(op)(Call(call.xp, attrs, (out,), call.coordinate), *arrays)


def parts(expression: Any) -> tuple[str, Mapping[str, Any], Sequence[Any]]:
    """(op, attributes, operands) of an op's node. Raises PlanError where it is none."""
    if not isinstance(expression, list | tuple) or len(expression) < 2 or not _is_op(expression[0]):
        raise PlanError(f"not a fused expression: {expression!r}")
    if isinstance(expression[1], Mapping):
        return expression[0], expression[1], expression[2:]
    return expression[0], {}, expression[1:]


def result_dtype(op: str, attrs: Mapping[str, Any], operands: Sequence[Any]) -> Any:
    """The dtype that an elementwise op gives for operands of these dtypes."""
    if op == "Cast":
        return dtype(attrs["to"])
    if op in PREDICATES:
        return dtype("bool")
    return operands[1] if op in ("Where", "CastLike") else operands[0]


def _is_op(name: Any) -> bool:
    return isinstance(name, str) and name in ELEMENTWISE
