"""The C++ formula of every elementwise op: what runtime/kernels/elementwise.py computes, on one element."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.codegen.operand import Unsuited, computed, is_floating, stored
from onnxmesh.runtime.dtypes import is_narrow

Formula = Callable[["Use"], str]


class Use:
    """One op of an expression where it is used.

    Attributes:
        x: its operands as C++; None where absent.
        dtypes: the operands' dtypes; None where absent.
        result: its result's dtype.
    """

    def __init__(self, attrs: Mapping[str, Any], x: Sequence[str | None], dtypes: Sequence[Any], result: Any) -> None:
        self.attrs, self.dtypes, self.result = attrs, list(dtypes), result
        self.given = [text for text in x if text is not None]
        self.x = [text or "" for text in x]
        self.kind = computed(self.dtypes[0])
        self.fast = "fast" if is_narrow(self.dtypes[0]) else "m"
        self.floating = is_floating(self.dtypes[0])

    def number(self, name: str, default: float) -> str:
        """An attribute as a number of the op's type."""
        return number(self.attrs.get(name, default), self.kind)


def number(value: float, kind: str) -> str:
    """A number as C++ of type `kind`, exactly."""
    if kind in ("float", "double"):
        return _float(float(value), kind)
    if kind == "bool":
        return "true" if value else "false"
    integer = int(value)
    if kind == "uint64":
        return f"{integer}ull"
    if integer == -(2**63):
        return "(-9223372036854775807ll - 1)"
    return f"({kind}){integer}ll"


def _float(value: float, kind: str) -> str:
    if math.isfinite(value):
        with np.errstate(over="ignore"):
            exact = float(np.float32(value)) if kind == "float" else value
        if math.isfinite(exact):
            return f"({exact.hex()}f)" if kind == "float" else f"({exact.hex()})"
        value = exact
    if kind == "float":
        return f"bits_float(0x{np.float32(value).view(np.uint32):08x}u)"
    return f"bits_double(0x{np.float64(value).view(np.uint64):016x}ull)"


def formula(op: str, use: Use) -> str:
    """The C++ expression of an op. Raises Unsuited for one that has none."""
    made = _FORMULAS.get(op)
    if made is None:
        raise Unsuited(f"op {op}")
    return made(use)


def _call(name: str, *, floats: bool = True, quick: bool = False) -> Formula:
    """A function of the operands in namespace m; `quick`: in half precision in namespace fast."""

    def made(use: Use) -> str:
        if floats and not use.floating:
            raise Unsuited(f"{name} of integers")
        return f"{use.fast if quick else 'm'}::{name}({', '.join(use.given)})"

    return made


def _whole(name: str) -> Formula:
    """A rounding function, which leaves integers as they are."""
    return lambda use: f"m::{name}({use.x[0]})" if use.floating else use.x[0]


def _infix(symbol: str) -> Formula:
    """Booleans add as or, multiply as and."""

    def made(use: Use) -> str:
        if use.kind == "bool" and symbol == "-":
            raise Unsuited("a difference of booleans")
        return f"({use.x[0]} {symbol} {use.x[1]})"

    return made


def _fold(text: str) -> Formula:
    """An op of any number of operands, two at a time."""
    return lambda use: reduce(lambda a, b: text.format(a, b), use.given)


def _with(name: str, *attributes: tuple[str, float], quick: bool = False) -> Formula:
    """A function of operand 0 and attributes."""

    def made(use: Use) -> str:
        if not use.floating:
            raise Unsuited(f"{name} of integers")
        values = [use.number(*attribute) for attribute in attributes]
        return f"{use.fast if quick else 'm'}::{name}({', '.join([use.x[0], *values])})"

    return made


def _cast(use: Use) -> str:
    source, target, x = use.dtypes[0], use.result, use.x[0]
    if is_narrow(target):
        return f"rounded<{stored(target)}>((float){x})" if source != target else x
    if target == np.dtype(bool):
        return f"({x} != {number(0, use.kind)})"
    return f"({computed(target)}){x}"


def _pow(use: Use) -> str:
    """Of integers without a detour through floats, which a GPU's pow rounds to below the whole number."""
    x, y = use.given
    if use.floating:
        return f"m::pow({x}, ({use.kind}){y})"
    if use.kind == "bool":
        raise Unsuited("Pow of booleans")
    return f"m::power({x}, (double){y})" if is_floating(use.dtypes[1]) else f"m::power({x}, {y})"


def _clip(use: Use) -> str:
    text, (_, low, high) = use.x[0], (*use.x, "", "")[:3]
    text = f"m::maximum({text}, {low})" if low else text
    return f"m::minimum({text}, {high})" if high else text


def _gelu(use: Use) -> str:
    if not use.floating:
        raise Unsuited("Gelu of integers")
    tanh = use.attrs.get("approximate", "none") == "tanh"
    return f"{use.fast}::gelu_tanh({use.x[0]})" if tanh else f"m::gelu({use.x[0]})"


def _shift(use: Use) -> str:
    return f"m::{'left' if use.attrs['direction'] == 'LEFT' else 'right'}({use.x[0]}, {use.x[1]})"


