"""ONNX's own sharding annotations (IR version 11): read as pins, and written for what was chosen.

A `ShardingSpec` says of one tensor at one node into how many shards its dims are cut, and which devices have each
shard; shards count row by row. It has no words for segments of different sizes, for segments that every rank holds
beside others that are cut, or for partial sums: for other tools such tensors are left open, for this one the node's
metadata says what they are.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.ir.view import shape_of
from onnxmesh.compiler.reason import Reason
from onnxmesh.passes.graph.match import Finding
from onnxmesh.passes.place.pins import Cut, Ends, Pin, cut_of
from onnxmesh.passes.place.place import Placed
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Placement, R, Shard, from_json, text, to_json

NAME = "onnxmesh"
"""Of the configuration that is written."""

METADATA = "onnxmesh.placements"
"""The key in a node's metadata: `{"mesh": .., "placements": {tensor: {axis: placement}}}`, as a plan writes these."""

IR_VERSION = 11
PATTERN = "pinned"

Sizes = list[tuple[str, int]]
"""Mesh axes of more than one rank, outermost first, and their sizes."""


class _Unclear(Exception):
    """What a spec says is no placement of a mesh; the message says why."""


# --- read ---------------------------------------------------------------------------------------------------


def pins(model: ir.Model, mesh: Mesh) -> tuple[list[Pin], list[Finding]]:
    """What a model's annotations pin on a mesh, and what of them cannot be taken, with reasons.

    Of several configurations the one for as many devices counts; device i is rank i.
    """
    fitting = [c for c in model.device_configurations if c.num_devices == mesh.size]
    if not fitting:
        counts = ", ".join(str(c.num_devices) for c in model.device_configurations)
        words = f"its annotations are for {counts} devices, the mesh has {mesh.size}: they are not taken"
        reason = Reason(words, "OM2301")
        return [], [Finding(PATTERN, "the model", False, reason)] if model.device_configurations else []
    found, findings = list[Pin](), list[Finding]()
    for node in model.graph:
        found += _worded(node, mesh)
        for spec in _specs(node, fitting[0]):
            assert spec.value is not None
            try:
                cuts = tuple(sorted(_cuts(spec, mesh).items()))
            except _Unclear as unclear:
                reason = Reason(f"'{spec.value.name}': {unclear}", "OM2302")
                findings.append(Finding(PATTERN, str(node.name), False, reason))
                continue
            found.append(Pin(str(node.name), str(spec.value.name), spec.value in node.outputs, cuts))
    return found, findings


def _specs(node: ir.Node, configuration: ir.ModelConfiguration) -> Iterator[ir.ShardingSpec]:
    for own in node.device_configurations:
        if own.configuration is configuration:
            yield from (spec for spec in own.sharding_specs if spec.value is not None)


def _worded(node: ir.Node, mesh: Mesh) -> Iterator[Pin]:
    """What the metadata of a node pins on this mesh."""
    try:
        said = json.loads(node.metadata_props.get(METADATA, "{}"))
        if not said or Mesh.from_json(said["mesh"]) != mesh:
            return
        outputs = {value.name for value in node.outputs}
        for tensor, placements in said["placements"].items():
            cuts = tuple((axis, from_json(data)) for axis, data in sorted(placements.items()))
            yield Pin(str(node.name), tensor, tensor in outputs, cuts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"the metadata '{METADATA}' of node '{node.name}' cannot be read: {error}", code="OM1408"
        ) from error


def _axes(mesh: Mesh) -> Sizes:
    return [(axis, size) for axis, size in mesh.axes if size > 1]


