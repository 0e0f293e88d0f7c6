"""The scoreboard of the standard's test suite: how many tests pass, how, and why the others do not."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from onnxmesh.backend.suite import PASSED, Outcome, Status

Json = dict[str, Any]

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "backend.json"
DOCUMENT, README = ROOT / "docs" / "backend.md", ROOT / "README.md"
MARK = "scoreboard"

STATUSES: tuple[Status, ...] = get_args(Status)

KNOWN: Mapping[str, str] = {
    "test_bernoulli*": "the output is random, and was drawn by another generator",
    "test_attention_4d_causal_fp16_expanded": "the expected float16 output is rounded after every step; ours is nearer "
    "to the exact one",
    "test_loop16_seq_none": "the runner asks the elements of a sequence for their length, and a scalar has none; the "
    "outputs are equal",
    "test_dft_inverse*": "on a GPU: the expected output holds rounding errors of 1e-7 where zeros belong, and next "
    "to no absolute error is allowed",
    "test_image_decoder*": "images are decoded by Pillow, where it is installed",
}
"""By a pattern of test names, what is known of those that do not pass."""


def tally(outcomes: Sequence[Outcome], seconds: float) -> Json:
    """One device's row of the scoreboard, as JSON data."""
    return {
        "seconds": round(seconds),
        "kinds": _counts(outcomes, lambda outcome: outcome.kind),
        "domains": _counts(outcomes, lambda outcome: outcome.domain),
        "fallback": {o.name: list(o.ops) for o in outcomes if o.status == "fallback"},
        "exceptions": {o.name: reason(o) for o in outcomes if o.status not in PASSED},
    }


def reason(outcome: Outcome) -> str:
    """Why a test does not pass: what is known of it, and what the run said."""
    known = next((text for pattern, text in KNOWN.items() if fnmatch.fnmatch(outcome.name, pattern)), "")
    return f"{known} ({outcome.reason})" if known else outcome.reason


def _counts(outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> Json:
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(key(outcome), Counter())[outcome.status] += 1
    return {name: {status: found[status] for status in STATUSES} for name, found in counts.items()}


# --- stored -------------------------------------------------------------------------------------------------


def load() -> Json:
    """The stored scoreboard: the version of onnx, and a row for every device."""
    return dict(json.loads(STORED.read_text())) if STORED.exists() else {"onnx": "", "devices": {}}


def store(device: str, row: Json, onnx_version: str) -> None:
    """Put a device's row into the stored scoreboard, and the tables into the documents."""
    board = load()
    kept = board["devices"] if board["onnx"] == onnx_version else {}
    board = {"onnx": onnx_version, "devices": {**kept, device: row}}
    STORED.write_text(json.dumps(board, indent=1) + "\n")
    put(DOCUMENT, text(board), MARK)
    put(README, summary(board), MARK)


def put(document: Path, content: str, mark: str) -> None:
    """Write what stands between two marks of a document anew."""
    first, last = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, begin, rest = document.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{document} has no lines {first} and {last}")
    document.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}")


# --- as text ------------------------------------------------------------------------------------------------

_HEAD = ["passed", "of", "natively", "in part on the host", "folded", "by the fallback", "failed", "unsupported"]


def text(board: Json) -> str:
    """The scoreboard as Markdown."""
    parts = [f"onnx {board['onnx']}."]
    for device, row in sorted(board["devices"].items()):
        parts += [f"## {device}", row_text(row)]
    return "\n\n".join(parts)


def row_text(row: Json) -> str:
    """One device's row as Markdown: counts, what the fallback computed, every exception."""
    parts = [
        _table("tests", row["kinds"]),
        _table("domain", row["domains"]),
        f"{row['seconds']} seconds.",
    ]
    if row["fallback"]:
        ops = Counter(op for ops in row["fallback"].values() for op in ops)
        listed = ", ".join(f"{op} ({count})" for op, count in sorted(ops.items()))
        parts.append(f"The fallback computed, in so many tests: {listed}.")
    if row["exceptions"]:
        lines = [f"| `{name}` | {_cell(why)} |" for name, why in sorted(row["exceptions"].items())]
        parts.append("\n".join(["| does not pass | because |", "|---|---|", *lines]))
    return "\n\n".join(parts)


def summary(board: Json) -> str:
    """The table for the README: tests that pass, by device."""
    kinds = list(dict.fromkeys(kind for row in board["devices"].values() for kind in row["kinds"]))
    lines = [f"| onnx {board['onnx']} | {' | '.join(kinds)} | by the fallback |", "|---" * (len(kinds) + 2) + "|"]
    for device, row in sorted(board["devices"].items()):
        cells = [f"{_passed(row['kinds'][kind])} of {sum(row['kinds'][kind].values())}" for kind in kinds]
        lines.append(f"| {device} | {' | '.join(cells)} | {len(row['fallback'])} |")
    return "\n".join(lines)


def _table(title: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    lines = [f"| {title} | {' | '.join(_HEAD)} |", "|---" * (len(_HEAD) + 1) + "|"]
    for name, found in counts.items():
        numbers = [_passed(found), sum(found.values()), *(found.get(status, 0) for status in STATUSES)]
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def _passed(found: Mapping[str, int]) -> int:
    return sum(found.get(status, 0) for status in PASSED)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("<", "&lt;")
