"""Parts: a slice of a Concat that is one of its parts is that part, and no number changes by it."""

from __future__ import annotations

import onnx_ir as ir
from net import Net

from onnxmesh.passes.fuse.parts import parts


def halves(net: Net, *starts: int, size: int = 4) -> list[ir.Value]:
    """Slices of a Concat of a sine and a cosine, 4 columns each."""
    x = net.input(3, 4)
    both = net.op("Concat", net.op("Sin", x), net.op("Cos", x), axis=1, shape=(3, 8))
    return [net.op("Slice", both, axes=[1], starts=[i], steps=[1], shape=(3, size)) for i in starts]


def ops(graph: ir.Graph) -> list[str]:
    """The op types, in order."""
    return [node.op_type for node in graph]


def test_halves_that_are_exchanged_are_joined_the_other_way_round() -> None:
    net = Net()
    graph = net.after(parts, net.op("Concat", *halves(net, 4, 0), axis=1, shape=(3, 8)))
    assert ops(graph) == ["Sin", "Cos", "Concat"]


def test_a_slice_across_parts_stays() -> None:
    net = Net()
    (middle,) = halves(net, 2)
    assert ops(net.after(parts, net.op("Neg", middle))) == ["Sin", "Cos", "Concat", "Slice", "Neg"]
    net = Net()
    (some,) = halves(net, 0, size=2)
    assert ops(net.after(parts, net.op("Neg", some))) == ["Sin", "Cos", "Concat", "Slice", "Neg"]


def test_an_output_stays_and_so_does_a_concat_that_others_read() -> None:
    net = Net()
    first, second = halves(net, 0, 4)
    graph = net.after(parts, first, net.op("Neg", second))
    assert ops(graph) == ["Sin", "Cos", "Concat", "Slice", "Neg"]
