"""What the node tests on two ranks show, by operator: counts, and what is left whole and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxmesh.backend.scoreboard import DOCUMENT, ROOT, put
from onnxmesh.backend.sharded import RANKS, Outcome

Json = dict[str, Any]
Outcomes = Sequence[Outcome]

STORED = ROOT / "benchmarks" / "results" / "sharded.json"
MARK = "sharded"
FOLDED = "nothing of it is left to run: it is folded, or a view"


def tally(tests: int, outcomes: Outcomes, seconds: float) -> Json:
    """The outcomes as JSON data.

    Args:
        tests: how many there are; those that do not run on one rank have no outcome.
    """
    cut: Counter[str] = Counter()
    ways: Counter[str] = Counter()
    for outcome in outcomes:
        cut.update(op for op, _ in outcome.cut)
        ways.update(dict(outcome.cut))
    return {
        "ranks": RANKS,
        "seconds": round(seconds),
        "tests": {
            "all": tests,
            "run": len(outcomes),
            "cut": sum(1 for o in outcomes if o.cut),
            "whole": sum(1 for o in outcomes if not o.cut and o.whole),
            "folded": sum(1 for o in outcomes if not o.cut and not o.whole),
        },
        "ops": {op: {"tests": cut[op], "ways": ways[op]} for op in sorted(cut)},
        "small": sorted({op for o in outcomes for op, rule, _ in o.whole if rule} - set(cut)),
        "no rule": dict(sorted((op, why) for o in outcomes for op, rule, why in o.whole if not rule and op not in cut)),
        "operators": _operators(outcomes),
        "wrong": {o.name: list(o.wrong) for o in outcomes if o.wrong},
    }


def _operators(outcomes: Outcomes) -> Json:
    """ONNX's operators: those that were cut, with the tests in which they were, and why the others were not."""
    cut: Counter[str] = Counter()
    whole: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        if outcome.operator and outcome.cut:
            cut[outcome.operator] += 1
        elif outcome.operator:
            whole.setdefault(outcome.operator, Counter()).update([why for *_, why in outcome.whole] or [FOLDED])
    left = {name: max(why, key=why.__getitem__) for name, why in sorted(whole.items()) if name not in cut}
    return {"cut": dict(sorted(cut.items())), "whole": left}


def load() -> Json:
    """The stored counts."""
    return dict(json.loads(STORED.read_text()))


def store(row: Json, onnx_version: str) -> None:
    """Keep the counts, and put them into the document."""
    row = {"onnx": onnx_version, **row}
    STORED.write_text(json.dumps(row, indent=1) + "\n")
    put(DOCUMENT, text(row), MARK)


def text(row: Json) -> str:
    """The counts as Markdown."""
    tests, operators, ops = row["tests"], row["operators"], row["ops"]
    ways = sum(entry["ways"] for entry in ops.values())
    parts = [
        f"Of {tests['all']} node tests {tests['run']} run on one rank. On {row['ranks']} ranks {tests['cut']} of these "
        f"have a node that was cut, in {ways} ways in all; in {tests['whole']} every rank computes all, and of "
        f"{tests['folded']} nothing is left to run. {len(row['wrong'])} give anything else than one rank does.",
        f"**{len(operators['cut'])} operators of ONNX were cut**, in so many tests of their own:\n"
        f"{_listed(operators['cut'])}.",
        f"In normal form these are {len(ops)} ops, in so many ways:\n"
        f"{_listed({op: entry['ways'] for op, entry in ops.items()})}.",
        f"{len(operators['whole'])} operators were left whole:",
        _reasons(operators["whole"]),
        f"Ops of the normal form with a rule, but in no node test a dim to cut: {', '.join(row['small']) or 'none'}.",
        "Ops of the normal form without a rule:",
        _reasons(row["no rule"]),
    ]
    if row["wrong"]:
        parts += ["Wrong:", "\n".join(f"- `{name}`: {found[0]}" for name, found in row["wrong"].items())]
    return "\n\n".join(parts)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _reasons(why: Mapping[str, str]) -> str:
    """Names by the reason that they share."""
    shared: dict[str, list[str]] = {}
    for name, reason in why.items():
        shared.setdefault(reason, []).append(name)
    rows: Iterable[str] = (f"| {reason} | {', '.join(found)} |" for reason, found in sorted(shared.items()))
    return "\n".join(["| because | |", "|---|---|", *rows])
