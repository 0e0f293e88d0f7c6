"""The plan's folder: the same plan comes back, equal plans give equal bytes, and no changed byte passes."""

from __future__ import annotations

import errno
import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors import safe_open

from onnxmesh.runtime import planjson
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.onnx_weights import onnx_fetch
from onnxmesh.runtime.placement import Segment, Shard
from onnxmesh.runtime.plan import VERSION, Buffer, Collective, Launch, Plan, Port, Program, Weight
from onnxmesh.runtime.recipe import cut_spec, evaluate
from onnxmesh.runtime.serialize import load, load_weights, read_weights, save
from onnxmesh.runtime.shards import Entry, ShardFile, ShardWriter

MESH = Mesh.of(tp=2, cp=2)
MODEL = {
    "w": np.arange(32, dtype=np.float32).reshape(8, 4),
    "half": np.arange(8).astype(ml_dtypes.bfloat16),
    "eight": np.arange(6).astype(ml_dtypes.float8_e4m3fn).reshape(2, 3),
    "flag": np.array(True),
}
COLUMNS = (("tp", Shard(1, (Segment(2), Segment(6)))),)
BOTH = (("cp", Shard.plain(0, 8)), ("tp", Shard.plain(1, 4)))


def source(name: str) -> dict[str, Any]:
    return {"op": "source", "name": name}


def plan() -> Plan:
    weights = (
        Weight("w.T", "float32", (4, 8), COLUMNS, {"op": "transpose", "perm": [1, 0], "of": source("w")}),
        Weight("w", "float32", (8, 4), BOTH, source("w")),
        Weight("half", "bfloat16", (8,), (), source("half")),
        Weight("eight", "float8_e4m3fn", (2, 3), (), source("eight")),
        Weight("flag", "bool", (), (), source("flag")),
    )
    buffers = (
        Buffer("float32", (2, 4), "input", source=0),
        Buffer("float32", (4, 4), "weight", source=0),
        Buffer("float32", (2, 4), "arena", 0),
        Buffer("float32", (2, 8), "arena", 64),
        Buffer("float32", (16,), "view", source=3),
        Buffer("float32", (4, 2), "view", 16, 3, (1, 8)),
    )
    instructions = (
        Launch("MatMul", (0, 1), (2,), {"x": 0.1}, "fc"),
        Collective("AllGather", "tp", (2,), (3,), {"dim": 1, "segments": [[2, 1], [6, 1]]}, "fc", "io", 0, (0,)),
        Launch("Transpose", (2,), (5,), {}, "fc", 0, (0, 1)),
    )
    program = Program(
        {"s": 4},
        (Port("x", "float32", (2, 4), (), 0),),
        (Port("y", "float32", (2, 8), (), 3),),
        buffers,
        instructions,
        128,
    )
    return Plan(MESH, weights, (program,), "onnxmesh test")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(plan(), tmp_path / "m.plan", MODEL.__getitem__, {"nodes": [1, 2.5, None, "ü"]})
    return tmp_path / "m.plan"


def read_all(folder: Path) -> None:
    found = load(folder)
    for rank in range(MESH.size):
        load_weights(folder, found, MESH.coordinate(rank))


def test_what_was_saved_is_loaded(folder: Path) -> None:
    found = load(folder)
    assert replace(found, weights=plan().weights) == plan()
    for rank in range(MESH.size):
        coordinate = MESH.coordinate(rank)
        for weight, shard in zip(plan().weights, load_weights(folder, found, coordinate)):
            want = cut_spec(evaluate(weight.recipe, MODEL.__getitem__), weight.spec, MESH, coordinate)
            assert (shard.dtype, shard.shape) == (want.dtype, want.shape)
            np.testing.assert_array_equal(shard, want)


def test_the_files_are_those_of_the_keys(folder: Path) -> None:
    assert sorted(content(folder)) == [
        "plan.json",
        "report.json",
        *(f"weights/{key}.safetensors" for key in ("all", "cp0-tp0", "cp0-tp1", "cp1-tp0", "cp1-tp1", "tp0", "tp1")),
    ]
    shards = {weight.name: sorted(weight.shards) for weight in load(folder).weights}
    assert shards["w.T"] == ["tp0", "tp1"]
    assert shards["half"] == ["all"]


def test_equal_plans_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    save(plan(), tmp_path / "other.plan", MODEL.__getitem__, {"nodes": [1, 2.5, None, "ü"]})
    assert content(folder) == content(tmp_path / "other.plan")


