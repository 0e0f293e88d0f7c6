"""Elementwise ops: arithmetic, comparisons, logic, activations, Where (Cast: cast.py).

All broadcast as ONNX does (NumPy's rule). Formulas are those of the ONNX operator documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from typing import Any

from onnxmesh.runtime.kernels.numeric import is_float, rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel

_UFUNCS = dict(
    pair.split("=")
    for pair in """
    Abs=abs Neg=negative Exp=exp Log=log Sqrt=sqrt Ceil=ceil Floor=floor Round=rint Sign=sign
    Sin=sin Cos=cos Tan=tan Asin=arcsin Acos=arccos Atan=arctan
    Sinh=sinh Cosh=cosh Tanh=tanh Asinh=arcsinh Acosh=arccosh Atanh=arctanh
    Add=add Sub=subtract Mul=multiply
    BitwiseAnd=bitwise_and BitwiseOr=bitwise_or BitwiseXor=bitwise_xor BitwiseNot=invert
    And=logical_and Or=logical_or Xor=logical_xor Not=logical_not IsNaN=isnan
    Equal=equal Less=less LessOrEqual=less_equal Greater=greater GreaterOrEqual=greater_equal
    """.split()
)
_VARIADIC = {"Sum": "add", "Max": "maximum", "Min": "minimum"}

PREDICATES = frozenset("And Or Xor Not IsNaN IsInf Equal Less LessOrEqual Greater GreaterOrEqual".split())
"""The elementwise ops whose result is bool."""

ELEMENTWISE: set[str] = {*_UFUNCS, *_VARIADIC}
"""Every op of this family."""

Formula = Callable[..., Array]


def _elementwise(*ops: str) -> Callable[[Formula], Formula]:
    """Register `formula(call, *wide inputs)`; its result is rounded to the output's dtype."""

    def register(formula: Formula) -> Formula:
        def run(call: Call, *arrays: Array) -> Array:
            inputs = (None if x is None else wide(call.xp, x) for x in arrays)
            return rounded(call, formula(call, *inputs))

        kernel(*ops)(run)
        ELEMENTWISE.update(ops)
        return formula

    return register


def _ufunc(name: str) -> Formula:
    return lambda call, *inputs: getattr(call.xp, name)(*inputs)


def _variadic(name: str) -> Formula:
    return lambda call, *inputs: reduce(getattr(call.xp, name), inputs)


for _op, _name in _UFUNCS.items():
    _elementwise(_op)(_ufunc(_name))
for _op, _name in _VARIADIC.items():
    _elementwise(_op)(_variadic(_name))


@_elementwise("Mean")
def _mean(call: Call, *inputs: Array) -> Array:
    return reduce(call.xp.add, inputs) / len(inputs)


@_elementwise("Div")
def _div(call: Call, x: Array, y: Array) -> Array:
    """Integers divide as in C: towards zero."""
    if is_float(x):
        return call.xp.divide(x, y)
    quotient = call.xp.floor_divide(x, y)
    inexact = (quotient * y != x) & ((x < 0) != (y < 0))
    return quotient + inexact.astype(quotient.dtype)


@_elementwise("Mod")
def _mod(call: Call, x: Array, y: Array) -> Array:
    return call.xp.fmod(x, y) if call.attrs.get("fmod", 0) else call.xp.remainder(x, y)


@_elementwise("Pow")
def _pow(call: Call, x: Array, y: Array) -> Array:
    """The result has the dtype of x; integers go through float64, as in ONNX Runtime."""
    xp = call.xp
    if not is_float(x):
        return xp.power(x.astype(xp.float64), y)
    if xp.__name__ == "numpy" and y.size == 1 and y.ndim <= x.ndim and y.item() in (2, 3):
        x = x.reshape(call.outs[0].shape)
        return x * x if y.item() == 2 else x * x * x
    return xp.power(x, y.astype(xp.float64) if not is_float(y) else y)


@_elementwise("BitShift")
def _bit_shift(call: Call, x: Array, y: Array) -> Array:
    """A shift by the width or more leaves zeros, to the right of a negative number ones; C leaves that open."""
    xp, width = call.xp, 8 * x.dtype.itemsize
    left = call.attrs["direction"] == "LEFT"
    shifted = (xp.left_shift if left else xp.right_shift)(x, xp.minimum(y, width - 1).astype(x.dtype))
    return shifted if not left and x.dtype.kind == "i" else xp.where(y >= width, xp.zeros_like(shifted), shifted)


