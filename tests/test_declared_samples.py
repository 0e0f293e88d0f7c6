"""The kernel of every op whose rule carries samples, against ONNX Runtime (or ONNX's reference) on those samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from rule_checker import random

import onnxmesh.compiler.ops.table
import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.compiler.ir.view import numpy_dtype
from onnxmesh.compiler.ops.samples import Sample, Tensor, declared
from onnxmesh.compiler.verification import compare, reference
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

OPSET = 23
SAMPLES = [
    sample
    for sample in declared()
    if onnx.defs.has(sample.op, OPSET) and all(t is None or t.kind in "fpqQwj" for t in sample.ins)
]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_the_kernel_computes_what_onnx_says(sample: Sample, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = [None if t is None else random(t, rng) for t in sample.ins]
    outputs = [f"y{i}" for i in range(len(sample.outs))]
    given = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    graph = helper.make_graph(
        [helper.make_node(sample.op, names, outputs, **dict(sample.attrs))],
        "graph",
        [value(name, t) for name, t in zip(names, sample.ins) if t is not None],
        [value(name, t) for name, t in zip(outputs, sample.outs)],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)
    expected = reference(path, given)[1]
    types = tuple(TensorType(numpy_dtype(t.dtype), t.shape) for t in sample.outs)
    result = find(sample.op)(Call(np, dict(sample.attrs), types, {}), *inputs)
    results = result if isinstance(result, tuple) else (result,)
    assert all(compare(name, x, expected[name], 1e-6).agrees for name, x in zip(outputs, results, strict=True))


def value(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
    """The declaration of a graph's input or output."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(numpy_dtype(tensor.dtype)), tensor.shape)
