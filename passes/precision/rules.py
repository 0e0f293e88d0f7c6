"""What stays float32 when a model is converted to half precision, and why (docs/precision.md).

Some nodes must; then what only they read stays with them, back through elementwise ops and views, and what is
computed of nothing but their results. So a chain is not rounded in its middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from onnxmesh.compiler.ir.view import is_constant
from onnxmesh.passes.graph.build import is_folded
from onnxmesh.passes.graph.infer import present, shape_of
from onnxmesh.passes.graph.match import label
from onnxmesh.runtime.kernels.elementwise import ELEMENTWISE, PREDICATES

WIDE = ir.DataType.FLOAT
MASK = 3
"""Which input of an attention its mask is."""
LONG = 256
"""Sums over more elements stay float32."""
FEW = 512
"""A linear layer with so many results or fewer, all of them chosen among, stays float32."""
READABLE = 1 << 16
"""Constants of so many bytes or fewer are looked at."""

ATTENTION = frozenset(("Attention", "AttentionBlock"))
STATISTICS = {"AttentionBlock": (1, 2)}
"""Outputs that are float32 in any case."""
MOVES = frozenset(
    """
    Reshape Identity Transpose Expand Concat Split Slice Pad Tile Trilu Gather GatherElements GatherND ScatterND
    ScatterElements TensorScatter DepthToSpace SpaceToDepth
    """.split()
)
"""Ops that move elements."""
COMPUTE = frozenset(
    """
    MatMul Einsum Experts Conv ConvTranspose Rotary LayerNormalization RMSNormalization GroupNormalization
    InstanceNormalization BatchNormalization LpNormalization LRN Softmax LogSoftmax MaxPool AveragePool GlobalMaxPool
    GlobalAveragePool LpPool GlobalLpPool Col2Im MeanVarianceNormalization Resize ReduceMax ReduceMin ReduceMean
    ReduceSum ReduceL1 ReduceL2 ReduceSumSquare
    """.split()
)
"""Ops that compute in float32 from half precision and round once."""
QUANTISES = frozenset(("QuantizeLinear", "DequantizeLinear"))
_HALF = ELEMENTWISE | MOVES | COMPUTE | ATTENTION

_ANGLES = frozenset("Sin Cos Tan".split())
_RANGES = frozenset("Exp Log Sinh Cosh Pow".split())
_SUMS = frozenset("ReduceMean ReduceSum ReduceL1 ReduceL2 ReduceSumSquare".split())
_RUNNING = frozenset("CumSum CumProd ReduceProd ReduceLogSum ReduceLogSumExp".split())
_CHOICES = frozenset("TopK ArgMax ArgMin Hardmax".split())
_JUMPS = frozenset("Floor Ceil Round Sign Mod".split())
_SELECT = frozenset("Where Max Min Clip".split())
"""Ops that select a constant and compute nothing of it; one beyond the range may be the largest number instead."""
_CHAINS = ELEMENTWISE | MOVES | {"Softmax", "LogSoftmax"}
"""Ops that stay float32 with what is made of them."""


@dataclass(frozen=True)
class Kept:
    """Why a node stays float32.

    Attributes:
        gathers: what only it reads stays float32 too.
        deep: so does what others read as well, back to integers, constants and inputs, if no activation comes in.
        choice: small linear layers among that as well.
        huge: its result may lie beyond the range of half precision, as the least finite number of a mask does.
        root: the node whose reason it is, in words; empty for its own.
    """

    reason: str
    gathers: bool = True
    deep: bool = False
    choice: bool = False
    huge: bool = False
    root: str = ""

    @property
    def text(self) -> str:
        """The reason as the report gives it."""
        return f"{self.root}: {self.reason}" if self.root else self.reason


def kept(graph: ir.Graph, half: ir.DataType) -> dict[ir.Node, Kept]:
    """The nodes of a graph in normal form that stay float32, in the graph's order."""
    found = {node: why for node in graph if _is_float(node) and (why := _reason(node, half)) is not None}
    _add_ancestors(graph, found)
    _add_followers(graph, found)
    return {node: found[node] for node in graph if node in found}


def is_wide(value: ir.Value | None) -> bool:
    """Whether a value is float32."""
    return value is not None and value.dtype == WIDE


def is_statistic(value: ir.Value) -> bool:
    """Whether a value is float32 whatever its node computes in."""
    node = value.producer()
    return node is not None and value.index() in STATISTICS.get(node.op_type, ())


