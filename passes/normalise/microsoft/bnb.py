"""MatMulBnb4 of `com.microsoft`: weights of 4 bits that are codes of a table, as bitsandbytes stores them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, present
from onnxmesh.passes.normalise.microsoft.quantised import unpacked

_HALF = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_HALF, *(-x for x in _HALF))
"""Sign, two bits of exponent, one of mantissa, scaled so that the largest is 1."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution: NormalFloat4 of QLoRA (Dettmers et al., 2023)."""


def matmul_bnb4(node: ir.Node, b: Builder) -> None:
    """The table at the codes, times the largest number of every block, is the weight `[n, k]`; then MatMul.

    Raises:
        ModelError: a row of the weight is not made of whole blocks.
    """
    x, packed, scales = (present(node, i) for i in range(3))
    n, k, block = (node.attributes.get_int(name, 0) for name in ("N", "K", "block_size"))
    if k % block:
        raise ModelError(
            f"{label(node)} has rows of {k} in blocks of {block}", hint="give a block size that divides", code="OM1311"
        )
    codes = unpacked(b, b.reshape(packed, n, k // 2, 1), 4)
    first_is_high = b.op("Gather", codes, b.constant(np.array([1, 0], np.int64)), axis=2)
    codes = b.op("Cast", b.reshape(first_is_high, n, k // block, block), to=int(ir.DataType.INT64))
    table = b.constant(np.array(NF4 if node.attributes.get_int("quant_type", 1) else FP4), dtype_of(x))
    numbers = b.op("Gather", table, codes, axis=0)
    weight = b.reshape(b.op("Mul", numbers, b.reshape(scales, n, k // block, 1)), n, k)
    b.replace(b.op("MatMul", x, b.transpose(weight, 1, 0) if node.attributes.get_int("transB", 1) else weight))


BNB_EXPANSIONS = {"MatMulBnb4": matmul_bnb4}
