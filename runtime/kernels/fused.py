"""Fused ops: several ops as one instruction, written as an expression.

The attribute `expr` is JSON: an int is an input's number, null an absent operand, `["float32", 0.5]` a number of that
dtype, `["Mul", ["Sigmoid", 0], 1]` an op over operands and `["Cast", {"to": "float32"}, 0]` an op with attributes.
Equal parts of an expression are computed once. Every op computes and rounds as it would alone.

| op | its expression holds |
|---|---|
| Fused | elementwise ops, and at most one Rotary, of two tables that are inputs |
| FusedNorm | one LayerNormalization or RMSNormalization, before a Rotary; its second output is that one's input |
| FusedMatMul | one MatMul, of inputs 0 and 1, and elementwise ops |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE, PREDICATES
from onnxmesh.runtime.kernels.registry import Array, Call, TensorType, find, kernel

CORES = {
    "Fused": frozenset[str](),
    "FusedNorm": frozenset(("LayerNormalization", "RMSNormalization")),
    "FusedMatMul": frozenset(("MatMul",)),
}
"""The ops besides elementwise ones of which a fused op's expression holds exactly one."""
ROTARY = "Rotary"
"""The op that a Fused and a FusedNorm may hold once."""
LITERAL = "Literal"


@dataclass(frozen=True)
class Step:
    """One op of an expression, or a number (op `Literal`, attributes dtype and value).

    Operands are numbers: of an input, or from the number of inputs on, of an earlier step. None: absent.
    """

    op: str
    attrs: Mapping[str, Any]
    operands: tuple[int | None, ...]


@kernel("Fused")
def fused(call: Call, *inputs: Array) -> Array:
    """The value of `expr` over `inputs`. Raises PlanError for an expression that is not one."""
    return _values(call, "Fused", inputs)[-1]


@kernel("FusedNorm")
def fused_norm(call: Call, *inputs: Array) -> tuple[Array, ...]:
    """The value of `expr`, and if asked for what its norm normalises."""
    values = _values(call, "FusedNorm", inputs)
    program = steps("FusedNorm", _text(call), len(inputs))
    normalised = next(step.operands[0] for step in program if step.op in CORES["FusedNorm"])
    assert normalised is not None
    return (values[-1], values[normalised])[: len(call.outs)]


@kernel("FusedMatMul")
def fused_matmul(call: Call, *inputs: Array) -> Array:
    """The value of `expr`: a product and what is done to it."""
    return _values(call, "FusedMatMul", inputs)[-1]


@lru_cache(maxsize=4096)
def steps(kind: str, text: str, inputs: int) -> tuple[Step, ...]:
    """The steps of the expression `text` (JSON), each once, in an order in which they can run.

    Args:
        kind: the fused op.
        inputs: how many inputs it has.

    Raises:
        PlanError: it is no expression of such an op.
    """
    result: list[Step] = []
    known: dict[str, int] = {}

    def visit(part: Any) -> int | None:
        if part is None or (type(part) is int and 0 <= part < inputs):
            return part
        key = json.dumps(part)
        if key not in known:
            result.append(_literal(part) or _op(part))
            known[key] = inputs + len(result) - 1
        return known[key]

    def _op(part: Any) -> Step:
        op, attrs, operands = parts(part, kind)
        return Step(op, attrs, tuple(visit(operand) for operand in operands))

    whole = json.loads(text)
    if not isinstance(whole, list):
        raise PlanError(f"not a fused expression: {text}", code="OM4007")
    visit(whole)
    cores = [step for step in result if step.op in CORES[kind]]
    if len(cores) != bool(CORES[kind]) or any(step.operands[0] is None for step in cores):
        raise PlanError(
            f"the expression of a {kind} holds one {' or '.join(sorted(CORES[kind]))}: {text}", code="OM4007"
        )
    if kind == "FusedMatMul" and cores[0].operands != (0, 1):
        raise PlanError(f"the MatMul of a FusedMatMul is of inputs 0 and 1: {text}", code="OM4007")
    _check_rotary(result, CORES[kind], inputs, text)
    return tuple(result)


