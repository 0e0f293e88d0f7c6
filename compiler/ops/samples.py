"""Sample nodes of every op that has a rule: what the checker of rules (tests/rule_checker.py) proves them with.

A node is written as its signature: `f[2,12], f[12]! -> f[2,12]`. A letter says what the tensor holds (`KINDS`), `!`
marks a constant, `-` an absent optional input. Most dims are 12 or 24, which 2, 3 and 4 ranks divide; 6, 13 and the
like are there to be awkward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxmesh.compiler.ir.rule import find, names
from onnxmesh.compiler.ops.elementwise import NARY, UNARY
from onnxmesh.compiler.ops.reduce import OPS as REDUCTIONS
from onnxmesh.compiler.ops.samples_spatial import IMAGE, POOL

KINDS = {
    "f": "float32",
    "h": "float16",
    "p": "float32",  # positive, up to 1
    "z": "float32",  # as p, but often 0
    "s": "float32",  # many are NaN or infinite
    "m": "float32",  # an additive mask: 0 or -inf
    "i": "int64",  # i<n: from -n to n - 1
    "n": "int64",  # 0, 1, 2, ...
    "u": "uint8",  # below 4
    "b": "bool",
    "t": "bool",  # true, false, true, ...
    "q": "int8",
    "Q": "uint8",  # all of it
    "w": "int4",
    "j": "int32",
}


@dataclass(frozen=True)
class Tensor:
    """One input or output of a sample."""

    kind: str
    shape: tuple[int, ...]
    below: int = 9
    constant: bool = False

    @property
    def dtype(self) -> str:
        """The dtype's NumPy name."""
        return KINDS[self.kind]


@dataclass(frozen=True)
class Sample:
    """A node with the types of its inputs and outputs. `first` is the size of the first mesh axis, for collectives."""

    op: str
    signature: str
    attrs: tuple[tuple[str, Any], ...] = ()
    first: int = 1

    @property
    def ins(self) -> tuple[Tensor | None, ...]:
        """The inputs; None for an absent one."""
        return tuple(map(_tensor, _terms(self.signature.split("->")[0])))

    @property
    def outs(self) -> tuple[Tensor, ...]:
        """The outputs."""
        return tuple(tensor for tensor in map(_tensor, _terms(self.signature.split("->")[1])) if tensor is not None)

    def __str__(self) -> str:
        attrs = "".join(f" {name}={value}" for name, value in self.attrs)
        return f"{self.op}({self.signature}){attrs}"


def _terms(text: str) -> list[str]:
    return re.findall(r"\w(?:<\d+)?\[[\d,]*\]!?|-", text)


def _tensor(term: str) -> Tensor | None:
    if term == "-":
        return None
    match = re.fullmatch(r"(\w)(?:<(\d+))?\[([\d,]*)\](!?)", term)
    assert match is not None, term
    kind, below, dims, constant = match.groups()
    return Tensor(kind, tuple(int(d) for d in dims.split(",") if d), int(below or 9), bool(constant))


def _sample(op: str, signature: str, first: int = 1, **attrs: Any) -> Sample:
    return Sample(op, signature, tuple(sorted(attrs.items())), first)


_POSITIVE = "Log Sqrt Reciprocal Acos Asin Atanh".split()
_LOGIC = "And Or Xor".split()
_BITS = "BitwiseAnd BitwiseOr BitwiseXor".split()
_COMPARE = "Equal Greater GreaterOrEqual Less LessOrEqual".split()
_OTHERS = "Where Clip Cast BitCast BitShift BitwiseNot Not IsInf IsNaN Dropout Fused".split()


