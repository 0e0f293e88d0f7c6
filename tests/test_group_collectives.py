"""Grouped collectives: what is sent together, what is not, and that every array gets where it did before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import inputs
import numpy as np
import onnx_ir as ir
import pytest
from lockstep import run
from net import Net

import onnxmesh
from onnxmesh.compiler.ir.verify import verify
from onnxmesh.compiler.layout import layout
from onnxmesh.passes.schedule.group_collectives import group_collectives
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Collective, Plan
from onnxmesh.runtime.session import Session
from onnxmesh.runtime.validate import validate

RANKS = 2
MESH = Mesh.of(cp=RANKS)
BIG = 2048


def sent(net: Net, x: ir.Value, split: int = 1) -> ir.Value:
    """x [rows, columns] by columns (split 1) or rows (0) instead of the other."""
    shape = [int(size) for size in x.shape or ()]
    attrs: dict[str, Any] = {"split_dim": split, "concat_dim": 1 - split}
    attrs |= {"split_segments": [shape[split], 1], "concat_segments": [shape[1 - split] * RANKS, 1]}
    shape[split], shape[1 - split] = shape[split] // RANKS, shape[1 - split] * RANKS
    value = net.op("AllToAll", x, axis="cp", ranks=RANKS, shape=shape, **attrs)
    node = value.producer()
    assert node is not None
    node.meta["reason"] = f"{x.name}: S(0) -> S(1)"
    return value


def grouped(net: Net, *outputs: ir.Value) -> list[ir.Node]:
    """The collectives after grouping; every rank's numbers must be the same."""
    net.graph.outputs.extend(outputs)
    feeds = {value: pieces * RANKS for value, pieces in net.feeds.items()}
    before = [run(net.graph, feeds, MESH)[value] for value in outputs]
    group_collectives(layout(ir.Model(net.graph, ir_version=10)))
    verify(net.graph, "group")
    after = run(net.graph, feeds, MESH)
    for value, old in zip(net.graph.outputs, before, strict=True):
        np.testing.assert_array_equal(after[value], old)
    return [node for node in net.graph if node.op_type in ("AllToAll", "Shift", "AllReduce")]


def test_what_one_reader_waits_for_is_sent_together() -> None:
    net = Net()
    q, k, v = (sent(net, net.op("Exp", net.input(4, 8))) for _ in range(3))
    (node,) = grouped(net, net.op("Sum", q, k, v))
    assert len(node.inputs) == len(node.outputs) == 3 and "each" not in node.attributes
    assert node.meta["reasons"] == ["exp0: S(0) -> S(1)", "exp2: S(0) -> S(1)", "exp4: S(0) -> S(1)"]


def test_every_array_keeps_its_attributes() -> None:
    net = Net()
    first, second = sent(net, net.input(4, 8)), sent(net, net.input(2, 8), split=0)
    views = net.op("Reshape", first, shape=(4, 8)), net.op("Reshape", second, shape=(4, 4))
    (node,) = grouped(net, net.op("Exp", views[0]), net.op("Neg", views[1]))
    assert [one["split_dim"] for one in json.loads(node.attributes["each"].as_string())] == [1, 0]


def test_views_of_what_is_sent_later_follow_it() -> None:
    net = Net()
    first = net.op("Reshape", sent(net, net.input(4, 8)), shape=(4, 8))
    second = net.op("Reshape", sent(net, net.input(4, 8)), shape=(4, 8))
    (node,) = grouped(net, net.op("Add", first, second))
    assert [n.op_type for n in net.graph] == ["AllToAll", "Reshape", "Reshape", "Add"] and node.meta["stream"] == 0


def test_views_of_views_follow_what_is_sent_at_the_very_end() -> None:
    net = Net()
    flat = net.op("Reshape", sent(net, net.input(4, 8)), shape=(32,))
    view = net.op("Reshape", flat, shape=(2, 16))
    grouped(net, view, sent(net, net.input(4, 8)))
    assert [n.op_type for n in net.graph] == ["AllToAll", "Reshape", "Reshape"]


def test_what_depends_on_another_is_sent_later() -> None:
    net = Net()
    first = sent(net, net.input(4, 8))
    second = sent(net, net.op("Reshape", first, shape=(4, 8)))
    assert len(grouped(net, net.op("Exp", first), second)) == 2


def test_what_is_read_before_the_other_is_ready_goes_first() -> None:
    net = Net()
    first = net.op("Exp", sent(net, net.input(4, 8)))
    second = sent(net, net.op("Reshape", first, shape=(4, 8)))
    assert len(grouped(net, net.op("Neg", first), second)) == 2


def test_what_travels_beside_a_computation_does_not_wait_for_its_result() -> None:
    net = Net()
    x = net.input(BIG, BIG)
    first, product = sent(net, x), net.op("MatMul", x, x)
    net.graph.outputs.append(net.op("Add", first, sent(net, product)))
    group_collectives(layout(ir.Model(net.graph, ir_version=10)))
    assert [node.op_type for node in net.graph] == ["AllToAll", "MatMul", "AllToAll", "Add"]


def test_kinds_axes_and_reductions_stay_apart() -> None:
    net = Net()
    x = net.input(4, 8)
    sums = [net.op("AllReduce", x, axis="cp", ranks=RANKS, reduce=how) for how in ("sum", "max")]
    shifted = net.op("Shift", x, axis="cp", ranks=RANKS, offset=1)
    assert len(grouped(net, net.op("Sum", *sums, shifted))) == 3


@pytest.fixture(scope="module")
def plan() -> Plan:
    """FLUX on two ranks by Ulysses."""
    return onnxmesh.compile(inputs.load("flux_op23").path, cp=2, cp_strategy="ulysses")


def test_the_report_names_all_that_is_sent(plan: Plan) -> None:
    groups = [c for c in plan.report["collectives"] if "," in c["tensor"]]
    items = [plan.programs[0].instructions[c["instruction"]] for c in groups]
    assert groups and all(len(item.ins) == c["tensor"].count(",") + 1 for item, c in zip(items, groups))


def test_a_plan_with_groups_is_saved_and_runs(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    feeds = inputs.load("flux_op23").make_inputs()
    with Session(plan) as session, Session(tmp_path / "plan") as loaded:
        for one, other in zip(session.run(None, feeds), loaded.run(None, feeds)):
            np.testing.assert_array_equal(one, other)


def test_attributes_for_another_number_of_arrays_are_refused(plan: Plan) -> None:
    program = plan.programs[0]
    for index, item in enumerate(program.instructions):
        if isinstance(item, Collective) and "each" in item.attrs:
            short = replace(item, attrs={"each": item.attrs["each"][1:]})
            items = (*program.instructions[:index], short, *program.instructions[index + 1 :])
            with pytest.raises(PlanError, match="as many attributes as arrays"):
                validate(replace(plan, programs=(replace(program, instructions=items),)))
            return
    pytest.fail("no group has attributes of its own")
