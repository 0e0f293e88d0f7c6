"""Quantisation: scales go with their axis, a block is never cut; products of integers are cut as MatMul and Conv."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Port, Shape, Strategy, numbered, register
from onnxmesh.compiler.ops.conv import conv, conv_flops, conv_localise, conv_ports
from onnxmesh.compiler.ops.matmul import matmul, matmul_flops
from onnxmesh.runtime.placement import Placement, R, Segment, Shard

# --- QuantizeLinear, DequantizeLinear -----------------------------------------------------------------------


def linear(view: OpView) -> Factors:
    """Every dim of x is free; a scale and a zero point of an axis are cut with it, those of a tensor are whole."""
    x = _shape(view, 0)
    labels = numbered(x)
    if _block(view):
        axis = _axis(view)
        labels = tuple(None if i == axis else label for i, label in enumerate(labels))
        scales = labels
    elif _is_one(view.ins[1]):
        scales = (None,) * len(_shape(view, 1))
    else:
        scales = (labels[_axis(view)],)
    return Factors((labels, *(() if shape is None else scales for shape in view.ins[1:])), (labels,))


def blocked(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """The axis of the blocks: every rank has whole ones."""
    block, axis = _block(view), _axis(view)
    if not block or not isinstance(placement, Shard) or placement.dim != axis or _shape(view, 0)[axis] % block:
        return
    of_scales = not port.is_output and port.index > 0
    if not of_scales and any(s.local(view.ranks) % block for s in placement.segments):
        return
    cut = placement.segments
    blocks = cut if of_scales else tuple(Segment(s.size // block, s.copies) for s in cut)
    numbers = Shard(axis, tuple(Segment(s.size * block, s.copies) for s in blocks))
    ins = (numbers, *(R if shape is None else Shard(axis, blocks) for shape in view.ins[1:]))
    yield Strategy("block", ins, (numbers,))


def _shape(view: OpView, index: int) -> Shape:
    shape = view.ins[index]
    assert shape is not None
    return shape


def _axis(view: OpView) -> int:
    return int(view.attr("axis", 1)) % max(1, len(_shape(view, 0)))


def _block(view: OpView) -> int:
    return 0 if len(_shape(view, 1)) < 2 else int(view.attr("block_size", 0))


def _is_one(shape: Shape | None) -> bool:
    """Whether a scale or a zero point is one number for all."""
    return shape is None or shape in ((), (1,))


_LINEAR_SAMPLES: tuple[tuple[str, dict[str, int]], ...] = (
    ("f[6,12], p[] -> Q[6,12]", {}),
    ("f[6,12], p[12], Q[12] -> Q[6,12]", {"axis": 1}),
    ("f[12,4,3], p[12], q[12] -> q[12,4,3]", {"axis": -3}),
    ("f[13,12], p[1], q[1] -> q[13,12]", {"axis": 0}),
    ("f[4,24], p[4,6], w[4,6] -> w[4,24]", {"axis": 1, "block_size": 4}),
    ("f[48,6], p[24,6] -> Q[48,6]", {"axis": 0, "block_size": 2}),
    ("f[6,13], p[6,4], q[6,4] -> q[6,13]", {"axis": 1, "block_size": 4}),
)
register("QuantizeLinear", factors=linear, ports=blocked, samples=_LINEAR_SAMPLES)
register(
    "DequantizeLinear",
    factors=linear,
    ports=blocked,
    samples=(
        ("Q[6,12], p[]! -> f[6,12]", {}),
        ("Q[6,12], p[12]!, Q[12] -> f[6,12]", {"axis": 1}),
        ("q[12,4,3], p[12]!, q[12]! -> f[12,4,3]", {"axis": -3}),
        ("j[13,12], p[12]! -> f[13,12]", {"axis": 1}),
        ("w[4,24]!, p[4,6]!, w[4,6]! -> f[4,24]", {"axis": 1, "block_size": 4}),
        ("Q[48,6]!, p[24,6]! -> f[48,6]", {"axis": 0, "block_size": 2}),
        ("q[6,13], p[6,4]!, q[6,4] -> f[6,13]", {"axis": 1, "block_size": 4}),
    ),
)


def unpack(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """UnpackBits: every byte of the last dim becomes several numbers; the other dims stay."""
    last, numbers = len(view.outs[0]) - 1, 8 // int(view.attr("bits"))
    if not isinstance(placement, Shard):
        return
    before = placement
    if port.is_output and placement.dim == last:
        if any(s.local(view.ranks) % numbers for s in placement.segments):
            return
        before = Shard(last, tuple(Segment(s.size // numbers, s.copies) for s in placement.segments))
    after = before
    if before.dim == last:
        after = Shard(last, tuple(Segment(s.size * numbers, s.copies) for s in before.segments))
    yield Strategy(str(placement.dim), (before,), (after,))


register(
    "UnpackBits",
    ports=unpack,
    samples=(("Q[4,6,12]! -> Q[4,6,24]", {"bits": 4}), ("Q[12,13] -> Q[12,52]", {"bits": 2})),
)

# --- products of integers -----------------------------------------------------------------------------------


def _products(view: OpView) -> OpView:
    """The same of the two factors alone, without zero points."""
    pair = replace(view, ins=view.ins[:2], in_dtypes=view.in_dtypes[:2])
    return replace(pair, constant=view.constant[:2], fixed=view.fixed[:2])


def matmul_integer(view: OpView) -> Factors:
    """As MatMul; zero points of rows and columns are cut with these."""
    factors = matmul(_products(view))
    zeros = [_zero_labels(shape, i, factors.ins[i]) for i, shape in enumerate(view.ins[2:])]
    return _with_zeros(factors, zeros)


def _with_zeros(factors: Factors, zeros: Sequence[Labels]) -> Factors:
    """A piece that stands for nothing is 0, but less a zero point it would count: none is on several ranks."""
    single = tuple(label for label, _ in factors.sums) if zeros else ()
    return replace(factors, ins=(*factors.ins, *zeros), linear=(), single=single)


def _zero_labels(shape: Shape | None, of: int, labels: Labels) -> Labels:
    """Of the rows of a (`of` 0) or the columns of b (1); a dim of size 1 broadcasts."""
    if shape is None or _is_one(shape):
        return (None,) * len(shape or ())
    if len(shape) == 1:
        return (labels[of - 2],)
    return tuple(None if size == 1 else label for size, label in zip(shape, labels[-len(shape) :]))


def conv_integer(view: OpView) -> Factors:
    """As Conv; zero points of output channels are cut with these."""
    factors = conv(_products(view))
    zeros: list[Labels] = [() if shape is None else (None,) * len(shape) for shape in view.ins[2:]]
    if len(zeros) > 1 and not _is_one(view.ins[3]):
        zeros[1] = (factors.ins[1][0],)
    return _with_zeros(factors, zeros)


def conv_integer_ports(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """As Conv."""
    if not port.is_output and port.index > 1:
        return
    for strategy in conv_ports(_products(view), port, placement):
        yield replace(strategy, ins=(*strategy.ins, *_zeros(view, strategy.ins[1])))


def _zeros(view: OpView, weight: Placement) -> tuple[Placement, ...]:
    """Placements of the zero points: one for every output channel goes with these."""
    by_channel = isinstance(weight, Shard) and weight.dim == 0
    return tuple(
        Shard(0, weight.segments) if i == 1 and by_channel and not _is_one(shape) else R  # type: ignore[union-attr]
        for i, shape in enumerate(view.ins[2:])
    )


def conv_integer_localise(view: OpView, strategy: Strategy) -> dict[str, Any]:
    """As Conv."""
    return conv_localise(_products(view), strategy)


register(
    "MatMulInteger",
    factors=matmul_integer,
    flops=matmul_flops,
    samples=(
        ("Q[12,24], q[24,6]! -> j[12,6]", {}),
        ("Q[2,12,13], Q[13,6], Q[], Q[] -> j[2,12,6]", {}),
        ("q[4,12], q[12,24]!, q[1], q[24]! -> j[4,24]", {}),
        ("Q[2,4,12], Q[2,12,6], Q[2,4,1], Q[2,1,6] -> j[2,4,6]", {}),
    ),
)
register(
    "ConvInteger",
    factors=conv_integer,
    ports=conv_integer_ports,
    localise=conv_integer_localise,
    flops=conv_flops,
    samples=(
        ("Q[2,12,8,8], Q[6,12,3,3]!, Q[], Q[] -> j[2,6,8,8]", {"pads": [1, 1, 1, 1]}),
        ("Q[2,6,12], Q[12,6,2], Q[] -> j[2,12,6]", {"strides": [2]}),
        ("Q[2,12,6], Q[24,1,3], Q[], Q[] -> j[2,24,4]", {"group": 12}),
        ("Q[6,12,4], Q[12,12,1]! -> j[6,12,4]", {}),
    ),
)
