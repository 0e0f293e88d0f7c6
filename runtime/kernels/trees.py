"""Ensembles of decision trees, all samples and trees walked down together."""

from __future__ import annotations

from onnxmesh.runtime.kernels.numeric import rounded
from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("TreeEnsemble")
def tree_ensemble(
    call: Call,
    x: Array,
    roots: Array,
    features: Array,
    splits: Array,
    accepts: Array,
    missing: Array,
    yes: Array,
    no: Array,
    leaves: Array,
    members: Array | None = None,
) -> Array:
    """What the leaves give that a sample comes to, one a tree, joined by `aggregate` (sum, mean, min, max).

    x [n, f], roots [t] -> [n, targets]. Of each inner node: the feature that it looks at, its threshold, whether it
    says yes to a value below, at and above that [m, 3] and to NaN, where yes and no lead, and with `members` [m, k]
    the values that it says yes to besides (NaN: none). A place is an inner node, or leaf i as -1 - i. leaves
    [l, targets] hold what a leaf gives; where that is not finite it gives nothing. No path is longer than `depth`.
    """
    xp = call.xp
    at = xp.broadcast_to(roots, (x.shape[0], roots.shape[0]))
    for _ in range(call.attrs["depth"]):
        node = xp.maximum(at, 0)
        value = xp.take_along_axis(x, features[node], axis=1)
        relation = (value >= splits[node]).astype(xp.int64) + (value > splits[node])
        says = accepts[node, relation]
        if members is not None:
            says = says | (value[..., None] == members[node]).any(axis=-1)
        says = xp.where(xp.isnan(value), missing[node], says)
        at = xp.where(at < 0, at, xp.where(says, yes[node], no[node]))
    given = getattr(xp, call.attrs["aggregate"])(leaves[-1 - xp.minimum(at, -1)], axis=1)
    return rounded(call, xp.where(xp.isfinite(given), given, 0))
