"""Layouts: what a chain of Reshape, Transpose and Expand does to the elements of a tensor.

Each dim is a product of *atoms*, factors of the dims of the source. Transpose permutes dims, Reshape regroups the
atoms (and splits one where it must), Expand and the ops that repeat add atoms that no source has. Two chains with
equal atoms are equal, so a chain can be walked through, cut, and written again in its shortest form.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxmesh.passes.graph.match import (
    DOMAIN,
    Editor,
    array,
    given,
    integer,
    ints,
    is_float,
    only_user,
    scaled,
    shape_of,
)

CHAIN_LIMIT = 16


@dataclass(eq=False, slots=True)
class Atom:
    """A factor of dim `origin` of the source; a repetition has origin -1."""

    size: int
    origin: int
    parts: tuple[Atom, Atom] | None = None

    def leaves(self) -> Iterator[Atom]:
        """The atom, or what it was split into."""
        if self.parts is None:
            yield self
        else:
            for part in self.parts:
                yield from part.leaves()

    def split(self, major: int) -> tuple[Atom, Atom]:
        """Cut into a major factor of the given size and the rest."""
        self.parts = Atom(major, self.origin), Atom(self.size // major, self.origin)
        return self.parts


Dims = list[list[Atom]]


@dataclass(frozen=True, slots=True)
class Step:
    """One op of a chain: `reshape` and `expand` to `data`, `transpose` by it, `repeat` and `tile` hold
    (axis, times), `scale` multiplies by `factor`, `cast` changes the element type only."""

    kind: str
    data: tuple[int, ...] = ()
    factor: float = 1.0


class Layout:
    """The atoms of each dim of a tensor while steps are applied to it."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._source = [[Atom(n, i)] if n != 1 else [] for i, n in enumerate(shape)]
        self._dims = [list(atoms) for atoms in self._source]

    @property
    def source(self) -> Dims:
        """The atoms of each dim of the source."""
        return [_leaves(dim) for dim in self._source]

    @property
    def dims(self) -> Dims:
        """The atoms of each dim as it is now."""
        return [_leaves(dim) for dim in self._dims]

    def apply(self, step: Step) -> bool:
        """Apply a step; False where it cannot be told in atoms."""
        match step.kind:
            case "reshape":
                return self._reshape(step.data)
            case "transpose":
                self._dims = [self._dims[axis] for axis in step.data]
            case "expand":
                return self._expand(step.data)
            case "repeat":
                self._dims[step.data[0]].append(Atom(step.data[1], -1))
            case "tile":
                self._dims[step.data[0]].insert(0, Atom(step.data[1], -1))
        return True

    def _reshape(self, shape: Sequence[int]) -> bool:
        queue = deque(leaf for dim in self.dims for leaf in dim)
        dims: Dims = []
        for size in shape:
            dim, left = [], size
            while left > 1:
                if not queue:
                    return False
                atom = queue.popleft()
                if left % atom.size:
                    if atom.size % left:
                        return False
                    atom, rest = atom.split(left)
                    queue.appendleft(rest)
                dim.append(atom)
                left //= atom.size
            dims.append(dim)
        self._dims = dims
        return not queue

    def _expand(self, shape: Sequence[int]) -> bool:
        dims: Dims = [[] for _ in range(len(shape) - len(self._dims))] + self._dims
        for dim, size in zip(dims, shape):
            have = math.prod(atom.size for atom in dim)
            if have != size and have == 1:
                dim.append(Atom(size, -1))
        self._dims = dims
        return True


def _leaves(dim: Sequence[Atom]) -> list[Atom]:
    return [leaf for atom in dim for leaf in atom.leaves()]


def layout(shape: Sequence[int], steps: Sequence[Step]) -> Layout | None:
    """The layout after `steps` on a tensor of `shape`."""
    if 0 in shape:
        return None
    result = Layout(shape)
    return result if all(result.apply(step) for step in steps) else None


# --- writing a chain again ----------------------------------------------------------------------------------


