"""Masks that are positions in disguise: they are as large as queries times keys only on paper."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest
from evaluate import evaluate
from recognition import Result, check, normal, parsed

from onnxmesh.compiler.frontend import load
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.normalise.normalise import normalise
from onnxmesh.passes.recognise.mask_positions import Seen, seen_by
from onnxmesh.passes.recognise.mask_values import Unknown, blocks

B, H, S, D = 2, 2, 264, 4
"""A mask of S x S booleans is larger than what the compiler folds."""
QKV = {name: normal(B, H, S, D, seed=i) for i, name in enumerate("qkv")}
LOWEST = np.finfo(np.float32).min
PAD = np.arange(S) >= np.array([0, 3])[:, None]  # the first rows of the second batch entry see nothing
CONSTANTS = {
    "square": np.array([S, S]),
    "whole": np.array([B, 1, S, S]),
    "rows": np.array([0, 1]),
    "front": np.array([1, 2]),
    "first": np.array([1]),
    "zero": np.float32(0),
    "one": np.float32(1),
    "inf": np.float32(-np.inf),
    "min": np.float32(LOWEST),
    "hundred": np.float32(-100),
    "true": np.array(True),
    "i": np.arange(S).reshape(S, 1),
    "j": np.arange(S),
    "far": np.array(S),
    "near": np.array(5),
    "buffer": np.tri(S, dtype=np.float32)[None, None],
    "int0": np.array(0),
    "next": np.array(1),
    "down": np.array(-1),
    "of_one": np.arange(S)[None],
}
SCORES = "kt = Transpose<perm = [0, 1, 3, 2]>(k) a = MatMul(q, kt)"
TAIL = "p = Softmax<axis = -1>(s) y = MatMul(p, v)"
TRIANGLE = "ones = Expand(true, square) seen = Trilu<upper = 0>(ones)"


def attention(body: str, **inputs: np.ndarray) -> Result:
    """The result of scores `a`, of which the body makes `s`."""
    result = check(f"{SCORES} {body} {TAIL}", {**QKV, **inputs}, CONSTANTS)
    assert result.ops["Attention"] == 1, result.findings
    assert result.ops["Softmax"] == 0
    return result


def positions(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the only attention, which are constants."""
    q, k = result.node("Attention").inputs[4:]
    assert q is not None and k is not None and q.const_value is not None and k.const_value is not None
    return q.const_value.numpy(), k.const_value.numpy()


def mask_of(result: Result) -> ir.Value | None:
    inputs = result.node("Attention").inputs
    return inputs[3] if len(inputs) > 3 else None


@pytest.mark.parametrize(
    "body",
    [
        f"{TRIANGLE} s = Where(seen, a, inf)",
        f"{TRIANGLE} m = Where(seen, zero, inf) s = Add(a, m)",
        f"{TRIANGLE} f = Cast<to = 1>(seen) h = Equal(f, zero) s = Where(h, inf, a)",
        "full = Expand(one, square) f = Trilu<upper = 0>(full) h = Equal(f, zero) s = Where(h, min, a)",
        "full = Expand(inf, square) m = Trilu(full, next) s = Add(a, m)",
        "full = Expand(min, square) m = Trilu(full, next) s = Add(a, m)",
        "h = Equal(buffer, zero) s = Where(h, inf, a)",
        "seen = LessOrEqual(j, i) s = Where(seen, a, inf)",
        "h = Greater(j, i) full = Expand(zero, square) m = Where(h, min, full) s = Add(a, m)",
        "d = Sub(i, j) new = GreaterOrEqual(d, int0) close = Less(d, far) "
        "both = And(new, close) m = Unsqueeze(both, rows) s = Where(m, a, inf)",
    ],
)
def test_triangle(body: str) -> None:
    """Made of ones, kept as a buffer, or compared from indices; a window as wide as the sequence hides nothing."""
    result = attention(body)
    assert result.ops == {"Attention": 1}
    assert mask_of(result) is None
    assert all(np.array_equal(p, np.arange(S)) for p in positions(result))


