"""Loose values in the normal form: tensors whose dims depend on data, strings, sequences, optionals.

While a graph is bound they have their ONNX types. Then they are set apart (passes/bind/apart.py): a node that touches
one gets an op that no pass knows, `Loose.OP` or `Reference.OP`, and the values become tokens, uint8 of rank 0, so that
passes may look at every value alike. What a token stands for is noted at the node that makes it, and at graph inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxmesh.compiler.reason import Reason
from onnxmesh.runtime.loose import tensor_type

LOOSE, REFERENCE = "Loose.", "Reference."
"""How the ops of nodes begin that touch loose values, or that onnx.reference computes, before the name of the op."""

BODIES, CAPTURED = "bodies", "captured"
"""`meta` keys of control flow: its graphs by name, each in normal form and without captures of its own; and how many
of the node's last inputs are what they capture, which are the last inputs of each."""

HINT = "hint"
"""`meta` key of a node that was set apart because of inputs without a value: what to do about it."""

_TYPES = "types"


@dataclass(frozen=True, slots=True)
class LooseType:
    """An ONNX type, and what is known of the shape: -1 for a dim that is not, no dims where their number is not."""

    type: ir.TypeProtocol
    shape: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The type as ONNX Runtime writes it."""
        return _text(self.type)


def loose_type(value: ir.Value) -> LooseType | None:
    """The type of a loose value of a graph in normal form; None for a tensor of static shape."""
    node = value.producer()
    if node is None:
        found: LooseType | None = value.meta.get(_TYPES)
        return found
    types = node.meta.get(_TYPES)
    return None if types is None else types[value.index() or 0]


def is_loose(value: ir.Value) -> bool:
    """Whether a value of a graph in normal form is loose."""
    return loose_type(value) is not None


def note(value: ir.Value, found: LooseType) -> None:
    """Make `value` a token that stands for a loose value."""
    node = value.producer()
    if node is None:
        value.meta[_TYPES] = found
    else:
        types = list(node.meta.get(_TYPES) or [None] * len(node.outputs))
        types[value.index() or 0] = found
        node.meta[_TYPES] = tuple(types)
    value.type, value.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(())


def onnx_op(node: ir.Node) -> str:
    """The op of a node as its model writes it."""
    return node.op_type.removeprefix(LOOSE).removeprefix(REFERENCE)


def kernel_of(node: ir.Node) -> str:
    """The kernel of a node that was set apart."""
    return REFERENCE.rstrip(".") if node.op_type.startswith(REFERENCE) else onnx_op(node)


def why_apart(op: str) -> str:
    """Why an op in normal form that no rule knows is computed by every rank; empty for all others."""
    if op.startswith(LOOSE):
        return Reason("its shape depends on data, or its values are no tensors", "OM2105")
    if op.startswith(REFERENCE):
        name = op.removeprefix(REFERENCE)
        return Reason(f"there is no kernel for {name}: onnx.reference computes it on the host", "OM2106")
    if op in ("If", "Loop", "Scan", "SequenceMap"):
        return Reason("control flow runs whole on every rank", "OM2107")
    return ""


def _text(kind: ir.TypeProtocol) -> str:
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        outer = "seq" if isinstance(kind, ir.SequenceType) else "optional"
        return f"{outer}({_text(kind.elem_type)})"
    return tensor_type(str(ir.DataType(kind.dtype).numpy().name))
