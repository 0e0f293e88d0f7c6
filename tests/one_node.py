"""A model of one node, compiled for some ranks and run, against ONNX's reference evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

import onnxmesh
from onnxmesh.runtime.plan import Plan


def model(
    op: str,
    inputs: Sequence[np.ndarray | None],
    outputs: int = 1,
    *,
    opset: int = 24,
    domain: str = "",
    version: int = 1,
    absent: Sequence[int] = (),
    **attrs: Any,
) -> onnx.ModelProto:
    """The node with inputs x0, x1, ... and outputs y0, y1, ..., but for those `absent`."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    outs = ["" if i in absent else f"y{i}" for i in range(outputs)]
    given = [(name, x) for name, x in zip(names, inputs) if x is not None]
    graph = helper.make_graph(
        [helper.make_node(op, names, outs, domain=domain, **attrs)],
        "graph",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given],
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(given[0][1].dtype), None) for n in outs if n],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, version)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(plan: Plan, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """What the plan gives."""
    with onnxmesh.Session(plan) as session:
        return session.run(None, {f"x{i}": x for i, x in enumerate(inputs) if x is not None})


def check(
    op: str,
    inputs: Sequence[np.ndarray | None],
    outputs: int = 1,
    *,
    meshes: Sequence[Mapping[str, int]] = ({}, {"dp": 2}, {"tp": 2}),
    rtol: float = 1e-5,
    atol: float = 1e-6,
    **given: Any,
) -> None:
    """Assert that the compiled node gives on every mesh what ONNX's reference gives."""
    proto = model(op, inputs, outputs, **given)
    want = ReferenceEvaluator(proto).run(None, {f"x{i}": x for i, x in enumerate(inputs) if x is not None})
    for mesh in meshes:
        got = run(onnxmesh.compile(proto, allow_replicated=True, **mesh), inputs)
        assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in want], mesh
        for a, b in zip(got, want):
            np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol, atol, err_msg=str(mesh))
