"""Inputs that a plan was bound to by value: a run may be given them all the same, if they are what they were then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from onnxmesh.runtime.errors import InvalidArgument
from onnxmesh.runtime.plan import Program
from onnxmesh.runtime.recipe import evaluate


def bound_values(program: Program) -> dict[str, np.ndarray]:
    """The values by input.

    Raises:
        PlanError: one of them is not a constant.
    """
    return {name: evaluate(recipe, _no_source) for name, recipe in program.values.items()}


def check_bound(values: Mapping[str, np.ndarray], feeds: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of `feeds` without the inputs that have a value already.

    Raises:
        InvalidArgument: one of these is given another value.
    """
    for name in (name for name in feeds if name in values):
        bound, given = values[name], _host(feeds[name])
        if given.shape != bound.shape or not _equal(bound, given):
            raise InvalidArgument(
                f"input {name!r} was bound to {_text(bound)} when the plan was compiled, but is given {_text(given)}",
                hint=f"leave it out, or compile again with --value {name}=...",
                code="OM5004",
            )
    return {name: value for name, value in feeds.items() if name not in values}


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all((a == b) | ((a != a) & (b != b))))


def _host(value: Any) -> np.ndarray:
    from onnxmesh.runtime.cuda.foreign import as_host_array

    return as_host_array(value)


def _text(array: np.ndarray) -> str:
    text = f"{array.dtype.name}{list(array.shape)}"
    return f"{text} {array.tolist()}" if array.size <= 8 else text


def _no_source(name: str) -> NoReturn:
    raise ValueError(f"a bound value reads the weight {name!r}")
