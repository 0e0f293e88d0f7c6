"""Caches of keys and values that keep their size."""

from __future__ import annotations

from onnxmesh.runtime.kernels.registry import Array, Call, kernel


@kernel("TensorScatter")
def tensor_scatter(call: Call, past: Array, update: Array, first: Array | None = None) -> Array:
    """`past` with `update` written over it along `axis`, in each batch entry from `first` [b] (0 where absent) on.

    past [b, ..., t, ...], update [b, ..., s, ...] -> as past. With `mode` circular, the first place follows the last.
    """
    xp, axis = call.xp, call.attrs.get("axis", -2) % past.ndim
    batch, steps = update.shape[0], update.shape[axis]
    starts = xp.zeros(batch, xp.int64) if first is None else first
    places = starts[:, None] + xp.arange(steps)
    if call.attrs.get("mode", "linear") == "circular":
        places = places % past.shape[axis]
    result = past.copy()
    xp.moveaxis(result, axis, 1)[xp.arange(batch)[:, None], places] = xp.moveaxis(update, axis, 1)
    return result
