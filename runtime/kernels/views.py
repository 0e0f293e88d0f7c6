"""Ops that move data and compute nothing. Most return a view of their input."""

from __future__ import annotations

from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.registry import Array, Call, kernel
from onnxmesh.runtime.placement import Shard, cut
from onnxmesh.runtime.segments import segments_of


@kernel("Identity")
def identity(call: Call, x: Array) -> Array:
    """x."""
    return x


@kernel("Reshape")
def reshape(call: Call, x: Array) -> Array:
    """x in the shape of the output."""
    return x.reshape(call.outs[0].shape)


@kernel("Expand")
def expand(call: Call, x: Array) -> Array:
    """x broadcast to the shape of the output."""
    return call.xp.broadcast_to(x, call.outs[0].shape)


@kernel("Transpose")
def transpose(call: Call, x: Array) -> Array:
    """x with its dims in the order `perm` (reversed where it is absent)."""
    return x.transpose(call.attrs.get("perm"))


@kernel("Slice")
def slice_(call: Call, x: Array) -> Array:
    """`x[start : : step]` along every axis of `axes`, with as many entries as the output has."""
    index = [slice(None)] * x.ndim
    for axis, start, step in zip(call.attrs["axes"], call.attrs["starts"], call.attrs["steps"]):
        stop = start + step * call.outs[0].shape[axis]
        index[axis] = slice(start, stop if stop >= 0 else None, step)
    return x[tuple(index)]


@kernel("Split")
def split(call: Call, x: Array) -> tuple[Array, ...]:
    """x cut along `axis` into pieces of the outputs' sizes."""
    axis, start, pieces = call.attrs.get("axis", 0) % x.ndim, 0, []
    for out in call.outs:
        stop = start + out.shape[axis]
        pieces.append(x[(slice(None),) * axis + (slice(start, stop),)])
        start = stop
    return tuple(pieces)


@kernel("Concat")
def concat(call: Call, *inputs: Array) -> Array:
    """The inputs joined along `axis`."""
    return call.xp.concatenate(inputs, axis=call.attrs["axis"])


@kernel("Pad")
def pad(call: Call, x: Array, value: Array | None = None) -> Array:
    """x padded by `pads` (all begins, then all ends; negative ones crop); mode as ONNX, `value` default 0."""
    pads, mode = call.attrs["pads"], call.attrs.get("mode", "constant")
    width = [(pads[i], pads[i + x.ndim]) for i in range(x.ndim)]
    x = x[tuple(slice(max(0, -a), n - max(0, -b)) for (a, b), n in zip(width, x.shape))]
    width = [(max(0, a), max(0, b)) for a, b in width]
    if mode != "constant":
        return call.xp.pad(x, width, mode=mode)
    result = call.xp.empty(call.outs[0].shape, x.dtype)
    result[...] = call.xp.zeros((), x.dtype) if value is None else value.reshape(())
    result[tuple(slice(a, a + n) for (a, _), n in zip(width, x.shape))] = x
    return result


@kernel("Tile")
def tile(call: Call, x: Array) -> Array:
    """x repeated `repeats[i]` times along dim i."""
    return call.xp.tile(x, tuple(call.attrs["repeats"]))


@kernel("Trilu")
def trilu(call: Call, x: Array) -> Array:
    """The upper (or lower) triangle of the last two dims, from diagonal `k`; the rest is 0."""
    xp = call.xp
    rows, columns = xp.arange(x.shape[-2])[:, None], xp.arange(x.shape[-1])[None, :]
    k = call.attrs.get("k", 0)
    keep = columns - rows >= k if call.attrs.get("upper", 1) else columns - rows <= k
    return xp.where(keep, x, xp.zeros((), x.dtype))


@kernel("DepthToSpace")
def depth_to_space(call: Call, x: Array) -> Array:
    """Blocks of channels to blocks of pixels: [n, c, h, w] -> [n, c/k^2, h*k, w*k]."""
    n, c, h, w = x.shape
    k = call.attrs["blocksize"]
    if call.attrs.get("mode", "DCR") == "DCR":
        return x.reshape(n, k, k, c // k**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(call.outs[0].shape)
    return x.reshape(n, c // k**2, k, k, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(call.outs[0].shape)


@kernel("SpaceToDepth")
def space_to_depth(call: Call, x: Array) -> Array:
    """Blocks of pixels to blocks of channels: [n, c, h, w] -> [n, c*k^2, h/k, w/k]."""
    n, c, h, w = x.shape
    k = call.attrs["blocksize"]
    order = (0, 3, 5, 1, 2, 4) if call.attrs.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // k, k, w // k, k).transpose(order).reshape(call.outs[0].shape)


@kernel("Shard")
def shard(call: Call, x: Array) -> Array:
    """R -> S along the mesh axis `axis`: this rank's parts of the `segments` of `dim`; nothing is sent."""
    dim, segments = call.attrs["dim"], segments_of(call.attrs["segments"])
    held, local = sum(s.size * s.copies for s in segments), call.outs[0].shape[dim]
    if local == 0 or held % local:
        raise PlanError(f"Shard: segments {segments} do not give {local} entries on a rank", code="OM4005")
    return cut(x, Shard(dim, segments), held // local, call.coordinate[call.attrs["axis"]], call.xp)
