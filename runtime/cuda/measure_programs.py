"""Synthetic programs: one instruction again and again, for measuring what it takes.

They are plain programs, so what is measured is what plans run. Programs with inputs expect them on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.memory import aligned
from onnxmesh.runtime.plan import Buffer, Collective, Instruction, Launch, Port, Program

Shape = tuple[int, ...]
_STREAMED = 256 << 20
"""Bytes of weights that a chain of products reads before it reads one again: more than any cache holds."""
_COPIES = 16


@dataclass(frozen=True)
class Chain:
    """A program that runs one instruction `count` times, and its data.

    Attributes:
        weights, inputs: arrays of the host.
    """

    program: Program
    weights: Sequence[np.ndarray]
    inputs: Sequence[np.ndarray]
    count: int


class _Builder:
    """Buffers and instructions while they are made."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.instructions: list[Instruction] = []
        self.weights: list[np.ndarray] = []
        self.inputs: list[np.ndarray] = []
        self.ports: list[Port] = []
        self._used = 0

    def input(self, array: np.ndarray) -> int:
        """An input's buffer."""
        number = len(self.buffers)
        self.buffers.append(Buffer(array.dtype.name, array.shape, "input", source=len(self.inputs)))
        self.ports.append(Port(f"x{number}", array.dtype.name, array.shape, (), number))
        self.inputs.append(array)
        return number

    def weight(self, array: np.ndarray) -> int:
        """A weight's buffer."""
        self.buffers.append(Buffer(array.dtype.name, array.shape, "weight", source=len(self.weights)))
        self.weights.append(array)
        return len(self.buffers) - 1

    def result(self, kind: str, shape: Shape) -> int:
        """A buffer of the arena, with a place of its own."""
        self.buffers.append(Buffer(kind, shape, "arena", self._used))
        self._used += aligned(prod(shape) * dtype(kind).itemsize)
        return len(self.buffers) - 1

    def add(self, item: Instruction) -> None:
        """One more instruction."""
        self.instructions.append(item)

    def chain(self, outputs: Sequence[int] = ()) -> Chain:
        """What was built; `outputs` are buffers."""
        ports = tuple(Port(f"y{i}", self.buffers[i].dtype, self.buffers[i].shape, (), i) for i in outputs)
        program = Program(
            {}, tuple(self.ports), ports, tuple(self.buffers), tuple(self.instructions), max(self._used, 1)
        )
        return Chain(program, self.weights, self.inputs, len(self.instructions))


def random(kind: str, shape: Shape, seed: int = 0) -> np.ndarray:
    """Numbers as activations have them; zeros would let a GPU run faster than it ever does."""
    some = np.random.default_rng(seed).standard_normal(1 << 16).astype(np.float32).astype(dtype(kind))
    return np.resize(some, shape)


