"""Convolutions: batch, output channels, input channels (summed), groups; space where windows do not overlap."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from onnxmesh.compiler.ir import segments as algebra
from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Port, Strategy, register
from onnxmesh.compiler.ops.space import stands_apart, tiled
from onnxmesh.runtime.placement import Placement, R, Segments, Shard


def conv(view: OpView) -> Factors:
    """n c spatial, o c kernel, o -> n o spatial: batch, output channels, input channels (summed)."""
    spatial = (None,) * (len(view.outs[0]) - 2)
    group = view.attr("group", 1)
    o, c = ("o", "c") if group == 1 else (None, None)
    ins: list[Labels] = [("n", c, *spatial), (o, c, *spatial)]
    bias = frozenset(range(2, len(view.ins)))
    return Factors(
        (*ins, *((o,) for _ in bias)),
        (("n", o, *spatial),),
        sums=(("c", "sum"),) if c else (),
        linear=(bias | {0}, bias | {1}),
        added=bias,
    )


def conv_ports(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """Two more: groups of channels; and space, where the kernel is the stride (patch embedding)."""
    if not isinstance(placement, Shard) or placement.dim >= len(view.outs[0]) or port == Port(False, 2):
        return
    dim = placement.dim
    if view.attr("group", 1) > 1 and dim == (0 if port == Port(False, 1) else 1):
        yield from _grouped(view, placement.segments, from_input=port == Port(False, 0))
    kernel = view.ins[1][2:]  # type: ignore[index]
    if dim >= 2 and port != Port(False, 1) and stands_apart(view, kernel, dim):
        yield from tiled(view, port, placement, kernel[dim - 2], 1)


def _grouped(view: OpView, cut: Segments, *, from_input: bool) -> Iterable[Strategy]:
    """Whole groups on every rank, from a cut of the input's channels, or of the output's and so of the weight's."""
    group = view.attr("group", 1)
    sizes = [view.ins[0][1] // group, view.outs[0][1] // group]  # type: ignore[index]
    given, other = sizes if from_input else reversed(sizes)
    derived = algebra.scaled(cut, view.ranks, given, other)
    if derived is None:
        return
    before, after = (cut, derived) if from_input else (derived, cut)
    weight = before if view.op == "ConvTranspose" else after
    bias = (Shard(0, after),) * (len(view.ins) - 2)
    yield Strategy("group", (Shard(1, before), Shard(0, weight), *bias), (Shard(1, after),))


def conv_localise(view: OpView, strategy: Strategy) -> dict[str, Any]:
    """Fewer channels are fewer groups."""
    if strategy.factor != "group":
        return {}
    placement, group = strategy.outs[0], view.attr("group", 1)
    assert isinstance(placement, Shard)
    return {"group": placement.local(view.ranks) * group // placement.size}


def conv_flops(view: OpView) -> float:
    """2 times output elements times kernel elements."""
    weight = view.ins[1]
    assert weight is not None
    return 2.0 * prod(view.outs[0]) * prod(weight[1:])


def conv_transpose(view: OpView) -> Factors:
    """n c spatial, c o kernel, o -> n o spatial: batch, output channels, input channels (summed)."""
    spatial = (None,) * (len(view.outs[0]) - 2)
    o, c = ("o", "c") if view.attr("group", 1) == 1 else (None, None)
    bias = frozenset(range(2, len(view.ins)))
    return Factors(
        (("n", c, *spatial), (c, o, *spatial), *((o,) for _ in bias)),
        (("n", o, *spatial),),
        sums=(("c", "sum"),) if c else (),
        linear=(bias | {0}, bias | {1}),
        added=bias,
    )


def conv_transpose_ports(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """Groups of channels; and space, where the kernel is the stride."""
    if not isinstance(placement, Shard) or port == Port(False, 2):
        return
    dim, kernel = placement.dim, view.ins[1][2:]  # type: ignore[index]
    if view.attr("group", 1) > 1 and dim == (0 if port == Port(False, 1) else 1):
        yield from _grouped(view, placement.segments, from_input=not port.is_output)
    padded = view.attr("output_shape") or any(view.attr("output_padding") or ())
    if dim >= 2 and port != Port(False, 1) and stands_apart(view, kernel, dim) and not padded:
        yield from tiled(view, port, placement, 1, kernel[dim - 2])


def conv_transpose_flops(view: OpView) -> float:
    """2 times input elements times kernel elements."""
    x, weight = view.ins[0], view.ins[1]
    assert x is not None and weight is not None
    return 2.0 * prod(x) * prod(weight[1:])


def deform_conv(view: OpView) -> Factors:
    """As Conv; offsets and masks by the batch alone. Input channels are cut where all have the same offsets."""
    spatial = (None,) * (len(view.outs[0]) - 2)
    free = view.attr("group", 1) == 1
    o, c = "o" if free else None, "c" if free and view.attr("offset_group", 1) == 1 else None
    points: Labels = ("n", None, *spatial)
    ins: list[Labels] = [("n", c, *spatial), (o, c, *spatial), points, (o,), points]
    ins = [labels if shape is not None else () for labels, shape in zip(ins, view.ins)]
    bias = frozenset({3} if len(view.ins) > 3 and view.ins[3] is not None else ())
    return Factors(
        tuple(ins),
        (("n", o, *spatial),),
        sums=(("c", "sum"),) if c else (),
        linear=(bias | {0}, bias | {1}),
        added=bias,
    )


def deform_conv_ports(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """Groups of channels, where all have the same offsets."""
    one = view.attr("group", 1) == 1 or view.attr("offset_group", 1) > 1
    if one or not isinstance(placement, Shard) or port not in (Port(False, 0), Port(False, 1), Port(True, 0)):
        return
    if placement.dim == (0 if port == Port(False, 1) else 1):
        for found in _grouped(view, placement.segments, from_input=port == Port(False, 0)):
            bias = [found.ins[2] if i == 3 and shape is not None else R for i, shape in enumerate(view.ins)]
            yield Strategy("group", (*found.ins[:2], *bias[2:]), found.outs)


register("Conv", factors=conv, ports=conv_ports, localise=conv_localise, flops=conv_flops)
register(
    "ConvTranspose",
    factors=conv_transpose,
    ports=conv_transpose_ports,
    localise=conv_localise,
    flops=conv_transpose_flops,
)
register(
    "DeformConv",
    factors=deform_conv,
    ports=deform_conv_ports,
    localise=conv_localise,
    flops=conv_flops,
    samples=(
        ("f[2,4,5,6], f[6,4,3,3], f[2,18,3,4], f[6] -> f[2,6,3,4]", {}),
        ("f[4,12,6,6], f[12,12,2,2], f[4,16,5,5], -, f[4,8,5,5] -> f[4,12,5,5]", {"offset_group": 2}),
        ("f[2,12,4,4], f[24,3,2,2], f[2,8,3,3], f[24] -> f[2,24,3,3]", {"group": 4}),
    ),
)
