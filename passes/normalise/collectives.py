"""Collectives of other tools: TensorRT's DistCollective, ONNX Runtime's AllReduce, AllGather and AllToAll.

`said` reads a node; once `compiler/imported.py` knows which mesh axes its ranks are on, `settle` says so in the node,
and while shapes are bound `expand` puts the collectives of the normal form (docs/dialect.md) in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir
from onnx_ir.convenience import convert_attributes

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder, Expansion
from onnxmesh.passes.graph.infer import DOMAIN, dtype_of, label, shape_of
from onnxmesh.runtime.comm import REDUCTIONS
from onnxmesh.runtime.plan import ROOTED

MICROSOFT, TENSORRT = "com.microsoft", "trt.plugins"
_KINDS = {
    "all_reduce": "AllReduce",
    "all_gather": "AllGather",
    "broadcast": "Broadcast",
    "reduce": "ReduceTo",
    "reduce_scatter": "ReduceScatter",
    "all_to_all": "AllToAll",
    "gather": "GatherTo",
    "scatter": "ScatterFrom",
}
_REDUCING = ("AllReduce", "ReduceTo", "ReduceScatter")
_OUTER_FIRST = ("Broadcast", "ReduceScatter", "ScatterFrom")
"""Over two axes these go along the outer one first, the others along the inner one, so that ranks stay in order."""

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Said:
    """What a node says.

    Attributes:
        ranks: how many ranks a group has; 0 where the node does not say.
        groups: the groups of ranks; none: all ranks are one.
        root: a position in the group.
        dim: what is gathered along; it may count from the end.
    """

    kind: str
    reduce: str = ""
    root: int = 0
    dim: int = 0
    ranks: int = 0
    groups: Groups = ()


def said(node: ir.Node) -> Said | None:
    """What a collective of another tool says; None for any other node.

    Raises:
        ModelError: its attributes contradict each other.
    """
    read = _READERS.get((node.domain, node.op_type))
    return None if read is None else read(node)


def _dist_collective(node: ir.Node) -> Said:
    """TensorRT's (docs.nvidia.com, operators/DistCollective): everything goes along dim 0."""
    attributes = node.attributes
    operation = attributes.get_string("collective_operation", "").lower()
    reduce, root = attributes.get_string("reduce_op", "none").lower(), attributes.get_int("root", -1)
    if operation not in _KINDS:
        known = ", ".join(_KINDS)
        raise ModelError(
            f"{label(node)}: collective_operation is {operation!r}", hint=f"it is one of {known}", code="OM1404"
        )
    kind, groups = _KINDS[operation], _groups(node)
    if (kind in _REDUCING) != (reduce != "none"):
        hint = "all_reduce, reduce and reduce_scatter have one of sum, prod, max, min, avg, the others none"
        raise ModelError(f"{label(node)}: {operation} with reduce_op {reduce}", hint=hint, code="OM1404")
    if kind in ROOTED and root < 0:
        raise ModelError(f"{label(node)}: {operation} has no root", code="OM1404")
    size = max(attributes.get_int("nb_rank", 1), len(groups[0]) if groups else attributes.get_int("group_size", 0))
    if groups and size != len(groups[0]) and size != sum(map(len, groups)):
        raise ModelError(f"{label(node)}: nb_rank is {size}, but its groups are {groups}", code="OM1404")
    reduce = reduce if kind in _REDUCING else ""
    return Said(kind, reduce, max(root, 0), 0, len(groups[0]) if groups else size if size > 1 else 0, groups)


def _groups(node: ir.Node) -> Groups:
    """The flat list of rank numbers, in groups of `group_size` where that is given."""
    flat = tuple(node.attributes.get_ints("groups", ()))
    size = node.attributes.get_int("group_size", 0) or len(flat)
    if flat and (size < 1 or len(flat) % size or len(set(flat)) != len(flat) or min(flat) < 0):
        raise ModelError(f"{label(node)}: {list(flat)} are no groups of {size} ranks", code="OM1404")
    return tuple(flat[start : start + size] for start in range(0, len(flat), size)) if flat else ()


def _ort(node: ir.Node, kind: str, reduce: str = "") -> Said:
    """ONNX Runtime's: a group is all ranks; one that has one rank is not said (onnxruntime, collective_defs.cc)."""
    size = node.attributes.get_int("group_size", 0)
    return Said(kind, reduce, 0, node.attributes.get_int("axis", 0), size if size > 1 else 0)


_READERS: dict[tuple[str, str], Callable[[ir.Node], Said]] = {
    (TENSORRT, "DistCollective"): _dist_collective,
    (MICROSOFT, "AllReduce"): lambda node: _ort(node, "AllReduce", "sum"),
    (MICROSOFT, "AllGather"): lambda node: _ort(node, "AllGather"),
    (MICROSOFT, "AllToAll"): lambda node: _ort(node, "AllToAll"),
}


