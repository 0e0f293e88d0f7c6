"""Half tables: the tables of a Rotary that hold every value twice are replaced by those that hold it once.

Exporters repeat the angles of d/2 pairs to the d entries of a row: `concat(f, f)` for halves, every value twice in a
row for pairs, before or after cos and sin, joined from the parts of several axes. A Rotary takes one value a pair
(docs/dialect.md): half the work for the tables, and half the bytes read by every block.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.passes.graph.build import fresh, is_folded
from onnxmesh.passes.graph.constants import SOURCES, recipe_of
from onnxmesh.passes.graph.match import DOMAIN, Editor, array, given, integer, ints, producer, shape_of
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE
from onnxmesh.runtime.kernels.fused import ROTARY


def halve_tables(editor: Editor) -> None:
    """Give Rotaries half tables where both tables hold every value twice, in place."""
    finders = [_Halves(editor, interleaved) for interleaved in (False, True)]
    for node in [node for node in editor.graph if node.op_type == ROTARY]:
        size = shape_of(given(node, 0))[-1]
        tables = given(node, 1), given(node, 2)
        find = finders[integer(node, "interleaved")]
        if any(shape_of(table)[-1] != size or not find.repeats(table) for table in tables):
            continue
        for i, table in enumerate(tables, 1):
            node.replace_input_with(i, find.half(table))
        for table in tables:
            editor.prune(table)


class _Halves:
    """Values whose last dim holds every entry twice: in its two halves, or `interleaved`, two in a row."""

    def __init__(self, editor: Editor, interleaved: bool) -> None:
        self._editor = editor
        self._interleaved = interleaved
        self._repeats: dict[ir.Value, bool] = {}
        self._half: dict[ir.Value, ir.Value] = {}

    def repeats(self, value: ir.Value) -> bool:
        """Whether the value holds every entry twice, or one for all."""
        if value not in self._repeats:
            self._repeats[value] = self._looks(value)
        return self._repeats[value]

    def half(self, value: ir.Value) -> ir.Value:
        """The value with every entry once; one that holds one for all is itself."""
        if not shape_of(value) or shape_of(value)[-1] == 1:
            return value
        if value not in self._half:
            self._half[value] = self._made(value)
        return self._half[value]

    def _looks(self, value: ir.Value) -> bool:
        shape, node = shape_of(value), producer(value)
        if not shape or shape[-1] == 1:
            return True
        if shape[-1] % 2:
            return False
        if node is None:
            return self._is_constant(value)
        return self._source(node) is not None or (len(node.outputs) == 1 and self._passes(node))

    def _passes(self, node: ir.Node) -> bool:
        """Whether an op does to every entry of the last dim the same, so that it repeats what its input repeats."""
        operands = [value for value in node.inputs if value is not None]
        last = len(shape_of(node.outputs[0])) - 1
        match node.op_type:
            case "Concat":
                along = integer(node, "axis") % (last + 1) == last
                parts = all(shape_of(value)[-1] % 2 == 0 and self.repeats(value) for value in operands)
                return parts and (self._interleaved or not along)
            case "Reshape" | "Expand":
                kept = shape_of(operands[0])[-1:] == shape_of(node.outputs[0])[-1:]
            case "Transpose":
                kept = ints(node, "perm")[-1:] == (last,)
            case "Slice":
                kept = all(axis % (last + 1) != last for axis in ints(node, "axes"))
            case "Gather":
                axis, rank = integer(node, "axis"), len(shape_of(operands[0]))
                return axis % rank != rank - 1 and self.repeats(operands[0])
            case op if op in ELEMENTWISE:
                kept = True
            case _:
                return False
        return kept and all(self.repeats(value) for value in operands)

    def _source(self, node: ir.Node) -> ir.Value | None:
        """What a node repeats itself: `concat(f, f)`, or f in pairs."""
        if not self._interleaved:
            twice = node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
            last = len(shape_of(node.outputs[0])) - 1
            return given(node, 0) if twice and integer(node, "axis") % (last + 1) == last else None
        pairs = producer(given(node, 0), "Expand", "Concat") if node.op_type == "Reshape" else None
        if pairs is None:
            return None
        shape, single = shape_of(pairs.outputs[0]), (*shape_of(pairs.outputs[0])[:-1], 1)
        whole = (*shape[:-2], 2 * shape[-2]) if len(shape) > 1 and shape[-1] == 2 else ()
        same = all(value is pairs.inputs[0] for value in pairs.inputs[: 2 if pairs.op_type == "Concat" else 1])
        merged = whole and shape_of(node.outputs[0])[-1:] == whole[-1:]
        return given(pairs, 0) if merged and same and shape_of(given(pairs, 0)) == single else None

    def _is_constant(self, value: ir.Value) -> bool:
        data = array(value)
        return data is not None and np.array_equal(*self._parts(data))

    def _parts(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        half = data.shape[-1] // 2
        return (data[..., ::2], data[..., 1::2]) if self._interleaved else (data[..., :half], data[..., half:])

    def _made(self, value: ir.Value) -> ir.Value:
        shape = (*shape_of(value)[:-1], shape_of(value)[-1] // 2)
        node = producer(value)
        if node is None:
            return self._constant(value, shape)
        source = self._source(node)
        if source is not None:
            return self._editor.reshape(source, shape)
        first, *rest = node.inputs
        halves = rest if node.op_type == "Gather" else [v if v is None else self.half(v) for v in rest]
        inputs = [self.half(first) if first is not None else None, *halves]
        attrs = {name: attr.value for name, attr in node.attributes.items()}
        domain = DOMAIN if node.domain == DOMAIN else ""
        return self._editor.op(node.op_type, inputs, shape, value.dtype, attrs, domain)

    def _constant(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """The half of a constant: of a weight as a recipe."""
        name, data = value.name or "table", array(value)
        assert data is not None and value.dtype is not None
        if is_folded(value):
            return self._editor.constant(np.ascontiguousarray(self._parts(data)[0]), name)
        recipe, last = recipe_of(value), len(shape)
        if self._interleaved:
            pairs = recipes.reshape(recipe, (*shape, 2))
            half = recipes.reshape(recipes.slice_(pairs, last, 0, 1), shape)
        else:
            half = recipes.slice_(recipe, last - 1, 0, shape[-1])
        graph = self._editor.graph
        sources = graph.meta[SOURCES]
        if recipe["op"] == "source" and value.const_value is not None:
            sources.setdefault(recipe["name"], value.const_value)
        made = recipes.initialiser(fresh(graph, name), half, value.dtype, shape, sources)
        graph.initializers.add(made)
        return made
