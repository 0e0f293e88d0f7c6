"""A plan and its report, joined: what each says of every instruction and of every tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from onnxmesh.inspection.dataflow import Dataflow
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.plan import Collective, Instruction, Plan

Json = dict[str, Any]


_CODED = ("replicated", "fallback", "uneven", "patterns", "warnings")
"""Sections that say why."""


class Joined:
    """What inspecting shows, as JSON data.

    Raises:
        PlanError: the plan has no report.
    """

    def __init__(self, plan: Plan) -> None:
        if not plan.report:
            raise PlanError("the plan has no report", hint="compile the model again", code="OM4013")
        self.plan, self.report = plan, _of_any_format(plan.report)
        self.program = plan.programs[0]
        self._named = {entry["buffer"]: entry for entry in self.report.get("tensors", ())}
        self._inputs = {port.buffer: entry for port, entry in zip(self.program.inputs, self.report["inputs"])}
        self._outputs = {port.buffer: entry for port, entry in zip(self.program.outputs, self.report["outputs"])}

    @cached_property
    def flow(self) -> Dataflow:
        """Who writes and reads what."""
        return Dataflow(self.program)

    @cached_property
    def instructions(self) -> list[Json]:
        """Every instruction, in the program's order."""
        return [self._instruction(at, item) for at, item in enumerate(self.program.instructions)]

    def _instruction(self, at: int, item: Instruction) -> Json:
        origins, times = self.report.get("instructions", ()), self.report["time"].get("instructions_us", ())
        said: Mapping[str, Any] = origins[at] if at < len(origins) else {}
        return {
            "instruction": at,
            "kernel": kernel_of(item),
            "axis": item.axis if isinstance(item, Collective) else "",
            "nodes": list(said.get("nodes", [item.node])),
            "module": said.get("module", ""),
            "microseconds": times[at] if at < len(times) else None,
            "stream": item.stream,
            "after": list(item.after),
            "reads": [self.tensor(buffer) for buffer in item.ins if buffer >= 0],
            "writes": [self.tensor(buffer) for buffer in item.outs],
            "decisions": list(said.get("decisions", ())),
        }

    def tensor(self, index: int) -> Json:
        """What a buffer holds: its name and global view where they are known, and a rank's piece."""
        buffer = self.program.buffers[index]
        local = {"dtype": buffer.dtype, "local_shape": list(buffer.shape), "local_bytes": buffer.nbytes}
        if buffer.kind == "weight":
            said: Mapping[str, Any] = self.report["weights"][buffer.source]
        else:
            said = self._inputs.get(index) or self._named.get(index) or self._outputs.get(index) or {}
        known = {name: said[name] for name in ("name", "shape", "placement") if name in said}
        return {"buffer": index, "kind": buffer.kind, "name": "", **known, **local}

    def role_of(self, index: int) -> str:
        """`input`, `output`, `weight` or `activation`."""
        kind = self.program.buffers[index].kind
        if kind in ("input", "weight"):
            return kind
        return "output" if index in self._outputs else "activation"

    def made_by(self, index: int) -> list[int]:
        """The instructions that write any of what a buffer holds."""
        return list(self.flow.made(index))

    def read_by(self, index: int) -> list[int]:
        """The instructions that read any of it."""
        root, made = self.flow.root(index), self.flow.made(index)
        readers = [at for maker in made for at in self._reads[root, maker]] if made else self.flow.readers[root]
        return sorted(set(readers))

    @cached_property
    def _reads(self) -> Mapping[tuple[int, int], list[int]]:
        """By a buffer and an instruction that writes it: who reads what that wrote."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for at, item in enumerate(self.program.instructions):
            for buffer, made in zip(item.ins, self.flow.sources[at]):
                for maker in made:
                    found[self.flow.root(buffer), maker].append(at)
        return found

    def values(self) -> Iterator[int]:
        """The inputs, then what instructions write, as buffers, in the order of the program; weights are left out."""
        seen = dict.fromkeys(port.buffer for port in self.program.inputs)
        for item in self.program.instructions:
            seen |= dict.fromkeys(item.outs)
        yield from seen


def _of_any_format(report: Json) -> Json:
    """The report with the sections and fields of now: format 1 had no codes, and warnings were text."""
    found = {**dict.fromkeys(_CODED, ()), "precision": {"asked": "model", "kept": ()}, **report}
    for section in _CODED:
        entries = [entry if isinstance(entry, dict) else {"reason": entry} for entry in found[section]]
        found[section] = [{"code": "", **entry} for entry in entries]
    return found


def kernel_of(item: Instruction) -> str:
    """The kernel, or the kind of a collective."""
    return item.kind if isinstance(item, Collective) else item.kernel
