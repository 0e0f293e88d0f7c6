"""The reference fallback: onnx's own implementation of a node without a kernel here, named in the report."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxmesh
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.report_text import report_text
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels import registry
from onnxmesh.runtime.kernels.image_decoder import image_decoder
from onnxmesh.runtime.kernels.reference import check_node, node_attributes
from onnxmesh.runtime.kernels.registry import Call
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.validate import validate

STRINGS, FLOAT, INT64 = TensorProto.STRING, TensorProto.FLOAT, TensorProto.INT64


def model(
    nodes: list[onnx.NodeProto], ins: dict[str, tuple[int, Any]], outs: dict[str, tuple[int, Any]], **domains: int
) -> onnx.ModelProto:
    infos = ([helper.make_tensor_value_info(name, *kind) for name, kind in some.items()] for some in (ins, outs))
    opsets = [helper.make_opsetid(domain.replace("_", "."), version) for domain, version in domains.items()]
    opsets.append(helper.make_opsetid("", 21))
    return helper.make_model(helper.make_graph(nodes, "g", *infos), opset_imports=opsets, ir_version=10)


def run(plan: Plan, feeds: dict[str, Any]) -> list[Any]:
    with onnxmesh.Session(plan) as session:
        return session.run(None, feeds)


def suppression() -> onnx.ModelProto:
    """Detection: boxes are chosen by data, and their scores are used afterwards."""
    nodes = [
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "overlap"], ["chosen"], name="nms"),
        helper.make_node("GatherND", ["scores", "chosen"], ["best"], name="pick"),
    ]
    proto = model(
        nodes,
        {"boxes": (FLOAT, [1, 4, 4]), "scores": (FLOAT, [1, 2, 4])},
        {"best": (FLOAT, ["n"]), "chosen": (INT64, ["n", 3])},
    )
    limits = {"most": np.array([2]), "overlap": np.array([0.5], np.float32)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in limits.items())
    return proto


BOXES = np.array([[[0, 0, 1, 1], [0, 0, 1, 0.9], [2, 2, 3, 3], [5, 5, 6, 6]]], np.float32)
SCORES = np.array([[[0.9, 0.8, 0.7, 0.1], [0.2, 0.3, 0.1, 0.4]]], np.float32)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_node_without_a_kernel_is_run_by_the_reference_on_every_rank(tp: int) -> None:
    assert "NonMaxSuppression" not in registry.names()
    best, chosen = run(
        onnxmesh.compile(suppression(), tp=tp, allow_replicated=True), {"boxes": BOXES, "scores": SCORES}
    )
    assert chosen.tolist() == [[0, 0, 0], [0, 0, 2], [0, 1, 3], [0, 1, 1]]
    np.testing.assert_array_equal(best, SCORES[tuple(chosen.T)])


def test_the_report_names_the_node() -> None:
    plan = onnxmesh.compile(suppression())
    assert plan.report["fallback"] == [{"node": "nms", "op": "NonMaxSuppression", "version": 21, "code": "OM2106"}]
    text = report_text(plan.report)
    assert "Computed by onnx.reference" in text
    assert "NonMaxSuppression" in text
    assert {item.kernel for item in plan.programs[0].instructions if hasattr(item, "kernel")} == {
        "Reference",
        "GatherND",
    }


def test_attributes_of_all_kinds_survive_the_plans_folder(tmp_path: Path) -> None:
    """Floats, lists of strings, and tensors of strings; nothing is pickled."""
    keys = helper.make_tensor("keys", STRINGS, [2], ["a", "b"])
    values = helper.make_tensor("values", STRINGS, [2], ["x", "ÿ"])
    node = helper.make_node(
        "LabelEncoder", ["w"], ["y"], domain="ai.onnx.ml", name="encode", keys_tensor=keys, values_tensor=values,
        default_tensor=helper.make_tensor("default", STRINGS, [1], ["?"]),
    )  # fmt: skip
    proto = model([node], {"w": (STRINGS, [3])}, {"y": (STRINGS, [3])}, ai_onnx_ml=4)
    onnxmesh.compile(proto).save(tmp_path / "m.plan")
    attributes = json.loads((tmp_path / "m.plan" / "plan.json").read_text())["programs"][0]["instructions"][0]["attrs"]
    assert (attributes["op_type"], attributes["domain"], attributes["version"]) == ("LabelEncoder", "ai.onnx.ml", 4)
    (found,) = run(onnxmesh.load(tmp_path / "m.plan"), {"w": np.array(["b", "q", "a"])})
    assert found.tolist() == ["ÿ", "?", "x"]


def test_a_string_becomes_a_number_and_is_computed_with() -> None:
    nodes = [
        helper.make_node("StringSplit", ["text"], ["words", "counts"], delimiter="-"),
        helper.make_node("Cast", ["counts"], ["f"], to=FLOAT),
        helper.make_node("Mul", ["f", "f"], ["squares"]),
    ]
    proto = model(nodes, {"text": (STRINGS, [2])}, {"words": (STRINGS, [2, "n"]), "squares": (FLOAT, [2])})
    plan = onnxmesh.compile(proto)
    words, squares = run(plan, {"text": np.array(["a-b-c", "d"])})
    assert words.tolist() == [["a", "b", "c"], ["d", "", ""]]
    np.testing.assert_array_equal(squares, [9, 1])
    assert plan.programs[0].outputs[1].dtype == "float32", "the counts have a static shape"


def test_inside_of_control_flow_the_report_says_where() -> None:
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("StringConcat", [a, b], ["joined"], name="join")], name, [],
            [helper.make_tensor_value_info("joined", STRINGS, [1])],
        )
        for name, a, b in (("then", "s", "t"), ("else", "t", "s"))
    }  # fmt: skip
    nodes = [helper.make_node("If", ["c"], ["y"], name="which", **branches)]
    proto = model(nodes, {"c": (TensorProto.BOOL, []), "s": (STRINGS, [1]), "t": (STRINGS, [1])}, {"y": (STRINGS, [1])})
    plan = onnxmesh.compile(proto)
    assert {entry["node"] for entry in plan.report["fallback"]} == {
        "which then_branch: join",
        "which else_branch: join",
    }
    for c, expected in ((True, "ab"), (False, "ba")):
        assert run(plan, {"c": np.array(c), "s": np.array(["a"]), "t": np.array(["b"])})[0].tolist() == [expected]


def test_an_op_that_nobody_knows_is_refused_by_name() -> None:
    node = helper.make_node("Sparkle", ["x"], ["y"], domain="com.microsoft", name="s")
    proto = model([node], {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])}, com_microsoft=1)
    with pytest.raises(ModelError, match=r"node 's' .*Sparkle.* cannot be computed: there is no kernel for Sparkle"):
        onnxmesh.compile(proto)


def _split(**attributes: Any) -> onnx.NodeProto:
    return helper.make_node("StringSplit", ["i0"], ["o0", "o1"], **attributes)


def _elsewhere() -> onnx.TensorProto:
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    return tensor


@pytest.mark.parametrize(
    ("node", "changed", "why"),
    [
        (_split(), {"op_type": "StringConcat"}, "says ::StringConcat"),
        (_split(), {"version": "21"}, "not a node, its op"),
        (_split(), {"node": "?"}, "cannot be read"),
        (_split(extra=_elsewhere()), {}, "lies in another file"),
        (_split(extra=helper.make_graph([], "g", [], [])), {}, "of the kind GRAPH"),
        (helper.make_node("F", [], [], domain="mine"), {}, "mine::F is none of the ops"),
        (helper.make_node("ImageDecoder", ["i0"], ["o0"]), {}, "ImageDecoder is none of the ops"),
    ],
)
def test_a_plan_cannot_make_the_reference_do_more_than_compute(
    node: onnx.NodeProto, changed: dict[str, Any], why: str
) -> None:
    attributes = {**node_attributes(node, 21), **changed}
    with pytest.raises(PlanError, match=why):
        check_node(attributes)
    plan = onnxmesh.compile(suppression())
    (program,) = plan.programs
    items = [
        replace(item, attrs=attributes) if getattr(item, "kernel", "") == "Reference" else item
        for item in program.instructions
    ]
    with pytest.raises(PlanError, match=why):
        validate(replace(plan, programs=(replace(program, instructions=tuple(items)),)))


IMAGE = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3) * 7


def _encoded(form: str) -> np.ndarray:
    image, file = pytest.importorskip("PIL.Image").fromarray(IMAGE), io.BytesIO()
    image.save(file, form)
    return np.frombuffer(file.getvalue(), np.uint8)


def _decoder(order: str) -> Plan:
    node = helper.make_node("ImageDecoder", ["file"], ["image"], name="decode", pixel_format=order)
    types = {"file": (TensorProto.UINT8, ["n"])}, {"image": (TensorProto.UINT8, ["h", "w", "c"])}
    return onnxmesh.compile(model([node], *types), shapes={"file": _encoded("PNG").shape})


@pytest.mark.parametrize(("order", "expected"), [("RGB", IMAGE), ("BGR", IMAGE[:, :, ::-1])])
def test_images_are_decoded_by_pillow(order: str, expected: np.ndarray) -> None:
    (image,) = run(_decoder(order), {"file": _encoded("PNG")})
    np.testing.assert_array_equal(image, expected)


def test_images_of_formats_that_onnx_does_not_name_are_not_opened() -> None:
    call = Call(np, {}, (), {})
    with pytest.raises(ValueError, match="no image of the formats"):
        image_decoder(call, _encoded("GIF"))
