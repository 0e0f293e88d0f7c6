"""Run a rank's graph for all ranks of a mesh at once: kernels rank by rank, collectives by their definition.

Everything happens in one thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import onnxmesh.runtime.kernels  # noqa: F401
from onnxmesh.runtime.comm import reduce_arrays
from onnxmesh.runtime.kernels.registry import Call, TensorType, find
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Shard, cut, join
from onnxmesh.runtime.plan import KINDS
from onnxmesh.runtime.segments import segments_of

Pieces = list[np.ndarray]
"""One array a rank."""


def run(nodes: Iterable[ir.Node], values: Mapping[ir.Value, Pieces], mesh: Mesh) -> dict[ir.Value, Pieces]:
    """All values of the nodes, from the pieces of the inputs and initialisers.

    Raises AssertionError where a kernel gives another shape or dtype than the graph says.
    """
    known = dict(values)
    for node in nodes:
        inputs = [None if value is None else known[value] for value in node.inputs]
        results = _collective(node, inputs, mesh) if node.op_type in KINDS else _launch(node, inputs, mesh)
        for value, pieces in zip(node.outputs, results):
            for piece in pieces:
                have, want = (piece.dtype, tuple(piece.shape)), (value.dtype.numpy(), tuple(value.shape))
                assert have == want, f"{node.op_type} gives {have}, its graph says {want}"
            known[value] = pieces
    return known


def attributes(node: ir.Node) -> dict[str, Any]:
    """A node's attributes as a plan holds them."""
    attrs = {a.name: list(a.value) if isinstance(a.value, tuple) else a.value for a in node.attributes.values()}
    return {name: json.loads(value) if name == "expr" else value for name, value in attrs.items()}


def _launch(node: ir.Node, inputs: Sequence[Pieces | None], mesh: Mesh) -> list[Pieces]:
    attrs, kernel = attributes(node), find(node.op_type)
    outs = tuple(TensorType(value.dtype.numpy(), tuple(value.shape)) for value in node.outputs)
    results = []
    for rank in range(mesh.size):
        call = Call(np, attrs, outs, mesh.coordinate(rank))
        result = kernel(call, *(None if pieces is None else pieces[rank] for pieces in inputs))
        results.append(result if isinstance(result, tuple) else (result,))
    return [[np.asarray(result[i]) for result in results] for i in range(len(outs))]


def _collective(node: ir.Node, inputs: Sequence[Pieces | None], mesh: Mesh) -> list[Pieces]:
    attrs = attributes(node)
    each = json.loads(attrs.pop("each")) if "each" in attrs else [{}] * len(inputs)
    results = []
    for sent, own in zip(inputs, each, strict=True):
        assert sent is not None
        received: Pieces = list(sent)
        for group in mesh.groups(attrs["axis"]):
            for rank, piece in zip(group, _exchange(node.op_type, attrs | own, [sent[rank] for rank in group])):
                received[rank] = piece
        results.append(received)
    return results


def _exchange(kind: str, attrs: Mapping[str, Any], pieces: Pieces) -> Pieces:
    """What every rank of a group has after a collective."""
    ranks = len(pieces)
    if kind == "Shift":
        return [pieces[(rank - attrs["offset"]) % ranks] for rank in range(ranks)]
    root = attrs.get("root", 0)
    if kind == "Broadcast":
        return [pieces[root]] * ranks
    if kind == "ScatterFrom":
        return np.split(pieces[root], ranks, attrs["dim"])
    if kind in ("ReduceTo", "GatherTo"):
        reduces = kind == "ReduceTo"
        there = reduce_arrays(attrs["reduce"], pieces) if reduces else np.concatenate(pieces, attrs["dim"])
        return [there if rank == root else np.zeros_like(there) for rank in range(ranks)]
    if kind == "AllReduce":
        return [reduce_arrays(attrs["reduce"], pieces)] * ranks
    if kind == "AllGather":
        return [join(pieces, _shard(attrs, ""), np)] * ranks
    if kind == "ReduceScatter":
        whole, after = reduce_arrays(attrs["reduce"], pieces), _shard(attrs, "")
    else:
        whole, after = join(pieces, _shard(attrs, "concat_"), np), _shard(attrs, "split_")
    return [cut(whole, after, ranks, rank, np) for rank in range(ranks)]


def _shard(attrs: Mapping[str, Any], prefix: str) -> Shard:
    return Shard(attrs[f"{prefix}dim"], segments_of(attrs[f"{prefix}segments"]))