def test_segments_of_one_sequence_hide_nothing() -> None:
    """Numbers of packed sequences, as they are computed from positions that go up by one throughout."""
    body = """
        before = Slice(of_one, int0s, last, first) after = Slice(of_one, first, ends, first)
        step = Sub(after, before) jump0 = Equal(step, next) jump = Not(jump0) count = Cast<to = 7>(jump)
        seg = CumSum(count, next) sq = Unsqueeze(seg, front) sk0 = Unsqueeze(seg, first) sk = Unsqueeze(sk0, first)
    """
    cut = {"int0s": np.array([0]), "last": np.array([S - 1]), "ends": np.array([S])}
    qkv = {name: x[:, :, 1:] for name, x in QKV.items()}
    body = body.replace("sq = Unsqueeze(seg, front)", "sq = Unsqueeze(seg, sides)")
    cut["sides"] = np.array([1, 3])
    body += "same = Equal(sq, sk) s = Where(same, a, inf)"
    result = check(f"{SCORES} {body} {TAIL}", qkv, {**CONSTANTS, **cut})
    assert result.ops == {"Attention": 1}
    assert len(result.node("Attention").inputs) == 3


@pytest.mark.parametrize(
    ("body", "visible"),
    [
        ("old = LessOrEqual(j, i) head = Less(j, near) seen = Or(old, head)", lambda i, j: (j <= i) | (j < 5)),
        ("bi = Div(i, near) bj = Div(j, near) seen = LessOrEqual(bj, bi)", lambda i, j: j // 5 <= i // 5),
        ("d = Sub(j, i) seen = LessOrEqual(d, near)", lambda i, j: j <= i + 5),
        ("d = Sub(j, i) seen = Greater(d, near)", lambda i, j: j > i + 5),
    ],
    ids=["prefix", "blocks", "ahead", "far ahead"],
)
def test_nested(body: str, visible: object) -> None:
    """Of two queries, one sees all that the other sees."""
    q, k = positions(attention(f"{body} s = Where(seen, a, min)"))
    wanted = visible(np.arange(S)[:, None], np.arange(S))  # type: ignore[operator]
    assert np.array_equal(k <= q[:, None], wanted)


@pytest.mark.parametrize(
    "body",
    [
        "both = And(seen, pad) s = Where(both, a, inf)",
        "c = Expand(seen, whole) p0 = Expand(pad, whole) both = And(c, p0) s = Where(both, a, min)",
        "m0 = Where(seen, zero, min) m1 = Expand(m0, whole) h = Not(pad) m = Where(h, min, m1) s = Add(a, m)",
        "c = Unsqueeze(seen, rows) m0 = Where(c, zero, inf) m1 = Where(pad, zero, inf) m = Add(m0, m1) s = Add(a, m)",
        "cf = Cast<to = 1>(seen) pf = Cast<to = 1>(pad) both = Mul(cf, pf) h = Equal(both, zero) s = Where(h, inf, a)",
        "both = And(seen, pad) m = Where(both, zero, min) h = Less(m, hundred) s = Where(h, min, a)",
        "e0 = Expand(pad, whole) e = Cast<to = 1>(e0) i0 = Sub(one, e) h0 = Cast<to = 9>(i0) m0 = Where(h0, min, i0) "
        "h = Cast<to = 9>(m0) c = Where(seen, zero, min) m1 = Expand(c, whole) m = Where(h, min, m1) s = Add(a, m)",
        "no = And(pad, pad) n = Not(no) h0 = Not(seen) h = Or(h0, n) s = Where(h, inf, a)",
    ],
)
def test_triangle_and_padding(body: str) -> None:
    result = attention(f"{TRIANGLE} {body}", pad=PAD[:, None, None, :])
    mask = mask_of(result)
    assert mask is not None and mask.dtype == ir.DataType.BOOL and mask.shape == (B, 1, 1, S)
    assert all(np.array_equal(p, np.arange(S)) for p in positions(result))


def test_padding_that_is_looked_for_in_a_sum() -> None:
    """`mask + keep == 0` hides where the mask is zero and keep is, as transformers wrote it for a long time."""
    body = f"{TRIANGLE} m0 = Where(seen, zero, min) m = Expand(m0, whole) t = Add(m, keep) h = Equal(t, zero)"
    result = attention(f"{body} w = Where(h, min, m) s = Add(a, w)", keep=PAD[:, None, None, :].astype(np.float32))
    assert set(result.ops) == {"Attention", "Cast"}
    assert all(np.array_equal(p, np.arange(S)) for p in positions(result))


@pytest.mark.parametrize("padded", [False, True])
def test_window(padded: bool) -> None:
    """One end of the window becomes positions, the other is one comparison of vectors, and no constant is larger."""
    body = "old = LessOrEqual(j, i) d = Sub(i, j) close = Less(d, near) both = And(close, old)"
    body += " m = And(both, pad) s = Where(m, a, inf)" if padded else " s = Where(both, a, inf)"
    result = attention(body, **({"pad": PAD[:, None, None, :]} if padded else {}))
    assert all(np.array_equal(p, np.arange(S)) for p in positions(result))
    assert result.ops["LessOrEqual"] == 1
    assert set(result.ops) <= {"Attention", "LessOrEqual", "And"}
    assert max(v.const_value.size for v in result.model.graph.initializers.values() if v.const_value) <= S


def test_chunks() -> None:
    """Keys of the same chunk that are not ahead: that a chunk ends follows from the positions."""
    body = "ci = Div(i, near) cj = Div(j, near) same = Equal(ci, cj) old = LessOrEqual(j, i) both = And(same, old)"
    result = attention(f"{body} s = Where(both, a, inf)")
    assert result.ops == {"Attention": 1, "LessOrEqual": 1}


def test_band_of_a_buffer() -> None:
    """A window that stands in the file for every batch entry is not copied."""
    i, j = np.arange(S)[:, None], np.arange(S)
    band = np.broadcast_to((j <= i) & (j > i - 9), (B, 1, S, S))
    result = check(f"{SCORES} s = Where(band, a, inf) {TAIL}", QKV, {**CONSTANTS, "band": band})
    assert result.ops == {"Attention": 1, "LessOrEqual": 1}
    assert "band" not in result.model.graph.initializers


def test_bias_by_head() -> None:
    """A bias that is selected where keys are seen stays small, and what hides keys leaves it."""
    bias = normal(1, H, 1, S, seed=9)
    body = f"{TRIANGLE} m0 = Where(seen, bias, min) s = Add(a, m0)"
    result = check(f"{SCORES} {body} {TAIL}", QKV, {**CONSTANTS, "bias": bias})
    mask = mask_of(result)
    assert mask is not None and mask.shape == (1, H, 1, S)
    assert result.ops == {"Attention": 1}


def test_bias_by_head_and_padding() -> None:
    """Where a row sees nothing, keys hidden by their position and by the mask have the same weight."""
    bias = normal(1, H, 1, S, seed=9)
    body = f"{TRIANGLE} both = And(seen, pad) m0 = Where(both, bias, min) s = Add(a, m0)"
    result = check(f"{SCORES} {body} {TAIL}", {**QKV, "pad": PAD[:, None, None, :]}, {**CONSTANTS, "bias": bias})
    mask = mask_of(result)
    assert mask is not None and mask.shape == (B, H, 1, S)
    assert result.attribute("Attention", "masked_row") == "uniform"
    assert len(positions(result)) == 2


@pytest.mark.filterwarnings("ignore:overflow")
def test_sum_of_lowest_numbers_stays_a_sum() -> None:
    """A key that two such masks hide has less than one that one hides: it matters in a row that sees nothing."""
    result = attention(f"{TRIANGLE} m0 = Where(seen, zero, min) m1 = Where(pad, zero, min) m = Add(m0, m1) "
                       "s = Add(a, m)", pad=PAD[:, None, None, :])  # fmt: skip
    assert len(result.node("Attention").inputs) == 4


def test_mask_of_an_attention_op_that_hides_nothing() -> None:
    body = "ones = Expand(true, whole) y = Attention(q, k, v, ones)"
    result = check(body, QKV, CONSTANTS, opset=23)
    assert len(result.node("Attention").inputs) == 3


def test_a_number_that_does_not_hide_is_a_bias() -> None:
    result = attention(f"{TRIANGLE} m = Where(seen, zero, one) s = Add(a, m)")
    mask = mask_of(result)
    assert mask is not None and mask.dtype == ir.DataType.FLOAT
    assert len(result.node("Attention").inputs) == 4


def test_data_is_not_a_constant() -> None:
    """Segments that are fed may differ: they stay a mask."""
    segments = np.repeat([0, 1, 2, 3], S // 4)
    body = f"{TRIANGLE} same = Equal(sq, sk) both = And(same, seen) s = Where(both, a, inf)"
    result = attention(body, sq=segments[:, None], sk=segments)
    mask = mask_of(result)
    assert mask is not None and mask.shape == (1, 1, S, S)
    assert all(np.array_equal(p, np.arange(S)) for p in positions(result))


# --- what the parts say -------------------------------------------------------------------------------------


def test_sums_tell_positions() -> None:
    """Positions are found for nested masks, whatever the order of keys and queries, and for no other."""
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(300):
        s, t = rng.integers(1, 6, 2)
        seen = rng.random((s, t)) < 0.5
        if rng.random() < 0.5:
            seen = rng.integers(0, 4, t) <= rng.integers(-1, 4, s)[:, None]
        nested = all(not (a & ~b).any() or not (b & ~a).any() for a in seen for b in seen)
        made = Seen(bool(seen.all()), True, None, seen.sum(axis=1), seen.sum(axis=0)).positions
        assert (made is not None) == nested
        if made is not None:
            assert np.array_equal(made[1] <= made[0][:, None], seen)
            found += 1
    assert 100 < found < 300


@pytest.mark.parametrize(
    "body",
    [
        "y = Transpose<perm = [1, 0]>(x)",
        "y = Reshape(x, shape)",
        "u = Unsqueeze(x, last) y = Expand(u, large)",
        "y = Slice(x, starts, ends, axes, steps)",
        "z = Neg(x) y = Concat<axis = 1>(x, z, x)",
        "y = Gather<axis = 1>(x, places)",
        "y = CumSum(x, axis)",
        "y = CumSum<exclusive = 1, reverse = 1>(x, axis)",
        "y = Trilu<upper = 0>(x, axis)",
        "z = Transpose<perm = [1, 0]>(x) u = Reshape(z, shape) uu = Mul(u, u) y = Sub(uu, u)",
    ],
)
def test_numbers_of_a_computed_value(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in blocks of a few elements, they are what the graph computes."""
    constants = {
        "w": np.arange(42, dtype=np.float32).reshape(6, 7),
        "shape": np.array([2, 3, 7]),
        "last": np.array([2]),
        "large": np.array([4, 6, 7, 5]),
        "starts": np.array([5, 1]),
        "ends": np.array([0, 6]),
        "axes": np.array([0, 1]),
        "steps": np.array([-2, 3]),
        "places": np.array([[1, -1], [3, 0]]),
        "axis": np.array(1),
        "nil": np.float32(0),
    }
    # the sum keeps the value from being folded
    proto = parsed(
        f"x = Add(w, nil) {body.replace('y =', 'value =')} y = Mul(value, fed)",
        {"fed": np.float32(1)[None]},
        constants,
    )
    monkeypatch.setattr("onnxmesh.passes.recognise.mask_values.BLOCK", 16)
    model = normalise(bind(load(proto), {}, {}))
    wanted = evaluate(model, {"fed": np.float32(1)[None]})["y"]
    product = model.graph.outputs[0].producer()
    assert product is not None and product.inputs[0] is not None
    parts = [np.broadcast_to(b, (*wanted.shape[:-2], *b.shape[-2:])) for b in blocks(product.inputs[0])]
    assert np.array_equal(np.concatenate(parts, axis=-2), wanted)


def test_large_masks_are_never_whole() -> None:
    """4096 x 4096 indices are 128 MiB; what is held of them is a part."""
    n = 4096
    constants = {"i": np.arange(n)[:, None], "j": np.arange(n), "near": np.array(7)}
    body = "d = Sub(i, j) a = GreaterOrEqual(d, near) f = Cast<to = 1>(a) y = Mul(f, fed)"
    model = normalise(bind(load(parsed(body, {"fed": np.float32(1)[None]}, constants)), {}, {}))
    cast = next(node for node in model.graph if node.op_type == "Cast")
    assert cast.inputs[0] is not None
    tracemalloc.start()
    seen = seen_by(cast.inputs[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert seen is not None and seen.positions is not None
    assert np.array_equal(seen.positions[0], np.arange(n) - 7)


def test_values_of_inputs_are_unknown() -> None:
    model = normalise(bind(load(parsed("y = Neg(x)", {"x": normal(2, 2)}, {})), {}, {}))
    with pytest.raises(Unknown):
        next(blocks(model.graph.outputs[0]))
