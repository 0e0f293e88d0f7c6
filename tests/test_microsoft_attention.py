"""The attention family of com.microsoft gives in normal form what ONNX Runtime gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from microsoft_cases import (
    KV_WIDTH,
    WIDTH,
    B,
    Case,
    D,
    G,
    H,
    Inputs,
    Random,
    S,
    T,
    assert_close,
    evaluated,
    ints,
    normal_form,
)

from onnxmesh.compiler.errors import ModelError

RANDOM = Random()
floats, below = RANDOM.floats, RANDOM.below


def mha(name: str, inputs: Inputs, outputs: int = 1, **attributes: Any) -> Case:
    return Case(f"mha {name}", "MultiHeadAttention", inputs, {"num_heads": H, **attributes}, outputs)


def masked(name: str, inputs: Inputs, outputs: int = 1, **attributes: Any) -> Case:
    """DecoderMaskedMultiHeadAttention."""
    return Case(f"decoder {name}", "DecoderMaskedMultiHeadAttention", inputs, {"num_heads": H, **attributes}, outputs)


def old(name: str, inputs: Inputs, outputs: int = 1, width: int = WIDTH, **attributes: Any) -> Case:
    """Attention, with its weight."""
    weight, bias = floats(WIDTH, 2 * WIDTH + width) / 8, floats(2 * WIDTH + width)
    return Case(
        f"attention {name}", "Attention", [floats(B, S, WIDTH), weight, bias, *inputs], {"num_heads": H, **attributes},
        outputs, (1, 2),
    )  # fmt: skip


def gqa(
    name: str,
    more: Inputs = [],  # noqa: B006  # never changed
    qkv: Inputs | None = None,
    past: Inputs = [None, None],  # noqa: B006
    lengths: list[np.ndarray] | None = None,
    known: tuple[int, ...] = (5, 6),
    outputs: int = 3,
    types: dict[int, int] = {},  # noqa: B006
    **attributes: Any,
) -> Case:
    qkv = qkv or step(S, B)
    inputs = [*qkv, *past, *(lengths or [ints(S - 1, S - 1), ints(S)]), *more]
    heads = {"num_heads": H, "kv_num_heads": G}
    return Case(f"gqa {name}", "GroupQueryAttention", inputs, {**heads, **attributes}, outputs, known, types=types)


def qkv(length: int = T) -> Inputs:
    return [floats(B, S, WIDTH), floats(B, length, WIDTH), floats(B, length, WIDTH)]


def step(length: int, batch: int = 1) -> Inputs:
    return [floats(batch, length, WIDTH), floats(batch, length, KV_WIDTH), floats(batch, length, KV_WIDTH)]


def tables(half: int = D // 2) -> Inputs:
    return [floats(16, half), floats(16, half)]


def cache(length: int, batch: int = 1, heads: int = G) -> Inputs:
    return [floats(batch, heads, length, D), floats(batch, heads, length, D)]


def bytes_cache(length: int) -> Inputs:
    return [(below(180, 1, G, length, D) - 90).astype(np.int8) for _ in range(2)]


X = floats(B, S, WIDTH)
POSITIONS = below(16, B, S).astype(np.int64)
PADDING = np.array([[1] * 5 + [0] * 2, [0] * 7], np.int32)
HOLES = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0]], np.int32)
ROWS = below(2, B, S, T)
PAST = cache(3, B, H)
NONE: Inputs = [None]
INT8 = {1: onnx.TensorProto.INT8, 2: onnx.TensorProto.INT8}
SCALES: Inputs = [np.full(1, 0.03, np.float32), np.full(1, 0.04, np.float32)]
CHANNEL_SCALES: Inputs = [np.abs(floats(1, G, 1, D)) / 20 + 0.01 for _ in range(2)]

MULTI_HEAD = [
    mha("plain", qkv()),
    mha("bias and scale", [*qkv(), floats(3 * WIDTH)], scale=0.3),
    mha("values of another width", [*qkv()[:2], floats(B, T, 2 * WIDTH)]),
    mha("padding, one row hidden", [*qkv(), None, PADDING]),
    mha("padding of every row", [*qkv(), None, ROWS]),
    mha("padding by lengths", [*qkv(), None, ints(3, 7)]),
    mha("padding by lengths and offsets", [*qkv(), None, ints(3, 7, 0, 5, 10, 0, 3, 10)]),
    mha("padding of its own value", [*qkv(), None, PADDING], mask_filter_value=-3.0),
    mha("attention bias", [*qkv(), None, None, floats(1, H, S, T)]),
    mha("padding and attention bias", [*qkv(), None, PADDING[:1].repeat(B, 0), floats(B, 1, S, T)]),
    mha("causal", qkv(S), unidirectional=1),
    mha("heads in keys", [floats(B, S, WIDTH), *cache(T, B, H)]),
    mha("heads in keys, bias", [floats(B, S, WIDTH), *cache(T, B, H), floats(3 * WIDTH)]),
    mha("cache", [*qkv(S), None, None, None, *PAST], 3),
    mha("cache, padding, bias", [*qkv(S), None, np.eye(2, 8, 3, np.int32), floats(B, H, S, 8), *PAST], 3),
    mha("causal cache", [*qkv(S), None, None, None, *PAST], 3, unidirectional=1),
    mha("scores", [*qkv(S), None, HOLES, floats(1, H, S, S)], 4, unidirectional=1),
    mha("a buffer", [*(x[:, :1] for x in qkv(S)), *NONE * 3, *cache(6, B, H), ints(3)], 3),
]  # fmt: skip
DECODER = [
    masked(
        "buffer", [*(x[:, :1] for x in qkv()), None, None, *cache(6, B, H), ints(3)], 3,
        past_present_share_buffer=1,
    ),
    masked(
        "buffer, mask, bias", [*(x[:, :1] for x in qkv()), np.eye(2, 4, 1, np.int32), floats(B, H, 1, 4),
        *cache(6, B, H), ints(3), None, None, floats(3 * WIDTH)], 3, past_present_share_buffer=1,
    ),
    masked("cross", [floats(B, 1, WIDTH), *cache(T, B, H)]),
    masked("cross, mask", [floats(B, 1, WIDTH), *cache(T, B, H), PADDING]),
]  # fmt: skip
OLD = [
    old("plain", []),
    old("padding, causal", [PADDING[:, :S]], unidirectional=1),
    old("padding by ends", [ints(3, 5)]),
    old("padding by ends and starts", [ints(3, 5, 1, 0)]),
    old("a mask that is none", [np.ones((B, 1), np.int32)]),
    old("values of another width", [], qkv_hidden_sizes=[WIDTH, WIDTH, WIDTH // 2], width=WIDTH // 2),
    old("its keys and values", [], 2),
    old("cache", [None, floats(2, B, H, 3, D)], 2),
    old("causal cache, mask", [np.eye(2, S + 3, 2, np.int32), floats(2, B, H, 3, D)], 2, unidirectional=1),
]  # fmt: skip
GROUPED = [
    gqa("plain"),
    gqa("lengths are data", known=(6,)),
    gqa("all lengths are data", known=()),
    gqa("not causal", causal=0),
    gqa("softcap and scale", softcap=2.0, scale=0.4),
    gqa("smooth", smooth_softmax=1),
    gqa("sink", [*NONE * 4, floats(H)]),
    gqa("packed", qkv=[floats(B, S, (H + 2 * G) * D), None, None]),
    gqa("rotary", tables(), do_rotary=1),
    gqa("rotary of a part", tables(), [np.tile(x, 2) for x in step(S, B) if x is not None], do_rotary=1),
    gqa("interleaved rotary", tables(), do_rotary=1, rotary_interleaved=1),
    gqa("rotary at positions", [*tables(), np.tile(np.arange(S), (B, 1))], do_rotary=1),
    gqa("window", local_window_size=2),
    gqa("bias", [*NONE * 3, floats(1, 1, S, S)]),
    gqa("bias and window", [*NONE * 3, floats(1, 1, S, S)], local_window_size=2),
    gqa("scores before the softmax", outputs=4, qk_output=1, causal=0),
    gqa("scores after the softmax", outputs=4, qk_output=2),
    gqa("an empty cache", tables(), past=cache(0, B), do_rotary=1),
    gqa("decode", tables(), step(1), cache(6), [ints(6), ints(7)], (6,), do_rotary=1),
    gqa("decode, known", tables(), step(1), cache(6), [ints(6), ints(7)], do_rotary=1),
    gqa("three steps", tables(), step(3), cache(6), [ints(8), ints(9)], (6,), do_rotary=1),
    gqa("ragged decode", tables(), step(1, B), cache(6, B), [ints(3, 5), ints(6)], (6,), do_rotary=1),
    gqa("ragged decode, known", tables(), step(1, B), cache(6, B), [ints(3, 5), ints(6)], do_rotary=1),
    gqa(
        "decode at positions", [*tables(), np.array([[9], [4]])], step(1, B), cache(6, B), [ints(3, 5), ints(6)],
        (6,), do_rotary=1,
    ),
    gqa("ragged decode grows", tables(), step(1, B), cache(6, B), [ints(2, 6), ints(7)], (6,), do_rotary=1),
    gqa("decode in a window", tables(), step(1), cache(9), [ints(6), ints(9)], (6,), do_rotary=1, local_window_size=3),
    gqa("ragged window", [], step(1, B), cache(6, B), [ints(3, 5), ints(6)], (6,), local_window_size=3),
    gqa("steps, softcap, sink", [*NONE * 4, floats(H)], step(3), cache(9), [ints(6), ints(7)], (6,), softcap=3.0),
    gqa("decode with bias", [*NONE * 3, floats(B, 1, 1, 6)], step(1, B), cache(6, B), [ints(3, 5), ints(6)], (6,)),
    gqa("8 bits", [*NONE * 5, *SCALES], step(1), bytes_cache(6), [ints(4), ints(5)], (6, 12, 13), types=INT8,
        k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR", kv_cache_bit_width=8),
    gqa("8 bits by channel", [*NONE * 5, *CHANNEL_SCALES], step(1), bytes_cache(6), [ints(5), ints(6)], (6, 12, 13),
        types=INT8, k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=8),
]  # fmt: skip
ROTARY = [
    Case("rotary", "RotaryEmbedding", [X, POSITIONS, *tables()]),
    Case("rotary, heads first", "RotaryEmbedding", [floats(B, H, S, D), POSITIONS, *tables()]),
    Case("interleaved", "RotaryEmbedding", [X, POSITIONS, *tables()], {"interleaved": 1}),
    Case("rotary from an offset", "RotaryEmbedding", [X, np.array([3]), *tables()]),
    Case("partly", "RotaryEmbedding", [X, POSITIONS, *tables(2)], {"num_heads": H, "rotary_embedding_dim": 4}),
    Case("a packed batch", "RotaryEmbedding", [X[:1], POSITIONS[:1], *tables()], {"is_packed_batching": 1}),
    *(
        Case(
            f"three positions {layout} {heads}", "MRotaryEmbedding",
            [x, below(16, 3, B, S).astype(np.int64), *tables()],
            {"mrope_section": [4, 2, 2], "mrope_layout": layout, "num_heads": H},
        )
        for heads, x in (("last", X), ("first", floats(B, H, S, D)))
        for layout in (0, 1)
    ),
]  # fmt: skip
LINEAR_QKV: Inputs = [floats(B, S, H * 8), floats(B, S, G * 8), floats(B, S, G * D)]
DECAY, RATE, STATE = -np.abs(floats(B, S, G)), np.abs(floats(B, S, G)) / 2, floats(B, G, 8, D)
STATES = [
    *(
        Case(
            f"linear attention {rule}", "LinearAttention", [*LINEAR_QKV, STATE, DECAY, RATE],
            {"q_num_heads": H, "kv_num_heads": G, "update_rule": rule}, 2,
        )
        for rule in ("gated", "gated_delta")
    ),
    Case("linear attention", "LinearAttention", LINEAR_QKV,
         {"q_num_heads": H, "kv_num_heads": G, "update_rule": "linear", "scale": 0.5}, 2),
    Case("causal conv", "CausalConvWithState", [floats(B, 6, S), floats(6, 1, 4), floats(6), floats(B, 6, 3)],
         {"activation": "silu"}, 2),
    Case("causal conv of a start", "CausalConvWithState", [floats(B, 6, S), floats(6, 1, 3)], outputs=2),
]  # fmt: skip
CASES = [*MULTI_HEAD, *DECODER, *OLD, *GROUPED, *ROTARY, *STATES]


def filled(case: Case, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs with zeros where a cache is not filled: what stands there is left open."""
    if case.op == "GroupQueryAttention" and case.inputs[3] is not None:
        for row, last in enumerate(np.atleast_1d(case.inputs[5])):
            for name in ("y1", "y2"):
                outputs[name][row, :, last + 1 :] = 0
    return outputs


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_numbers_as_onnxruntime(case: Case) -> None:
    assert_close(filled(case, evaluated(case)), filled(case, case.expected()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_nothing_of_microsoft_stays(case: Case) -> None:
    assert {node.domain for node in normal_form(case).graph} <= {"", "onnxmesh"}


@pytest.mark.parametrize("known", [(6,), (5, 6), ()])
@pytest.mark.parametrize(("length", "ends"), [(1, 3), (2, 4), (3, 2), (4, 7)])
def test_a_buffer_keeps_its_length_and_hides_what_is_not_filled(known: tuple[int, ...], length: int, ends: int) -> None:
    """How long the sequence is may be data: the same program for every length, as many steps as one likes."""
    case = gqa("buffer", tables(), step(length), cache(8), [ints(ends), ints(ends + 1)], known, do_rotary=1)
    found, expected = evaluated(case), case.expected()
    np.testing.assert_allclose(found["y0"], expected["y0"], rtol=1e-4, atol=2e-5)
    for name in ("y1", "y2"):  # what stands behind the keys is left open
        assert found[name].shape == expected[name].shape
        seen = expected[name][:, :, : ends + 1]
        np.testing.assert_allclose(found[name][:, :, : ends + 1], seen, rtol=1e-4, atol=2e-5)


def test_a_padded_prompt_in_a_batch_is_right_where_it_is_not_padding() -> None:
    case = gqa("prompt", tables(), step(S, B), cache(8, B), [ints(2, 4), ints(S)], (6,), do_rotary=1)
    found, expected = evaluated(case), case.expected()
    for row, count in enumerate((3, 5)):
        np.testing.assert_allclose(found["y0"][row, :count], expected["y0"][row, :count], rtol=1e-4, atol=2e-5)
        for name in ("y1", "y2"):
            part = (row, slice(None), slice(count))
            np.testing.assert_allclose(found[name][part], expected[name][part], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("bias", [None, floats(3 * WIDTH)], ids=["plain", "biased"])
def test_packed_inputs_are_taken_apart(bias: np.ndarray | None) -> None:
    """ONNX Runtime has no CPU kernel for them: the same numbers, packed and apart."""
    q, k, v = floats(B, S, WIDTH), floats(B, S, H, D), floats(B, S, H, D)
    wanted = mha("apart", [q, k.reshape(B, S, WIDTH), v.reshape(B, S, WIDTH), bias]).expected()
    for packed in ([np.stack([q.reshape(k.shape), k, v], axis=3), None, None], [q, np.stack([k, v], axis=3), None]):
        assert_close(evaluated(mha("packed", [*packed, bias])), wanted)


def test_heads_are_normalised_before_they_are_rotated() -> None:
    """As Qwen3 does; ONNX Runtime has it on GPUs only: the same numbers, normalised by hand."""
    q, k, v = step(S, B)
    assert q is not None and k is not None
    gains, positions = [floats(D), floats(D)], tables()

    def normed(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        rows = x.reshape(B, S, -1, D)
        return (rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * gain).reshape(x.shape).astype(np.float32)

    by_hand = gqa("by hand", positions, [normed(q, gains[0]), normed(k, gains[1]), v], do_rotary=1)
    case = gqa("norms", [*positions, *NONE * 5, *gains], [q, k, v], do_rotary=1)
    assert_close(evaluated(case), by_hand.expected())


def test_a_half_mask_of_megatron_is_cut_to_its_rows() -> None:
    """ONNX Runtime has it on GPUs only."""
    most = np.tril(np.ones((B, 1, 9, 9), np.int32))
    case, same = old("4-D", [most]), old("3-D", [most[:, 0, :S, :S]])
    object.__setattr__(same, "inputs", [*case.inputs[:3], same.inputs[3]])
    assert_close(evaluated(case), same.expected())


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (gqa("lengths", qkv=step(2, B), past=cache(8, B), lengths=[ints(5, 4), ints(6)]), "2 sequences of 2 tokens"),
        (gqa("total", qkv=step(3), past=cache(8), lengths=[ints(1), ints(2)]), "total_sequence_length is 2"),
        (gqa("window", past=cache(8, B), sliding_window_cache=1, local_window_size=4), "sliding_window_cache"),
        (gqa("4 bits", [*NONE * 5, *SCALES], step(1), [np.zeros((1, G, 6, 8), np.uint8)] * 2, [ints(4), ints(5)],
             types=INT8, k_quant_type="PER_TENSOR"), "quantised cache of UINT8"),
        (mha("mask", [*qkv(), None, ints(3, 4, 5)]), "padding mask of shape"),
        (mha("beams", [*qkv(S), *NONE * 3, *PAST, ints(3), np.zeros((B, 1, 3), np.int32)]), "beam cache"),
        (old("rotary", [], do_rotary=1), "rotates"),
        (Case("window", "CausalConvWithState", [floats(B, 6, S), floats(6, 1, 4)], {"dilation": 2}), "dilation = 2"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name,
)  # fmt: skip
def test_what_is_not_supported_names_the_node(case: Case, says: str) -> None:
    with pytest.raises(ModelError, match=rf"node 'n' \(com.microsoft::{case.op}\) .*{says}"):
        normal_form(case)