def _elementwise() -> list[Sample]:
    unary = [op for op in UNARY if op not in (*_OTHERS, *_POSITIVE)]
    binary = [op for op in NARY if op not in (*_OTHERS, *_LOGIC, *_BITS, *_COMPARE, "Mod", "Pow")]
    return [
        *(_sample(op, "f[3,12] -> f[3,12]") for op in unary),
        *(_sample(op, "p[3,12] -> p[3,12]") for op in _POSITIVE),
        *(_sample(op, "s[3,12] -> b[3,12]") for op in ("IsInf", "IsNaN")),
        *(_sample(op, "f[2,3,12], f[3,12] -> f[2,3,12]") for op in binary),
        *(_sample(op, "f[6,13], f[6,1] -> f[6,13]") for op in ("Add", "Mul")),
        *(_sample(op, "f[2,12], f[12]! -> f[2,12]") for op in ("Add", "Mul", "Div")),
        *(_sample(op, "f[24,1], f[1,12] -> f[24,12]") for op in ("Sub", "Div")),
        *(_sample(op, "f[], f[12] -> f[12]") for op in ("Sub", "Mul")),
        *(_sample(op, "f[12], f[4,12], f[4,1] -> f[4,12]") for op in ("Sum", "Mean", "Max", "Min")),
        *(_sample(op, "b[3,12], b[12] -> b[3,12]") for op in _LOGIC),
        *(_sample(op, "i[3,12], i[12] -> i[3,12]") for op in (*_BITS, "Add", "Mul")),
        *(_sample(op, "i[3,12], i[12] -> b[3,12]") for op in _COMPARE),
        _sample("Mod", "f[3,12], p[12] -> f[3,12]", fmod=1),
        _sample("Pow", "p[3,12], f[12] -> p[3,12]"),
        _sample("Not", "b[3,12] -> b[3,12]"),
        _sample("BitwiseNot", "i[3,12] -> i[3,12]"),
        _sample("BitShift", "u[3,12], u[12] -> u[3,12]", direction="LEFT"),
        _sample("Cast", "f[3,12] -> i[3,12]", to=7),
        _sample("Cast", "f[3,12] -> h[3,12]", to=10),
        _sample("BitCast", "f[3,12] -> j[3,12]", to=6),
        _sample("CastLike", "f[3,12], h[24] -> h[3,12]"),
        _sample("CastLike", "f[12], h[2,3,12] -> h[12]"),
        _sample("Where", "b[3,12], f[3,12], f[12] -> f[3,12]"),
        _sample("Where", "b[3,1,12], f[4,12], f[] -> f[3,4,12]"),
        _sample("Clip", "f[3,12], f[], f[] -> f[3,12]"),
        _sample("Clip", "f[3,12], -, f[] -> f[3,12]"),
        _sample("Fused", "f[3,12], f[12] -> f[3,12]", expr='["Mul", ["Sigmoid", 0], 1]'),
        _sample("Fused", "f[3,1], f[12] -> f[3,12]", expr='["Add", 0, ["Mul", 1, 1]]'),
    ]