def gemm(kind: str, m: int, n: int, k: int, count: int) -> Chain:
    """[m, k] x [k, n], with weights that come from memory each time."""
    build = _Builder()
    x = build.input(random(kind, (m, k)))
    copies = min(_COPIES, max(1, -(-_STREAMED // (n * k * dtype(kind).itemsize))), count)
    weights = [build.weight(random(kind, (k, n), seed=1 + i)) for i in range(copies)]
    outs = [build.result(kind, (m, n)) for _ in range(2)]
    for i in range(count):
        build.add(Launch("MatMul", (x, weights[i % copies]), (outs[i % 2],), node=f"product {i}"))
    return build.chain(outs[:1])


def attention(kind: str, heads: int, groups: int, s: int, t: int, d: int, causal: bool, count: int) -> Chain:
    """Attention of s queries to t keys, `heads` heads over `groups` heads of keys."""
    build = _Builder()
    ins = [build.input(random(kind, (1, h, size, d), seed)) for seed, (h, size) in
           enumerate(((heads, s), (groups, t), (groups, t)))]  # fmt: skip
    if causal:
        ins += [-1, *(build.weight(np.arange(size, dtype=np.int64)) for size in (s, t))]
    outs = [build.result(kind, (1, heads, s, d)) for _ in range(2)]
    attrs: dict[str, Any] = {"scale": d**-0.5, "masked_row": "nan", "softcap": 0.0}
    for i in range(count):
        build.add(Launch("Attention", tuple(ins), (outs[i % 2],), attrs, f"attention {i}"))
    return build.chain(outs[:1])


def elementwise(kind: str, size: int, count: int) -> Chain:
    """The sum of two arrays of `size` elements, one of them what the instruction before made."""
    build = _Builder()
    x = build.input(random(kind, (1, size)))
    outs = [build.result(kind, (1, size)) for _ in range(2)]
    for i in range(count):
        ins = (x, outs[(i - 1) % 2] if i else x)
        build.add(Launch("Fused", ins, (outs[i % 2],), {"expr": ["Mul", ["Add", 0, 1], [kind, 0.5]]}, f"sum {i}"))
    return build.chain(outs[:1])


@dataclass(frozen=True)
class _Kind:
    """How a collective of `size` elements in all looks on one of n ranks.

    Attributes:
        given, made: the shapes of what a rank gives and gets.
        attrs: of the instruction.
        sent: bytes that a rank sends, of so many bytes in all.
        value: what the ranks' whole-number patterns become: (base by piece, factor of the pattern).
    """

    given: Callable[[int, int], Shape]
    made: Callable[[int, int], Shape]
    attrs: Callable[[int, int], Mapping[str, Any]]
    sent: Callable[[int, int], float]
    value: Callable[[int, int], tuple[list[int], int]]


KINDS: Mapping[str, _Kind] = {
    "AllReduce": _Kind(
        lambda size, n: (size,),
        lambda size, n: (size,),
        lambda size, n: {"reduce": "sum"},
        lambda nbytes, n: 2 * nbytes * (n - 1) / n,
        lambda rank, n: ([n * (n + 1) // 2], n),
    ),
    "ReduceScatter": _Kind(
        lambda size, n: (size,),
        lambda size, n: (size // n,),
        lambda size, n: {"reduce": "sum", "dim": 0, "segments": [[size, 1]]},
        lambda nbytes, n: nbytes * (n - 1) / n,
        lambda rank, n: ([n * (n + 1) // 2], n),
    ),
    "AllGather": _Kind(
        lambda size, n: (size // n,),
        lambda size, n: (size,),
        lambda size, n: {"dim": 0, "segments": [[size, 1]]},
        lambda nbytes, n: nbytes * (n - 1) / n,
        lambda rank, n: (list(range(1, n + 1)), 1),
    ),
    "AllToAll": _Kind(
        lambda size, n: (n, size // n),
        lambda size, n: (1, size),
        lambda size, n: {
            "split_dim": 0,
            "split_segments": [[n, 1]],
            "concat_dim": 1,
            "concat_segments": [[size, 1]],
        },
        lambda nbytes, n: nbytes * (n - 1) / n,
        lambda rank, n: (list(range(1, n + 1)), 1),
    ),
    "Shift": _Kind(
        lambda size, n: (size,),
        lambda size, n: (size,),
        lambda size, n: {"offset": 1},
        lambda nbytes, n: nbytes,
        lambda rank, n: ([(rank - 1) % n + 1], 1),
    ),
}
"""The collectives. `size` is that of the larger side; it is a multiple of 8 n."""

_PATTERN = np.arange(8)


def elements(nbytes: int, ranks: int) -> int:
    """About `nbytes` of half precision, in elements that divide."""
    step = 8 * ranks
    return max(1, nbytes // 2 // step) * step


def collective(kind: str, axis: str, rank: int, ranks: int, size: int, count: int) -> Chain:
    """A collective of `size` elements of bfloat16, whose output `correct` can check.

    Args:
        rank: the position among the axis's ranks.
    """
    build, how = _Builder(), KINDS[kind]
    given = how.given(size, ranks)
    x = build.input(np.resize((_PATTERN + rank + 1).astype(dtype("bfloat16")), given))
    outs = [build.result("bfloat16", how.made(size, ranks)) for _ in range(2)]
    for i in range(count):
        after = (i - 1,) if i else ()
        build.add(Collective(kind, axis, (x,), (outs[i % 2],), how.attrs(size, ranks), f"{kind} {i}", after=after))
    return build.chain(outs[:1])


def correct(kind: str, rank: int, ranks: int, result: np.ndarray) -> bool:
    """Whether the result of `collective` is right, to the bit."""
    bases, factor = KINDS[kind].value(rank, ranks)
    want = np.array([factor * _PATTERN + base for base in bases]).astype(dtype("bfloat16")).view(np.uint16)
    return bool((result.reshape(len(bases), -1, len(_PATTERN)).view(np.uint16) == want[:, None, :]).all())


def beside(axis: str, ranks: int, side: int, products: int, size: int, sends: int) -> Chain:
    """Large products on one stream and all-gathers of `size` elements on the other, either of which may be none.

    Args:
        side: the products are [side, side] x [side, side].
    """
    build = _Builder()
    x, w = build.input(random("bfloat16", (side, side))), build.weight(random("bfloat16", (side, side), 1))
    y = build.input(random("bfloat16", (size // ranks,)))
    outs = [build.result("bfloat16", shape) for shape in ((side, side), (size,))]
    attrs = KINDS["AllGather"].attrs(size, ranks)
    for i in range(sends):
        after = (i - 1,) if i else ()
        build.add(Collective("AllGather", axis, (y,), (outs[1],), attrs, f"gather {i}", "", 1, after))
    for i in range(products):
        after = (sends + i - 1,) if i else ()
        build.add(Launch("MatMul", (x, w), (outs[0],), {}, f"product {i}", 0, after))
    return build.chain(outs[:1])
