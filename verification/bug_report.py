"""A folder that shows a wrong tensor to somebody else: its arrays, the nodes that make it, and what was found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxmesh.runtime.io import write_outputs
from onnxmesh.verification.each import Difference
from onnxmesh.verification.model import Model, value_info
from onnxmesh.verification.replay import Suspect

LARGEST = 1 << 30
"""Bytes of weights that the nodes' file may hold."""


class Stored(Mapping[str, np.ndarray]):
    """Arrays in an .npz file, each read when it is asked for: what is kept of a large difference."""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        write_outputs(path, arrays)
        self._path, self._dtypes = path, {name: array.dtype for name, array in arrays.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        with np.load(self._path, allow_pickle=False) as file:
            array: np.ndarray = file[name]
        return array if array.dtype == self._dtypes[name] else array.view(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)


def keep_in(folder: str | os.PathLike[str]) -> Callable[[Difference], Mapping[str, np.ndarray]]:
    """What `examine` keeps arrays with: it writes them to `tensors.npz` in a folder, at once."""

    def keep(difference: Difference) -> Mapping[str, np.ndarray]:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        return Stored(target / "tensors.npz", difference.arrays)

    return keep


def save(difference: Difference, model: Model, suspects: Sequence[Suspect], folder: str | os.PathLike[str]) -> Path:
    """Write beside the arrays `nodes.onnx` (weights included, unless they are too large) and `difference.json`."""
    target = Path(folder)
    segment, arrays = difference.check.segment, difference.arrays
    values = {name: arrays[f"input.{name}"] for name in segment.inputs}
    weights = {name: model.weight(name) for name in segment.weights}
    size = sum(array.nbytes for array in weights.values())
    proto = model.proto(segment, values, weights, LARGEST if size < LARGEST else 0)
    if segment.nodes:
        proto.graph.output[0].CopyFrom(value_info(segment.outputs[0], arrays["reference"]))
        onnx.save(proto, target / "nodes.onnx")
    (target / "difference.json").write_text(json.dumps(to_json(difference, suspects), indent=1) + "\n")
    return target


def to_json(difference: Difference, suspects: Sequence[Suspect] = ()) -> dict[str, Any]:
    """A difference as JSON data."""
    compared = difference.compared
    return {
        "tensor": compared.name,
        "node": compared.node,
        "op": compared.op,
        "instruction": compared.instruction,
        "kernel": compared.kernel,
        "dtype": compared.dtype,
        "shape": list(compared.shape),
        "placement": dict(compared.placement),
        "wrong": compared.wrong,
        "ranks": list(difference.ranks),
        "index": list(difference.index),
        "local_index": list(difference.local_index),
        "ours": number(difference.ours),
        "reference": number(difference.reference),
        "float64": None if difference.float64 is None else number(difference.float64),
        "allowed": difference.allowed,
        "suspects": [vars(suspect) for suspect in suspects],
    }


def number(value: Any) -> Any:
    """An element as JSON has it: what it has no number for as text."""
    plain = np.asarray(value)
    if plain.dtype.kind in "biu":
        return plain.item()
    wide = plain.astype(np.complex128 if plain.dtype.kind == "c" else np.float64).item()
    return wide if not isinstance(wide, complex) and np.isfinite(wide) else str(wide)
