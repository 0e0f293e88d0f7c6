"""What is known before a run: work, bytes and predicted times of a graph and of a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxmesh.compiler import cost
from onnxmesh.compiler.cost import H200, DeviceProfile
from onnxmesh.compiler.ir.rule import replicate
from onnxmesh.compiler.ir.view import dtype_of, shape_of, view_of
from onnxmesh.compiler.ops.collectives import VIEWS
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Buffer, Collective, Program

_CARRIES = ("Reshape", "Identity", "Cast", "Expand", "Transpose", "Slice", "Concat", "Split")
"""Ops whose output holds the numbers of their inputs."""


@dataclass(frozen=True)
class Survey:
    """The whole graph on one device, before any axis is applied.

    Attributes:
        lookups: graph input -> rows of the smallest table that it looks up.
    """

    nodes: int
    flops: float
    microseconds: float
    weight_bytes: int
    lookups: Mapping[str, int] = field(default_factory=dict)


def survey(graph: ir.Graph, fused: ir.Graph) -> Survey:
    """What a graph in normal form takes on one device; `fused` is the same as one device would run it."""
    views = [view_of(node, 1) for node in graph]
    return Survey(
        nodes=len(views),
        flops=sum(map(cost.flops, views)),
        microseconds=sum(cost.computation(view, replicate(view)) for view in (view_of(node, 1) for node in fused)),
        weight_bytes=sum(cost.nbytes(shape_of(v), dtype_of(v)) for v in graph.initializers.values()),
        lookups=_lookups(graph),
    )


def _lookups(graph: ir.Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None:
            continue
        rows = shape_of(table)[node.attributes.get_int("axis", 0)]
        for value in _sources(node.inputs[1]):
            name = str(value.name)
            found[name] = min(rows, found.get(name, rows))
    return found


def _sources(value: ir.Value | None) -> Iterator[ir.Value]:
    """The graph inputs whose numbers `value` holds."""
    seen, queue = set(), [value]
    while queue:
        current = queue.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        producer = current.producer()
        if producer is not None and producer.op_type in _CARRIES:
            queue += producer.inputs
        elif current.is_graph_input():
            yield current


@dataclass(frozen=True)
class Timing:
    """Predicted microseconds of one run on one rank.

    Attributes:
        total: from the first instruction to the last; what is sent beside computation costs nothing more.
    """

    compute: float
    communication: Mapping[str, float]
    total: float


def timing(graph: ir.Graph, program: Program, mesh: Mesh, device: DeviceProfile = H200) -> Timing:
    """Follow the program along its streams. `graph` is the one that it was lowered from."""
    compute, communication = 0.0, defaultdict[str, float](float)
    ends: list[float] = []
    free: dict[int, float] = {}
    for item, node in zip(program.instructions, executed(graph), strict=True):
        if isinstance(item, Collective):
            took = collective_time(item, program, mesh, device)
            communication[item.axis] += took
        else:
            view = view_of(node, 1)
            took = cost.computation(view, replicate(view), device)
            compute += took
        start = max([free.get(item.stream, 0.0), *(ends[i] for i in item.after)])
        free[item.stream] = start + took
        ends.append(start + took)
    return Timing(compute, dict(communication), max(ends, default=0.0))


def executed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that become instructions, in their order; the others only rename bytes."""
    return [node for node in graph if node.op_type not in VIEWS]


def bytes_sent(item: Collective, program: Program, mesh: Mesh) -> int:
    """Bytes that one rank sends, by the ring or pairwise algorithm; a piece that every rank holds is not sent."""
    ranks = mesh.axis_size(item.axis)
    before = _nbytes(program.buffers[item.ins[0]])
    after = _nbytes(program.buffers[item.outs[0]])
    if item.kind == "AllReduce":
        return 2 * before * (ranks - 1) // ranks
    if item.kind == "AllGather":
        return after - before
    if item.kind == "Shift":
        return before
    return before * (ranks - 1) // ranks


def collective_time(item: Collective, program: Program, mesh: Mesh, device: DeviceProfile = H200) -> float:
    """Predicted microseconds of one collective."""
    least = {
        "AllReduce": device.all_reduce,
        "ReduceScatter": device.reduce_scatter,
        "AllGather": device.all_gather,
        "AllToAll": device.all_to_all,
        "Shift": device.shift,
    }[item.kind]
    return least + bytes_sent(item, program, mesh) / device.link


def _nbytes(buffer: Buffer) -> int:
    return cost.nbytes(buffer.shape, buffer.dtype)
