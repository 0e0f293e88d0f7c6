"""Cases for generated kernels, run on a CPU by test_codegen.py and on a GPU by gpu/test_gpu_codegen.py.

A case is an instruction with arrays in given layouts; what it should give is what the generic kernel gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rule_checker import random as random_of_kind

from onnxmesh.compiler.ops.samples import Sample, samples
from onnxmesh.runtime.dtypes import dtype, is_narrow
from onnxmesh.runtime.kernels.registry import Call, TensorType, find

TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2e-5, "float64": 1e-11}
"""Relative to the larger of the value and 1: for half precision the step from one number to the next."""


@dataclass(frozen=True)
class Laid:
    """An array in a buffer: `offset` and `strides` in elements."""

    buffer: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, buffer: Any, xp: Any) -> Any:
        """The array in a copy of the buffer, of the array library `xp`."""
        steps = tuple(s * self.buffer.itemsize for s in self.strides)
        return xp.lib.stride_tricks.as_strided(buffer[self.offset :], self.shape, steps)

    @property
    def values(self) -> np.ndarray:
        """The array."""
        return self.view(self.buffer, np)


def laid(values: np.ndarray, how: str = "plain") -> Laid:
    """`values` in memory, in one of the layouts of `LAYOUTS`."""
    shape, rank = values.shape, values.ndim
    order = list(range(rank))
    step, padding, offset = 1, 0, 0
    if how == "reversed dims":
        order = order[::-1]
    elif how == "swapped" and rank > 2:
        order[-3], order[-2] = order[-2], order[-3]
    elif how == "odd rows":
        padding = 3
    elif how == "padded rows":
        padding = 16
    elif how == "every second":
        step = 2
    elif how == "one off":
        offset = 1
    strides, size = [0] * rank, step
    for i in reversed(order):
        strides[i] = size
        size = size * shape[i] + (padding if i == order[-1] else 0)
    buffer = np.zeros(max(size, 1) + offset + 16, values.dtype)
    buffer = _aligned(buffer)
    if how == "backwards" and rank and shape[-1]:
        offset, strides[-1] = (shape[-1] - 1) * strides[-1], -strides[-1]
    result = Laid(buffer, offset, shape, tuple(strides))
    result.values[...] = values
    return result


LAYOUTS = ("plain", "reversed dims", "swapped", "odd rows", "padded rows", "every second", "one off", "backwards")


def _aligned(buffer: np.ndarray) -> np.ndarray:
    """The same buffer where 256 divides its address, as memory of a GPU."""
    memory = np.zeros(buffer.nbytes + 256, "u1")
    start = -memory.ctypes.data % 256
    return memory[start : start + buffer.nbytes].view(buffer.dtype)


@dataclass(frozen=True)
class Case:
    """An instruction and its arrays. `outs` are to be overwritten."""

    op: str
    attrs: Mapping[str, Any]
    ins: tuple[Laid | None, ...]
    outs: tuple[Laid, ...]
    name: str = ""
    coordinate: Mapping[str, int] = field(default_factory=dict)
    special: bool = False

    def __str__(self) -> str:
        types = ", ".join("-" if x is None else f"{x.buffer.dtype}{list(x.shape)}{list(x.strides)}" for x in self.ins)
        return f"{self.op} {self.name}({types}) {json.dumps(dict(self.attrs))}"

    def expected(self) -> tuple[np.ndarray, ...]:
        """What the generic kernel gives; expressions in half precision as float32, since kernels round them once."""
        ins, attrs = [None if x is None else x.values for x in self.ins], dict(self.attrs)
        kinds = [out.buffer.dtype for out in self.outs]
        if "expr" in attrs:
            attrs["expr"] = _widened(attrs["expr"])
            ins = [x.astype(np.float32) if x is not None and is_narrow(x.dtype) else x for x in ins]
            kinds = [np.dtype(np.float32) if is_narrow(kind) else kind for kind in kinds]
        types = tuple(TensorType(kind, out.shape) for kind, out in zip(kinds, self.outs))
        with np.errstate(all="ignore"):
            result = find(self.op)(Call(np, attrs, types, self.coordinate), *ins)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(x.astype(out.buffer.dtype) for x, out in zip(results, self.outs))

    def check(self, results: Sequence[np.ndarray]) -> None:
        """Raises AssertionError where `results` are not what is expected."""
        for number, (result, wanted) in enumerate(zip(results, self.expected())):
            allowed = self._allowed(wanted)
            a, b = (x.astype(np.float64) if is_narrow(x.dtype) or x.dtype.kind == "f" else x for x in (result, wanted))
            if not allowed:
                assert np.array_equal(a, b), f"{self}: output {number}\n{a}\n{b}"
                continue
            assert np.array_equal(np.isnan(a), np.isnan(b)), f"{self}: output {number}: NaN\n{a}\n{b}"
            with np.errstate(invalid="ignore"):
                wrong = ~((a == b) | np.isnan(b) | (np.abs(a - b) <= allowed * np.maximum(1, np.abs(b))))
            assert not wrong.any(), f"{self}: output {number}\n{a[wrong][:8]}\n{b[wrong][:8]}"

    def _allowed(self, wanted: np.ndarray) -> float:
        if wanted.dtype.name not in TOLERANCE:
            return 0
        kinds = [wanted.dtype.name, *(x.buffer.dtype.name for x in self.ins if x is not None)]
        return max(TOLERANCE.get(kind, 0) for kind in kinds)


def _widened(expr: Any) -> Any:
    """An expression with float32 in place of half precision."""
    if isinstance(expr, str) and expr in ("bfloat16", "float16"):
        return "float32"
    if isinstance(expr, dict):
        return {key: _widened(value) for key, value in expr.items()}
    return [_widened(part) for part in expr] if isinstance(expr, list) else expr


def case(
    op: str,
    ins: Sequence[np.ndarray | Laid | None],
    outs: Sequence[tuple[Any, tuple[int, ...]]] | None = None,
    how: str = "plain",
    coordinate: Mapping[str, int] | None = None,
    **attrs: Any,
) -> Case:
    """A case with its outputs (dtype, shape), by default one like input 0, in the layout `how`."""
    given = tuple(x if x is None or isinstance(x, Laid) else laid(x) for x in ins)
    if outs is None:
        assert given[0] is not None
        outs = [(given[0].buffer.dtype, given[0].shape)]
    places = tuple(laid(np.zeros(shape, kind), how) for kind, shape in outs)
    return Case(op, attrs, given, places, coordinate=coordinate or {})


class Make:
    """Random arrays."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, kind: str, *shape: int, how: str = "plain", positive: bool = False) -> Laid:
        """An array of dtype `kind`: numbers around 0, or between 0.1 and 1."""
        rng, type_ = self.rng, dtype(kind)
        if kind == "bool":
            values = rng.random(shape) < 0.5
        elif type_.kind in "iu":
            values = rng.integers(0 if type_.kind == "u" else -9, 10, shape)
        else:
            values = rng.uniform(0.1, 1, shape) if positive else rng.standard_normal(shape)
        return laid(np.asarray(values).astype(type_), how)

    def layout(self) -> str:
        """One of the layouts."""
        return str(self.rng.choice(LAYOUTS))


