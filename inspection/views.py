"""The views of a plan as JSON data: `onnxmesh inspect PLAN --what VIEW`. views_text.py prints them for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from onnxmesh.inspection.dataflow import Life, alive
from onnxmesh.inspection.joined import Joined
from onnxmesh.runtime.plan import Launch

Json = dict[str, Any]
Records = list[Json]


def tensors(plan: Joined) -> Records:
    """Inputs, activations and outputs: the global view, the placement, a rank's piece, who makes and who reads it."""
    return [
        {
            **plan.tensor(index),
            "role": plan.role_of(index),
            "made_by": plan.made_by(index),
            "read_by": plan.read_by(index),
        }
        for index in plan.values()
    ]


def weights(plan: Joined) -> Records:
    """Weights in the plan's order, and which instructions read each."""
    readers: dict[int, list[int]] = {}
    for index, buffer in enumerate(plan.program.buffers):
        if buffer.kind == "weight":
            readers.setdefault(buffer.source, []).extend(plan.flow.readers[index])
    return [
        {**entry, "read_by": sorted(set(readers.get(number, ())))}
        for number, entry in enumerate(plan.report["weights"])
    ]  # fmt: skip


def collectives(plan: Joined) -> Records:
    """Every collective in the program's order, with what makes its input and what reads its output."""
    items, flow = plan.program.instructions, plan.flow
    found = []
    for entry in plan.report["collectives"]:
        at = entry["instruction"]
        before = {made for each in flow.sources[at] for made in each}
        after = {reader for out in items[at].outs for reader in plan.read_by(out) if reader > at}
        found.append({**entry, "made_by": sorted(before), "read_by": sorted(after)})
    return found


def memory(plan: Joined) -> Json:
    """What a rank holds, and of its activations what is alive at every instruction and at the peak."""
    lives = plan.flow.lives()
    held = alive(lives, len(plan.program.instructions))
    peak = max(range(len(held)), key=held.__getitem__, default=0)
    here = sorted((life for life in lives if life.first <= peak <= life.last), key=lambda life: -life.bytes)
    rank = plan.report["rank"]
    return {
        "rank": {name: value for name, value in rank.items() if name.endswith("_bytes")},
        "alive_bytes": held,
        "peak": {
            "instruction": peak,
            "bytes": held[peak] if held else 0,
            "alive": [{**_life(plan, life)} for life in here],
        },
    }  # fmt: skip


def _life(plan: Joined, life: Life) -> Json:
    tensor = plan.tensor(life.buffer)
    return {**tensor, "bytes": life.bytes, "offset": life.offset, "first": life.first, "last": life.last}


def patterns(plan: Joined) -> Records:
    """Patterns found, and nearly found with what broke them."""
    return [dict(entry) for entry in plan.report["patterns"]]


def instructions(plan: Joined) -> Records:
    """Every instruction, in the program's order."""
    return plan.instructions


def passes(plan: Joined) -> Records:
    """What each stage of the compile did, as far as the plan tells; their seconds are not in it."""
    report, items = plan.report, plan.program.instructions
    model, rank, options = report["model"], report["rank"], report["options"]
    kernels = Counter(item.kernel for item in items if isinstance(item, Launch))
    found = Counter(entry["pattern"] for entry in report["patterns"] if entry["found"])
    fused = Counter({name: count for name, count in found.items() if name in _FUSIONS})
    bound = {**options["dims"], **options["shapes"], **dict.fromkeys(options.get("values", {}), "a value")}
    views = sum(buffer.kind == "view" for buffer in plan.program.buffers)
    merged = sum("+" in weight.name for weight in plan.plan.weights)
    grouped = sum(len(item.ins) > 1 for item in items if not isinstance(item, Launch))
    asked, kept = report["precision"]["asked"], len(report["precision"]["kept"])
    done = [
        ("load", f"weights of {model['weight_bytes']} bytes"),
        ("bind", ", ".join(f"{name} = {value}" for name, value in bound.items())),
        ("normalise", ""),
        ("recognise", f"{model['nodes']} nodes: {_counts(found - fused)}"),
        ("precision", "" if asked == "model" else f"{asked}, {kept} nodes stay float32"),
        *((f"shard-{axis['axis']}", _axis(axis)) for axis in report["axes"]),
        ("merge", f"{merged} weights hold several" if merged else ""),
        ("fuse", _counts(fused)),
        ("layout", f"{views} buffers are views of others"),
        ("schedule", f"{sum(bool(item.stream) for item in items)} instructions beside the first stream"),
        ("group", f"{grouped} collectives send several tensors together" if grouped else ""),
        ("lower", f"{rank['instructions']} instructions, {_counts(kernels)}; arena {rank['activation_bytes']} bytes"),
    ]
    return [{"stage": stage, "did": did} for stage, did in done if did]


_FUSIONS = ("Fused linear layer", "Fused norm", "Fused chain")


def _axis(axis: Mapping[str, Any]) -> str:
    return (
        f"{axis['decisions']} decisions, {100 * axis['flops_sharded']:.0f} % of the FLOPs divided by {axis['ranks']}, "
        f"{axis['collectives']} collectives"
    )


def _counts(found: Mapping[str, int]) -> str:
    most = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count}" for name, count in most[:8]) + (", ..." if len(most) > 8 else "")


VIEWS: Mapping[str, Callable[[Joined], Json | Records]] = {
    "tensors": tensors,
    "collectives": collectives,
    "memory": memory,
    "weights": weights,
    "patterns": patterns,
    "passes": passes,
    "instructions": instructions,
}
