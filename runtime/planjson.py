"""A plan as JSON text, and back. Equal plans give equal bytes; what is not exactly a plan is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.loose import check_type, is_loose
from onnxmesh.runtime.mesh import AXES, Mesh
from onnxmesh.runtime.placement import from_json as placement_from_json
from onnxmesh.runtime.placement import to_json as placement_to_json
from onnxmesh.runtime.plan import (
    KINDS,
    VERSION,
    Buffer,
    Collective,
    Control,
    Instruction,
    Launch,
    Plan,
    Port,
    Program,
    Spec,
    Weight,
)

T = TypeVar("T")
Reader = Callable[[Any], Any]


def text(plan: Plan, report_digest: str) -> bytes:
    """The content of plan.json, with a digest over itself."""
    body = {**_plan_to_json(plan), "report": report_digest}
    return _layout({**body, "digest": _digest(body)}).encode()


def parse(data: bytes) -> tuple[Plan, str]:
    """The plan in the content of plan.json, and the digest of its report.

    Raises:
        PlanError: a newer version, a changed byte, a missing, unknown or wrongly typed field.
    """
    try:
        body = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise PlanError(f"plan.json is not JSON: {error}", code="OM4003") from error
    if not isinstance(body, dict):
        raise PlanError("plan.json holds no plan", code="OM4003")
    version = body.get("version")
    _check_version(version)
    stated = body.pop("digest", None)
    if stated != _digest(body) or data != _layout({**body, "digest": stated}).encode():
        raise PlanError(
            "plan.json is damaged: its digest does not match", hint="compile the model again", code="OM4002"
        )
    try:
        return _plan_from_json(_from_older(body))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PlanError(f"plan.json: {error}", code="OM4003") from error


def canonical(value: Any) -> str:
    """JSON with sorted keys and fixed separators."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def _check_version(version: Any) -> None:
    if type(version) is not int or version < 1:
        raise PlanError(f"plan.json holds no version, but {version!r}", code="OM4003")
    if version > VERSION:
        raise PlanError(
            f"plan version {version} is newer than this onnxmesh understands ({VERSION})",
            hint="upgrade onnxmesh, or compile the model again",
            code="OM4004",
        )


def _from_older(body: dict[str, Any]) -> dict[str, Any]:
    """A plan of any version as one of this version.

    Version 1: buffers have no strides, all of them are row-major. Version 2: nothing is loose, no control flow.
    """
    if body["version"] == 1:
        for program in body["programs"]:
            for buffer in program["buffers"]:
                buffer.setdefault("strides", [])
    return {**body, "version": VERSION}


def _layout(value: Any) -> str:
    """Canonical JSON with one item of a list of objects to a line, for readers and for diff."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(_layout(item) for item in value) + "\n]"
    if isinstance(value, dict) and any(_has_lines(item) for item in value.values()):
        items = (f"{canonical(key)}:{_layout(item)}" for key, item in sorted(value.items()))
        return "{\n" + ",\n".join(items) + "\n}"
    return canonical(value)


def _has_lines(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _spec_to_json(spec: Spec) -> list[Any]:
    return [[axis, placement_to_json(placement)] for axis, placement in spec]


def _record(value: Any) -> dict[str, Any]:
    """A dataclass as JSON, its spec included."""
    data = {item.name: getattr(value, item.name) for item in fields(value)}
    return {**data, "spec": _spec_to_json(value.spec)} if "spec" in data else data


def _instruction_to_json(instruction: Instruction) -> dict[str, Any]:
    if isinstance(instruction, Control):
        programs = {name: _program_to_json(program) for name, program in instruction.programs.items()}
        return {"is": "control", **_record(instruction), "programs": programs}
    return {"is": "launch" if isinstance(instruction, Launch) else "collective", **_record(instruction)}


def _program_to_json(program: Program) -> dict[str, Any]:
    return {
        "dims": dict(program.dims),
        "inputs": [_record(port) for port in program.inputs],
        "outputs": [_record(port) for port in program.outputs],
        "buffers": [_record(buffer) for buffer in program.buffers],
        "instructions": [_instruction_to_json(item) for item in program.instructions],
        "arena_bytes": program.arena_bytes,
        **({"values": dict(program.values)} if program.values else {}),
    }


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    body = {
        "version": plan.version,
        "producer": plan.producer,
        "mesh": plan.mesh.to_json(),
        "weights": [_record(weight) for weight in plan.weights],
        "programs": [_program_to_json(program) for program in plan.programs],
    }
    return plain(body)


def plain(value: Any) -> Any:
    """Tuples as lists, NumPy numbers as Python's, so that what is read equals what was written.

    Raises:
        PlanError: a value that JSON has no form for.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise PlanError(f"a plan cannot hold {value!r}", code="OM4009")


def _int(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"expected an integer, got {value!r}")
    return value