def test_the_safetensors_package_reads_the_files(folder: Path) -> None:
    with safe_open(folder / "weights/all.safetensors", "numpy") as file:
        assert set(file.keys()) == {"half", "eight", "flag"}
        assert file.get_slice("eight").get_dtype() == "F8_E4M3"
    with safe_open(folder / "weights/tp1.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("w.T"), MODEL["w"].T[:, [1, 5, 6, 7]])


def test_every_changed_byte_is_found(folder: Path) -> None:
    for name, data in content(folder).items():
        step = 1 if name.startswith("weights") else 7
        for position in range(0, len(data), step):
            changed = bytearray(data)
            changed[position] ^= 1
            (folder / name).write_bytes(changed)
            if name.startswith("weights") and position % 5:
                continue
            with pytest.raises(PlanError):
                read_all(folder)
        for wrong in (data[:-1], data + b" ", b""):
            (folder / name).write_bytes(wrong)
            with pytest.raises(PlanError):
                read_all(folder)
        (folder / name).write_bytes(data)
    read_all(folder)


def test_a_damaged_shard_is_named(folder: Path) -> None:
    path = folder / "weights/tp1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)
    found = load(folder)
    load_weights(folder, found, MESH.coordinate(0))
    with pytest.raises(PlanError, match=r"shard tp1 of weight 'w.T' in .*tp1\.safetensors"):
        load_weights(folder, found, MESH.coordinate(1))


def test_a_rank_reads_its_own_files_only(folder: Path) -> None:
    for path in (folder / "weights").iterdir():
        if path.stem not in ("all", "tp1", "cp0-tp1"):
            path.unlink()
    load_weights(folder, load(folder), {"dp": 0, "cp": 0, "tp": 1})


def test_a_newer_plan_says_so(folder: Path) -> None:
    body = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**body, "version": VERSION + 1, "news": []}))
    message = f"plan version {VERSION + 1} is newer than this onnxmesh understands ({VERSION})"
    with pytest.raises(PlanError, match=re.escape(message)):
        load(folder)


def rewrite(folder: Path, change: Any) -> None:
    """Change the plan and give it the right digest, as an attacker would."""
    body = json.loads((folder / "plan.json").read_text())
    del body["digest"]
    change(body)
    text = planjson._layout({**body, "digest": planjson._digest(body)})
    (folder / "plan.json").write_text(text)


def test_a_plan_of_the_first_version_has_no_strides(folder: Path) -> None:
    def change(body: Any) -> None:
        body["version"] = 1
        program = body["programs"][0]
        program["instructions"].pop()
        program["buffers"] = [{k: v for k, v in b.items() if k != "strides"} for b in program["buffers"][:5]]

    rewrite(folder, change)
    found = load(folder)
    assert found.version == VERSION
    assert found.programs[0].buffers == plan().programs[0].buffers[:5]


def put(*path: Any) -> Any:
    def change(body: Any) -> None:
        for key in path[:-2]:
            body = body[key]
        body[path[-2]] = path[-1]

    return change


P = ("programs", 0)


