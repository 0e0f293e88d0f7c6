"""Pins: what the user has placed already. The solver chooses among what they leave.

A pin is of one end of a node, an input or an output, and says on every mesh axis how its tensor is cut there. Nodes
and tensors are found by their names in the model, as far as passes have left them; of a weight that is transposed or
cast, the dim is followed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.ir.recipe import Recipe
from onnxmesh.compiler.ir.rule import Port, Strategy
from onnxmesh.compiler.ir.view import is_constant, shape_of
from onnxmesh.compiler.ops.collectives import COLLECTIVES
from onnxmesh.compiler.reason import Reason
from onnxmesh.passes.graph.constants import recipe_of
from onnxmesh.passes.place.candidates import Space
from onnxmesh.passes.place.roles import Allowed
from onnxmesh.runtime.placement import Partial, Placement, R, Replicate, Segment, Shard, text


@dataclass(frozen=True)
class Cut:
    """A dim in `blocks` equal segments, each cut among the ranks; `copies` neighbours hold the same part."""

    dim: int
    blocks: int = 1
    copies: int = 1


@dataclass(frozen=True)
class Pin:
    """One tensor at one node. `cuts` are by mesh axis; on the axes that are not named it is whole on every rank.

    A placement in the place of a cut is of the tensor as the axes before leave it.
    """

    node: str
    tensor: str
    is_output: bool
    cuts: tuple[tuple[str, Cut | Placement], ...]


@dataclass(frozen=True)
class End:
    """An end of a node in the normal form: a tensor of the model, whose dim `i` is dim `dims[i]` here."""

    node: ir.Node
    port: Port
    dims: tuple[int, ...]

    @property
    def value(self) -> ir.Value:
        """The value at this end."""
        value = (self.node.outputs if self.port.is_output else self.node.inputs)[self.port.index]
        assert value is not None
        return value


class Ends:
    """Where the tensors of the model are in a graph: who makes them, and who reads them."""

    def __init__(self, nodes: Iterable[ir.Node]) -> None:
        self._made: dict[str, End] = {}
        self._read: dict[str, list[End]] = defaultdict(list)
        for node in nodes:
            if node.op_type in (*COLLECTIVES, "Shard"):
                continue
            for index, value in enumerate(node.outputs):
                self._made.setdefault(_name(value), End(node, Port(True, index), _all(value)))
            for index, read in enumerate(node.inputs):
                found = None if read is None else _tensor(read)
                if found is not None:
                    self._read[found[0]].append(End(node, Port(False, index), found[1]))

    def of(self, node: str, tensor: str, is_output: bool) -> list[End]:
        """The ends that stand for a tensor at a node of the model; none where passes have left none."""
        if is_output:
            return [self._made[tensor]] if tensor in self._made else []
        readers = self._read.get(tensor, [])
        named = [end for end in readers if node and node in (end.node.name, end.node.meta.get("origin"))]
        return named or (readers if len(readers) == 1 else [])


def _name(value: ir.Value) -> str:
    return str(value.meta.get("global_name", value.name))


def _all(value: ir.Value) -> tuple[int, ...]:
    return tuple(range(len(shape_of(value))))


def _tensor(value: ir.Value) -> tuple[str, tuple[int, ...]] | None:
    """The tensor of the model that a value is, and where its dims are; None where it is none."""
    if not is_constant(value):
        return _name(value), _all(value)
    dims = _all(value)
    source = _followed(recipe_of(value), dims)
    return None if source is None else (source[0], tuple(source[1].index(dim) for dim in dims))


def _followed(recipe: Recipe, dims: tuple[int, ...]) -> tuple[str, list[int]] | None:
    """The source of a recipe, and which of its dims each of the recipe's is."""
    if recipe["op"] == "source":
        return recipe["name"], list(dims)
    if recipe["op"] not in ("transpose", "cast", "mul"):
        return None
    below = _followed(recipe["of"], dims)
    if below is None or recipe["op"] != "transpose":
        return below
    return below[0], [below[1][dim] for dim in recipe["perm"]]


# --- as a constraint ----------------------------------------------------------------------------------------


