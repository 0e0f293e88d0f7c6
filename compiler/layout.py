"""Layout: which ops only rename bytes, and where every value lies (docs/layout.md).

A value that has no memory of its own is a window of another one's, its base. Readers decide: nothing is laid out in a
way that one of them does not take well. First, from the last node to the first, values are placed where they are
wanted (the parts of a Concat, what is transposed for a reader that takes no strides); then, from the first to the
last, what is left of the moving ops becomes views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxmesh.compiler.ir.view import shape_of
from onnxmesh.compiler.ir.window import Window
from onnxmesh.compiler.moves import (
    BIJECTIVE,
    Path,
    follow,
    inverse,
    moves,
    path_of,
    permutation,
    side_by_side,
    through,
)
from onnxmesh.compiler.ops.collectives import VIEWS
from onnxmesh.compiler.strides import takes, writes
from onnxmesh.passes.graph.provenance import KEY as PROVENANCE

MOST_COPIES = 1
"""Parts of a Concat that may be copied; with more of them the Concat stays one instruction."""

_PLACE, _RENAMES = "place", "renames"


@dataclass(frozen=True)
class Place:
    """A window of the memory of `base`, which has memory of its own."""

    base: ir.Value
    window: Window


def place_of(value: ir.Value) -> Place:
    """Where a value lies: by default in row-major memory of its own."""
    found: Place | None = value.meta.get(_PLACE)
    return found or Place(value, Window.whole(shape_of(value)))


def renames(node: ir.Node) -> bool:
    """Whether a node moves nothing: it becomes no instruction."""
    return bool(node.meta.get(_RENAMES))


def rebase(graph: ir.Graph, renamed: Mapping[ir.Value, ir.Value]) -> None:
    """Let the values that lie in others' memory lie in that of those which took their place."""
    for value in (value for node in graph for value in node.outputs):
        place: Place | None = value.meta.get(_PLACE)
        if place is not None and place.base in renamed:
            _put(value, Place(renamed[place.base], place.window))


def layout(model: ir.Model) -> ir.Model:
    """Decide where every value of a rank's graph lies, and note it on values and nodes; `place_of` and `renames` tell.

    The graph stays as it is, but for a Concat of one input before a Concat, where one of several parts is copied.
    """
    _Layout(model.graph).run()
    return model