@pytest.mark.parametrize("change", [
    put("mesh", {"tp": 0}), put("mesh", 3), put("weights", {}), put("producer", 1), put("more", 1), put("version", "1"),
    put("programs", []), put("programs", [1]), put(*P, "arena_bytes", 100), put(*P, "arena_bytes", -1),
    put(*P, "arena_bytes", 1.5), put(*P, "arena_bytes", True), put(*P, "dims", []),
    put(*P, "buffers", 2, "offset", 1), put(*P, "buffers", 2, "offset", -4), put(*P, "buffers", 2, "dtype", "object"),
    put(*P, "buffers", 2, "kind", "file"), put(*P, "buffers", 2, "shape", [2, "4"]), put(*P, "buffers", 2, "shape", 3),
    put(*P, "buffers", 4, "source", 4), put(*P, "buffers", 4, "source", 99), put(*P, "buffers", 4, "shape", [17]),
    put(*P, "buffers", 4, "offset", 4), put(*P, "buffers", 5, "offset", 2), put(*P, "buffers", 5, "offset", 48),
    put(*P, "buffers", 5, "strides", [1]), put(*P, "buffers", 5, "strides", [1, -8]),
    put(*P, "buffers", 5, "strides", [1, 16]), put(*P, "buffers", 3, "strides", [8, 1]),
    put(*P, "buffers", 5, "strides", [0, 1]), put(*P, "buffers", 5, "strides", [1, 2]),
    put(*P, "buffers", 4, "dtype", "int32"), put(*P, "buffers", 1, "source", 5), put(*P, "buffers", 1, "source", 1),
    put(*P, "buffers", 0, "source", -1), put(*P, "inputs", 0, "buffer", 77), put(*P, "inputs", 0, "shape", [2, 5]),
    put(*P, "outputs", 0, "buffer", 2), put(*P, "outputs", 0, "name", None),
    put(*P, "instructions", 0, "kernel", "Exec"), put(*P, "instructions", 0, "ins", [0, 99]),
    put(*P, "instructions", 0, "ins", [0, -2]), put(*P, "instructions", 0, "outs", [-1]),
    put(*P, "instructions", 0, "outs", [1]), put(*P, "instructions", 0, "outs", [0]),
    put(*P, "instructions", 0, "is", "code"), put(*P, "instructions", 0, "after", [0]),
    put(*P, "instructions", 0, "attrs", []), put(*P, "instructions", 1, "axis", "pp"),
    put(*P, "instructions", 1, "kind", "Send"), put(*P, "instructions", 1, "ins", [-1]),
    put(*P, "instructions", 1, "attrs", {}), put(*P, "instructions", 1, "attrs", "segments", [[3, 1]]),
    put(*P, "instructions", 1, "attrs", "segments", [[2, 0]]), put(*P, "instructions", 1, "attrs", "dim", 2),
    put(*P, "instructions", 1, "attrs", "reduce", "median"), put(*P, "instructions", 1, "outs", [2, 3]),
    put("weights", 0, "recipe", {"op": "exec"}), put("weights", 0, "name", "w"),
    put("weights", 0, "shards", {"tp0": ""}),
    put("weights", 0, "shape", [4, 9]), put("weights", 0, "spec", [["tp", {"dim": 5, "segments": [[8, 1]]}]]),
    put("weights", 0, "spec", [["tp", {"dim": 1, "segments": [[8, 0]]}]]), put("weights", 0, "spec", [["tp", "X"]]),
    put("weights", 0, "spec", [["tp", "R"], ["tp", "R"]]), put("weights", 0, "spec", [["pp", "R"]]),
    put("weights", 0, "dtype", "float128"), put("report", "0" * 64), put("report", None),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(folder: Path, change: Any) -> None:
    rewrite(folder, lambda body: None)
    load(folder)
    rewrite(folder, change)
    with pytest.raises(PlanError) as caught:
        load(folder)
    assert "digest" not in str(caught.value) or "report" in str(caught.value)


def test_views_of_views_in_a_circle_are_refused(folder: Path) -> None:
    def change(body: Any) -> None:
        view = body["programs"][0]["buffers"][4]
        body["programs"][0]["buffers"] += [{**view, "source": 7}, {**view, "source": 6}]

    rewrite(folder, change)
    with pytest.raises(PlanError, match="view of itself"):
        load(folder)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"version": true}'])
def test_what_is_no_plan_is_refused(folder: Path, data: bytes) -> None:
    (folder / "plan.json").write_bytes(data)
    with pytest.raises(PlanError):
        load(folder)


def test_no_folder_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        load(tmp_path / "none.plan")


def test_a_plan_without_weights_takes_them_from_the_model(tmp_path: Path) -> None:
    save(plan(), tmp_path / "m.plan")
    found = load(tmp_path / "m.plan")
    assert found == plan()
    with pytest.raises(PlanError, match="missing"):
        load_weights(tmp_path / "m.plan", found, MESH.coordinate(0))
    ranks = read_weights(MODEL.__getitem__, found, [MESH.coordinate(rank) for rank in range(4)])
    assert ranks[0][2] is ranks[3][2]
    np.testing.assert_array_equal(ranks[3][1], MODEL["w"][4:, 2:])


def test_another_model_s_weights_are_refused(folder: Path) -> None:
    other = {**MODEL, "half": MODEL["half"] + ml_dtypes.bfloat16(1)}
    with pytest.raises(PlanError, match="'half' differs from the one that was compiled"):
        read_weights(other.__getitem__, load(folder), [MESH.coordinate(0)])
    with pytest.raises(PlanError, match="the plan says bfloat16"):
        read_weights({**MODEL, "half": np.zeros(8)}.__getitem__, load(folder), [MESH.coordinate(0)])


def failing(error: BaseException) -> Any:
    def fetch(name: str) -> np.ndarray:
        if name == "eight":
            raise error
        return MODEL[name]

    return fetch


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), OSError(errno.ENOSPC, "No space left")])
def test_a_failed_save_leaves_nothing_and_keeps_the_old_plan(folder: Path, error: BaseException) -> None:
    before = content(folder)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError, PlanError)) as caught:
        save(plan(), folder, failing(error))
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["m.plan"]
    if isinstance(error, OSError):
        assert isinstance(caught.value, PlanError)
        assert "free some space" in caught.value.hint


