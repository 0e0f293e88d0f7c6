"""Elementwise ops: every output dim is a factor."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, OpView, broadcast, numbered, register

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin "
    "Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Shrink Dropout"
).split()
NARY = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Clip Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean "
    "Min Mod Mul Or Pow PRelu Sub Sum Where Xor Fused"
).split()

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def _linear(view: OpView) -> tuple[frozenset[int], ...]:
    """The sets of inputs that may all be Partial(sum): where the op is linear in them."""
    if view.out_dtypes[0] not in _FLOATS:
        return ()
    return {
        "Neg": (frozenset({0}),),
        "Identity": (frozenset({0}),),
        "Add": (frozenset({0, 1}),),
        "Sub": (frozenset({0, 1}),),
        "Sum": (frozenset(range(len(view.ins))),),
        "Mean": (frozenset(range(len(view.ins))),),
        "Mul": (frozenset({0}), frozenset({1})),
        "Div": (frozenset({0}),),
        "Where": (frozenset({1, 2}),),
    }.get(view.op, ())


def factors(view: OpView) -> Factors:
    """Broadcasting from the right; a linear op lets Partial pass."""
    return Factors(
        broadcast(view.ins, view.outs[0]),
        tuple(numbered(out) for out in view.outs),
        linear=_linear(view),
    )


def cast_like(view: OpView) -> Factors:
    """Of the second input only the dtype counts."""
    x, like = view.ins
    return Factors((numbered(x or ()), (None,) * len(like or ())), (numbered(view.outs[0]),))


register(*UNARY, *NARY, factors=factors)
register("CastLike", factors=cast_like)
