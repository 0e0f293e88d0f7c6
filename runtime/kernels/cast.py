"""Cast, CastLike and BitCast: between all dtypes, as the ONNX operator documents say.

| to | what counts |
|---|---|
| 8-bit floats | round to nearest even; beyond the largest number: that number, or with `saturate` 0 infinity or NaN |
| float8_e8m0fnu | a power of two, by `round_mode`: `up`, `down`, or `nearest` where a tie goes up |
| float4_e2m1fn | round to nearest even; what is beyond the largest number becomes it; NaN becomes 0 |
| integers | floats lose what is behind the point; integers keep their lowest bits |
| bool | what is not 0 is true |
"""

from __future__ import annotations

from typing import Any

from onnxmesh.runtime.dtypes import dtype, float_max, is_float8
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE
from onnxmesh.runtime.kernels.numeric import wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel

_E8M0 = dtype("float8_e8m0fnu")
_MOST, _FAR = 127, 1 << 20
"""The powers of two of float8_e8m0fnu are from -127 to 127; one that is far out."""

ELEMENTWISE.update(("Cast", "CastLike"))


@kernel("Cast", "CastLike")
def cast(call: Call, x: Array, like: Array | None = None) -> Array:
    """To the output's dtype."""
    saturates = bool(call.attrs.get("saturate", 1))
    return converted(call.xp, x, call.outs[0].dtype, saturates, call.attrs.get("round_mode", "up"))


@kernel("BitCast")
def bit_cast(call: Call, x: Array) -> Array:
    """The same bits as another dtype of the same width. Unused bits of 2- and 4-bit types are 0."""
    return x.view(call.outs[0].dtype)


def converted(xp: Any, x: Array, target: Any, saturates: bool = True, round_mode: str = "up") -> Array:
    """`x` as an array of the dtype `target`."""
    if x.dtype == target:
        return x
    x = wide(xp, x)
    if target == _E8M0:
        return _powers_of_two(xp, x.astype(xp.float64), saturates, round_mode).view(target)
    if is_float8(target) and saturates:
        limit = float_max(target)
        x = xp.clip(x.astype(xp.float32), -limit, limit)
    return x.astype(target)


def _powers_of_two(xp: Any, x: Array, saturates: bool, round_mode: str) -> Array:
    """The bytes of float8_e8m0fnu: biased exponents of |x|, which is m 2^e with 0.5 <= m < 1; 255 is NaN."""
    mantissa, exponent = xp.frexp(xp.abs(x))
    up = {"up": mantissa > 0.5, "down": xp.zeros_like(mantissa, bool), "nearest": mantissa >= 0.75}[round_mode]
    power = xp.where(x == 0, -_FAR, xp.where(xp.isinf(x), _FAR, exponent - 1 + up))
    inside = (power >= -_MOST) & (power <= _MOST)
    nan = xp.isnan(x) | (~inside if not saturates else False)
    return xp.where(nan, 2 * _MOST + 1, xp.clip(power, -_MOST, _MOST) + _MOST).astype(xp.uint8)
