"""Gather and scatter: index dims and untouched data dims pass."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, numbered, register

LINEAR = (frozenset({0}),)


def gather(view: OpView) -> Factors:
    """data[.., v, ..], idx -> data dims before the axis, idx dims, data dims after it.

    The gathered dim itself ("v") may be cut where the data is a constant table: every rank looks up the rows it
    has, and the sum of all is the result (expansion `masked_gather`).
    """
    data, index = view.ins[0], view.ins[1]
    assert data is not None and index is not None
    axis = int(view.attr("axis", 0)) % len(data)
    ours = [f"d{i}" if size > 1 else None for i, size in enumerate(data)]
    theirs = [f"i{i}" if size > 1 else None for i, size in enumerate(index)]
    out = tuple(ours[:axis] + theirs + ours[axis + 1 :])
    numbers = "float" in view.out_dtypes[0] or view.out_dtypes[0] in ("int8", "uint8")
    table = axis == 0 and view.constant[0] and numbers and len(data) > 1
    ours[axis] = "v" if table else None
    sums = (("v", "sum"),) if table else ()
    return Factors((tuple(ours), tuple(theirs)), (out,), sums=sums, expand=(("v", "masked_gather"),), linear=LINEAR)


def gather_elements(view: OpView) -> Factors:
    """The index's own axis; other dims where data and index have the same size."""
    data, index = view.ins[0], view.ins[1]
    assert data is not None and index is not None
    axis = int(view.attr("axis", 0)) % len(data)
    ours: list[str | None] = [str(i) if a == b and a > 1 else None for i, (a, b) in enumerate(zip(data, index))]
    theirs = list(ours)
    ours[axis], theirs[axis] = None, "index"
    return Factors((tuple(ours), tuple(theirs)), (tuple(theirs),))


def gather_nd(view: OpView) -> Factors:
    """Batch dims, index dims, and data dims beyond the indexed ones."""
    data, index = view.ins[0], view.ins[1]
    assert data is not None and index is not None
    batch = int(view.attr("batch_dims", 0))
    depth = batch + index[-1]
    lead: Labels = tuple(f"i{i}" if size > 1 else None for i, size in enumerate(index[:-1]))
    rest: Labels = tuple(f"d{i}" if size > 1 else None for i, size in enumerate(data[depth:]))
    ours = (*lead[:batch], *(None,) * index[-1], *rest)
    return Factors((ours, (*lead, None)), ((*lead, *rest),), linear=LINEAR)


def scatter_nd(view: OpView) -> Factors:
    """Data dims beyond the indexed ones."""
    data, index, updates = view.ins[0], view.ins[1], view.ins[2]
    assert data is not None and index is not None and updates is not None
    depth = index[-1]
    rest: Labels = tuple(f"d{i}" if size > 1 else None for i, size in enumerate(data[depth:]))
    lead = (None,) * (len(index) - 1)
    full = (*(None,) * depth, *rest)
    return Factors((full, (None,) * len(index), (*lead, *rest)), (full,))


def scatter_elements(view: OpView) -> Factors:
    """Dims other than the axis, where data and index have the same size."""
    data, index = view.ins[0], view.ins[1]
    assert data is not None and index is not None
    axis = int(view.attr("axis", 0)) % len(data)
    labels: Labels = tuple(
        str(i) if i != axis and a == b and a > 1 else None for i, (a, b) in enumerate(zip(data, index))
    )
    return Factors((labels, labels, labels), (labels,))


def one_hot(view: OpView) -> Factors:
    """Index dims."""
    index = view.ins[0]
    assert index is not None
    axis = int(view.attr("axis", -1)) % (len(index) + 1)
    labels = numbered(index)
    rest: tuple[Labels, ...] = tuple((None,) * len(other or ()) for other in view.ins[1:])
    return Factors((labels, *rest), ((*labels[:axis], None, *labels[axis:]),))


def reverse_sequence(view: OpView) -> Factors:
    """The batch, which has the lengths, and the dims that are neither batch nor time."""
    shape = view.ins[0]
    assert shape is not None
    time, batch = (int(view.attr(name, default)) for name, default in (("time_axis", 0), ("batch_axis", 1)))
    labels: Labels = tuple(None if i == time else label for i, label in enumerate(numbered(shape)))
    return Factors((labels, (labels[batch],)), (labels,))


def compress(view: OpView) -> Factors | None:
    """The dims beside the one whose entries are taken; without an axis x is taken as flat, and none is beside it."""
    shape, axis = view.ins[0], view.attr("axis")
    assert shape is not None
    if axis is None:
        return None
    labels: Labels = tuple(None if i == axis % len(shape) else label for i, label in enumerate(numbered(shape)))
    return Factors((labels, (None,)), (labels,), linear=LINEAR)


register("Gather", factors=gather)
register("GatherElements", factors=gather_elements)
register("GatherND", factors=gather_nd)
register("ScatterND", factors=scatter_nd)
register("ScatterElements", factors=scatter_elements)
register("OneHot", factors=one_hot)
register("ReverseSequence", factors=reverse_sequence)
register(
    "Compress",
    factors=compress,
    samples=(("f[6,13,12], t[13] -> f[6,7,12]", {"axis": -2}), ("i[13,6], t[13] -> i[7,6]", {"axis": 0})),
)
