"""Wrong kernels, planted in the engines of a run: on one rank, of one op, as a bug of a backend would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from onnxmesh.runtime import engine
from onnxmesh.runtime.kernels.registry import Call, Kernel
from onnxmesh.runtime.plan import Buffer, Launch

Change = Callable[[np.ndarray], np.ndarray]
"""What is done to the first result of a kernel."""


def off_by_one_row(x: np.ndarray) -> np.ndarray:
    """Every row where the next one should be."""
    return np.roll(x, 1, axis=max(0, x.ndim - 2))


def wrong_sign(x: np.ndarray) -> np.ndarray:
    """The first quarter of all elements, negated."""
    return np.concatenate([-x.reshape(-1)[: x.size // 4], x.reshape(-1)[x.size // 4 :]]).reshape(x.shape)


def wrong_scale(x: np.ndarray) -> np.ndarray:
    """A little too large, as where a scale is rounded to too few bits."""
    return (x.astype(np.float64) * 1.002).astype(x.dtype)


@contextmanager
def planted(kernel: str, change: Change, coordinate: Mapping[str, int] | None = None, node: str = "") -> Iterator[None]:
    """Within, new engines have a wrong kernel, for nodes whose name holds `node`, at ranks of `coordinate`."""
    right = engine.find_for

    def find_for(item: Launch, buffers: Sequence[Buffer], backend: str = "xp") -> Kernel:
        function = right(item, buffers, backend)
        if item.kernel != kernel or node not in item.node:
            return function

        def wrong(call: Call, *inputs: Any) -> Any:
            results = function(call, *inputs)
            if any(call.coordinate[axis] != index for axis, index in (coordinate or {}).items()):
                return results
            if isinstance(results, tuple):
                return (change(results[0]), *results[1:])
            return change(results)

        return wrong

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "find_for", find_for)
        yield
