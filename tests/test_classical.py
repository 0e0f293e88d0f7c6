"""Ops of ai.onnx.ml on numbers against ONNX's reference, whole and with the samples shared out."""

from __future__ import annotations

from typing import Any

import numpy as np
import one_node
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

import onnxmesh

ML = "ai.onnx.ml"
RNG = np.random.default_rng(6)
LEQ, LT, GTE, GT, EQ, NEQ, MEMBER = range(7)
AVERAGE, SUM, MIN, MAX = range(4)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def check(op: str, inputs: list[np.ndarray], version: int = 1, **attrs: Any) -> None:
    one_node.check(op, inputs, domain=ML, version=version, **attrs)


def test_columns_are_extracted() -> None:
    check("ArrayFeatureExtractor", [f(4, 5), np.array([3, 0, 3])])
    check("ArrayFeatureExtractor", [f(2, 3, 5), np.array([[1, 4]])])


def test_a_binarizer_asks_for_more_than_its_threshold() -> None:
    check("Binarizer", [f(4, 5)], threshold=0.2)


@pytest.mark.parametrize("width", [1, 5])
def test_a_scaler_shifts_and_scales(width: int) -> None:
    check("Scaler", [f(4, 5)], offset=f(width).tolist(), scale=f(width).tolist())


@pytest.mark.parametrize("norm", ["MAX", "L1", "L2"])
def test_a_normalizer_divides_each_row(norm: str) -> None:
    check("Normalizer", [np.abs(f(4, 5))], norm=norm)


@pytest.mark.parametrize("missing", [np.nan, -1.0])
def test_an_imputer_puts_in_what_is_missing(missing: float) -> None:
    x = np.where(RNG.random((4, 5)) < 0.4, missing, f(4, 5)).astype(np.float32)
    check("Imputer", [x], imputed_value_floats=f(5).tolist(), replaced_value_float=missing)


@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
def test_a_linear_regressor(transform: str) -> None:
    attrs = {"coefficients": f(15).tolist(), "intercepts": f(3).tolist(), "targets": 3}
    if transform == "NONE":
        check("LinearRegressor", [f(4, 5)], **attrs)
    else:
        x = f(4, 5)
        scores = x @ np.array(attrs["coefficients"], np.float32).reshape(3, 5).T + attrs["intercepts"]
        powers = np.exp(scores)
        want = powers / (1 + powers) if transform == "LOGISTIC" else powers / powers.sum(axis=1, keepdims=True)
        proto = one_node.model("LinearRegressor", [x], domain=ML, post_transform=transform, **attrs)
        np.testing.assert_allclose(one_node.run(onnxmesh.compile(proto), [x])[0], want, 1e-5)


def test_labels_are_encoded() -> None:
    attrs: dict[str, Any] = {"keys_int64s": [3, 5, 7], "values_int64s": [30, 50, 70], "default_int64": -5}
    check("LabelEncoder", [np.array([[3, 4], [7, 5]])], 4, **attrs)


def test_a_label_that_is_no_number_is_a_key_like_any_other() -> None:
    """As ONNX says it; its reference evaluator never finds one."""
    keys, values = np.array([1.5, np.nan, 1.0], np.float32), np.array([1, 2, 3], np.float32)
    given = {"keys_tensor": numpy_helper.from_array(keys, "k"), "values_tensor": numpy_helper.from_array(values, "v")}
    default = numpy_helper.from_array(np.array([-9], np.float32), "d")
    x = np.array([1.0, 1.5, np.nan, 4], np.float32)
    proto = one_node.model("LabelEncoder", [x], domain=ML, version=4, default_tensor=default, **given)
    np.testing.assert_array_equal(one_node.run(onnxmesh.compile(proto), [x])[0], [3, 1, 2, -9])


def forest(modes: list[int], **others: Any) -> dict[str, Any]:
    """Two trees of two inner nodes each: 0 leads to 1, 2 to 3, everything else to the leaves 0 to 5."""
    tensors = {"nodes_splits": f(4), "leaf_weights": f(6), "nodes_modes": np.array(modes, np.uint8)}
    return {
        "tree_roots": [0, 2],
        "nodes_featureids": [0, 1, 2, 0],
        "nodes_truenodeids": [1, 1, 3, 4],
        "nodes_trueleafs": [0, 1, 0, 1],
        "nodes_falsenodeids": [0, 2, 3, 5],
        "nodes_falseleafs": [1, 1, 1, 1],
        "leaf_targetids": [0, 1, 0, 1, 0, 1],
        "n_targets": 2,
        **{name: numpy_helper.from_array(x, name) for name, x in tensors.items()},
        **others,
    }