def test_saving_again_replaces_the_plan(folder: Path) -> None:
    save(plan(), folder)
    assert sorted(content(folder)) == ["plan.json", "report.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["m.plan"]


def test_what_is_not_a_plan_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    for target in (tmp_path, tmp_path / "precious"):
        with pytest.raises(PlanError, match="exists and is not a plan"):
            save(plan(), target)
    assert (tmp_path / "precious").read_text() == "data"


def test_saving_holds_about_one_tensor(tmp_path: Path) -> None:
    side, mesh = 512, Mesh.of(tp=4)
    recipe = {"op": "transpose", "perm": [1, 0], "of": source("w")}
    spec = (("tp", Shard.plain(1, side)),)
    weights = tuple(Weight(f"w{i}", "float32", (side, side), spec, recipe) for i in range(8))
    big = Plan(mesh, weights, (Program({}, (), (), (), (), 0),))
    tracemalloc.start()
    try:
        save(big, tmp_path / "m.plan", lambda name: np.ones((side, side), np.float32))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * side * side * 4


def test_attributes_of_numpy_become_plain() -> None:
    program = plan().programs[0]
    launch = replace(program.instructions[0], attrs={"a": np.int64(3), "b": (1, np.float32(0.5)), "c": np.arange(2)})
    odd = replace(plan(), programs=(replace(program, instructions=(launch,)),))
    found, _ = planjson.parse(planjson.text(odd, ""))
    assert found.programs[0].instructions[0].attrs == {"a": 3, "b": [1, 0.5], "c": [0, 1]}


# --- safetensors files


def test_tensors_are_written_in_the_declared_order(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "f", [Entry("a", "int8", (2,)), Entry("b", "int8", ())])
    with pytest.raises(ValueError, match="expected"):
        writer.append("b", np.array(1, np.int8))
    writer.append("a", np.zeros(2, np.int8))
    with pytest.raises(ValueError, match="'b' was never written"):
        writer.close()


def file_with(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def field(start: int, stop: int, shape: list[Any], dtype: str = "I32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("data", [
    b"", b"\0" * 7, b"\xff" * 16, file_with(b"{"), file_with([]), file_with({"a": 1}), file_with({}),
    file_with({"a": field(0, 8, [3])}), file_with({"a": field(0, 4, [1])}), file_with({"a": field(4, 8, [1])}),
    file_with({"a": field(0, 8, [2]), "b": field(0, 8, [2])}), file_with({"a": field(0, 8, [2.0])}),
    file_with({"a": field(0, 8, [-2])}), file_with({"a": field(0, 8, [True, 2])}), file_with({"a": field(8, 0, [2])}),
    file_with({"a": field(0, 8, [2], "OBJECT")}), file_with({"a": {**field(0, 8, [2]), "x": 1}}),
    file_with(b'{"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
])  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(PlanError, match="not a safetensors file"):
        ShardFile(tmp_path / "f")


def test_metadata_and_any_order_are_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"a": "b"}, "y": field(4, 8, [1]), "x": field(0, 4, [])}
    (tmp_path / "f").write_bytes(file_with(header, np.array([1, 2], np.int32).tobytes()))
    with ShardFile(tmp_path / "f") as file:
        assert file.read("x") == 1
        assert file.read("y").tolist() == [2]


# --- the model's own weights


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = [numpy_helper.from_array(value, name) for name, value in MODEL.items()]
    graph = helper.make_graph([], "g", [], [], tensors)
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir()
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, size_threshold=16, location="m.data")
    return path


def test_initialisers_are_read_from_the_model_and_its_data(model: Path) -> None:
    fetch = onnx_fetch(model)
    for name, value in MODEL.items():
        got = fetch(name)
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(got, value)
    with pytest.raises(PlanError, match="no initialiser 'nothing'"):
        fetch("nothing")


@pytest.mark.parametrize(("key", "value"), [
    ("location", "../m.data"), ("location", "/etc/passwd"), ("location", ""), ("location", "none.data"),
    ("length", "5"), ("offset", "9999999"),
])  # fmt: skip
def test_data_outside_of_the_folder_or_the_file_is_refused(model: Path, key: str, value: str) -> None:
    proto = onnx.load(model, load_external_data=False)
    (tensor,) = (t for t in proto.graph.initializer if t.name == "w")
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
    model.write_bytes(proto.SerializeToString())
    (model.parent.parent / "m.data").write_bytes(b"\0" * 200)
    with pytest.raises(PlanError, match="initialiser 'w'"):
        onnx_fetch(model)("w")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(PlanError, match="not a readable ONNX model"):
        onnx_fetch(tmp_path / "m.onnx")
