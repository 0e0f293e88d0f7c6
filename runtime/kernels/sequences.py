"""Ops on sequences, which are lists, and on optionals, which are None or what they hold (runtime/loose.py)."""

from __future__ import annotations

from typing import Any

from onnxmesh.runtime.kernels.registry import Array, Call, loose

Sequence = list[Array]


# --- sequences ----------------------------------------------------------------------------------------------


@loose("SequenceEmpty")
def sequence_empty(call: Call) -> Sequence:
    """No tensors."""
    return []


@loose("SequenceConstruct")
def sequence_construct(call: Call, *tensors: Array) -> Sequence:
    """The tensors."""
    return list(tensors)


@loose("SequenceInsert")
def sequence_insert(call: Call, tensors: Sequence, x: Array, position: Array | None = None) -> Sequence:
    """x before the tensor at `position`, which may count from the end; without one after all."""
    at = len(tensors) if position is None else _position(position, len(tensors) + 1, len(tensors))
    return [*tensors[:at], x, *tensors[at:]]


@loose("SequenceErase")
def sequence_erase(call: Call, tensors: Sequence, position: Array | None = None) -> Sequence:
    """All but the tensor at `position`, or else the last."""
    at = len(tensors) - 1 if position is None else _position(position, len(tensors), len(tensors))
    return [*tensors[:at], *tensors[at + 1 :]]


@loose("SequenceAt")
def sequence_at(call: Call, tensors: Sequence, position: Array) -> Array:
    """The tensor at `position`, which may count from the end."""
    return tensors[_position(position, len(tensors), len(tensors))]


@loose("SequenceLength")
def sequence_length(call: Call, tensors: Sequence) -> Array:
    """How many tensors there are, int64."""
    return call.xp.array(len(tensors), call.xp.int64)


@loose("SplitToSequence")
def split_to_sequence(call: Call, x: Array, split: Array | None = None) -> Sequence:
    """x cut along `axis` into pieces of `split`, or of the sizes in it; without it one by one."""
    axis = call.attrs.get("axis", 0) % x.ndim
    length = x.shape[axis]
    if split is None or split.ndim == 0:
        step = 1 if split is None else int(split)
        sizes = [min(step, length - start) for start in range(0, length, step)]
    else:
        sizes = [int(n) for n in split]
    if sum(sizes) != length:
        raise ValueError(f"pieces of {sizes} do not add up to the {length} entries of axis {axis}")
    pieces, start = [], 0
    for n in sizes:
        pieces.append(x[(slice(None),) * axis + (slice(start, start + n),)])
        start += n
    if split is None and not call.attrs.get("keepdims", 1):
        return [call.xp.squeeze(piece, axis=axis) for piece in pieces]
    return pieces


@loose("ConcatFromSequence")
def concat_from_sequence(call: Call, tensors: Sequence) -> Array:
    """The tensors joined along `axis`, which with `new_axis` is a new one."""
    join = call.xp.stack if call.attrs.get("new_axis", 0) else call.xp.concatenate
    return join(tensors, axis=call.attrs["axis"])


def _position(position: Array, count: int, length: int) -> int:
    """A position below `count` that may count from the end, of a sequence of `length`. Raises IndexError."""
    at = int(position.reshape(-1)[0])
    if not -length <= at < count:
        raise IndexError(f"there is no position {at} in a sequence of {length}")
    return at + length if at < 0 else at


# --- optionals ----------------------------------------------------------------------------------------------


@loose("Optional")
def optional(call: Call, x: Any = None) -> Any:
    """x, or nothing."""
    return x


@loose("OptionalHasElement")
def optional_has_element(call: Call, x: Any = None) -> Array:
    """Whether there is something, bool."""
    return call.xp.array(x is not None, call.xp.bool_)


@loose("OptionalGetElement")
def optional_get_element(call: Call, x: Any) -> Any:
    """What there is. Raises ValueError where there is nothing."""
    if x is None:
        raise ValueError("the optional value holds nothing")
    return x