def _size(value: Any) -> int:
    if _int(value) < 0:
        raise ValueError(f"expected a size, got {value!r}")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def _dtype(value: Any) -> str:
    dtype(_text(value))
    return str(value)


def _type(value: Any) -> str:
    """A dtype's name, or the type of a loose value."""
    if not is_loose(_text(value)):
        return _dtype(value)
    check_type(value)
    return str(value)


def _one_of(*choices: str) -> Reader:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {value!r}")
        return str(value)

    return read


def _tuple(item: Reader) -> Reader:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {value!r}")
        return tuple(item(entry) for entry in value)

    return read


def _mapping(item: Reader) -> Reader:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {value!r}")
        return {key: item(entry) for key, entry in value.items()}

    return read


def _axis_placement(value: Any) -> tuple[str, Any]:
    if not isinstance(value, list) or len(value) != 2 or value[0] not in AXES:
        raise ValueError(f"expected [axis, placement], got {value!r}")
    return value[0], placement_from_json(value[1])


def _anything(value: Any) -> Any:
    return value


_INDICES = _tuple(_int)
_SPEC = _tuple(_axis_placement)
_BUFFER: Mapping[str, Reader] = {
    "dtype": _type,
    "shape": _INDICES,
    "kind": _one_of("arena", "view", "weight", "input", "loose"),
    "offset": _size,
    "source": _int,
    "strides": _tuple(_size),
}
_PORT: Mapping[str, Reader] = {
    "name": _text,
    "dtype": _type,
    "shape": _INDICES,
    "spec": _SPEC,
    "buffer": _size,
}
_WEIGHT: Mapping[str, Reader] = {
    "name": _text,
    "dtype": _dtype,
    "shape": _tuple(_size),
    "spec": _SPEC,
    "recipe": _mapping(_anything),
    "shards": _mapping(_text),
}
_INSTRUCTION: Mapping[str, Reader] = {
    "is": _one_of("launch", "control", "collective"),
    "ins": _INDICES,
    "outs": _INDICES,
    "attrs": _mapping(_anything),
    "node": _text,
    "stream": _int,
    "after": _tuple(_size),
}
_LAUNCH: Mapping[str, Reader] = {**_INSTRUCTION, "kernel": _text}
_COLLECTIVE: Mapping[str, Reader] = {
    **_INSTRUCTION,
    "kind": _one_of(*KINDS),
    "axis": _one_of(*AXES),
    "reason": _text,
}


def _fields(value: Any, readers: Mapping[str, Reader], what: str) -> dict[str, Any]:
    """The object's fields, each read by its reader; there must be just these."""
    if not isinstance(value, dict) or set(value) != set(readers):
        found = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{what}: expected the fields {', '.join(sorted(readers))}, got {found!r}")
    result = {}
    for name, reader in readers.items():
        try:
            result[name] = reader(value[name])
        except ValueError as error:
            raise ValueError(f"{what}.{name}: {error}") from error
    return result


def _reads(kind: Callable[..., T], readers: Mapping[str, Reader], what: str) -> Reader:
    return lambda value: kind(**_fields(value, readers, what))


def _instruction(value: Any) -> Instruction:
    kind, readers = _INSTRUCTIONS.get(
        str(value.get("is")) if isinstance(value, dict) else "", (Collective, _COLLECTIVE)
    )
    read = _fields(value, readers, "instruction")
    read.pop("is")
    made: Instruction = kind(**read)
    return made


def _program(value: Any) -> Program:
    whole = {"values": {}, **value} if isinstance(value, dict) else value
    return Program(**_fields(whole, _PROGRAM, "program"))


_CONTROL: Mapping[str, Reader] = {**_LAUNCH, "captured": _size, "programs": _mapping(_program)}
_INSTRUCTIONS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Reader]]] = {
    "launch": (Launch, _LAUNCH),
    "control": (Control, _CONTROL),
    "collective": (Collective, _COLLECTIVE),
}
_PROGRAM: Mapping[str, Reader] = {
    "dims": _mapping(_size),
    "inputs": _tuple(_reads(Port, _PORT, "input")),
    "outputs": _tuple(_reads(Port, _PORT, "output")),
    "buffers": _tuple(_reads(Buffer, _BUFFER, "buffer")),
    "instructions": _tuple(_instruction),
    "arena_bytes": _size,
    "values": _mapping(_mapping(_anything)),
}
_PLAN: Mapping[str, Reader] = {
    "version": _int,
    "producer": _text,
    "mesh": Mesh.from_json,
    "weights": _tuple(_reads(Weight, _WEIGHT, "weight")),
    "programs": _tuple(_program),
    "report": _text,
}


def _plan_from_json(body: Mapping[str, Any]) -> tuple[Plan, str]:
    read = _fields(dict(body), _PLAN, "plan")
    report = read.pop("report")
    return Plan(**read), report