MATMUL = [
    _sample("MatMulInteger", "Q[4,12], q[12,6], Q[4] -> j[4,6]"),
    _sample("ConvInteger", "Q[2,12,6], Q[24,1,3], Q[], Q[24] -> j[2,24,4]", group=12),
    _sample("ConvInteger", "Q[2,6,12], Q[12,6,1]!, Q[], Q[12] -> j[2,12,12]"),
    _sample("MatMul", "f[12,24], f[24,6]! -> f[12,6]"),
    _sample("MatMul", "f[12,13], f[13,24] -> f[12,24]"),
    _sample("MatMul", "f[2,12,6], f[6,24]! -> f[2,12,24]"),
    _sample("MatMul", "f[3,2,4,12], f[3,2,12,6] -> f[3,2,4,6]"),
    _sample("MatMul", "f[4,1,3,12], f[6,12,2] -> f[4,6,3,2]"),
    _sample("MatMul", "f[1,4,12], f[6,12,2] -> f[6,4,2]"),
    _sample("MatMul", "f[12], f[12,24] -> f[24]"),
    _sample("MatMul", "f[24,12], f[12] -> f[24]"),
    _sample("MatMul", "f[12], f[4,12,6] -> f[4,6]"),
    _sample("MatMul", "f[4,6,12], f[12] -> f[4,6]"),
    _sample("MatMul", "f[12], f[12] -> f[]"),
    _sample("MatMul", "i[4,12], i[12,6] -> i[4,6]"),
    _sample("MatMul", "h[4,12], h[12,6]! -> h[4,6]"),
    _sample("Einsum", "f[2,4,12], f[2,12,6] -> f[2,4,6]", equation="bij, bjk -> bik"),
    _sample("Einsum", "f[3,4,12], f[6,12]! -> f[3,4,6]", equation="...i,ji->...j"),
    _sample("Einsum", "f[4,12], f[4,12] -> f[4]", equation="ij,ij->i"),
    _sample("Einsum", "f[12,4], f[4,6] -> f[6]", equation="ij,jk->k"),
    _sample("Einsum", "f[4,4,12] -> f[12]", equation="iij->j"),
    _sample("Einsum", "f[3,4,4] -> f[3,4]", equation="...ii->...i"),
    _sample("Einsum", "f[12], f[6], f[12,6] -> f[6,12]", equation="i,j,ij->ji"),
    _sample("Einsum", "f[4,12], f[1,12] -> f[4,12]", equation="ij,ij->ij"),
    _sample("Einsum", "f[2,12,6], f[6,12,4] -> f[2,4]", equation="...ij,jik->...k"),
    _sample("Einsum", "f[12], f[6] -> f[12,6]", equation="i,j->ij"),
    _sample("Det", "f[6,12,2,2] -> f[6,12]"),
    _sample("Det", "f[4,4] -> f[]"),
    _sample("Conv", "f[2,12,8,8], f[6,12,4,4], f[6] -> f[2,6,2,2]", strides=[4, 4]),
    _sample("Conv", "f[2,3,24,12], f[12,3,2,2] -> f[2,12,12,6]", strides=[2, 2]),
    _sample("Conv", "f[2,6,12], f[12,6,1], f[12] -> f[2,12,12]"),
    _sample("Conv", "f[2,6,12], f[12,6,3] -> f[2,12,12]", pads=[1, 1]),
    _sample("Conv", "f[2,6,12], f[12,6,2]! -> f[2,12,5]", strides=[2], dilations=[2]),
    _sample("Conv", "f[2,12,9], f[12,1,3], f[12] -> f[2,12,7]", group=12),
    _sample("Conv", "f[2,12,12], f[12,1,3] -> f[2,12,4]", group=12, strides=[3]),
    _sample("Conv", "f[2,12,6], f[24,1,3] -> f[2,24,4]", group=12),
    _sample("Conv", "f[2,12,6], f[24,3,3], f[24] -> f[2,24,4]", group=4),
    _sample("Conv", "f[4,6,12], f[6,6,3] -> f[4,6,4]", auto_pad="SAME_UPPER", strides=[3]),
    _sample("Conv", "f[2,2,6,8,4], f[4,2,2,2,2] -> f[2,4,3,4,2]", strides=[2, 2, 2]),
]

TRANSPOSED = [
    _sample("ConvTranspose", "f[2,12,4], f[12,6,3], f[6] -> f[2,6,6]"),
    _sample("ConvTranspose", "f[2,6,4], f[6,12,2]! -> f[2,12,8]", strides=[2]),
    _sample("ConvTranspose", "f[2,12,4], f[12,3,2] -> f[2,6,8]", strides=[2], group=2),
    _sample("ConvTranspose", "f[2,12,4], f[12,2,2], f[24] -> f[2,24,8]", strides=[2], group=12),
]

