"""RNN, GRU and LSTM against ONNX Runtime, with everything that their attributes and inputs can ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

STEPS, BATCH, WIDTH, HIDDEN = 5, 3, 4, 2
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
ACTIVATIONS = {"RNN": 1, "GRU": 2, "LSTM": 3}
OPS = sorted(GATES)
EVERYTHING = ("bias", "lengths", "initial_h", "initial_c", "peepholes")
ORDER = ("x", "w", "r", *EVERYTHING)
PLAIN = "Relu Tanh Sigmoid LeakyRelu HardSigmoid Elu Softsign Softplus".split()
PARAMETERS = {
    "Affine": {"alpha": 0.7, "beta": 0.2},
    "LeakyRelu": {"alpha": 0.2},
    "ThresholdedRelu": {"alpha": 0.1},
    "ScaledTanh": {"alpha": 0.8, "beta": 1.5},
    "HardSigmoid": {"alpha": 0.4, "beta": 0.3},
    "Elu": {"alpha": 0.5},
}


def inputs(op: str, directions: int, given: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Random inputs of an op: x, the weights, and the optional ones that are asked for and that it has."""
    rng, gates = np.random.default_rng(3), GATES[op]
    shapes = {
        "x": (STEPS, BATCH, WIDTH),
        "w": (directions, gates * HIDDEN, WIDTH),
        "r": (directions, gates * HIDDEN, HIDDEN),
        "bias": (directions, 2 * gates * HIDDEN),
        "initial_h": (directions, BATCH, HIDDEN),
        "initial_c": (directions, BATCH, HIDDEN),
        "peepholes": (directions, 3 * HIDDEN),
    }
    has = ORDER if op == "LSTM" else ORDER[:6]
    arrays = {name: (0.4 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    arrays["lengths"] = np.array([STEPS, 0, 3], np.int32)
    return {name: arrays[name] for name in has if name in ("x", "w", "r", *given)}


def attributes(direction: str, **others: Any) -> dict[str, Any]:
    return {"hidden_size": HIDDEN, "direction": direction, **others}


def expected(op: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> list[np.ndarray]:
    """What ONNX Runtime gives."""
    outs = [f"y{i}" for i in range(3 if op == "LSTM" else 2)]
    node = helper.make_node(op, [name if name in arrays else "" for name in ORDER[: _count(arrays)]], outs, **attrs)
    types = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in arrays.items()}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, types[name], x.shape) for name, x in arrays.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(arrays))


def _count(arrays: Mapping[str, np.ndarray]) -> int:
    return 1 + max(ORDER.index(name) for name in arrays)


def computed(
    op: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any], wanted: list[np.ndarray]
) -> list[np.ndarray]:
    call = Call(np, attrs, tuple(TensorType(x.dtype, x.shape) for x in wanted), {})
    return list(find(op)(call, *(arrays.get(name) for name in ORDER[: _count(arrays)])))


def check(op: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> None:
    want = expected(op, arrays, attrs)
    got = computed(op, arrays, attrs, want)
    assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in want]
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", OPS)
def test_every_direction_with_and_without_the_optional_inputs(op: str, direction: str) -> None:
    directions = 2 if direction == "bidirectional" else 1
    for given in ((), ("bias",), ("initial_h", "peepholes"), EVERYTHING):
        check(op, inputs(op, directions, given), attributes(direction))


@pytest.mark.parametrize("op", OPS)
def test_what_goes_into_an_activation_is_clipped(op: str) -> None:
    check(op, inputs(op, 2, EVERYTHING), attributes("bidirectional", clip=0.3))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("op", OPS)
def test_every_activation_with_its_defaults(op: str, name: str) -> None:
    check(op, inputs(op, 1, ("bias",)), attributes("forward", activations=[name] * ACTIVATIONS[op]))


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("op", OPS)
def test_every_activation_with_its_parameters(op: str, name: str) -> None:
    count = ACTIVATIONS[op]
    given = {f"activation_{key}": [value] * count for key, value in PARAMETERS[name].items()}
    check(op, inputs(op, 1, ("bias",)), attributes("forward", activations=[name] * count, **given))


@pytest.mark.parametrize("op", OPS)
def test_activations_take_their_parameters_in_turn(op: str) -> None:
    names = ["LeakyRelu", "Tanh", "HardSigmoid", "Affine", "ScaledTanh", "Sigmoid"][: 2 * ACTIVATIONS[op]]
    attrs = attributes(
        "bidirectional", activations=names, activation_alpha=[0.3, 0.4, 0.5, 0.6], activation_beta=[0.7, 0.1, 0.2]
    )
    check(op, inputs(op, 2, EVERYTHING), attrs)


def test_the_reset_gate_of_a_gru_may_apply_to_the_product() -> None:
    arrays = inputs("GRU", 1, EVERYTHING)
    check("GRU", arrays, attributes("forward", linear_before_reset=1))
    after, before = (
        computed(
            "GRU",
            arrays,
            attributes("forward", linear_before_reset=flag),
            expected("GRU", arrays, attributes("forward")),
        )
        for flag in (1, 0)
    )
    assert not np.allclose(after[0], before[0])


def test_the_gates_of_an_lstm_may_be_coupled() -> None:
    check("LSTM", inputs("LSTM", 1, EVERYTHING), attributes("reverse", input_forget=1))


@pytest.mark.parametrize("op", OPS)
def test_with_layout_1_the_batch_comes_first(op: str) -> None:
    arrays, attrs = inputs(op, 2, EVERYTHING), attributes("bidirectional")
    want = expected(op, arrays, attrs)
    turned = {name: x.swapaxes(0, 1) if name in ("x", "initial_h", "initial_c") else x for name, x in arrays.items()}
    outs = [want[0].transpose(2, 0, 1, 3), *(state.swapaxes(0, 1) for state in want[1:])]
    for a, b in zip(computed(op, turned, {**attrs, "layout": 1}, outs), outs):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)


@pytest.mark.parametrize("op", OPS)
def test_half_precision_is_rounded_once(op: str) -> None:
    arrays = inputs(op, 1, ("bias", "initial_h"))
    halves = {name: x.astype(np.float16) for name, x in arrays.items()}
    wide = {name: x.astype(np.float32) for name, x in halves.items()}
    want = [x.astype(np.float16) for x in expected(op, wide, attributes("forward"))]
    for a, b in zip(computed(op, halves, attributes("forward"), want), want):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), 1e-3, 1e-4)
