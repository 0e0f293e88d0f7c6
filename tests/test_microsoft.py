"""Every supported op of com.microsoft gives in normal form what ONNX Runtime gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from evaluate import evaluate
from onnx import helper

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.frontend import load
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.normalise.normalise import normalise

B, S, T, H, G, D = 2, 5, 7, 4, 2, 16
WIDTH, KV_WIDTH = H * D, G * D
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass(frozen=True)
class Case:
    """One node; the inputs whose indices are in `known` are initialisers."""

    name: str
    op: str
    inputs: list[np.ndarray | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    known: tuple[int, ...] = ()
    domain: str = "com.microsoft"

    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" if a is not None else "" for i, a in enumerate(self.inputs)]
        given = [(i, n, a) for i, (n, a) in enumerate(zip(names, self.inputs)) if a is not None]
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, domain=self.domain, name="n", **self.attributes)
        graph = helper.make_graph(
            [node],
            "g",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for i, n, a in given
                if i not in self.known
            ],
            [helper.make_tensor_value_info(o, onnx.TensorProto.FLOAT, None) for o in outputs],
            [onnx.numpy_helper.from_array(a, n) for i, n, a in given if i in self.known],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{i}": a for i, a in enumerate(self.inputs) if a is not None and i not in self.known}


def mha(name: str, inputs: list[np.ndarray | None], outputs: int = 1, **attributes: Any) -> Case:
    return Case(f"mha {name}", "MultiHeadAttention", inputs, {"num_heads": H, **attributes}, outputs)


def gqa(
    name: str,
    more: list[np.ndarray | None] = [],  # noqa: B006  # never changed
    qkv: list[np.ndarray | None] | None = None,
    past: list[np.ndarray | None] = [None, None],  # noqa: B006
    lengths: list[np.ndarray] | None = None,
    known: tuple[int, ...] = (5, 6),
    **attributes: Any,
) -> Case:
    qkv = qkv or [floats(B, S, WIDTH), floats(B, S, KV_WIDTH), floats(B, S, KV_WIDTH)]
    inputs = [*qkv, *past, *(lengths or [ints(S - 1, S - 1), ints(S)]), *more]
    heads = {"num_heads": H, "kv_num_heads": G}
    return Case(f"gqa {name}", "GroupQueryAttention", inputs, {**heads, **attributes}, 3, known)


def qkv(length: int = T) -> list[np.ndarray | None]:
    return [floats(B, S, WIDTH), floats(B, length, WIDTH), floats(B, length, WIDTH)]


def tables(half: int = D // 2) -> list[np.ndarray | None]:
    return [floats(16, half), floats(16, half)]


def step(length: int) -> list[np.ndarray | None]:
    return [floats(1, length, WIDTH), floats(1, length, KV_WIDTH), floats(1, length, KV_WIDTH)]


X = floats(B, S, WIDTH)
GAIN, SHIFT, BIAS = floats(WIDTH), floats(WIDTH), floats(WIDTH)
POSITIONS = RNG.integers(0, 16, (B, S))
PADDING = np.array([[1] * 5 + [0] * 2, [0] * 7], np.int32)
CACHES: list[np.ndarray | None] = [floats(1, G, 6, D), floats(1, G, 6, D)]
CACHE: list[np.ndarray | None] = [floats(B, H, 3, D), floats(B, H, 3, D)]

CASES = [
    mha("plain", qkv()),
    mha("bias and scale", [*qkv(), floats(3 * WIDTH)], scale=0.3),
    mha("padding, one row hidden", [*qkv(), None, PADDING]),
    mha("attention bias", [*qkv(), None, None, floats(1, H, S, T)]),
    mha("padding and attention bias", [*qkv(), None, PADDING[:1].repeat(B, 0), floats(1, H, S, T)]),
    mha("causal", qkv(S), unidirectional=1),
    mha("heads in keys", [floats(B, S, WIDTH), floats(B, H, T, D), floats(B, H, T, D)]),
    mha("cache", [*qkv(S), None, None, None, *CACHE], 3),
    mha("causal cache", [*qkv(S), None, None, None, *CACHE], 3, unidirectional=1),
    gqa("plain"),
    gqa("lengths are data", known=(6,)),
    gqa("softcap and scale", softcap=2.0, scale=0.4),
    gqa("packed", qkv=[floats(B, S, (H + 2 * G) * D), None, None]),
    gqa("rotary", tables(), do_rotary=1),
    gqa("interleaved rotary", tables(), do_rotary=1, rotary_interleaved=1),
    gqa("rotary at positions", [*tables(), np.tile(np.arange(S), (B, 1))], do_rotary=1),
    gqa("window", local_window_size=2),
    gqa("bias", [None, None, None, floats(1, 1, S, S)]),
    gqa("bias and window", [None, None, None, floats(1, 1, S, S)], local_window_size=2),
    gqa("decode", tables(), step(1), CACHES, [ints(6), ints(7)], (6,), do_rotary=1),
    gqa("three steps", tables(), step(3), CACHES, [ints(8), ints(9)], (6,), do_rotary=1),
    Case("rotary", "RotaryEmbedding", [X, POSITIONS, *tables()]),
    Case("rotary, heads first", "RotaryEmbedding", [floats(B, H, S, D), POSITIONS, *tables()]),
    Case("interleaved", "RotaryEmbedding", [X, POSITIONS, *tables()], {"interleaved": 1}),
    Case("rotary from an offset", "RotaryEmbedding", [X, np.array([3]), *tables()]),
    Case("part", "RotaryEmbedding", [X, POSITIONS, *tables(2)], {"num_heads": H, "rotary_embedding_dim": 4}),
    Case("rms", "SimplifiedLayerNormalization", [X, GAIN], {"epsilon": 1e-6}, domain=""),
    Case("skip rms", "SkipSimplifiedLayerNormalization", [X, floats(B, S, WIDTH), GAIN]),
    Case("skip rms bias", "SkipSimplifiedLayerNormalization", [X, floats(B, S, WIDTH), GAIN, BIAS]),
    Case("skip norm", "SkipLayerNormalization", [X, floats(B, S, WIDTH), GAIN, SHIFT, BIAS]),
    Case("gelu", "Gelu", [X]),
    Case("bias gelu", "BiasGelu", [X, BIAS]),
    Case("fast gelu", "FastGelu", [X]),
    Case("fast gelu bias", "FastGelu", [X, BIAS]),
    Case("quick gelu", "QuickGelu", [X]),
    Case("matmul", "FusedMatMul", [floats(3, B, S, 8), floats(3, B, 8, T)], {"alpha": 0.5}),
    Case("matmul T", "FusedMatMul", [floats(B, 8, S), floats(B, T, 8)], {"transA": 1, "transB": 1}),
    Case("matmul batch", "FusedMatMul", [floats(S, 3, B, 8), floats(3, B, 8, T)], {"transBatchA": 1}),
    Case("matmul both", "FusedMatMul", [floats(8, 3, B, S), floats(3, B, 8, T)], {"transBatchA": 1, "transA": 1}),
    Case("attention", "Attention", [X, floats(WIDTH, 3 * WIDTH) / 8, floats(3 * WIDTH)], {"num_heads": H}),
    Case(
        "attention padding",
        "Attention",
        [X, floats(WIDTH, 3 * WIDTH) / 8, floats(3 * WIDTH), PADDING[:, :S]],
        {"num_heads": H, "unidirectional": 1},
    ),
]  # fmt: skip


def normal_form(case: Case):
    return normalise(bind(load(case.model()), {}, {}))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_numbers_as_onnxruntime(case: Case) -> None:
    session = onnxruntime.InferenceSession(case.model().SerializeToString())
    expected = session.run(None, case.feeds())
    found = evaluate(normal_form(case), case.feeds())
    for name, wanted in zip((o.name for o in session.get_outputs()), expected):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=2e-5)


def test_a_cache_longer_than_what_it_holds_keeps_its_length() -> None:
    case = gqa("buffer", tables(), step(2), CACHES, [ints(4), ints(5)], (6,), do_rotary=1)
    y, keys, values = onnxruntime.InferenceSession(case.model().SerializeToString()).run(None, case.feeds())
    found = evaluate(normal_form(case), case.feeds())
    np.testing.assert_allclose(found["y0"], y, rtol=1e-4, atol=2e-5)
    for name, wanted in (("y1", keys), ("y2", values)):  # what stands behind the 5 keys is left open
        assert found[name].shape == wanted.shape
        np.testing.assert_allclose(found[name][:, :, :5], wanted[:, :, :5], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_nothing_of_microsoft_stays(case: Case) -> None:
    assert {node.domain for node in normal_form(case).graph} <= {"", "onnxmesh"}


def test_packed_keys_and_values_are_taken_apart() -> None:
    """ONNX Runtime has no CPU kernel for them: the same numbers, packed and apart."""
    q, k, v = floats(B, S, WIDTH), floats(B, T, H, D), floats(B, T, H, D)
    apart = mha("apart", [q, k.reshape(B, T, WIDTH), v.reshape(B, T, WIDTH)])
    packed = mha("packed", [q, np.stack([k, v], axis=3)])
    wanted = evaluate(normal_form(apart), apart.feeds())["y0"]
    np.testing.assert_allclose(evaluate(normal_form(packed), packed.feeds())["y0"], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (gqa("lengths", past=[floats(B, G, 6, D)] * 2, lengths=[ints(10, 9), ints(11)]), "seqlens_k"),
        (gqa("total", past=[floats(B, G, 6, D)] * 2, known=(5,)), "total_sequence_length"),
        (gqa("sink", [None, None, None, None, floats(H)]), "head sink"),
        (mha("mask", [*qkv(), None, ints(3, 4)]), "padding mask"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name,
)  # fmt: skip
def test_what_is_not_supported_names_the_node(case: Case, says: str) -> None:
    with pytest.raises(ModelError, match=rf"node 'n' \(com.microsoft::{case.op}\) .*{says}"):
        normal_form(case)
