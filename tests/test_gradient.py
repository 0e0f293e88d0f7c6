"""Gradient: the derivatives that a model asks for, beside central differences."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxmesh import backend
from onnxmesh.compiler.errors import ModelError

RNG = np.random.default_rng(0)
A, B = RNG.uniform(0.5, 2, (2, 3)), RNG.uniform(0.5, 2, (2, 3))
ROW, SQUARE = RNG.uniform(0.5, 2, 3), RNG.uniform(0.5, 2, (3, 3))


def model(body: str, a: np.ndarray, b: np.ndarray, xs: str = '"a", "b"') -> onnx.ModelProto:
    shapes = [str(list(x.shape)) for x in (a, b)]
    given = ", ".join(f"double{shape} {name}" for shape, name in zip(shapes, "ab"))
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 18, "ai.onnx.preview.training": 1]>
        g ({given}) => (double[M, N] y, double{shapes[0]} da, double{shapes[1]} db) {{
            {body}
            da, db = ai.onnx.preview.training.Gradient <xs: strings = [{xs}], y: string = "y"> (a, b)
        }}""")


def differences(proto: onnx.ModelProto, a: np.ndarray, b: np.ndarray, which: int, step: float = 1e-5) -> np.ndarray:
    """The derivatives of the sum of y by the elements of an input, by central differences."""
    found = np.zeros_like((a, b)[which])
    with backend.prepare(proto) as rep:
        for place in np.ndindex(found.shape):
            ends = []
            for sign in (1, -1):
                moved = [a.copy(), b.copy()]
                moved[which][place] += sign * step
                ends.append(rep.run(moved)[0].sum())
            found[place] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize(
    ("body", "b"),
    [
        ("y = Add(a, b)", B),
        ("y = Sub(a, b)", ROW),
        ("c = Mul(a, b) y = Mul(c, a)", B),
        ("y = Div(a, b)", ROW),
        ("y = MatMul(a, b)", SQUARE),
        ("c = Exp(a) d = Log(b) y = Sum(c, d, a)", B),
        ("c = Sqrt(a) d = Tanh(b) e = Neg(d) y = Mul(c, e)", ROW),
        ("c = Sigmoid(a) d = Sub(c, b) y = Relu(d)", B - 1),
        ("c = Identity(a) y = Add(c, c)", B),
    ],
)
def test_derivatives_are_what_central_differences_give(body: str, b: np.ndarray) -> None:
    proto = model(body, A, b)
    _, da, db = backend.run_model(proto, [A, b])
    np.testing.assert_allclose(da, differences(proto, A, b, 0), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(db, differences(proto, A, b, 1), rtol=1e-6, atol=1e-8)


def test_what_has_no_derivative_is_named() -> None:
    with pytest.raises(ModelError, match=r"needs the derivative of node '.*' \(Round\)"):
        backend.run_model(model("c = Round(a) y = Add(c, b)", A, B), [A, B])


def test_derivatives_at_other_tensors_are_refused() -> None:
    with pytest.raises(ModelError, match="derives by a, c at other tensors"):
        backend.run_model(model("c = Neg(a) y = Add(c, b)", A, B, '"a", "c"'), [A, B])