class _Layout:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.copies: set[ir.Node] = set()

    def run(self) -> None:
        for node in reversed(list(self.graph)):
            if node.op_type == "Concat" and not renames(node):
                self._join(node)
            elif node.op_type == "Transpose" and not renames(node):
                self._permute(node)
        for node in list(self.graph):
            if moves(node) and not renames(node) and _PLACE not in node.outputs[0].meta:
                self._view(node)
            elif node.op_type == "Concat" and not renames(node):
                self._rejoin(node)

    # --- values placed where a reader wants them ------------------------------------------------------------

    def _join(self, node: ir.Node) -> None:
        """Let the parts of a Concat be written where it would copy them to."""
        parts = list(_parts(node))
        placed: dict[ir.Value, Place] = {}
        rest: list[int] = []
        for i, (value, place) in enumerate(parts):
            chain = self._chain(value, place, node)
            if chain is None or placed.keys() & chain.keys():
                rest.append(i)
            else:
                placed.update(chain)
        if not placed or len(rest) > MOST_COPIES:
            self._stack(node)
            return
        self._settle(placed, node)
        for i in rest:
            _put(_copied(node, i), parts[i][1])

    def _stack(self, node: ir.Node) -> None:
        """Let what a Concat's parts are pieces of be written side by side, if then they are neighbours themselves.

        The values of a text and of an image, each a piece of a joined product, are one piece of both products.
        """
        paths = [path_of(value) for value in node.inputs if value is not None]
        sources = [path[0][0] for path in paths]
        if len(set(sources)) < len(paths) or _PLACE in node.outputs[0].meta:
            return
        for axis in range(len(shape_of(sources[0]))):
            stacked = _stacked(sources, axis, f"{node.name}~both")
            if stacked and self._are_neighbours(node, paths, stacked):
                for source, place in stacked.items():
                    _put(source, place)
                return

    def _are_neighbours(self, node: ir.Node, paths: Iterable[Path], stacked: Mapping[ir.Value, Place]) -> bool:
        """Whether all sources can be written, and read, where they are stacked, and the Concat is a view of them."""
        windows = []
        for path in paths:
            source, place = path[0][0], stacked[path[0][0]]
            producer = source.producer()
            if producer is None or producer.op_type == "Concat" or moves(producer) or _PLACE in source.meta:
                return False
            window = follow(path, place.window)
            able = writes(producer, source.index() or 0, place.window) and self._suits(source, place)
            if window is None or not able:
                return False
            windows.append(window)
        base = next(iter(stacked.values())).base
        return self._fits(node.outputs[0], base, side_by_side(windows, node.attributes.get_int("axis", 0)))

    def _permute(self, node: ir.Node) -> None:
        """Let the input of a Transpose be written in the output's order, if no reader takes a transposed view."""
        value, out = node.inputs[0], node.outputs[0]
        assert value is not None
        here = place_of(value)
        if self._suits(out, Place(here.base, here.window.transposed(permutation(node)))):
            return
        chain = self._chain(value, before, node) if (before := _before(node, place_of(out))) else None
        if chain:
            self._settle(chain, node)
        else:
            self.copies.add(node)

    def _chain(self, value: ir.Value, place: Place, reader: ir.Node) -> dict[ir.Value, Place] | None:
        """Where a value, and what it is a reshaped or transposed view of, are to be written for `reader`.

        None: what makes it cannot write it there, or another reader cannot read it there.
        """
        producer = value.producer()
        if producer is None or _PLACE in value.meta or not self._suits(value, place, reader):
            return None
        if producer.op_type in BIJECTIVE:
            source, before = producer.inputs[0], _before(producer, place)
            assert source is not None
            chain = self._chain(source, before, producer) if before else None
            return {value: place, **chain} if chain else None
        if moves(producer) and self._may_be_view(producer):
            return None
        return {value: place} if writes(producer, value.index() or 0, place.window) else None

    def _may_be_view(self, node: ir.Node) -> bool:
        """Whether what a moving op makes may well be a view of its input; else it is a copy wherever it lies."""
        value = node.inputs[0]
        assert value is not None
        here = place_of(value)
        found = through(node, here.window)
        return len(found) > 1 or self._fits(node.outputs[0], here.base, found[0])

    def _settle(self, chain: Mapping[ir.Value, Place], node: ir.Node) -> None:
        """Place the values of chains; what lies between them, and `node`, move nothing any more."""
        node.meta[_RENAMES] = True
        for value, place in chain.items():
            _put(value, place)
            producer = value.producer()
            if producer is not None and producer.op_type in BIJECTIVE:
                producer.meta[_RENAMES] = True

    # --- views ----------------------------------------------------------------------------------------------

    def _view(self, node: ir.Node) -> None:
        """Make the outputs of a moving op views of its input, if all readers take them."""
        value = node.inputs[0]
        assert value is not None
        here = place_of(value)
        found = through(node, here.window)
        same = node.op_type in VIEWS and here.window == Window.whole(shape_of(here.base))
        pairs = list(zip(node.outputs, found, strict=True))
        unfit = [] if same else [out for out, window in pairs if not self._fits(out, here.base, window)]
        if unfit and (len(unfit) == len(pairs) or len(unfit) > MOST_COPIES or unfit[0].is_graph_output()):
            return
        for out in unfit:
            self._copy_out(node, out)
        for out, window in pairs:
            assert window is not None
            _put(out, Place(here.base, window))
        node.meta[_RENAMES] = True

    def _copy_out(self, node: ir.Node, value: ir.Value) -> None:
        """Let the readers of one piece of a Split read a copy."""
        copy, out = _copy(node, value)
        node.append(copy)
        value.replace_all_uses_with(out)
        copy.replace_input_with(0, value)

    def _rejoin(self, node: ir.Node) -> None:
        """A Concat of neighbouring parts of one memory is a view of them all."""
        places = [place_of(value) for value in node.inputs if value is not None]
        joined = side_by_side([place.window for place in places], node.attributes.get_int("axis", 0))
        same = len({place.base for place in places}) == 1 and _PLACE not in node.outputs[0].meta
        if same and self._fits(node.outputs[0], places[0].base, joined):
            assert joined is not None
            _put(node.outputs[0], Place(places[0].base, joined))
            node.meta[_RENAMES] = True

    def _suits(self, value: ir.Value, place: Place, without: ir.Node | None = None) -> bool:
        """Whether all readers of a value, those of its views with them, take it from that place."""
        if value.is_graph_output() and not _may_be_output(place):
            return False
        return all(self._takes(use.node, use.idx, place) for use in value.uses() if use.node is not without)

    def _takes(self, node: ir.Node, index: int, place: Place) -> bool:
        if moves(node) and index == 0 and node not in self.copies:
            pairs = zip(node.outputs, through(node, place.window), strict=True)
            return all(self._fits(out, place.base, window) for out, window in pairs)
        return takes(node, index, place.window)

    def _fits(self, value: ir.Value, base: ir.Value, window: Window | None) -> bool:
        return window is not None and self._suits(value, Place(base, window))


