"""Put the measurements of ours.py, peers.py and check.py side by side.

python benchmarks/gpu/table.py FOLDER [--docs docs/benchmarks.md] [--results benchmarks/results]

FOLDER holds ours.jsonl, peers.jsonl and check.jsonl; what is missing is left blank. With `--docs` the tables take the
place of those in the document, with `--results` the measurements are kept as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from processes import Json, lines
from shapes import WORKS, Work, floor_ms

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
TITLES = {
    "flux-4608": "FLUX, 4096 + 512 tokens",
    "flux-16896": "FLUX, 16384 + 512 tokens",
    "flux-66048": "FLUX, 65536 + 512 tokens (a video's)",
    "llama-4096": "Llama-3-70B's layers, a prompt of 4096 tokens",
    "llama-1": "Llama-3-70B's layers, one token",
}


def main() -> None:
    """Print the tables, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    ours, peers, checks = (latest(lines(given.folder / f"{name}.jsonl")) for name in ("ours", "peers", "check"))
    text = tables(ours, peers, checks)
    print(text)
    if given.docs is not None:
        before, _, rest = given.docs.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        given.docs.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    if given.results is not None:
        given.results.mkdir(parents=True, exist_ok=True)
        for name, found in (("ours", ours), ("peers", peers), ("check", checks)):
            (given.results / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def latest(found: Iterable[Json]) -> list[Json]:
    """Of each configuration the last measurement; an error only if there is none."""
    kept: dict[tuple[str, int, str], Json] = {}
    for line in found:
        key = (line["work"], line["ranks"], line["configuration"])
        if key not in kept or "error" not in line or "error" in kept[key]:
            kept[key] = line
    return list(kept.values())


def tables(ours: Sequence[Json], peers: Sequence[Json], checks: Sequence[Json]) -> str:
    """All tables, as Markdown."""
    parts = [_summary(ours, peers)]
    for work in WORKS:
        rows = [*_configurations(work, ours, "onnxmesh"), *_configurations(work, peers, "peer")]
        if rows:
            heads = ["GPUs", "", "configuration", "ms", "back to back", "predicted", "sent", "memory", "note"]
            parts.append(f"### {TITLES[work.name]}\n\n{markdown(heads, rows)}")
    if checks:
        rows = [
            [line["work"], str(line["ranks"]), line["configuration"], _small(line.get("our_error")),
             _small(line.get("torch_error")), line.get("error", "")]
            for line in checks
        ]  # fmt: skip
        heads = ["work", "GPUs", "configuration", "onnxmesh", "torch", "note"]
        parts.append(f"### Errors against torch in float32, both in bf16\n\n{markdown(heads, rows)}")
    return "\n\n".join(parts)


def _summary(ours: Sequence[Json], peers: Sequence[Json]) -> str:
    """The fastest of each side, and whether the mark is met."""
    heads = ["work", "GPUs", "floor", "onnxmesh", "", "peer", "", "ratio", "back to back", "mark", "predicted"]
    rows = []
    for work in WORKS:
        alone = fastest(ours, work, 1)
        for ranks in sorted(work.ranks):
            own, other = fastest(ours, work, ranks), fastest(peers, work, ranks)
            if own is None and other is None:
                continue
            busy = fastest(ours, work, ranks, "back_to_back_ms"), fastest(peers, work, ranks, "back_to_back_ms")
            rows.append(
                [
                    work.name,
                    str(ranks),
                    f"{floor_ms(work, ranks):.2f}",
                    *_named(own),
                    *_named(other),
                    _ratio(own, other, "latency_ms"),
                    _ratio(*busy, "back_to_back_ms"),
                    _mark(work, ranks, own, other, alone),
                    _predicted(own),
                ]
            )
    return markdown(heads, rows)


def fastest(found: Iterable[Json], work: Work, ranks: int, key: str = "latency_ms") -> Json | None:
    """The fastest configuration of a side; None if none was measured."""
    measured = [line for line in found if (line["work"], line["ranks"]) == (work.name, ranks) and key in line]
    return min(measured, key=lambda line: float(line[key]), default=None)


def _named(line: Json | None) -> list[str]:
    return ["", ""] if line is None else [f"{line['latency_ms']:.2f}", line["configuration"]]


def _ratio(own: Json | None, other: Json | None, key: str) -> str:
    return f"{own[key] / other[key]:.2f}" if own is not None and other is not None else ""


def _mark(work: Work, ranks: int, own: Json | None, other: Json | None, alone: Json | None) -> str:
    """The mark, and whether it is met."""
    if ranks in work.speedup:
        wanted = work.speedup[ranks]
        if own is None or alone is None:
            return f"{wanted} x 1 GPU"
        speedup = alone["latency_ms"] / own["latency_ms"]
        return f"{wanted} x 1 GPU: {speedup:.2f}, {'met' if speedup >= wanted else 'missed'}"
    if ranks not in work.marks:
        return ""
    wanted = work.marks[ranks]
    if own is None or other is None:
        return f"{wanted:.2f}"
    return f"{wanted:.2f}: {'met' if own['latency_ms'] <= wanted * other['latency_ms'] else 'missed'}"


def _predicted(own: Json | None) -> str:
    if own is None or not own.get("predicted_ms"):
        return ""
    return f"{own['predicted_ms']:.2f} ({own['latency_ms'] / own['predicted_ms']:.2f} x)"


def _configurations(work: Work, found: Iterable[Json], side: str) -> list[list[str]]:
    """A row for each configuration, by GPUs and then by time."""
    own = [line for line in found if line["work"] == work.name]
    own.sort(key=lambda line: (line["ranks"], line.get("latency_ms", float("inf"))))
    return [
        [
            str(line["ranks"]),
            side,
            line["configuration"],
            _number(line, "latency_ms", 1.0, ".2f"),
            _number(line, "back_to_back_ms", 1.0, ".2f"),
            _number(line, "predicted_ms", 1.0, ".2f"),
            _number(line, "bytes_sent", 1e-6, ".0f", " MB"),
            _number(line, "memory_bytes", 1e-9, ".2f", " GB"),
            _note(line),
        ]
        for line in own
    ]


def _note(line: Json) -> str:
    if "error" in line:
        return str(line["error"])[:160].replace("|", "/")
    spent = line.get("rank_us")
    if spent is None:
        return "" if line.get("whole_graph", True) else "breaks in the compiled graph"
    names = {"compute_us": "compute", "communication_us": "sending", "waiting_us": "waiting", "idle_us": "idle"}
    return ", ".join(f"{word} {spent[name] / 1000:.2f}" for name, word in names.items() if name in spent)


def _number(line: Json, key: str, factor: float, form: str, unit: str = "") -> str:
    return f"{line[key] * factor:{form}}{unit}" if key in line else ""


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    bar = "|".join(" --- " for _ in heads)
    return "\n".join([f"| {' | '.join(heads)} |", f"|{bar}|", *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    main()
