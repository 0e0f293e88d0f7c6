"""Einsum as transposes and products of matrices, which a CUDA graph can capture."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from onnxmesh.runtime.cuda.gemm import launch_contraction
from onnxmesh.runtime.cuda.gemm_problem import loops
from onnxmesh.runtime.cuda.launchers import Job, Launch, launcher
from onnxmesh.runtime.kernels.registry import Array


@launcher("Einsum")
def launch_einsum(job: Job) -> Launch | None:
    """The sum of products that `equation` says, where it is one product of two matrices or of a batch of them."""
    found = _terms(job.attrs["equation"])
    if found is None or len(job.ins) != 2 or any(x is None for x in job.ins):
        return None
    arrays = (*job.ins, job.outs[0])
    return launch_contraction(job, loops(list(zip((*found[0], found[1]), arrays, strict=True))), arrays)


def contract(xp: Any, equation: str, operands: Sequence[Array]) -> Array | None:
    """The value of an einsum, operands taken from left to right; None for ellipses and repeated labels."""
    found = _terms(equation)
    if found is None:
        return None
    terms, out = found
    labels, value = terms[0], operands[0]
    for i, operand in enumerate(operands[1:], 1):
        later = set("".join(terms[i + 1 :]) + out)
        labels, value = _product(xp, labels, value, terms[i], operand, later)
    labels, value = _summed(labels, value, set(out))
    return value.transpose([labels.index(label) for label in out])


def _terms(equation: str) -> tuple[list[str], str] | None:
    """The labels of every operand and of the result; None for ellipses and labels that a term repeats."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if "." in equation or any(len(set(term)) < len(term) for term in (*terms, out)):
        return None
    joined = "".join(terms)
    return terms, out if arrow else "".join(sorted(label for label in set(joined) if joined.count(label) == 1))


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
