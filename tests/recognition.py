"""Shared by the tests of `recognise`: a graph in ONNX's text form, through the passes, against ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from evaluate import evaluate
from onnx import helper, numpy_helper

from onnxmesh.compiler.frontend import load
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.graph.match import Finding
from onnxmesh.passes.normalise.normalise import normalise
from onnxmesh.passes.recognise.recognise import recognise

Arrays = Mapping[str, np.ndarray]
TOLERANCE = {"float32": 1e-5, "float16": 4e-3}


@dataclass(frozen=True)
class Result:
    """A recognised model."""

    model: ir.Model
    findings: list[Finding]

    @property
    def ops(self) -> Counter[str]:
        """How often each op stands in the graph."""
        return Counter(node.op_type for node in self.model.graph)

    def node(self, op: str) -> ir.Node:
        """The only node of an op."""
        (node,) = [n for n in self.model.graph if n.op_type == op]
        return node

    def attribute(self, op: str, name: str) -> object:
        """An attribute of the only node of an op."""
        return self.node(op).attributes[name].value

    def misses(self, pattern: str) -> list[str]:
        """The reasons of the near misses of a pattern."""
        return [f.reason for f in self.findings if f.pattern == pattern and not f.found]


def parsed(
    body: str, inputs: Arrays, constants: Arrays, outputs: Sequence[str] = ("y",), opset: int = 18
) -> onnx.ModelProto:
    """A model with the nodes of `body`; one output is `y` (`float16 y` names its type)."""
    declared = [o if " " in o else f"float {o}" for o in outputs]
    declared = [o.replace(" ", "[] ") for o in declared]
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g () => ({", ".join(declared)}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for name, array in inputs.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items())
    return model


def reference(model: onnx.ModelProto, inputs: Arrays) -> dict[str, np.ndarray]:
    """The outputs by ONNX Runtime, as the graph is written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in model.graph.output], session.run(None, dict(inputs))))


def check(
    body: str,
    inputs: Arrays,
    constants: Arrays | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
) -> Result:
    """Recognise the graph, and compare what it computes with ONNX Runtime."""
    proto = parsed(body, inputs, constants or {}, outputs, opset)
    wanted = reference(proto, inputs)
    model, findings = recognise(normalise(bind(load(proto), {}, {})))
    assert_ordered(model.graph)
    found = evaluate(model, inputs)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        tolerance = TOLERANCE.get(array.dtype.name, 0)
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance, err_msg=name)
    return Result(model, findings)


def assert_ordered(graph: ir.Graph) -> None:
    """Every value is typed and made before it is used, and every node is of use."""
    known = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        assert all(v is None or v in known for v in node.inputs), node
        assert any(v.uses() or v.is_graph_output() for v in node.outputs), node
        assert all(v.shape is not None and v.shape.is_static() and v.dtype is not None for v in node.outputs), node
        known.update(node.outputs)
    names = [v.name for v in known]
    assert len(names) == len(set(names))


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Random numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)
