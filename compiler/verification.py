"""Prove a plan: run it beside a reference on the same inputs, and compare every output."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxmesh.compiler.errors import VerificationError
from onnxmesh.runtime.bound_values import bound_values
from onnxmesh.runtime.dtypes import dtype, is_narrow
from onnxmesh.runtime.loose import describe
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.recipe import Fetch
from onnxmesh.runtime.session import Session

SINGLE, HALF = 1e-4, 2e-2
"""Tolerances of models in float32 and in half precision."""

Arrays = Mapping[str, np.ndarray]
Path = str | os.PathLike[str]
_HALVES = {int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)}
_DTYPES = ("to", "dtype", "output_dtype", "softmax_precision")
"""Attributes that name a dtype that values have or are computed in."""


@dataclass(frozen=True)
class Comparison:
    """One output beside its reference: the norm of the difference over the norm of the reference."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    error: float
    tolerance: float
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """All outputs, and what they were compared with."""

    reference: str
    outputs: tuple[Comparison, ...]

    def check(self) -> None:
        """Raise VerificationError unless all outputs agree."""
        wrong = [item for item in self.outputs if not item.agrees]
        if wrong:
            worst = max(wrong, key=lambda item: item.error)
            raise VerificationError(
                f"{len(wrong)} of {len(self.outputs)} outputs differ from {self.reference}; the worst is "
                f"{worst.name!r}: {worst.note or f'relative error {worst.error:.3g}, allowed {worst.tolerance:g}'}",
                code="OM6001",
            )


def verify(
    plan: Plan,
    model: Path,
    feeds: Arrays,
    *,
    weights: Fetch | Path | None = None,
    tolerance: float | None = None,
    timeout: float = 60.0,
) -> Verification:
    """Run `plan` on local ranks and `model` whole, and compare.

    Args:
        weights: where the plan's weights are, if not where it came from.
        tolerance: the largest relative error; by default 1e-4, and 2e-2 where the model computes in half precision.

    Raises:
        VerificationError: nothing can run the model whole.
        RunError: the plan's run failed.
    """
    source = os.fspath(weights) if isinstance(weights, os.PathLike) else weights
    with Session(plan, weights=source, timeout=timeout) as session:
        outputs = session.run(None, session.check(feeds))
        names = [port.name for port in session.get_outputs()]
    used, expected = reference(model, {**bound_values(plan.programs[0]), **feeds})
    if missing := sorted(set(names) - set(expected)):
        raise VerificationError(
            f"the model has no output {missing[0]!r}", hint=f"its outputs are {', '.join(expected)}", code="OM6003"
        )
    limit = tolerance if tolerance is not None else default_tolerance(plan)
    rows = (row for name, ours in zip(names, outputs) for row in compare_values(name, ours, expected[name], limit))
    return Verification(used, tuple(rows))


def default_tolerance(plan: Plan) -> float:
    """By the narrowest float that the plan computes with."""
    program = plan.programs[0]
    narrow = any(is_narrow(dtype(buffer.dtype)) for buffer in program.buffers if not buffer.is_loose)
    return HALF if narrow else SINGLE


def compare_values(name: str, ours: Any, expected: Any, tolerance: float) -> Iterator[Comparison]:
    """Compare an output: of a sequence each tensor, of strings whether they are equal."""
    if isinstance(ours, list) and isinstance(expected, list) and len(ours) == len(expected):
        for index, pair in enumerate(zip(ours, expected)):
            yield from compare_values(f"{name}[{index}]", *pair, tolerance)
    elif all(_is_numbers(x) for x in (ours, expected)):
        yield compare(name, ours, expected, tolerance)
    else:
        same = np.array_equal(ours, expected) if isinstance(ours, np.ndarray) else ours is expected is None
        note = "" if same else f"it is {describe(ours)}, the reference's {describe(expected)}"
        kind, shape = getattr(ours, "dtype", "none"), tuple(getattr(ours, "shape", ()))
        yield Comparison(name, str(kind), shape, 0.0 if same else np.inf, tolerance, note)


