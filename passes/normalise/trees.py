"""ONNX's TreeEnsemble in the normal form: its nodes as arrays, all comparisons said in one way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import DOMAIN, dtype_of, present, set_type, shape_of

ACCEPTS = ((1, 1, 0), (1, 0, 0), (0, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 1), (0, 0, 0))
"""What LEQ, LT, GTE, GT, EQ, NEQ and MEMBER say to values below, at and above the threshold."""
MEMBER = 6
AGGREGATES = ("mean", "sum", "min", "max")
NOTHING = {"min": np.inf, "max": -np.inf}
"""What a leaf holds for targets that it says nothing of; 0 in a sum or mean."""


def tree_ensemble(node: ir.Node, b: Builder) -> ir.Value:
    """The scores of a TreeEnsemble, before its post-transform."""
    x = present(node, 0)
    number = dtype_of(x).numpy()
    aggregate = AGGREGATES[node.attributes.get_int("aggregate_function", 1)]
    targets = node.attributes.get_int("n_targets", 1)
    modes = _tensor(node, "nodes_modes")
    splits, yes, no = _tensor(node, "nodes_splits"), _places(node, "true"), _places(node, "false")
    missing = node.attributes.get_ints("nodes_missing_value_tracks_true", ()) or [0] * modes.size
    roots = np.array(node.attributes.get_ints("tree_roots"), np.int64)
    weights = _tensor(node, "leaf_weights")
    leaves = np.full((weights.size, targets), NOTHING.get(aggregate, 0), weights.dtype)
    leaves[np.arange(weights.size), node.attributes.get_ints("leaf_targetids")] = weights
    arrays = [
        roots,
        np.array(node.attributes.get_ints("nodes_featureids"), np.int64),
        splits.astype(number),
        np.array(ACCEPTS, bool)[modes],
        np.array(missing, bool),
        yes,
        no,
        leaves.astype(number),
        *_members(node, modes, number),
    ]
    attributes = {"depth": _depth(roots, yes, no), "aggregate": aggregate}
    made = b.node(DOMAIN, "TreeEnsemble", [x, *map(b.constant, arrays)], attributes)
    set_type(made.outputs[0], dtype_of(x), (shape_of(x)[0], targets))
    return made.outputs[0]


def _tensor(node: ir.Node, name: str) -> np.ndarray:
    return node.attributes[name].as_tensor().numpy()


def _places(node: ir.Node, branch: str) -> np.ndarray:
    """Where a branch of each node leads: an inner node, or leaf i as -1 - i."""
    ids = np.array(node.attributes.get_ints(f"nodes_{branch}nodeids"), np.int64)
    return np.where(node.attributes.get_ints(f"nodes_{branch}leafs"), -1 - ids, ids)


def _members(node: ir.Node, modes: np.ndarray, number: np.dtype) -> list[np.ndarray]:
    """The members of every node [m, k], NaN where there are none; the attribute has a NaN after each set."""
    if "membership_values" not in node.attributes:
        return []
    sets: list[list[float]] = [[]]
    for value in _tensor(node, "membership_values").tolist():
        if np.isnan(value):
            sets.append([])
        else:
            sets[-1].append(value)
    table = np.full((modes.size, max(map(len, sets)) or 1), np.nan, number)
    for row, values in zip(np.flatnonzero(modes == MEMBER), sets):
        table[row, : len(values)] = values
    return [table]


def _depth(roots: np.ndarray, yes: np.ndarray, no: np.ndarray) -> int:
    """The inner nodes on the longest path."""
    level: Sequence[int] = roots.tolist()
    depth = 0
    while level and depth <= yes.size:
        depth += 1
        level = sorted({int(place) for at in level for place in (yes[at], no[at]) if place >= 0})
    return depth
