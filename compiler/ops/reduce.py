"""Reductions: kept dims pass; a reduced dim gives a Partial where the reduction has one."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, is_reduced, numbered, register

_PARTIAL = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceL1", "ReduceSumSquare"), "sum"),
    "ReduceMax": "max",
    "ReduceMin": "min",
}
OPS = (
    "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare"
)


_EXPANDED = {"ReduceMean": "mean", "ReduceL2": "norm", "ReduceLogSum": "norm", "ReduceLogSumExp": "log_sum_exp"}
"""How a rank computes its share of what is not a sum itself."""


def reduce(view: OpView) -> Factors:
    """`axes` are reduced. A mean is a sum of local sums, each divided by the global count (expansion `mean`).

    A function of a sum all-reduces the sum (expansions `norm` and `log_sum_exp`).
    """
    shape = view.ins[0]
    assert shape is not None
    axes = tuple(view.attr("axes"))
    partial, expansion = _PARTIAL.get(view.op), _EXPANDED.get(view.op, "")
    floating = "float" in view.out_dtypes[0]
    can_be_cut = floating if expansion else bool(partial)
    labels: Labels = tuple(label if i not in axes or can_be_cut else None for i, label in enumerate(numbered(shape)))
    kept = [None if i in axes else label for i, label in enumerate(labels)]
    out = kept if view.attr("keepdims", 1) else [label for i, label in enumerate(kept) if i not in axes]
    reduced = tuple(str(i) for i in axes if labels[i])
    return Factors(
        (labels,),
        (tuple(out),),
        sums=tuple((label, partial) for label in reduced if partial),
        linear=(frozenset({0}),) if view.op in ("ReduceSum", "ReduceMean") and floating else (),
        expand=tuple((label, expansion) for label in reduced if expansion),
        single=reduced if expansion and not partial else (),
    )


def arg(view: OpView) -> Factors:
    """ArgMax, ArgMin: every dim; along `axis` the best values are all-reduced (expansion `arg`)."""
    shape = view.ins[0]
    assert shape is not None
    axis = int(view.attr("axis", 0)) % len(shape)
    along = "arg" if is_reduced(view.in_dtypes[0], view.op.removeprefix("Arg").lower()) else None
    labels: Labels = tuple(along if i == axis and label else label for i, label in enumerate(numbered(shape)))
    out = (*labels[:axis], *((None,) if view.attr("keepdims", 1) else ()), *labels[axis + 1 :])
    which = "max" if view.attr("select_last_index", 0) else "min"
    return Factors((labels,), (out,), sums=(("arg", which),), expand=(("arg", "arg"),))


register(*OPS.split(), factors=reduce)
register("ArgMax", "ArgMin", factors=arg)
