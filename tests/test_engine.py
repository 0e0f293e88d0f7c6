"""The engine: buffers in one arena, views, and errors that say where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from onnxmesh.runtime.comm import CollectiveTimeout, Communicator
from onnxmesh.runtime.engine import Engine
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Buffer, Collective, Instruction, Launch, Port, Program
from onnxmesh.runtime.threads import run_ranks


def program(buffers: list[Buffer], instructions: Sequence[Instruction], outputs: list[int], arena: int = 64) -> Program:
    """A program with one input `x` [2, 3] in buffer 0."""
    ports = [Port(f"y{i}", buffers[i].dtype, buffers[i].shape, (), i) for i in outputs]
    x = Port("x", "float32", (2, 3), (), 0)
    return Program({}, (x,), tuple(ports), tuple(buffers), tuple(instructions), arena)


INPUT = Buffer("float32", (2, 3), "input", source=0)
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def arena(offset: int, shape: tuple[int, ...] = (2, 3), dtype: str = "float32") -> Buffer:
    return Buffer(dtype, shape, "arena", offset)


def test_instructions_run_in_order_over_one_arena() -> None:
    buffers = [INPUT, arena(0), arena(32), arena(0, (3, 2)), Buffer("float32", (3, 2), "weight", source=0)]
    steps = [Launch("Neg", (0,), (1,)), Launch("Add", (1, 1), (2,)), Launch("Reshape", (2,), (3,)),
             Launch("Mul", (3, 4), (3,))]  # fmt: skip
    engine = Engine(program(buffers, steps, [3]), [np.full((3, 2), 10, np.float32)])
    for scale in (1, 2):
        (y,) = engine.run([X * scale])
        np.testing.assert_array_equal(y, X.reshape(3, 2) * -20 * scale)


def test_buffers_that_overlap_overwrite_each_other() -> None:
    buffers = [INPUT, arena(0), arena(8)]
    steps = [Launch("Identity", (0,), (1,)), Launch("Neg", (0,), (2,))]
    (y,) = Engine(program(buffers, steps, [1]), []).run([X])
    np.testing.assert_array_equal(y, np.array([[0, 1, 0], [-1, -2, -3]], np.float32))


def test_a_view_is_the_same_memory() -> None:
    view = Buffer("float32", (6,), "view", source=1)
    buffers = [INPUT, arena(4), view, Buffer("float32", (6,), "view", source=2)]
    steps = [Launch("Identity", (0,), (1,)), Launch("Neg", (2,), (3,))]
    (y,) = Engine(program(buffers, steps, [1]), []).run([X])
    np.testing.assert_array_equal(y, -X)


def test_the_same_plan_runs_with_other_dtypes_and_absent_inputs() -> None:
    buffers = [INPUT, arena(0, (2, 3), "bfloat16"), arena(16, (), "float32"), arena(20, (2, 3))]
    steps = [Launch("Cast", (0,), (1,)), Launch("ReduceMax", (0,), (2,), {"axes": [0, 1], "keepdims": 0}),
             Launch("Clip", (0, -1, 2), (3,))]  # fmt: skip
    half, top, clipped = Engine(program(buffers, steps, [1, 2, 3]), []).run([X])
    assert half.dtype.name == "bfloat16"
    assert top == 5
    np.testing.assert_array_equal(clipped, X)


def test_the_caller_s_arrays_are_not_written() -> None:
    x = X.copy()
    x.flags.writeable = False
    steps = [Launch("Split", (0,), (1, 2), {"axis": 0})]
    first, second = Engine(program([INPUT, arena(0, (1, 3)), arena(16, (1, 3))], steps, [1, 2]), []).run([x])
    np.testing.assert_array_equal(np.concatenate([first, second]), X)


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (Launch("MatMul", (0, 0), (1,), node="layer/fc1"), "ValueError"),
        (Launch("Transpose", (0,), (1,), node="layer/fc1"), "the plan says float32"),
    ],
)
def test_an_error_says_where(launch: Launch, reason: str) -> None:
    engine = Engine(program([INPUT, arena(0)], [Launch("Neg", (0,), (1,)), launch], [1]), [])
    with pytest.raises(RunError, match=reason) as caught:
        engine.run([X])
    text = str(caught.value)
    assert all(part in text for part in ("rank 0", "instruction 1", launch.kernel, "layer/fc1", "float32[2, 3]"))
    assert caught.value.__cause__ is not None


def test_the_hook_sees_every_result() -> None:
    seen: list[Any] = []
    steps = [Launch("Neg", (0,), (1,)), Launch("Abs", (1,), (2,))]
    engine = Engine(
        program([INPUT, arena(0), arena(32)], steps, [2]),
        [],
        hook=lambda index, item, results: seen.append((index, item, float(results[0].sum()))),
    )
    engine.run([X])
    assert seen == [(0, steps[0], -15.0), (1, steps[1], 15.0)]


def test_a_rank_that_never_arrives_is_named_with_the_instruction() -> None:
    steps = [Collective("AllReduce", "tp", (0,), (1,), {}, "layer/fc2")]

    def body(comm: Communicator) -> None:
        if comm.rank == 0:
            Engine(program([INPUT, arena(0)], steps, [1]), [], comm).run([X])

    message = r"rank 0: instruction 0, AllReduce along tp of node 'layer/fc2'.*no sign of rank 1"
    with pytest.raises(CollectiveTimeout, match=message):
        run_ranks(Mesh.of(tp=2), body, timeout=0.2)


def test_a_wrong_number_of_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Engine(program([INPUT, arena(0)], [], [1]), []).run([])
