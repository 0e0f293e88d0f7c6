"""A transformer quantised by ONNX Runtime's own tools, on two ranks: the same numbers, and half of the weights each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import onnxmesh
from onnxmesh.compiler.verification import reference

MODEL = Path(__file__).parent / "fixtures" / "gpt2_op18.onnx"


class Once(CalibrationDataReader):
    """Calibration with one input."""

    def __init__(self, feeds: dict[str, np.ndarray]) -> None:
        self._left = [feeds]

    def get_next(self) -> Any:
        return self._left.pop() if self._left else None


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(MODEL)
    return {
        i.name: rng.integers(0, 50, [d if isinstance(d, int) else 2 for d in i.shape]) for i in session.get_inputs()
    }


FEEDS = inputs()


def dynamic(path: Path) -> None:
    quantize_dynamic(MODEL, path, per_channel=True, weight_type=QuantType.QInt8)


def static(form: QuantFormat) -> Callable[[Path], None]:
    return lambda path: quantize_static(MODEL, path, Once(FEEDS), quant_format=form, per_channel=True)


def in_blocks(path: Path) -> None:
    """Every product of a constant: the fixture's Gemms are MatMuls first."""
    model = onnx.load(MODEL)
    for node in [node for node in model.graph.node if node.op_type == "Gemm"]:
        at = list(model.graph.node).index(node)
        product = onnx.helper.make_node("MatMul", node.input[:2], [f"{node.name}.product"], name=f"{node.name}.product")
        added = onnx.helper.make_node("Add", [*product.output, node.input[2]], node.output)
        model.graph.node.remove(node)
        model.graph.node.insert(at, added)
        model.graph.node.insert(at, product)
    quantiser = MatMulNBitsQuantizer(model, bits=4, block_size=16, is_symmetric=False)
    quantiser.process()
    onnx.save(quantiser.model.model, path)


def test_sums_of_integers_and_scales_stay_float32_in_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    dynamic(path)
    wanted = onnxruntime.InferenceSession(path).run(None, FEEDS)[0]
    plan = onnxmesh.compile(path, precision="fp16", shapes={name: x.shape for name, x in FEEDS.items()})
    with onnxmesh.Session(plan) as session:
        found = session.run(None, FEEDS)[0]
    assert np.linalg.norm(found - wanted) <= 2e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("quantise", "holds"),
    [
        (dynamic, {"DynamicQuantizeLinear", "MatMulInteger"}),
        (static(QuantFormat.QDQ), {"QuantizeLinear", "DequantizeLinear"}),
        (static(QuantFormat.QOperator), {"QLinearMatMul", "QGemm", "QLinearAdd", "QLinearSoftmax"}),
        (in_blocks, {"MatMulNBits"}),
    ],
    ids=["dynamic", "static QDQ", "static QOperator", "blocks of 4 bits"],
)
def test_ranks_share_a_quantised_model(quantise: Callable[[Path], None], holds: set[str], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    quantise(path)
    assert holds <= {node.op_type for node in onnx.load(path).graph.node}
    wanted = next(iter(reference(path, FEEDS)[1].values()))
    plan = onnxmesh.compile(path, tp=2, shapes={name: x.shape for name, x in FEEDS.items()})
    assert plan.report["rank"]["weight_share"] < 0.6
    with onnxmesh.Session(plan) as session:
        found = session.run(None, FEEDS)[0]
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
