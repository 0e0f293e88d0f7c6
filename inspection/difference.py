"""How two plans differ: what lives where, what is sent, and what both are predicted to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxmesh.runtime.notebook import Facts, Shown
from onnxmesh.runtime.plan import Collective, Plan, Program

Report = Mapping[str, Any]
FORMAT = 1
Change = tuple[Any, Any]
"""What the first plan has, and the second; None where it has nothing."""

_TOTALS: Mapping[str, tuple[str, str]] = {
    "predicted time": ("time", "total_us"),
    "kernels": ("time", "compute_us"),
    "sending": ("time", "communication_us"),
    "of it beside kernels": ("time", "hidden_us"),
    "memory on a GPU": ("rank", "device_bytes"),
    "weights": ("rank", "weight_bytes"),
    "activations": ("rank", "activation_bytes"),
    "FLOPs": ("rank", "flops"),
    "instructions": ("rank", "instructions"),
}
"""Figures of one rank: section and field of the report. Fields end in their unit."""


@dataclass(frozen=True, repr=False)
class Difference(Shown):
    """What differs, by name; what is equal is not in it.

    Attributes:
        setting: mesh and options.
        totals: figures of one rank: microseconds, bytes, FLOPs, counts.
        placements: of inputs, outputs and weights, as text by axis.
        strategies: how each attention runs.
        collectives: (how many, bytes that a rank sends) by axis, kind and reason.
        replicated: nodes that every rank of an axis computes whole in one plan only: their reasons.
        kernels: how many instructions of each kernel.
        program: whether the programs differ in any way, be it in an order or an attribute.
    """

    setting: Mapping[str, Change] = field(default_factory=dict)
    totals: Mapping[str, Change] = field(default_factory=dict)
    placements: Mapping[str, Change] = field(default_factory=dict)
    strategies: Mapping[str, Change] = field(default_factory=dict)
    collectives: Mapping[str, Change] = field(default_factory=dict)
    replicated: Mapping[str, Change] = field(default_factory=dict)
    kernels: Mapping[str, Change] = field(default_factory=dict)
    program: bool = False

    def __bool__(self) -> bool:
        return self.program or any(bool(value) for value in vars(self).values())

    def to_json(self) -> dict[str, Any]:
        """As JSON data: every change as a list of two."""
        return {"format": FORMAT} | {
            name: value if isinstance(value, bool) else {key: list(change) for key, change in value.items()}
            for name, value in vars(self).items()
        }

    def _facts(self) -> tuple[str, Facts]:
        changes = {name: value for name, value in vars(self).items() if not isinstance(value, bool)}
        counts = [(name, str(len(value))) for name, value in changes.items() if value]
        return "Difference" if self else "No difference", counts or ([("", "in the program's details")] if self else [])


def difference(first: Plan, second: Plan) -> Difference:
    """What differs between two plans, of one model or of two."""
    ours, theirs = first.report, second.report
    return Difference(
        setting=_changes(_setting(ours), _setting(theirs)),
        totals=_changes(_totals(ours), _totals(theirs)),
        placements=_changes(_placements(ours), _placements(theirs)),
        strategies=_changes(_strategies(ours), _strategies(theirs)),
        collectives=_changes(_collectives(ours), _collectives(theirs)),
        replicated=_changes(_replicated(ours), _replicated(theirs)),
        kernels=_changes(_kernels(first.programs), _kernels(second.programs)),
        program=first.programs != second.programs,
    )


def _changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Change]:
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _setting(report: Report) -> dict[str, Any]:
    mesh = dict(report.get("mesh", {}))
    options = {name: value for name, value in report.get("options", {}).items() if value not in ({}, None)}
    return {**mesh, **options, "precision": report.get("precision", {}).get("asked", "model")}


def _totals(report: Report) -> dict[str, Any]:
    return {name: report.get(section, {}).get(entry) for name, (section, entry) in _TOTALS.items()}


def _placements(report: Report) -> dict[str, str]:
    """`input x`, `output y`, `weight w`: dtype, global shape, and the placement on each axis."""
    return {
        f"{kind} {tensor['name']}": _tensor(tensor)
        for kind, listed in (("input", "inputs"), ("output", "outputs"), ("weight", "weights"))
        for tensor in report.get(listed, ())
    }


def _tensor(tensor: Mapping[str, Any]) -> str:
    axes = " ".join(f"{axis}: {placement}" for axis, placement in sorted(tensor["placement"].items()))
    return f"{tensor['dtype']}{tensor['shape']} {axes}".strip()


def _strategies(report: Report) -> dict[str, str]:
    return {f"{item['node']} on {item['axis']}": str(item["strategy"]) for item in report.get("attention", ())}


def _collectives(report: Report) -> dict[str, tuple[int, int]]:
    counts: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for item in report.get("collectives", ()):
        name = f"{item['axis']} {item['kind']}, {item['reason']}"
        counts[name] += 1
        sent[name] += item["bytes"]
    return {name: (counts[name], sent[name]) for name in sorted(counts)}


def _replicated(report: Report) -> dict[str, str]:
    return {f"{item['node']} on {item['axis']}": str(item["reason"]) for item in report.get("replicated", ())}


def _kernels(programs: Iterable[Program]) -> dict[str, int]:
    listed: Sequence[str] = [
        item.kind if isinstance(item, Collective) else item.kernel for p in programs for item in p.instructions
    ]
    return dict(sorted(Counter(listed).items()))
