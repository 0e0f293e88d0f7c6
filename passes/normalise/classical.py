"""Ops of `ai.onnx.ml` on numbers, as ONNX ops. Those on strings, and the rarer ones, have no normal form."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder, Expansion
from onnxmesh.passes.graph.infer import dtype_of, present, shape_of
from onnxmesh.passes.normalise import trees

DOMAIN = "ai.onnx.ml"
FLOAT = ir.DataType.FLOAT
POST_TRANSFORMS = {0: None, "NONE": None, 1: "Softmax", "SOFTMAX": "Softmax", 2: "Sigmoid", "LOGISTIC": "Sigmoid"}


def is_numeric(node: ir.Node) -> bool:
    """Whether a node has a normal form: it holds no strings, and its post-transform is an op.

    A classifier by trees with weights for one class alone scores two classes by rules of its own: it has none.
    """
    strings = (ir.AttributeType.STRINGS, ir.AttributeType.STRING)
    tables = ("keys", "values", "classlabels")
    named = [a for a in node.attributes.values() if a.type in strings and a.name.split("_")[0] in tables]
    if node.op_type == "TreeEnsembleClassifier" and len(set(node.attributes.get_ints("class_ids", ()))) < 2:
        return False
    tensors = [a.value for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR]
    typed = [v.dtype for v in node.inputs if v is not None] + [t.dtype for t in tensors if t is not None]
    transform = node.attributes.get("post_transform")
    known = transform is None or transform.value in POST_TRANSFORMS
    return known and not named and ir.DataType.STRING not in typed


def array_feature_extractor(node: ir.Node, b: Builder) -> None:
    """Columns by their numbers."""
    x, picked = present(node, 0), present(node, 1)
    *rows, _ = shape_of(x)
    count = math.prod(shape_of(picked))
    y = b.op("Gather", x, b.reshape(picked, count), axis=len(rows))
    b.replace(b.reshape(y, *(rows or (1,)), count))


def binarizer(node: ir.Node, b: Builder) -> None:
    """1 above the threshold, else 0."""
    x, threshold = present(node, 0), node.attributes.get_float("threshold", 0.0)
    dtype = dtype_of(x)
    bound = b.constant(math.floor(threshold) if dtype.is_integer() else threshold, dtype)
    b.replace(b.op("Cast", b.op("Greater", x, bound), to=int(dtype)))


def scaler(node: ir.Node, b: Builder) -> None:
    """`(x - offset) * scale`, in float32."""
    x = b.cast(present(node, 0), FLOAT)
    for op, name in (("Sub", "offset"), ("Mul", "scale")):
        numbers = node.attributes.get_floats(name, ())
        x = b.op(op, x, b.constant(numbers, FLOAT)) if numbers else x
    b.replace(x)


def normalizer(node: ir.Node, b: Builder) -> None:
    """Each row over its maximum, its sum of magnitudes or its length; rows for which that is 0 stay."""
    x, norm = b.cast(present(node, 0), FLOAT), node.attributes.get_string("norm", "MAX")
    axis = len(shape_of(x)) - 1
    if norm != "MAX":
        b.replace(b.op("LpNormalization", x, axis=axis, p=int(norm[1])))
        return
    highest = b.own("ReduceMax", [x], (*shape_of(x)[:-1], 1), {"axes": [axis], "keepdims": 1})
    zero, one = b.constant(0.0, FLOAT), b.constant(1.0, FLOAT)
    b.replace(b.op("Div", x, b.op("Where", b.op("Equal", highest, zero), one, highest)))


def imputer(node: ir.Node, b: Builder) -> None:
    """Another number in the place of one."""
    x = present(node, 0)
    dtype = dtype_of(x)
    if dtype.is_integer():
        new: object = node.attributes.get_ints("imputed_value_int64s")
        old: float = node.attributes.get_int("replaced_value_int64", 0)
    else:
        new = node.attributes.get_floats("imputed_value_floats")
        old = node.attributes.get_float("replaced_value_float", 0.0)
    found = b.op("IsNaN", x) if math.isnan(old) else b.op("Equal", x, b.constant(old, dtype))
    b.replace(b.op("Where", found, b.constant(new, dtype), x))


def linear_regressor(node: ir.Node, b: Builder) -> None:
    """`x w + b`, in float32, and its post-transform."""
    x, targets = b.cast(present(node, 0), FLOAT), node.attributes.get_int("targets", 1)
    weights = np.array(node.attributes.get_floats("coefficients"), np.float32).reshape(targets, -1).T
    y = b.op("MatMul", x, b.constant(np.ascontiguousarray(weights)))
    intercepts = node.attributes.get_floats("intercepts", ())
    y = b.op("Add", y, b.constant(intercepts, FLOAT)) if intercepts else y
    b.replace(_transformed(node, b, y))


def label_encoder(node: ir.Node, b: Builder) -> None:
    """The value of the last key that an element equals, or the default; NaN equals NaN."""
    x, keys, values = present(node, 0), _table(node, "keys"), _table(node, "values")
    shape = shape_of(x)
    element = b.reshape(x, *shape, 1)
    matches = b.op("Equal", element, b.constant(keys))
    if keys.dtype.kind == "f" and np.isnan(keys).any():
        both = b.op("And", b.op("IsNaN", element), b.constant(np.isnan(keys)))
        matches = b.op("Or", matches, both)
    numbers = b.op("Where", matches, b.constant(np.arange(1, keys.size + 1)), b.constant(np.int64(0)))
    at = b.own("ReduceMax", [numbers], shape, {"axes": [len(shape)], "keepdims": 0})
    b.replace(b.op("Gather", b.constant(np.concatenate([_default(node, values), values])), at, axis=0))


def tree_ensemble(node: ir.Node, b: Builder) -> None:
    """The trees, and their post-transform."""
    b.replace(_transformed(node, b, trees.read(node).scores(b, present(node, 0))))


def tree_regressor(node: ir.Node, b: Builder) -> None:
    """As above, with a list of all nodes, in float32."""
    forest = trees.read_numbered(node, "target", node.attributes.get_int("n_targets", 1))
    b.replace(_transformed(node, b, _tree_scores(node, b, forest)))


def tree_classifier(node: ir.Node, b: Builder) -> None:
    """As above; the first output is the class of the highest score."""
    labels = np.array(node.attributes.get_ints("classlabels_int64s"), np.int64)
    scores = _tree_scores(node, b, trees.read_numbered(node, "class", labels.size))
    best = b.op("Gather", b.constant(labels), b.op("ArgMax", scores, axis=1, keepdims=0), axis=0)
    b.replace(*[best, _transformed(node, b, scores)][: len(node.outputs)])


def _tree_scores(node: ir.Node, b: Builder, forest: trees.Forest) -> ir.Value:
    x = present(node, 0)
    x = x if dtype_of(x).is_floating_point() else b.cast(x, FLOAT)
    scores, base = b.cast(forest.scores(b, x), FLOAT), trees.base_values(node)
    return b.op("Add", scores, b.constant(base, FLOAT)) if base.size else scores


def _transformed(node: ir.Node, b: Builder, y: ir.Value) -> ir.Value:
    transform = node.attributes.get("post_transform")
    op = POST_TRANSFORMS[transform.value] if transform is not None else None
    if op is None:
        return y
    return b.op("Softmax", y, axis=1) if op == "Softmax" else b.op(op, y)


def _table(node: ir.Node, name: str) -> np.ndarray:
    """The keys or values of a LabelEncoder."""
    if f"{name}_tensor" in node.attributes:
        return node.attributes[f"{name}_tensor"].as_tensor().numpy().reshape(-1)
    if f"{name}_int64s" in node.attributes:
        return np.array(node.attributes.get_ints(f"{name}_int64s"), np.int64)
    return np.array(node.attributes.get_floats(f"{name}_floats"), np.float32)


def _default(node: ir.Node, values: np.ndarray) -> np.ndarray:
    """The default of a LabelEncoder [1]."""
    if "default_tensor" in node.attributes:
        return node.attributes["default_tensor"].as_tensor().numpy().reshape(-1).astype(values.dtype)
    if values.dtype.kind == "f":
        return np.array([node.attributes.get_float("default_float", -0.0)], values.dtype)
    return np.array([node.attributes.get_int("default_int64", -1)], values.dtype)


EXPANSIONS: dict[tuple[str, str], Expansion] = {
    (DOMAIN, op): expansion
    for op, expansion in {
        "ArrayFeatureExtractor": array_feature_extractor,
        "Binarizer": binarizer,
        "Scaler": scaler,
        "Normalizer": normalizer,
        "Imputer": imputer,
        "LinearRegressor": linear_regressor,
        "LabelEncoder": label_encoder,
        "TreeEnsemble": tree_ensemble,
        "TreeEnsembleClassifier": tree_classifier,
        "TreeEnsembleRegressor": tree_regressor,
    }.items()
}
