"""Attention is found in every form that exporters write, and means the same."""

from __future__ import annotations

import numpy as np
import pytest
from recognition import Result, check, normal

B, H, S, T, D, E = 2, 4, 5, 7, 8, 6
Q, K, V = normal(B, H, S, D, seed=1), normal(B, H, T, D, seed=2), normal(B, H, T, E, seed=3)
QKV = {"q": Q, "k": K, "v": V}
LOWEST = np.finfo(np.float32).min
NUMBERS = {
    "c": np.float32(0.3),
    "root": np.float32(0.3**0.5),
    "inverse": np.array([3.5], np.float32),
    "zero": np.float32(0),
    "inf": np.float32(-np.inf),
    "min": np.float32(LOWEST),
}
TRANSPOSED = "kt = Transpose<perm = [0, 1, 3, 2]>(k) "
TAIL = "p = Softmax<axis = -1>(s) y = MatMul(p, v)"
SEEN = np.random.default_rng(7).random((B, 1, S, T)) < 0.6
SEEN[0, 0, 2] = False  # a row that sees nothing


def attention(body: str, inputs: dict[str, np.ndarray] | None = None, **options: object) -> Result:
    """The result of a graph that holds one attention and nothing else of note."""
    constants = {**NUMBERS, **options.pop("constants", {})}  # type: ignore[dict-item]
    result = check(body, {**QKV, **(inputs or {})}, constants, **options)  # type: ignore[arg-type]
    assert result.ops["Attention"] == 1, result.findings
    assert result.ops["Softmax"] == result.ops["MatMul"] == result.ops["Einsum"] == 0
    assert not result.misses("Attention")
    return result


@pytest.mark.parametrize(
    ("body", "scale"),
    [
        ("s = MatMul(q, kt)", 1.0),
        ("a = MatMul(q, kt) s = Mul(a, c)", 0.3),
        ("a = MatMul(q, kt) s = Mul(c, a)", 0.3),
        ("a = MatMul(q, kt) s = Div(a, inverse)", 1 / 3.5),
        ("x = Mul(q, c) s = MatMul(x, kt)", 0.3),
        ("x = Mul(kt, c) s = MatMul(q, x)", 0.3),
        ("x = Div(q, inverse) s = MatMul(x, kt)", 1 / 3.5),
        ("x = Mul(q, root) z = Mul(kt, root) s = MatMul(x, z)", 0.3),
        ("x = Mul(q, root) z = Mul(root, kt) a = MatMul(x, z) s = Mul(a, c)", 0.09),
    ],
)
def test_scale(body: str, scale: float) -> None:
    result = attention(f"{TRANSPOSED} {body} {TAIL}")
    assert result.attribute("Attention", "scale") == pytest.approx(scale)
    assert result.ops == {"Attention": 1}


def test_keys_transposed_through_three_dims() -> None:
    """As torch exports scaled_dot_product_attention at opset 18."""
    body = """
        k3 = Reshape(k, three) kt3 = Transpose<perm = [0, 2, 1]>(k3) kt = Reshape(kt3, four)
        x = Mul(q, root) z = Mul(kt, root) s = MatMul(x, z) """
    shapes = {"three": np.array([-1, T, D]), "four": np.array([B, H, D, T])}
    assert attention(body + TAIL, constants=shapes).ops == {"Attention": 1}


def test_heads_split_and_keys_transposed_at_once() -> None:
    body = """
        q4 = Reshape(x, heads) q = Transpose<perm = [0, 2, 1, 3]>(q4)
        k4 = Reshape(x, heads) kt = Transpose<perm = [0, 2, 3, 1]>(k4)
        v4 = Reshape(x, heads) v = Transpose<perm = [0, 2, 1, 3]>(v4)
        a = MatMul(q, kt) s = Mul(a, c) p = Softmax<axis = 3>(s) o = MatMul(p, v)
        o4 = Transpose<perm = [0, 2, 1, 3]>(o) y = Reshape(o4, merged)
    """
    constants = {"heads": np.array([0, 0, H, D]), "merged": np.array([0, 0, H * D]), "c": NUMBERS["c"]}
    result = check(body, {"x": normal(B, T, H * D)}, constants)
    assert result.ops == {"Reshape": 2, "Transpose": 2, "Attention": 1}
    assert len(set(result.node("Attention").inputs)) == 1


# --- masks --------------------------------------------------------------------------------------------------

