"""Whether a plan fits together: indices, sizes, placements, kernels. The types of its fields are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxmesh.runtime.kernels  # noqa: F401  (registers them)
from onnxmesh.runtime import recipe
from onnxmesh.runtime.comm import REDUCTIONS
from onnxmesh.runtime.control import CONTROL
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.reference import REFERENCE, check_node
from onnxmesh.runtime.kernels.registry import find_for
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial, Shard, local_shape
from onnxmesh.runtime.plan import ROOTED, Buffer, Collective, Control, Instruction, Plan, Port, Program, Spec, Weight
from onnxmesh.runtime.segments import segments_of

_SEGMENTED = {
    "AllReduce": (),
    "ReduceScatter": (("dim", "segments"),),
    "AllGather": (("dim", "segments"),),
    "AllToAll": (("split_dim", "split_segments"), ("concat_dim", "concat_segments")),
    "Shift": (),
    **dict.fromkeys(ROOTED, ()),
}
_REDUCTIONS = frozenset[str]().union(*REDUCTIONS.values())


def validate(plan: Plan) -> None:
    """Raise PlanError, saying where, unless every part of the plan fits the others."""
    names = [weight.name for weight in plan.weights]
    _require(len(set(names)) == len(names), "two weights have one name")
    _require(len(plan.programs) > 0, "the plan holds no program")
    for weight in plan.weights:
        where = f"weight {weight.name!r}"
        recipe.validate(weight.recipe)
        local(weight.shape, weight.spec, plan.mesh, where)
        _require(
            not weight.shards or set(weight.shards) == set(shard_keys(weight.spec, plan.mesh)),
            f"{where}: its shards do not match its placement",
        )
    for number, program in enumerate(plan.programs):
        _check_program(program, plan, f"program {number}")


def shard_keys(spec: Spec, mesh: Mesh) -> list[str]:
    """The keys of all pieces that `spec` cuts a weight into, in the order of the ranks that hold them."""
    return list(dict.fromkeys(shard_key(spec, mesh, mesh.coordinate(rank)) for rank in range(mesh.size)))


def shard_key(spec: Spec, mesh: Mesh, coordinate: Mapping[str, int]) -> str:
    """The key of the piece at `coordinate`: `all`, `tp0`, `cp1-tp3`, only of the axes that cut."""
    cutting = [axis for axis, placement in spec if isinstance(placement, Shard | Partial)]
    parts = [f"{axis}{coordinate[axis]}" for axis, size in mesh.axes if axis in cutting and size > 1]
    return "-".join(parts) or "all"


def local(shape: tuple[int, ...], spec: Spec, mesh: Mesh, where: str) -> tuple[int, ...]:
    """The local shape of a tensor of global `shape`. Raises PlanError if the placements do not fit it."""
    axes = [axis for axis, _ in spec]
    _require(len(set(axes)) == len(axes), f"{where}: an axis is placed twice")
    for axis, placement in spec:
        ranks = mesh.axis_size(axis)
        if isinstance(placement, Shard):
            fits = 0 <= placement.dim < len(shape) and placement.size == shape[placement.dim]
            fits = fits and all(_cuts(s.size, s.copies, ranks) for s in placement.segments)
            _require(fits, f"{where}: {placement.text(ranks)} on {axis} does not fit the shape {list(shape)}")
        shape = local_shape(shape, placement, ranks)
    return shape


def _cuts(size: int, copies: int, ranks: int) -> bool:
    return copies > 0 and ranks % copies == 0 and size >= 0 and size % (ranks // copies) == 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message, code="OM4005")


def _check_program(program: Program, plan: Plan, where: str) -> None:
    for index, buffer in enumerate(program.buffers):
        _check_buffer(buffer, index, program, plan, f"{where}: buffer {index}")
    for kind, ports in (("input", program.inputs), ("output", program.outputs)):
        names = [port.name for port in ports]
        _require(len(set(names)) == len(names), f"{where}: two {kind}s have one name")
        for port in ports:
            _check_port(port, program, plan.mesh, f"{where}: {kind} {port.name!r}")
    for index, instruction in enumerate(program.instructions):
        _check_instruction(instruction, index, program, plan.mesh, f"{where}: instruction {index}")


def _extent(buffer: Buffer) -> int:
    """Bytes from the first element to the end of the last one."""
    if not buffer.strides or 0 in buffer.shape:
        return buffer.nbytes
    last = sum((size - 1) * stride for size, stride in zip(buffer.shape, buffer.strides))
    return (last + 1) * dtype(buffer.dtype).itemsize


def _repeats(buffer: Buffer) -> bool:
    """Whether two elements may lie at one place: true unless every dim steps over all of the smaller ones."""
    end = 1
    for stride, size in sorted((stride, size) for stride, size in zip(buffer.strides, buffer.shape) if size > 1):
        if stride < end:
            return True
        end = stride * size
    return False


def _check_buffer(buffer: Buffer, index: int, program: Program, plan: Plan, where: str) -> None:
    _require(all(size >= (-1 if buffer.is_loose else 0) for size in buffer.shape), f"{where} has a negative dim")
    if buffer.is_loose or buffer.kind == "loose":
        _check_loose(buffer, program, where)
        return
    _require(buffer.offset >= 0 and buffer.offset % dtype(buffer.dtype).itemsize == 0, f"{where} is not aligned")
    _require(buffer.kind == "view" or not buffer.strides, f"{where} has strides, but is no view")
    if buffer.kind == "arena":
        _require(buffer.offset + buffer.nbytes <= program.arena_bytes, f"{where} lies outside of the arena")
        return
    many = {"view": program.buffers, "weight": plan.weights, "input": program.inputs}[buffer.kind]
    _require(0 <= buffer.source < len(many), f"{where}: there is no {buffer.kind} {buffer.source}")
    if buffer.kind == "view":
        source = program.buffers[buffer.source]
        _require(source.dtype == buffer.dtype, f"{where} is a view of another dtype")
        _require(len(buffer.strides) in (0, len(buffer.shape)), f"{where} has not one stride a dim")
        _require(
            buffer.offset + _extent(buffer) <= _extent(source), f"{where} does not lie within what it is a view of"
        )
        _require(not _is_cycle(program, index), f"{where} is a view of itself")
    else:
        whole: Any = many[buffer.source]
        expected = (whole.dtype, local(whole.shape, whole.spec, plan.mesh, where))
        _require(expected == (buffer.dtype, buffer.shape), f"{where} does not fit its {buffer.kind}")


def _check_loose(buffer: Buffer, program: Program, where: str) -> None:
    """A value without a static type lies in a slot of its own, or is an input; nothing else is so."""
    _require(buffer.is_loose, f"{where} is loose, but of the dtype {buffer.dtype}")
    _require(buffer.kind in ("loose", "input"), f"{where} is of the type {buffer.dtype}, but lies in memory")
    _require(not buffer.offset and not buffer.strides, f"{where} is loose, but has a place")
    if buffer.kind == "input":
        _require(0 <= buffer.source < len(program.inputs), f"{where}: there is no input {buffer.source}")
        port = program.inputs[buffer.source]
        _require((port.dtype, port.shape) == (buffer.dtype, buffer.shape), f"{where} does not fit its input")


def _is_cycle(program: Program, index: int) -> bool:
    seen = set()
    while program.buffers[index].kind == "view":
        if index in seen or not 0 <= index < len(program.buffers):
            return True
        seen.add(index)
        index = program.buffers[index].source
        if not 0 <= index < len(program.buffers):
            return True
    return False


def _check_port(port: Port, program: Program, mesh: Mesh, where: str) -> None:
    _require(0 <= port.buffer < len(program.buffers), f"{where}: there is no buffer {port.buffer}")
    buffer = program.buffers[port.buffer]
    _require(not port.is_loose or not port.spec, f"{where} is cut, but its shape is not known")
    expected = (port.dtype, local(port.shape, port.spec, mesh, where))
    _require(expected == (buffer.dtype, buffer.shape), f"{where} does not fit its buffer")


def _check_instruction(item: Instruction, index: int, program: Program, mesh: Mesh, where: str) -> None:
    count = len(program.buffers)
    collective = isinstance(item, Collective)
    first = 0 if collective else -1
    _require(all(first <= i < count for i in item.ins), f"{where} reads a buffer that does not exist")
    _require(all(0 <= i < count for i in item.outs), f"{where} writes a buffer that does not exist")
    writable = all(_root(program, i).kind in ("arena", "loose") for i in item.outs)
    _require(writable, f"{where} writes a weight or an input")
    touched = [program.buffers[i] for i in (*item.ins, *item.outs) if i >= 0]
    _require(not collective or not any(b.is_loose for b in touched), f"{where} sends a value without a static type")
    _require(not any(_repeats(program.buffers[i]) for i in item.outs), f"{where} writes one place twice")
    _require(all(0 <= i < index for i in item.after), f"{where} waits for a later instruction")
    if isinstance(item, Collective):
        _check_collective(item, program, mesh, where)
    elif isinstance(item, Control):
        _check_control(item, program, mesh, where)
    else:
        find_for(item, program.buffers)
        if item.kernel == REFERENCE:
            check_node(item.attrs)


def _check_control(item: Control, program: Program, mesh: Mesh, where: str) -> None:
    """Its programs are there, with inputs for what they capture, and hold no weights and no collectives."""
    names = CONTROL.get(item.kernel)
    _require(names is not None and set(names) == set(item.programs), f"{where}: wrong programs for {item.kernel}")
    _require(item.captured <= len(item.ins), f"{where} captures more than it reads")
    captured = [program.buffers[i] for i in item.ins[len(item.ins) - item.captured :] if i >= 0]
    _require(len(captured) == item.captured, f"{where} captures a buffer that does not exist")
    for name, inner in item.programs.items():
        here = f"{where}, {name}"
        _check_program(inner, Plan(mesh, (), (inner,)), here)
        counts = (item.captured, len(item.outs)) if item.kernel == "If" else (len(item.ins), len(item.outs))
        counts = (counts[0], counts[1] + (item.kernel == "Loop"))
        _require((len(inner.inputs), len(inner.outputs)) == counts, f"{here}: wrong number of inputs or outputs")
        alone = not any(isinstance(each, Collective) for each in inner.instructions)
        _require(alone, f"{here} sends data to other ranks")
        ends = inner.inputs[len(inner.inputs) - item.captured :] if item.captured else ()
        fits = [(p.dtype, p.shape) for p in ends] == [(b.dtype, b.shape) for b in captured]
        _require(fits, f"{here}: its last inputs are not what is captured")
        _require(not any(port.spec for port in (*inner.inputs, *inner.outputs)), f"{here} is cut")


def _root(program: Program, index: int) -> Buffer:
    buffer = program.buffers[index]
    while buffer.kind == "view":
        buffer = program.buffers[buffer.source]
    return buffer


def _check_collective(item: Collective, program: Program, mesh: Mesh, where: str) -> None:
    _require(item.kind in _SEGMENTED, f"{where}: unknown collective {item.kind!r}")
    _require(len(item.ins) == len(item.outs), f"{where}: as many results as arrays are sent")
    each = item.attrs.get("each", [item.attrs] * len(item.ins))
    fits = (
        isinstance(each, list | tuple)
        and len(each) == len(item.ins)
        and all(isinstance(attrs, Mapping) for attrs in each)
    )
    _require(fits, f"{where}: as many attributes as arrays are sent")
    for attrs, buffer in zip(each, item.ins):
        _check_attributes(item.kind, attrs, len(program.buffers[buffer].shape), mesh.axis_size(item.axis), where)


def _check_attributes(kind: str, attrs: Mapping[str, Any], rank: int, ranks: int, where: str) -> None:
    """Those of a collective for one array of that rank."""
    _require(attrs.get("reduce", "sum") in _REDUCTIONS, f"{where}: unknown reduction")
    _require(kind != "Shift" or type(attrs.get("offset")) is int, f"{where}: no offset")
    _require(kind not in ROOTED or _is_below(attrs.get("root"), ranks), f"{where}: wrong root")
    along = kind in ("GatherTo", "ScatterFrom")
    _require(not along or _is_below(attrs.get("dim"), rank), f"{where}: wrong dim")
    for dim, segments in _SEGMENTED[kind]:
        try:
            parts = segments_of(attrs.get(segments))
        except ValueError as error:
            raise PlanError(f"{where}: {error}", code="OM4005") from error
        _require(_is_below(attrs.get(dim), rank), f"{where}: wrong {dim}")
        _require(all(_cuts(s.size, s.copies, ranks) for s in parts), f"{where}: wrong {segments}")


def _is_below(value: Any, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def weight_entry(weight: Weight, mesh: Mesh) -> tuple[str, tuple[int, ...]]:
    """dtype and local shape of a weight's pieces."""
    return weight.dtype, local(weight.shape, weight.spec, mesh, f"weight {weight.name!r}")
