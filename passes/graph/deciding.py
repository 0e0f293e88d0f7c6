"""Which graph inputs decide by their numbers what a plan is: its shapes, and the attributes of the normal form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from onnxmesh.passes.graph.infer import constant, static_shape

_REDUCTIONS = ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
DECIDING: dict[str, tuple[int, ...]] = {
    **{f"Reduce{name}": (1,) for name in _REDUCTIONS},
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Split", "SplitToSequence"), (1,)),
    **dict.fromkeys(("TopK", "OneHot", "Trilu", "CumSum", "CumProd", "Upsample"), (1,)),
    **dict.fromkeys(("AffineGrid", "CenterCropPad"), (1,)),
    **dict.fromkeys(("ConstantOfShape", "HannWindow", "HammingWindow", "BlackmanWindow"), (0,)),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "Range": (0, 1, 2),
    "Dropout": (1, 2),
    "Col2Im": (1, 2),
    "MaxUnpool": (2,),
    "DFT": (1, 2),
    "STFT": (1, 3),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
}
"""By op, the inputs that shape inference or the normal form need as numbers."""

_SHAPES_ONLY = frozenset({"Shape", "Size"})
"""Ops that read nothing of their input but its shape, which is static."""

_DATA_DEPENDENT = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit"})
"""Ops whose outputs are data, whatever they are used for."""


def deciding_inputs(model: ir.Model) -> list[str]:
    """The graph inputs whose values must be known when compiling, in the order of the model's inputs.

    They are traced backwards from the operands of `DECIDING`. Only scalars and vectors count: a shape that is computed
    of larger inputs depends on data.
    """
    found = deciding_values(value for node in model.graph.all_nodes() for value in _operands(node))
    return [value.name or "" for value in model.graph.inputs if value in found]


def deciding_values(values: Iterable[ir.Value]) -> set[ir.Value]:
    """The scalar and vector inputs of the graph that `values` are computed from."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if value.is_graph_input():
            if value.const_value is None and _is_small(value):
                found.add(value)
        elif node is not None and node.op_type not in _SHAPES_ONLY and node.op_type not in _DATA_DEPENDENT:
            pending += [v for v in node.inputs if v is not None]
            pending += [v for branch in _branches(node) for v in branch.outputs]
    return found


def value_hint(*values: ir.Value | None) -> str:
    """What to do about `values`, which must be known when compiling but are computed from data."""
    inputs = sorted(v.name or "" for v in deciding_values(v for v in values if v is not None))
    if not inputs:
        return "export the model with that value fixed"
    options = " ".join(f"--value {name}=..." for name in inputs)
    return f"give {options}, which binds {'these inputs' if len(inputs) > 1 else 'that input'} to a value"


def unbound_values(node: ir.Node) -> list[ir.Value]:
    """The operands of `node` that decide a shape, but are computed from graph inputs which could be bound to values."""
    return [value for value in _operands(node) if constant(value) is None and deciding_values([value])]


def _operands(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs of a node that decide."""
    if node.domain:
        return
    for index in DECIDING.get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None:
            yield value


def _branches(node: ir.Node) -> Iterator[ir.Graph]:
    """The branches of an If: one of them becomes part of the graph. A loop's body computes data."""
    if node.op_type == "If":
        yield from (a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH)


def _is_small(value: ir.Value) -> bool:
    if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
        return False
    shape = static_shape(value)
    rank = len(value.shape) if value.shape is not None else 1
    return rank <= 1 and (shape is None or not shape or shape[0] <= 64)