VIEWS = [
    _sample("Reshape", "f[2,12,6] -> f[24,6]"),
    _sample("Reshape", "f[24,6] -> f[2,12,6]"),
    _sample("Reshape", "f[4,72] -> f[4,3,24]"),
    _sample("Reshape", "f[4,72] -> f[4,3,6,4]"),
    _sample("Reshape", "f[2,12,24] -> f[2,12,6,4]"),
    _sample("Reshape", "f[2,12,6,4] -> f[2,12,24]"),
    _sample("Reshape", "f[1,13,12] -> f[13,12]"),
    _sample("Reshape", "f[12] -> f[1,12,1]"),
    _sample("Reshape", "f[6,12,4] -> f[12,24]"),
    _sample("Reshape", "f[2,6,4,6,4] -> f[2,6,6,4,4]"),
    _sample("Reshape", "f[2,12,12,2] -> f[2,24,12]"),
    _sample("Reshape", "i[24] -> i[2,3,4]"),
    _sample("Reshape", "f[4,0,6] -> f[4,0]"),
    _sample("Reshape", "f[0,12] -> f[4,0]"),
    _sample("Transpose", "f[2,12,6] -> f[6,2,12]", perm=[2, 0, 1]),
    _sample("Transpose", "f[2,13,12] -> f[12,13,2]"),
    _sample("Expand", "f[1,12] -> f[6,12]"),
    _sample("Expand", "f[12,1] -> f[2,12,6]"),
    _sample("Concat", "f[2,12], f[2,24] -> f[2,36]", axis=1),
    _sample("Concat", "f[2,13,4], f[2,24,4]! -> f[2,37,4]", axis=-2),
    _sample("Concat", "f[6,4], f[1,4], f[12,4] -> f[19,4]", axis=0),
    _sample("Concat", "i[4], i[4]! -> i[8]", axis=0),
    _sample("Concat", "b[4], b[4]! -> b[8]", axis=0),
    _sample("Split", "f[2,36] -> f[2,12], f[2,12], f[2,12]", axis=-1),
    _sample("Split", "f[37,4] -> f[13,4], f[24,4]", axis=0),
    _sample("Split", "f[4,12,6] -> f[4,8,6], f[4,4,6]", axis=1),
    _sample("Slice", "f[2,36] -> f[2,12]", axes=[1], starts=[12], steps=[1]),
    _sample("Slice", "f[36,12] -> f[24,12]", axes=[0], starts=[0], steps=[1]),
    _sample("Slice", "f[4,36] -> f[4,24]", axes=[0, 1], starts=[0, 12], steps=[1, 1]),
    _sample("Slice", "f[24,12] -> f[12,12]", axes=[0], starts=[0], steps=[2]),
    _sample("Slice", "f[12,12] -> f[12,12]", axes=[0], starts=[11], steps=[-1]),
    _sample("Slice", "f[37,6] -> f[13,6]", axes=[0], starts=[0], steps=[1]),
    _sample("Slice", "f[24,12] -> f[12,6]", axes=[0, 1], starts=[12, 6], steps=[1, 1]),
    _sample("Slice", "f[12,13] -> f[12,1]", axes=[1], starts=[12], steps=[1]),
    _sample("Pad", "f[12,6] -> f[12,9]", pads=[0, 1, 0, 2]),
    _sample("Pad", "f[12,6], f[] -> f[13,6]", pads=[1, 0, 0, 0]),
    _sample("Pad", "f[12,6] -> f[12,6]", pads=[1, 0, -1, 0]),
    _sample("Pad", "f[12,6] -> f[12,9]", pads=[0, 1, 0, 2], mode="reflect"),
    _sample("Pad", "f[12,6] -> f[12,6]", pads=[2, 0, -2, 0], mode="edge"),
    _sample("Tile", "f[12,6] -> f[12,12]", repeats=[1, 2]),
    _sample("Tile", "f[4,13] -> f[12,26]", repeats=[3, 2]),
    _sample("Tile", "f[12,0] -> f[24,0]", repeats=[2, 1]),
    _sample("Trilu", "f[6,12,12] -> f[6,12,12]", k=1, upper=0),
]

