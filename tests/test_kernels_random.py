"""Random numbers: the distributions asked for, the same on every rank, and for a seed those of ONNX's reference."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from recognition import Arrays, parsed

from onnxmesh.compiler.api import compile_model
from onnxmesh.compiler.options import Options
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.session import Session


def drawn(body: str, inputs: Arrays | None = None, constants: Arrays | None = None, tp: int = 1) -> np.ndarray:
    proto = parsed(body, inputs or {}, constants or {}, opset=22)
    compiled = compile_model(proto, Options(Mesh.of(tp=tp)))
    assert compiled.plan is not None
    with Session(compiled.plan, timeout=30) as session:
        return np.asarray(session.run(None, dict(inputs or {}))[0])


@pytest.mark.parametrize(
    "body",
    [
        "y = RandomNormal <shape = [40, 50], seed = 3.0, mean = 1.5, scale = 2.0> ()",
        "y = RandomUniform <shape = [40, 50], seed = 3.0, low = -1.0, high = 4.0> ()",
    ],
)
def test_a_seed_means_what_it_means_to_onnxs_reference(body: str) -> None:
    (want,) = ReferenceEvaluator(parsed(body, {}, {}, opset=22)).run(None, {})
    np.testing.assert_allclose(drawn(body), want, rtol=1e-5, atol=1e-6)


def test_normal_numbers_have_the_mean_and_the_deviation() -> None:
    x = drawn("y = RandomNormalLike <mean = 1.5, scale = 2.0> (x)", {"x": np.zeros((100, 200), np.float32)})
    assert x.mean() == pytest.approx(1.5, abs=0.05)
    assert x.std() == pytest.approx(2.0, rel=0.02)


def test_uniform_numbers_fill_their_range() -> None:
    x = drawn("y = RandomUniformLike <low = -1.0, high = 3.0> (x)", {"x": np.zeros((100, 200), np.float32)})
    counts, _ = np.histogram(x, 8, (-1, 3))
    assert counts.sum() == x.size
    np.testing.assert_allclose(counts, x.size / 8, rtol=0.1)


def test_two_draws_without_a_seed_differ() -> None:
    body = "a = RandomNormal <shape = [9]> () b = RandomNormal <shape = [9]> () y = Sub (a, b)"
    assert np.all(drawn(body) != 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bernoulli_draws_ones_with_the_probability(dtype: type) -> None:
    x = np.repeat(np.array([0, 0.2, 0.5, 0.9, 1], dtype), 4000).reshape(5, 4000)
    y = drawn("y = Bernoulli <dtype = 6> (x)", {"x": x})
    assert y.dtype == np.int32
    np.testing.assert_allclose(y.mean(axis=1), x[:, 0], atol=0.03)
    assert set(np.unique(y)) == {0, 1}


def test_multinomial_draws_classes_by_their_log_probabilities() -> None:
    odds = np.array([[1, 2, 0, 5], [4, 1, 1, 2]], np.float32)
    with np.errstate(divide="ignore"):
        logits = np.log(odds) + 3
    y = drawn("y = Multinomial <sample_size = 8000> (x)", {"x": logits})
    shares = np.stack([(y == i).mean(axis=1) for i in range(4)], axis=1)
    np.testing.assert_allclose(shares, odds / 8, atol=0.03)


def test_dropout_in_training_drops_a_share_and_scales_the_rest() -> None:
    x = np.full((100, 200), 3, np.float32)
    constants = {"ratio": np.array(0.25, np.float32), "training": np.array(True)}
    y = drawn("y = Dropout <seed = 5> (x, ratio, training)", {"x": x}, constants)
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(y[y != 0], 4)


def test_every_rank_draws_the_same() -> None:
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((4, 8)).astype(np.float32)}
    weights = {
        "w": rng.standard_normal((8, 12)).astype(np.float32),
        "v": rng.standard_normal((12, 8)).astype(np.float32),
    }
    body = "h = MatMul (x, w) noise = RandomNormalLike (h) n = Add (h, noise) y = MatMul (n, v)"
    np.testing.assert_allclose(drawn(body, inputs, weights, tp=2), drawn(body, inputs, weights), rtol=1e-4, atol=1e-4)