def _check_rotary(program: Sequence[Step], cores: frozenset[str], inputs: int, text: str) -> None:
    """At most one, of tables that are inputs, and not before a norm."""
    places = [i for i, step in enumerate(program) if step.op == ROTARY]
    for at in places:
        x, *tables = program[at].operands
        if len(places) > 1 or x is None or len(tables) != 2 or any(t is None or t >= inputs for t in tables):
            raise PlanError(f"an expression holds one Rotary at most, and its tables are inputs: {text}", code="OM4007")
    turned: set[int | None] = {inputs + at for at in places}
    for number, step in enumerate(program, inputs):
        if turned.intersection(step.operands):
            turned.add(number)
            if step.op in cores:
                raise PlanError(f"a Rotary stands before the {step.op}: {text}", code="OM4007")


def parts(expression: Any, kind: str = "Fused") -> tuple[str, Mapping[str, Any], Sequence[Any]]:
    """(op, attributes, operands) of an op's node. Raises PlanError where it is none."""
    if not isinstance(expression, list | tuple) or len(expression) < 2 or not _is_op(expression[0], kind):
        raise PlanError(f"not a fused expression: {expression!r}", code="OM4007")
    attributes = len(expression) > 2 and isinstance(expression[1], Mapping)
    if attributes:
        return expression[0], expression[1], expression[2:]
    return expression[0], {}, expression[1:]


def result_dtype(op: str, attrs: Mapping[str, Any], operands: Sequence[Any]) -> Any:
    """The dtype that an op of an expression gives for operands of these dtypes."""
    if op == "Cast":
        return dtype(attrs["to"])
    if op in PREDICATES:
        return dtype("bool")
    return operands[1] if op in ("Where", "CastLike") else operands[0]


def _literal(part: Any) -> Step | None:
    """A number: its dtype's name and its value, `nan`, `inf` and `-inf` as text."""
    if not isinstance(part, list) or len(part) != 2 or not isinstance(part[0], str) or not part[0].islower():
        return None
    name, value = part
    if not isinstance(value, bool | int | float) and value not in ("nan", "inf", "-inf"):
        raise PlanError(f"not a number in a fused expression: {part!r}", code="OM4007")
    return Step(LITERAL, {"dtype": name, "value": float(value) if isinstance(value, str) else value}, ())


def _values(call: Call, kind: str, inputs: Sequence[Array]) -> list[Array]:
    """The inputs and the result of every step."""
    values = list(inputs)
    for step in steps(kind, _text(call), len(inputs)):
        values.append(_run(call, step, [None if i is None else values[i] for i in step.operands]))
    return values


def _text(call: Call) -> str:
    return json.dumps(call.attrs["expr"])


def _run(call: Call, step: Step, arrays: Sequence[Array | None]) -> Array:
    if step.op == LITERAL:
        return call.xp.asarray(step.attrs["value"], dtype(step.attrs["dtype"]))
    given = [x for x in arrays if x is not None]
    out = TensorType(result_dtype(step.op, step.attrs, [x.dtype for x in given]), _shape(call.xp, step.op, given))
    result = find(step.op, call.xp.__name__)(Call(call.xp, step.attrs, (out,), call.coordinate), *arrays)
    return result[0] if isinstance(result, tuple) else result


def _shape(xp: Any, op: str, arrays: Sequence[Array]) -> tuple[int, ...]:
    if op in CORES["FusedNorm"] or op == ROTARY:
        return arrays[0].shape
    if op == "MatMul":
        a, b = arrays[0].shape, arrays[1].shape
        return (*xp.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
    return xp.broadcast_shapes(*(x.shape for x in arrays))


def _is_op(name: Any, kind: str) -> bool:
    rotates = name == ROTARY and kind != "FusedMatMul"
    return isinstance(name, str) and (name in ELEMENTWISE or name in CORES[kind] or rotates)