NORMS = [
    _sample("LayerNormalization", "f[2,6,24], f[24], f[24] -> f[2,6,24]", epsilon=1e-3),
    _sample("LayerNormalization", "f[6,12], f[12]! -> f[6,12]"),
    _sample("LayerNormalization", "f[4,6,4], f[6,4], f[6,4] -> f[4,6,4]", axis=1),
    _sample("LayerNormalization", "f[6,12], f[12], f[12] -> f[6,12], f[6,1], f[6,1]"),
    _sample("LayerNormalization", "f[6,12], f[1], f[12] -> f[6,12]"),
    _sample("LayerNormalization", "h[6,12], h[12], h[12] -> h[6,12]"),
    _sample("LayerNormalization", "f[4,6,12], f[6,12], f[1,12] -> f[4,6,12]"),
    _sample("RMSNormalization", "f[2,6,24], f[24]! -> f[2,6,24]", epsilon=1e-6),
    _sample("RMSNormalization", "f[2,13,12], f[1,12] -> f[2,13,12]"),
    _sample("RMSNormalization", "h[6,12], h[12] -> h[6,12]"),
    _sample("RMSNormalization", "f[4,6,4], f[6,4] -> f[4,6,4]", axis=-2),
    *(_sample(op, "f[6,12] -> f[6,12]", axis=-1) for op in ("Softmax", "LogSoftmax", "Hardmax", "CumSum", "CumProd")),
    _sample("LpNormalization", "f[6,12] -> f[6,12]", p=1),
    _sample("Softmax", "f[2,12,6] -> f[2,12,6]", axis=1),
    _sample("Softmax", "h[4,24] -> h[4,24]"),
    _sample("CumSum", "f[4,12] -> f[4,12]", axis=0, reverse=1),
    _sample("TopK", "f[6,12] -> f[6,4], i[6,4]", axis=1, k=4),
    _sample("TopK", "f[12,6] -> f[4,6], i[4,6]", axis=0, k=4, largest=0),
    _sample("GroupNormalization", "f[4,12,6], f[12], f[12] -> f[4,12,6]", num_groups=3),
    _sample("GroupNormalization", "f[1,24,3], f[24]!, f[24]! -> f[1,24,3]", num_groups=12),
    _sample("GroupNormalization", "f[2,24,3], f[6], f[6] -> f[2,24,3]", num_groups=6),
    _sample("MeanVarianceNormalization", "f[4,12,6,2] -> f[4,12,6,2]", axes=[0, 2, 3]),
    _sample("MeanVarianceNormalization", "f[4,12,6] -> f[4,12,6]", axes=[2]),
    _sample("InstanceNormalization", "f[4,12,6], f[12], f[12] -> f[4,12,6]"),
    _sample("BatchNormalization", "f[4,12,6], f[12], f[12], f[12], p[12] -> f[4,12,6]"),
    _sample(
        "BatchNormalization",
        "f[4,12,6], f[12], f[12], f[12], p[12] -> f[4,12,6], f[12], f[12]",
        training_mode=1,
        momentum=0.7,
    ),
]


def _reductions() -> list[Sample]:
    logs = ("ReduceLogSum", "ReduceProd")
    return [
        *(_sample(op, "f[6,12,4] -> f[6,1,4]", axes=[1], keepdims=1) for op in REDUCTIONS.split() if op not in logs),
        *(_sample(op, "f[6,12,4] -> f[4]", axes=[0, 1], keepdims=0) for op in REDUCTIONS.split() if op not in logs),
        *(_sample(op, "p[4,6,2] -> p[4,2]", axes=[1], keepdims=0) for op in logs),
        *(_sample(f"Reduce{n}", "i[6,12] -> i[6]", axes=[1], keepdims=0) for n in ("Sum", "Max", "Min", "SumSquare")),
        _sample("ReduceSum", "f[13] -> f[]", axes=[0], keepdims=0),
        _sample("ReduceMean", "h[4,12] -> h[4,1]", axes=[1]),
        _sample("ReduceMean", "i[4,12] -> i[4,1]", axes=[1]),
        *(_sample(op, "f[6,12] -> i[6]", axis=1, keepdims=0) for op in ("ArgMax", "ArgMin")),
        _sample("ArgMax", "f[6,12] -> i[1,12]"),
        _sample("ArgMax", "n[6,13] -> i[6,1]", axis=-1, select_last_index=1),
        _sample("ArgMin", "h[4,24] -> i[4]", axis=1, keepdims=0, select_last_index=1),
    ]


