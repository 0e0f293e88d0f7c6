"""One node, tensor, weight or instruction of a plan, found by its name: `onnxmesh inspect PLAN --node NAME`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from onnxmesh.inspection.joined import Joined
from onnxmesh.inspection.views import collectives
from onnxmesh.inspection.views import tensors as all_tensors
from onnxmesh.inspection.views import weights as all_weights
from onnxmesh.runtime.errors import InvalidArgument
from onnxmesh.runtime.plan import Collective
from onnxmesh.runtime.recipe import sources

Json = dict[str, Any]
MOST = 5
"""Suggestions for a name that is none."""


def look_up(plan: Joined, name: str) -> Json:
    """All that the plan says of a name.

    Args:
        name: of a node of the model, a weight, an input, an output or an activation; or an instruction, as `#12`.

    Returns:
        The instructions that do the node's work or use the tensor, the decisions behind them, the collectives before
        and after them, and what the report says of the name. `is` says what it names.

    Raises:
        InvalidArgument: nothing has that name; the hint holds names like it.
    """
    known = _names(plan)
    if name not in known:
        name = _meant(name, known)
    kind, own = known[name]
    found: Json = {"name": name, "is": kind}
    if kind == "weight":
        (weight,) = (entry for entry in all_weights(plan) if entry["name"] == name)
        recipe = next(weight.recipe for weight in plan.plan.weights if weight.name == name)
        found |= {"weight": weight, "sources": list(dict.fromkeys(sources(recipe)))}
    elif kind not in ("node", "instruction"):
        found["tensors"] = [entry for entry in all_tensors(plan) if entry["name"] == name]
    makers = {at for tensor in found.get("tensors", ()) for at in tensor["made_by"]} or set(own)
    numbers = sorted({number for at in makers for number in plan.instructions[at]["decisions"]})
    decisions = plan.report.get("decisions", ())
    return {
        **found,
        "instructions": [plan.instructions[at] for at in own],
        "collectives": _around(plan, own),
        "decisions": [decisions[number] for number in numbers],
        **{
            section: [dict(entry) for entry in plan.report.get(section, ()) if name in _named_in(entry)]
            for section in ("attention", "replicated", "fallback", "uneven", "patterns")
        },
    }


def _names(plan: Joined) -> dict[str, tuple[str, list[int]]]:
    """Everything that can be looked up: what it is, and its instructions. A node comes before a tensor of its name."""
    found: dict[str, tuple[str, list[int]]] = {}

    def add(name: str, kind: str, at: Iterable[int]) -> None:
        own = found.setdefault(name, (kind, []))
        if own[0] == kind or (kind == "activation" and own[0] in ("input", "output")):
            own[1].extend(number for number in at if number not in own[1])

    for entry in plan.instructions:
        at = entry["instruction"]
        add(f"#{at}", "instruction", [at])
        if not isinstance(plan.program.instructions[at], Collective):
            for node in entry["nodes"]:
                add(node, "node", [at])
    for weight in all_weights(plan):
        add(weight["name"], "weight", weight["read_by"])
    every = all_tensors(plan)
    for tensor in sorted(every, key=lambda tensor: tensor["role"] == "activation"):
        add(tensor["name"], tensor["role"], [*tensor["made_by"], *tensor["read_by"]])
    for entry in plan.instructions:  # nodes of which only collectives are left
        for node in entry["nodes"]:
            add(node, "node", [entry["instruction"]] if node not in found else [])
    found.pop("", None)
    return found


def _meant(name: str, known: Mapping[str, Any]) -> str:
    """The one known name that holds what was given."""
    holding = [full for full in known if name.lower() in full.lower() and not full.startswith("#")]
    same = [full for full in known if full.lower() == name.lower()]
    if len(same or holding) == 1:
        return (same or holding)[0]
    near = holding[:MOST] or difflib.get_close_matches(name, known, n=MOST, cutoff=0.4)
    more = f", and {len(holding) - MOST} more" if len(holding) > MOST else ""
    hint = f"did you mean {', '.join(near)}{more}?" if near else "--what instructions lists what there is"
    several = f"{len(holding)} names hold '{name}'" if holding else f"the plan has no node and no tensor '{name}'"
    raise InvalidArgument(several, hint=hint, code="OM5012")


def _named_in(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return (entry.get("node"), entry.get("name"))


def _around(plan: Joined, own: list[int]) -> list[Json]:
    """Collectives that send what these instructions read or make, or that they are."""
    mine = set(own)
    found = []
    for entry in collectives(plan):
        at = entry["instruction"]
        where = [
            *(["itself"] if at in mine else []),
            *(["before"] if mine & set(entry["read_by"]) else []),
            *(["after"] if mine & set(entry["made_by"]) else []),
        ]
        if where:
            found.append({**entry, "where": where[0]})
    return found