SCORES = f"{TRANSPOSED} x = Mul(q, c) a = MatMul(x, kt) "
GUARD = "p0 = Softmax<axis = -1>(s) n = IsNaN(p0) p = Where(n, zero, p0) y = MatMul(p, v)"


@pytest.mark.parametrize("shape", [(T,), (S, T), (1, S, T), (H, S, T), (B, 1, 1, T), (B, H, S, T), (1, H, 1, T)])
def test_additive_mask_of_any_rank(shape: tuple[int, ...]) -> None:
    result = attention(f"{SCORES} s = Add(a, mask) {TAIL}", {"mask": normal(*shape)})
    assert len(result.node("Attention").inputs) == 4
    assert len(result.node("Attention").inputs[3].shape) == 4


@pytest.mark.parametrize(
    ("body", "row"),
    [
        (f"s = Where(m, a, inf) {TAIL}", "nan"),
        (f"s = Where(m, a, inf) {GUARD}", "zero"),
        (f"s = Where(m, a, min) {TAIL}", "uniform"),
        (f"s = Where(m, a, min) {GUARD}", "uniform"),
        (f"w = Not(m) s = Where(w, inf, a) {TAIL}", "nan"),
        (f"w = Not(m) s = Where(w, min, a) {TAIL}", "uniform"),
        (f"w = Where(m, zero, inf) s = Add(a, w) {TAIL}", "nan"),
        (f"w = Where(m, zero, inf) s = Add(w, a) {GUARD}", "zero"),
        (f"w = Where(m, zero, min) s = Add(a, w) {TAIL}", "uniform"),
        (f"s0 = Where(m, a, inf) s = Max(s0, min) {TAIL}", "uniform"),
        ("w = Not(m) s = Where(w, min, a) p0 = Softmax<axis = -1>(s) p = Where(w, zero, p0) y = MatMul(p, v)", "zero"),
        ("s = Where(m, a, inf) p0 = Softmax<axis = -1>(s) p = Where(m, p0, zero) y = MatMul(p, v)", "zero"),
    ],
)  # fmt: skip
def test_boolean_mask(body: str, row: str) -> None:
    result = attention(SCORES + body, {"m": SEEN})
    assert result.attribute("Attention", "masked_row") == row
    assert result.node("Attention").inputs[3] is result.model.graph.inputs[3]
    assert result.ops == {"Attention": 1}


@pytest.mark.parametrize("number", [np.float32(-np.inf), LOWEST, np.float32(-10000)])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("offset", [0, T - S])
def test_constant_causal_mask(number: np.float32, added: bool, offset: int) -> None:
    seen = np.tri(S, T, offset, dtype=bool)
    if added:
        body, mask = "s = Add(a, mask)", np.where(seen, 0, number).astype(np.float32)
    else:
        body, mask = "s = Where(mask, a, number)", seen[None, None]
    constants = {"mask": mask, "number": number}
    node = attention(f"{SCORES} {body} {TAIL}", constants=constants).node("Attention")
    assert node.inputs[3] is None
    assert node.inputs[4].const_value.numpy().tolist() == list(range(offset, offset + S))
    assert node.inputs[5].const_value.numpy().tolist() == list(range(T))


@pytest.mark.parametrize(
    "body",
    [
        "m = And(causal, pad) s = Where(m, a, inf)",
        "m0 = And(pad, causal) m = Expand(m0, whole) s = Where(m, a, min)",
        "h0 = Not(causal) h1 = Not(pad) h = Or(h0, h1) s = Where(h, inf, a)",
        "s0 = Where(causal, a, min) s = Where(pad, s0, min)",
        "w = Where(causal, zero, inf) s0 = Add(a, w) s = Where(pad, s0, inf)",
    ],
)
def test_causal_and_padding(body: str) -> None:
    pad = np.arange(T) < np.array([T, 3])[:, None]
    constants = {"causal": np.tri(S, T, 0, dtype=bool), "whole": np.array([B, 1, S, T])}
    result = attention(f"{SCORES} {body} {TAIL}", {"pad": pad[:, None, None, :]}, constants=constants)
    node = result.node("Attention")
    assert len(node.inputs) == 6
    assert node.inputs[3] is result.model.graph.inputs[3]