def _is_inf(use: Use) -> str:
    sides = (bool(use.attrs.get(f"detect_{side}", 1)) for side in ("negative", "positive"))
    return f"m::is_inf({use.x[0]}, {', '.join(str(side).lower() for side in sides)})"


def _mean(use: Use) -> str:
    if not use.floating:
        raise Unsuited("Mean of integers")
    return f"(({' + '.join(use.given)}) / {number(len(use.given), use.kind)})"


def _sum(use: Use) -> str:
    return f"({' + '.join(use.given)})"


def _negative(use: Use) -> str:
    if use.kind == "bool":
        raise Unsuited("Neg of booleans")
    return f"(-{use.x[0]})"


_FORMULAS: dict[str, Formula] = {
    **{
        op: _call(name)
        for op, name in (
            pair.split("=")
            for pair in """
            Log=log Sqrt=sqrt Sin=sin Cos=cos Tan=tan Asin=asin Acos=acos Atan=atan Sinh=sinh Cosh=cosh Tanh=tanh
            Asinh=asinh Acosh=acosh Atanh=atanh Erf=erf Softplus=softplus Mish=mish
            """.split()
        )
    },
    **{op: _call(name, quick=True) for op, name in (("Exp", "exp"), ("Sigmoid", "sigmoid"))},
    **{op: _call(name, floats=False) for op, name in (("Abs", "absolute"), ("Sign", "sign"), ("Div", "divide"))},
    **{op: _whole(name) for op, name in (("Ceil", "ceil"), ("Floor", "floor"), ("Round", "rint"))},
    **{
        op: _infix(symbol)
        for op, symbol in (
            pair.split("=", 1)
            for pair in """
            Add=+ Sub=- Mul=* And=&& Or=|| BitwiseAnd=& BitwiseOr=| BitwiseXor=^
            Equal=== Less=< LessOrEqual=<= Greater=> GreaterOrEqual=>=
            """.split()
        )
    },
    "Neg": _negative,
    "Xor": lambda use: f"({use.x[0]} != {use.x[1]})",
    "Not": lambda use: f"(!{use.x[0]})",
    "BitwiseNot": lambda use: f"(!{use.x[0]})" if use.kind == "bool" else f"(~{use.x[0]})",
    "IsNaN": lambda use: f"({use.x[0]} != {use.x[0]})",
    "IsInf": _is_inf,
    "Sum": _sum,
    "Mean": _mean,
    "Max": _fold("m::maximum({}, {})"),
    "Min": _fold("m::minimum({}, {})"),
    "Mod": lambda use: f"m::{'c_remainder' if use.attrs.get('fmod', 0) else 'remainder'}({use.x[0]}, {use.x[1]})",
    "Pow": _pow,
    "BitShift": _shift,
    "Reciprocal": lambda use: f"({number(1, use.kind)} / {use.x[0]})" if use.floating else _refuse("Reciprocal"),
    "Where": lambda use: f"({use.x[0]} ? {use.x[1]} : {use.x[2]})",
    "Clip": _clip,
    "Cast": _cast,
    "Relu": lambda use: f"m::maximum({use.x[0]}, {number(0, use.kind)})",
    "Gelu": _gelu,
    "Swish": _with("swish", ("alpha", 1.0), quick=True),
    "Softsign": lambda use: f"({use.x[0]} / ({number(1, use.kind)} + m::absolute({use.x[0]})))",
    "HardSigmoid": lambda use: (
        f"m::clip({use.number('alpha', 0.2)} * {use.x[0]} + {use.number('beta', 0.5)}, "
        f"{number(0, use.kind)}, {number(1, use.kind)})"
    ),
    "HardSwish": lambda use: (
        f"({use.x[0]} * m::clip({use.x[0]} / {number(6, use.kind)} + {number(0.5, use.kind)}, "
        f"{number(0, use.kind)}, {number(1, use.kind)}))"
    ),
    "LeakyRelu": lambda use: (
        f"({use.x[0]} >= {number(0, use.kind)} ? {use.x[0]} : {use.number('alpha', 0.01)} * {use.x[0]})"
    ),
    "PRelu": lambda use: f"({use.x[0]} >= {number(0, use.kind)} ? {use.x[0]} : {use.x[1]} * {use.x[0]})",
    "Elu": _with("elu", ("alpha", 1.0)),
    "Celu": _with("celu", ("alpha", 1.0)),
    "Selu": _with("selu", ("alpha", 1.6732632423543772), ("gamma", 1.0507009873554805)),
    "ThresholdedRelu": lambda use: f"({use.x[0]} > {use.number('alpha', 1.0)} ? {use.x[0]} : {number(0, use.kind)})",
    "Shrink": _with("shrink", ("lambd", 0.5), ("bias", 0.0)),
}

FORMULAS = frozenset(_FORMULAS)
"""Every op that has a formula."""

SHARP = frozenset("Equal Less LessOrEqual Greater GreaterOrEqual Ceil Floor Round Sign Mod Sin Cos Tan".split())
"""Ops that jump, or that turn an angle of many turns: in half precision their operands are rounded first, as they would
be in memory."""


def _refuse(op: str) -> str:
    raise Unsuited(f"{op} of integers")
