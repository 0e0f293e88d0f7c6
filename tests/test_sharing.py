"""Products beside a collective leave it multiprocessors, if it lasts."""

from __future__ import annotations

from onnxmesh.runtime.cuda.sharing import LEFT, multiprocessors
from onnxmesh.runtime.plan import Buffer, Collective, Launch, Program


def _program(rows: int, sent: int, *, waits: bool) -> Program:
    """A shift of `sent` elements beside a product of [rows, 4096] and [4096, 4096]; then another, perhaps after it."""
    buffers = [Buffer("bfloat16", shape, "arena") for shape in ((sent,), (sent,), (rows, 4096), (4096, 4096))]
    instructions = (
        Collective("Shift", "cp", (0,), (1,), {"offset": 1}, stream=1),
        Launch("MatMul", (2, 3), (2,)),
        Launch("MatMul", (2, 3), (2,), after=(0,) if waits else ()),
    )
    return Program({}, (), (), tuple(buffers), instructions, 0)


def test_a_product_beside_a_long_collective_is_made_smaller() -> None:
    assert multiprocessors(_program(4096, 64 << 20, waits=True), 132) == {1: 132 - LEFT}


def test_what_waits_for_the_collective_has_the_whole_device() -> None:
    assert multiprocessors(_program(4096, 64 << 20, waits=False), 132) == {1: 132 - LEFT, 2: 132 - LEFT}


def test_a_product_is_not_made_smaller_for_a_short_collective() -> None:
    assert multiprocessors(_program(4096, 1 << 10, waits=True), 132) == {}


def test_only_as_many_products_as_the_collective_lasts() -> None:
    assert multiprocessors(_program(4096, 12 << 20, waits=False), 132) == {1: 132 - LEFT}


def test_a_small_device_keeps_half_of_itself_for_the_product() -> None:
    assert multiprocessors(_program(4096, 64 << 20, waits=True), 20) == {1: 10}