def _cuts(spec: ir.ShardingSpec, mesh: Mesh) -> dict[str, Cut]:
    """The cuts of a spec, by mesh axis."""
    assert spec.value is not None
    rank = None if spec.value.shape is None else len(spec.value.shape)
    dims = [(_dim(sharded.axis, rank), *_blocks(sharded)) for sharded in spec.sharded_dims]
    counts = [shards for _, _, shards in dims]
    places = _places(spec, mesh, prod(counts))
    cuts: dict[str, Cut] = {}
    for number, (dim, blocks, shards) in enumerate(dims):
        if shards > 1:
            inner = prod(counts[number + 1 :])
            index = None if places is None else [place // inner % shards for place in places]
            cuts |= _along(dim, blocks, shards, index, mesh, cuts.keys())
    return cuts


def _dim(axis: int, rank: int | None) -> int:
    if axis >= 0 and (rank is None or axis < rank):
        return axis
    if rank is None or not -rank <= axis < rank:
        raise _Unclear(f"it has no dim {axis}")
    return axis + rank


def _blocks(sharded: ir.ShardedDim) -> tuple[int, int]:
    """(equal segments, shards of each): dims that a reshape has fused, of which one is cut."""
    cut = [i for i, simple in enumerate(sharded.simple_shardings) if simple.num_shards > 1]
    if len(cut) > 1:
        raise _Unclear(f"two of the dims that are fused in dim {sharded.axis} are cut")
    before = [simple.dim for simple in sharded.simple_shardings[: cut[0]]] if cut else []
    blocks = [dim for dim in before if isinstance(dim, int)]
    if len(blocks) < len(before):
        raise _Unclear(f"a dim that is fused in dim {sharded.axis} has no size")
    return prod(blocks), sharded.simple_shardings[cut[0]].num_shards if cut else 1


def _places(spec: ir.ShardingSpec, mesh: Mesh, shards: int) -> list[int] | None:
    """For every rank the number of its shard; None where the devices are not said."""
    if not spec.device:
        return None
    groups = {entry.key: entry.value for entry in spec.index_to_device_group_map}
    if len(spec.device) != shards:
        if shards > 1:
            raise _Unclear(f"{shards} shards on {len(spec.device)} devices or groups of devices")
        where = dict.fromkeys((rank for key in spec.device for rank in groups.get(key, (key,))), 0)
    else:
        where = {rank: number for number, key in enumerate(spec.device) for rank in groups.get(key, (key,))}
    if set(where) != set(range(mesh.size)):
        raise _Unclear(f"it is on devices {sorted(where)}, not on all {mesh.size}")
    return [where[rank] for rank in range(mesh.size)]


def _along(
    dim: int, blocks: int, shards: int, index: Sequence[int] | None, mesh: Mesh, taken: object
) -> dict[str, Cut]:
    """The mesh axes that count a dim's shards, each with its cut."""
    free = [(axis, size) for axis, size in _axes(mesh) if axis not in taken]  # type: ignore[operator]
    for count in range(1, len(free) + 1):
        for axes in combinations(free, count) if index is not None else reversed(list(combinations(free, count))):
            ranks = prod(size for _, size in axes)
            copies = ranks // shards
            if ranks % shards or (copies > 1 and (count > 1 or index is None)):
                continue
            if index is None or index == [_number(mesh, rank, axes) // copies for rank in range(mesh.size)]:
                return {axis: Cut(dim, blocks, copies) for axis, _ in axes}
    raise _Unclear(f"no axis of the mesh {mesh} has the {shards} shards of dim {dim} in this order")


def _number(mesh: Mesh, rank: int, axes: Sequence[tuple[str, int]]) -> int:
    """A rank's coordinates on some axes, as one number."""
    number, here = 0, mesh.coordinate(rank)
    for axis, size in axes:
        number = number * size + here[axis]
    return number


# --- write --------------------------------------------------------------------------------------------------


@dataclass
class Annotated:
    """What was written.

    Attributes:
        specs: how many.
        open: (node, tensor, reason) of what ONNX's form cannot say, or what passes have replaced.
    """

    specs: int = 0
    open: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        reasons = Counter(reason for _, _, reason in self.open)
        left = "; ".join(f"{count} left open, because {reason}" for reason, count in reasons.most_common())
        return f"{self.specs} sharding specs" + (f"; {left}" if left else "")


def annotate(model: ir.Model, placed: Sequence[Placed], mesh: Mesh) -> Annotated:
    """Write the chosen placements into the model, in place, as the annotations of one configuration."""
    names = tuple(",".join(f"{axis}={at}" for axis, at in mesh.coordinate(rank).items()) for rank in range(mesh.size))
    configuration = ir.ModelConfiguration(NAME, mesh.size, names)
    kept = [c for c in model.device_configurations if c.name != NAME]
    model.device_configurations = (*kept, configuration)
    model.ir_version = max(model.ir_version, IR_VERSION)
    axes = [(chosen, Ends(chosen.strategies)) for chosen in placed]
    result = Annotated()
    for node in model.graph:
        node.metadata_props.pop(METADATA, None)
        specs = list(_written(node, axes, mesh, result)) if axes else []
        result.specs += len(specs)
        others = [c for c in node.device_configurations if c.configuration is not None and c.configuration.name != NAME]
        ours = [ir.NodeDeviceConfiguration(configuration, tuple(specs))] if specs else []
        node.device_configurations = (*others, *ours)
    return result


def _written(
    node: ir.Node, axes: Sequence[tuple[Placed, Ends]], mesh: Mesh, result: Annotated
) -> Iterator[ir.ShardingSpec]:
    worded: dict[str, dict[str, Any]] = {}
    for value in dict.fromkeys((*node.inputs, *node.outputs)):
        if value is None:
            continue
        try:
            places, shape = _chosen(node, value, axes)
            cuts = {axis: cut for axis, (cut, _) in places.items() if isinstance(cut, Cut)}
            others = [text(place, mesh.axis_size(axis)) for axis, (cut, place) in places.items() if axis not in cuts]
            if not others:
                yield _spec(value, cuts, shape, mesh)
                continue
            worded[str(value.name)] = {axis: to_json(place) for axis, (_, place) in places.items()}
            raise _Unclear(f"ONNX has no words for {', '.join(others)}")
        except _Unclear as unclear:
            result.open.append((str(node.name), str(value.name), str(unclear)))
    if worded:
        node.metadata_props[METADATA] = json.dumps({"mesh": mesh.to_json(), "placements": worded}, sort_keys=True)


def _chosen(
    node: ir.Node, value: ir.Value, axes: Sequence[tuple[Placed, Ends]]
) -> tuple[dict[str, tuple[Cut | Placement, Placement]], tuple[int, ...]]:
    """How a tensor of a node is cut on the axes that cut it, and its placement there; and its shape."""
    places, shape = dict[str, tuple[Cut | Placement, Placement]](), tuple[int, ...]()
    for number, (chosen, ends) in enumerate(axes):
        where = ends.of(str(node.name), str(value.name), value in node.outputs)
        found = {(end.dims, chosen.strategies[end.node].at(end.port)) for end in where}
        if len(found) != 1:
            raise _Unclear("it is placed in several ways" if found else "passes have replaced it")
        (end, *_), ((dims, placement),) = where, found
        if placement != R:
            own = placement.moved(dims.index(placement.dim)) if isinstance(placement, Shard) else placement
            places[chosen.axis] = cut_of(end, placement), own
        if not number:
            shape = tuple(shape_of(end.value)[dim] for dim in dims)
    return places, shape


def _spec(value: ir.Value, cuts: Mapping[str, Cut], shape: Sequence[int], mesh: Mesh) -> ir.ShardingSpec:
    sharded, counts, numbers = list[ir.ShardedDim](), list[int](), list[list[int]]()
    for dim in sorted({cut.dim for cut in cuts.values()}):
        here = [(axis, size) for axis, size in _axes(mesh) if axis in cuts and cuts[axis].dim == dim]
        blocks, copies = {cuts[axis].blocks for axis, _ in here}, {cuts[axis].copies for axis, _ in here}
        if len(blocks) > 1 or (len(here) > 1 and copies != {1}):
            raise _Unclear(f"ONNX has no words for how {len(here)} axes cut dim {dim}")
        (block,), copy = blocks, max(copies)
        shards = prod(size for _, size in here) // copy
        fused = [ir.SimpleShardedDim(block, 1)] if block > 1 else []
        sharded.append(ir.ShardedDim(dim, (*fused, ir.SimpleShardedDim(shape[dim] // block, shards))))
        counts.append(shards)
        numbers.append([_number(mesh, rank, here) // copy for rank in range(mesh.size)])
    holders: list[list[int]] = [[] for _ in range(prod(counts))]
    for rank in range(mesh.size):
        place = 0
        for count, index in zip(counts, numbers):
            place = place * count + index[rank]
        holders[place].append(rank)
    if all(len(ranks) == 1 for ranks in holders):
        return ir.ShardingSpec(value, tuple(ranks[0] for ranks in holders), (), tuple(sharded))
    groups = tuple(ir.IndexToDeviceGroupMapEntry(-1 - i, tuple(ranks)) for i, ranks in enumerate(holders))
    return ir.ShardingSpec(value, tuple(group.key for group in groups), groups, tuple(sharded))


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write a model; weights that lie in other files stay there where these are in the same folder.

    Raises:
        ModelError: the file cannot be written.
    """
    target = Path(path)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    external = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
    folder = target.resolve().parent
    elsewhere = any(Path(tensor.base_dir or ".").resolve() != folder for tensor in external)
    try:
        ir.save(model, target, external_data=f"{target.name}.data" if elsewhere else None)
    except OSError as error:
        raise ModelError(f"'{target}' cannot be written: {error.strerror}", code="OM1014") from error
