"""What the kernels of collectives through peer memory are told to do."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from onnxmesh.runtime.cuda.peer_collectives import _COPY, _LOOPS, _SUM, _Group, _TooManyLoops, collapsed


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
