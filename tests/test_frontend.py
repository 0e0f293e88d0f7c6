"""load: every way to give a model, and one clear sentence for every way that a model can be broken."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from inputs import load as fixture
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.frontend import load

F = TensorProto.FLOAT


def model(
    nodes: list[onnx.NodeProto] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 18,
    functions: list[onnx.FunctionProto] = [],  # noqa: B006  # never changed
    domains: list[str] = [],  # noqa: B006
    ir_version: int = 10,
    outputs: list[str] = ["y"],  # noqa: B006
) -> onnx.ModelProto:
    """A model of input x[2, 3] and output y."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")] if nodes is None else nodes,
        "g",
        [helper.make_tensor_value_info("x", F, [2, 3])],
        [helper.make_tensor_value_info(name, F, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=ir_version)


def ops(loaded: ir.Model) -> list[str]:
    return [node.op_type for node in loaded.graph]


@pytest.fixture
def external(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model of one MatMul whose weight of 48 bytes lies at `location`, and 48 bytes of data in w.bin."""

    def write(
        location: str = "w.bin", offset: int = 0, length: int | None = 48, dims: tuple[int, ...] = (3, 4)
    ) -> Path:
        proto = model([helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")])
        tensor = TensorProto(name="w", data_type=F, dims=dims, data_location=TensorProto.EXTERNAL)
        entries = {"location": location, "offset": offset, **({} if length is None else {"length": length})}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        proto.graph.initializer.append(tensor)
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "w.bin").write_bytes(np.arange(12, dtype=np.float32).tobytes())
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        return folder / "m.onnx"

    return write


# --- what can be given --------------------------------------------------------------------------------------


def test_path_bytes_proto_and_ir_give_the_same_graph(tmp_path: Path) -> None:
    proto = model()
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    given = [path, str(path), path.read_bytes(), proto, ir.serde.deserialize_model(proto)]
    assert [ops(load(g)) for g in given] == [["Relu"]] * 5


def test_the_given_model_stays_as_it_is() -> None:
    given = ir.serde.deserialize_model(model())
    loaded = load(given)
    loaded.graph.inputs[0].name = "other"
    next(iter(loaded.graph)).op_type = "Exp"
    assert ops(given) == ["Relu"]
    assert given.graph.inputs[0].name == "x"


def test_functions_of_the_model_are_inlined() -> None:
    twice = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    nodes = [helper.make_node("Twice", ["x"], ["h"], domain="local"), helper.make_node("Relu", ["h"], ["y"])]
    assert ops(load(model(nodes, functions=[twice], domains=["local"]))) == ["Add", "Relu"]


def test_initialisers_that_are_inputs_too_are_constants() -> None:
    proto = model([helper.make_node("Add", ["x", "w"], ["y"])], {"w": np.ones(3, np.float32)})
    proto.graph.input.append(helper.make_tensor_value_info("w", F, [3]))
    assert [v.name for v in load(proto).graph.inputs] == ["x"]


def test_outputs_need_no_shape() -> None:
    proto = model()
    assert not proto.graph.output[0].type.tensor_type.HasField("shape")
    load(proto)


@pytest.mark.parametrize("opset", [7, 9, 11, 12])
def test_old_opsets_are_lifted_and_compute_the_same(opset: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((3, 400)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"], axis=1)]
    proto = model(nodes, {"w": w}, opset=opset, ir_version=4)
    lifted = load(proto)
    assert lifted.graph.opset_imports[""] == 13
    assert [v.name for v in lifted.graph.inputs] == ["x"]
    (expected,) = ReferenceEvaluator(proto).run(None, {"x": x})
    (found,) = ReferenceEvaluator(ir.serde.serialize_model(lifted)).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_long_name_of_onnx_domain() -> None:
    proto = model([helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")])
    proto.opset_import[0].domain = "ai.onnx"
    loaded = load(proto)
    assert loaded.graph.opset_imports[""] == 18
    assert next(iter(loaded.graph)).domain == ""


@pytest.mark.parametrize("opset", [13, 21, 28])
def test_newer_opsets_stay(opset: int) -> None:
    assert load(model(opset=opset)).graph.opset_imports[""] == opset


# --- what is refused ----------------------------------------------------------------------------------------


def refused(given: object) -> str:
    """The one-line message of the refusal."""
    with pytest.raises(ModelError) as caught:
        load(given)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_no_such_file(tmp_path: Path) -> None:
    assert "there is no file" in refused(tmp_path / "none.onnx")


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    text = refused(tmp_path)
    assert "is a folder" in text
    assert "m.onnx" in text


@pytest.mark.parametrize("data", [b"", b"hello world", b"PK\x03\x04" + bytes(40), bytes(64)], ids=repr)
def test_not_onnx(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    text = refused(path)
    assert "is empty" in text or "is not an ONNX model, or was cut short" in text
    assert "hint" in text


@pytest.mark.parametrize("name", ["gpt2_op18", "bert_ts17"])
def test_wherever_a_file_is_cut_it_is_refused(name: str) -> None:
    data = fixture(name).path.read_bytes()
    cuts = [*range(1, 60), *np.linspace(60, len(data) - 60, 40).astype(int), *range(len(data) - 60, len(data))]
    whole = ops(load(data))
    for cut in cuts:
        with contextlib.suppress(ModelError):
            assert ops(load(data[:cut])) == whole  # what was cut off held nothing of the model


def test_an_invalid_node_is_named() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="the_relu", nonsense=1)]
    text = refused(model(nodes))
    assert "nonsense" in text
    assert "the_relu" in text


def test_an_undefined_input_is_named() -> None:
    assert "missing" in refused(model([helper.make_node("Add", ["x", "missing"], ["y"], name="add")]))


def test_an_unknown_op_of_onnx_is_named() -> None:
    assert "Reluu" in refused(model([helper.make_node("Reluu", ["x"], ["y"], name="n")]))


def test_an_unknown_domain_is_named_with_op_and_node() -> None:
    nodes = [helper.make_node("Magic", ["x"], ["y"], domain="acme.ai", name="trick")]
    text = refused(model(nodes, domains=["acme.ai"]))
    assert all(word in text for word in ("acme.ai", "Magic", "trick"))


@pytest.mark.parametrize("opset", [0, 29])
def test_opsets_out_of_range(opset: int) -> None:
    assert f"opset {opset}" in refused(model(opset=opset))


def test_a_newer_ir_version() -> None:
    assert "IR version 99" in refused(model(ir_version=99))


def test_a_weight_with_too_few_bytes() -> None:
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((3, 400), np.float32)})
    proto.graph.initializer[0].raw_data = bytes(100)
    assert "'w' of shape [3, 400] needs 4800 bytes, but has 100" in refused(proto)


def test_damaged_bytes_never_leak_an_error_of_protobuf_or_python() -> None:
    rng = np.random.default_rng(0)
    data = fixture("mlp_op18").path.read_bytes()
    start = len(data) - len(data) // 20  # behind the weights stand the graph's inputs and outputs
    for _ in range(300):
        damaged = bytearray(data)
        for place in (*rng.integers(0, 400, 2), *rng.integers(start, len(data), 2)):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(ModelError):
            load(bytes(damaged))


# --- external data ------------------------------------------------------------------------------------------


def test_external_data_is_mapped_not_read(external: Callable[..., Path]) -> None:
    weight = load(external()).graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.raw is None
    np.testing.assert_array_equal(weight.numpy(), np.arange(12).reshape(3, 4))


def test_external_data_beside_a_path_without_a_folder(
    external: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(external().parent)
    weight = load("m.onnx").graph.initializers["w"].const_value
    assert weight is not None
    assert weight.numpy().sum() == 66


def test_missing_external_data(external: Callable[..., Path]) -> None:
    text = refused(external("gone.bin"))
    assert "'w'" in text
    assert "does not exist" in text


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin"])
def test_external_data_outside_the_folder(external: Callable[..., Path], location: str) -> None:
    assert "outside the model's folder" in refused(external(location))


def test_a_link_out_of_the_folder(external: Callable[..., Path], tmp_path: Path) -> None:
    path = external("link.bin")
    (tmp_path / "elsewhere.bin").write_bytes(bytes(48))
    os.symlink(tmp_path / "elsewhere.bin", path.parent / "link.bin")
    assert "outside the model's folder" in refused(path)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"offset": 16}, "the file has 48"),
        ({"length": 100}, "the file has 48"),
        ({"length": 40}, "needs 48"),
        ({"dims": (3, 40), "length": None}, "the file has 48"),
    ],
)
def test_external_data_of_the_wrong_size(external: Callable[..., Path], where: dict, says: str) -> None:
    assert says in refused(external(**where))


def test_external_data_needs_a_folder(external: Callable[..., Path]) -> None:
    assert "has no folder" in refused(external().read_bytes())