def _put(value: ir.Value, place: Place) -> None:
    value.meta[_PLACE] = place


def _may_be_output(place: Place) -> bool:
    """Outputs are row-major, and never a part of what the caller or the model owns."""
    owned = place.base.is_graph_input() or place.base.is_initializer()
    return place.window.is_row_major and not owned


def _parts(node: ir.Node) -> Iterable[tuple[ir.Value, Place]]:
    """The inputs of a Concat, and where they lie in its output."""
    whole, start = place_of(node.outputs[0]), 0
    axis = node.attributes.get_int("axis", 0) % len(whole.window.shape)
    for value in node.inputs:
        assert value is not None
        size = shape_of(value)[axis]
        yield value, Place(whole.base, whole.window.part(axis, start, size))
        start += size


def _before(node: ir.Node, place: Place) -> Place | None:
    """Where the input of a bijective op lies, if its output lies at `place`; None: no window says that."""
    window = inverse(node, place.window)
    return Place(place.base, window) if window else None


def _stacked(values: Sequence[ir.Value], axis: int, name: str) -> dict[ir.Value, Place] | None:
    """Places for values in one new memory, one after another along `axis`; None where they do not fit together."""
    shapes = [list(shape_of(value)) for value in values]
    others = {(value.type, *shape[:axis], None, *shape[axis + 1 :]) for value, shape in zip(values, shapes)}
    if len(others) > 1 or len({len(shape) for shape in shapes}) > 1:
        return None
    whole = (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
    base = ir.Value(name=name, shape=ir.Shape(whole), type=values[0].type)
    starts = [sum(shape[axis] for shape in shapes[:i]) for i in range(len(shapes))]
    window = Window.whole(whole)
    return {v: Place(base, window.part(axis, start, s[axis])) for v, start, s in zip(values, starts, shapes)}


def _copied(node: ir.Node, index: int) -> ir.Value:
    """A Concat's input as the result of a copy."""
    value = node.inputs[index]
    assert value is not None
    copy, out = _copy(node, value)
    node.prepend(copy)
    node.replace_input_with(index, out)
    return out


def _copy(node: ir.Node, value: ir.Value) -> tuple[ir.Node, ir.Value]:
    """A copy of a value, for `node`: a Concat of this value alone."""
    copy = ir.node("Concat", [value], {"axis": 0}, name=f"{node.name}~{value.name}")
    copy.meta.update({key: node.meta[key] for key in ("origin", PROVENANCE) if key in node.meta})
    out = copy.outputs[0]
    out.name, out.type, out.shape = f"{value.name}~{node.name}", value.type, value.shape
    return copy, out
