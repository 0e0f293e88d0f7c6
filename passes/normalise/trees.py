"""ONNX's ensembles of trees in the normal form: their nodes as arrays, all comparisons said in one way.

TreeEnsemble lists inner nodes and leaves apart; TreeEnsembleRegressor and TreeEnsembleClassifier, which came before it,
list all nodes by tree and number, and the weights of leaves, of which one may have several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.infer import DOMAIN, dtype_of, set_type, shape_of

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER")
MEMBER = 6
ACCEPTS = ((1, 1, 0), (1, 0, 0), (0, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 1), (0, 0, 0))
"""What each mode says to values below, at and above the threshold."""
AGGREGATES = ("mean", "sum", "min", "max")
NAMES = {"AVERAGE": "mean", "SUM": "sum", "MIN": "min", "MAX": "max"}
NOTHING = {"min": np.inf, "max": -np.inf}
"""What a leaf holds for targets that it says nothing of; 0 in a sum or mean."""


@dataclass(frozen=True)
class Forest:
    """Trees as arrays: of each inner node what it looks at, what it says yes to (`modes`) and where yes and no lead.

    A place is an inner node, or leaf i as -1 - i; `leaves` [l, targets] hold what a leaf gives, joined by `aggregate`.
    """

    roots: np.ndarray
    features: np.ndarray
    splits: np.ndarray
    modes: np.ndarray
    missing: np.ndarray
    yes: np.ndarray
    no: np.ndarray
    leaves: np.ndarray
    aggregate: str
    members: np.ndarray | None = None

    def scores(self, b: Builder, x: ir.Value) -> ir.Value:
        """What the trees give for samples x [n, f]: [n, targets], of the element type of x."""
        number = dtype_of(x).numpy()
        arrays = [
            self.roots,
            self.features,
            self.splits.astype(number),
            np.array(ACCEPTS, bool)[self.modes],
            self.missing.astype(bool),
            self.yes,
            self.no,
            self.leaves.astype(number),
            *([] if self.members is None else [self.members.astype(number)]),
        ]
        attributes = {"depth": self._depth(), "aggregate": self.aggregate}
        made = b.node(DOMAIN, "TreeEnsemble", [x, *map(b.constant, arrays)], attributes)
        set_type(made.outputs[0], dtype_of(x), (shape_of(x)[0], self.leaves.shape[1]))
        return made.outputs[0]

    def _depth(self) -> int:
        """The inner nodes on the longest path."""
        level, depth = self.roots[self.roots >= 0], 0
        while level.size and depth <= self.yes.size:
            depth += 1
            level = np.unique(np.concatenate([self.yes[level], self.no[level]]))
            level = level[level >= 0]
        return depth


# --- TreeEnsemble -------------------------------------------------------------------------------------------


def read(node: ir.Node) -> Forest:
    """The trees of a TreeEnsemble."""
    aggregate = AGGREGATES[node.attributes.get_int("aggregate_function", 1)]
    modes, weights = _tensor(node, "nodes_modes"), _tensor(node, "leaf_weights")
    leaves = np.full((weights.size, node.attributes.get_int("n_targets", 1)), NOTHING.get(aggregate, 0), weights.dtype)
    leaves[np.arange(weights.size), _ints(node, "leaf_targetids")] = weights
    return Forest(
        roots=_ints(node, "tree_roots"),
        features=_ints(node, "nodes_featureids"),
        splits=_tensor(node, "nodes_splits"),
        modes=modes,
        missing=_ints(node, "nodes_missing_value_tracks_true", modes.size),
        yes=_places(node, "true"),
        no=_places(node, "false"),
        leaves=leaves,
        aggregate=aggregate,
        members=_members(node, modes),
    )


def _tensor(node: ir.Node, name: str) -> np.ndarray:
    return node.attributes[name].as_tensor().numpy()


def _ints(node: ir.Node, name: str, zeros: int = 0) -> np.ndarray:
    """A list of integers; so many zeros where it is absent."""
    return np.array(node.attributes.get_ints(name, ()) or [0] * zeros, np.int64)


def _places(node: ir.Node, branch: str) -> np.ndarray:
    """Where a branch of each inner node leads."""
    ids = _ints(node, f"nodes_{branch}nodeids")
    return np.where(_ints(node, f"nodes_{branch}leafs"), -1 - ids, ids)


def _members(node: ir.Node, modes: np.ndarray) -> np.ndarray | None:
    """The members of every node [m, k], NaN where there are none; the attribute has a NaN after each set."""
    if "membership_values" not in node.attributes:
        return None
    sets: list[list[float]] = [[]]
    for value in _tensor(node, "membership_values").tolist():
        if np.isnan(value):
            sets.append([])
        else:
            sets[-1].append(value)
    table = np.full((modes.size, max(map(len, sets)) or 1), np.nan)
    for row, values in zip(np.flatnonzero(modes == MEMBER), sets):
        table[row, : len(values)] = values
    return table


# --- TreeEnsembleRegressor, TreeEnsembleClassifier ----------------------------------------------------------


def read_numbered(node: ir.Node, kind: str, targets: int) -> Forest:
    """The trees of an ensemble that lists its nodes by tree and number; `kind` is what its weights are for."""
    keys = list(zip(_ints(node, "nodes_treeids").tolist(), _ints(node, "nodes_nodeids").tolist()))
    modes = list(node.attributes.get_strings("nodes_modes"))
    inner = [i for i, mode in enumerate(modes) if mode != "LEAF"]
    places = {keys[i]: place for place, i in enumerate(inner)}
    places |= {keys[i]: -1 - leaf for leaf, i in enumerate(i for i, mode in enumerate(modes) if mode == "LEAF")}
    roots = {tree: places[tree, number] for tree, number in reversed(keys)}
    aggregate = NAMES[node.attributes.get_string("aggregate_function", "SUM")]
    leaves = np.full((len(keys) - len(inner), targets), NOTHING.get(aggregate, 0), np.float64)
    rows = zip(*(_ints(node, f"{kind}_{name}").tolist() for name in ("treeids", "nodeids", "ids")))
    for (tree, number, target), weight in zip(rows, _floats(node, f"{kind}_weights")):
        at = -1 - places[tree, number], target
        leaves[at] = weight if not np.isfinite(leaves[at]) else leaves[at] + weight

    def leads(branch: str) -> np.ndarray:
        numbers = _ints(node, f"nodes_{branch}nodeids")
        return np.array([places[keys[i][0], int(numbers[i])] for i in inner], np.int64)

    return Forest(
        roots=np.array([roots[tree] for tree in sorted(roots)], np.int64),
        features=_ints(node, "nodes_featureids")[inner],
        splits=_floats(node, "nodes_values")[inner],
        modes=np.array([MODES.index(modes[i]) for i in inner], np.int64),
        missing=_ints(node, "nodes_missing_value_tracks_true", len(keys))[inner],
        yes=leads("true"),
        no=leads("false"),
        leaves=leaves,
        aggregate=aggregate,
    )


def base_values(node: ir.Node) -> np.ndarray:
    """What is added to the scores of every sample; empty for nothing."""
    return _floats(node, "base_values")


def _floats(node: ir.Node, name: str) -> np.ndarray:
    """Numbers that stand in a list, or in a tensor where they are doubles."""
    if f"{name}_as_tensor" in node.attributes:
        return _tensor(node, f"{name}_as_tensor").reshape(-1)
    numbers: Sequence[float] = node.attributes.get_floats(name, ())
    return np.array(numbers, np.float32)