INDEXING = [
    _sample("Gather", "f[24,12]!, i<24[2,6] -> f[2,6,12]"),
    _sample("Gather", "f[13,12]!, i<13[6] -> f[6,12]"),
    _sample("Gather", "f[24,4]!, i<24[] -> f[4]"),
    _sample("Gather", "Q[24,12]!, i<24[6] -> Q[6,12]"),
    _sample("Gather", "h[24,3,4]!, i<24[2,3] -> h[2,3,3,4]"),
    _sample("Gather", "f[24,12], i<24[6] -> f[6,12]"),
    _sample("Gather", "f[6,12,4], i<12[3,2] -> f[6,3,2,4]", axis=1),
    _sample("Gather", "i[12]!, i<12[6] -> i[6]"),
    _sample("GatherElements", "f[6,12], i<6[3,12] -> f[3,12]"),
    _sample("GatherElements", "f[6,12], i<12[6,4] -> f[6,4]", axis=1),
    _sample("GatherElements", "f[12,6], i<6[4,2] -> f[4,2]", axis=1),
    _sample("GatherND", "f[5,4,12], i<4[2,6,2] -> f[2,6,12]"),
    _sample("GatherND", "f[5,4], i<4[12,2] -> f[12]"),
    _sample("GatherND", "f[2,6,12], i<6[2,4,1] -> f[2,4,12]", batch_dims=1),
    _sample("ScatterND", "f[6,12], i<6[4,1], f[4,12] -> f[6,12]"),
    _sample("ScatterND", "f[5,4,12], i<4[3,2], f[3,12] -> f[5,4,12]", reduction="add"),
    _sample("ScatterND", "f[4,6], i<4[3,2], f[3] -> f[4,6]"),
    _sample("ScatterElements", "f[6,12], i<6[3,12], f[3,12] -> f[6,12]", axis=0),
    _sample("ScatterElements", "f[12,6], i<6[12,4], f[12,4] -> f[12,6]", axis=1, reduction="add"),
    _sample("OneHot", "i<6[2,12], i[], f[2] -> f[2,12,6]"),
    _sample("OneHot", "i<6[2,12], i[], f[2] -> f[2,6,12]", axis=1),
    _sample("ReverseSequence", "f[12,6,4], n[6] -> f[12,6,4]"),
    _sample("ReverseSequence", "f[4,12,3], n[4] -> f[4,12,3]", time_axis=1, batch_axis=0),
]

GENERATED = [
    _sample("Range", "i[], i[] -> i[12]"),
    _sample("EyeLike", "-> f[12,6]", k=-1),
    *(_sample(f"{name}Window", "-> f[12]", periodic=0) for name in ("Hann", "Hamming", "Blackman")),
    _sample("MelWeightMatrix", "n[], n[], n[], p[], f[] -> f[13,6]"),
    *(_sample(f"Random{name}", "-> f[12,6]", seed=7) for name in ("Uniform", "Normal")),
    _sample("Multinomial", "f[6,13], p[6,12] -> i[6,12]"),
]

