"""Weights of 2 and 4 bits, which files pack and memory does not: sharded, saved, read back, and read from the model."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxmesh
from onnxmesh.runtime import io
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.onnx_weights import onnx_fetch
from onnxmesh.runtime.plan import Port

KINDS = {
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int2": TensorProto.INT2,
    "uint2": TensorProto.UINT2,
    "float4_e2m1fn": TensorProto.FLOAT4E2M1,
    "float8_e4m3fnuz": TensorProto.FLOAT8E4M3FNUZ,
}
BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}
ROWS, COLUMNS, BLOCK = 24, 12, 4
RNG = np.random.default_rng(0)
X, SCALES = RNG.standard_normal((3, ROWS)).astype(np.float32), RNG.random((ROWS // BLOCK, COLUMNS)).astype(np.float32)


def numbers(kind: str) -> np.ndarray:
    """A weight [24, 12] of all the numbers that the dtype has, NaN apart."""
    codes = RNG.integers(0, 1 << BITS.get(kind, 7), (ROWS, COLUMNS)).astype(np.uint8)
    return codes.view(dtype(kind))


def packed(values: np.ndarray) -> bytes:
    """As files hold it: the first number in the lowest bits."""
    bits, codes = BITS.get(values.dtype.name, 8), values.reshape(-1).view(np.uint8)
    per_byte = 8 // bits
    return bytes(
        sum(int(code) << (bits * i) for i, code in enumerate(codes[at : at + per_byte]))
        for at in range(0, codes.size, per_byte)
    )


def write(path: Path, weight: np.ndarray, *, external: bool) -> Path:
    """x @ DequantizeLinear(w, by blocks of rows)."""
    tensor = helper.make_tensor("w", KINDS[weight.dtype.name], weight.shape, packed(weight), raw=True)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=BLOCK),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, COLUMNS])],
        [tensor, onnx.numpy_helper.from_array(SCALES, "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    onnx.save(model, path, save_as_external_data=external, size_threshold=0)
    return path


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_shards_of_a_packed_weight(kind: str, external: bool, tmp_path: Path) -> None:
    weight = numbers(kind)
    model = write(tmp_path / "model.onnx", weight, external=external)
    want = X @ (weight.astype(np.float32) * SCALES.repeat(BLOCK, 0))
    compiled = onnxmesh.compile(model, tp=2)
    stored = next(item for item in compiled.weights if item.dtype == kind)
    assert any(axis == "tp" for axis, _ in stored.spec)
    compiled.save(tmp_path / "plan")
    for plan, weights in ((compiled, None), (onnxmesh.load(tmp_path / "plan"), None), (compiled, onnx_fetch(model))):
        with onnxmesh.Session(plan, weights=weights) as session:
            (y,) = session.run(None, {"x": X})
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_a_changed_number_of_a_shard_is_found(tmp_path: Path) -> None:
    model = write(tmp_path / "model.onnx", numbers("int4"), external=False)
    onnxmesh.compile(model, tp=2).save(tmp_path / "plan")
    file = max((tmp_path / "plan" / "weights").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(onnxmesh.OnnxMeshError, match="damaged"), onnxmesh.Session(tmp_path / "plan") as session:
        session.run(None, {"x": X})


def test_a_session_says_onnx_types_and_takes_arrays_of_ml_dtypes(tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E4M3FN)],
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.INT4, [2, 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, [2, 3])],
        ),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    x = np.arange(-3, 3).reshape(2, 3).astype(ml_dtypes.int4)
    with onnxmesh.Session(onnxmesh.compile(model)) as session:
        assert session.get_inputs()[0].type == "tensor(int4)"
        assert session.get_outputs()[0].type == "tensor(float8e4m3fn)"
        (y,) = session.run(None, {"x": x})
    assert y.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))


@pytest.mark.parametrize("form", ["x.npz", "folder of npy", "folder of pb"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_such_arrays(kind: str, form: str, tmp_path: Path) -> None:
    array, port = numbers(kind), Port("x", kind, (ROWS, COLUMNS), (), 0)
    io.write_outputs(tmp_path / form, {"x": array}, proto=form.endswith("pb"))
    found = io.read_inputs(tmp_path / form, [port])
    assert found["x"].dtype == array.dtype
    assert found["x"].tobytes() == array.tobytes()


def test_nothing_is_fused_that_gpus_have_no_arrays_of() -> None:
    """Float in, float out, rounded to 8 bits in between: only what stands around the casts is fused."""
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Neg", ["a"], ["b"]),
            helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT8E5M2),
            helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    )
    plan = onnxmesh.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))
    assert [item.kernel for item in plan.programs[0].instructions] == ["Fused", "Cast", "Cast"]
