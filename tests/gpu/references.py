"""What outputs are compared with: the whole model on the CPU in float32, also with its weights rounded or disturbed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper
from shares import fixtures, relative_error

from onnxmesh.compiler.verification import reference
from onnxmesh.runtime.dtypes import is_narrow
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.recipe import sources

HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DRAWS = 6
Change = Callable[[np.ndarray], np.ndarray]
Outputs = dict[str, np.ndarray]


def largest(ours: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest relative error, and of which output; infinite where one is missing, NaN counts as more than any."""
    if set(ours) != set(expected):
        return float("inf"), "missing outputs"
    errors = [(relative_error(ours[key], expected[key]), key) for key in expected]
    return max(errors, key=lambda pair: (pair[0] != pair[0], pair[0]))


def plain(base: Path, name: str) -> Outputs:
    """The outputs of a fixture's model for the inputs of both seeds, by `seed/output`; kept in the folder `base`."""
    return _stored(base / f"{name}.npz", lambda: _outputs(name))


def rounded(base: Path, name: str, plan: Plan, dtype: str) -> Outputs:
    """The same where the weights that `plan` converts to `dtype` are rounded to it, and all else is float32."""

    def change(values: np.ndarray) -> np.ndarray:
        return values.astype(HALVES[dtype]).astype(values.dtype)

    return _stored(base / f"{name}-{dtype}.npz", lambda: _outputs(name, narrowed(plan, dtype), change))


def sensitivity(base: Path, name: str, plan: Plan, dtype: str) -> float:
    """How far the float32 model's outputs move, at most, when it rounds as any implementation in `dtype` must.

    Every weight that `plan` converts is multiplied by 1 + e, e random within what rounding is off by at most; and what
    is computed directly of such weights is rounded. Several times. The plan only says which weights: this is about
    how well the model is conditioned, and whether a choice that it makes hangs on so little.
    """

    def draw(number: int) -> Outputs:
        rng = np.random.default_rng(number)
        limit = float(ml_dtypes.finfo(HALVES[dtype]).eps) / 2

        def change(values: np.ndarray) -> np.ndarray:
            return (values * (1 + rng.uniform(-limit, limit, values.shape))).astype(values.dtype)

        file = base / f"{name}-{dtype}-{number}.npz"
        return _stored(file, lambda: _outputs(name, narrowed(plan, dtype), change, dtype))

    return max(largest(draw(number), plain(base, name))[0] for number in range(DRAWS))


def narrowed(plan: Plan, dtype: str) -> frozenset[str]:
    """The initialisers that a plan's recipes round to a half precision."""
    casts = (cast for weight in plan.weights for cast in _casts(weight.recipe, dtype))
    return frozenset(name for cast in casts for name in sources(cast))


def _casts(recipe: Mapping[str, Any], dtype: str) -> Iterator[Mapping[str, Any]]:
    if recipe["op"] == "cast" and recipe["dtype"] == dtype:
        yield recipe
        return
    below = recipe.get("of", [])
    for part in below if isinstance(below, list) else [below]:
        yield from _casts(part, dtype)


def _outputs(name: str, changed: frozenset[str] = frozenset(), change: Change = np.asarray, dtype: str = "") -> Outputs:
    """The outputs of a fixture's model by `seed/output`.

    Args:
        changed: initialisers that `change` makes others.
        dtype: what the results of nodes that read these are rounded to, if anything.
    """
    fixture = fixtures.load(name)
    with TemporaryDirectory() as folder:
        path = fixture.path
        if changed:
            model = onnx.load(path)
            for tensor in model.graph.initializer:
                if tensor.name in changed:
                    values = change(numpy_helper.to_array(tensor))
                    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            if dtype:
                _round_results(model.graph, changed, dtype)
            path = Path(folder) / "changed.onnx"
            onnx.save(model, path)
        runs = ((seed, reference(path, fixture.make_inputs(seed))[1]) for seed in (0, 1))
        return {f"{seed}/{key}": _wide(x) for seed, outputs in runs for key, x in outputs.items()}


def _round_results(graph: onnx.GraphProto, read: frozenset[str], dtype: str) -> None:
    """Round the first result of every node that reads one of these initialisers, in place."""
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if not read.isdisjoint(node.input):
            result, exact = node.output[0], f"{node.output[0]} before rounding"
            node.output[0] = exact
            for source, target, kind in ((exact, f"{result} rounded", dtype), (f"{result} rounded", result, "float")):
                to = getattr(onnx.TensorProto, kind.upper())
                nodes.append(onnx.helper.make_node("Cast", [source], [target], to=to))
    del graph.node[:]
    graph.node.extend(nodes)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if is_narrow(x.dtype) else x


def _stored(file: Path, make: Callable[[], Outputs]) -> Outputs:
    """The arrays of a file, which is made unless it is there. Two processes may make it at once."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        outputs = make()
        with NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.savez(part, **outputs)  # type: ignore[arg-type]
        Path(part.name).replace(file)
    with np.load(file) as found:
        return dict(found)
