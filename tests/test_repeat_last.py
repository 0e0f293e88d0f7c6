"""Repeat last: elementwise ops of one input run before an Expand, and no number changes by it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from net import Net

from onnxmesh.passes.fuse.repeat_last import repeat_last


def ops(graph: ir.Graph) -> list[str]:
    """The op types, in order."""
    return [node.op_type for node in graph]


def test_a_table_is_cast_before_its_angles_are_repeated() -> None:
    net = Net(np.float64)
    pairs = net.op("Expand", net.op("Reshape", net.op("Cos", net.input(3, 4)), shape=(3, 4, 1)), shape=(3, 4, 2))
    table = net.op("Cast", net.op("Reshape", pairs, shape=(3, 8)), to=1, dtype=np.float32)
    graph = net.after(repeat_last, net.op("Neg", table, dtype=np.float32))
    assert ops(graph) == ["Cos", "Cast", "Reshape", "Expand", "Reshape", "Neg"]


def test_an_op_joins_what_makes_its_value_before_a_reshape() -> None:
    net = Net()
    half = net.op("Mul", net.op("Reshape", net.op("Cos", net.input(3, 4)), shape=(12,)), net.number(0.5))
    rows = net.op("Neg", net.op("Reshape", net.op("Softmax", net.input(3, 4), axis=1), shape=(12,)))
    graph = net.after(repeat_last, net.op("Softmax", half, axis=0), net.op("Softmax", rows, axis=0))
    assert ops(graph) == ["Cos", "Mul", "Reshape", "Softmax", "Reshape", "Neg", "Softmax", "Softmax"]


def test_an_op_that_joins_its_reader_stays() -> None:
    net = Net()
    value = net.op("Neg", net.op("Reshape", net.op("Cos", net.input(3, 4)), shape=(12,)))
    graph = net.after(repeat_last, net.op("Mul", value, net.input(2, 12)))
    assert ops(graph) == ["Cos", "Reshape", "Neg", "Mul"]


def test_what_others_read_is_repeated_where_it_was() -> None:
    net = Net()
    wide = net.op("Expand", net.input(3, 1), shape=(3, 4))
    graph = net.after(repeat_last, net.op("Add", net.op("Abs", wide), wide))
    assert ops(graph) == ["Expand", "Abs", "Add"]


def test_an_output_and_an_expand_that_repeats_nothing_stay() -> None:
    net = Net()
    same = net.op("Expand", net.op("Neg", net.input(3, 4)), shape=(3, 4))
    wide = net.op("Expand", net.input(1, 4), shape=(3, 4))
    graph = net.after(repeat_last, net.op("Add", net.op("Abs", same), net.input(3, 4)), net.op("Exp", wide))
    assert ops(graph) == ["Neg", "Expand", "Expand", "Abs", "Add", "Exp"]
