"""ONNX's sharding annotations: what a model says is pinned, and what is chosen is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command import Command
from onnx import TensorProto, helper, numpy_helper
from shares import Case, fixtures, worst_error

import onnxmesh
from onnxmesh.compiler.annotate import METADATA
from onnxmesh.compiler.api import Compilation, compile_model
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.options import Options
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Placement, R, Segment, Shard

ROUND_TRIPS = [
    *(("llama_op23", case) for case in (Case(tp=2), Case(cp=2), Case(dp=2), Case(tp=2, cp=2))),
    ("llama_gqa2_op18", Case(tp=4)),
    ("bert_op18", Case(tp=2, cp=2)),
    ("gpt2_op23", Case(tp=2)),
    ("vit_op23", Case(tp=2)),
    ("vit_op23", Case(cp=2)),
    ("phi3_op23", Case(tp=2, cp=2)),
]


def compiled(model: Any, mesh: Mesh, **options: Any) -> Compilation:
    return compile_model(model, Options(mesh, allow_replicated=True, **options))


def placements(state: Compilation) -> list[list[object]]:
    return [[(node.name, s.ins, s.outs, s.expand) for node, s in p.strategies.items()] for p in state.placed]


# --- written and read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), ROUND_TRIPS, ids=lambda value: getattr(value, "name", value))
def test_a_model_with_the_chosen_placements_gives_them_again(name: str, case: Case, tmp_path: Path) -> None:
    fixture, target = fixtures.load(name), tmp_path / "annotated.onnx"
    options = {"dims": fixture.bindings(False), "cp_strategy": case.strategy}
    first = compiled(str(fixture.path), case.mesh, **options)
    written = first.annotate(target)
    onnx.checker.check_model(target)
    assert written.specs > 0
    second = compiled(str(target), case.mesh, dims=options["dims"])
    assert [p.pinned.unmet for p in second.placed] == [[]] * len(second.placed)
    assert all(p.pinned.met > 0 for p in second.placed)
    assert placements(second) == placements(first)


def test_an_annotated_model_computes_the_same(tmp_path: Path) -> None:
    fixture, target = fixtures.load("llama_op23"), tmp_path / "annotated.onnx"
    plan = onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings(False), annotate=target)
    again = onnxmesh.compile(target, tp=2, dims=fixture.bindings(False))
    assert again.programs == plan.programs
    assert worst_error(again, "llama_op23") < 1e-4


def test_what_onnx_has_no_words_for_is_reported_and_stands_in_the_metadata(tmp_path: Path) -> None:
    target = tmp_path / "annotated.onnx"
    written = compiled(mlp(), Mesh.of(tp=2)).annotate(target)
    assert ("down", "y", "ONNX has no words for P") in written.open
    said = {node.name: node.metadata_props for node in onnx.load(target).graph.node}
    assert [p.key for p in said["down"]] == [METADATA]
    assert not said["up"]


def test_the_command_writes_the_file_and_says_what_is_in_it(tmp_path: Path, command: Command) -> None:
    model, target = tmp_path / "mlp.onnx", tmp_path / "out" / "annotated.onnx"
    onnx.save(mlp(), model)
    target.parent.mkdir()
    done = command("compile", model, "--tp", 2, "-o", tmp_path / "mlp.plan", "--annotate", target)
    assert done.code == 0
    assert f"{target}: 7 sharding specs; 1 left open, because ONNX has no words for P" in done.out
    assert onnx.load(target).configuration[0].num_devices == 2


def test_weights_in_other_files_come_along(tmp_path: Path) -> None:
    model, other = tmp_path / "mlp.onnx", tmp_path / "other" / "mlp.onnx"
    other.parent.mkdir()
    onnx.save(mlp(), model, save_as_external_data=True, location="mlp.data", size_threshold=0)
    for target in (tmp_path / "beside.onnx", other):
        compiled(str(model), Mesh.of(tp=2)).annotate(target)
        tensors = {t.name: numpy_helper.to_array(t, str(target.parent)) for t in onnx.load(target).graph.initializer}
        np.testing.assert_array_equal(tensors["w1"], np.ones((8, 16), np.float32))


# --- read ---------------------------------------------------------------------------------------------------


def mlp() -> onnx.ModelProto:
    """`down(relu(up(x)))`, which costs alone would not shard by rows."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "up"),
        helper.make_node("Relu", ["h"], ["a"], "act"),
        helper.make_node("MatMul", ["a", "w2"], ["y"], "down"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in (("w1", (8, 16)), ("w2", (16, 8)))]
    graph = helper.make_graph(nodes, "mlp", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=11)