@_elementwise("IsInf")
def _is_inf(call: Call, x: Array) -> Array:
    negative, positive = call.attrs.get("detect_negative", 1), call.attrs.get("detect_positive", 1)
    return (x == math.inf) & bool(positive) | (x == -math.inf) & bool(negative)


@_elementwise("Reciprocal")
def _reciprocal(call: Call, x: Array) -> Array:
    return 1 / x


@_elementwise("Where")
def _where(call: Call, condition: Array, x: Array, y: Array) -> Array:
    return call.xp.where(condition, x, y)


@_elementwise("Clip")
def _clip(call: Call, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    x = x if low is None else call.xp.maximum(x, low)
    return x if high is None else call.xp.minimum(x, high)


@_elementwise("Erf")
def _erf(call: Call, x: Array) -> Array:
    return erf(call.xp, x)


@_elementwise("Sigmoid")
def _sigmoid(call: Call, x: Array) -> Array:
    return 1 / (1 + call.xp.exp(-x))


@_elementwise("Relu")
def _relu(call: Call, x: Array) -> Array:
    return call.xp.maximum(x, 0)


@_elementwise("Gelu")
def _gelu(call: Call, x: Array) -> Array:
    if call.attrs.get("approximate", "none") == "tanh":
        return 0.5 * x * (1 + call.xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + erf(call.xp, x * math.sqrt(0.5)))


@_elementwise("Swish")
def _swish(call: Call, x: Array) -> Array:
    return x / (1 + call.xp.exp(-call.attrs.get("alpha", 1.0) * x))


@_elementwise("Softplus")
def _softplus(call: Call, x: Array) -> Array:
    return softplus(call.xp, x)


@_elementwise("Mish")
def _mish(call: Call, x: Array) -> Array:
    return x * call.xp.tanh(softplus(call.xp, x))


@_elementwise("Softsign")
def _softsign(call: Call, x: Array) -> Array:
    return x / (1 + call.xp.abs(x))


@_elementwise("HardSigmoid")
def _hard_sigmoid(call: Call, x: Array) -> Array:
    return call.xp.clip(call.attrs.get("alpha", 0.2) * x + call.attrs.get("beta", 0.5), 0, 1)


@_elementwise("HardSwish")
def _hard_swish(call: Call, x: Array) -> Array:
    return x * call.xp.clip(x / 6 + 0.5, 0, 1)


@_elementwise("LeakyRelu")
def _leaky_relu(call: Call, x: Array) -> Array:
    return call.xp.where(x >= 0, x, call.attrs.get("alpha", 0.01) * x)


@_elementwise("PRelu")
def _prelu(call: Call, x: Array, slope: Array) -> Array:
    return call.xp.where(x >= 0, x, slope * x)


@_elementwise("Elu")
def _elu(call: Call, x: Array) -> Array:
    return call.xp.where(x >= 0, x, call.attrs.get("alpha", 1.0) * call.xp.expm1(x))


@_elementwise("Celu")
def _celu(call: Call, x: Array) -> Array:
    alpha = call.attrs.get("alpha", 1.0)
    return call.xp.where(x >= 0, x, alpha * call.xp.expm1(x / alpha))


@_elementwise("Selu")
def _selu(call: Call, x: Array) -> Array:
    alpha = call.attrs.get("alpha", 1.6732632423543772)
    gamma = call.attrs.get("gamma", 1.0507009873554805)
    return gamma * call.xp.where(x > 0, x, alpha * call.xp.expm1(x))


@_elementwise("ThresholdedRelu")
def _thresholded_relu(call: Call, x: Array) -> Array:
    return call.xp.where(x > call.attrs.get("alpha", 1.0), x, 0)


@_elementwise("Shrink")
def _shrink(call: Call, x: Array) -> Array:
    threshold, bias = call.attrs.get("lambd", 0.5), call.attrs.get("bias", 0.0)
    return call.xp.where(x < -threshold, x + bias, call.xp.where(x > threshold, x - bias, 0))


def erf(xp: Any, x: Array) -> Array:
    """The error function, from SciPy or CuPy's copy of it."""
    name = "scipy.special" if xp.__name__ == "numpy" else "cupyx.scipy.special"
    return import_module(name).erf(x)


def softplus(xp: Any, x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    return xp.logaddexp(x, xp.zeros((), x.dtype))
