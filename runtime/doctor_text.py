"""What the doctor found, as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from onnxmesh.runtime.text import WIDTH, micros, size, table

Found = Mapping[str, Any]


def doctor_text(found: Found) -> str:
    """All of it."""
    sections = [_host(found), _gpus(found), _links(found), _libraries(found), _environment(found), _collectives(found)]
    return "\n\n".join(section for section in [*sections, _problems(found)] if section)


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False)


def _host(found: Found) -> str:
    host = found["host"]
    memory = size(host["memory_bytes"]) if host["memory_bytes"] else "?"
    rows = [
        ["system", host["system"]],
        ["cores, memory", f"{host['cores']}, {memory}"],
        ["Python, NumPy, onnxmesh", f"{host['python']}, {host['numpy']}, {host['onnxmesh'] or 'not installed'}"],
        ["BLAS of the CPU", host["blas"] or "unknown"],
        ["MPI launcher", host["mpirun"] or "none"],
        ["cache", found["cache"]["folder"]],
    ]
    return f"Host {host['name']}\n{table(['', ''], rows)}"


def _gpus(found: Found) -> str:
    if not found["gpus"]:
        return _wrap(f"No GPU can be used ({found['no_gpu']}). Plans run on the CPU, with --device cpu.")
    cuda = found["cuda"]
    rows = [
        [gpu["index"], gpu["name"], size(gpu["memory_bytes"]), gpu["compute_capability"], gpu["processors"]]
        for gpu in found["gpus"]
    ]
    versions = (
        f"driver {found['driver'] or '?'} (CUDA up to {cuda['driver_supports'] or '?'}), "
        f"CUDA {cuda['runtime'] or '?'}, NCCL {cuda['nccl'] or 'missing'}, cuDNN {cuda['cudnn'] or 'missing'}"
    )
    return f"GPUs\n{table(['', 'name', 'memory', 'capability', 'processors'], rows)}\n{_wrap(versions)}"


def _links(found: Found) -> str:
    """One line where all pairs are alike, else a table of them."""
    links = found["links"]
    kinds = {link["kind"] for link in links}
    if not links:
        return ""
    if len(kinds) == 1:
        return f"Links: {kinds.pop()} between all pairs of GPUs"
    return "Links\n" + table(["GPU", "GPU", "kind"], [[link["a"], link["b"], link["kind"]] for link in links])


def _libraries(found: Found) -> str:
    rows = [[each["name"], ", ".join(each["installed"])] for each in found["libraries"] if each["installed"]]
    missing = [
        _wrap(f"missing: {each['name']}. Without it {each['cost']}. {each['install']}")
        for each in found["libraries"]
        if not each["installed"]
    ]
    return "\n".join(["Libraries", *([table(["", ""], rows)] if rows else []), *missing])


def _environment(found: Found) -> str:
    rows = [[f"{name}={value}", found["notes"].get(name, "")] for name, value in found["environment"].items()]
    return f"Environment\n{table(['', ''], rows)}" if rows else ""


def _collectives(found: Found) -> str:
    """Latency and bus bandwidth, a row for each collective and number of ranks, a column for each size."""
    rows = found["collectives"]
    if not rows:
        return ""
    sizes = sorted({row["bytes"] for row in rows})
    kinds = dict.fromkeys((row["kind"], row["ranks"]) for row in rows)
    by = {(row["kind"], row["ranks"], row["bytes"]): row for row in rows}
    cells = [[kind, ranks, *(_cell(by.get((kind, ranks, each))) for each in sizes)] for kind, ranks in kinds]
    text = table(["collective", "ranks", *map(size, sizes)], cells)
    right = "every result was right" if all(row["correct"] for row in rows) else "SOME RESULTS WERE WRONG"
    return f"Collectives in a CUDA graph: time, and GB/s on the bus ({found['seconds']} s; {right})\n{text}"


def _cell(row: Mapping[str, Any] | None) -> str:
    return f"{micros(row['us'])} {row['bus_GB_s']:.0f}" if row else ""


def _problems(found: Found) -> str:
    lines = [_wrap(f"problem: {text}") for text in found["problems"]]
    if found["profile"]:
        lines.append(f"The device profile is in {found['profile']}: onnxmesh compile --profile {found['profile']} ...")
    return "\n".join(lines)