@pytest.mark.parametrize("modes", [[LEQ, LT, GTE, GT], [EQ, NEQ, LEQ, GT]], ids=str)
def test_trees_compare_in_every_way(modes: list[int]) -> None:
    x = f(12, 3)
    attrs = forest(modes)
    x[:4, :] = numpy_helper.to_array(attrs["nodes_splits"])[:, None]
    check("TreeEnsemble", [x], 5, **attrs)


@pytest.mark.parametrize("aggregate", [AVERAGE, SUM, MIN, MAX])
def test_trees_are_joined_in_every_way(aggregate: int) -> None:
    attrs = forest([LEQ] * 4, aggregate_function=aggregate, leaf_targetids=[0] * 6, n_targets=1)
    check("TreeEnsemble", [f(12, 3)], 5, **attrs)


def test_trees_ask_for_members() -> None:
    members = numpy_helper.from_array(np.array([1, 2, np.nan, 3, np.nan], np.float32), "members")
    attrs = forest([MEMBER, LEQ, LT, MEMBER], membership_values=members)
    check("TreeEnsemble", [RNG.integers(0, 4, (12, 3)).astype(np.float32)], 5, **attrs)


def numbered(kind: str, **others: Any) -> dict[str, Any]:
    """Two trees, of two inner nodes and of one; one leaf gives to two targets."""
    return {
        "nodes_treeids": [0, 0, 0, 0, 0, 1, 1, 1],
        "nodes_nodeids": [0, 1, 2, 3, 4, 0, 1, 2],
        "nodes_featureids": [0, 2, 0, 0, 0, 1, 0, 0],
        "nodes_values": [0.1, -0.2, 0, 0, 0, 0.3, 0, 0],
        "nodes_modes": ["BRANCH_LEQ", "BRANCH_LT", "LEAF", "LEAF", "LEAF", "BRANCH_GT", "LEAF", "LEAF"],
        "nodes_truenodeids": [1, 3, 0, 0, 0, 1, 0, 0],
        "nodes_falsenodeids": [2, 4, 0, 0, 0, 2, 0, 0],
        "nodes_missing_value_tracks_true": [1, 0, 0, 0, 0, 0, 0, 0],
        f"{kind}_treeids": [0, 0, 0, 0, 1, 1],
        f"{kind}_nodeids": [2, 3, 4, 4, 1, 2],
        f"{kind}_ids": [0, 1, 0, 2, 2, 1],
        f"{kind}_weights": [0.7, 0.4, 0.2, 0.9, 0.3, 0.6],
        **others,
    }


def against_onnxruntime(op: str, outputs: int, **attrs: Any) -> None:
    x = f(12, 3)
    x[0, 0] = np.nan
    proto = one_node.model(op, [x], outputs, domain=ML, version=3, opset=18, **attrs)
    if outputs == 2:
        proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    want = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x0": x})
    for mesh in ({}, {"dp": 2}):
        for a, b in zip(one_node.run(onnxmesh.compile(proto, **mesh), [x]), want, strict=True):
            np.testing.assert_allclose(a, b, 1e-5, 1e-6)


@pytest.mark.parametrize("aggregate", ["SUM", "AVERAGE", "MIN", "MAX"])
def test_a_regressor_by_numbered_trees(aggregate: str) -> None:
    attrs = numbered("target", n_targets=3, aggregate_function=aggregate)
    against_onnxruntime("TreeEnsembleRegressor", 1, **attrs)
    one = {name: x[:3] + x[4:] if name.startswith("target_") else x for name, x in attrs.items()}
    one |= {"n_targets": 1, "target_ids": [0] * 5, "base_values": [0.5]}
    against_onnxruntime("TreeEnsembleRegressor", 1, **one)


@pytest.mark.parametrize("transform", ["NONE", "SOFTMAX", "LOGISTIC"])
def test_a_classifier_by_numbered_trees(transform: str) -> None:
    attrs = numbered("class", classlabels_int64s=[4, 7, 9], post_transform=transform)
    against_onnxruntime("TreeEnsembleClassifier", 2, **attrs)