def readable(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a small float32 constant."""
    if value is None or not is_wide(value) or not is_constant(value) or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None or tensor.nbytes > READABLE:
        return None
    return tensor.numpy() if is_folded(value) or tensor.size == 1 else None


# --- what must ----------------------------------------------------------------------------------------------


def _is_float(node: ir.Node) -> bool:
    return any(is_wide(value) for value in (*node.inputs, *node.outputs))


def _reason(node: ir.Node, half: ir.DataType) -> Kept | None:
    """Why this node must, whatever stands around it."""
    op = node.op_type
    if op == "Cast":
        return _cast(node)
    narrow = half == ir.DataType.FLOAT16  # in range, too
    if op in _ANGLES:
        return Kept("an angle may be large", deep=True)
    if op in _RUNNING:
        return Kept("a running sum or product, or a logarithm of one")
    if op in _SUMS and _count(node) > LONG:
        return Kept(f"a sum over {_count(node)} elements", huge=narrow)
    if op in _CHOICES:
        return Kept("a choice between values that may be near each other", choice=True)
    if op in _JUMPS:
        return Kept("its result jumps between values that are near each other")
    if op in _RANGES and not _is_square(node, half):
        return Kept("its error and its range grow with its operands", huge=narrow)
    if op in QUANTISES:
        return Kept("a scale is exact", gathers=True)
    if op not in _HALF:
        return Kept("it has no half precision", gathers=False)
    if op in ELEMENTWISE and any(_is_integer_sum(value) for value in node.inputs):
        return Kept("sums of integers go beyond half precision", huge=narrow)
    if op in ELEMENTWISE - _SELECT and any(_is_beyond(value, half) for value in node.inputs):
        return Kept("a constant beyond the range of half precision", huge=True)
    return None


def _is_integer_sum(value: ir.Value | None) -> bool:
    """Whether a value is a sum of integers as a float."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Cast":
        return False
    node = present(node, 0).producer()
    while node is not None and node.op_type in ("Add", "Reshape", "Transpose"):
        node = present(node, 0).producer()
    return node is not None and node.op_type in ("MatMulInteger", "ConvInteger")


def _cast(node: ir.Node) -> Kept | None:
    source, target = present(node, 0).dtype, node.outputs[0].dtype
    assert source is not None and target is not None
    if target == WIDE:
        exact = source in (WIDE, ir.DataType.BOOL)
        return None if exact else Kept(f"made of {source.name.lower()}, which half precision does not hold")
    if target == ir.DataType.BOOL:
        return None
    return Kept(f"{target.name.lower()} is made of it", deep=True)


def _count(node: ir.Node) -> int:
    """How many elements are summed for one of the result."""
    whole, result = (prod(shape_of(value)) for value in (present(node, 0), node.outputs[0]))
    return whole // max(1, result)


def _is_square(node: ir.Node, half: ir.DataType) -> bool:
    """A root, or in bfloat16, which has float32's range, a square."""
    exponent = readable(node.inputs[1]) if node.op_type == "Pow" else None
    known = (0.5, 1.0, 2.0) if half == ir.DataType.BFLOAT16 else (0.5, 1.0)
    return exponent is not None and exponent.size == 1 and float(exponent.reshape(())) in known


def _is_beyond(value: ir.Value | None, half: ir.DataType) -> bool:
    """Whether a small constant holds numbers that half precision has only as infinity, or as zero."""
    numbers = readable(value)
    if numbers is None:
        return False
    numbers = numbers[np.isfinite(numbers)]
    with np.errstate(over="ignore"):
        rounded = numbers.astype(half.numpy()).astype(np.float32)
    return not np.isfinite(rounded).all() or bool(((rounded == 0) & (numbers != 0)).any())


# --- what stays with it -------------------------------------------------------------------------------------


def _add_ancestors(graph: ir.Graph, found: dict[ir.Node, Kept]) -> None:
    """What only such nodes read, and what they read of things that are computed of no activation."""
    plain = _plain(graph)
    for node in reversed(graph):
        if node in found or not any(is_wide(value) for value in node.outputs):
            continue
        wanting = [_wanting(*use, found) for value in node.outputs for use in value.uses()]
        wanted = max((why for why in wanting if why is not None), key=lambda why: why.deep, default=None)
        if wanted is None:
            continue
        alone = None not in wanting and _is_inner(node)
        joins = node.op_type in _CHAINS or (wanted.choice and _is_small_linear(node))
        if (alone and joins) or (wanted.deep and node in plain):
            found[node] = wanted


def _wanting(node: ir.Node, index: int, found: dict[ir.Node, Kept]) -> Kept | None:
    """Why a node wants an input of it to stay float32."""
    if node.op_type in ATTENTION and index == MASK:
        return Kept(
            "adds up to numbers beyond the range of half precision", deep=True, huge=True, root=f"mask of {label(node)}"
        )
    why = found.get(node)
    if why is None or not why.gathers or (node.op_type in QUANTISES and index == 0):
        return None
    return why if why.root else replace(why, root=f"goes into {node.op_type} {label(node)}")


def _is_inner(node: ir.Node) -> bool:
    return not any(value.is_graph_output() for value in node.outputs)


def _plain(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that are computed of constants, integers and inputs by elementwise ops, moves and outer products."""
    found: set[ir.Node] = set()
    for node in graph:
        known = all(value.producer() is None or value.producer() in found for value in _floats(node))
        if known and (node.op_type in ELEMENTWISE | MOVES or _is_outer(node)) and not _is_lookup(node):
            found.add(node)
    return found


def _floats(node: ir.Node) -> Iterator[ir.Value]:
    return (value for value in node.inputs if value is not None and is_wide(value))


def _is_outer(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and shape_of(present(node, 0))[-1] == 1


def _is_lookup(node: ir.Node) -> bool:
    """An embedding: rows of a large table."""
    return node.op_type == "Gather" and is_constant(node.inputs[0]) and prod(shape_of(present(node, 0))) > READABLE


def _is_small_linear(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and shape_of(node.outputs[0])[-1] <= FEW


def _add_followers(graph: ir.Graph, found: dict[ir.Node, Kept]) -> None:
    """What is computed of nothing but float32 results and constants."""
    for node in graph:
        if node in found or node.op_type not in _CHAINS:
            continue
        computed = [value for value in _floats(node) if not is_constant(value)]
        stays = [value.producer() for value in computed if value.producer() in found or is_statistic(value)]
        if stays and stays[0] is not None and (len(stays) == len(computed) or node.op_type in PREDICATES):
            before = found.get(stays[0])
            root = f"computed of {stays[0].op_type} {label(stays[0])}"
            found[node] = Kept("its result is float32", huge=before is not None and before.huge, root=root)
