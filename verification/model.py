"""The model as its file says it: which nodes make a value, and the part of it between some values and others."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx import helper, numpy_helper

from onnxmesh.compiler import frontend
from onnxmesh.compiler.sources import reader

INLINE = 1 << 12
"""Weights of up to so many bytes stand in a segment as constants; larger ones are its inputs."""

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)

Arrays = Mapping[str, np.ndarray]
Path = str | os.PathLike[str]


class NotComparable(Exception):
    """A value cannot be compared; the message says why."""


@dataclass(frozen=True)
class Segment:
    """Nodes of the model, in its order, that make `outputs` from `inputs` (values) and `weights` (initialisers)."""

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


class Model:
    """A model's nodes and weights, by name, with its functions inlined; weights are read when they are asked for."""

    def __init__(self, source: Path | onnx.ModelProto) -> None:
        model = frontend.original(source)
        common.InlinePass()(model)
        common.RemoveInitializersFromInputsPass()(model)
        self._graph = model.graph
        self._nodes = list(model.graph)
        self.ir_version = model.ir_version
        self.opsets = dict(model.graph.opset_imports)
        self.inputs = tuple(str(value.name) for value in model.graph.inputs)
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        weights = model.graph.initializers
        self.weights: Mapping[str, ir.TensorProtocol] = {
            name: value.const_value for name, value in weights.items() if value.const_value is not None
        }
        self.weight: Callable[[str], np.ndarray] = reader(self.weights)
        self._producer = {
            str(value.name): number for number, node in enumerate(self._nodes) for value in node.outputs if value.name
        }

    def __len__(self) -> int:
        return len(self._nodes)

    def producer(self, name: str) -> int | None:
        """The number of the node that makes a value; None of an input, a weight or a name that it has not."""
        return self._producer.get(name)

    @property
    def values(self) -> Mapping[str, int]:
        """Every value that a node makes, with the node's number."""
        return self._producer

    def has(self, name: str) -> bool:
        """Whether it has a value of that name, which is no weight."""
        return name in self._producer or name in self.inputs

    def node(self, number: int) -> onnx.NodeProto:
        """A node of the model."""
        return ir.serde.serialize_node(self._nodes[number])

    def op(self, number: int) -> str:
        """A node's op."""
        return self._nodes[number].op_type

    def label(self, number: int) -> str:
        """A node's name, or its first output's."""
        node = self._nodes[number]
        return node.name or next(str(value.name) for value in node.outputs if value.name)

    @cached_property
    def _reads(self) -> list[tuple[str, ...]]:
        """Of every node the values that it reads, those that its graphs capture too."""
        return [tuple(dict.fromkeys(_reads(node))) for node in self._nodes]

    def segment(self, targets: Sequence[str], known: Collection[str]) -> Segment:
        """The nodes that make `targets` from `known` values and the model's inputs and weights: no more than needed."""
        given = {*known, *self.inputs}
        nodes, inputs, weights = set[int](), set[str](), set[str]()
        waiting = list(targets)
        first = set(targets)
        while waiting:
            name = waiting.pop()
            if name in self.weights:
                weights.add(name)
            elif name in given and name not in first:
                inputs.add(name)
            elif (number := self._producer.get(name)) is None:
                if name not in self.inputs:
                    raise NotComparable(f"the model has no value {name!r}")
                inputs.add(name)
            elif number not in nodes:
                nodes.add(number)
                waiting += self._reads[number]
        return Segment(tuple(sorted(nodes)), tuple(sorted(inputs)), tuple(sorted(weights)), tuple(targets))

    def is_constant(self, name: str) -> bool:
        """Whether a value depends on no input of the model."""
        return not self.segment([name], ()).inputs

    def is_random(self, segment: Segment) -> bool:
        """Whether a node of it makes random numbers."""
        return any(self.op(number) in RANDOM for number in segment.nodes)

    def proto(
        self, segment: Segment, values: Arrays, weights: Arrays, inline: int = INLINE, *, sized: bool = True
    ) -> onnx.ModelProto:
        """The segment as a model of its own. Weights of more than `inline` bytes are inputs, after the others.

        Unless `sized`, inputs have dims of any size.
        """
        small = {name for name, array in weights.items() if array.nbytes <= inline}
        arrays = {name: values[name] for name in segment.inputs}
        arrays |= {name: array for name, array in weights.items() if name not in small}
        graph = helper.make_graph(
            [self.node(number) for number in segment.nodes],
            "segment",
            [value_info(name, array, sized) for name, array in arrays.items()],
            [onnx.ValueInfoProto(name=name) for name in segment.outputs],
            [_tensor(name, weights[name]) for name in sorted(small)],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        known = {opset.domain for opset in opsets}
        opsets += [helper.make_opsetid(d, 1) for d in sorted({node.domain for node in graph.node} - known) if d]
        return helper.make_model(graph, opset_imports=opsets, ir_version=max(self.ir_version, 8))


def element_type(array: np.ndarray) -> int:
    """ONNX's number for an array's dtype."""
    return int(ir.DataType.from_numpy(array.dtype))


def value_info(name: str, array: np.ndarray, sized: bool = True) -> onnx.ValueInfoProto:
    """A value's name and type; unless `sized`, with dims of any size."""
    dims = list(array.shape) if sized else [None] * array.ndim
    return helper.make_tensor_value_info(name, element_type(array), dims)


def _tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    if array.dtype == object:
        return numpy_helper.from_array(array, name)
    return ir.serde.serialize_tensor(ir.Tensor(np.ascontiguousarray(array), name=name))


def _reads(node: ir.Node) -> Iterator[str]:
    for value in node.inputs:
        if value is not None and value.name:
            yield str(value.name)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from _captured(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from _captured(graph)


def _captured(graph: ir.Graph) -> Iterator[str]:
    """The values of outer graphs that a graph reads."""
    own = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
    own |= {str(value.name) for node in graph for value in node.outputs}
    read = [name for node in graph for name in _reads(node)]
    yield from (name for name in read if name not in own)
    yield from (str(value.name) for value in graph.outputs if str(value.name) not in own)
