"""What the kernels of collectives through peer memory are told to do."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from onnxmesh.runtime.cuda import peer_collectives
from onnxmesh.runtime.cuda.peer_collectives import _COPY, _LOOPS, _SUM, _Group, _TooManyLoops, collapsed
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Collective


def _strided(x: np.ndarray, y: np.ndarray) -> tuple:
    return collapsed(x.shape, x.strides, y.strides, x.itemsize, (0, 0))


def test_row_major_memory_is_one_run_of_the_widest_vectors() -> None:
    x = np.zeros((2, 3, 32), np.float32)
    assert _strided(x, x) == ([1, 1, 1, 48], [0, 0, 0], [0, 0, 0], 16)


def test_some_heads_of_a_sequence_are_rows() -> None:
    x, y = np.zeros((1, 1152, 24, 128), np.float16), np.zeros((1, 4608, 6, 128), np.float16)
    sizes, reads, writes, width = _strided(x[:, :, 6:12], y[:, 128:1280])
    assert (sizes, width) == ([1, 1, 1152, 96], 16)
    assert (reads[2], writes[2]) == (24 * 256, 6 * 256)


def test_odd_rows_take_narrow_vectors() -> None:
    x = np.zeros((4, 7), np.float16)
    assert _strided(x[:, :3], np.zeros((4, 3), np.float16)) == ([1, 1, 4, 3], [0, 0, 14], [0, 0, 6], 2)


def test_an_unaligned_place_narrows_the_vectors() -> None:
    x = np.zeros((4, 8), np.float32)
    assert collapsed(x.shape, x.strides, x.strides, 4, (0, 4)) == ([1, 1, 1, 32], [0, 0, 0], [0, 0, 0], 4)


def test_more_loops_than_the_kernels_have_are_refused() -> None:
    x = np.zeros((4, 4, 4, 4, 4))[:, :3, :3, :3, ::2]
    with pytest.raises(_TooManyLoops):
        _strided(x, np.zeros(x.shape))


def test_structs_lie_as_the_kernels_read_them() -> None:
    assert (_LOOPS.itemsize, _COPY.itemsize, _SUM.itemsize, ctypes.sizeof(_Group)) == (48, 64, 312, 160)
    assert (_COPY.fields["loops"][1], _SUM.fields["targets"][1], _SUM.fields["loops"][1]) == (16, 256, 264)


class Memory(np.ndarray):
    """A NumPy array that says where it lies as CuPy's do."""

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self.ctypes.data)


class Arena:
    """Peer memory of two ranks in one process: rank 1's arena lies 1 << 32 bytes behind rank 0's."""

    abort = epochs = 0

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.zeros(nbytes, np.uint8).view(Memory)
        self.arenas = {rank: self.bytes.data.ptr + (rank << 32) for rank in (0, 1)}
        self.flags = {0: 0, 1: 0}

    def array(self, start: int, shape: tuple[int, ...], name: str) -> Memory:
        nbytes = int(np.prod(shape)) * dtype(name).itemsize
        return self.bytes[start : start + nbytes].view(dtype(name)).reshape(shape)

    def offset(self, x: Memory) -> int | None:
        start = x.data.ptr - self.bytes.data.ptr
        return start if 0 <= start < self.bytes.size else None

    def lines(self, channel: object, count: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, np.ndarray]]:
    """The kernels that are prepared: name, dtype, table."""
    found: list[tuple[str, str, np.ndarray]] = []

    def note(name: str, kind: str, items: np.ndarray, *_: object) -> Callable[[int], None]:
        found.append((name, kind, items))
        return lambda stream: None

    monkeypatch.setattr(peer_collectives, "_launch", note)
    return found


def _prepare(item: Collective, ins: list[Memory], outs: list[Memory], arena: Arena) -> Callable[[int], None] | None:
    rank = SimpleNamespace(mesh=Mesh.of(tp=2), rank=1)
    return peer_collectives.prepare(item, ins, outs, rank, arena)  # type: ignore[arg-type]


def test_sums_of_two_dtypes_are_two_kernels(launched: list[tuple[str, str, np.ndarray]]) -> None:
    arena = Arena(1 << 12)
    ins = [arena.array(0, (2, 8), "float32"), arena.array(256, (2, 8), "bfloat16"), arena.array(512, (4,), "float32")]
    outs = [arena.array(1024 + i * 256, x.shape, x.dtype.name) for i, x in enumerate(ins)]
    assert _prepare(Collective("AllReduce", "tp", (0, 1, 2), (3, 4, 5), {"reduce": "sum"}), ins, outs, arena)
    assert [(name, kind, len(items)) for name, kind, items in launched] == [
        ("onnxmesh_sum", "float32", 2),
        ("onnxmesh_sum", "bfloat16", 1),
    ]


def test_a_rank_reads_all_and_writes_where_its_sum_belongs(launched: list[tuple[str, str, np.ndarray]]) -> None:
    arena = Arena(1 << 12)
    x, out = arena.array(0, (1, 8, 4), "float32"), arena.array(1024, (1, 4, 4), "float32")
    item = Collective("ReduceScatter", "tp", (0,), (1,), {"dim": 1, "segments": [[8, 1]], "reduce": "sum"})
    assert _prepare(item, [x], [out], arena)
    (row,) = launched[0][2]
    second_half = 4 * 4 * 4
    assert row["from"][:2].tolist() == [arena.arenas[rank] + second_half for rank in (0, 1)]
    assert (row["targets"], int(row["to"][0])) == (1, out.data.ptr)


def test_bytes_go_to_the_same_place_in_the_other_arena(launched: list[tuple[str, str, np.ndarray]]) -> None:
    arena = Arena(1 << 12)
    x, out = arena.array(0, (4,), "float16"), arena.array(256, (4,), "float16")
    assert _prepare(Collective("Shift", "tp", (0,), (1,), {"offset": 1}), [x], [out], arena)
    ((name, _, items),) = launched
    assert name == "onnxmesh_push"
    assert (int(items["from"][0]), int(items["to"][0])) == (x.data.ptr, arena.arenas[0] + 256)


def test_what_does_not_lie_in_the_arena_is_left_to_nccl(launched: list[tuple[str, str, np.ndarray]]) -> None:
    arena = Arena(1 << 12)
    x, given = arena.array(0, (4,), "float32"), np.zeros(4, np.float32).view(Memory)
    assert _prepare(Collective("Shift", "tp", (0,), (1,), {"offset": 1}), [x], [given], arena) is None
    assert _prepare(Collective("AllReduce", "tp", (0,), (1,), {}), [given], [x], arena) is None
    assert _prepare(Collective("AllReduce", "tp", (0,), (1,), {"reduce": "max"}), [x], [x], arena) is None