def compare(name: str, ours: np.ndarray, expected: np.ndarray, tolerance: float) -> Comparison:
    """The relative error of one output. NaNs and infinities must be in the same places."""
    kind, shape = ours.dtype.name, tuple(ours.shape)
    if ours.shape != expected.shape:
        note = f"its shape is {list(ours.shape)}, the reference's {list(expected.shape)}"
        return Comparison(name, kind, shape, np.inf, tolerance, note)
    a, b = _wide(ours), _wide(expected)
    for what, test in (("NaN", np.isnan), ("infinite", np.isinf)):
        if not np.array_equal(test(a), test(b)):
            note = f"{int(test(a).sum())} elements are {what}, {int(test(b).sum())} of the reference"
            return Comparison(name, kind, shape, np.inf, tolerance, note)
    finite = np.isfinite(b)
    signs = np.array_equal(a[np.isinf(a)], b[np.isinf(b)])
    scale, difference = float(np.linalg.norm(b[finite])), float(np.linalg.norm(a[finite] - b[finite]))
    error = difference / scale if scale else difference
    note = "" if signs else "infinities of another sign"
    return Comparison(name, kind, shape, error if signs else np.inf, tolerance, note)


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.complex128 if array.dtype.kind == "c" else np.float64)


# --- the reference ------------------------------------------------------------------------------------------


def reference(model: Path, feeds: Arrays) -> tuple[str, dict[str, np.ndarray]]:
    """What computed the outputs of the whole model, and the outputs by name.

    ONNX Runtime; where it cannot load or run the model, onnx.reference on the graph widened to float32.

    Raises:
        VerificationError: neither can.
    """
    try:
        return _with_runtime(model, feeds)
    except Exception as error:
        first = " ".join(str(error).split())
    try:
        return _with_reference(model, feeds)
    except Exception as error:
        second = " ".join(str(error).split())
    raise VerificationError(
        f"nothing can run the model whole: ONNX Runtime: {first}; onnx.reference: {second}", code="OM6002"
    )


def _with_runtime(model: Path, feeds: Arrays) -> tuple[str, dict[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if _is_quantised(model):  # its optimiser takes other integers there: it would not run what the model says
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(os.fspath(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    known = {item.name for item in session.get_inputs()}
    given = {name: np.ascontiguousarray(x) if _is_numbers(x) else x for name, x in feeds.items() if name in known}
    outputs = session.run(names, given)
    return f"ONNX Runtime {onnxruntime.__version__}", dict(zip(names, map(_as_array, outputs)))


def _is_quantised(model: Path) -> bool:
    proto = onnx.load(os.fspath(model), load_external_data=False)
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node)


def _with_reference(model: Path, feeds: Arrays) -> tuple[str, dict[str, np.ndarray]]:
    from onnx.reference import ReferenceEvaluator

    proto = widen(onnx.load(os.fspath(model)))
    wide = {name: x.astype(np.float32) if _is_numbers(x) and _is_half(x.dtype) else x for name, x in feeds.items()}
    names = [output.name for output in proto.graph.output]
    with np.errstate(all="ignore"):
        outputs = ReferenceEvaluator(proto).run(names, wide)
    return f"onnx.reference {onnx.__version__} in float32", dict(zip(names, map(_as_array, outputs)))


def _is_numbers(value: Any) -> bool:
    """Whether this is a tensor of numbers: no sequence, nothing optional, no strings."""
    return isinstance(value, np.ndarray) and value.dtype != object


def _as_array(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else np.asarray(value)


def _is_half(kind: Any) -> bool:
    return kind in (np.float16, ml_dtypes.bfloat16)


def widen(model: onnx.ModelProto, to: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """The model with float32 wherever it says float16 or bfloat16: weights, inputs, casts, outputs. In place.

    With `to` float64, that is what it has wherever it says float32 or less.
    """
    if model.functions:
        import onnx.inliner

        model = onnx.inliner.inline_local_functions(model)
    _widen_graph(model.graph, to, _HALVES if to == TensorProto.FLOAT else {*_HALVES, TensorProto.FLOAT})
    return model


def _widen_graph(graph: onnx.GraphProto, to: int, narrow: set[int]) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor, to, narrow)
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.elem_type in narrow:
            kind.elem_type = to
    for attribute in _attributes(graph.node):
        if attribute.name in _DTYPES and attribute.i in narrow:
            attribute.i = to
        elif attribute.type == onnx.AttributeProto.TENSOR:
            _widen_tensor(attribute.t, to, narrow)
        elif attribute.type == onnx.AttributeProto.GRAPH:
            _widen_graph(attribute.g, to, narrow)


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.AttributeProto]:
    for node in nodes:
        yield from node.attribute


def _widen_tensor(tensor: onnx.TensorProto, to: int, narrow: set[int]) -> None:
    if tensor.data_type in narrow:
        wide = numpy_helper.to_array(tensor).astype(np.float32 if to == TensorProto.FLOAT else np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