# --- the samples of the rules ------------------------------------------------------------------------------------


def of_samples(ops: frozenset[str]) -> Iterator[Case]:
    """Every sample of these ops."""
    rng = np.random.default_rng(0)
    for sample in samples():
        if sample.op in ops:
            yield _of_sample(sample, rng)


def _of_sample(sample: Sample, rng: np.random.Generator) -> Case:
    attrs: dict[str, Any] = {name: value for name, value in sample.attrs if name != "ranks"}
    if "expr" in attrs:
        attrs["expr"] = json.loads(attrs["expr"])
    if "to" in attrs:
        attrs["to"] = sample.outs[0].dtype
    ins = [None if x is None else laid(np.asarray(random_of_kind(x, rng))) for x in sample.ins]
    outs = [(dtype(x.dtype), x.shape) for x in sample.outs]
    return case(sample.op, ins, outs, coordinate={"cp": 1}, **attrs)


# --- elementwise -------------------------------------------------------------------------------------------------

FLOATS = ("float32", "bfloat16", "float16", "float64")
_UNARY = """Abs Neg Exp Ceil Floor Round Sign Sin Cos Tan Atan Sinh Cosh Tanh Asinh Erf Sigmoid Relu Gelu Swish Softplus
Mish Softsign HardSigmoid HardSwish LeakyRelu Elu Celu Selu ThresholdedRelu Shrink IsNaN IsInf""".split()
_POSITIVE = "Log Sqrt Reciprocal Asin Acos Atanh".split()
_BINARY = "Add Sub Mul Div PRelu Max Min Sum Mean Equal Less LessOrEqual Greater GreaterOrEqual".split()
_WHOLE = "Add Sub Mul Div Mod Max Min Equal Less Greater BitwiseAnd BitwiseOr BitwiseXor Pow".split()
_LOGIC = "And Or Xor Equal BitwiseAnd BitwiseOr BitwiseXor".split()
_BOOLEAN = frozenset("Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor IsNaN IsInf Not".split())


def _out(op: str, kind: str, shape: tuple[int, ...]) -> list[tuple[Any, tuple[int, ...]]]:
    return [(dtype("bool" if op in _BOOLEAN else kind), shape)]


