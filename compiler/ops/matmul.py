"""Contractions: MatMul and Einsum."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

from onnxmesh.compiler.ir.rule import Factors, Labels, OpView, numbered, register


def matmul(view: OpView) -> Factors:
    """batch m k, batch k n -> batch m n; k is summed. 1-D operands as NumPy's matmul."""
    a, b, out = view.ins[0], view.ins[1], view.outs[0]
    assert a is not None and b is not None
    rank = len(out) + (len(a) == 1) + (len(b) == 1)
    return Factors(
        (_operand(a, rank, out, "m", "k"), _operand(b, rank, out, "k", "n")),
        (_result(a, b, out),),
        sums=(("k", "sum"),),
        linear=(frozenset({0}), frozenset({1})),
    )


def _operand(shape: tuple[int, ...], rank: int, out: tuple[int, ...], row: str, column: str) -> Labels:
    if len(shape) == 1:
        return ("k",)
    skip = rank - len(shape)
    batch = tuple(f"b{i + skip}" if size > 1 else None for i, size in enumerate(shape[:-2]))
    return (*batch, row, column)


def _result(a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> Labels:
    tail = (("m",) if len(a) > 1 else ()) + (("n",) if len(b) > 1 else ())
    batch = out[: len(out) - len(tail)]
    return tuple(f"b{i}" if size > 1 else None for i, size in enumerate(batch)) + tail


def matmul_flops(view: OpView) -> float:
    """2 m n k a batch."""
    assert view.ins[0] is not None
    return 2.0 * prod(view.outs[0]) * view.ins[0][-1]


def einsum(view: OpView) -> Factors | None:
    """The equation is the rule. An ellipsis stands for leading dims of every operand alike; a diagonal is whole."""
    equation = view.attr("equation", "").replace(" ", "")
    if "->" not in equation:
        return None
    left, right = equation.split("->")
    terms = left.split(",")
    whole = {name for term in terms for name in term if name != "." and term.count(name) > 1}
    ins = tuple(_term(term, shape, whole) for term, shape in zip(terms, view.ins))
    outs = _term(right, view.outs[0], whole)
    labels = {label for term in ins for label in term if label} - {label for label in outs if label}
    linear = tuple(frozenset({i}) for i in range(len(ins)))
    return Factors(ins, (outs,), sums=tuple((label, "sum") for label in sorted(labels)), linear=linear)


def _term(term: str, shape: tuple[int, ...] | None, whole: Collection[str]) -> Labels:
    assert shape is not None
    names: list[str] = []
    before, dots, after = term.partition("...")
    names = list(before)
    if dots:
        extra = len(shape) - len(before) - len(after)
        names += [f".{i - extra}" for i in range(extra)] + list(after)
    return tuple(name if size > 1 and name not in whole else None for name, size in zip(names, shape))


def einsum_flops(view: OpView) -> float:
    """2 times the product of all labels' sizes."""
    factors = einsum(view)
    if factors is None:
        return 0.0
    sizes = {label: size for labels, shape in zip(factors.ins, view.ins) for label, size in zip(labels, shape or ())}
    return 2.0 * prod(sizes.values())


def det(view: OpView) -> Factors:
    """The dims before the matrix."""
    labels = numbered(view.outs[0])
    return Factors(((*labels, None, None),), (labels,))


def det_flops(view: OpView) -> float:
    """2/3 n^3 a matrix: an LU factorisation."""
    assert view.ins[0] is not None
    return 2.0 / 3.0 * prod(view.ins[0]) * view.ins[0][-1]


register("MatMul", factors=matmul, flops=matmul_flops)
register("Einsum", factors=einsum, flops=einsum_flops)
register("Det", factors=det, flops=det_flops)