Dims = Sequence[tuple[int, Sequence[tuple[int, int]]]]


def annotated(
    *specs: tuple[str, str, Dims, Sequence[int], dict[int, Sequence[int]]], devices: int = 2
) -> onnx.ModelProto:
    """The model with specs: (node, tensor, [(dim, [(size, shards), ...]), ...], devices, groups of devices)."""
    model = mlp()
    model.configuration.add(name="c", num_devices=devices)
    for name, tensor, dims, device, groups in specs:
        node = next(node for node in model.graph.node if node.name == name)
        if not node.device_configurations:
            node.device_configurations.add(configuration_id="c")
        spec = node.device_configurations[0].sharding_spec.add(tensor_name=tensor, device=device)
        for key, members in groups.items():
            spec.index_to_device_group_map.add(key=key, value=members)
        for dim, parts in dims:
            sharded = spec.sharded_dim.add(axis=dim)
            for size, shards in parts:
                sharded.simple_sharding.add(dim_value=size, num_shards=shards)
    return model


def chosen(state: Compilation, axis: str, node: str, *, output: bool = False) -> tuple[Placement, ...]:
    placed = next(p for p in state.placed if p.axis == axis)
    strategy = next(s for n, s in placed.strategies.items() if n.name == node and n.op_type in ("MatMul", "Relu"))
    return strategy.outs if output else strategy.ins


def unmet(state: Compilation) -> str:
    return " ".join(f.reason for f in state.findings if f.pattern == "pinned")


@pytest.mark.parametrize("dim", [0, -2])
@pytest.mark.parametrize("device", [(0, 1), ()])
def test_what_is_pinned_is_a_constraint(dim: int, device: Sequence[int]) -> None:
    rows = annotated(("up", "x", [(dim, [(4, 2)])], device, {}))
    free, bound = compiled(mlp(), Mesh.of(tp=2)), compiled(rows, Mesh.of(tp=2))
    assert chosen(free, "tp", "up") == (R, Shard.plain(1, 16))
    assert chosen(bound, "tp", "up") == (Shard.plain(0, 4), R)
    assert isinstance(chosen(bound, "tp", "down")[1], Shard)  # which nobody has pinned
    assert not unmet(bound)


def test_a_weight_is_pinned_by_its_own_dims() -> None:
    model = annotated(("up", "w1", [(0, [(8, 2)])], (0, 1), {}))
    state = compiled(model, Mesh.of(tp=2))
    assert chosen(state, "tp", "up") == (Shard.plain(1, 8), Shard.plain(0, 8))


def test_devices_say_which_axis_of_the_mesh_a_dim_is_on() -> None:
    inner, outer = {-1: (0, 2), -2: (1, 3)}, {-1: (0, 1), -2: (2, 3)}
    for groups, sharded, whole in ((inner, "tp", "cp"), (outer, "cp", "tp")):
        model = annotated(("act", "h", [(1, [(16, 2)])], (-1, -2), groups), devices=4)
        state = compiled(model, Mesh.of(tp=2, cp=2))
        assert chosen(state, sharded, "act") == (Shard.plain(1, 16),)
        assert chosen(state, whole, "act") == (R,)


def test_two_axes_may_cut_one_dim_or_two() -> None:
    one = annotated(("act", "h", [(1, [(16, 4)])], range(4), {}), devices=4)
    two = annotated(("act", "h", [(0, [(4, 2)]), (1, [(16, 2)])], range(4), {}), devices=4)
    state = compiled(one, Mesh.of(tp=2, cp=2))
    assert (chosen(state, "cp", "act"), chosen(state, "tp", "act")) == ((Shard.plain(1, 16),), (Shard.plain(1, 8),))
    state = compiled(two, Mesh.of(tp=2, cp=2))
    assert (chosen(state, "cp", "act"), chosen(state, "tp", "act")) == ((Shard.plain(0, 4),), (Shard.plain(1, 16),))


