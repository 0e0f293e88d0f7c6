"""Normalisations and softmax: the normalised dims are whole, or one statistic a row is all-reduced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnxmesh.compiler.ir import segments as algebra
from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Port, Shape, Strategy, numbered, register
from onnxmesh.runtime.placement import Placement, Shard


def last_dims(view: OpView) -> Factors:
    """LayerNormalization, RMSNormalization: `axis` and all dims after it are normalised.

    Where that is only the last dim, it may be cut all the same ("normalised": expansion `stat_norm`).
    """
    shape = view.ins[0]
    assert shape is not None
    axis = int(view.attr("axis", -1)) % len(shape)
    last = axis == len(shape) - 1 and len(view.outs) == 1
    # A scale that broadcasts over the normalised dim is not worth the case.
    one = last and all(other is None or other[-1:] == shape[-1:] for other in view.ins[1:])
    lead = numbered(shape)[:axis]
    labels: Labels = (*lead, *(("normalised",) if one else (None,) * (len(shape) - axis)))
    scales = tuple(_aligned(other or (), shape, labels) for other in view.ins[1:])
    statistics = tuple((*lead, *(None,) * (len(out) - axis)) for out in view.outs[1:])
    expand = (("normalised", "stat_norm"),)
    return Factors((labels, *scales), (labels, *statistics), expand=expand, single=("normalised",))


def _aligned(other: Shape, shape: Shape, labels: Labels) -> Labels:
    """Labels of what broadcasts to `shape`, whose dims have `labels`."""
    skip = len(shape) - len(other)
    return tuple(labels[i + skip] if size == shape[i + skip] else None for i, size in enumerate(other))


def softmax(view: OpView) -> Factors:
    """Softmax, LogSoftmax: every dim; along `axis` two numbers a row are all-reduced (expansion `softmax`)."""
    shape = view.ins[0]
    assert shape is not None
    axis = int(view.attr("axis", -1)) % len(shape)
    labels: Labels = tuple("row" if i == axis and label else label for i, label in enumerate(numbered(shape)))
    return Factors((labels,), (labels,), expand=(("row", "softmax"),), single=("row",))


def one_axis(view: OpView) -> Factors:
    """CumSum, TopK, sorts: dims other than `axis`."""
    shape = view.ins[0]
    assert shape is not None
    axis = int(view.attr("axis", -1)) % len(shape)
    rest: tuple[Labels, ...] = tuple((None,) * len(other or ()) for other in view.ins[1:])

    def labels(rank: int) -> Labels:
        return tuple(None if i == axis else label for i, label in enumerate(numbered(shape)))[:rank]

    return Factors((labels(len(shape)), *rest), tuple(labels(len(out)) for out in view.outs))


def channels(view: OpView) -> Factors:
    """InstanceNormalization, BatchNormalization: channels, the batch unless statistics span it, what is elementwise."""
    shape = _shape(view)
    elementwise = view.op == "BatchNormalization" and not view.attr("training_mode", 0)
    batch = elementwise or view.op == "InstanceNormalization"
    space = tuple(f"x{i}" if elementwise and size > 1 else None for i, size in enumerate(shape[2:]))
    labels: Labels = ("n" if batch and shape[0] > 1 else None, "c", *space)
    rest: tuple[Labels, ...] = tuple(("c",) * len(other or ()) for other in view.ins[1:])
    return Factors((labels, *rest), (labels, *(("c",) for _ in view.outs[1:])))


def group_batch(view: OpView) -> Factors:
    """GroupNormalization: the batch."""
    labels: Labels = ("n", *(None,) * (len(_shape(view)) - 1))
    return Factors((labels, (None,), (None,)), (labels,))


def groups(view: OpView, port: Port, placement: Placement) -> Iterable[Strategy]:
    """GroupNormalization: whole groups of channels. Scale and bias have an entry a channel, or one a group."""
    channels, group = _shape(view)[1], view.attr("num_groups")
    data = port.is_output or port.index == 0
    if not isinstance(placement, Shard) or placement.dim != int(data):
        return
    size, entries = channels // group, (view.ins[1] or (0,))[0] // group
    given = size if data else entries
    whole = algebra.scaled(placement.segments, view.ranks, given, size)
    scale = algebra.scaled(placement.segments, view.ranks, given, entries)
    if whole is not None and scale is not None:
        yield Strategy("group", (Shard(1, whole), Shard(0, scale), Shard(0, scale)), (Shard(1, whole),))


def groups_localise(view: OpView, strategy: Strategy) -> dict[str, Any]:
    """Fewer channels are fewer groups."""
    placement = strategy.outs[0]
    if strategy.factor != "group" or not isinstance(placement, Shard):
        return {}
    return {"num_groups": placement.local(view.ranks) * view.attr("num_groups") // placement.size}


def moments(view: OpView) -> Factors:
    """MeanVarianceNormalization: dims other than `axes`."""
    axes = view.attr("axes", (0, 2, 3))
    labels: Labels = tuple(None if i in axes else label for i, label in enumerate(numbered(_shape(view))))
    return Factors((labels,), (labels,))


def _shape(view: OpView) -> Shape:
    shape = view.ins[0]
    assert shape is not None
    return shape


def neighbours(view: OpView) -> Factors:
    """LRN: a statistic over neighbouring channels; everything else is elementwise."""
    shape = view.ins[0]
    assert shape is not None
    labels: Labels = tuple(None if i == 1 else label for i, label in enumerate(numbered(shape)))
    return Factors((labels,), (labels,))


register("LayerNormalization", "RMSNormalization", factors=last_dims)
register("Softmax", "LogSoftmax", factors=softmax)
register("Hardmax", "CumSum", "CumProd", "TopK", "LpNormalization", factors=one_axis)
register("InstanceNormalization", "BatchNormalization", factors=channels)
register("GroupNormalization", factors=group_batch, ports=groups, localise=groups_localise)
register("MeanVarianceNormalization", factors=moments)
register("LRN", factors=neighbours, samples=(("f[2,12,6,4] -> f[2,12,6,4]", {"size": 3}),))
