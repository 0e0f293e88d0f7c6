"""The report of a compile: where everything lives, what is sent and why, and what it should cost.

The result is JSON data; docs/report.md describes every field, compiler/report_text.py prints it for people.
Equal compiles give equal reports: no times of the compile itself are in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxmesh.compiler import cost, predict
from onnxmesh.compiler.cost import nbytes
from onnxmesh.compiler.ir.loose import HINT, onnx_op
from onnxmesh.compiler.ops.collectives import COLLECTIVES
from onnxmesh.compiler.options import Options
from onnxmesh.compiler.predict import Survey, Timing
from onnxmesh.compiler.reason import Reason, code_of
from onnxmesh.compiler.report_origins import origins, placement_by_axis
from onnxmesh.compiler.trace import trace
from onnxmesh.passes.graph.match import Finding
from onnxmesh.passes.graph.provenance import origin
from onnxmesh.passes.place.place import Placed
from onnxmesh.passes.place.roles import ATTENTION, CONTRACTIONS, weight_ports
from onnxmesh.passes.precision.precision import Stays
from onnxmesh.passes.schedule.group_collectives import REASONS
from onnxmesh.runtime import footprint
from onnxmesh.runtime.bound_values import bound_values
from onnxmesh.runtime.kernels.reference import REFERENCE
from onnxmesh.runtime.loose import is_loose
from onnxmesh.runtime.memory import WORKSPACE_BYTES
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Placement, Shard, local_shape, text
from onnxmesh.runtime.plan import Collective, Control, Launch, Plan, Port, Program, Spec

FORMAT = 2
_STRATEGIES = {
    ("cp", "s"): "allgather",
    ("cp", "h"): "ulysses",
    ("cp", "t"): "ring",
    ("tp", "h"): "heads",
    ("dp", "b"): "batch",
}
_EXPANSIONS = {"ring": "ring", "split_kv": "split keys"}

Json = dict[str, Any]


def build_report(
    plan: Plan,
    graph: ir.Graph,
    survey: Survey,
    placed: Sequence[Placed],
    findings: Iterable[Finding],
    options: Options,
    stays: Sequence[Stays] | None = (),
    modules: Mapping[str, str] | None = None,
) -> Json:
    """The report as JSON data.

    Args:
        plan, graph: what a rank runs, and the graph that it was lowered from.
        survey: the whole graph, before any axis was applied.
        placed: the choices, one for each axis of more than one rank.
        findings: patterns found and missed.
        modules: of the model's nodes, by their names, as far as the model says them.
        stays: what stays float32 in half precision; None: the model was in half precision already.
    """
    timing = predict.timing(graph, plan.programs[0], plan.mesh)
    collectives = _collectives(plan, graph)
    ranks = plan.mesh.size
    return {
        "format": FORMAT,
        "producer": plan.producer,
        "mesh": plan.mesh.to_json(),
        "ranks": ranks,
        "options": _options(options, plan),
        "model": _model(survey),
        "axes": [_axis(p, plan, collectives, timing) for p in placed],
        "rank": _rank(plan, placed, survey),
        "time": _time(timing, survey),
        "precision": _precision(options, stays),
        "warnings": _warnings(graph, timing, survey, ranks, options, stays),
        "inputs": [_input(port, plan, survey) for port in plan.programs[0].inputs],
        "outputs": [_tensor(port, plan) for port in plan.programs[0].outputs],
        "weights": [_tensor(weight, plan) for weight in plan.weights],
        "collectives": collectives,
        "attention": [entry for p in placed for entry in _attention(p)],
        **origins(plan, graph, placed, modules or {}),
        "replicated": [entry for p in placed for entry in _replicated(p)],
        "fallback": list(_fallback(plan.programs[0])),
        "uneven": _uneven(plan, placed),
        "trace": trace(graph, plan.mesh),
        "patterns": [
            {"pattern": f.pattern, "node": f.node, "found": f.found, "reason": f.reason, "code": code_of(f.reason)}
            for f in findings
        ],
    }  # fmt: skip


def share(part: float, whole: float) -> float:
    """part / whole, rounded so that it reads well; 0 of nothing."""
    return round(part / whole, 6) if whole else 0.0


def _values(plan: Plan) -> Json:
    """The inputs that were bound by value."""
    return {
        name: {"dtype": x.dtype.name, "shape": list(x.shape), "value": x.reshape(-1).tolist()}
        for name, x in bound_values(plan.programs[0]).items()
    }


def _options(options: Options, plan: Plan) -> Json:
    return {
        "cp_strategy": options.cp_strategy,
        "shard_outputs": options.shard_outputs,
        "allow_replicated": options.allow_replicated,
        "dims": dict(options.dims),
        "shapes": {name: list(shape) for name, shape in options.shapes.items()},
        "values": _values(plan),
    }


def _model(survey: Survey) -> Json:
    return {
        "nodes": survey.nodes,
        "flops": survey.flops,
        "weight_bytes": survey.weight_bytes,
        "microseconds": round(survey.microseconds, 3),
    }


# --- axes and ranks -----------------------------------------------------------------------------------------


def _axis(placed: Placed, plan: Plan, collectives: Sequence[Json], timing: Timing) -> Json:
    whole, ours, divided = _flops(placed)
    linear, linear_ours, linear_cut = _linear_bytes(placed)
    weights = {w.name: nbytes(w.shape, w.dtype) for w in plan.weights}
    cut = [w.name for w in plan.weights if isinstance(dict(w.spec).get(placed.axis), Shard)]
    sent = [c for c in collectives if c["axis"] == placed.axis]
    return {
        "axis": placed.axis,
        "ranks": placed.ranks,
        "decisions": placed.classes,
        "flops_sharded": share(divided, whole),
        "flops_per_rank": share(ours, whole),
        "weight_bytes_sharded": share(sum(weights[name] for name in cut), sum(weights.values())),
        "linear_weight_bytes_sharded": share(linear_cut, linear),
        "linear_weight_bytes_per_rank": share(linear_ours, linear),
        "collectives": len(sent),
        "bytes_sent": sum(c["bytes"] for c in sent),
        "communication_us": round(timing.communication.get(placed.axis, 0.0), 3),
    }


def _flops(placed: Placed) -> tuple[float, float, float]:
    """FLOPs of the graph that the axis found, of one rank of it, and of the nodes that its ranks divide."""
    whole = ours = divided = 0.0
    for node, view in placed.views.items():
        full, mine = cost.flops(view), cost.strategy_flops(view, placed.strategies[node])
        whole += full
        ours += mine
        divided += full if mine < full else 0.0
    return whole, ours, divided


def _linear_bytes(placed: Placed) -> tuple[int, int, int]:
    """Bytes of the weights of contractions: all, those of one rank, and those that the axis divides."""
    whole = ours = divided = 0
    for shape, dtype, placement in _linear_weights(placed):
        full = nbytes(shape, dtype)
        mine = nbytes(local_shape(shape, placement, placed.ranks), dtype)
        whole += full
        ours += mine
        divided += full if mine < full else 0
    return whole, ours, divided


def _linear_weights(placed: Placed) -> Iterator[tuple[tuple[int, ...], str, Placement]]:
    seen: set[tuple[ir.Value | None, Placement]] = set()
    for node, view in placed.views.items():
        if view.op not in CONTRACTIONS:
            continue
        for i in weight_ports(view):
            placement, shape = placed.strategies[node].ins[i], view.ins[i]
            if shape is not None and (node.inputs[i], placement) not in seen:
                seen.add((node.inputs[i], placement))
                yield shape, view.in_dtypes[i], placement


def _rank(plan: Plan, placed: Sequence[Placed], survey: Survey) -> Json:
    program = plan.programs[0]
    flops = _flops(placed[-1])[1] if placed else survey.flops
    weights = sum(nbytes(_local(w.shape, w.spec, plan.mesh), w.dtype) for w in plan.weights)
    inputs = sum(_bytes(_local(p.shape, p.spec, plan.mesh), p.dtype) for p in program.inputs)
    return {
        "flops": flops,
        "flops_share": share(flops, survey.flops),
        "weight_bytes": weights,
        "weight_share": share(weights, survey.weight_bytes),
        "activation_bytes": footprint.arena_bytes(program),
        "input_bytes": inputs,
        "workspace_bytes": WORKSPACE_BYTES,
        "staging_bytes": footprint.staging_bytes(program, plan.mesh),
        "device_bytes": footprint.device_bytes(plan),
        "instructions": len(program.instructions),
    }


def _time(timing: Timing, survey: Survey) -> Json:
    communication = sum(timing.communication.values())
    return {
        "device": cost.current().name,
        "compute_us": round(timing.compute, 3),
        "communication_us": round(communication, 3),
        "hidden_us": round(max(0.0, timing.compute + communication - timing.total), 3),
        "total_us": round(timing.total, 3),
        "one_device_us": round(survey.microseconds, 3),
        "instructions_us": [round(time, 3) for time in timing.instructions],
    }


def _warnings(
    graph: ir.Graph, timing: Timing, survey: Survey, ranks: int, options: Options, stays: Sequence[Stays] | None
) -> list[Json]:
    found: list[Reason] = []
    if ranks > 1 and timing.total >= survey.microseconds:
        words = (
            f"{ranks} ranks are predicted slower than one device: {timing.total:.0f} us against "
            f"{survey.microseconds:.0f} us (the model is small for them, or the ranks wait for each other)"
        )
        found.append(Reason(words, "OM2501"))
    hints = Counter(str(node.meta[HINT]) for node in graph if HINT in node.meta)
    for hint, count in hints.items():
        nodes = "a node is" if count == 1 else f"{count} nodes are"
        words = f"{nodes} computed by every rank, since what decides a shape is data: {hint}"
        found.append(Reason(words, "OM2503"))
    if stays is None:
        words = f"the model computes in half precision already; {options.precision} was asked for in vain"
        found.append(Reason(words, "OM2502"))
    return [{"code": reason.code, "reason": str(reason)} for reason in found]


def _precision(options: Options, stays: Sequence[Stays] | None) -> Json:
    kept = [{"node": item.node, "op": item.op, "reason": item.reason, "code": "OM2401"} for item in stays or ()]
    return {"asked": options.precision, "kept": kept}


# --- tensors ------------------------------------------------------------------------------------------------


def _local(shape: Sequence[int], spec: Spec, mesh: Mesh) -> tuple[int, ...]:
    for axis, placement in spec:
        shape = local_shape(shape, placement, mesh.axis_size(axis))
    return tuple(shape)


def _tensor(tensor: Any, plan: Plan) -> Json:
    """A weight, an input or an output: its global view, its placement, and a rank's piece."""
    local = _local(tensor.shape, tensor.spec, plan.mesh)
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "local_shape": list(local),
        "bytes": _bytes(tensor.shape, tensor.dtype),
        "local_bytes": _bytes(local, tensor.dtype),
        "placement": placement_by_axis(tensor.spec, plan.mesh),
    }


