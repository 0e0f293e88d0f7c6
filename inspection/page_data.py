"""The data of the page: what its scripts show, as JSON; what a plan and its report say, joined and made compact."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxmesh.inspection.blocks import Block, Fold, Steps, folds
from onnxmesh.inspection.dataflow import Dataflow, alive
from onnxmesh.inspection.joined import kernel_of
from onnxmesh.runtime import recipe
from onnxmesh.runtime.plan import Buffer, Collective, Instruction, Plan

Json = dict[str, Any]
NODES_NAMED = 40
"""Nodes of a kind of finding that are named; the others are counted."""

_NAME = re.compile(r"[\w.~/:]*[._/]\d[\w.~/:]*")
"""A name with a number in it: findings that differ in such names alone are counted together."""

_ASIDE = ("Add", "Mul", "Sub", "Div", "Cast")
"""Ops that a title names only where nothing else is in an expression."""


def page_data(plan: Plan, title: str, bench: Mapping[str, Any] | None = None) -> Json:
    """What the page of a plan shows. A report of before it knew origins is shown without them.

    Args:
        bench: the result of a benchmark of this plan.
    """
    flow, report = Dataflow(plan.programs[0]), plan.report
    return {
        "title": title,
        "producer": plan.producer,
        "axes": [[axis, size] for axis, size in plan.mesh.axes if size > 1],
        "ranks": plan.mesh.size,
        "options": report.get("options", {}),
        "summary": {name: report.get(name, {}) for name in ("model", "rank", "time", "axes", "precision")},
        "warnings": report.get("warnings", []),
        "instructions": _instructions(plan, flow),
        "buffers": _buffers(plan, flow),
        "weights": [_weight(entry, plan, index) for index, entry in enumerate(report.get("weights", []))],
        "inputs": _ports(report.get("inputs", []), plan.programs[0].inputs),
        "outputs": _ports(report.get("outputs", []), plan.programs[0].outputs),
        "decisions": report.get("decisions", []),
        "folds": [_fold(fold) for fold in folds(_steps(plan, flow))],
        "memory": _memory(plan, flow),
        "patterns": _counted(report.get("patterns", []), ("pattern", "found", "reason", "code")),
        "replicated": _counted(report.get("replicated", []), ("axis", "op", "reason", "code")),
        "attention": _counted(report.get("attention", []), ("axis", "strategy", "q", "k", "placement")),
        "fallback": report.get("fallback", []),
        "uneven": report.get("uneven", []),
        "bench": dict(bench) if bench is not None else None,
    }


# --- instructions and buffers -------------------------------------------------------------------------------


def _instructions(plan: Plan, flow: Dataflow) -> list[Json]:
    program, report = plan.programs[0], plan.report
    times = report.get("time", {}).get("instructions_us", [])
    origins = report.get("instructions", [])
    sent = {entry["instruction"]: entry for entry in report.get("collectives", [])}
    found = []
    for at, item in enumerate(program.instructions):
        entry: Json = {
            "name": kernel_of(item),
            "title": title_of(item),
            "ins": list(item.ins),
            "outs": list(item.outs),
            "from": [list(made) for made in flow.sources[at]],
            "us": times[at] if at < len(times) else None,
            "nodes": [item.node],
            "module": "",
            "decisions": [],
            **(origins[at] if at < len(origins) else {}),
        }
        if item.stream:
            entry["stream"] = item.stream
        if isinstance(item, Collective):
            said = sent.get(at, {})
            entry |= {"axis": item.axis, "bytes": said.get("bytes", 0), "reason": said.get("reason", item.reason)}
        found.append(entry)
    return found


def title_of(item: Instruction) -> str:
    """What an instruction does, for people: `MatMul + Gelu`."""
    if isinstance(item, Collective) or "expr" not in item.attrs:
        return kernel_of(item)
    ops = list(dict.fromkeys(_ops(item.attrs["expr"])))
    named = [op for op in ops if op not in _ASIDE] or ops
    return " + ".join([*named[:3], *(["..."] if len(named) > 3 else [])])


def _ops(expression: Any) -> Iterable[str]:
    """The ops of an expression, the innermost and first ones first."""
    if isinstance(expression, (list, tuple)) and expression and isinstance(expression[0], str):
        for operand in expression[1:]:
            yield from _ops(operand)
        if expression[0][:1].isupper():
            yield expression[0]


def _buffers(plan: Plan, flow: Dataflow) -> dict[str, Json]:
    """The buffers that instructions use, by number."""
    program = plan.programs[0]
    known = {entry["buffer"]: entry for entry in plan.report.get("tensors", [])}
    ports = {port.buffer: entry for port, entry in zip(program.inputs, plan.report.get("inputs", []))}
    lives = {life.buffer: life for life in flow.lives()}
    used = {buffer for item in program.instructions for buffer in (*item.ins, *item.outs) if buffer >= 0}
    used |= {port.buffer for port in (*program.inputs, *program.outputs)}
    used |= {flow.root(buffer) for buffer in used}
    found = {}
    for index in sorted(used):
        buffer = program.buffers[index]
        entry: Json = {"kind": buffer.kind, "dtype": buffer.dtype, "local": list(buffer.shape), "bytes": buffer.nbytes}
        if buffer.kind == "weight":
            entry["weight"] = buffer.source
        elif said := known.get(index) or ports.get(index):
            entry |= {name: said[name] for name in ("name", "shape", "placement", "piece") if said.get(name)}
        if flow.root(index) != index:
            entry["root"] = flow.root(index)
        if index in lives:
            entry |= {"offset": lives[index].offset, "first": lives[index].first, "last": lives[index].last}
        found[str(index)] = entry
    return found


def _weight(entry: Mapping[str, Any], plan: Plan, index: int) -> Json:
    return {**entry, "sources": list(recipe.sources(plan.weights[index].recipe))}


def _ports(entries: Sequence[Mapping[str, Any]], ports: Sequence[Any]) -> list[Json]:
    return [{**entry, "buffer": port.buffer} for entry, port in zip(entries, ports)]


# --- blocks, memory, findings -------------------------------------------------------------------------------


def _steps(plan: Plan, flow: Dataflow) -> Steps:
    program = plan.programs[0]
    origins = plan.report.get("instructions", [])
    modules = [origins[at]["module"] if at < len(origins) else "" for at in range(len(program.instructions))]
    signatures = [(kernel_of(item), _shapes(item, program.buffers)) for item in program.instructions]
    sources = [sorted({made for each in own for made in each}) for own in flow.sources]
    return Steps(modules, signatures, sources)


def _shapes(item: Instruction, buffers: Sequence[Buffer]) -> tuple[Any, ...]:
    return tuple((buffers[index].dtype, buffers[index].shape) for index in item.outs)


def _fold(fold: Fold) -> Json:
    return {"name": fold.name, "alike": fold.alike, "blocks": [_block(block) for block in fold.blocks]}


def _block(block: Block) -> Json:
    entry: Json = {"name": block.name, "instructions": list(block.instructions)}
    if block.folds:
        entry["folds"] = [_fold(fold) for fold in block.folds]
    return entry


def _memory(plan: Plan, flow: Dataflow) -> Json:
    lives, count = flow.lives(), len(plan.programs[0].instructions)
    held = alive(lives, count)
    return {
        "alive": held,
        "peak": max(range(count), key=held.__getitem__) if count else 0,
        "arena": plan.programs[0].arena_bytes,
        "inputs": plan.report.get("rank", {}).get("input_bytes", 0),
        "weights": plan.report.get("rank", {}).get("weight_bytes", 0),
    }


def _counted(entries: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> list[Json]:
    """Entries that are equal but for names, once, with their number, nodes and sums."""
    found: dict[str, Json] = {}
    counts: Counter[str] = Counter()
    for entry in entries:
        key = repr([_NAME.sub("…", str(entry.get(name, ""))) for name in keys])
        kept = found.setdefault(key, {**{name: entry.get(name, "") for name in keys}, "nodes": []})
        counts[key] += 1
        if kept.get("reason") != entry.get("reason"):
            kept["reason"] = _NAME.sub("…", entry["reason"])
        if len(kept["nodes"]) < NODES_NAMED:
            kept["nodes"].append(entry["node"])
        for name in ("microseconds", "share", "flops"):
            if name in entry:
                kept[name] = kept.get(name, 0) + entry[name]
    return [{**entry, "count": counts[key]} for key, entry in found.items()]