@dataclass
class Pinned:
    """The pins on one axis.

    Attributes:
        at: the placements that ends must have, by node.
        met: how many pins are.
        unmet: (node, reason) of the others.
    """

    at: dict[ir.Node, dict[Port, Placement]] = field(default_factory=lambda: defaultdict(dict))
    met: int = 0
    unmet: list[tuple[str, str]] = field(default_factory=list)

    @property
    def marks(self) -> Mapping[ir.Node, str]:
        """A text for every pinned node, equal for nodes that are pinned alike."""
        return {node: str(sorted((port, str(p)) for port, p in ports.items())) for node, ports in self.at.items()}

    def apply(self, space: Space, allowed: Allowed) -> None:
        """Leave the strategies that meet the pins; where none does, a class of nodes is replicated."""
        for cls in space.quotient.classes:
            wanted = self.at.get(cls.nodes[0])
            if not wanted:
                continue
            found = space.strategies[cls.index]
            kept = [s for s in found if all(_meets(s, port, placement) for port, placement in wanted.items())]
            allowed.strategies[cls.index] = kept or found[:1]
            if kept:
                self.met += len(wanted) * len(cls.nodes)
                continue
            cuts = ", ".join(text(placement, cls.view.ranks) for placement in wanted.values())
            note = Reason(f"no way to run it has the placements that the model pins: {cuts}", "OM2103")
            allowed.notes[cls.index] = note
            self.unmet += [(str(node.name), note) for node in cls.nodes]


def _meets(strategy: Strategy, port: Port, wanted: Placement) -> bool:
    """A partial result becomes whatever is wanted of it."""
    placement = strategy.at(port)
    if isinstance(placement, Partial) and not isinstance(wanted, Partial):
        return port.is_output
    if isinstance(placement, Shard) and isinstance(wanted, Shard):
        return (placement.dim, placement.segments) == (wanted.dim, wanted.segments)
    return placement == wanted


def pinned(graph: ir.Graph, axis: str, ranks: int, pins: Sequence[Pin]) -> Pinned:
    """What the pins ask of a graph on one axis.

    Raises:
        ModelError: two of them contradict each other.
    """
    result = Pinned()
    if not pins:
        return result
    ends = Ends(graph)
    for pin in pins:
        where = ends.of(pin.node, pin.tensor, pin.is_output)
        if not where:
            result.unmet.append((pin.node, f"'{pin.tensor}' is pinned there, but passes have replaced it"))
        for end in where:
            placement = _placement(end, dict(pin.cuts).get(axis), ranks)
            if placement is None:
                reason = f"{ranks} ranks cannot cut '{pin.tensor}' as it is pinned: here it is {shape_of(end.value)}"
                result.unmet.append((pin.node, reason))
            elif result.at[end.node].setdefault(end.port, placement) != placement:
                both = " and to ".join(text(p, ranks) for p in (result.at[end.node][end.port], placement))
                raise ModelError(
                    f"'{pin.tensor}' of node '{pin.node}' is pinned to {both} on {axis}",
                    hint="give one sharding spec for a tensor of a node",
                    code="OM1409",
                )
    return result


def _placement(end: End, cut: Cut | Placement | None, ranks: int) -> Placement | None:
    """The placement at an end; None where its dim cannot be cut so."""
    if cut is None or isinstance(cut, Replicate):
        return R
    if isinstance(cut, Partial):
        return cut
    dim = end.dims[cut.dim] if cut.dim < len(end.dims) else -1
    size = shape_of(end.value)[dim] if dim >= 0 else 0
    if isinstance(cut, Shard):
        return cut.moved(dim) if cut.size == size and cut.fits(ranks) else None
    segment = Segment(size // cut.blocks, cut.copies)
    if size % cut.blocks or not segment.fits(ranks):
        return None
    return Shard(dim, (segment,) * cut.blocks)


def cut_of(end: End, placement: Placement) -> Cut | Placement:
    """The inverse: how the model's tensor is cut, or its placement where no cut says that."""
    if not isinstance(placement, Shard):
        return placement
    dim = end.dims.index(placement.dim)
    if len(set(placement.segments)) > 1:
        return placement.moved(dim)
    return Cut(dim, len(placement.segments), placement.segments[0].copies)
