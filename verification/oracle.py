"""What a segment of the model gives: by ONNX Runtime in the model's dtypes, by onnx.reference in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import erf, prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxmesh.compiler.verification import widen
from onnxmesh.runtime.dtypes import is_narrow
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE
from onnxmesh.verification.model import Arrays, Model, NotComparable, Segment
from onnxmesh.verification.rounding import CHUNK, Bound, is_float

CHANGES = 3
"""Random changes of the inputs that D is taken over."""

_SMALL = 1 << 20
"""Elements of a segment up to which one thread is enough."""

_MOVES = frozenset(
    "Reshape Transpose Concat Split Slice Squeeze Unsqueeze Flatten Expand Tile Gather GatherElements GatherND Cast "
    "CastLike Identity Where Pad Shape Constant ConstantOfShape DepthToSpace SpaceToDepth ScatterND ScatterElements "
    "Range Size Trilu Resize".split()
)
_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "FusedMatMul", "FusedGemm"})
_ROUNDING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv", "Cast", "Round"})


@dataclass
class Oracle:
    """Runs segments; counts what computed them.

    Attributes:
        used: how many segments each reference computed.
        exact: how many were computed in float64, too.
    """

    model: Model
    used: dict[str, int] = field(default_factory=dict)
    exact: int = 0

    def run(self, segment: Segment, values: Arrays) -> dict[str, np.ndarray]:
        """The segment's outputs from the values of its inputs.

        Raises NotComparable if neither ONNX Runtime nor onnx.reference can run it.
        """
        weights = self._weights(segment)
        errors = []
        for name, attempt in (("ONNX Runtime", _with_runtime), ("onnx.reference", _with_reference)):
            try:
                outputs = attempt(self.model, segment, values, weights)
            except Exception as error:
                errors.append(f"{name}: {' '.join(str(error).split())[:200]}")
            else:
                self.used[name] = self.used.get(name, 0) + 1
                return dict(zip(segment.outputs, outputs))
        raise NotComparable(f"nothing runs the nodes that make {segment.outputs[0]!r}: {'; '.join(errors)}")

    def run_exactly(self, segment: Segment, values: Arrays, change: float) -> Iterator[dict[str, np.ndarray]]:
        """The outputs in float64, and then those for inputs changed by up to `change` of themselves, a few times.

        Raises NotComparable if onnx.reference cannot run it.
        """
        self.exact += 1
        weights = self._weights(segment)
        proto = widen(self.model.proto(segment, values, weights), TensorProto.DOUBLE)
        evaluator = _evaluator(proto)
        inputs = {**values, **weights}
        names = [item.name for item in proto.graph.input]
        rng = np.random.default_rng(0)
        for turn in range(1 + CHANGES):
            factor = change if turn else 0.0
            try:
                with np.errstate(all="ignore"):
                    feeds = {name: _changed(inputs[name], factor, rng) for name in names}
                    outputs = evaluator.run(list(segment.outputs), feeds)
                    del feeds
            except Exception as error:
                raise NotComparable(f"onnx.reference: {' '.join(str(error).split())[:200]}") from error
            yield dict(zip(segment.outputs, map(np.asarray, outputs)))
            del outputs  # before the next are computed

    def bound(self, segment: Segment, values: Arrays, unit: float, last: str) -> Bound:
        """What a right result may be off; `last` is the output that it is for."""
        weights = self._weights(segment)
        shapes = _shapes(self.model.proto(segment, values, weights, 0 if weights else 1))
        terms = sum(_terms(self.model.node(number), shapes) for number in segment.nodes)
        producer = self.model.producer(last)
        steps = int(producer is not None and self.model.op(producer) in _ROUNDING)
        return Bound(max(1, terms), max(1, len(segment.nodes)), unit, steps)

    def _weights(self, segment: Segment) -> dict[str, np.ndarray]:
        return {name: self.model.weight(name) for name in segment.weights}


def _with_runtime(model: Model, segment: Segment, values: Arrays, weights: Arrays) -> list[np.ndarray]:
    """Some ops want their weights as constants; with sizes that are known, ONNX Runtime infers some shapes wrongly."""
    try:
        return _run_session(model.proto(segment, values, weights, sized=False), values, weights)
    except Exception:
        if not segment.weights:
            raise
    return _run_session(model.proto(segment, values, weights, 1 << 31, sized=False), values, weights)


def _run_session(proto: onnx.ModelProto, values: Arrays, weights: Arrays) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # its memory goes back at once
    names = [item.name for item in proto.graph.input]
    feeds = {name: values[name] if name in values else weights[name] for name in names}
    if sum(array.size for array in feeds.values()) < _SMALL:
        options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(x) for x in session.run(None, {name: np.ascontiguousarray(x) for name, x in feeds.items()})]


def _with_reference(model: Model, segment: Segment, values: Arrays, weights: Arrays) -> list[np.ndarray]:
    """In float32 where the segment is in half precision: ONNX Runtime has no kernels for some of it."""
    proto = widen(model.proto(segment, values, weights))
    inputs = {**values, **weights}
    feeds = {
        item.name: x.astype(np.float32) if is_narrow((x := inputs[item.name]).dtype) else x
        for item in proto.graph.input
    }
    with np.errstate(all="ignore"):
        return [np.asarray(x) for x in _evaluator(proto).run(list(segment.outputs), feeds)]


def _evaluator(proto: onnx.ModelProto) -> Any:
    """onnx.reference on a model, with an Erf that computes float64 as such: its own rounds to float32."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Erf(OpRun):  # type: ignore[misc]
        def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
            values = np.fromiter(map(erf, x.reshape(-1).tolist()), np.float64, x.size)
            return (values.reshape(x.shape).astype(x.dtype),)

    return ReferenceEvaluator(proto, new_ops=[Erf])


def _changed(array: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """In float64, each element changed by up to `factor` of itself."""
    if not is_float(array.dtype) or array.dtype.kind == "c":
        return array
    wide = array.astype(np.float64)
    if factor:
        flat = wide.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            part *= 1 + rng.uniform(-factor, factor, part.size)
    return wide


# --- how long sums are --------------------------------------------------------------------------------------


def _shapes(proto: onnx.ModelProto) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a segment's values, as far as ONNX infers them."""
    with suppress(Exception):  # ops that ONNX does not know
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    graph = proto.graph
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            found[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return found


def _terms(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many terms an element of a node's results is the sum of, at the most."""
    ins = [shapes.get(name, ()) for name in node.input if name]
    if node.op_type in _MOVES or node.op_type in ELEMENTWISE or not ins:
        return 1
    if node.op_type in _PRODUCTS:
        return max((1, *ins[0][-2 if node.op_type == "Gemm" else -1 :]))
    if node.op_type in ("Conv", "QLinearConv", "ConvInteger", "ConvTranspose") and len(ins) > 1:
        return max(1, prod(max(ins[1:], key=len)[1:]))
    if node.op_type.startswith(("Reduce", "Global")):
        return max(1, prod(ins[0]) // max(1, prod(shapes.get(node.output[0], ()))))
    return sum(max((1, *shape)) for shape in ins)
