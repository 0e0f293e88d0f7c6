"""What came of the plans: each one's outputs against the reference, and a table of them all."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from plans import DTYPES, Trial, folder_of
from references import largest, plain, rounded, sensitivity
from shares import TOLERANCE

from onnxmesh.runtime.serialize import load

MOST = 2.0
"""How many times its sensitivity a model may be off."""
_LISTED = 16
_SHOWN = 100
"""How many lines the table has of each kind, and characters of a failure."""


@dataclass(frozen=True)
class Verdict:
    """One plan's run.

    Attributes:
        error: the largest relative error of an output, against the model in float32.
        where: that output, and the seed of the inputs.
        rounded: the same against the model whose weights alone are rounded, where `error` is too large in bfloat16.
        sensitivity: how far the float32 model's own outputs move when it rounds, where both are too large.
        failure: what is wrong; empty if nothing is.
        captured: whether a run was one CUDA graph; `reason` says why not.
        generic: the instructions that ran on generic kernels.
        differing: how many outputs differed in some bit between runs on the same inputs.
        ready, first, again: seconds until it was ready to run, of the first run, and of one of the last.
    """

    key: str
    name: str
    ranks: int
    precision: str
    error: float = float("nan")
    where: str = ""
    rounded: float | None = None
    sensitivity: float | None = None
    failure: str = ""
    captured: bool = False
    reason: str = ""
    generic: Sequence[str] = field(default=())
    differing: int = 0
    ready: float = 0.0
    first: float = 0.0
    again: float = 0.0


def judge(trial: Trial, result: Mapping[str, Any], plans: Path, references: Path) -> Verdict:
    """Compare the outputs of a run, as rank.py gives it, with the reference: the whole model in float32.

    In bfloat16 rounding the weights alone costs some models more than the tolerance. A converted plan that misses it
    there must be as near to the model with its weights rounded. Where that is missed too, the error may be MOST times
    the model's sensitivity: how far its own float32 outputs move when weights and linears round.
    """
    place = (trial.key, trial.name, trial.case.mesh.size, trial.precision)
    if "error" in result:
        return Verdict(*place, failure=result["error"])
    try:
        return _compared(trial, result, plans, references)
    except Exception as error:
        return Verdict(*place, failure=f"nothing to compare with: {type(error).__name__}: {error}")


def _compared(trial: Trial, result: Mapping[str, Any], plans: Path, references: Path) -> Verdict:
    place = (trial.key, trial.name, trial.case.mesh.size, trial.precision)
    with np.load(result["file"]) as file:
        ours = dict(file)
    allowed, near, moves, failure = TOLERANCE[trial.dtype], None, None, ""
    error, where = largest(ours, plain(references, trial.name))
    if not error <= allowed:
        failure = f"off by {error:.1e} at {where}"
        if trial.converted and trial.precision == "bf16":
            plan = load(folder_of(plans, trial))
            near = largest(ours, rounded(references, trial.name, plan, trial.dtype))[0]
            moves = None if near <= allowed else sensitivity(references, trial.name, plan, trial.dtype)
            failure += f"; with weights rounded {near:.1e}; sensitivity {moves or 0:.1e}"
            failure = "" if near <= allowed or (moves and error <= MOST * moves) else failure
    kept = {key: result[key] for key in ("captured", "reason", "generic", "differing", "ready", "first", "again")}
    return Verdict(*place, error, where, near, moves, failure, **kept)


# --- the table ----------------------------------------------------------------------------------------------


def summary(verdicts: Sequence[Verdict]) -> list[str]:
    """A few lines for each number of ranks and precision, in markdown."""
    lines = [
        "| ranks | precision | plans | failed | largest error | where | beyond 2e-2 "
        "| most with weights rounded | beyond both | in one graph | generic kernels | median ms a run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in sorted({verdict.ranks for verdict in verdicts}):
        for precision in DTYPES:
            some = [item for item in verdicts if item.ranks == ranks and item.precision == precision]
            if some:
                lines.append(_row(ranks, precision, some))
    return [*lines, "", *_failures(verdicts), *_beyond(verdicts), *_remarks(verdicts)]


def _row(ranks: int, precision: str, some: Sequence[Verdict]) -> str:
    ran = [item for item in some if item.error == item.error]
    worst = max(ran, key=lambda item: item.error, default=None)
    near = [item.rounded for item in some if item.rounded is not None]
    cells = [
        *(ranks, precision, len(some), sum(bool(item.failure) for item in some)),
        *((f"{worst.error:.1e}", worst.key) if worst else ("", "")),
        *(len(near), f"{max(near):.1e}" if near else "", sum(item.sensitivity is not None for item in some)),
        *(sum(item.captured for item in ran), sum(len(item.generic) for item in ran)),
        f"{1000 * statistics.median(item.again for item in ran):.2f}" if ran else "",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _failures(verdicts: Sequence[Verdict]) -> Iterator[str]:
    failed = [item for item in verdicts if item.failure]
    yield f"{len(verdicts)} plans, {len(failed)} failed"
    for item in failed[:_LISTED]:
        yield f"  FAILED {item.key}: {' '.join(item.failure.split())[-_SHOWN:]}"
    if failed[_LISTED:]:
        names = Counter(item.name for item in failed[_LISTED:])
        yield "  FAILED too: " + ", ".join(f"{name} {count}x" for name, count in names.most_common())


def _beyond(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The models that bfloat16 takes further from float32 than the tolerance, by rounding their weights."""
    found: dict[str, list[Verdict]] = {}
    for item in verdicts:
        if item.rounded is not None:
            found.setdefault(item.name, []).append(item)
    for name, items in sorted(found.items(), key=lambda pair: -max(item.error for item in pair[1]))[:_LISTED]:
        pairs = [(item.error, item.rounded or 0.0) for item in items]
        error, near = (max(column) for column in zip(*pairs))
        moves = max((item.sensitivity for item in items if item.sensitivity), default=0.0)
        more = f", sensitivity {moves:.1e}" if moves else ""
        yield f"  {name} in bf16, {len(items)} plans: {error:.1e} from float32, {near:.1e} with weights rounded{more}"


def _remarks(verdicts: Sequence[Verdict]) -> Iterator[str]:
    ran = [item for item in verdicts if item.error == item.error]
    yield f"{sum(item.differing > 0 for item in ran)} plans whose outputs differ in some bit from run to run"
    reasons = Counter(re.sub(r"\d+", "#", item.reason)[:_SHOWN] for item in ran if not item.captured)
    yield from (f"  not in one graph: {count} x {reason}" for reason, count in reasons.most_common(5))
    kernels = Counter(_kernel(text) for item in ran for text in item.generic)
    if kernels:
        yield "on generic kernels: " + ", ".join(f"{name} {count}x" for name, count in kernels.most_common(12))
    slow = sorted(ran, key=lambda item: -item.ready)[:4]
    yield "slowest to get ready: " + ", ".join(f"{item.key} {item.ready:.1f} s" for item in slow)


def _kernel(text: str) -> str:
    """`instruction 5, Softmax of node 'x'`: Softmax."""
    return text.split(", ", 1)[-1].split(" of node", 1)[0]
