"""The registry of kernels: from an op (and a backend) to the function that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.plan import Buffer, Launch

Array = Any
"""A NumPy or CuPy array."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype (a NumPy dtype, ml_dtypes included) and local shape of an output.

    Of a loose output the dtype is that of its elements (None for what is no tensor), and the shape says nothing.
    """

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
    """Register the decorated function for `ops`; backend `xp` serves every array library.

    Backend `loose` is for nodes that touch values without a static type: the function computes the op in ONNX's own
    form, with the inputs and attributes that the model's node has, and never asks for shapes of the outputs.
    """

    def register(function: Kernel) -> Kernel:
        for op in ops:
            if (op, backend) in _KERNELS:
                raise ValueError(f"two kernels for {op} on {backend}")
            _KERNELS[op, backend] = function
        return function

    return register


def loose(*ops: str) -> Callable[[Kernel], Kernel]:
    """Register the decorated function for `ops` of values without a static type."""
    return kernel(*ops, backend="loose")


def find(op: str, backend: str = "xp") -> Kernel:
    """The kernel of `op`: the backend's own, or the generic one.

    Raises:
        PlanError: no kernel of that name exists.
    """
    function = _KERNELS.get((op, backend)) or _KERNELS.get((op, "xp"))
    if function is None:
        raise PlanError(f"no kernel for op {op!r}", hint="the plan may come from a newer onnxmesh", code="OM4006")
    return function


def find_for(item: Launch, buffers: Sequence[Buffer], backend: str = "xp") -> Kernel:
    """The kernel of an instruction over `buffers`: that for loose values where it touches one.

    Raises:
        PlanError: no such kernel exists.
    """
    loose = any(buffers[i].is_loose for i in (*item.ins, *item.outs) if i >= 0)
    if not loose and item.kernel in names():
        return find(item.kernel, backend)
    if not has_loose(item.kernel):
        of = " of values without a static type" if loose else ""
        raise PlanError(
            f"no kernel for op {item.kernel!r}{of}", hint="the plan may come from a newer onnxmesh", code="OM4006"
        )
    return _KERNELS[item.kernel, "loose"]


def names() -> frozenset[str]:
    """Every op in normal form that has a kernel."""
    return frozenset(op for op, backend in _KERNELS if backend != "loose")


def has_loose(op: str) -> bool:
    """Whether there is a kernel of the op for values without a static type."""
    return (op, "loose") in _KERNELS
