"""Products of integers, less their zero points: MatMulInteger and ConvInteger. Sums are exact, then kept as int32.

They are computed in float64: products of 16-bit integers are summed exactly there, 2^21 of them and more, by the
libraries that are made for it.
"""

from __future__ import annotations

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.kernels.conv import conv
from onnxmesh.runtime.kernels.registry import Array, Call, TensorType, kernel


@kernel("MatMulInteger")
def matmul_integer(call: Call, a: Array, b: Array, a_zero: Array | None = None, b_zero: Array | None = None) -> Array:
    """(a - a_zero) times (b - b_zero), as numpy.matmul: int32, which wraps around.

    A vector a_zero has one number for every row of a, a vector b_zero one for every column of b.
    """
    rows = a_zero.reshape(-1, 1) if a_zero is not None and a_zero.size > 1 and a_zero.ndim == 1 else a_zero
    return _int32(call, call.xp.matmul(_less(call, a, rows), _less(call, b, b_zero)))


@kernel("ConvInteger")
def conv_integer(call: Call, x: Array, w: Array, x_zero: Array | None = None, w_zero: Array | None = None) -> Array:
    """Conv of x - x_zero with w - w_zero, int32; a vector w_zero has one number for every output channel.

    The attributes are those of Conv. What is padded is x_zero, so that it counts as 0.
    """
    channels = w_zero.reshape(-1, *[1] * (w.ndim - 1)) if w_zero is not None and w_zero.size > 1 else w_zero
    exact = Call(call.xp, call.attrs, (TensorType(dtype("float64"), call.outs[0].shape),), call.coordinate)
    return _int32(call, conv(exact, _less(call, x, x_zero), _less(call, w, channels)))


def _less(call: Call, x: Array, zero: Array | None) -> Array:
    x = x.astype(call.xp.float64)
    return x if zero is None else x - (zero.reshape(()) if zero.size == 1 else zero)


def _int32(call: Call, x: Array) -> Array:
    """By way of int64, whose lowest bits are those of int32."""
    return x.astype(call.xp.int64).astype(call.outs[0].dtype)
