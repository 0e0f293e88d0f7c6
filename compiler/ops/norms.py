"""Normalisations and softmax: the normalised dims are whole, or one statistic a row is all-reduced."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, Shape, numbered, register


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


def one_axis(view: OpView) -> Factors:
    """Softmax, LogSoftmax, CumSum, TopK, sorts: dims other than `axis`."""
    shape = view.ins[0]
    assert shape is not None
    axis = int(view.attr("axis", -1)) % len(shape)
    rest: tuple[Labels, ...] = tuple((None,) * len(other or ()) for other in view.ins[1:])

    def labels(rank: int) -> Labels:
        return tuple(None if i == axis else label for i, label in enumerate(numbered(shape)))[:rank]

    return Factors((labels(len(shape)), *rest), tuple(labels(len(out)) for out in view.outs))


def channels(view: OpView) -> Factors:
    """GroupNormalization, InstanceNormalization, BatchNormalization: the batch, and what is elementwise."""
    shape = view.ins[0]
    assert shape is not None
    by_channel = view.op in ("BatchNormalization", "InstanceNormalization")
    elementwise = view.op == "BatchNormalization"
    labels: Labels = tuple(
        "n" if i == 0 and size > 1 else "c" if i == 1 and by_channel else f"x{i}" if i > 1 and elementwise else None
        for i, size in enumerate(shape)
    )
    rest: tuple[Labels, ...] = tuple(("c" if by_channel else None,) * len(other or ()) for other in view.ins[1:])
    return Factors((labels, *rest), (labels,))


def neighbours(view: OpView) -> Factors:
    """LRN: a statistic over neighbouring channels; everything else is elementwise."""
    shape = view.ins[0]
    assert shape is not None
    labels: Labels = tuple(None if i == 1 else label for i, label in enumerate(numbered(shape)))
    return Factors((labels,), (labels,))


register("LayerNormalization", "RMSNormalization", factors=last_dims)
register("Softmax", "LogSoftmax", "Hardmax", "CumSum", "CumProd", "TopK", "LpNormalization", factors=one_axis)
register("GroupNormalization", "InstanceNormalization", "BatchNormalization", factors=channels)
register("LRN", factors=neighbours, samples=(("f[2,12,6,4] -> f[2,12,6,4]", {"size": 3}),))