@pytest.mark.parametrize(
    "compare",
    [
        "LessOrEqual(ks, qs)",
        "GreaterOrEqual(qs, ks)",
        "Less(ks, q1)",
        "Greater(q1, ks)",
    ],
)
def test_positions_that_are_data(compare: str) -> None:
    inputs = {"ks": np.random.default_rng(0).permutation(T).reshape(1, 1, 1, T)}
    qs = np.arange(S).reshape(1, 1, S, 1) + 2
    body = f"{SCORES} m = {compare} s = Where(m, a, inf) {TAIL}"
    result = attention(body, inputs, constants={"qs": qs, "q1": qs + 1})
    assert len(result.node("Attention").inputs) == 6
    assert set(result.ops) == {"Attention", "Reshape"}


def test_bias_and_causal_mask() -> None:
    body = f"{SCORES} b = Add(a, bias) s = Where(causal, b, inf) {TAIL}"
    result = attention(body, {"bias": normal(1, H, S, T)}, constants={"causal": np.tri(S, T, 0, dtype=bool)})
    assert len(result.node("Attention").inputs) == 6
    assert result.node("Attention").inputs[3] is result.model.graph.inputs[3]


@pytest.mark.parametrize("fill", ["inf", "min"])
@pytest.mark.parametrize(
    "order", ["b0 = Where(m, a, {0}) s = Add(b0, bias)", "b0 = Add(a, bias) s = Where(m, b0, {0})"]
)
def test_bias_and_boolean_mask(order: str, fill: str) -> None:
    attention(f"{SCORES} {order.format(fill)} {TAIL}", {"m": SEEN, "bias": normal(H, S, T)})


def test_two_additive_masks_and_a_scale_behind() -> None:
    """Falcon's alibi is scaled together with the scores."""
    body = f"{TRANSPOSED} a = MatMul(q, kt) b = Add(a, m1) d = Add(b, m2) s = Mul(d, c) {TAIL}"
    result = attention(body, {"m1": normal(H, S, T), "m2": normal(B, 1, 1, T)})
    assert result.attribute("Attention", "scale") == pytest.approx(0.3)


def test_mask_subtracted() -> None:
    attention(f"{SCORES} s = Sub(a, m) {TAIL}", {"m": np.abs(normal(B, 1, 1, T)) * 10})


def test_soft_cap() -> None:
    body = f"{TRANSPOSED} a = MatMul(q, kt) a1 = Mul(a, c) a2 = Div(a1, cap) a3 = Tanh(a2) a4 = Mul(a3, cap)"
    result = attention(f"{body} s = Where(m, a4, min) {TAIL}", {"m": SEEN}, constants={"cap": np.float32(2)})
    assert result.attribute("Attention", "softcap") == pytest.approx(2)
    assert result.attribute("Attention", "scale") == pytest.approx(0.3)


def test_windows_mask_over_merged_batch() -> None:
    """Swin: the scores of b * w windows take a mask per window."""
    body = f"""{TRANSPOSED} a = MatMul(q, kt) a5 = Reshape(a, five) m5 = Add(a5, mask) s = Reshape(m5, four) {TAIL}"""
    constants = {"five": np.array([1, B, H, S, T]), "four": np.array([B, H, S, T])}
    attention(body, {"mask": normal(1, B, 1, S, T)}, constants=constants)
    inputs = {n: np.concatenate([x, x + 0.5, x - 0.5]) for n, x in QKV.items()}
    constants = {"five": np.array([3, B, H, S, T]), "four": np.array([3 * B, H, S, T])}
    attention(body, {**inputs, "mask": normal(1, B, 1, S, T)}, constants=constants)


# --- heads --------------------------------------------------------------------------------------------------

REPEAT = """
    k1 = Unsqueeze(k, two) k2 = Expand(k1, expanded) kr = Reshape(k2, repeated)
    v1 = Unsqueeze(v, two) v2 = Expand(v1, expanded) vr = Reshape(v2, repeated) """
GQA = {"k": K[:, :2], "v": normal(B, 2, T, D)}
GQA_SHAPES = {
    "two": np.array([2]),
    "expanded": np.array([B, 2, 2, T, D]),
    "repeated": np.array([B, H, T, D]),
    "order": np.array([0, 0, 1, 1]),
}


@pytest.mark.parametrize(
    "repeat",
    [REPEAT, "kr = Gather<axis = 1>(k, order) vr = Gather<axis = 1>(v, order)"],
)
def test_repeated_heads(repeat: str) -> None:
    body = f"{repeat} kt = Transpose<perm = [0, 1, 3, 2]>(kr) s = MatMul(q, kt)"
    result = attention(f"{body} p = Softmax<axis = -1>(s) y = MatMul(p, vr)", GQA, constants=GQA_SHAPES)
    assert result.ops == {"Attention": 1}


