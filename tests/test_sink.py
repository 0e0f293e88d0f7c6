"""Sinking: what is done to a Concat is done to its parts where that fuses, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from net import Net

from onnxmesh.passes.fuse.fuse import fuse
from onnxmesh.passes.fuse.sink import sink

TEXT, IMAGE, HEADS, WIDTH = 3, 5, 2, 8


def part(net: Net, rows: int) -> ir.Value:
    """A norm's result [1, rows, heads, width]."""
    x = net.input(1, rows, HEADS, WIDTH)
    return net.op("RMSNormalization", x, net.input(WIDTH), axis=-1, epsilon=1e-6)


def joined(net: Net, *parts: ir.Value, axis: int = 1) -> ir.Value:
    """The parts one after the other."""
    shape = [int(dim) for dim in parts[0].shape or ()]
    shape[axis] = sum(int(value.shape[axis]) for value in parts if value.shape is not None)
    return net.op("Concat", *parts, axis=axis, shape=shape)


def ops(graph: ir.Graph) -> list[str]:
    return sorted(node.op_type for node in graph)


def test_a_rotary_is_done_to_the_parts_with_their_rows_of_the_tables() -> None:
    net = Net()
    x = joined(net, part(net, TEXT), part(net, IMAGE))
    cos, sin = net.input(TEXT + IMAGE, 1, WIDTH), net.input(TEXT + IMAGE, 1, WIDTH)
    turned = net.op("Neg", net.op("Rotary", net.op("Abs", x), cos, sin, interleaved=1))
    graph = net.after(lambda model: fuse(sink(model)), net.op("Identity", turned))
    assert ops(graph) == ["Concat", "FusedNorm", "FusedNorm", "Identity", *["Slice"] * 4]
    assert {tuple(n.outputs[0].shape or ()) for n in graph if n.op_type == "Slice"} == {(3, 1, 8), (5, 1, 8)}


def test_what_has_one_row_or_none_is_not_sliced() -> None:
    net = Net()
    x = joined(net, part(net, TEXT), part(net, IMAGE))
    scaled = net.op("Clip", net.op("Mul", net.input(1, 1, 1, WIDTH), x), None, net.number(0.5))
    graph = net.after(sink, net.op("Add", scaled, net.input(WIDTH)))
    assert ops(graph) == sorted(["RMSNormalization", "Mul", "Clip", "Add"] * 2 + ["Concat"])
    assert graph.outputs[0].producer().op_type == "Concat"  # type: ignore[union-attr]


def test_two_joins_of_equal_parts_are_added_part_by_part() -> None:
    net = Net()
    x, y = (joined(net, part(net, TEXT), part(net, IMAGE)) for _ in range(2))
    graph = net.after(sink, net.op("Add", x, y))
    assert [n.op_type for n in graph if n.op_type in ("Add", "Concat", "Slice")] == ["Add", "Add", "Concat"]


def test_what_needs_no_other_value_sinks_from_a_join_of_columns_too() -> None:
    net = Net()
    angles = net.input(3, WIDTH)
    x = joined(net, net.op("Cos", angles), net.op("Sin", angles), axis=1)
    graph = net.after(lambda model: fuse(sink(model)), net.op("Softmax", net.op("Neg", x), axis=1))
    assert ops(graph) == ["Concat", "Fused", "Fused", "Softmax"]


def test_slices_are_shared() -> None:
    net = Net()
    table = net.input(TEXT + IMAGE, 1, WIDTH)
    outs = [net.op("Mul", joined(net, part(net, TEXT), part(net, IMAGE)), table) for _ in range(2)]
    assert ops(net.after(sink, *outs)).count("Slice") == 2


@pytest.mark.parametrize("case", ["read twice", "an output", "last dim", "part read twice", "product", "wider", "own"])
def test_what_would_not_fuse_stays(case: str) -> None:
    net = Net()
    first, second = part(net, TEXT), part(net, IMAGE)
    others: list[ir.Value] = []
    if case == "product":
        weight = net.input(WIDTH, WIDTH)
        second = net.op("MatMul", second, weight, shape=(1, IMAGE, HEADS, WIDTH))
        second = net.op("Add", second, net.input(WIDTH))
    if case == "last dim":
        first, second = part(net, TEXT), part(net, TEXT)
    if case == "part read twice":
        others.append(net.op("Exp", second))
    x = joined(net, first, second, axis=3 if case == "last dim" else 1)
    if case == "read twice":
        others.append(net.op("Exp", x))
    if case == "an output":
        others.append(x)
    if case == "last dim":
        result = net.op("Mul", x, net.input(2 * WIDTH))
    elif case == "wider":
        result = net.op("Mul", x, net.input(2, 1, 1, WIDTH))
    elif case == "own":
        result = net.op("Mul", x, net.op("Sigmoid", net.input(TEXT + IMAGE, 1, WIDTH)))
    else:
        result = net.op("Neg", x)
    before = ops(net.graph)
    assert ops(net.after(sink, result, *others)) == before


def test_a_table_is_not_turned() -> None:
    net = Net()
    table = joined(net, net.op("Cos", net.input(TEXT, 1, WIDTH)), net.op("Cos", net.input(IMAGE, 1, WIDTH)), axis=0)
    turned = net.op("Rotary", net.input(1, TEXT + IMAGE, HEADS, WIDTH), table, net.input(WIDTH), interleaved=0)
    assert np.count_nonzero([n.op_type == "Rotary" for n in net.after(sink, turned)]) == 1
