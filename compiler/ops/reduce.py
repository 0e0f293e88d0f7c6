"""Reductions: kept dims pass; a reduced dim gives a Partial where the reduction has one."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, numbered, register

_PARTIAL = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceL1", "ReduceSumSquare"), "sum"),
    "ReduceMax": "max",
    "ReduceMin": "min",
}
OPS = (
    "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare"
)


def reduce(view: OpView) -> Factors:
    """`axes` are reduced. A mean is a sum of local sums, each divided by the global count (expansion `mean`)."""
    shape = view.ins[0]
    assert shape is not None
    axes = tuple(view.attr("axes"))
    partial = _PARTIAL.get(view.op)
    floating = "float" in view.out_dtypes[0]
    labels: Labels = tuple(
        label if i not in axes or (partial and (floating or view.op != "ReduceMean")) else None
        for i, label in enumerate(numbered(shape))
    )
    kept = [None if i in axes else label for i, label in enumerate(labels)]
    out = kept if view.attr("keepdims", 1) else [label for i, label in enumerate(kept) if i not in axes]
    sums = tuple((str(i), partial) for i in axes if partial and labels[i])
    expand = tuple((label, "mean") for label, _ in sums) if view.op == "ReduceMean" else ()
    linear = (frozenset({0}),) if view.op in ("ReduceSum", "ReduceMean") and floating else ()
    return Factors((labels,), (tuple(out),), sums=sums, linear=linear, expand=expand)


def arg(view: OpView) -> Factors:
    """ArgMax, ArgMin: dims other than `axis`."""
    shape = view.ins[0]
    assert shape is not None
    axis = int(view.attr("axis", 0)) % len(shape)
    labels: Labels = tuple(None if i == axis else label for i, label in enumerate(numbered(shape)))
    out = labels if view.attr("keepdims", 1) else labels[:axis] + labels[axis + 1 :]
    return Factors((labels,), (out,))


register(*OPS.split(), factors=reduce)
register("ArgMax", "ArgMin", factors=arg)
