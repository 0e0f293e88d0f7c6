"""How threads walk over dims: dims merged, the elements of one thread, addresses, and vectors of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxmesh.runtime.cuda.codegen.operand import MOST, Operand, Unsuited, computed, stored


@dataclass(frozen=True)
class Dim:
    """A dim that threads walk over: its size, and a stride for every operand."""

    size: int
    strides: tuple[int, ...]


def dims_of(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[Dim]:
    """The dims of `shape` with the operands' strides over it."""
    return [Dim(n, tuple(s[i] for s in strides)) for i, n in enumerate(shape)]


def merged(dims: Sequence[Dim]) -> list[Dim]:
    """Dims of size 1 dropped, neighbours merged where every operand walks through both in one stride."""
    result: list[Dim] = []
    for dim in dims:
        if dim.size == 1:
            continue
        if result and all(a == b * dim.size for a, b in zip(result[-1].strides, dim.strides)):
            result[-1] = Dim(result[-1].size * dim.size, dim.strides)
        else:
            result.append(dim)
    return result


def power_of_two(n: int, most: int) -> int:
    """The greatest power of two up to `most` that divides n."""
    return math.gcd(n, most) if n else most


def index_type(dims: Sequence[Dim], extra: int = 0) -> str:
    """`int` where every offset fits, else `int64`."""
    count = len(dims[0].strides) if dims else 0
    reach = max((sum((d.size - 1) * abs(d.strides[i]) for d in dims) for i in range(count)), default=0)
    return "int" if reach + extra < 2**31 else "int64"


def coordinates(dims: Sequence[Dim], linear: str, prefix: str) -> list[str]:
    """C++ that takes the number `linear` (unsigned) apart into `{prefix}0`, `{prefix}1`, ... of the dims."""
    lines, rest = [], linear
    for i in reversed(range(len(dims))):
        if i == 0:
            lines.append(f"const unsigned {prefix}0 = {rest};")
        else:
            lines.append(f"const unsigned {prefix}{i} = {rest} % {dims[i].size}u;")
            rest = f"({rest} / {dims[i].size}u)"
    return lines


def offset(dims: Sequence[Dim], operand: int, prefix: str, index: str) -> str:
    """The C++ expression of an operand's offset at the coordinates `prefix`."""
    terms = [
        f"({index}){prefix}{i} * {dim.strides[operand]}{'ll' if index == 'int64' else ''}"
        for i, dim in enumerate(dims)
        if dim.strides[operand]
    ]
    return " + ".join(terms) or "0"


def loop(count: int, text: str) -> str:
    """C++ that does `text` for the elements `e` of a thread."""
    return text.replace("[e]", "[0]") if count == 1 else f"#pragma unroll\nfor (int e = 0; e < {count}; ++e) {text}"


@dataclass(frozen=True)
class Access:
    """What one thread reads or writes of an operand.

    Attributes:
        pointer: the C++ name of the address.
        base: the C++ name or expression of the offset of element 0.
        offsets: of the thread's elements from there.
        aligned: bytes to which address + base is aligned.
    """

    operand: Operand
    pointer: str
    base: str
    offsets: tuple[int, ...]
    aligned: int

    @property
    def width(self) -> int:
        """How many values it needs: 1 where all elements are one."""
        return 1 if len(set(self.offsets)) == 1 else len(self.offsets)

    def load(self, name: str) -> list[str]:
        """C++ that declares the array `name` of `width` values and reads them."""
        operand, lines = self.operand, [f"{computed(self.operand.dtype)} {name}[{self.width}];"]
        for start, count in self._chunks():
            where = f"{self.pointer} + ({self.base}) + {start}"
            lines.append(f"{{ const auto p = get<{stored(operand.dtype)}, {count}>({where});")
            lines += [
                f"  {name}[{e}] = wide(p.v[{at - start}]);"
                for e, at in enumerate(self.offsets[: self.width])
                if start <= at < start + count
            ]
            lines.append("}")
        return lines

    def store(self, name: str, width: int) -> list[str]:
        """C++ that writes the values of the array `name`, which has `width` of them."""
        kind, lines = computed(self.operand.dtype), []
        element = {at: e for e, at in reversed(list(enumerate(self.offsets)))}
        for start, count in self._chunks():
            values = ", ".join(f"{name}[{element[start + i] if width > 1 else 0}]" for i in range(count))
            where = f"{self.pointer} + ({self.base}) + {start}"
            lines.append(f"{{ const {kind} t[{count}] = {{{values}}}; put({where}, t); }}")
        return lines

    def _chunks(self) -> list[tuple[int, int]]:
        """(offset, number of elements) of vectors that cover the offsets, as wide as alignment allows."""
        wanted, size = set(self.offsets), self.operand.itemsize
        chunks, rest = [], sorted(wanted)
        while rest:
            start, count = rest[0], max(1, MOST // size)
            while count > 1 and (
                not wanted.issuperset(range(start, start + count))
                or math.gcd(self.aligned, start * size) % (count * size)
            ):
                count //= 2
            chunks.append((start, count))
            rest = [at for at in rest if at >= start + count]
        return chunks


def alignment(operand: Operand, dims: Sequence[Dim], number: int, scale: int = 1) -> int:
    """Bytes to which operand `number` is aligned at every point of the dims."""
    steps = [abs(dim.strides[number]) * scale * operand.itemsize for dim in dims if dim.size > 1]
    return math.gcd(MOST, operand.alignment, *steps)


def vector(size: int, inner: Sequence[int], operands: Sequence[Operand], outputs: int = 1, least: int = 1) -> int:
    """How many elements of a dim of `size` one thread takes.

    What it writes is 16 bytes where that is contiguous; of wider inputs it reads up to 32, which the cache makes good.

    Args:
        inner: the operands' strides in the dim.
        outputs: how many of the operands, the last ones, are written.
        least: more where that is wanted in any case.
    """
    contiguous = [(x.itemsize, n >= len(operands) - outputs) for n, x in enumerate(operands) if abs(inner[n]) == 1]
    if not contiguous:
        return power_of_two(size, least)
    written = max((width for width, writes in contiguous if writes), default=max(width for width, _ in contiguous))
    widest = max(width for width, _ in contiguous)
    return power_of_two(size, max(least, min(MOST // written, 2 * MOST // widest)))


def check_count(total: int) -> None:
    """Raises Unsuited where threads cannot be counted in 31 bits."""
    if total >= 2**31:
        raise Unsuited("too many elements")
