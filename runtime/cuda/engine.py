"""The engine on a GPU: every instruction prepared once, and the whole program, collectives included, in a CUDA graph.

The first run launches every instruction by itself, which also loads kernels and connects the ranks. The second run
captures, and from then on a run is one launch. What cannot be captured splits the graph: it is launched between the
graphs of what stands before and after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

import onnxmesh.runtime.cuda.kernels
import onnxmesh.runtime.cuda.launch_all  # noqa: F401  (both register)
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.cuda import collectives, hosted, peer_collectives, peer_memory
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.launchers import Job, Workspace, prepare
from onnxmesh.runtime.cuda.launchers import Launch as Launched
from onnxmesh.runtime.cuda.peer_memory import PeerMemory
from onnxmesh.runtime.cuda.progress import Progress, where
from onnxmesh.runtime.cuda.sharing import multiprocessors
from onnxmesh.runtime.cuda.streams import Streams, Task
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.engine import Engine, Hook, InstructionTime, Step
from onnxmesh.runtime.exchange import staging_sizes
from onnxmesh.runtime.host import LoneCommunicator
from onnxmesh.runtime.kernels.reference import REFERENCE
from onnxmesh.runtime.kernels.registry import Array, Call, find_for
from onnxmesh.runtime.memory import WORKSPACE_BYTES
from onnxmesh.runtime.nccl import NcclCommunicator
from onnxmesh.runtime.plan import Collective, Control, Instruction, Launch, Program

if TYPE_CHECKING:
    from onnxmesh.runtime.cuda.device import CudaDevice

_WAITS = frozenset(("Compress", "RandomNormal", "RandomUniform", "RoiAlign"))
"""Generic kernels that wait for the device."""
_ON_HOST = "it runs on the host"
_ATTEMPTS = 16
"""After so many instructions that turn out not to be capturable, the program runs without graphs."""


class CudaEngine(Engine):
    """Runs a program on one GPU. Its memory is `device`'s; `weights` are there already.

    Args:
        workspace: that of the engine whose control flow runs this one.

    Attributes:
        not_captured: the instructions that no graph holds, with reasons.
        generic: the instructions without a launcher of their own.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[Array],
        communicator: Communicator,
        device: CudaDevice,
        hook: Hook | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self._device = device
        self._pieces: list[Any] = []
        self._scratch = import_cupy().cuda.MemoryPool()  # of generic kernels
        self._workspace = workspace or _workspace(device)
        self._streams = Streams(device.stream, apart=hook is None)
        self._staging: dict[int, collectives.Staging] = {}
        self.not_captured: list[str] = []
        self.generic: list[str] = []
        self._progress = self._watched(program, communicator)
        self._peers: PeerMemory | None = None
        super().__init__(program, weights, communicator, device.xp, hook)

    @property
    def captured(self) -> bool:
        """Whether a run is the launch of one CUDA graph."""
        return len(self._pieces) == 1 and not isinstance(self._pieces[0], Task)

    @property
    def on_host(self) -> list[str]:
        launched = (task for task in self._tasks if isinstance(task.item, Launch))
        return sorted({task.item.kernel for task in launched if task.obstacle == _ON_HOST})  # type: ignore[union-attr]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Enqueue the program on the device's stream; see Engine.run."""
        with self._device.scope():
            self._take(inputs)
            self.run_bound()
            return [self._arrays[port.buffer] for port in self.program.outputs]

    def _take(self, inputs: Sequence[Any]) -> None:
        for number, (buffer, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if number in self._slots:
                self._arrays[self._slots[number]] = hosted.to_device(given)
            elif given is not None:
                _fill(buffer, given)

    def run_bound(self) -> None:
        """Enqueue the program on the device's stream, for what the input buffers hold."""
        with self._device.scope():
            if self._runs == 1 and self._device.graph and self.hook is None:
                self._capture()
            if self._pieces:
                self._replay()
            else:
                self._enqueue(self._tasks)
            self._runs += 1

    def memory(self) -> dict[str, int]:
        """Bytes on the device; staging is that of collectives by NCCL, scratch what generic kernels allocate."""
        return {
            "weights": sum(x.nbytes for x in self._weights),
            "arena": self._arena.nbytes,
            "inputs": sum(x.nbytes for x in self._inputs),
            "workspace": self._workspace.nbytes,
            "staging": sum(each.nbytes for each in self._staging.values()),
            "scratch": self._scratch.total_bytes(),
        }

    def profile(self, repeat: int = 5) -> list[InstructionTime]:
        """As Engine.profile; by events in a graph, so that launching costs nothing."""
        from onnxmesh.runtime.cuda.profile import profile

        with self._device.scope(), import_cupy().cuda.using_allocator(self._scratch.malloc):
            return profile(self._streams, self._tasks, self._launch, self._device.synchronize, repeat)

    def close(self) -> None:
        """Let the graphs go: NCCL waits for graphs before it ends (pytorch/pytorch#115388). All ranks together."""
        self._pieces = []
        if self._peers is not None:
            self._peers.close()
            self._peers = None

    @staticmethod
    def _watched(program: Program, communicator: Communicator) -> Progress | None:
        """What the communicators say when they wait in vain: the collective that the GPU has come to."""
        if not isinstance(communicator, NcclCommunicator) or communicator.mesh.size == 1:
            return None
        progress = Progress()
        communicator.groups.where = lambda: where(program, progress.last())
        return progress

    # --- preparing ------------------------------------------------------------------------------------------

    def _new_arena(self, nbytes: int) -> Array:
        """The arena; of several ranks, mapped into each other if it can be."""
        with self._device.scope():
            if not isinstance(self.communicator, NcclCommunicator) or self.communicator.mesh.size == 1:
                return self._xp.empty(nbytes, self._xp.uint8)
            arena = peer_memory.allocate(nbytes)
            self._peers = PeerMemory.share(arena, self.communicator.groups)
            return arena

    def _prepare(self) -> None:
        with self._device.scope():
            self._pieces, self._runs, self.generic = [], 0, []
            self._slots = self._loose_inputs()
            self._arrays = [self._bind(number) for number in range(len(self.program.buffers))]
            count = import_cupy().cuda.Device().attributes["MultiProcessorCount"]
            self._shares = multiprocessors(self.program, int(count))
            self._tasks = [self._task(index, item) for index, item in enumerate(self.program.instructions)]
            self._streams.order(self._tasks)
            _ = self._workspace.ptr
            self._device.synchronize()
            self._device.pool.free_all_blocks()  # what preparing took

    def _task(self, index: int, item: Instruction) -> Task:
        ins = [self._arrays[i] if i >= 0 else None for i in item.ins]
        outs = [self._arrays[i] for i in item.outs]
        launch = None
        with self._named(index, item):
            if isinstance(item, Launch):
                if not self._is_loose(item) and not self._is_foreign(item):
                    launch = prepare(self._job(index, item, ins, outs))
            elif isinstance(self.communicator, NcclCommunicator):
                launch = self._prepare_collective(item, ins, outs, self.communicator)
            if launch is not None:
                return Task(index, item, launch)
            self.generic.append(self._describe_short(index, item))
            return self._generic(index, item)

    # --- without launchers ----------------------------------------------------------------------------------

    def _generic(self, index: int, item: Instruction) -> Task:
        """What CuPy computes with the kernels of every array library, or NumPy where CuPy cannot."""
        if isinstance(item, Launch) and self._is_foreign(item):
            step, obstacle = self._hosted(item), _ON_HOST
        else:
            step, obstacle = self._step(item), self._obstacle(item)
        task = Task(index, item, lambda _: None, obstacle)

        def run(_: int) -> None:
            nonlocal step
            try:
                results = step()
            except Exception:
                if task.obstacle == _ON_HOST or not isinstance(item, Launch) or isinstance(item, Control):
                    raise
                step, task.obstacle = self._hosted(item), _ON_HOST
                results = step()
            self._store_all(item, results)

        task.launch = run
        return task

    def _is_foreign(self, item: Launch) -> bool:
        """Whether NumPy runs an instruction: CuPy has no arrays of a dtype it touches, or onnx.reference does it."""
        kinds = [self._type(self.program.buffers[i]).dtype for i in (*item.ins, *item.outs) if i >= 0]
        foreign = any(kind is not None and hosted.is_foreign(kind) for kind in kinds)
        return item.kernel == REFERENCE or (foreign and not isinstance(item, Control))

    def _hosted(self, item: Launch) -> Step:
        """What runs an instruction on the host, on copies of its inputs; the results on the device."""
        buffers = self.program.buffers
        types = [self._type(buffers[i]) for i in item.outs]
        function = find_for(item, buffers, np.__name__)
        call = Call(np, item.attrs, tuple(types), self._coordinate)
        kinds = [None if i < 0 or buffers[i].is_loose else dtype(buffers[i].dtype) for i in item.ins]

        def run() -> list[Any]:
            values = [None if i < 0 else self._arrays[i] for i in item.ins]
            with np.errstate(all="ignore"):
                results = function(call, *map(hosted.to_host, values, kinds))
            results = results if isinstance(results, tuple) else (results,)
            return [
                hosted.to_device(x) if buffers[i].is_loose else hosted.stored(x, kind, self._xp)
                for i, x, kind in zip(item.outs, results, types, strict=True)
            ]

        return run

    def _stored(self, name: str) -> np.dtype:
        return hosted.storage(dtype(name))

    def _inner(self, program: Program) -> Engine:
        alone = LoneCommunicator(self.communicator.mesh, self.communicator.rank)
        return CudaEngine(program, (), alone, self._device, workspace=self._workspace)

    def _obstacle(self, item: Instruction) -> str:
        """Why a generic kernel cannot be captured; empty if it can, as far as is known."""
        if isinstance(item, Collective):
            return ""
        if self._is_loose(item):
            return "what it does depends on data"
        return "it waits for the device" if item.kernel in _WAITS else ""

    def _prepare_collective(
        self, item: Collective, ins: Sequence[Array], outs: Sequence[Array], rank: NcclCommunicator
    ) -> Launched | None:
        """Through peer memory if it can be, else through NCCL."""
        launch = None
        if rank.mesh.axis_size(item.axis) == 1:
            return None
        if self._peers is not None:
            launch = peer_collectives.prepare(item, ins, outs, rank, self._peers)
        return launch or collectives.prepare(item, ins, outs, rank, self._staged(item.stream))

    def _job(self, index: int, item: Launch, ins: Sequence[Array | None], outs: Sequence[Array]) -> Job:
        constant = tuple(i >= 0 and self._root_kind(i) == "weight" for i in item.ins)
        return Job(
            *(item.kernel, item.attrs, tuple(ins), tuple(outs), constant, self._coordinate, self._workspace, item.node),
            multiprocessors=self._shares.get(index, 0),
        )

    def _root_kind(self, number: int) -> str:
        buffer = self.program.buffers[number]
        return self._root_kind(buffer.source) if buffer.kind == "view" else buffer.kind

    def _staged(self, stream: int) -> collectives.Staging:
        if stream not in self._staging:
            assert isinstance(self.communicator, NcclCommunicator)
            sizes = staging_sizes(self.program, self.communicator.mesh)
            self._staging[stream] = collectives.Staging(sizes[stream])
        return self._staging[stream]

    # --- running --------------------------------------------------------------------------------------------

    def _enqueue(self, tasks: Sequence[Task]) -> None:
        """Launch tasks one by one, and have the first stream wait for all of them."""
        with import_cupy().cuda.using_allocator(self._scratch.malloc):
            self._streams.run(tasks, self._launch)
        if tasks and tasks[-1] is self._tasks[-1]:
            for target, source in self._late:
                target[...] = source

    def _launch(self, task: Task, stream: int) -> None:
        with self._named(task.index, task.item):
            if self._progress is not None and isinstance(task.item, Collective):
                self._progress.mark(task.index, stream)
            task.launch(stream)
        if self.hook is not None:
            self.hook(task.index, task.item, [self._arrays[out] for out in task.item.outs])

    def _replay(self) -> None:
        for piece in self._pieces:
            if isinstance(piece, Task):
                self._enqueue([piece])
            else:
                piece.launch(self._device.stream)

    # --- capturing ------------------------------------------------------------------------------------------

    def _capture(self) -> None:
        self._device.synchronize()
        for _ in range(_ATTEMPTS):
            pieces = list(self._captured())
            if None not in pieces:
                break
        else:
            pieces = []
        self.not_captured = [
            f"{self._describe_short(task.index, task.item)}: {task.obstacle}" for task in self._tasks if task.obstacle
        ]
        if self._everywhere(bool(pieces)):
            self._pieces = pieces
        elif pieces:
            self.not_captured.append("another rank could not capture its program")

    def _captured(self) -> Iterator[Any]:
        """Graphs, and between them tasks that are none; None where a task has just turned out to be one of those."""
        for alone, group in groupby(self._tasks, lambda task: bool(task.obstacle)):
            if alone:
                yield from group
            else:
                yield self._graph(list(group))

    def _graph(self, tasks: Sequence[Task]) -> Any:
        stream, cupy = self._device.stream, import_cupy()
        failed, reason = None, ""
        stream.begin_capture()
        try:
            self._enqueue(tasks)
        except Exception as error:
            failed = self._streams.current
            reason = " ".join(str(error).split())
        try:
            graph = stream.end_capture()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            failed, reason = failed or self._streams.current, reason or str(error)
        if failed is not None:
            failed.obstacle = reason
            return None
        graph.upload(stream)
        return graph

    def _everywhere(self, here: bool) -> bool:
        """Whether it is so on every rank."""
        if self.communicator.mesh.size == 1:
            return here
        everyone = tuple(range(self.communicator.mesh.size))
        flag = self._xp.full(1, here, self._xp.uint8)
        return bool(self._device.get(self.communicator.all_reduce(flag, everyone, "min"))[0])


def _workspace(device: CudaDevice) -> Workspace:
    """A workspace in memory of its own: what the pool holds unused it would only split, and could never give back."""
    with device.scope():
        device.pool.free_all_blocks()
        workspace = Workspace()
        workspace.reserve(WORKSPACE_BYTES)
        _ = workspace.ptr
        return workspace


def _fill(buffer: Array, given: Array) -> None:
    """Copy an input to its buffer, from the host or from a device."""
    if isinstance(given, np.ndarray):
        buffer.set(hosted.as_stored(np.ascontiguousarray(given)).reshape(buffer.shape))
    else:
        buffer[...] = given
