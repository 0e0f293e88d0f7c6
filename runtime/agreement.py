"""Whether all ranks are about to run the same thing: compared once, before the first run, by a collective."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from onnxmesh.runtime import planjson
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.plan import Plan

Facts = Mapping[str, str]
"""What must be equal on all ranks, and what it is here."""

Move = Callable[[Any], Any]

_SHORT = 12


def _stay(array: Any) -> Any:
    return array


def plan_facts(plan: Plan) -> dict[str, str]:
    """The plan with the digests of its weights, its mesh, and the version of this package."""
    return {"plan": hashlib.sha256(planjson.text(plan, "")).hexdigest(), "mesh": str(plan.mesh), "onnxmesh": _version()}


def agree(comm: Communicator, facts: Facts, put: Move = _stay, get: Move = _stay) -> None:
    """Return if every rank has the same facts. All ranks call it together; one rank alone agrees with itself.

    Args:
        put: moves an array of the host to where the communicator wants it.
        get: moves it back.

    Raises:
        PlanError: on every rank, with the facts that differ and which ranks have which.
    """
    if comm.mesh.size == 1:
        return

    def gather(data: bytes) -> list[bytes]:
        everyone = tuple(range(comm.mesh.size))
        got = get(comm.all_gather(put(np.frombuffer(data, np.uint8).copy()), everyone))
        return [bytes(part) for part in got.reshape(len(everyone), -1)]

    text = json.dumps(facts, sort_keys=True).encode()
    if len(set(gather(hashlib.sha256(text).digest()))) == 1:
        return
    longest = max(int.from_bytes(size, "little") for size in gather(len(text).to_bytes(8, "little")))
    require([json.loads(data) for data in gather(text.ljust(longest))])


def require(everyone: Sequence[Facts]) -> None:
    """Raise PlanError, as `agree` does, unless the facts of all ranks, in their order, are the same."""
    if any(facts != everyone[0] for facts in everyone):
        raise PlanError(f"the ranks do not run the same: {differences(everyone)}", code="OM4202")


def differences(everyone: Sequence[Facts]) -> str:
    """What differs among the facts of all ranks, in words."""
    names = dict.fromkeys(name for facts in everyone for name in facts)
    parts = []
    for name in names:
        holders: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            holders.setdefault(facts.get(name, "none"), []).append(rank)
        if len(holders) > 1:
            parts.append(f"{name} is " + ", ".join(f"{_short(value)} on {_ranks(r)}" for value, r in holders.items()))
    return "; ".join(parts)


def _short(value: str) -> str:
    is_digest = len(value) == 64 and all(c in "0123456789abcdef" for c in value)
    return value[:_SHORT] if is_digest else value


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


@cache
def _version() -> str:
    try:
        return version("onnxmesh")
    except PackageNotFoundError:
        return "unknown"
