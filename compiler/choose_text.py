"""A choice of meshes as text for people."""

from __future__ import annotations

from onnxmesh.compiler.choose import Choice, Estimate
from onnxmesh.runtime.text import micros, size, table

_HEADER = ("", "predicted", "kernels", "sending", "memory", "sent", "weights", "work", "whole nodes")


def choice_text(choice: Choice) -> str:
    """The divisions, the best first; what each cannot be used for; a warning where ranks do not pay."""
    fit = [item for item in choice.estimates if not item.reason and item is not choice.alone]
    parts = [
        f"{choice.ranks} ranks, a run's predicted time and what one rank holds, sends and does\n"
        + table(_HEADER, [_row(choice.alone, "1 rank"), *(_row(item, str(item.candidate)) for item in fit)])
    ]
    others = [[str(item.candidate), item.reason] for item in (choice.alone, *choice.estimates) if item.reason]
    if others:
        parts.append(f"Out of the question\n{table(['', ''], others)}")
    if choice.warning:
        parts.append(f"warning: {choice.warning}")
    return "\n\n".join(parts)


def _row(item: Estimate, name: str) -> list[str]:
    times = (item.total_us, item.compute_us, item.communication_us)
    shares = (f"{item.weight_share:.0%}", f"{item.flops_share:.0%}")
    return [name, *map(micros, times), size(item.device_bytes), size(item.bytes_sent), *shares, str(item.replicated)]
