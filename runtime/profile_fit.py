"""From measured rows to a device profile: the few constants of each model, by least squares of the logarithms.

The rows are those of runtime/cuda/measure.py. A residual is log(predicted / measured), so that a kernel of 5 us counts
as much as one of 5 ms; single bad rows weigh less (scipy.optimize.least_squares, loss `soft_l1`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import exp, log
from typing import Any

import numpy as np

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.profile import COLLECTIVES, Attention, Curve, DeviceProfile, Gemm

Row = Mapping[str, Any]
Parameters = Sequence[float]


def fit(name: str, processors: int, rows: Mapping[str, Any], about: Mapping[str, Any]) -> DeviceProfile:
    """The profile of a GPU.

    Args:
        name, processors: the GPU's name and its number of multiprocessors.
        rows: what `measure profile` wrote.
        about: when, where and with what it was measured.
    """
    return DeviceProfile(
        name=name,
        processors=processors,
        gemm={kind: fit_gemm(own, processors) for kind, own in _by_dtype(rows["gemm"]).items()},
        attention={kind: fit_attention(own, processors) for kind, own in _by_dtype(rows["attention"]).items()},
        memory=Curve.through({row["bytes"]: row["us"] for row in rows["memory"]}),
        links=_links(rows["collectives"]),
        contention=float(rows["contention"]),
        about=about,
    )


def fit_gemm(rows: Sequence[Row], processors: int) -> Gemm:
    """From rows of one dtype, with m, n, k and us."""

    def predict(p: Parameters, row: Row) -> float:
        return Gemm(*p)(1, row["m"], row["n"], row["k"], gemm_bytes(row), processors)

    rate = max(2.0 * row["m"] * row["n"] * row["k"] / row["us"] for row in rows)
    bandwidth = max(gemm_bytes(row) / row["us"] for row in rows)
    return Gemm(*_fit(predict, (rate, bandwidth, 0.5 * min(row["us"] for row in rows)), rows))


def fit_attention(rows: Sequence[Row], processors: int) -> Attention:
    """From rows of one dtype, with heads, kv_heads, s, t, d, causal and us."""

    def predict(p: Parameters, row: Row) -> float:
        return Attention(*p)(
            row["heads"], row["s"], row["t"], 2 * row["d"],
            causal=row["causal"], nbytes=attention_bytes(row), processors=processors,
        )  # fmt: skip

    work = [(row, 4.0 * row["heads"] * row["s"] * row["t"] * row["d"] / row["us"]) for row in rows]
    rate = max(speed for row, speed in work if not row["causal"])
    causal = max((speed / 2 for row, speed in work if row["causal"]), default=rate)
    bandwidth = max(attention_bytes(row) / row["us"] for row in rows)
    start = (rate, causal, 2 * bandwidth, 0.5 * min(row["us"] for row in rows))
    return Attention(*_fit(predict, start, rows))


def gemm_bytes(row: Row) -> float:
    """What a product reads and writes."""
    m, n, k = row["m"], row["n"], row["k"]
    return float(m * k + k * n + m * n) * dtype(row["dtype"]).itemsize


def attention_bytes(row: Row) -> float:
    """What attention reads and writes."""
    queries, keys = row["heads"] * row["s"], row["kv_heads"] * row["t"]
    return 2.0 * (queries + keys) * row["d"] * dtype(row["dtype"]).itemsize


def _fit(predict: Callable[[Parameters, Row], float], start: Parameters, rows: Sequence[Row]) -> list[float]:
    """Parameters greater than 0; those that no row depends on keep their start."""
    from scipy.optimize import least_squares

    def residuals(logs: np.ndarray) -> list[float]:
        parameters = [exp(value) for value in logs]
        return [log(predict(parameters, row) / row["us"]) for row in rows]

    found = least_squares(residuals, [log(value) for value in start], loss="soft_l1", f_scale=0.1)
    return [exp(value) for value in found.x]


def _by_dtype(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["dtype"]].append(row)
    return dict(found)


def _links(rows: Sequence[Row]) -> dict[str, dict[int, Curve]]:
    """A curve for each collective and number of ranks. One GPU alone has no links: it gets those of a common host."""
    points: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for row in rows:
        points[row["kind"], row["ranks"]][row["sent"]] = row["us"]
    if not points:
        return {kind: {2: Curve.line(10.0, 0.3e6)} for kind in COLLECTIVES}
    counts = sorted({ranks for _, ranks in points})
    return {kind: {ranks: Curve.through(points[kind, ranks]) for ranks in counts} for kind in COLLECTIVES}
