"""The result of a benchmark as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from onnxmesh.runtime.text import WIDTH, micros, percent, size, table

Result = Mapping[str, Any]
ROWS = 12


def bench_text(result: Result, *, full: bool = False) -> str:
    """All of it; `full` cuts no table short."""
    sections = [_head(result), _graph(result), _ranks(result), _memory(result), _kernels(result, full)]
    return "\n\n".join(section for section in sections if section)


def _head(result: Result) -> str:
    mesh = " x ".join(f"{axis}={ranks}" for axis, ranks in result["mesh"].items() if ranks > 1) or "one rank"
    latency, rate = result["latency_us"], result["throughput"]
    lines = [
        f"Mesh {mesh} on {result['device']}, {result['runs']} runs after {result['warmup']}",
        table(
            ["", "p50", "p90", "p99", "min", "max"],
            [["latency", *(micros(latency[name]) for name in ("p50", "p90", "p99", "min", "max"))]],
        ),
        f"back to back {micros(result['back_to_back_us'])} a run: {rate['runs_per_s']:.4g} runs, "
        f"{rate['samples_per_s']:.4g} samples, {rate['tokens_per_s']:.4g} tokens a second",
    ]
    predicted = result["predicted"]
    if predicted is not None:
        lines.append(
            f"predicted {micros(predicted['total_us'])} ({predicted['device']}): measured latency is "
            f"{predicted['latency_ratio']:.2f} times that, back to back {predicted['back_to_back_ratio']:.2f} times"
        )
    return "\n".join(lines)


def _graph(result: Result) -> str:
    graph = result["graph"]
    if graph is None:
        return ""
    lines = ["The program runs as one CUDA graph" if graph["captured"] else "The program is not one CUDA graph"]
    lines += [f"not captured: {reason}" for reason in graph["not_captured"][:ROWS]]
    if graph["generic"]:
        some = "; ".join(graph["generic"][:3])
        lines.append(f"without a kernel of their own: {len(graph['generic'])} instructions, such as {some}")
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False) for line in lines)


def _ranks(result: Result) -> str:
    names = ("compute", "communication", "waiting", "beside", "idle", "total")
    rows = [[own["rank"], *(micros(own[f"{name}_us"]) for name in names)] for own in result["per_rank"]]
    header = ["rank", "kernels", "sending", "waiting", "of it beside kernels", "idle", "in all"]
    return f"One profiled run\n{table(header, rows)}"


def _memory(result: Result) -> str:
    memory = result["memory"]
    kinds = list(dict.fromkeys(kind for own in memory["per_rank"] for kind in own["by_kind"]))
    rows = [
        [own["rank"], *(size(own["by_kind"].get(kind, 0)) for kind in kinds), size(own["allocated_bytes"])]
        for own in memory["per_rank"]
    ]
    on_gpu = result["graph"] is not None
    text = f"Memory\n{table(['rank', *kinds, 'allocated' if on_gpu else 'process'], rows)}"
    if on_gpu:
        most = max(own["allocated_bytes"] for own in memory["per_rank"])
        ratio = percent(most / memory["predicted_bytes"])
        text += f"\npredicted at most {size(memory['predicted_bytes'])}: {ratio} of it were allocated"
    return text


def _kernels(result: Result, full: bool) -> str:
    rows = [
        [
            entry["kernel"],
            entry["count"],
            micros(entry["measured_us"]),
            "" if entry["predicted_us"] is None else micros(entry["predicted_us"]),
            f"{entry['measured_us'] / entry['predicted_us']:.2f}" if entry["predicted_us"] else "",
        ]
        for entry in result["kernels"]
    ]
    header = ["kernel", "count", "measured", "predicted", "ratio"]
    return f"Where the time goes\n{table(header, rows, limit=None if full else ROWS)}"
