"""Einsum as transposes and products of matrices, which a CUDA graph can capture."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from onnxmesh.runtime.kernels.registry import Array


def contract(xp: Any, equation: str, operands: Sequence[Array]) -> Array | None:
    """The value of an einsum, operands taken from left to right; None for ellipses and repeated labels."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if "." in equation or any(len(set(term)) < len(term) for term in (*terms, out)):
        return None
    if not arrow:
        joined = "".join(terms)
        out = "".join(sorted(label for label in set(joined) if joined.count(label) == 1))
    labels, value = terms[0], operands[0]
    for i, operand in enumerate(operands[1:], 1):
        later = set("".join(terms[i + 1 :]) + out)
        labels, value = _product(xp, labels, value, terms[i], operand, later)
    labels, value = _summed(labels, value, set(out))
    return value.transpose([labels.index(label) for label in out])


def _product(xp: Any, la: str, a: Array, lb: str, b: Array, kept: set[str]) -> tuple[str, Array]:
    """The labels and value of a times b, summed over what both have and nobody keeps."""
    la, a = _summed(la, a, kept | set(lb))
    lb, b = _summed(lb, b, kept | set(la))
    batch = [label for label in la if label in lb and label in kept]
    summed = [label for label in la if label in lb and label not in kept]
    rows = [label for label in la if label not in lb]
    columns = [label for label in lb if label not in la]
    sizes = dict(zip(la + lb, a.shape + b.shape))
    shape = [[sizes[label] for label in part] for part in (batch, rows, summed, columns)]
    a = a.transpose([la.index(label) for label in batch + rows + summed])
    b = b.transpose([lb.index(label) for label in batch + summed + columns])
    n, m, k, p = map(prod, shape)
    value = xp.matmul(a.reshape(n, m, k), b.reshape(n, k, p))
    return "".join(batch + rows + columns), value.reshape(shape[0] + shape[1] + shape[3])


def _summed(labels: str, x: Array, kept: set[str]) -> tuple[str, Array]:
    """x summed over the labels that nobody keeps."""
    axes = tuple(i for i, label in enumerate(labels) if label not in kept)
    return "".join(label for label in labels if label in kept), x.sum(axis=axes) if axes else x
