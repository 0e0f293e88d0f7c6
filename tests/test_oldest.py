"""Models of the oldest opsets: lifted, and meaning what they meant."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxmesh import backend
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.frontend import load

F = TensorProto.FLOAT


def old(node: onnx.NodeProto, opset: int, x: tuple[int, ...], **weights: np.ndarray) -> onnx.ModelProto:
    """A model of one node as it was written then: initialisers are inputs too."""
    given = [helper.make_tensor_value_info("x", F, x)]
    given += [helper.make_tensor_value_info(name, F, array.shape) for name, array in weights.items()]
    graph = helper.make_graph(
        [node],
        "g",
        given,
        [helper.make_tensor_value_info("y", F, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3)


@pytest.mark.parametrize("opset", range(1, 13))
def test_every_old_opset_is_lifted(opset: int) -> None:
    assert load(old(helper.make_node("Relu", ["x"], ["y"]), opset, (2, 3))).graph.opset_imports[""] == 13


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("slopes", [1, 3])
def test_the_slopes_of_an_old_prelu_are_of_the_channels(shape: tuple[int, ...], slopes: int) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    slope = np.arange(1, slopes + 1, dtype=np.float32)
    (y,) = backend.run_model(old(helper.make_node("PRelu", ["x", "s"], ["y"]), 6, shape, s=slope), [x])
    np.testing.assert_allclose(y, np.where(x < 0, x * slope.reshape(-1, *[1] * (len(shape) - 2)), x))


def test_an_old_sum_broadcasts_along_its_axis() -> None:
    x, b = np.ones((2, 3, 4), np.float32), np.arange(3, dtype=np.float32)
    node = helper.make_node("Add", ["x", "b"], ["y"], broadcast=1, axis=1)
    np.testing.assert_array_equal(backend.run_model(old(node, 6, x.shape, b=b), [x])[0], x + b[:, None])


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_an_old_hardmax_marks_one_of_all_dims_from_its_axis_on(axis: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    attributes = {} if axis is None else {"axis": axis}
    (y,) = backend.run_model(old(helper.make_node("Hardmax", ["x"], ["y"], **attributes), 11, x.shape), [x])
    rows = x.reshape(int(np.prod(x.shape[: 1 if axis is None else axis])), -1)
    np.testing.assert_array_equal(y.reshape(rows.shape), np.eye(rows.shape[1])[rows.argmax(axis=1)])


SCAN = """<ir_version: 3, opset_import: ["": 8]>
    g (float[B, 2] first, float[B, 3, 2] x) => (float[B, 2] y, float[B, 3, 2] z) {
        y, z = Scan <num_scan_inputs: int = 1, directions = [1], body = b (float[2] sum, float[2] row)
            => (float[2] next, float[2] out) { next = Add (sum, row) out = Identity (next) }> (LENGTHS, first, x)
    }"""


@pytest.mark.parametrize("batch", [1, 3])
def test_an_old_scan_runs_over_every_item_of_a_batch(batch: int) -> None:
    first, x = np.ones((batch, 2), np.float32), np.random.default_rng(0).random((batch, 3, 2), np.float32)
    model = onnx.parser.parse_model(SCAN.replace("B", str(batch)).replace("LENGTHS", '""'))
    y, z = backend.run_model(model, [first, x])
    np.testing.assert_allclose(y, first + x.sum(1), rtol=1e-6)
    np.testing.assert_allclose(z, first[:, None] + x[:, ::-1].cumsum(1), rtol=1e-6)


def test_an_old_scan_over_a_batch_of_any_size_is_refused() -> None:
    with pytest.raises(ModelError, match="of opset 8 is over a batch of unknown size"):
        load(onnx.parser.parse_model(SCAN.replace("LENGTHS", '""')))
