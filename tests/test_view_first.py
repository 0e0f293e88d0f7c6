"""View first: what only views read is done behind them where it fuses, and no number changes by it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from net import Net

from onnxmesh.passes.fuse.view_first import view_first


def ops(graph: ir.Graph) -> list[str]:
    """The op types, in order."""
    return [node.op_type for node in graph]


def column(net: Net, x: ir.Value, at: int) -> ir.Value:
    """A column of a matrix of three rows."""
    return net.op("Slice", x, shape=(3, 1), axes=[1], starts=[at], steps=[1])


def test_columns_are_cast_after_they_are_taken() -> None:
    net = Net(np.float64)
    x = net.op("Cast", net.op("Mul", net.input(3, 2, dtype=np.float32), net.input(3, 2, dtype=np.float32)), to=11)
    freqs = net.input(4)
    graph = net.after(view_first, *(net.op("Mul", column(net, x, i), freqs) for i in range(2)))
    assert sorted(ops(graph)) == ["Cast", "Mul", "Mul", "Mul", "Slice", "Slice"]

    net = Net(np.float64)
    x = net.op("Cast", net.op("Softmax", net.input(3, 2, dtype=np.float32), axis=1), to=11)
    freqs = net.input(4)
    graph = net.after(view_first, *(net.op("Mul", column(net, x, i), freqs) for i in range(2)))
    assert sorted(ops(graph)) == ["Cast", "Cast", "Mul", "Mul", "Slice", "Slice", "Softmax"]
    assert all(n.inputs[0].producer().op_type == "Softmax" for n in graph if n.op_type == "Slice")  # type: ignore[union-attr]


def test_a_chain_moves_as_a_whole() -> None:
    net = Net()
    x = net.op("Sub", net.number(2.0), net.op("Exp", net.input(4)))
    graph = net.after(view_first, net.op("Add", net.op("Reshape", x, shape=(4, 1)), net.input(3)))
    assert ops(graph) == ["Reshape", "Exp", "Sub", "Add"]


@pytest.mark.parametrize("case", ["norm", "product", "output", "own reader", "attention", "twice"])
def test_what_would_not_fuse_there_stays(case: str) -> None:
    net = Net()
    x, more = net.input(3, 4), list[ir.Value]()
    if case == "norm":
        x = net.op("RMSNormalization", x, net.input(4), axis=-1, epsilon=1e-6)
    x = net.op("MatMul", x, net.input(4, 4), shape=(3, 4)) if case == "product" else x
    x = net.op("Relu", x)
    if case in ("output", "own reader"):
        more.append(x if case == "output" else net.op("Neg", x))
    views = [net.op("Reshape", x, shape=(12,)) for _ in range(2 if case == "twice" else 1)]
    last = "Softmax" if case == "attention" else "Abs"
    before = ops(net.graph) + [last] * len(views)
    graph = net.after(view_first, *(net.op(last, view) for view in views), *more)
    assert ops(graph) == before
