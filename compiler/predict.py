"""What is known before a run: work, bytes and predicted times of a graph and of a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxmesh.compiler import cost
from onnxmesh.compiler.ir.view import dtype_of, shape_of, view_of
from onnxmesh.compiler.layout import renames
from onnxmesh.runtime.exchange import staging_bytes
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Collective, Instruction, Launch, Program
from onnxmesh.runtime.profile import DeviceProfile

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
        microseconds=sum(cost.execution(view_of(node, 1)) for node in executed(fused)),
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
        instructions: what each takes by itself.
        communication: of all collectives, by axis.
        total: from the first instruction to the last; what is sent beside computation costs the contention alone.
    """

    instructions: Sequence[float]
    compute: float
    communication: Mapping[str, float]
    total: float


def timing(graph: ir.Graph, program: Program, mesh: Mesh, device: DeviceProfile | None = None) -> Timing:
    """Follow the program along its streams. `graph` is the one that it was lowered from."""
    device = device or cost.current()
    items = program.instructions
    times = [
        collective_time(item, program, mesh, device) if isinstance(item, Collective) else _known(node, device)
        for item, node in zip(items, executed(graph), strict=True)
    ]
    communication = defaultdict[str, float](float)
    for item, time in zip(items, times):
        if isinstance(item, Collective):
            communication[item.axis] += time
    compute = sum(time for item, time in zip(items, times) if isinstance(item, Launch))
    return Timing(times, compute, dict(communication), _follow(items, times, device.contention))


def _known(node: ir.Node, device: DeviceProfile) -> float:
    return cost.execution(view_of(node, 1), device)


def _follow(items: Sequence[Instruction], times: Sequence[float], contention: float) -> float:
    """When the last instruction ends. A kernel that runs beside a collective is slower for as long."""
    ends: list[float] = []
    free: dict[int, float] = {}
    sending = 0.0
    for item, time in zip(items, times):
        start = max([free.get(item.stream, 0.0), *(ends[i] for i in item.after)])
        end = start + time
        if isinstance(item, Launch):
            end += (contention - 1) * min(time, max(0.0, sending - start))
        elif item.stream:
            sending = max(sending, end)
        free[item.stream] = end
        ends.append(end)
    return max(ends, default=0.0)


def executed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that become instructions, in their order; the others only rename bytes."""
    return [node for node in graph if not renames(node)]


def bytes_sent(item: Collective, program: Program, mesh: Mesh) -> int:
    """Bytes that one rank sends, by the ring or pairwise algorithm; a piece that every rank holds is not sent."""
    ranks, buffers = mesh.axis_size(item.axis), program.buffers
    pairs = [(buffers[before].nbytes, buffers[after].nbytes) for before, after in zip(item.ins, item.outs)]
    return sum(int(cost.sent(item.kind, before, after, ranks)) for before, after in pairs)


def collective_time(item: Collective, program: Program, mesh: Mesh, device: DeviceProfile | None = None) -> float:
    """Predicted microseconds of one collective, and of packing and unpacking what does not lie in one piece."""
    device, ranks = device or cost.current(), mesh.axis_size(item.axis)
    staged = staging_bytes(item, program.buffers, ranks)
    copies = device.memory(2 * staged) if staged else 0.0
    return device.link(item.kind, ranks)(bytes_sent(item, program, mesh)) + copies
