"""What counts as rounding: the condition itself, and how an element's place is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial, Segment, Shard
from onnxmesh.runtime.views import cut_view
from onnxmesh.verification.correspondence import Tensor, global_index
from onnxmesh.verification.model import Model
from onnxmesh.verification.oracle import Oracle
from onnxmesh.verification.rounding import CHUNK, FACTOR, LAMBDA, UNIT, Bound, Spread, chunks, judge, scale

ONE = Bound(terms=1, nodes=1, unit=UNIT)
RNG = np.random.default_rng(0)


def judged(ours: object, reference: object, bound: Bound = ONE, spread: Spread | None = None) -> tuple[int, int]:
    """How many elements are wrong, and the first of them."""
    x, r = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
    found = judge(x, r, scale(r), bound, spread)
    assert (found.wrong > 0) == (found.worst > 1)
    return found.wrong, found.first


def test_an_element_may_be_off_by_a_few_roundings_of_its_size() -> None:
    off = 2 * LAMBDA * UNIT
    assert judged([1.0, 1 + off * 0.9], [1.0, 1.0]) == (0, -1)
    assert judged([1.0, 1 + off * 1.3], [1.0, 1.0]) == (1, 1)


def test_longer_sums_may_be_off_by_their_length_s_root() -> None:
    off = LAMBDA * UNIT * 60
    assert judged([1 + off], [1.0])[0] == 1
    assert judged([1 + off], [1.0], Bound(4096, 1, UNIT))[0] == 0
    assert judged([1 + off], [1.0], Bound(1024, 1, UNIT))[0] == 1


def test_small_elements_of_a_row_may_be_off_as_the_row_is() -> None:
    row = np.ones(64)
    row[0] = 0
    ours = row.copy()
    ours[0] = 1e-7
    assert judged(ours, row) == (0, -1)
    assert judged([ours, 0 * ours], [row, 0 * row]) == (0, -1)
    assert judged([row, 1e-7 + 0 * row], [row, 0 * row]) == (64, 64)  # of a row of zeros nothing may be off


@pytest.mark.parametrize(
    ("ours", "reference", "wrong"),
    [
        ([np.nan, 1], [np.nan, 1], 0),
        ([np.nan, 1], [0, 1], 1),
        ([0, 1], [np.nan, 1], 1),
        ([np.inf, 1], [np.inf, 1], 0),
        ([np.inf, 1], [-np.inf, 1], 1),
        ([3e38, 1], [np.inf, 1], 1),
    ],
)
def test_what_is_not_finite_must_be_the_reference_s(ours: list[float], reference: list[float], wrong: int) -> None:
    assert judged(ours, reference)[0] == wrong


def test_integers_must_be_equal_but_for_those_that_are_rounded() -> None:
    ours, expected = np.array([1, 2, 3]), np.array([1, 2, 4])
    assert judge(ours, expected, scale(expected), ONE).wrong == 1
    assert judge(ours, expected, scale(expected), Bound(1, 1, UNIT, steps=1)).wrong == 0
    flags = np.array([True, False, True])
    assert judge(flags, ~flags, scale(flags), ONE).wrong == 3


def test_float64_clears_what_the_reference_is_off_itself() -> None:
    exact = np.array([1.0, 1.0])
    reference = np.array([1 + 1e-3, 1.0], np.float32)
    spread = Spread.of(exact, reference, iter(()))
    assert judged([1 - 0.9e-3 * FACTOR, 1], reference)[0] == 1
    assert judged([1 - 0.9e-3 * FACTOR, 1], reference, spread=spread)[0] == 0
    assert judged([1 - 1.1e-3 * FACTOR, 1], reference, spread=spread)[0] == 1


def test_what_inputs_last_digits_decide_is_not_wrong() -> None:
    exact = np.zeros(4)
    spread = Spread.of(exact, exact, iter([exact + 1e-4, exact - 3e-4]))
    assert judged([2.9e-4] * 4, exact, spread=spread)[0] == 0
    assert judged([3.1e-4] * 4, exact, spread=spread)[0] == 4


@pytest.mark.parametrize("shape", [(), (3,), (CHUNK + 5,), (7, CHUNK // 2), (2, 3, CHUNK), (0, 4)])
def test_pieces_at_a_time_are_all_elements_in_order(shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    parts = list(chunks(array))
    assert np.array_equal(np.concatenate([np.empty(0, int), *parts]), array.reshape(-1))
    assert all(part.size <= CHUNK for part in parts)


SPECS = [
    (("tp", Shard.plain(1, 8)),),
    (("cp", Shard.plain(0, 4)), ("tp", Shard.plain(1, 8))),
    (("cp", Shard(1, (Segment(4), Segment(4)))), ("tp", Shard.plain(1, 4))),
    (("cp", Partial()), ("tp", Shard(1, (Segment(6), Segment(2, 2))))),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_element_of_a_piece_is_found_in_the_tensor(spec: tuple[tuple[str, object], ...]) -> None:
    mesh = Mesh.of(tp=2, cp=2)
    whole = RNG.standard_normal((4, 8))
    tensor = Tensor(0, "x", 0, 0, 0, whole.shape, spec)  # type: ignore[arg-type]
    cuts = tuple((axis, p) for axis, p in spec if not isinstance(p, Partial))
    for rank in range(mesh.size):
        piece = cut_view(whole, cuts, mesh, rank, np)  # type: ignore[arg-type]
        for local in np.ndindex(piece.shape):
            assert whole[global_index(local, tensor, mesh, rank)] == piece[local]


def test_terms_are_counted_over_the_nodes_since_the_tensors_before(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("ReduceSum", ["b"], ["y"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.ones((512, 8), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    model = Model(tmp_path / "m.onnx")
    x = {"x": np.ones((4, 512), np.float32)}
    bound = Oracle(model).bound(model.segment(["y"], ()), x, UNIT, "y")
    assert (bound.terms, bound.nodes) == (512 + 1 + 4 * 8, 3)
    last = Oracle(model).bound(model.segment(["y"], ["b"]), {"b": np.ones((4, 8), np.float32)}, UNIT, "y")
    assert (last.terms, last.nodes) == (4 * 8, 1)


def test_float64_is_more_exact_than_the_reference(tmp_path: Path) -> None:
    nodes = [helper.make_node("Erf", ["x"], ["a"]), helper.make_node("LayerNormalization", ["a", "s"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 64])],
        [numpy_helper.from_array(np.ones(64, np.float32), "s")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    model = Model(tmp_path / "m.onnx")
    x = {"x": RNG.standard_normal((4, 64)).astype(np.float32)}
    segment, oracle = model.segment(["y"], ()), Oracle(model)
    runs = oracle.run_exactly(segment, x, 1e-6)
    exact, changed = next(runs)["y"], next(runs)["y"]
    assert exact.dtype == np.float64
    assert 0 < np.abs(oracle.run(segment, x)["y"] - exact).max() < 1e-5
    assert np.abs(exact.mean(axis=-1)).max() < 1e-14  # a norm's rows sum to nothing: in float32 to some 1e-7
    assert 0 < np.abs(changed - exact).max() < 1e-4