def route(source: Dims, target: Dims) -> list[Step]:
    """The fewest Reshapes and Transposes that lead from the atoms `source` to the same atoms as `target`."""
    flat_source, flat_target = _flat(source), _flat(target)
    end = Step("reshape", _sizes(target))
    if flat_source == flat_target:
        return [] if _sizes(source) == _sizes(target) else [end]
    if (perm := _permutation(source, target)) is not None:
        return [Step("transpose", perm)]
    groups = _groups(flat_source, flat_target)
    by_target = _sorted(target, flat_source)
    if _flat(by_target) == flat_source:
        perm = _order(target, by_target)
        return [Step("reshape", _sizes(by_target)), Step("transpose", perm)]
    by_source = _sorted(source, flat_target)
    if _flat(by_source) == flat_target:
        return [Step("transpose", _order(by_source, source)), end]
    moved = _sorted(groups, flat_target)
    return [Step("reshape", _sizes(groups)), Step("transpose", _order(moved, groups)), end]


def _flat(dims: Dims) -> list[Atom]:
    return [atom for dim in dims for atom in dim]


def _sizes(dims: Dims) -> tuple[int, ...]:
    return tuple(math.prod(atom.size for atom in dim) for dim in dims)


def _permutation(source: Dims, target: Dims) -> tuple[int, ...] | None:
    """The perm of one Transpose from `source` to `target`."""
    if len(source) != len(target):
        return None
    free, perm = list(range(len(source))), []
    for dim in target:
        axis = next((i for i in free if source[i] == dim), None)
        if axis is None:
            return None
        free.remove(axis)
        perm.append(axis)
    return tuple(perm)


def _sorted(dims: Dims, order: list[Atom]) -> Dims:
    """`dims` in the order in which their first atoms stand in `order`; dims of size 1 come first."""
    place = {id(atom): i for i, atom in enumerate(order)}
    return sorted(dims, key=lambda dim: place[id(dim[0])] if dim else -1)


def _order(dims: Dims, of: Dims) -> tuple[int, ...]:
    """The index in `of` of each of `dims` (the same list objects)."""
    index = {id(dim): i for i, dim in enumerate(of)}
    return tuple(index[id(dim)] for dim in dims)


def _groups(source: list[Atom], target: list[Atom]) -> Dims:
    """The atoms of `source`, those together that also stand together in `target`."""
    place = {id(atom): i for i, atom in enumerate(target)}
    groups: Dims = []
    for atom in source:
        if groups and place[id(groups[-1][-1])] + 1 == place[id(atom)]:
            groups[-1].append(atom)
        else:
            groups.append([atom])
    return groups


def view(editor: Editor, value: ir.Value, steps: Sequence[Step]) -> ir.Value:
    """Write Reshape, Transpose and Expand steps behind `value`."""
    for step in steps:
        if step.kind == "transpose":
            shape = tuple(shape_of(value)[axis] for axis in step.data)
            value = editor.op("Transpose", [value], shape, attrs={"perm": step.data})
        elif step.data != shape_of(value):
            value = editor.op(step.kind.capitalize(), [value], step.data, domain=DOMAIN)
    return value


def onward(value: ir.Value, shape: Sequence[int], steps: Sequence[Step]) -> tuple[ir.Value, list[Step]]:
    """For a new value of `shape` from which `steps` lead to the old `value`: (the old value to replace, the steps
    that lead to it), behind the reshapes and transposes that follow `value` where that saves steps."""
    following, best, taken = list(steps), None, 0
    while True:
        result = layout(shape, following)
        if result is None:
            break
        path = route(result.source, result.dims)
        if best is None or len(path) - taken < best[0]:
            best = len(path) - taken, value, path
        if taken == 0 and not path:
            break
        node = only_user(value, "Reshape", "Transpose")
        if node is None:
            break
        value, taken = node.outputs[0], taken + 1
        moved = node.op_type == "Transpose"
        following.append(Step("transpose", permutation(node)) if moved else Step("reshape", shape_of(value)))
    assert best is not None
    return best[1], best[2]


# --- reading a chain ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """An operand as it should be read: `value`, then `steps`; what the chain had beside them."""

    value: ir.Value
    steps: list[Step]
    scale: float = 1.0
    copies: int = 1
    shape: tuple[int, ...] = field(default=())


