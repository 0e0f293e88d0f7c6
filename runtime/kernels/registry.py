"""The registry of kernels: from an op (and a backend) to the function that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onnxmesh.runtime.errors import PlanError

Array = Any
"""A NumPy or CuPy array."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype (a NumPy dtype, ml_dtypes included) and local shape of an output."""

    dtype: Any
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """What a kernel knows besides its input arrays."""

    xp: Any
    attrs: Mapping[str, Any]
    outs: tuple[TensorType, ...]
    coordinate: Mapping[str, int]


Kernel = Callable[..., Any]
_KERNELS: dict[tuple[str, str], Kernel] = {}


def kernel(*ops: str, backend: str = "xp") -> Callable[[Kernel], Kernel]:
    """Register the decorated function for `ops`; backend `xp` serves every array library."""

    def register(function: Kernel) -> Kernel:
        for op in ops:
            if (op, backend) in _KERNELS:
                raise ValueError(f"two kernels for {op} on {backend}")
            _KERNELS[op, backend] = function
        return function

    return register


def find(op: str, backend: str = "xp") -> Kernel:
    """The kernel of `op`: the backend's own, or the generic one.

    Raises:
        PlanError: no kernel of that name exists.
    """
    function = _KERNELS.get((op, backend)) or _KERNELS.get((op, "xp"))
    if function is None:
        raise PlanError(f"no kernel for op {op!r}", hint="the plan may come from a newer onnxmesh")
    return function


def names() -> frozenset[str]:
    """Every op that has a kernel."""
    return frozenset(op for op, _ in _KERNELS)
