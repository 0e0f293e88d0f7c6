"""Optimisers and FlexAttention against ONNX's reference, whole and shared out."""

from __future__ import annotations

from typing import Any

import numpy as np
import one_node
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxmesh
from onnxmesh.runtime.plan import Launch

RNG = np.random.default_rng(5)
TRAINING, PREVIEW = "ai.onnx.preview.training", "ai.onnx.preview"
OPTIMISERS: dict[str, tuple[int, dict[str, Any]]] = {
    "Adagrad": (1, {"decay_factor": 0.1, "epsilon": 1e-3, "norm_coefficient": 0.05}),
    "Adam": (2, {"alpha": 0.8, "beta": 0.7, "norm_coefficient": 0.05, "norm_coefficient_post": 0.1}),
    "Momentum": (1, {"alpha": 0.8, "beta": 0.7, "norm_coefficient": 0.05, "mode": "standard"}),
}


def f(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("op", OPTIMISERS)
def test_an_optimiser_updates_all_its_tensors(op: str, count: int) -> None:
    kept, attrs = OPTIMISERS[op]
    shapes = (4, 6), (2, 12)
    tensors = [f(*shape) for _ in range(2) for shape in shapes]
    states = [np.abs(f(*shape)) for _ in range(kept) for shape in shapes]
    inputs = [np.float32(0.1).reshape(()), np.array(count), *tensors, *states]
    one_node.check(op, inputs, 2 * (1 + kept), domain=TRAINING, **attrs)


def test_momentum_may_look_ahead() -> None:
    attrs: dict[str, Any] = {"alpha": 0.8, "beta": 0.7, "norm_coefficient": 0.0, "mode": "nesterov"}
    inputs = [np.float32(0.1).reshape(()), np.array(1), f(4, 6), f(4, 6), f(4, 6)]
    one_node.check("Momentum", inputs, 2, domain=TRAINING, **attrs)


def modifier(op: str, by: np.ndarray, kind: int = TensorProto.FLOAT) -> Any:
    """A subgraph that combines its input with a constant."""
    scores, out = (helper.make_tensor_value_info(name, kind, [2, 4, 6, 6]) for name in ("scores", "out"))
    number = helper.make_node("Constant", [], ["by"], value=numpy_helper.from_array(by, "by"))
    return helper.make_graph([number, helper.make_node(op, ["scores", "by"], ["out"])], "modifier", [scores], [out])


QKV = [f(2, 4, 6, 8), f(2, 2, 6, 8), f(2, 2, 6, 4)]
CAUSAL = np.where(np.tril(np.ones((6, 6))), 0, -np.inf).astype(np.float32)


def test_the_modifiers_of_flex_attention_stand_before_and_after_its_softmax() -> None:
    attrs = {"score_mod": modifier("Add", CAUSAL), "prob_mod": modifier("Mul", RNG.random((6, 6)).astype(np.float32))}
    one_node.check("FlexAttention", QKV, opset=26, domain=PREVIEW, **attrs)
    one_node.check("FlexAttention", QKV, opset=26, domain=PREVIEW, **attrs, scale=0.2)


def test_the_scores_of_half_precision_are_float32_and_those_of_double_double() -> None:
    halves = [x.astype(np.float16) for x in QKV]
    one_node.check(
        "FlexAttention", halves, opset=26, domain=PREVIEW, score_mod=modifier("Add", CAUSAL), rtol=5e-3, atol=1e-3
    )
    doubles = [x.astype(np.float64) for x in QKV]
    mod = modifier("Add", CAUSAL.astype(np.float64), TensorProto.DOUBLE)
    one_node.check("FlexAttention", doubles, opset=26, domain=PREVIEW, score_mod=mod)


def test_flex_attention_that_is_attention_becomes_one() -> None:
    proto = one_node.model("FlexAttention", QKV, opset=26, domain=PREVIEW, score_mod=modifier("Add", CAUSAL))
    (program,) = onnxmesh.compile(proto).programs
    assert "Attention" in [i.kernel for i in program.instructions if isinstance(i, Launch)]