SIGNAL = [
    _sample("DFT", "f[6,12,1] -> f[6,12,2]", axis=1, length=12),
    _sample("DFT", "f[12,6,2] -> f[8,6,2]", axis=0, length=8, inverse=1),
    _sample("DFT", "f[6,4,12,1] -> f[6,4,7,2]", axis=2, length=13, onesided=1),
    _sample("DFT", "f[6,7,2] -> f[6,12,1]", axis=1, length=12, inverse=1, onesided=1),
    _sample("STFT", "f[6,24,1], f[8] -> f[6,5,5,2]", frame_step=4, frame_length=8),
    _sample("STFT", "f[12,13,2] -> f[12,3,6,2]", frame_step=3, frame_length=6, onesided=0),
]

_QKV = "f[2,12,6,4], f[2,12,6,4], f[2,12,6,4]"
_LONG = "f[2,4,12,4], f[2,4,12,4], f[2,4,12,6]"
ATTENTION = [
    _sample("Attention", f"{_QKV} -> f[2,12,6,4]"),
    _sample("Attention", f"{_LONG} -> f[2,4,12,6]", scale=0.3),
    _sample("Attention", f"{_LONG}, b[2,4,12,12] -> f[2,4,12,6]", masked_row="zero"),
    _sample("Attention", f"{_LONG}, b[1,1,12,12] -> f[2,4,12,6]", masked_row="uniform"),
    _sample("Attention", f"{_LONG}, f[2,1,1,12] -> f[2,4,12,6]", softcap=2.0),
    _sample("Attention", f"{_LONG}, m[1,4,12,12]! -> f[2,4,12,6]", masked_row="nan"),
    _sample("Attention", f"{_LONG}, m[1,1,12,12]! -> f[2,4,12,6]", masked_row="zero"),
    _sample("Attention", f"{_LONG}, -, n[12]!, n[12]! -> f[2,4,12,6]"),
    _sample("Attention", f"{_LONG}, b[2,1,1,12], n[12], n[12] -> f[2,4,12,6]", masked_row="zero"),
    _sample("Attention", f"{_LONG}, -, i[12]!, n[12]! -> f[2,4,12,6]", masked_row="nan"),
    _sample("Attention", f"{_LONG}, -, i[12]!, n[12]! -> f[2,4,12,6]", masked_row="uniform"),
    _sample("Attention", "f[2,12,13,4], f[2,4,13,4], f[2,4,13,4] -> f[2,12,13,4]"),
    _sample("Attention", "f[1,12,6,4], f[1,2,12,4], f[1,2,12,4], b[1,12,6,12] -> f[1,12,6,4]", masked_row="zero"),
    _sample("Attention", "f[2,8,1,4], f[2,1,24,4], f[2,1,24,4], -, n[1], i[24]! -> f[2,8,1,4]"),
    _sample("Attention", "f[1,24,2,4], f[1,6,4,4], f[1,6,4,4] -> f[1,24,2,4]"),
    _sample("Attention", "h[2,4,12,4], h[2,4,12,4], h[2,4,12,4], -, n[12]!, n[12]! -> h[2,4,12,4]"),
    _sample("Attention", f"{_LONG} -> f[2,4,12,6]", qk_dtype="float16"),
    _sample("AttentionBlock", f"{_LONG}, b[1,1,12,12] -> f[2,4,12,6], f[2,4,12,1], f[2,4,12,1]"),
    _sample("AttentionBlock", f"{_LONG}, -, n[12], n[12] -> f[2,4,12,6], f[2,4,12,1], f[2,4,12,1]"),
    _sample(
        "AttentionMerge",
        "f[2,4,12,6], f[2,4,12,1], p[2,4,12,1], f[2,4,12,6], f[2,4,12,1], p[2,4,12,1]"
        " -> f[2,4,12,6], f[2,4,12,1], p[2,4,12,1]",
    ),
    _sample("AttentionFinish", "f[2,4,12,6], z[2,4,12,1] -> f[2,4,12,6]", masked_row="zero"),
    _sample("Rotary", "f[2,4,12,8], f[12,8], f[12,8] -> f[2,4,12,8]"),
    _sample("Rotary", "f[2,12,4,8], f[12,1,4]!, f[12,1,4]! -> f[2,12,4,8]", interleaved=1),
    _sample("Rotary", "f[2,4,12,8], f[2,1,12,8], f[2,1,12,8] -> f[2,4,12,8]", interleaved=1),
    _sample("Rotary", "f[2,4,12,8], f[8], f[8] -> f[2,4,12,8]"),
]

