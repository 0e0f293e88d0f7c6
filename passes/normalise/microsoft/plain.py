"""Ops of `com.microsoft` that are ONNX's under another name, or a few of them in a row."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import dtype_of, label, optional, present, shape_of
from onnxmesh.passes.normalise.ops import must_be_known

# --- ONNX has them too --------------------------------------------------------------------------------------


def same(node: ir.Node, b: Builder) -> None:
    """The ONNX op of the same name, inputs and attributes."""
    attributes = {name: a.value for name, a in node.attributes.items()}
    b.replace(b.node("", node.op_type, node.inputs, attributes).outputs[0])


def grid_sample(node: ir.Node, b: Builder) -> None:
    """GridSample, whose modes had other names."""
    mode = node.attributes.get_string("mode", "bilinear") or ""
    attributes = {
        "mode": {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode),
        "padding_mode": node.attributes.get_string("padding_mode", "zeros"),
        "align_corners": node.attributes.get_int("align_corners", 0),
    }
    b.replace(b.op("GridSample", present(node, 0), present(node, 1), **attributes))


def pad(node: ir.Node, b: Builder) -> None:
    """Pad, whose pads may have a leading dim of 1, and whose value may be a vector of one."""
    value = optional(node, 2)
    pads = b.constant(must_be_known(node, 1).astype(np.int64))
    filled = None if value is None else b.reshape(value)
    b.replace(b.op("Pad", present(node, 0), pads, filled, mode=node.attributes.get_string("mode", "constant")))


def range_(node: ir.Node, b: Builder) -> None:
    """Range of scalars, or vectors of one; the step is 1 where it is absent."""
    start, limit = (b.constant(must_be_known(node, i).reshape(())) for i in (0, 1))
    step = b.constant(1 if optional(node, 2) is None else must_be_known(node, 2).reshape(()), dtype_of(start))
    b.replace(b.op("Range", start, limit, step))


def expand_dims(node: ir.Node, b: Builder) -> None:
    """Unsqueeze by one axis."""
    axis = b.constant(must_be_known(node, 1).reshape(1).astype(np.int64))
    b.replace(b.op("Unsqueeze", present(node, 0), axis))


def torch_embedding(node: ir.Node, b: Builder) -> None:
    """Gather of rows."""
    b.replace(b.op("Gather", present(node, 0), present(node, 1), axis=0))


def identity(node: ir.Node, b: Builder) -> None:
    """What gives its input."""
    b.replace(b.op("Identity", present(node, 0)))


def inverse(node: ir.Node, b: Builder) -> None:
    """The inverse of every matrix: an op of the normal form."""
    x = present(node, 0)
    b.replace(b.own("Inverse", [x], shape_of(x)))


# --- softmax, dropout, windows ------------------------------------------------------------------------------


def bias_softmax(node: ir.Node, b: Builder) -> None:
    """Softmax of the sum, over all dims from `axis` on."""
    total = b.op("Add", present(node, 0), present(node, 1))
    shape = shape_of(total)
    axis = node.attributes.get_int("axis", 1) % len(shape)
    if axis == len(shape) - 1:
        b.replace(b.op("Softmax", total, axis=axis))
        return
    flat = b.reshape(total, *shape[:axis], prod(shape[axis:]))
    b.replace(b.reshape(b.op("Softmax", flat, axis=axis), *shape))


def bias_dropout(node: ir.Node, b: Builder) -> None:
    """BiasDropout: `x + bias + residual`; inference drops nothing."""
    total = b.op("Add", present(node, 0), present(node, 1))
    residual = optional(node, 2)
    ratio, training = optional(node, 3), optional(node, 4)
    y = b.node("", "Dropout", [total, ratio, training], {}, len(node.outputs)).outputs
    b.replace(y[0] if residual is None else b.op("Add", y[0], residual), *y[1:])


def unfold(node: ir.Node, b: Builder) -> None:
    """UnfoldTensor: all windows of a dim; the elements of a window become the last dim."""
    x, size, step = present(node, 0), node.attributes.get_int("size", 1), node.attributes.get_int("step", 1)
    shape = shape_of(x)
    dim = node.attributes.get_int("dim", -1) % len(shape)
    starts = np.arange(0, shape[dim] - size + 1, step, dtype=np.int64)
    windows = b.op("Gather", x, b.constant(starts[:, None] + np.arange(size)), axis=dim)
    order = [i for i in range(len(shape) + 1) if i != dim + 1]
    b.replace(b.transpose(windows, *order, dim + 1))


def is_all_finite(node: ir.Node, b: Builder) -> None:
    """One boolean: no element of any input is infinite or NaN (or just one of these, where it says so)."""
    tests = {"isnan_only": ("IsNaN",), "isinf_only": ("IsInf",)}
    ops = next((ops for name, ops in tests.items() if node.attributes.get_int(name, 0)), ("IsNaN", "IsInf"))
    found = None
    for x in node.inputs:
        assert x is not None
        for op in ops:
            bad = b.op("ReduceMax", b.op("Cast", b.op(op, x), to=int(ir.DataType.INT32)), keepdims=0)
            found = bad if found is None else b.op("Max", found, bad)
    assert found is not None
    b.replace(b.op("Equal", found, b.constant(np.int32(0))))


# --- complex numbers, as a last dim of two ------------------------------------------------------------------


def complex_mul(node: ir.Node, b: Builder) -> None:
    """ComplexMul, ComplexMulConj: `a * b`, or `a * conj(b)`, over a last dim of (real, imaginary)."""
    parts = [[_part(b, present(node, i), k) for k in range(2)] for i in range(2)]
    (p, q), (r, s) = parts
    plus, minus = ("Add", "Sub") if node.op_type == "ComplexMulConj" else ("Sub", "Add")
    real = b.op(plus, b.op("Mul", p, r), b.op("Mul", q, s))
    cross = [b.op("Mul", p, s), b.op("Mul", q, r)]
    imaginary = b.op("Add", *cross) if minus == "Add" else b.op("Sub", cross[1], cross[0])
    b.replace(b.op("Concat", real, imaginary, axis=-1))


def _part(b: Builder, x: ir.Value, k: int) -> ir.Value:
    return b.slice(x, len(shape_of(x)) - 1, k, k + 1)


def rfft(node: ir.Node, b: Builder) -> None:
    """The one-sided Fourier transform of the last dim; the result has a last dim of (real, imaginary).

    A product with the table of sines: `sum_n x[n] exp(-2 pi i k n / N)`.

    Raises:
        ModelError: the signal has several dims.
    """
    _require_one_dim(node)
    x = present(node, 0)
    count = shape_of(x)[-1]
    angles = 2 * np.pi / count * np.outer(np.arange(count), np.arange(count // 2 + 1))
    tables = np.stack([np.cos(angles), -np.sin(angles)], axis=-1)
    y = b.op("MatMul", x, b.constant(tables.reshape(count, -1), dtype_of(x)))
    b.replace(b.reshape(y, *shape_of(x)[:-1], count // 2 + 1, 2))


def irfft(node: ir.Node, b: Builder) -> None:
    """The inverse of `rfft`, for a signal of an even length.

    Raises:
        ModelError: the signal has several dims.
    """
    _require_one_dim(node)
    x = present(node, 0)
    half = shape_of(x)[-2]
    count = 2 * (half - 1)
    angles = 2 * np.pi / count * np.outer(np.arange(half), np.arange(count))
    weight = np.where((np.arange(half) == 0) | (np.arange(half) == half - 1), 1.0, 2.0)[:, None] / count
    tables = np.stack([weight * np.cos(angles), -weight * np.sin(angles)], axis=1)
    flat = b.reshape(x, *shape_of(x)[:-2], half * 2)
    b.replace(b.op("MatMul", flat, b.constant(tables.reshape(half * 2, count), dtype_of(x))))


def _require_one_dim(node: ir.Node) -> None:
    if node.attributes.get_int("signal_ndim", 1) != 1:
        raise ModelError(
            f"{label(node)} transforms several dims", hint="one dim is supported: signal_ndim = 1", code="OM1303"
        )


# --- positions ----------------------------------------------------------------------------------------------


def relative_position_bias(node: ir.Node, b: Builder) -> None:
    """T5's bias by distance (Raffel et al., 2020): rows of a table `[buckets, heads]`, as `[1, heads, s, s]`.

    Half of the buckets hold one distance each, the others logarithmic ranges up to `max_distance`. As in ONNX Runtime
    the table's bytes stand column by column, that is, as `[heads, buckets]`.
    """
    table, (rows, columns) = present(node, 0), (int(must_be_known(node, i)[0]) for i in (1, 2))
    buckets, heads = shape_of(table)
    distance = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    first = np.zeros_like(distance)
    if node.attributes.get_int("is_bidirectional", 0):
        buckets //= 2
        first = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    furthest = node.attributes.get_int("max_distance", 128)
    ratio = np.log(np.maximum(distance, 1) / exact) / np.log(furthest / exact)
    far = np.minimum(exact + (ratio * (buckets - exact)).astype(np.int64), buckets - 1)
    index = first + np.where(distance < exact, distance, far)
    by_head = b.reshape(table, heads, shape_of(table)[0])
    picked = b.op("Gather", by_head, b.constant(index.astype(np.int64)), axis=1)
    b.replace(b.reshape(picked, 1, heads, rows, columns))


PLAIN_EXPANSIONS = {
    **dict.fromkeys(("GatherND", "Trilu"), same),
    "GridSample": grid_sample,
    "Pad": pad,
    "Range": range_,
    "ExpandDims": expand_dims,
    "TorchEmbedding": torch_embedding,
    "SampleOp": identity,
    "Inverse": inverse,
    "BiasSoftmax": bias_softmax,
    "BiasDropout": bias_dropout,
    "UnfoldTensor": unfold,
    "IsAllFinite": is_all_finite,
    **dict.fromkeys(("ComplexMul", "ComplexMulConj"), complex_mul),
    "Rfft": rfft,
    "Irfft": irfft,
    "RelativePositionBias": relative_position_bias,
}
