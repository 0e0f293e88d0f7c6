"""What of a FusedMatMul's expression a GEMM does at its end, and what is left for a kernel after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxmesh.runtime.kernels.fused import parts

Shape = tuple[int, ...]
CORE = "MatMul"


@dataclass(frozen=True, slots=True)
class Split:
    """An expression in two: the GEMM with its epilogue, and the rest.

    Attributes:
        bias, residual: which inputs they are.
        activation: as in gemm_problem.Epilogue; empty: none.
        rest: an expression over the GEMM's result, input 0, and the other inputs, of which input i is now i - 1;
            None: nothing is left.
    """

    bias: int | None = None
    activation: str = ""
    residual: int | None = None
    rest: Any = None


def splits(expression: Any, shapes: Sequence[Shape | None], product: Shape) -> list[Split]:
    """All ways to split it, first the one that leaves the least.

    Args:
        expression: of a FusedMatMul, over inputs of these shapes.
        product: the shape of its MatMul.
    """
    found: list[Split] = []
    part: Any = _core(expression)
    bias, activation, residual = None, "", None
    while True:
        found.append(Split(bias, activation, residual, _rest(expression, part)))
        user = _only_user(expression, part)
        if user is None or activation or residual is not None:
            return found[::-1]
        added = _addend(user, part)
        if added is None:
            activation = _activation(user)
        elif bias is None and _is_row(shapes[added], product):
            bias = added
        elif shapes[added] == product:
            residual = added
        else:
            return found[::-1]
        if added is None and not activation:
            return found[::-1]
        part = user


def _core(expression: Any) -> Any:
    """The product in an expression, which is known to hold one."""
    return next(part for part in _walk(expression) if isinstance(part, list) and part[0] == CORE)


def _walk(part: Any) -> Iterator[Any]:
    yield part
    for operand in _operands(part):
        yield from _walk(operand)


def _operands(part: Any) -> Sequence[Any]:
    """Of an op; none of an input or a number."""
    return () if not isinstance(part, list) or part[0].islower() else parts(part, "FusedMatMul")[2]


def _only_user(expression: Any, part: Any) -> list[Any] | None:
    """The one part that reads `part`, however often it stands in the expression."""
    users: list[Any] = []
    for other in _walk(expression):
        if part in _operands(other) and other not in users:
            users.append(other)
    return users[0] if len(users) == 1 else None


def _addend(user: Sequence[Any], part: Any) -> int | None:
    """The input that is added to `part`, if that is what `user` does."""
    op, _, operands = parts(user, "FusedMatMul")
    others = [operand for operand in operands if operand != part]
    return others[0] if op == "Add" and len(others) == 1 and type(others[0]) is int else None


def _activation(user: Sequence[Any]) -> str:
    op, attrs, _ = parts(user, "FusedMatMul")
    if op == "Gelu":
        return "gelu" if attrs.get("approximate", "none") == "tanh" else "erf_gelu"
    if op == "Swish":
        return "swish" if attrs.get("alpha", 1.0) == 1.0 else ""
    return "relu" if op == "Relu" else ""


def _is_row(shape: Shape | None, product: Shape) -> bool:
    """Whether an input of this shape is one number a column."""
    return bool(shape) and shape[-1] == product[-1] and all(size == 1 for size in shape[:-1])  # type: ignore[index]


def _rest(expression: Any, done: Any) -> Any:
    """The expression with input 0 in the place of `done`."""
    if expression == done:
        return None

    def renamed(part: Any) -> Any:
        if part == done:
            return 0
        if type(part) is int:
            return part - 1
        if not isinstance(part, list) or part[0].islower():
            return part
        attributes = [part[1]] if isinstance(part[1], Mapping) else []
        return [part[0], *attributes, *(renamed(operand) for operand in _operands(part))]

    return renamed(expression)
