"""Recipes: large constants as JSON over the model's own initialisers, instead of numbers (docs/dialect.md).

A recipe is an initialiser whose `meta["recipe"]` holds the JSON. Each function here wraps a recipe in one step and
merges it with the step below where the two are one.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Recipe = dict[str, Any]
KEY = "recipe"


def source(name: str) -> Recipe:
    """An initialiser of the model file."""
    return {"op": "source", "name": name}


def constant(array: np.ndarray) -> Recipe:
    """A small constant, held in the recipe itself."""
    data = np.ascontiguousarray(array)
    if data.dtype.byteorder == ">":
        data = data.astype(data.dtype.newbyteorder("<"))
    text = base64.b64encode(data.tobytes()).decode()
    return {"op": "constant", "dtype": array.dtype.name, "shape": list(array.shape), "data": text}


def transpose(of: Recipe, perm: Sequence[int]) -> Recipe:
    """`of` with its dims in the order `perm`; two transposes become one, or none."""
    order = list(perm)
    if of["op"] == "transpose":
        order, of = [of["perm"][p] for p in order], of["of"]
    return of if order == sorted(order) else {"op": "transpose", "perm": order, "of": of}


def reshape(of: Recipe, shape: Sequence[int]) -> Recipe:
    """`of` with another shape; the last of several reshapes counts."""
    if of["op"] == "reshape":
        of = of["of"]
    return {"op": "reshape", "shape": list(shape), "of": of}


def slice_(of: Recipe, axis: int, start: int, stop: int) -> Recipe:
    """`of[start:stop]` along `axis`."""
    return {"op": "slice", "axis": axis, "start": start, "stop": stop, "of": of}


def concat(of: Sequence[Recipe], axis: int) -> Recipe:
    """The pieces one after the other along `axis`."""
    return {"op": "concat", "axis": axis, "of": list(of)}


def cast(of: Recipe, dtype: ir.DataType) -> Recipe:
    """`of` in another element type."""
    return {"op": "cast", "dtype": dtype.numpy().name, "of": of}


def pad(of: Recipe, pads: Sequence[int]) -> Recipe:
    """`of` with zeros around it."""
    return {"op": "pad", "pads": list(pads), "of": of}


def expand(of: Recipe, shape: Sequence[int]) -> Recipe:
    """`of` broadcast to a shape."""
    return {"op": "expand", "shape": list(shape), "of": of}


def mul(of: Recipe, by: float) -> Recipe:
    """`of` times a number."""
    return {"op": "mul", "by": by, "of": of}


def get(value: ir.Value) -> Recipe | None:
    """The recipe of an initialiser, None where it is its own source."""
    found: Recipe | None = value.meta.get(KEY)
    return found


def sources(recipe: Recipe) -> Iterator[str]:
    """The names of the initialisers that a recipe reads."""
    if recipe["op"] == "source":
        yield recipe["name"]
    below = recipe.get("of", [])
    for part in below if isinstance(below, list) else [below]:
        yield from sources(part)


def initialiser(
    name: str, recipe: Recipe, dtype: ir.DataType, shape: Sequence[int], tensors: Mapping[str, ir.TensorProtocol]
) -> ir.Value:
    """An initialiser that is computed from `tensors`, the model's own, when somebody asks for its numbers.

    It has none where one of its sources has none, since that differs from rank to rank.
    """
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    if all(source in tensors for source in sources(recipe)):
        value.const_value = ir.LazyTensor(
            lambda: ir.tensor(_evaluate(recipe, tensors)), dtype, ir.Shape(shape), name=name
        )
    value.meta[KEY] = recipe
    return value


def _evaluate(recipe: Recipe, tensors: Mapping[str, ir.TensorProtocol]) -> np.ndarray:
    from onnxmesh.runtime.recipe import evaluate

    result: np.ndarray = evaluate(recipe, lambda name: tensors[name].numpy())
    return result
