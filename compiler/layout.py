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

from onnxmesh.compiler.ir.view import plain_attrs, shape_of
from onnxmesh.compiler.ir.window import Window
from onnxmesh.compiler.ops.collectives import VIEWS
from onnxmesh.compiler.strides import takes, writes

MOST_COPIES = 1
"""Parts of a Concat that may be copied; with more of them the Concat stays one instruction."""

_BIJECTIVE = (*VIEWS, "Transpose")
_MOVING = (*_BIJECTIVE, "Slice", "Split", "Expand")
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
            if node.op_type in _MOVING and not renames(node):
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
            return
        self._settle(placed, node)
        for i in rest:
            _put(_copied(node, i), parts[i][1])

    def _permute(self, node: ir.Node) -> None:
        """Let the input of a Transpose be written in the output's order, if no reader takes a transposed view."""
        value, out = node.inputs[0], node.outputs[0]
        assert value is not None
        here = place_of(value)
        if self._suits(out, Place(here.base, here.window.transposed(_perm(node)))):
            return
        wanted = _inverse(node, place_of(out))
        chain = wanted and self._chain(value, wanted, node)
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
        if producer.op_type in _BIJECTIVE:
            source, before = producer.inputs[0], _inverse(producer, place)
            assert source is not None
            chain = self._chain(source, before, producer) if before else None
            return {value: place, **chain} if chain else None
        if producer.op_type in _MOVING or not writes(producer, value.index() or 0, place.window):
            return None
        return {value: place}

    def _settle(self, chain: Mapping[ir.Value, Place], node: ir.Node) -> None:
        """Place the values of chains; what lies between them, and `node`, move nothing any more."""
        node.meta[_RENAMES] = True
        for value, place in chain.items():
            _put(value, place)
            producer = value.producer()
            if producer is not None and producer.op_type in _BIJECTIVE:
                producer.meta[_RENAMES] = True

    # --- views ----------------------------------------------------------------------------------------------

    def _view(self, node: ir.Node) -> None:
        """Make the outputs of a moving op views of its input, if all readers take them."""
        value = node.inputs[0]
        assert value is not None
        here = place_of(value)
        found = _through(node, here.window)
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
        joined = _joined([place.window for place in places], node.attributes.get_int("axis", 0))
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
        if node.op_type in _MOVING and node not in self.copies:
            pairs = zip(node.outputs, _through(node, place.window), strict=True)
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


def _joined(parts: Sequence[Window], axis: int) -> Window | None:
    """The window that holds all parts one after another along `axis`; None where they do not lie so."""
    first = parts[0]
    axis %= len(first.shape)
    step = max((part.strides[axis] for part in parts if part.shape[axis] > 1), default=None)
    if step is None and len(parts) > 1:
        step = parts[1].offset - first.offset
    size = sum(part.shape[axis] for part in parts)
    whole = Window(
        tuple(size if i == axis else n for i, n in enumerate(first.shape)),
        tuple(step or 0 if i == axis else s for i, s in enumerate(first.strides)),
        first.offset,
    )
    start = 0
    for part in parts:
        if not part.lies_as(whole.part(axis, start, part.shape[axis])):
            return None
        start += part.shape[axis]
    return whole


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
    copy.meta.update({key: node.meta[key] for key in ("origin",) if key in node.meta})
    out = copy.outputs[0]
    out.name, out.type, out.shape = f"{value.name}~{node.name}", value.type, value.shape
    return copy, out


def _through(node: ir.Node, window: Window) -> list[Window | None]:
    """The windows of a moving op's outputs, where its input lies in `window`; None: none says that."""
    attrs, shapes = plain_attrs(node), [shape_of(value) for value in node.outputs]
    match node.op_type:
        case "Transpose":
            return [window.transposed(_perm(node))]
        case "Expand":
            return [window.expanded(shapes[0])]
        case "Slice":
            return [_sliced(window, attrs["axes"], attrs["starts"], attrs["steps"], shapes[0])]
        case "Split":
            axis = int(attrs.get("axis", 0)) % len(window.shape)
            starts = [sum(shape[axis] for shape in shapes[:i]) for i in range(len(shapes))]
            return [window.part(axis, start, shape[axis]) for start, shape in zip(starts, shapes)]
        case _:
            return [window.reshaped(shapes[0])]


def _sliced(
    window: Window, axes: Iterable[int], starts: Iterable[int], steps: Iterable[int], shape: tuple[int, ...]
) -> Window | None:
    for axis, start, step in zip(axes, starts, steps):
        if step < 1:
            return None
        window = window.part(axis, start, shape[axis], step)
    return window


def _inverse(node: ir.Node, place: Place) -> Place | None:
    """Where the input of a Reshape or Transpose lies, if its output lies at `place`."""
    value, window = node.inputs[0], place.window
    assert value is not None
    if node.op_type == "Transpose":
        perm = _perm(node)
        return Place(place.base, window.transposed([perm.index(i) for i in range(len(perm))]))
    found = window.reshaped(shape_of(value))
    return Place(place.base, found) if found else None


def _perm(node: ir.Node) -> list[int]:
    perm = plain_attrs(node).get("perm")
    return list(perm or reversed(range(len(shape_of(node.outputs[0])))))
