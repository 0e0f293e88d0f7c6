"""Every supported op of com.microsoft gives in normal form what ONNX Runtime gives, or what its documentation says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from microsoft_cases import WIDTH, B, Case, H, Random, S, T, assert_close, evaluated, ints, normal_form

from onnxmesh.compiler.errors import ModelError

RANDOM = Random()
floats, below = RANDOM.floats, RANDOM.below
INT32 = onnx.TensorProto.INT32
X, Y = floats(B, S, WIDTH), floats(B, S, WIDTH)
GAIN, SHIFT, BIAS = floats(WIDTH), floats(WIDTH), floats(WIDTH)
IMAGE, KERNEL = floats(2, 6, 7, 8), floats(4, 6, 3, 3)
PICTURE = IMAGE.transpose(0, 2, 3, 1).copy()
KEPT = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]], np.int32)
WORDS, SEGMENTS = below(9, B, S), below(2, B, S)
TABLES = [floats(9, WIDTH), floats(7, WIDTH), floats(2, WIDTH)]


# --- what the documentation says ----------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))).astype(np.float32)


def fast_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normed(x: np.ndarray, gain: np.ndarray, shift: np.ndarray, groups: int) -> np.ndarray:
    """Group normalization of `[n, ..., c]`."""
    rows = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, variance = rows.mean((1, 3), keepdims=True), rows.var((1, 3), keepdims=True)
    return ((rows - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * gain + shift


def group_norm(x: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    y = normed(x, gain, shift, 2)
    return y * sigmoid(y)


def group_norm_first(x: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return normed(x.transpose(0, 2, 3, 1), gain, shift, 2).transpose(0, 3, 1, 2)


def skip_group_norm(
    x: np.ndarray, gain: np.ndarray, shift: np.ndarray, skip: np.ndarray, bias: np.ndarray
) -> list[np.ndarray]:
    total = x + (skip[:, None, None] if skip.ndim == 2 else skip) + bias
    return [normed(total, gain, shift, 2), total]


def softmax(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    powers = np.exp(x - x.max(axes, keepdims=True))
    return powers / powers.sum(axes, keepdims=True)


def as_complex(x: np.ndarray) -> np.ndarray:
    return x[..., 0] + 1j * x[..., 1]


def as_pair(z: np.ndarray) -> np.ndarray:
    return np.stack([z.real, z.imag], axis=-1).astype(np.float32)


def convolved(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(1, 2))
    return np.einsum("nhwcij,ocij->nhwo", windows, w)


def gemma(angles: np.ndarray, *qk: np.ndarray) -> list[np.ndarray]:
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return [qk[0] * cos + qk[1] * sin, qk[2] * cos + qk[3] * sin]


def distances(table: np.ndarray, *_: np.ndarray) -> np.ndarray:
    """T5's buckets, one distance at a time; 8 of them, of distances up to 16."""
    heads = table.reshape(H, 8)

    def bucket(query: int, key: int) -> int:
        back = max(query - key, 0)
        return back if back < 4 else min(7, 4 + int(math.log(back / 4) / math.log(16 / 4) * 4))

    return heads[:, [[bucket(q, k) for k in range(S)] for q in range(S)]][None]


# --- the cases ----------------------------------------------------------------------------------------------


def case(name: str, op: str, *inputs: np.ndarray | None, outputs: int = 1, **more: Any) -> Case:
    """`more` holds fields of the case, and else the node's attributes."""
    fields = {key: more.pop(key) for key in ("known", "domain", "formula", "types", "skip") if key in more}
    return Case(name, op, list(inputs), more, outputs, **fields)


def quantised_embed(segments: np.ndarray | None) -> Case:
    """Tables, scale and shift of 8 bits; without segments there is nothing of their table."""
    tables: list[np.ndarray | None] = [below(256, n, WIDTH).astype(np.uint8) for n in (9, 7, 2)]
    scales: list[np.ndarray | None] = [np.array(x, np.float32) for x in (0.02, 0.03, 0.04, 0.01, 0.02)]
    zeros: list[np.ndarray | None] = [np.array(x, np.uint8) for x in (128, 120, 130, 0, 90)]
    if segments is None:
        tables[2] = scales[2] = zeros[2] = None
    affine = below(256, 2, WIDTH).astype(np.uint8)
    name = f"embed of 8 bits, {'no ' if segments is None else ''}segments"
    inputs = [WORDS, segments, *tables, *affine, KEPT, *scales, *zeros]
    return case(name, "QEmbedLayerNormalization", *inputs, outputs=2, types={1: INT32})