def test_repeated_heads_before_an_attention_op() -> None:
    body = f"{REPEAT} y = Attention<scale = 0.3>(q, kr, vr, m)"
    result = attention(body, {**GQA, "m": SEEN}, constants=GQA_SHAPES, opset=23)
    assert result.ops == {"Attention": 1}


def test_causal_mask_of_an_attention_op() -> None:
    constants = {"m": np.tri(S, T, 2, dtype=bool)}
    result = attention("y = Attention(q, k, v, m)", constants=constants, opset=23)
    assert result.node("Attention").inputs[3] is None
    assert len(result.node("Attention").inputs) == 6


def test_heads_repeated_the_other_way_stay() -> None:
    constants = {"order": np.array([0, 1, 0, 1])}
    body = "kr = Gather<axis = 1>(k, order) vr = Gather<axis = 1>(v, order) kt = Transpose<perm = [0, 1, 3, 2]>(kr)"
    result = attention(f"{body} s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, vr)", GQA, constants=constants)
    assert result.ops["Gather"] == 2


def test_broadcast_groups() -> None:
    """q [b, g, r, s, d] against k [b, g, 1, t, d]."""
    inputs = {"q": normal(B, 2, 3, S, D), "k": normal(B, 2, 1, T, D), "v": normal(B, 2, 1, T, E)}
    body = f"kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, kt) {TAIL}"
    node = attention(body, inputs).node("Attention")
    assert node.inputs[0].shape == (B, 6, S, D)
    assert node.inputs[1].shape == (B, 2, T, D)


def test_one_head_for_all_and_batch_broadcast() -> None:
    inputs = {"k": normal(1, 1, T, D), "v": normal(1, 1, T, E)}
    node = attention(f"{TRANSPOSED} s = MatMul(q, kt) {TAIL}", inputs).node("Attention")
    assert node.inputs[1].shape == (B, 1, T, D)


SPLIT = """
    q4 = Reshape({0}, heads) q5 = Transpose<perm = [0, 2, 1, 3]>(q4) q = Reshape(q5, flat)
    k4 = Reshape(x, heads) k5 = Transpose<perm = [0, 2, 1, 3]>(k4) k = Reshape(k5, flat)
    v4 = Reshape(x, heads) v5 = Transpose<perm = [0, 2, 1, 3]>(v4) v = Reshape(v5, flat)
    kt = Transpose<perm = [0, 2, 1]>(k) a = MatMul(q, kt) """
JOIN = """
    o = MatMul(p, v) o4 = Reshape(o, unflat) o5 = Transpose<perm = [0, 2, 1, 3]>(o4) y = Reshape(o5, merged)"""
FLAT = {
    "heads": np.array([B, T, H, D]),
    "flat": np.array([B * H, T, D]),
    "unflat": np.array([B, H, T, D]),
    "merged": np.array([B, T, H * D]),
    "four": np.array([B, H, T, T]),
    "three": np.array([B * H, T, T]),
    **NUMBERS,
}


@pytest.mark.parametrize(
    ("start", "middle"),
    [
        ("", "p = Softmax<axis = -1>(a)"),
        ("xs = Mul(x, c)", "p = Softmax<axis = -1>(a)"),
        ("", "a4 = Reshape(a, four) a5 = Add(a4, mask) s = Reshape(a5, three) p = Softmax<axis = -1>(s)"),
        ("", "a4 = Reshape(a, four) a5 = Add(a4, mask) s = Softmax<axis = 3>(a5) p = Reshape(s, three)"),
    ],
)
def test_heads_in_the_batch(start: str, middle: str) -> None:
    """BART, T5, OPT: `[b * h, s, d]`."""
    body = f"{start} {SPLIT.format('xs' if start else 'x')} {middle} {JOIN}"
    result = check(body, {"x": normal(B, T, H * D), "mask": normal(B, 1, 1, T)}, FLAT)
    node = result.node("Attention")
    assert node.inputs[0].shape == (B, H, T, D)
    assert result.ops["Reshape"] <= 3
    assert result.ops["Transpose"] <= 3
    assert result.ops["Mul"] == 0