def elementwise_ops() -> Iterator[Case]:
    """Every op in every dtype that it takes."""
    make = Make(1)
    for kind in FLOATS:
        for op in _UNARY:
            yield case(op, [make(kind, 3, 40)], _out(op, kind, (3, 40)))
        for op in _POSITIVE:
            yield case(op, [make(kind, 3, 40, positive=True)])
        for op in _BINARY:
            yield case(op, [make(kind, 3, 40), make(kind, 40)], _out(op, kind, (3, 40)))
        yield case("Acosh", [laid(make(kind, 40, positive=True).values + dtype(kind).type(1))])
        yield case("Gelu", [make(kind, 5, 16)], approximate="tanh")
        yield case("Pow", [make(kind, 24, positive=True), make(kind, 24)])
        yield case("Pow", [make(kind, 24), make("int32", 1)])
        yield case("Mod", [make(kind, 24), make(kind, 24, positive=True)], fmod=1)
        yield case("Mod", [make(kind, 24), make(kind, 24, positive=True)])
        yield case("Clip", [make(kind, 24), make(kind), None])
        yield case("Where", [make("bool", 8, 1), make(kind, 24), make(kind, 8, 24)], [(dtype(kind), (8, 24))])
        for other in (*FLOATS, "int32", "uint8", "int64", "bool"):
            yield case("Cast", [make(kind, 5, 12, positive=True)], [(dtype(other), (5, 12))], to=other)
            yield case("Cast", [make(other, 5, 12)], [(dtype(kind), (5, 12))], to=kind)
    for kind in ("int8", "uint8", "int32", "int64", "uint32", "uint64"):
        for op in _WHOLE:
            y = make(kind, 24).values.copy()
            y[y == 0] = 3
            y = np.abs(y) if op == "Pow" else y
            yield case(op, [make(kind, 3, 24), laid(y)], _out(op, kind, (3, 24)))
        yield case("Mod", [make(kind, 24), laid(y)], fmod=1)
        yield case("Pow", [laid(y), laid(np.linspace(0, 4, 24).round().astype(np.float32))])
        if kind[0] == "i":
            yield case("Pow", [laid(np.resize([1, -1, 2, -3], 24).astype(kind)), laid(np.arange(-12, 12) // 3)])
        yield case("Where", [make("bool", 24), make(kind, 24), make(kind)])
        for op in ("Abs", "BitwiseNot", "Sign", *(["Neg"] if kind[0] == "i" else [])):
            yield case(op, [make(kind, 24)])
    for op in _LOGIC:
        yield case(op, [make("bool", 3, 40), make("bool", 40)], _out(op, "bool", (3, 40)))
    yield case("Not", [make("bool", 33)])
    for direction in ("LEFT", "RIGHT"):
        yield case("BitShift", [make("uint8", 33), make("uint8", 33)], direction=direction)
        yield case("BitShift", [make("int32", 66), laid(np.arange(66, dtype=np.int32))], direction=direction)
    yield from specials(make)


def specials(make: Make) -> Iterator[Case]:
    """NaN and infinities."""
    for kind in FLOATS:
        x = laid(np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, -1, 6e4], np.float64).astype(dtype(kind)))
        for op in (
            "Relu",
            "Sigmoid",
            "Swish",
            "Sign",
            "Abs",
            "IsNaN",
            "IsInf",
            "Exp",
            "Tanh",
            "Softplus",
            "Neg",
            "Not",
        ):
            if op != "Not":
                yield case(op, [x], _out(op, kind, (8,)))
        yield case("Max", [x, make(kind, 8)])
        yield case("Min", [make(kind, 8), x])
        yield case("Clip", [x, make(kind), make(kind)])
        yield case("IsInf", [x], _out("IsInf", kind, (8,)), detect_negative=0)
        for other in FLOATS:
            yield case("Cast", [x], [(dtype(other), (8,))], to=other)


def expressions(count: int) -> Iterator[Case]:
    """Random trees over arrays that broadcast, in random layouts."""
    make = Make(2)
    for _ in range(count):
        kind = str(make.rng.choice(FLOATS))
        rank = int(make.rng.integers(1, 5))
        shape = tuple(int(n) for n in make.rng.choice([1, 2, 3, 5, 8, 16, 24], rank))
        ins = []
        for number in range(int(make.rng.integers(1, 5))):
            dims = tuple(1 if number and make.rng.random() < 0.3 else n for n in shape)
            dims = dims[int(make.rng.integers(0, rank)) :] if number and make.rng.random() < 0.3 else dims
            ins.append(make(kind, *dims, how=make.layout()))
        expr = _tree(make, kind, list(range(len(ins))))
        how = "plain" if make.rng.random() < 0.5 else make.layout()
        yield case("Fused", ins, [(dtype(kind), shape)], how, expr=expr)


def _tree(make: Make, kind: str, parts: list[Any]) -> Any:
    """Ops over the parts, all joined at the end; the numbers stay near 1."""
    rng = make.rng
    narrow = kind in ("bfloat16", "float16")
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(parts)))
        one = parts[at]
        wrapped = [
            ["Sigmoid", one],
            ["Tanh", one],
            ["Mul", one, [kind, 0.5]],
            ["Clip", one, [kind, -1], None],
            ["Cast", {"to": kind}, ["Cast", {"to": "float32"}, ["Neg", one]]],
            ["Swish", one],
            ["Where", ["Less", parts[0], [kind, 0.25]] if not narrow else ["IsNaN", one], one, ["Abs", one]],
            ["Pow", one, [kind, 2]],
            ["Gelu", {"approximate": "tanh"}, one],
        ]
        parts[at] = wrapped[int(rng.integers(len(wrapped)))]
    whole = parts[0]
    for part in parts[1:]:
        whole = [str(rng.choice(["Add", "Sub", "Mul"])), whole, part]
    return whole if isinstance(whole, list) else ["Neg", whole]
