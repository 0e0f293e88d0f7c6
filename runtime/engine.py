"""The engine: one rank's buffers, and the loop over the instructions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

import onnxmesh.runtime.kernels  # noqa: F401  (registers them)
from onnxmesh.runtime import control
from onnxmesh.runtime.collectives import execute
from onnxmesh.runtime.comm import Communicator, PeerFailed
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.host import LoneCommunicator
from onnxmesh.runtime.kernels.registry import Array, Call, TensorType, find_for
from onnxmesh.runtime.loose import element_dtype
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Buffer, Collective, Control, Instruction, Launch, Program

Hook = Callable[[int, Instruction, Sequence[Array]], None]
"""Called after every instruction with its index, itself and its results; it must not keep or change them."""

Step = Callable[[], Any]


@dataclass(frozen=True)
class InstructionTime:
    """When an instruction ran, in microseconds from the start of its run."""

    index: int
    start_us: float
    end_us: float
    stream: int = 0


class Engine:
    """Runs a program on one rank.

    Buffers are bound once: the arena is one array of bytes, and every buffer a typed view of it at the offset that
    the plan gives. Every kernel's result is copied to its buffer, so the plan's memory is what is really used.
    Loose values are passed on as they are; the programs of control flow run on engines of their own.

    Args:
        program: the instructions.
        weights: this rank's shards, in the order of the plan's weights.
        communicator: how to reach the other ranks; None on a mesh of one.
        xp: the array namespace.
        hook: called after every instruction, if given.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[Array],
        communicator: Communicator | None = None,
        xp: Any = np,
        hook: Hook | None = None,
    ) -> None:
        self.program = program
        self.communicator = communicator or LoneCommunicator(Mesh.of(), 0)
        self.hook = hook
        self._xp = xp
        self._coordinate = self.communicator.mesh.coordinate(self.communicator.rank)
        self._arena = self._new_arena(program.arena_bytes)
        self._inputs = [self._new_input(buffer) for buffer in self._input_buffers()]
        self._weights = weights
        self._given: dict[int, Array] = {}
        self._late: list[tuple[Array, Array]] = []
        self._prepare()

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the program on local `inputs`, in the order of the program's; the local outputs.

        The outputs are views of the engine's memory, good until the next run.

        Raises:
            RunError: an instruction failed; names the rank, the instruction, its kernel, node and shapes.
        """
        self._take(inputs)
        self.run_bound()
        return [self._arrays[port.buffer] for port in self.program.outputs]

    def _take(self, inputs: Sequence[Any]) -> None:
        """Take over inputs: copied to their buffers, but for loose values. None: what is bound stays."""
        for number, (buffer, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if number in self._slots:
                self._arrays[self._slots[number]] = given
            elif given is not None:
                buffer[...] = given

    def run_bound(self) -> None:
        """Run the program on what the input buffers hold. Raises as `run`."""
        with np.errstate(all="ignore"):
            for index, (item, step) in enumerate(zip(self.program.instructions, self._steps)):
                self._do(index, item, step)
            for target, source in self._late:
                target[...] = source

    def rebind(self, inputs: Sequence[Array | None], outputs: Sequence[Array | None]) -> None:
        """Use given memory: read inputs there, write outputs there. None: memory of the engine's own.

        Args:
            inputs: row-major arrays of the local shapes and dtypes, in the order of the program's inputs.
            outputs: likewise of its outputs; an output that is a part of other memory is copied there at the end.
        """
        for number, (buffer, given) in enumerate(zip(self._input_buffers(), inputs, strict=True)):
            self._inputs[number] = self._new_input(buffer) if given is None else given
        self._given = {}
        late = []
        for port, given in zip(self.program.outputs, outputs, strict=True):
            if given is None:
                continue
            if self.program.buffers[port.buffer].kind == "arena" and port.buffer not in self._given:
                self._given[port.buffer] = given
            else:
                late.append((given, port.buffer))
        self._prepare()
        self._late = [(given, self._arrays[buffer]) for given, buffer in late]

    def _new_arena(self, nbytes: int) -> Array:
        return self._xp.empty(nbytes, self._xp.uint8)

    def _new_input(self, buffer: Buffer) -> Any:
        """Memory for an input; none for a loose value."""
        return None if buffer.is_loose else self._xp.empty(buffer.shape, self._stored(buffer.dtype))

    def _prepare(self) -> None:
        """Bind every buffer to its memory, and look up what every instruction does there."""
        self._slots = self._loose_inputs()
        self._arrays = [self._bind(number) for number in range(len(self.program.buffers))]
        self._steps = [self._step(item) for item in self.program.instructions]

    def _loose_inputs(self) -> dict[int, int]:
        """The buffers of the inputs that are loose values, by the inputs' numbers."""
        return {i: port.buffer for i, port in enumerate(self.program.inputs) if port.is_loose}

    def profile(self, repeat: int = 5) -> list[InstructionTime]:
        """When every instruction runs: the median over `repeat` runs on what the input buffers hold.

        All ranks profile together. Raises as `run`.
        """
        times = np.zeros((repeat, 2, len(self._steps)))
        for turn in range(repeat):
            begin = time.perf_counter()
            with np.errstate(all="ignore"):
                for index, (item, step) in enumerate(zip(self.program.instructions, self._steps)):
                    times[turn, 0, index] = time.perf_counter() - begin
                    self._do(index, item, step)
                    times[turn, 1, index] = time.perf_counter() - begin
        starts, ends = 1e6 * np.median(times, axis=0)
        return [InstructionTime(i, float(start), float(end)) for i, (start, end) in enumerate(zip(starts, ends))]

    def array(self, buffer: int) -> Array:
        """The memory of a buffer, by its number in the program."""
        return self._arrays[buffer]

    @property
    def on_host(self) -> list[str]:
        """The kernels that ran on the host though this is the engine of a GPU, by name."""
        return []

    def close(self) -> None:
        """Give back what outlives the engine's memory; no runs after this."""
        return None

    def _do(self, index: int, item: Instruction, step: Step) -> None:
        with self._named(index, item):
            self._store_all(item, step())
        if self.hook is not None:
            self.hook(index, item, [self._arrays[out] for out in item.outs])

    @contextmanager
    def _named(self, index: int, item: Instruction) -> Iterator[None]:
        """Errors within say which instruction they come from."""
        try:
            yield
        except PeerFailed:
            raise
        except RunError as error:
            error.args = (f"{self._describe(index, item)}: {error.args[0]}", *error.args[1:])
            raise
        except Exception as error:
            raise RunError(f"{self._describe(index, item)}: {type(error).__name__}: {error}", code="OM5110") from error

    def _store_all(self, item: Instruction, results: Sequence[Any]) -> None:
        """Keep the results of an instruction: copied to their buffers, but for loose values."""
        for out, result in zip(item.outs, results, strict=True):
            if self.program.buffers[out].is_loose:
                self._arrays[out] = result
            else:
                self._store(self._arrays[out], result)

    def _store(self, buffer: Array, result: Array) -> None:
        if result.shape != buffer.shape or result.dtype != buffer.dtype:
            raise ValueError(
                f"the result is {result.dtype}{list(result.shape)}, the plan says {buffer.dtype}{list(buffer.shape)}"
            )
        buffer[...] = result

    def _step(self, item: Instruction) -> Step:
        """What runs an instruction and returns its results, with everything looked up beforehand."""
        if isinstance(item, Launch) and self._is_loose(item):
            return self._loose_step(item)
        inputs = [self._arrays[i] if i >= 0 else None for i in item.ins]
        if isinstance(item, Collective):
            communicator, xp = self.communicator, self._xp
            return lambda: [execute(item, _row_major(x), communicator, xp, i) for i, x in enumerate(inputs)]
        ordered = self._xp is np  # NumPy's sums and products round by the order in memory
        outs = tuple(TensorType(self._arrays[i].dtype, self._arrays[i].shape) for i in item.outs)
        function = find_for(item, self.program.buffers, self._xp.__name__)
        call = Call(self._xp, item.attrs, outs, self._coordinate)

        def launch() -> Any:
            results = function(call, *(map(_row_major, inputs) if ordered else inputs))
            return results if isinstance(results, tuple) else (results,)

        return launch

    # --- loose values and control flow ----------------------------------------------------------------------

    def _is_loose(self, item: Launch) -> bool:
        """Whether an instruction touches a loose value or is control flow: its operands are looked up when it runs."""
        touched = (self.program.buffers[i] for i in (*item.ins, *item.outs) if i >= 0)
        return isinstance(item, Control) or any(buffer.is_loose for buffer in touched)

    def _loose_step(self, item: Launch) -> Step:
        if isinstance(item, Control):
            operands = item.ins[: len(item.ins) - item.captured]
            bodies = {name: self._body(program, item) for name, program in item.programs.items()}
            return lambda: control.execute(item, self._xp, bodies, self._kept(operands))
        outs = tuple(self._type(self.program.buffers[i]) for i in item.outs)
        function = find_for(item, self.program.buffers, self._xp.__name__)
        call = Call(self._xp, item.attrs, outs, self._coordinate)

        def launch() -> Any:
            results = function(call, *self._kept(item.ins))
            return results if isinstance(results, tuple) else (results,)

        return launch

    def _kept(self, buffers: Sequence[int]) -> list[Any]:
        """The values of buffers as results may keep them: memory that is written again is copied."""
        fixed = ("loose", "weight")
        return [
            None if i < 0 else x if (b := self.program.buffers[i]).is_loose or b.kind in fixed else x.copy()
            for i, x in ((i, self._arrays[i]) for i in buffers)
        ]

    def _inner(self, program: Program) -> Engine:
        return Engine(program, (), self.communicator, self._xp)

    def _body(self, program: Program, item: Control) -> control.Run:
        """What runs a program of a control flow instruction: an engine that reads what it captures where it is."""
        inner = self._inner(program)
        captured = item.ins[len(item.ins) - item.captured :]
        fixed = [None if self.program.buffers[i].is_loose else self._arrays[i] for i in captured]
        first = len(program.inputs) - item.captured
        inner.rebind([*[None] * first, *fixed], [None] * len(program.outputs))

        def run(*operands: Any) -> list[Any]:
            loose = [self._arrays[i] if self.program.buffers[i].is_loose else None for i in captured]
            outs = inner.run([*operands, *loose])
            return [x if port.is_loose else x.copy() for x, port in zip(outs, program.outputs)]

        return run

    def _stored(self, name: str) -> np.dtype:
        """The dtype of the array of a buffer's elements."""
        return dtype(name)

    @staticmethod
    def _type(buffer: Buffer) -> TensorType:
        return TensorType(element_dtype(buffer.dtype) if buffer.is_loose else dtype(buffer.dtype), buffer.shape)

    def _describe(self, index: int, item: Instruction) -> str:
        buffers = [self.program.buffers[i] for i in item.ins if i >= 0]
        shapes = ", ".join(f"{b.dtype}{list(b.shape)}" for b in buffers)
        short = self._describe_short(index, item)
        return f"rank {self.communicator.rank}: {short}, failed on {shapes or 'no inputs'}"

    def _describe_short(self, index: int, item: Instruction) -> str:
        name = item.kernel if isinstance(item, Launch) else f"{item.kind} along {item.axis}"
        return f"instruction {index}, {name} of node {item.node!r}"

    def _input_buffers(self) -> list[Buffer]:
        """For every input its local type. An input that the program does not read has its port's buffer."""
        return [self.program.buffers[port.buffer] for port in self.program.inputs]

    def _bind(self, number: int) -> Array:
        buffer = self.program.buffers[number]
        if number in self._given:
            return self._given[number]
        if buffer.is_loose:
            return None
        if buffer.kind == "view":
            return self._view(buffer)
        if buffer.kind == "weight":
            return self._weights[buffer.source].reshape(buffer.shape)
        if buffer.kind == "input":
            return self._inputs[buffer.source].reshape(buffer.shape)
        kind = self._stored(buffer.dtype)
        size = prod(buffer.shape) * kind.itemsize
        return self._arena[buffer.offset : buffer.offset + size].view(kind).reshape(buffer.shape)

    def _view(self, view: Buffer) -> Array:
        """A window of another buffer's memory, which is row-major where that is no view itself."""
        source, offset = self.program.buffers[view.source], view.offset
        number = view.source
        while source.kind == "view":
            number, offset = source.source, offset + source.offset
            source = self.program.buffers[number]
        kind = self._stored(view.dtype)
        memory = self._bind(number).reshape(-1)[offset // kind.itemsize :]
        if not view.strides:
            return memory[: prod(view.shape)].reshape(view.shape)
        strides = [stride * kind.itemsize for stride in view.strides]
        return self._xp.lib.stride_tricks.as_strided(memory, view.shape, strides)


def _row_major(x: Any) -> Any:
    """x, or a copy of it in row-major memory."""
    return x if x is None or x.flags.c_contiguous else x.copy()