def test_heads_in_the_batch_with_the_sequence_first() -> None:
    """torch's MultiheadAttention: [t, b, h * d] -> [t, b * h, d] -> [b * h, t, d]."""
    body = """
        q3 = Reshape(x, flat) q = Transpose<perm = [1, 0, 2]>(q3) kt = Transpose<perm = [1, 2, 0]>(q3)
        s = MatMul(q, kt) p = Softmax<axis = -1>(s) o = MatMul(p, q)
        o3 = Transpose<perm = [1, 0, 2]>(o) y = Reshape(o3, merged)
    """
    constants = {"flat": np.array([T, B * H, D]), "merged": np.array([T, B, H * D])}
    result = check(body, {"x": normal(T, B, H * D)}, constants)
    assert result.node("Attention").inputs[0].shape == (B, H, T, D)


@pytest.mark.parametrize(("shape", "heads"), [((B, T, D), (B, 1)), ((T, D), (1, 1))])
def test_without_heads(shape: tuple[int, ...], heads: tuple[int, int]) -> None:
    perm = "[0, 2, 1]" if len(shape) == 3 else "[1, 0]"
    body = f"xt = Transpose<perm = {perm}>(x) s = MatMul(x, xt) p = Softmax<axis = -1>(s) y = MatMul(p, x)"
    assert check(body, {"x": normal(*shape)}).node("Attention").inputs[0].shape[:2] == heads


def test_heads_without_a_batch() -> None:
    body = """
        x3 = Reshape(x, split) q = Transpose<perm = [1, 0, 2]>(x3) kt = Transpose<perm = [1, 2, 0]>(x3)
        s = MatMul(q, kt) p = Softmax<axis = -1>(s) y = MatMul(p, q)
    """
    result = check(body, {"x": normal(T, H * D)}, {"split": np.array([T, H, D])})
    assert result.node("Attention").inputs[0].shape == (1, H, T, D)


# --- other ways to write it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "values", "perm"),
    [
        ("bhsd,bhtd->bhst", "bhst,bhte->bhse", (0, 1, 2, 3)),
        ("bshd,bthd->bhst", "bhst,bthe->bshe", (0, 2, 1, 3)),
        ("bthd,bshd->bhts", "bhts,bshe->bthe", (0, 2, 1, 3)),
    ],
)
def test_einsum(scores: str, values: str, perm: tuple[int, ...]) -> None:
    inputs = {name: np.ascontiguousarray(x.transpose(perm)) for name, x in QKV.items()}
    body = f"""a = Einsum<equation = "{scores}">(q, k) s = Mul(a, c)
        p = Softmax<axis = -1>(s) y = Einsum<equation = "{values}">(p, v)"""
    attention(body, inputs)


def test_weights_transposed_on_the_value_side() -> None:
    """Convolutional models hold [b, c, tokens]."""
    inputs = {"q": normal(B, D, S), "k": normal(B, D, T), "v": normal(B, E, T)}
    body = """qt = Transpose<perm = [0, 2, 1]>(q) a = MatMul(qt, k) s = Mul(a, c) p = Softmax<axis = 2>(s)
        pt = Transpose<perm = [0, 2, 1]>(p) y = MatMul(v, pt)"""
    attention(body, inputs)


HALVES = {n: x.astype(np.float16) for n, x in QKV.items()}


@pytest.mark.parametrize(
    "body",
    [
        "a = MatMul(q, kt) s = Cast<to = 1>(a) w = Softmax(s) p = Cast<to = 10>(w) y = MatMul(p, v)",
        """qf = Cast<to = 1>(q) kf = Cast<to = 1>(kt) s = MatMul(qf, kf) w = Softmax(s) p = Cast<to = 10>(w)
           y = MatMul(p, v)""",
        """qf = Cast<to = 1>(q) kf = Cast<to = 1>(kt) vf = Cast<to = 1>(v) s = MatMul(qf, kf) p = Softmax(s)
           o = MatMul(p, vf) y = Cast<to = 10>(o)""",
    ],
)
def test_half_precision(body: str) -> None:
    result = attention(TRANSPOSED + body, HALVES, outputs=["float16 y"])
    assert result.ops == {"Attention": 1}


def test_lowest_number_of_half_precision_stays_additive() -> None:
    """It leaves something of a score, and a row that sees no key is then a softmax of its scores."""
    body = f"a = MatMul(q, kt) w = Where(m, nothing, low) s = Add(a, w) {TAIL}"
    constants = {"nothing": np.float16(0), "low": np.finfo(np.float16).min}
    result = attention(TRANSPOSED + body, {**HALVES, "m": SEEN}, constants=constants, outputs=["float16 y"])
    assert result.ops == {"Attention": 1, "Where": 1}


