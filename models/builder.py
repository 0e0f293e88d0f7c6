"""A graph under construction, in the form in which torch.onnx.export writes it.

Values are names. Dims are numbers, or names of dims that stay open in the file: then sizes are computed by
Shape and Concat nodes as the exporter's graphs do it, where with numbers they are constants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxmesh.models.weights import DTYPES, InlineWeights, Weight, Weights, numpy_dtype

Dim = int | str
Arg = str | bool | int | float | Sequence[int]
"""An input of a node: a value's name, or a constant (a float has the dtype of the model)."""

LAST = 2**63 - 1
"""The end of a Slice that takes everything."""

GAIN = 1.6
"""A weight's spread times the root of its inputs' number: 0.2 at width 64, sharp enough for attention."""


class GraphBuilder:
    """Collects nodes, initialisers, inputs and outputs of one graph.

    Attributes:
        dtype: the floating dtype of weights and activations, by name.
        proto: the model so far.
        opset: 23 and later have Attention and its like; before, they are written in small operators.
        low: whether the dtype is less than float32, so that exporters cast up and down again.
    """

    def __init__(self, name: str, *, dtype: str = "float32", opset: int = 23, weights: Weights | None = None) -> None:
        self.dtype, self.opset = dtype, opset
        self.low = dtype != "float32"
        self.proto = onnx.ModelProto(ir_version=10, producer_name="onnxmesh")
        self.proto.opset_import.append(helper.make_opsetid("", opset))
        self.graph = self.proto.graph
        self.graph.name = name
        self._weights = weights if weights is not None else InlineWeights()
        self._counts: Counter[str] = Counter()
        self._known: dict[Hashable, str] = {}
        self._sizes: dict[str, str] = {}

    # --- inputs, outputs, constants ---

    def input(self, name: str, dtype: str, *dims: Dim) -> str:
        self.graph.input.append(helper.make_tensor_value_info(name, DTYPES[dtype], dims))
        return name

    def output(self, name: str, *dims: Dim) -> None:
        """Declare a value as an output of the model's dtype."""
        self.graph.output.append(helper.make_tensor_value_info(name, DTYPES[self.dtype], dims))

    def weight(self, name: str, *shape: int, std: float, mean: float = 0.0, dtype: str = "") -> str:
        weight = Weight(name, shape, dtype or self.dtype, std, mean)
        self.graph.initializer.append(self._weights.add(weight))
        return name

    def matrix(self, name: str, *shape: int, transposed: bool = False) -> str:
        """The weight of a linear layer, [inputs, outputs] or transposed."""
        return self.weight(name, *shape, std=GAIN / float(shape[-1 if transposed else 0]) ** 0.5)

    def constant(self, value: Any, dtype: str = "") -> str:
        """A constant, written once however often it is asked for."""
        array = np.asarray(value, numpy_dtype(dtype or self.dtype))
        key = ("constant", str(array.dtype), array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self._fresh("const")
            self.graph.initializer.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    # --- nodes ---

    def op(self, op_type: str, *inputs: Arg, out: str = "", **attributes: Any) -> str:
        """Add a node with one output, which may be given a name."""
        return self.ops(op_type, *inputs, outs=[out or self._fresh(op_type.lower())], **attributes)[0]

    def ops(self, op_type: str, *inputs: Arg, outs: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node with the outputs named."""
        names = [i if isinstance(i, str) else self._argument(i) for i in inputs]
        node = helper.make_node(op_type, names, outs, name=f"node_{outs[0]}", **attributes)
        self.graph.node.append(node)
        return list(outs)

    def once(self, op_type: str, *inputs: Arg, **attributes: Any) -> str:
        """The same node's output whenever it is asked for with the same inputs."""
        key = (op_type, *(tuple(i) if isinstance(i, list) else i for i in inputs), *attributes.items())
        if key not in self._known:
            self._known[key] = self.op(op_type, *inputs, **attributes)
        return self._known[key]

    def _argument(self, value: bool | int | float | Sequence[int]) -> str:
        dtype = "bool" if isinstance(value, bool) else "" if isinstance(value, float) else "int64"
        return self.constant(value, dtype)

    def _fresh(self, stem: str) -> str:
        self._counts[stem] += 1
        return f"{stem}_{self._counts[stem] - 1}"

    # --- sizes ---

    def size_from(self, dim: Dim, value: str, axis: int) -> None:
        """Say where the size of an open dim is read; nothing for a number."""
        if isinstance(dim, str):
            self._sizes[dim] = self.op("Shape", value, start=axis, end=axis + 1)

    def shape(self, *dims: Dim) -> str:
        """The one-dimensional tensor of these dims."""
        numbers = [d for d in dims if isinstance(d, int)]
        if len(numbers) == len(dims):
            return self.constant(numbers, "int64")
        parts = [self._sizes[d] if isinstance(d, str) else self.constant([d], "int64") for d in dims]
        return self.once("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def arange(self, dim: Dim) -> str:
        if isinstance(dim, int):
            return self.constant(np.arange(dim), "int64")
        return self.once("Range", 0, self.once("Squeeze", self._sizes[dim]), 1)

    # --- what is written in one way everywhere ---

    def reshape(self, value: str, *dims: Dim, allowzero: int = 1) -> str:
        return self.op("Reshape", value, self.shape(*dims), allowzero=allowzero)

    def transpose(self, value: str, *perm: int) -> str:
        return self.op("Transpose", value, perm=perm)

    def unsqueeze(self, value: str, *axes: int) -> str:
        return self.op("Unsqueeze", value, axes)

    def slice(self, value: str, axis: int, start: int, stop: int = LAST, step: int = 1) -> str:
        return self.op("Slice", value, [start], [stop], [axis], [step])

    def split(self, value: str, axis: int, parts: int) -> list[str]:
        stem = self._fresh("split")
        outs = [f"{stem}_{i}" for i in range(parts)]
        return self.ops("Split", value, outs=outs, axis=axis, num_outputs=parts)

    def split_sizes(self, value: str, axis: int, *sizes: int) -> list[str]:
        stem = self._fresh("split")
        return self.ops("Split", value, sizes, outs=[f"{stem}_{i}" for i in range(len(sizes))], axis=axis)

    def cast(self, value: str, dtype: str) -> str:
        return self.op("Cast", value, to=DTYPES[dtype])

    def up(self, value: str) -> str:
        """As float32, for what is computed in float32 whatever the model's dtype."""
        return self.cast(value, "float32") if self.low else value

    def down(self, value: str) -> str:
        """From float32 back to the model's dtype."""
        return self.cast(value, self.dtype) if self.low else value