# --- into the normal form -----------------------------------------------------------------------------------


def settle(node: ir.Node, found: Said, axes: Sequence[str], sizes: Sequence[int]) -> None:
    """Say in the node, in place, on which mesh axes it sends, outermost first; no axes: it has one rank.

    Raises:
        ModelError: what it does cannot be done over two axes, or its root is not of its ranks.
    """
    if found.root >= prod(sizes):
        raise ModelError(f"{label(node)}: the root is {found.root}, but a group has {prod(sizes)} ranks", code="OM1404")
    if len(axes) > 1 and found.kind == "AllToAll":
        raise ModelError(
            f"{label(node)} exchanges over all of several groups", hint="only one group at a time can", code="OM1404"
        )
    node.domain, node.op_type = DOMAIN, "Collective"
    node.attributes.clear()
    settled = {"kind": found.kind, "reduce": found.reduce, "root": found.root, "dim": found.dim}
    settled |= {"axes": ",".join(axes), "sizes": ",".join(map(str, sizes))}
    for attribute in convert_attributes(settled):
        node.attributes.add(attribute)


def expand(node: ir.Node, b: Builder) -> None:
    """Replace a settled node by collectives of the normal form."""
    kind, root = node.attributes["kind"].as_string(), node.attributes["root"].as_int()
    names, counts = (node.attributes[name].as_string() for name in ("axes", "sizes"))
    steps: list[tuple[str, int, int]] = []
    for axis, size in reversed(list(zip(names.split(","), map(int, filter(None, counts.split(",")))))):
        root, position = divmod(root, size)
        steps.append((axis, size, position))
    if kind in _OUTER_FIRST:
        steps.reverse()
    results = []
    for x in node.inputs:
        assert x is not None
        _check(node, kind, x)
        for axis, size, position in steps:
            x = _one(node, b, kind, x, axis, size, position)
        results.append(x)
    b.replace(*results)


def _check(node: ir.Node, kind: str, x: ir.Value) -> None:
    reduce, dtype = node.attributes["reduce"].as_string(), dtype_of(x).numpy().name
    if kind in _REDUCING and reduce not in REDUCTIONS.get(dtype, frozenset()):
        known = ", ".join(sorted(REDUCTIONS.get(dtype, ()))) or "none"
        raise ModelError(
            f"{label(node)}: {reduce} of {dtype} is not defined", hint=f"for {dtype} there is {known}", code="OM1404"
        )


def _one(node: ir.Node, b: Builder, kind: str, x: ir.Value, axis: str, ranks: int, root: int) -> ir.Value:
    """The collective along one axis."""
    shape, attributes = list(shape_of(x)), node.attributes
    common = {"axis": axis, "ranks": ranks}
    if kind in _REDUCING:
        common["reduce"] = attributes["reduce"].as_string()
    if kind in ROOTED:
        common["root"] = root
    if kind in ("AllReduce", "Broadcast", "ReduceTo"):
        return _made(node, b, kind, x, shape, common)
    dim = attributes["dim"].as_int()
    if not -len(shape) <= dim < len(shape):
        raise ModelError(f"{label(node)}: '{x.name}' of shape {shape} has no dim {dim}", code="OM1404")
    dim %= len(shape)
    size = shape[dim]
    if kind not in ("AllGather", "GatherTo") and size % ranks:
        raise ModelError(f"{label(node)}: {ranks} ranks cannot share dim {dim} of '{x.name}', {shape}", code="OM1404")
    if kind == "AllToAll":
        return _all_to_all(node, b, x, ranks, common)
    shape[dim] = size * ranks if kind in ("AllGather", "GatherTo") else size // ranks
    segments = {} if kind in ROOTED else {"segments": [max(size, shape[dim]), 1]}
    return _made(node, b, kind, x, shape, {**common, "dim": dim, **segments})


def _all_to_all(node: ir.Node, b: Builder, x: ir.Value, ranks: int, common: dict[str, object]) -> ir.Value:
    """Block i of dim 0 goes to rank i, and there after those of the ranks before this one."""
    size, *rest = shape_of(x)
    block = size // ranks
    split = {"split_dim": 0, "split_segments": [ranks, 1], "concat_dim": 1, "concat_segments": [size, 1]}
    sent = _made(node, b, "AllToAll", b.reshape(x, ranks, block, *rest), [1, size, *rest], {**common, **split})
    return b.reshape(sent, size, *rest)


def _made(
    node: ir.Node, b: Builder, kind: str, x: ir.Value, shape: Sequence[int], attributes: dict[str, object]
) -> ir.Value:
    made = b.own(kind, [x], shape, attributes)
    sender = made.producer()
    assert sender is not None
    sender.meta["reason"] = f"the model's own: {node.name or node.outputs[0].name}"
    return made


SETTLED: dict[str, Expansion] = {"Collective": expand}
"""What replaces a node of domain `onnxmesh` that stands until shapes are known."""