def chain(value: ir.Value) -> list[tuple[ir.Value, Step]]:
    """The (input, step) pairs that lead backwards from `value` through layout ops, scalings and casts."""
    result: list[tuple[ir.Value, Step]] = []
    while len(result) < CHAIN_LIMIT and (step := _step(value)) is not None:
        value = step[0]
        result.append(step)
    return result


def _step(value: ir.Value) -> tuple[ir.Value, Step] | None:
    """What the producer of `value` does, as a step behind its input."""
    node = value.producer()
    if node is None:
        return None
    match node.op_type:
        case "Reshape" | "Expand":
            return given(node, 0), Step(node.op_type.lower(), shape_of(value))
        case "Transpose":
            return given(node, 0), Step("transpose", permutation(node))
        case "Identity":
            return given(node, 0), Step("cast")
        case "Cast" if is_float(node.inputs[0]) and is_float(value):
            return given(node, 0), Step("cast")
        case "Mul" | "Div":
            found = scaled(node)
            return (found[0], Step("scale", factor=found[1])) if found is not None else None
        case "Gather":
            return _gathered(node)
        case "Concat" if len(set(node.inputs)) == 1 and len(node.inputs) > 1:
            axis = integer(node, "axis") % len(shape_of(value))
            return given(node, 0), Step("tile", (axis, len(node.inputs)))
        case "Tile":
            repeats = ints(node, "repeats")
            axes = [axis for axis, times in enumerate(repeats) if times != 1]
            return (given(node, 0), Step("tile", (axes[0], repeats[axes[0]]))) if len(axes) == 1 else None
    return None


def permutation(node: ir.Node) -> tuple[int, ...]:
    """The perm of a Transpose; without one it reverses the dims."""
    if "perm" in node.attributes:
        return ints(node, "perm")
    return tuple(reversed(range(len(shape_of(node.outputs[0])))))


def _gathered(node: ir.Node) -> tuple[ir.Value, Step] | None:
    """A Gather whose constant indices are 0,0,1,1,...: every slice repeated."""
    x, indices = given(node, 0), array(node.inputs[1])
    axis = integer(node, "axis") % len(shape_of(x))
    size = shape_of(x)[axis]
    if indices is None or indices.ndim != 1 or size == 0 or len(indices) % size or len(indices) == size:
        return None
    times = len(indices) // size
    if not np.array_equal(indices, np.repeat(np.arange(size), times)):
        return None
    return x, Step("repeat", (axis, times))


def resolve(
    value: ir.Value,
    steps: Sequence[Step],
    dtype: ir.DataType | None,
    repeated: int | None = None,
    absorb: bool = True,
) -> Found | None:
    """How to read the operand `value` followed by `steps`, from the best value of the chain in front of it.

    The best one has the element type `dtype`, lies before the most scalings (they are returned as `scale`;
    with `absorb` off, none may be skipped) and before the repetition inside dim `repeated` (returned as
    `copies`), and leaves the fewest views: those before it and those written behind it.
    """
    candidates: list[tuple[tuple[int, int, int], Found]] = []
    scale, scalings = 1.0, 0
    following = list(steps)
    links = [(value, Step("cast")), *chain(value)]
    before = sum(step.kind not in ("cast", "scale") for _, step in links)
    for source, step in links:
        if step.kind == "scale":
            scale, scalings = scale * step.factor, scalings + 1
            if not absorb:
                break
        elif step.kind != "cast":
            following.insert(0, step)
            before -= 1
        if source.dtype != dtype:
            continue
        found = _read(source, following, scale, repeated)
        if found is not None:
            candidates.append(((-scalings, -found.copies, before + len(found.steps)), found))
    return min(candidates, key=lambda c: c[0])[1] if candidates else None


def _read(source: ir.Value, steps: Sequence[Step], scale: float, repeated: int | None) -> Found | None:
    """The chain from `source` in its shortest form, where nothing but the last atoms of a dim is repeated."""
    result = layout(shape_of(source), steps)
    if result is None:
        return None
    dims, copies = result.dims, 1
    if repeated is not None:
        while dims[repeated] and dims[repeated][-1].origin < 0:
            copies *= dims[repeated].pop().size
    if any(atom.origin < 0 for atom in _flat(dims)):
        return None
    return Found(source, route(result.source, dims), scale, copies, _sizes(dims))