def test_dims_that_were_fused_are_equal_segments_and_groups_of_ranks_copies() -> None:
    fused = annotated(("up", "w1", [(1, [(2, 1), (8, 2)])], (0, 1), {}))
    state = compiled(fused, Mesh.of(tp=2))
    assert chosen(state, "tp", "up") == (R, Shard(1, (Segment(8), Segment(8))))
    copies = annotated(("act", "h", [(1, [(16, 2)])], (-1, -2), {-1: (0, 1), -2: (2, 3)}), devices=4)
    state = compiled(copies, Mesh.of(tp=4))
    assert chosen(state, "tp", "act") == (Shard(1, (Segment(16, 2),)),)


# --- what cannot be met -------------------------------------------------------------------------------------


def test_a_pin_that_no_rule_can_meet_replicates_the_node_and_says_so() -> None:
    both = annotated(("up", "x", [(0, [(4, 2)])], (), {}), ("up", "w1", [(1, [(16, 2)])], (), {}))
    state = compiled(both, Mesh.of(tp=2))
    assert chosen(state, "tp", "up") == (R, R)
    assert "no way to run it has the placements that the model pins: S(0), S(1)" in unmet(state)
    assert any("pins" in entry["reason"] for entry in state.plan.report["replicated"])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (("act", "h", [(1, [(16, 3)])], (0, 1, 2), {}), "on devices [0, 1, 2]"),
        (("act", "h", [(1, [(16, 2)])], (1, 0), {}), "no axis of the mesh"),
        (("up", "x", [(5, [(16, 2)])], (), {}), "no dim 5"),
        (("act", "h", [(1, [(4, 2), (4, 2)])], (), {}), "two of the dims that are fused"),
        (("act", "h", [(0, [(3, 1), (2, 2)])], (), {}), "cannot cut 'h'"),
    ],
)
def test_specs_that_are_no_placement_are_reported_and_left_out(spec: Any, reason: str) -> None:
    state = compiled(annotated(spec), Mesh.of(tp=2))
    assert reason in unmet(state)
    assert placements(state) == placements(compiled(mlp(), Mesh.of(tp=2)))


def test_annotations_for_another_number_of_devices_are_reported_and_left_out() -> None:
    model = annotated(("act", "h", [(1, [(16, 2)])], (), {}), devices=8)
    assert "for 8 devices, the mesh has 2" in unmet(compiled(model, Mesh.of(tp=2)))


def test_pins_that_contradict_each_other_are_an_error() -> None:
    model = annotated(("act", "h", [(1, [(16, 2)])], (), {}), ("act", "h", [(0, [(4, 2)])], (), {}))
    with pytest.raises(ModelError, match=r"'h' of node 'act' is pinned to S\(1\) and to S\(0\) on tp"):
        compiled(model, Mesh.of(tp=2))


def test_metadata_that_cannot_be_read_is_an_error() -> None:
    model = annotated(("act", "h", [(1, [(16, 2)])], (), {}))
    model.graph.node[0].metadata_props.add(key=METADATA, value='{"mesh": 2}')
    with pytest.raises(ModelError, match="node 'up' cannot be read"):
        compiled(model, Mesh.of(tp=2))


def test_configurations_of_others_stay_when_placements_are_written(tmp_path: Path) -> None:
    model = ir.from_proto(annotated(("act", "h", [(1, [(16, 2)])], (), {})))
    target = tmp_path / "annotated.onnx"
    compiled(model, Mesh.of(tp=2)).annotate(target)
    compiled(str(target), Mesh.of(tp=2)).annotate(target)
    assert [c.name for c in onnx.load(target).configuration] == ["c", "onnxmesh"]
    assert [c.configuration_id for c in onnx.load(target).graph.node[1].device_configurations] == ["c", "onnxmesh"]