ACTIVATIONS = [
    case("gelu", "Gelu", X),
    case("bias gelu", "BiasGelu", X, BIAS),
    case("fast gelu", "FastGelu", X),
    case("fast gelu bias", "FastGelu", X, BIAS),
    case("quick gelu", "QuickGelu", X),
    case("silu", "QuickGelu", X, alpha=1.0),
    case("scaled silu", "ScaledSiLU", X, alpha=0.7),
    case("silu of a scale", "ScaledSiLU", X, np.array(1.5, np.float32)),
    case("bias add", "BiasAdd", X, BIAS, Y, formula=lambda x, b, y: x + b + y),
    case("split gelu", "BiasSplitGelu", X, BIAS, formula=lambda x, b: (x + b)[..., :32] * gelu((x + b)[..., 32:])),
    case("bias dropout", "BiasDropout", X, BIAS, Y, formula=lambda x, b, y: x + b + y),
    case("gated add", "GatedAdd", X, Y, floats(B, S, 1)),
    case("attention gate", "LinearAttentionGate", floats(B, S, H), floats(H), floats(H), floats(B, S, H), outputs=2),
    case("attention gate alone", "LinearAttentionGate", floats(B, S, H), floats(H), floats(H)),
]  # fmt: skip
NORMS = [
    case("rms", "SimplifiedLayerNormalization", X, GAIN, epsilon=1e-6, domain="", outputs=2),
    case("rms of two dims", "SimplifiedLayerNormalization", X, floats(S, WIDTH), domain="", axis=1, outputs=2),
    case("skip rms", "SkipSimplifiedLayerNormalization", X, Y, GAIN),
    case("skip rms, bias, sum", "SkipSimplifiedLayerNormalization", X, Y, GAIN, BIAS, outputs=4, skip=(1, 2)),
    case("skip rms of tokens", "SkipSimplifiedLayerNormalization", X[0], Y[0], GAIN, outputs=4, skip=(1, 2)),
    case("skip norm", "SkipLayerNormalization", X, Y, GAIN, SHIFT, BIAS, outputs=4, skip=(1, 2)),
    case("skip norm, one skip for all", "SkipLayerNormalization", X, Y[:1], GAIN, epsilon=1e-3),
    case("skip norm, a skip of rank 2", "SkipLayerNormalization", X, Y[0], GAIN, SHIFT, outputs=4, skip=(1, 2)),
    case(
        "skip norm, statistics", "SkipLayerNormalization", X, Y, np.ones(WIDTH, np.float32), outputs=3,
        formula=lambda x, y, _: [
            ((x + y) - (x + y).mean(-1, keepdims=True)) / (x + y).std(-1, keepdims=True),
            (x + y).mean(-1, keepdims=True), 1 / (x + y).std(-1, keepdims=True),
        ],
    ),
    case("embed", "EmbedLayerNormalization", WORDS, SEGMENTS, *TABLES, GAIN, SHIFT, KEPT, outputs=3, types={1: INT32}),
    case(
        "embed at positions", "EmbedLayerNormalization", WORDS, None, *TABLES[:2], None, GAIN, SHIFT, None,
        below(7, B, S), outputs=3, types={1: INT32}, epsilon=1e-3,
    ),
    *map(quantised_embed, (SEGMENTS, None)),
    case("group norm", "GroupNorm", PICTURE, *floats(2, 6), groups=2, activation=1, formula=group_norm),
    case(
        "group norm, channels first", "GroupNorm", IMAGE, *floats(2, 6), groups=2, activation=0, channels_last=0,
        formula=group_norm_first,
    ),
    *(
        case(
            f"skip group norm {skip.ndim}", "SkipGroupNorm", PICTURE, *floats(2, 6), skip, floats(6), outputs=2,
            groups=2, activation=0, formula=skip_group_norm,
        )
        for skip in (floats(2, 6), floats(2, 1, 1, 6), floats(*PICTURE.shape))
    ),
    case("gated rms", "GatedRMSNorm", X, floats(16), Y),
    case("gated rms, sigmoid", "GatedRMSNorm", X, GAIN, Y, activation="sigmoid", epsilon=1e-3),
    case("branches", "BranchwiseRMSNorm", X, GAIN, num_branches=4),
    case("grouped branches", "BranchwiseRMSNorm", X.reshape(B, S, 4, 16), floats(16)),
    case("branches alone", "BranchwiseRMSNorm", X, num_branches=2, epsilon=1e-3),
]  # fmt: skip
PRODUCTS = [
    case("matmul", "FusedMatMul", floats(3, B, S, 8), floats(3, B, 8, T), alpha=0.5),
    case("matmul T", "FusedMatMul", floats(B, 8, S), floats(B, T, 8), transA=1, transB=1),
    case("matmul of a vector", "FusedMatMul", floats(8), floats(B, 8, S), transA=1),
    case("matmul batch", "FusedMatMul", floats(S, 3, B, 8), floats(3, B, 8, T), transBatchA=1),
    case("matmul both", "FusedMatMul", floats(8, 3, B, S), floats(3, B, 8, T), transBatchA=1, transA=1),
    case("matmul batch of b", "FusedMatMul", floats(3, B, S, 8), floats(T, 3, B, 8), transBatchB=1, transB=1),
    case("transposed matmul", "TransposeMatMul", floats(B, 8, S), floats(B, 8, T), transA=1),
    case(
        "matmul, activated", "FusedMatMulActivation", floats(S, 8), floats(T, 8), transB=1, alpha=0.5,
        activation="LeakyRelu", activation_alpha=0.2,
        formula=lambda x, w: np.where(x @ w.T > 0, x @ w.T, x @ w.T / 5) / 2,
    ),
    case("matmul, gelu", "GemmFastGelu", X, floats(WIDTH, 3), floats(3), formula=lambda x, w, b: fast_gelu(x @ w + b)),
    case("gemm", "FusedGemm", floats(8, S), floats(T, 8), floats(T), transA=1, transB=1, alpha=0.5, beta=2.0,
         activation="LeakyRelu", activation_alpha=0.2),
    case("gemm, relu", "FusedGemm", floats(S, 8), floats(8, T), activation="Relu"),
    case("conv", "FusedConv", IMAGE, KERNEL, floats(4), floats(2, 4, 5, 6), activation="Relu"),
    case("conv, plain", "FusedConv", IMAGE, KERNEL, pads=[1, 1, 1, 1], strides=[2, 1]),
    case("conv, clip", "FusedConv", IMAGE, KERNEL, floats(4), activation="Clip", activation_params=[-1.0, 2.0]),
    case("conv, hard sigmoid", "FusedConv", IMAGE, KERNEL, activation="HardSigmoid", activation_params=[0.1, 0.3]),
    case("conv, leaky", "FusedConv", IMAGE, KERNEL, activation="LeakyRelu", activation_params=[0.3]),
    case("channels last", "NhwcConv", PICTURE, KERNEL, formula=convolved),
    case("channels last, relu", "NhwcFusedConv", PICTURE, KERNEL, activation="Relu",
         formula=lambda x, w: np.maximum(convolved(x, w), 0)),
    *(
        case(
            f"bnb {kind} {block}", "MatMulBnb4", floats(B, S, 64), below(256, 24 * 64 // 2).astype(np.uint8),
            np.abs(floats(24 * 64 // block)), known=(1, 2), N=24, K=64, block_size=block, quant_type=kind,
        )
        for kind in (0, 1)
        for block in (16, 64)
    ),
    case("distances squared", "CDist", floats(5, 8), floats(7, 8)),
    case("distances", "CDist", floats(5, 8), floats(7, 8), metric="euclidean"),
]  # fmt: skip
PLAIN = [
    case("gather nd", "GatherND", floats(3, 4), np.array([[0, 1], [2, 3]])),
    case("trilu", "Trilu", floats(3, 4), np.array(1), upper=0, known=(1,)),
    case("grid", "GridSample", floats(1, 2, 4, 4), floats(1, 3, 3, 2), padding_mode="border"),
    case("pad", "Pad", floats(3, 4), np.array([[1, 0, 0, 2]]), np.array([0.5], np.float32), known=(1,)),
    case("range", "Range", np.array([1], np.float32), np.array([4], np.float32), known=(0, 1)),
    case("range by steps", "Range", *np.array([7, 1, -2], np.int32), known=(0, 1, 2), types={0: INT32}),
    case("expand dims", "ExpandDims", X, np.array(-2, np.int32), known=(1,)),
    case("embedding", "TorchEmbedding", floats(5, 4), np.array([[1, 4]]), formula=lambda w, i: w[i]),
    case("sample", "SampleOp", X),
    case("inverse", "Inverse", floats(B, 3, 3)),
    case("unfold", "UnfoldTensor", floats(3, 8, 2), dim=1, size=3, step=2),
    case("unfold the last", "UnfoldTensor", floats(3, 8), size=2),
    case("bias softmax", "BiasSoftmax", floats(B, H, S, S), floats(B, 1, 1, S), axis=3, is_inner_broadcast=1,
         formula=lambda x, b: softmax(x + b, (3,))),
    case("bias softmax of two dims", "BiasSoftmax", floats(B, H, S, S), floats(H, S, S), axis=2, is_inner_broadcast=0,
         formula=lambda x, b: softmax(x + b, (2, 3))),
    case("complex", "ComplexMul", floats(3, 2), floats(3, 2),
         formula=lambda a, b: as_pair(as_complex(a) * as_complex(b))),
    case("conjugate", "ComplexMulConj", floats(3, 2), floats(3, 2),
         formula=lambda a, b: as_pair(as_complex(a) * as_complex(b).conj())),
    case("rfft", "Rfft", floats(3, 8), formula=lambda x: as_pair(np.fft.rfft(x))),
    case("irfft", "Irfft", as_pair(np.fft.rfft(floats(3, 8))), signal_ndim=1,
         formula=lambda x: np.fft.irfft(as_complex(x)).astype(np.float32)),
    case("finite", "IsAllFinite", X, Y, types={0: onnx.TensorProto.BOOL}, formula=lambda *_: np.array(True)),
    case("not finite", "IsAllFinite", X, np.array([1, np.inf], np.float32), types={0: onnx.TensorProto.BOOL},
         formula=lambda *_: np.array(False)),
    case("no nan", "IsAllFinite", np.array([1, np.inf], np.float32), isnan_only=1, types={0: onnx.TensorProto.BOOL},
         formula=lambda *_: np.array(True)),
    case("gemma", "GemmaRotaryEmbedding", floats(B, S, 8), *floats(4, B, H, S, 8), outputs=2, formula=gemma),
    case("t5 bias", "RelativePositionBias", floats(8, H), np.array(S), np.array(S), max_distance=16, known=(1, 2),
         formula=distances),
]  # fmt: skip
CASES = [*ACTIVATIONS, *NORMS, *PRODUCTS, *PLAIN]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_numbers(case: Case) -> None:
    assert_close(evaluated(case), case.expected())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_nothing_of_microsoft_stays(case: Case) -> None:
    assert {node.domain for node in normal_form(case).graph} <= {"", "onnxmesh"}


def test_pooling_of_channels_that_stand_last() -> None:
    """ONNX Runtime has it for bytes only."""
    pool = case("pool", "NhwcMaxPool", below(9, *PICTURE.shape).astype(np.uint8), kernel_shape=[2, 2],
                strides=[2, 1], types={0: onnx.TensorProto.UINT8})  # fmt: skip
    assert_close(evaluated(pool), pool.expected())


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (case("gemm", "FusedGemm", floats(3, 4), floats(4, 5), activation="Mish"), "activation 'Mish'"),
        (case("metric", "CDist", floats(3, 4), floats(5, 4), metric="cosine"), "metric 'cosine'"),
        (case("rfft", "Rfft", floats(3, 8), signal_ndim=2), "several dims"),
        (case("pads", "Pad", floats(3, 4), np.array([1, 0, 0, 2])), "must be known when compiling"),
        (case("beams", "BeamSearch", below(9, 1, 4), ints(9)), "searches for tokens"),
        (case("mean", "SkipSimplifiedLayerNormalization", X, Y, GAIN, outputs=2), "gives out a mean"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name,
)  # fmt: skip
def test_what_is_not_supported_names_the_node(case: Case, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        normal_form(case)
    assert f"(com.microsoft::{case.op})" in str(caught.value)
    assert says in str(caught.value)