def test_float_queries_and_half_values() -> None:
    body = f"{TRANSPOSED} s = MatMul(q, kt) w = Softmax(s) p = Cast<to = 10>(w) y = MatMul(p, v)"
    result = attention(body, {"v": HALVES["v"]}, outputs=["float16 y"])
    assert result.ops == {"Attention": 1, "Cast": 2}


def test_weights_that_are_an_output() -> None:
    result = check(f"{TRANSPOSED} s = MatMul(q, kt) {TAIL}", QKV, outputs=["y", "p"])
    assert result.ops["Attention"] == result.ops["Softmax"] == 1
    assert any("other users" in f.reason for f in result.findings)


def test_many_layers_share_masks_and_positions() -> None:
    layer = "a{1} = MatMul({0}, kt) m{1} = And(causal, pad) b{1} = Where(m{1}, a{1}, inf) p{1} = Softmax(b{1}) "
    body = TRANSPOSED + "".join(
        (layer + "y{1} = MatMul(p{1}, v)").format(f"y{i - 1}" if i else "q", i) for i in range(3)
    )
    inputs = {"q": Q, "k": K, "v": normal(B, H, T, D), "pad": SEEN[:, :, :1]}
    inputs["pad"][..., 0] = True
    result = check(body, inputs, {**NUMBERS, "causal": np.tri(S, T, 0, dtype=bool)}, outputs=["y2"])
    assert result.ops == {"Attention": 3}
    assert len({v for n in result.model.graph for v in n.inputs[3:]}) == 3


@pytest.mark.parametrize("shape", [(H, 1, 1), (B, 1, S, 1)])
@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_scale_by_head_or_query(op: str, shape: tuple[int, ...]) -> None:
    """Swin v2 learns a temperature for each head."""
    result = attention(f"{TRANSPOSED} a = MatMul(q, kt) s = {op}(a, factor) {TAIL}", {"factor": normal(*shape) + 3})
    assert result.ops[op] == 1


@pytest.mark.parametrize(
    "softmax",
    [
        "m = ReduceMax<keepdims = 1>(s, last) z = Sub(s, m) e = Exp(z) t = ReduceSum(e, last) p = Div(e, t)",
        "e = Exp(s) t = ReduceSum<keepdims = 1>(e, last) r = Reciprocal(t) p = Mul(e, r)",
    ],
)
def test_softmax_in_parts(softmax: str) -> None:
    attention(f"{SCORES} s = Identity(a) {softmax} y = MatMul(p, v)", constants={"last": np.array([-1])})


# --- near misses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{TRANSPOSED} a = MatMul(q, kt) s = Where(m, a, small) {TAIL}", "puts -2 in the place of scores"),
        (f"{TRANSPOSED} a = MatMul(q, kt) s = Sin(a) {TAIL}", "the scores come from Sin"),
        (f"{TRANSPOSED} s = MatMul(q, kt) p = Softmax(s) r = Sin(p) y = MatMul(r, v)", "the weights go to Sin"),
        (f"{TRANSPOSED} a = MatMul(q, kt) s = Mul(a, a) {TAIL}", "the scores come from Mul"),
        (f"{TRANSPOSED} a0 = MatMul(q, kt) a = Add(a0, one) s = Mul(a, head) {TAIL}", "multiplies capped or masked"),
        (
            "kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) p = Softmax<axis = 2>(s) y = MatMul(p, v)",
            "not over the last axis",
        ),
    ],
)  # fmt: skip
def test_near_miss(body: str, reason: str) -> None:
    constants = {
        "small": np.float32(-2),
        "one": np.ones(T, np.float32),
        "head": np.ones((H, 1, 1), np.float32),
    }
    result = check(body, {**QKV, "m": SEEN}, constants)
    assert result.ops["Attention"] == 0
    (found,) = result.misses("Attention")
    assert reason in found


@pytest.mark.parametrize(
    "body",
    ["a = MatMul(x, w) y = Softmax(a)", "a = MatMul(x, w) p = Softmax(a) y = MatMul(p, u)", "y = Softmax(x)"],
)
def test_other_softmaxes_are_no_near_miss(body: str) -> None:
    result = check(body, {"x": normal(3, 5)}, {"w": normal(5, 7), "u": normal(7, 5)})
    assert not [f for f in result.findings if f.pattern == "Attention"]
