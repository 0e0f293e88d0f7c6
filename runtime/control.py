"""Control flow: If, Loop, Scan and SequenceMap over programs that a function runs, as the ONNX documents say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.loose import element_dtype, is_loose
from onnxmesh.runtime.plan import Control, Port

CONTROL: Mapping[str, tuple[str, ...]] = {
    "If": ("then_branch", "else_branch"),
    "Loop": ("body",),
    "Scan": ("body",),
    "SequenceMap": ("body",),
}
"""The programs that each op holds."""

Value = Any
"""An array, a list of values, or None."""
Run = Callable[..., list[Value]]
"""Runs a program on its operands; the results are the caller's to keep."""


def execute(item: Control, xp: Any, run: Mapping[str, Run], operands: Sequence[Value]) -> tuple[Value, ...]:
    """The results of a control flow instruction.

    Args:
        run: what runs each of its programs.
        operands: its inputs without those that are captured.
    """
    return tuple(_EXECUTE[item.kernel](item, xp, run, *operands))


def _if(item: Control, xp: Any, run: Mapping[str, Run], condition: Value) -> list[Value]:
    return run["then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"]()


def _loop(item: Control, xp: Any, run: Mapping[str, Run], trips: Value, go: Value, *carried: Value) -> list[Value]:
    """Runs `body(i, go, *carried)` until it says so, at most `trips` times; what it yields besides is stacked."""
    going = go is None or bool(go.reshape(-1)[0])
    state, rows = list(carried), []
    for i in count() if trips is None else range(int(trips.reshape(-1)[0])):
        if not going:
            break
        again, *results = run["body"](xp.full((), i, xp.int64), xp.full((), going, xp.bool_), *state)
        going = bool(again.reshape(-1)[0])
        state = results[: len(state)]
        rows.append(results[len(state) :])
    ports = item.programs["body"].outputs[1 + len(state) :]
    return [*state, *(_stacked(xp, [row[k] for row in rows], port, 0) for k, port in enumerate(ports))]


def _scan(item: Control, xp: Any, run: Mapping[str, Run], *operands: Value) -> list[Value]:
    """Runs `body(*state, *slices)` for every entry along the scanned inputs' axes."""
    scanned = item.attrs["num_scan_inputs"]
    state, arrays = list(operands[: len(operands) - scanned]), operands[len(operands) - scanned :]
    ports = item.programs["body"].outputs[len(state) :]
    axes = item.attrs.get("scan_input_axes") or [0] * scanned
    back = item.attrs.get("scan_input_directions") or [0] * scanned
    out_axes = item.attrs.get("scan_output_axes") or [0] * len(ports)
    out_back = item.attrs.get("scan_output_directions") or [0] * len(ports)
    lines = [xp.moveaxis(x, axis, 0)[:: -1 if turn else 1] for x, axis, turn in zip(arrays, axes, back)]
    rows = []
    for slices in zip(*lines):
        results = run["body"](*state, *slices)
        state = results[: len(state)]
        rows.append(results[len(state) :])
    columns = [[row[k] for row in rows][:: -1 if turn else 1] for k, turn in enumerate(out_back)]
    return [*state, *(_stacked(xp, *column) for column in zip(columns, ports, out_axes))]


def _sequence_map(item: Control, xp: Any, run: Mapping[str, Run], first: Value, *others: Value) -> list[Value]:
    """Runs `body` for every element of a sequence; of the other inputs, sequences go along and tensors stay."""
    rows = [
        run["body"](element, *(other[i] if isinstance(other, list) else other for other in others))
        for i, element in enumerate(first)
    ]
    return [[row[k] for row in rows] for k in range(len(item.programs["body"].outputs))]


def _stacked(xp: Any, values: Sequence[Value], port: Port, axis: int) -> Value:
    """The values along a new axis; of none, what is known of the shape that they would have."""
    if values:
        return xp.stack(list(values), axis=axis)
    kind = element_dtype(port.dtype) if is_loose(port.dtype) else dtype(port.dtype)
    shape = [max(0, size) for size in port.shape]
    shape.insert(axis % (len(shape) + 1), 0)
    return xp.zeros(shape, kind)


_EXECUTE: Mapping[str, Callable[..., list[Value]]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceMap": _sequence_map,
}