_FIRST: dict[str, Any] = {"axis": "cp", "ranks": 2, "first": 2}
COLLECTIVES = [
    _sample("AllReduce", "f[6,12] -> f[6,12]", reduce="sum", **_FIRST),
    _sample("AllReduce", "f[6,12] -> f[6,12]", reduce="max", **_FIRST),
    _sample("Shift", "f[6,12] -> f[6,12]", offset=1, **_FIRST),
    _sample("AllReduce", "f[6,12] -> f[6,12]", reduce="avg", **_FIRST),
    _sample("AllReduce", "f[6,12] -> f[6,12]", reduce="prod", **_FIRST),
    _sample("Broadcast", "f[6,12] -> f[6,12]", root=1, **_FIRST),
    _sample("ReduceTo", "f[6,12] -> f[6,12]", reduce="sum", root=1, **_FIRST),
    _sample("GatherTo", "f[4,12] -> f[8,12]", dim=0, root=1, **_FIRST),
    _sample("ScatterFrom", "f[4,12] -> f[2,12]", dim=0, root=1, **_FIRST),
    _sample("AllGather", "f[4,12] -> f[4,24]", dim=1, segments=[24, 1], **_FIRST),
    _sample("AllGather", "f[48,6] -> f[84,6]", dim=0, segments=[12, 2, 48, 1, 24, 1], **_FIRST),
    _sample("AllGather", "f[4,13] -> f[4,13]", dim=1, segments=[13, 2], **_FIRST),
    _sample("ReduceScatter", "f[4,24] -> f[4,12]", reduce="sum", dim=1, segments=[24, 1], **_FIRST),
    _sample("ReduceScatter", "f[72,6] -> f[36,6]", reduce="sum", dim=0, segments=[24, 1, 48, 1], **_FIRST),
    _sample("Shard", "f[4,24] -> f[4,12]", dim=1, segments=[24, 1], **_FIRST),
    _sample("Shard", "f[36,6] -> f[24,6]", dim=0, segments=[12, 2, 24, 1], **_FIRST),
    _sample(
        "AllToAll", "f[2,12,12,4] -> f[2,24,6,4]",
        split_dim=2, split_segments=[12, 1], concat_dim=1, concat_segments=[24, 1], **_FIRST,
    ),
    _sample(
        "AllToAll", "f[2,24,72,4] -> f[2,36,36,4]",
        split_dim=2, split_segments=[24, 1, 48, 1], concat_dim=1, concat_segments=[12, 2, 24, 1], **_FIRST,
    ),
]  # fmt: skip


def declared() -> list[Sample]:
    """Those that stand with their rule."""
    return [
        _sample(op, signature, **attrs)
        for op in sorted(names())
        if (found := find(op))
        for signature, attrs in found.samples
    ]


def samples() -> list[Sample]:
    """All of them."""
    spatial = [_sample(op, signature, **attrs) for op, signature, attrs in (*POOL, *IMAGE)]
    listed = [
        *_elementwise(),
        *MATMUL,
        *TRANSPOSED,
        *spatial,
        *VIEWS,
        *NORMS,
        *_reductions(),
        *INDEXING,
        *GENERATED,
        *SIGNAL,
        *ATTENTION,
        *COLLECTIVES,
    ]
    return [*listed, *declared()]


def by_op() -> Mapping[str, list[Sample]]:
    """The samples of every op."""
    result: dict[str, list[Sample]] = {}
    for sample in samples():
        result.setdefault(sample.op, []).append(sample)
    return result
