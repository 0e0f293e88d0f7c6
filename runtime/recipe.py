"""Recipes: how a weight comes from the model's own initialisers. docs/dialect.md lists the ops."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from onnxmesh.runtime.dtypes import dtype, wider
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Placement, cut

Fetch = Callable[[str], np.ndarray]
"""Reads an initialiser of the model by name."""

_MAX_DEPTH = 64


def evaluate(recipe: Mapping[str, Any], fetch: Fetch) -> np.ndarray:
    """The value of `recipe`; `fetch` reads the initialisers. It may be a view of what `fetch` gave.

    Raises:
        PlanError: the recipe is not one, or does not fit the arrays that `fetch` gives.
    """
    validate(recipe)
    try:
        return _evaluate(recipe, fetch)
    except (ValueError, TypeError, IndexError) as error:
        raise PlanError(f"recipe does not fit the model's weights: {error}", code="OM4102") from error


def evaluate_shard(
    recipe: Mapping[str, Any],
    fetch: Fetch,
    spec: Sequence[tuple[str, Placement]],
    mesh: Mesh,
    coordinate: Mapping[str, int],
) -> np.ndarray:
    """What the rank at `coordinate` holds of the recipe's value: cut by the placements of `spec` in order."""
    return cut_spec(evaluate(recipe, fetch), spec, mesh, coordinate)


def cut_spec(
    array: np.ndarray,
    spec: Sequence[tuple[str, Placement]],
    mesh: Mesh,
    coordinate: Mapping[str, int],
) -> np.ndarray:
    """The piece of the global `array` at `coordinate`: a view where it can be."""
    for axis, placement in spec:
        array = cut(array, placement, mesh.axis_size(axis), coordinate[axis], np)
    return array


def sources(recipe: Mapping[str, Any]) -> list[str]:
    """The names of the initialisers that `recipe` reads, each once, in the order of their first use."""
    validate(recipe)
    names: dict[str, None] = {}
    pending: list[Mapping[str, Any]] = [recipe]
    while pending:
        node = pending.pop()
        if node["op"] == "source":
            names[node["name"]] = None
        pending.extend(reversed(_children(node)))
    return list(names)


def validate(recipe: Any, depth: int = 0) -> None:
    """Raise PlanError unless `recipe` is one: known ops, each with just its own fields, of the right types."""
    if depth > _MAX_DEPTH:
        raise PlanError(f"a recipe is nested deeper than {_MAX_DEPTH}", code="OM4008")
    if not isinstance(recipe, Mapping) or recipe.get("op") not in _FIELDS:
        raise PlanError(
            f"unknown recipe {_short(recipe)}", hint="the plan may come from a newer onnxmesh", code="OM4008"
        )
    fields = _FIELDS[recipe["op"]]
    if set(recipe) != {"op", *fields} or not all(test(recipe[name]) for name, test in fields.items()):
        raise PlanError(f"malformed recipe {_short(recipe)}: {recipe['op']} takes {', '.join(fields)}", code="OM4008")
    for child in _children(recipe):
        validate(child, depth + 1)


def _children(recipe: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    of = recipe.get("of", ())
    return (of,) if isinstance(of, Mapping) else of


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sizes(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_size, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_dtype(value: object) -> bool:
    try:
        return isinstance(value, str) and dtype(value) is not None
    except ValueError:
        return False


def _is_recipe(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_recipes(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


_FIELDS: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    "source": {"name": _is_text},
    "constant": {"dtype": _is_dtype, "shape": _is_sizes, "data": _is_text},
    "transpose": {"perm": _is_sizes, "of": _is_recipe},
    "reshape": {"shape": _is_sizes, "of": _is_recipe},
    "slice": {"axis": _is_size, "start": _is_size, "stop": _is_size, "of": _is_recipe},
    "concat": {"axis": _is_size, "of": _is_recipes},
    "cast": {"dtype": _is_dtype, "of": _is_recipe},
    "pad": {"pads": _is_sizes, "of": _is_recipe},
    "expand": {"shape": _is_sizes, "of": _is_recipe},
    "mul": {"by": _is_number, "of": _is_recipe},
}


def _evaluate(recipe: Mapping[str, Any], fetch: Fetch) -> np.ndarray:
    op = recipe["op"]
    if op == "source":
        return fetch(recipe["name"])
    if op == "constant":
        return _constant(recipe)
    if op == "concat":
        return np.concatenate([_evaluate(part, fetch) for part in recipe["of"]], axis=recipe["axis"])
    x = _evaluate(recipe["of"], fetch)
    return _TRANSFORMS[op](x, recipe)


def _constant(recipe: Mapping[str, Any]) -> np.ndarray:
    data, kind, shape = base64.b64decode(recipe["data"], validate=True), dtype(recipe["dtype"]), recipe["shape"]
    if len(data) != prod(shape) * kind.itemsize:
        raise ValueError(f"a constant of {kind}{list(shape)} holds {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape)


def _slice(x: np.ndarray, recipe: Mapping[str, Any]) -> np.ndarray:
    axis, start, stop = recipe["axis"], recipe["start"], recipe["stop"]
    if axis >= x.ndim or not start <= stop <= x.shape[axis]:
        raise ValueError(f"slice {start}:{stop} of axis {axis} of shape {list(x.shape)}")
    return x[(slice(None),) * axis + (slice(start, stop),)]


def _pad(x: np.ndarray, recipe: Mapping[str, Any]) -> np.ndarray:
    pads = recipe["pads"]
    if len(pads) != 2 * x.ndim:
        raise ValueError(f"{len(pads)} pads for shape {list(x.shape)}")
    widths = list(zip(pads[: x.ndim], pads[x.ndim :]))
    result = np.zeros([n + a + b for n, (a, b) in zip(x.shape, widths)], x.dtype)
    result[tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, widths))] = x
    return result


def _mul(x: np.ndarray, recipe: Mapping[str, Any]) -> np.ndarray:
    wide = x.astype(wider(x.dtype), copy=False)
    return (wide * wide.dtype.type(recipe["by"])).astype(x.dtype, copy=False)


_TRANSFORMS: Mapping[str, Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]] = {
    "transpose": lambda x, recipe: x.transpose(recipe["perm"]),
    "reshape": lambda x, recipe: x.reshape(recipe["shape"]),
    "slice": _slice,
    "cast": lambda x, recipe: x.astype(wider(x.dtype), copy=False).astype(dtype(recipe["dtype"])),
    "pad": _pad,
    "expand": lambda x, recipe: np.broadcast_to(x, recipe["shape"]),
    "mul": _mul,
}
