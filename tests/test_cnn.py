"""Convolutional models in parallel: the light models of ONNX, a U-Net and the decoder of a VAE."""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path
from zlib import crc32

import numpy as np
import onnx
import onnx.backend.test
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxmesh
from onnxmesh.runtime.session import Session

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
IMAGES = Path(__file__).parent / "fixtures" / "images"
NAMES = sorted(path.stem.removeprefix("light_") for path in LIGHT.glob("*.onnx"))
BATCH = 2
TOLERANCE = 1e-4
WIDE, NARROW = 4096, 256
"""How wide the hidden layers of classifiers are, with most of the weights of their models, and what they are here."""
FIRST_BLOCK = 80
"""The nodes of DenseNet's first block; all four take half a minute to place."""

Arrays = dict[str, np.ndarray]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers that keep the size of what they are multiplied with; those of a vector are around 1."""
    random = np.random.default_rng(crc32(name.encode())).standard_normal(shape, np.float32)
    return 1 + random / 10 if len(shape) == 1 else random * np.float32((2 / prod(shape[1:])) ** 0.5)


def light(name: str) -> onnx.ModelProto:
    """A light model for two images, with random weights, and the last convolution's result as one more output.

    The files fill each weight with one number, by which all classes come out alike; they fix the batch to 1.
    """
    model = onnx.load(LIGHT / f"light_{name}.onnx")
    model.ir_version, graph = 8, model.graph
    constants = {t.name: t for t in graph.initializer}
    shapes = {name: tuple(numpy_helper.to_array(t).tolist()) for name, t in constants.items() if t.data_type == 7}
    for value in graph.input:
        if value.name not in constants:
            value.type.tensor_type.shape.dim[0].dim_value = BATCH
    for node in list(graph.node):
        shape = shapes.get(node.input[-1], ())
        if node.op_type == "ConstantOfShape":
            shape = tuple(NARROW if n == WIDE else n for n in shape)
            graph.initializer.append(numpy_helper.from_array(weight(node.output[0], shape), node.output[0]))
            graph.node.remove(node)
        elif node.op_type == "Reshape" and shape[0] == 1:
            constants[node.input[1]].CopyFrom(numpy_helper.from_array(np.array([BATCH, *shape[1:]]), node.input[1]))
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    if name == "densenet121":
        del graph.node[FIRST_BLOCK:], graph.output[:]
    last = [node.output[0] for node in graph.node if node.op_type == "Conv"][-1]
    graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    return model


@cache
def expected(name: str) -> tuple[onnx.ModelProto, Arrays, Arrays]:
    """A model, random inputs, and what ONNX Runtime makes of them."""
    model = light(name) if name in NAMES else onnx.load(IMAGES / f"{name}_op18.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    inputs = {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    return model, inputs, dict(zip(outputs, session.run(outputs, inputs)))


@pytest.mark.parametrize("axis", ["tp", "dp"])
@pytest.mark.parametrize("name", [*NAMES, "unet", "vae"])
def test_two_ranks_share_a_convolutional_model(name: str, axis: str) -> None:
    model, inputs, want = expected(name)
    plan = onnxmesh.compile(model, **{axis: 2})
    with Session(plan) as session:
        got = dict(zip(want, session.run(list(want), inputs)))
    for key, value in want.items():
        error = np.abs(got[key] - value).max() / np.abs(value).max()
        assert error < TOLERANCE, f"{key} differs by {error:.1e}"
    assert plan.report["rank"]["flops_share"] < 0.53
    replicated = {entry["op"] for entry in plan.report["replicated"]}
    assert not replicated & {"Conv", "MatMul", "Gemm"}
