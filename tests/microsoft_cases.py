"""Nodes of com.microsoft to test with: how they become models, and small random tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from evaluate import evaluate
from onnx import helper

from onnxmesh.compiler.frontend import load
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.normalise.normalise import normalise

B, S, T, H, G, D = 2, 5, 7, 4, 2, 16
WIDTH, KV_WIDTH = H * D, G * D

Inputs = list[np.ndarray | None]
Formula = Callable[..., np.ndarray | list[np.ndarray]]


class Random:
    """Random tensors, the same for every test file."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def floats(self, *shape: int) -> np.ndarray:
        return self._generator.standard_normal(shape).astype(np.float32)

    def below(self, n: int, *shape: int) -> np.ndarray:
        return self._generator.integers(0, n, shape).astype(np.int32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass(frozen=True)
class Case:
    """One node; the inputs whose indices are in `known` are initialisers.

    `formula` gives the outputs where ONNX Runtime has no CPU kernel for it; `types` the element types of outputs that
    are not float32; `skip` those that ONNX Runtime's kernel leaves as they are.
    """

    name: str
    op: str
    inputs: Inputs
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    known: tuple[int, ...] = ()
    domain: str = "com.microsoft"
    formula: Formula | None = None
    types: Mapping[int, int] = field(default_factory=dict)
    skip: tuple[int, ...] = ()

    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" if a is not None else "" for i, a in enumerate(self.inputs)]
        given = [(i, n, a) for i, (n, a) in enumerate(zip(names, self.inputs)) if a is not None]
        outputs = [f"y{i}" if i not in self.skip else "" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, domain=self.domain, name="n", **self.attributes)
        graph = helper.make_graph(
            [node],
            "g",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for i, n, a in given
                if i not in self.known
            ],
            [
                helper.make_tensor_value_info(o, self.types.get(i, onnx.TensorProto.FLOAT), None)
                for i, o in enumerate(outputs)
                if o
            ],
            [onnx.numpy_helper.from_array(a, n) for i, n, a in given if i in self.known],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{i}": a for i, a in enumerate(self.inputs) if a is not None and i not in self.known}

    def expected(self) -> dict[str, np.ndarray]:
        """What ONNX Runtime computes, or the formula."""
        if self.formula is None:
            return run(self.model(), self.feeds())
        found = self.formula(*self.inputs)
        return {f"y{i}": y for i, y in enumerate(found if isinstance(found, list) else [found])}


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of ONNX Runtime by name, with its own optimisations off."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds))))


def normal_form(case: Case):
    return normalise(bind(load(case.model()), {}, {}))


def evaluated(case: Case) -> dict[str, np.ndarray]:
    """The outputs of the normal form, by the runtime's kernels."""
    return evaluate(normal_form(case), case.feeds())


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=2e-5, err_msg=name)
        assert found[name].dtype == wanted.dtype