def _bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor; none are planned for a loose value."""
    return 0 if is_loose(dtype) else nbytes(tuple(shape), dtype)


def _input(port: Port, plan: Plan, survey: Survey) -> Json:
    rows = survey.lookups.get(port.name)
    return {**_tensor(port, plan), "below": rows}


# --- what is sent, and what is not divided ------------------------------------------------------------------


def _collectives(plan: Plan, graph: ir.Graph) -> list[Json]:
    program = plan.programs[0]
    result = []
    for index, (item, node) in enumerate(zip(program.instructions, predict.executed(graph), strict=True)):
        if not isinstance(item, Collective):
            continue
        buffer = program.buffers[item.ins[0]]
        wanted = list(_wanted(node))
        result.append(
            {
                "instruction": index,
                "kind": item.kind,
                "axis": item.axis,
                "bytes": predict.bytes_sent(item, program, plan.mesh),
                "microseconds": round(predict.collective_time(item, program, plan.mesh), 3),
                "dtype": buffer.dtype,
                "shape": list(buffer.shape),
                "tensor": ", ".join(tensor for tensor, _ in wanted),
                "node": item.node,
                "reason": "; ".join(dict.fromkeys(reason for _, reason in wanted)),
            }
        )
    return result


def _wanted(node: ir.Node) -> Iterator[tuple[str, str]]:
    """What a collective sends, and why."""
    reason = str(node.meta.get("reason", ""))
    for value, why in zip(node.inputs, node.meta.get(REASONS, [reason]), strict=True):
        assert value is not None
        tensor, _, change = why.rpartition(": ")
        yield (tensor, change) if "->" in change else (str(value.meta.get("global_name", value.name)), why)


def _attention(placed: Placed) -> Iterator[Json]:
    """How every attention runs on an axis; blocks of a ring that an earlier axis made count as one."""
    seen: set[str] = set()
    for node, view in placed.views.items():
        name = origin(node)
        if view.op not in ATTENTION or name in seen:
            continue
        seen.add(name)
        strategy = placed.strategies[node]
        known = _EXPANSIONS.get(strategy.expand) or _STRATEGIES.get((placed.axis, strategy.factor))
        yield {
            "axis": placed.axis,
            "node": name,
            "self_attention": node in placed.self_attention if placed.axis == "cp" else None,
            "strategy": known or strategy.factor,
            "q": list(view.ins[0] or ()),
            "k": list(view.ins[1] or ()),
            "placement": [text(p, placed.ranks) for p in strategy.ins[:3]],
        }


def _replicated(placed: Placed) -> Iterator[Json]:
    """The nodes that every rank of the axis computes whole, if they cost anything."""
    computed = ((node, view) for node, view in placed.views.items() if view.op not in (*COLLECTIVES, "Shard"))
    times = {node: cost.computation(view, placed.strategies[node]) for node, view in computed}
    total = sum(times.values())
    for node, reason in placed.replicated.items():
        if times.get(node):
            yield {
                "axis": placed.axis,
                "node": origin(node),
                "op": onnx_op(node),
                "reason": reason,
                "code": code_of(reason),
                "microseconds": round(times[node], 3),
                "share": share(times[node], total),
                "flops": cost.flops(placed.views[node]),
            }


def _fallback(program: Program, within: str = "") -> Iterator[Json]:
    """The nodes that onnx.reference computes on the host, those of control flow included."""
    for item in program.instructions:
        if isinstance(item, Control):
            for name, inner in item.programs.items():
                yield from _fallback(inner, f"{within}{item.node} {name}: ")
        elif isinstance(item, Launch) and item.kernel == REFERENCE:
            attrs = item.attrs
            op = f"{attrs['domain']}::{attrs['op_type']}" if attrs["domain"] else attrs["op_type"]
            yield {"node": f"{within}{item.node}", "op": op, "version": attrs["version"], "code": "OM2106"}


# --- pieces that do not divide ------------------------------------------------------------------------------


def _uneven(plan: Plan, placed: Sequence[Placed]) -> list[Json]:
    """Cuts in which some ranks hold the same part: of attentions, weights, inputs and outputs."""
    program = plan.programs[0]
    result: list[Json] = []
    for p in placed:
        for node, view in p.views.items():
            if view.op in ATTENTION:
                for what, cut in zip(("q", "k and v"), p.strategies[node].ins):
                    result += _copies(p.axis, p.ranks, origin(node), what, cut)
    for what, tensors in (("weight", plan.weights), ("input", program.inputs), ("output", program.outputs)):
        for tensor in tensors:
            for axis, cut in tensor.spec:
                result += _copies(axis, plan.mesh.axis_size(axis), tensor.name, what, cut)
    return list({str(entry): entry for entry in result}.values())


def _copies(axis: str, ranks: int, name: str, what: str, cut: Placement) -> Iterator[Json]:
    if isinstance(cut, Shard) and cut.has_copies:
        yield {
            "axis": axis,
            "name": name,
            "what": what,
            "dim": cut.dim,
            "placement": cut.text(ranks),
            "reason": _why_uneven(cut, ranks, _unit(what, cut.dim)),
            "code": "OM2201",
        }


def _unit(what: str, dim: int) -> str:
    if what in ("q", "k and v"):
        return {1: f"{what} heads", 2: "positions"}.get(dim, "elements")
    return "elements"


def _why_uneven(cut: Shard, ranks: int, unit: str) -> str:
    """`6 heads on 4 ranks: 2 parts, each on 2 ranks`."""
    shared = sum(s.size for s in cut.segments if s.copies < ranks)
    whole = sum(s.size for s in cut.segments if s.copies == ranks)
    copied = [s for s in cut.segments if 1 < s.copies < ranks]
    parts = [f"{s.size} in {s.parts(ranks)} parts, each on {s.copies} ranks" for s in copied]
    if whole:
        parts.append(f"{shared} divided, {whole} whole on every rank")
    return f"{cut.size} {unit} on {ranks} ranks: {'; '.join(parts)}"
