"""Sessions: run a plan as onnxruntime.InferenceSession runs a model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np

from onnxmesh.runtime import agreement, loose
from onnxmesh.runtime.binding import Binding, Memory
from onnxmesh.runtime.bound_values import bound_values, check_bound
from onnxmesh.runtime.comm import Array, Communicator
from onnxmesh.runtime.device import Device, HostDevice
from onnxmesh.runtime.dtypes import dtype, ort_type
from onnxmesh.runtime.engine import Engine, Hook
from onnxmesh.runtime.errors import InvalidArgument, PlanError, RunError
from onnxmesh.runtime.loading import LoadReport
from onnxmesh.runtime.notebook import ShownSession
from onnxmesh.runtime.plan import Plan, Port
from onnxmesh.runtime.random_weights import RANDOM
from onnxmesh.runtime.recipe import Fetch
from onnxmesh.runtime.serialize import load
from onnxmesh.runtime.threads import ThreadRanks
from onnxmesh.runtime.validate import validate
from onnxmesh.runtime.views import cut_view, gather_views, join_views

if TYPE_CHECKING:
    from onnxmesh.runtime.cuda.ranks import ProcessRanks

T = TypeVar("T")

Feeds = Mapping[str, Any]

_FIRST = 2
"""Runs that take longer than the ones after them: one launches all for the first time, one captures a CUDA graph."""
_ELSEWHERE = "this session's ranks are other processes"
_OWN = "use one GPU, or one process for each rank with a communicator (torchrun, mpirun)"


@dataclass(frozen=True)
class NodeArg:
    """An input or output: its name, its global shape, and its type as ONNX Runtime writes it.

    A dim that depends on data is None; a sequence, and an optional value, has no dims.
    """

    name: str
    shape: list[int | None]
    type: str


class Session(ShownSession):
    """A plan, ready to run. Use it in a `with`, or close it.

    Without a communicator all ranks run as threads of this process or, on GPUs, as processes that it starts, one for
    each GPU. With one (MPI, NCCL) this process is one rank, and loads only its own shards; all ranks then call `run`
    together.

    Args:
        plan: a plan, or the folder of one.
        device: `cpu`, `cuda`, or as one rank `cuda:1`.
        weights: where the weights are, if not in the plan's folder: a plan's folder, or a function that reads the
            model's initialisers by name. A plan knows where it came from. `random`: small random numbers, for trials.
        communicator: this process's rank.
        timeout: how many seconds ranks wait for each other; a communicator has its own.
        io: `all`: every rank is given the inputs. `root`: only rank 0 is, and only there are outputs.
        hooks: gives for a rank what is to be called after every instruction.
        graph: whether a GPU captures the program in a CUDA graph.

    Attributes:
        plan: what it runs.
        load_report: how many bytes of weights were loaded, and how fast.

    Raises:
        PlanError: the plan is damaged, does not fit the communicator's mesh, or the ranks have different ones.
        RunError: a device that does not exist.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        device: str = "cpu",
        *,
        weights: Fetch | str | Path | None = None,
        communicator: Communicator | None = None,
        timeout: float = 60.0,
        io: Literal["all", "root"] = "all",
        hooks: Callable[[int], Hook] | None = None,
        graph: bool = True,
    ) -> None:
        self._kind, index = parse_device(device)
        if io not in ("all", "root"):
            raise InvalidArgument(f"io is 'all' or 'root', not {io!r}", code="OM5008")
        self.plan = _checked_plan(plan) if isinstance(plan, Plan) else load(plan)
        self.io = io
        self._program = self.plan.programs[0]
        self._values = bound_values(self._program)
        self._communicator = communicator
        self._closed = False
        self._runs = 0
        self._binding: Binding | None = None
        mesh = self.plan.mesh
        if communicator is not None and communicator.mesh != mesh:
            raise PlanError(f"the plan is for the mesh {mesh}, the ranks form {communicator.mesh}", code="OM4201")
        source = self._source(plan, weights)
        self._threads: ThreadRanks | None = None
        self._processes: ProcessRanks | None = None
        self._engines: dict[int, Engine] = {}
        self._device: Device = HostDevice()
        if self._kind == "cuda" and communicator is None:
            communicator = self._use_gpus(source, timeout, graph)
            if communicator is None:
                return
        if self._kind == "cuda":
            self._device = _cuda_device(index, communicator, graph)
        if communicator is None:
            self._threads = ThreadRanks(mesh, timeout)
        self._start(source, hooks)

    @property
    def bound(self) -> Binding | None:
        """The binding whose memory the program uses; None while it uses memory of its own."""
        return self._binding

    def get_inputs(self) -> list[NodeArg]:
        """The inputs, in the order of the model's."""
        return [_node_arg(port) for port in self._program.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """The outputs, in the order of the model's."""
        return [_node_arg(port) for port in self._program.outputs]

    def run(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds | None = None,
        *,
        device_outputs: bool = False,
        stream: Any = None,
    ) -> list[Any]:
        """The named outputs (None: all) for the inputs `feeds`, by name, each whole (its global view).

        Inputs are arrays of NumPy, CuPy, torch, or anything with DLPack or the CUDA array interface. Outputs are
        NumPy's, or with `device_outputs` CuPy's in the session's own memory, good until the next run.

        As one rank of several processes an input may also be this rank's shard, and an output that the plan leaves
        sharded is this rank's shard, unless `io` is `root`; and then ranks other than 0 give no inputs and get an
        empty list.

        Args:
            stream: on a GPU a CUDA stream (CuPy's, torch's, or a pointer). The run then follows what is on it, what
                is put there afterwards follows the run, and `run` returns at once, with `device_outputs`.

        Raises:
            InvalidArgument: a missing or unknown name, a wrong dtype or shape, an array on another device.
            RunError: a rank failed or did not arrive in time.
        """
        self.check_open()
        outputs = self._outputs(output_names)
        stay = device_outputs or stream is not None
        if self._communicator is not None:
            return self.as_rank(lambda comm: self._run_rank(comm, feeds, outputs, stay), stream)
        arrays = self.check(feeds)
        if self._processes is not None:
            if stay:
                raise InvalidArgument(f"{_ELSEWHERE}: outputs come to the host", hint=_OWN, code="OM5009")
            return self._processes.run([port.name for port in outputs], arrays)
        assert self._threads is not None
        with self._device.running(stream):
            self.use(None)
            if self.io == "root":
                return self._threads.run(lambda comm: self._exchange(comm, arrays, outputs))[0]
            self._threads.run(lambda comm: self._compute(comm, arrays, outputs))
        return [self.joined(port) for port in outputs]

    def bind(self, inputs: Feeds, outputs: Mapping[str, Any] | None = None) -> Binding:
        """Fixed memory to run on: inputs are read where they are, and outputs written where they are to be.

        As one rank of several all ranks call it together. See onnxmesh.runtime.binding.

        Args:
            inputs: an array for every input.
            outputs: arrays for some outputs, by name; the others stay in memory of the session's own.

        Raises:
            InvalidArgument: a missing or unknown name, a wrong dtype or shape, an array on another device; or this
                session's ranks are other processes, or its `io` is `root`.
        """
        self.check_open()
        if self._processes is not None or self.io == "root":
            reason = _ELSEWHERE if self._processes is not None else "only rank 0 has inputs"
            raise InvalidArgument(f"{reason}: there is no memory to bind", hint=_OWN, code="OM5007")
        ports = [*self._program.inputs, *(port for port in self._program.outputs if port.name in (outputs or {}))]
        if any(port.is_loose for port in ports):
            raise InvalidArgument(
                "values whose size depends on data have no memory to bind", hint="use run", code="OM5007"
            )
        self._outputs(list(outputs or {}))
        binding = Binding(self, self.check(inputs), outputs or {})
        binding.prepare()
        return binding

    def check(self, feeds: Feeds | None) -> dict[str, Array]:
        """The inputs as arrays, checked as `run` checks them.

        Raises:
            InvalidArgument: a missing or unknown name, a wrong dtype or shape.
        """
        feeds, ports = check_bound(self._values, feeds or {}), {port.name: port for port in self._program.inputs}
        unknown = [name for name in feeds if name not in ports]
        if unknown:
            raise InvalidArgument(f"there is no input {unknown[0]!r}: the inputs are {', '.join(ports)}", code="OM5001")
        missing = [name for name in ports if name not in feeds]
        if missing:
            raise InvalidArgument(f"input {missing[0]!r} is missing: the inputs are {', '.join(ports)}", code="OM5002")
        return {name: self.checked(port, feeds[name], "input") for name, port in ports.items()}

    def checked(self, port: Port, value: Any, what: str) -> Array:
        """An input or output as an array, of the port's dtype and shape, or as one rank of its shard's.

        Raises InvalidArgument.
        """
        if port.is_loose:
            return self._checked_loose(port, value, what)
        try:
            array = self._adopt(value)
        except InvalidArgument as error:
            error.args = (f"{what} {port.name!r}: {error.args[0]}",)
            raise
        own = self._program.buffers[port.buffer].shape
        shapes = (port.shape, own) if self._communicator is not None else (port.shape,)
        if array.dtype != dtype(port.dtype) or array.shape not in shapes:
            raise InvalidArgument(
                f"{what} {port.name!r}: expected {port.dtype}{list(port.shape)}, "
                f"got {array.dtype.name}{list(array.shape)}",
                code="OM5003",
            )
        return array

    def _checked_loose(self, port: Port, value: Any, what: str) -> Any:
        if self.io == "root" or self._processes is not None:
            raise InvalidArgument(
                f"{what} {port.name!r} is {port.dtype}: it cannot be sent to other processes", code="OM5007"
            )
        try:
            return loose.checked(value, port.dtype, port.shape)
        except ValueError as error:
            raise InvalidArgument(f"{what} {port.name!r}: {error}", code="OM5003") from None

    def measure(self, work: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """What every rank that is this session's measures (see onnxmesh.runtime.bench_rank), by rank.

        Raises:
            InvalidArgument: the inputs that `work` names are not the plan's.
            RunError: a rank failed or did not arrive in time.
        """
        from onnxmesh.runtime import bench_rank

        if self._processes is not None:
            return dict(enumerate(self._processes.call({"measure": dict(work)})))
        self.check_open()
        self.use(None)
        self.use(None)
        given = bench_rank.Work.from_json(work)

        def measure(comm: Communicator) -> dict[str, Any]:
            return bench_rank.measure(self.plan, self._engines[comm.rank], comm, self._device, given)

        if self._threads is not None:
            return dict(enumerate(self._threads.run(measure)))
        comm = self._communicator
        assert comm is not None
        try:
            return {comm.rank: measure(comm)}
        except BaseException as error:
            comm.abort(error)
            raise

    def close(self) -> None:
        """End the ranks and let the memory go. May be called again. A given communicator stays open."""
        self._closed = True
        for engine in self._engines.values():
            engine.close()
        self._engines = {}
        if self._processes is not None:
            self._processes.close()
        if self._threads is not None:
            self._threads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for bindings ---------------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        """Where the ranks of this process compute."""
        return self._device

    @property
    def engines(self) -> Mapping[int, Engine]:
        """The engines of this process by rank; empty where the ranks are other processes."""
        return self._engines

    def check_open(self) -> None:
        """Raise RunError if the session is closed."""
        if self._closed:
            raise RunError("the session is closed", code="OM5011")

    def as_rank(self, work: Callable[[Communicator], T], stream: Any = None) -> T:
        """Do one run as one rank of several: its failure ends the others."""
        comm = self._communicator
        assert comm is not None
        try:
            with self._device.running(stream, first=self._runs < _FIRST):
                result = work(comm)
                self._runs += 1
                return result
        except BaseException as error:
            comm.abort(error)
            raise

    @property
    def is_one_rank(self) -> bool:
        """Whether this process is one rank; else all ranks are here, as threads or as processes of its own."""
        return self._communicator is not None

    def on_threads(self, work: Callable[[Communicator], object], stream: Any = None) -> bool:
        """Do `work` on every rank if they are threads of this process; whether they are."""
        if self._threads is None:
            return False
        with self._device.running(stream):
            self._threads.run(work)
        return True

    def use(self, binding: Binding | None) -> bool:
        """Have the engines use a binding's memory, or their own; whether that is a change."""
        if self._binding is binding:
            return False
        own: Memory = [None] * len(self._program.inputs), [None] * len(self._program.outputs)
        with self._device.scope():
            for rank, engine in self._engines.items():
                engine.rebind(*(own if binding is None else binding.memory(rank)))
        self._binding, self._runs = binding, 0
        return True

    def local(self, rank: int, port: Port, array: Array) -> Array:
        """A rank's piece of an input, which may be just that already; a view where it can be."""
        if port.is_loose or array.shape != port.shape:
            return array
        return cut_view(array, port.spec, self.plan.mesh, rank, self._device.xp)

    def joined(self, port: Port) -> np.ndarray:
        """An output's global view, from the memory of all ranks' engines in this process."""
        pieces = {rank: engine.array(port.buffer) for rank, engine in self._engines.items()}
        if port.is_loose:
            return pieces[min(pieces)]
        return np.array(join_views(pieces, port.spec, self.plan.mesh))

    # --- starting -------------------------------------------------------------------------------------------

    def _start(self, source: Fetch | str | Path, hooks: Callable[[int], Hook] | None) -> None:
        """Load this process's ranks; all ranks agree first, and on GPUs they connect afterwards."""
        mesh, own, device = self.plan.mesh, self._communicator, self._device
        if own is not None:
            kind = "random" if source == RANDOM else "the plan's"
            device.agree(own, {**agreement.plan_facts(self.plan), "io": self.io, "weights": kind})
        ranks = range(mesh.size) if own is None else [own.rank]
        start = time.perf_counter()
        try:
            shards = device.load(source, self.plan, [mesh.coordinate(rank) for rank in ranks])
        except Exception as error:
            device.loaded(error)
            raise
        seconds = time.perf_counter() - start
        device.loaded(None)
        self.load_report = LoadReport.of_ranks((sum(x.nbytes for x in some), seconds) for some in shards)
        self._engines = {
            rank: device.engine(self._program, some, self._reach(rank), hooks(rank) if hooks else None)
            for rank, some in zip(ranks, shards)
        }

    def _adopt(self, value: Any) -> Array:
        if self._processes is not None:
            from onnxmesh.runtime.cuda.foreign import as_host_array

            return as_host_array(value)
        return self._device.adopt(value)

    def _source(self, plan: Plan | str | Path, weights: Fetch | str | Path | None) -> Fetch | str | Path:
        if weights is not None:
            return weights
        if not isinstance(plan, Plan):
            return plan
        if plan.source is not None:
            return plan.source
        if self.plan.weights:
            raise PlanError("a plan that is not in a folder has no weights", hint="pass weights=", code="OM4104")
        return _no_weights

    def _use_gpus(self, source: Fetch | str | Path, timeout: float, graph: bool) -> Communicator | None:
        """The communicator of this process if it is to be the only rank; else it starts a process for every rank."""
        from onnxmesh.runtime.cuda.ranks import ProcessRanks
        from onnxmesh.runtime.nccl import NcclCommunicator

        if self.plan.mesh.size == 1:
            self._communicator = NcclCommunicator(self.plan.mesh)
            return self._communicator
        self._processes = ProcessRanks(self.plan, source, timeout, graph)
        self.load_report = self._processes.load_report
        return None

    def _reach(self, rank: int) -> Communicator:
        if self._communicator is not None:
            return self._communicator
        assert self._threads is not None
        return self._threads.communicator(rank)

    def _run_rank(self, comm: Communicator, feeds: Feeds | None, outputs: Sequence[Port], stay: bool) -> list[Any]:
        """One process of several."""
        given = self.io == "all" or comm.rank == 0
        arrays = self.check(feeds) if given else {}
        self.use(None)
        results = self._exchange(comm, arrays, outputs) if self.io == "root" else self._compute(comm, arrays, outputs)
        return results if stay else [self._fetched(port, x) for port, x in zip(outputs, results)]

    def _fetched(self, port: Port, value: Any) -> Any:
        """An output in NumPy's arrays, of the port's dtype (a GPU has some as bytes); sequences item by item."""
        if value is None or isinstance(value, list):
            return value if value is None else [self._fetched(port, item) for item in value]
        array = self._device.get(value)
        return array if port.is_loose or array.dtype == dtype(port.dtype) else array.view(dtype(port.dtype))

    def _exchange(self, comm: Communicator, arrays: Feeds, outputs: Sequence[Port]) -> list[Array]:
        """`io="root"`: inputs come from rank 0, outputs go there."""
        everyone = tuple(range(comm.mesh.size))
        received = {}
        for port in self._program.inputs:
            x = arrays[port.name] if comm.rank == 0 else np.empty(port.shape, dtype(port.dtype))
            received[port.name] = comm.broadcast(self._device.put(x), everyone)
        results = self._compute(comm, received, outputs)
        whole = [gather_views(x, port.spec, comm, self._device.xp) for x, port in zip(results, outputs)]
        return whole if comm.rank == 0 else []

    def _compute(self, comm: Communicator, arrays: Feeds, outputs: Sequence[Port]) -> list[Array]:
        """This rank's views of the outputs, in the engine's memory."""
        inputs = [self.local(comm.rank, port, arrays[port.name]) for port in self._program.inputs]
        engine = self._engines[comm.rank]
        engine.run(inputs)
        return [engine.array(port.buffer) for port in outputs]

    def _outputs(self, names: Sequence[str] | None) -> list[Port]:
        ports = {port.name: port for port in self._program.outputs}
        for name in names or ():
            if name not in ports:
                raise InvalidArgument(f"there is no output {name!r}: the outputs are {', '.join(ports)}", code="OM5001")
        return [ports[name] for name in names] if names is not None else list(ports.values())


def _checked_plan(plan: Plan) -> Plan:
    validate(plan)
    return plan


def parse_device(device: str) -> tuple[str, int | None]:
    """(`cpu` or `cuda`, which GPU of this process if it says so). Raises RunError for any other."""
    kind, colon, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdigit())):
        raise RunError(f"unknown device {device!r}", hint='use device="cpu" or device="cuda"', code="OM5008")
    return kind, int(index) if colon else None


def _cuda_device(index: int | None, communicator: Communicator | None, graph: bool) -> Device:
    """The GPU of this rank: as many as there are on a host, in the order of the ranks on it."""
    from onnxmesh.runtime.cuda.device import CudaDevice, device_count, own_gpu
    from onnxmesh.runtime.nccl import NcclCommunicator

    if not isinstance(communicator, NcclCommunicator):
        raise RunError("ranks on GPUs need an NcclCommunicator", code="OM5008")
    if index is None:
        local_rank = communicator.groups.world.local_rank
        index = own_gpu(local_rank, device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return CudaDevice(index, communicator.groups, graph=graph)


def _no_weights(name: str) -> np.ndarray:
    raise PlanError(f"the plan needs no weights, but {name!r} was asked for", code="OM4104")


def _node_arg(port: Port) -> NodeArg:
    kind = port.dtype if port.is_loose else ort_type(port.dtype)
    return NodeArg(port.name, [None if size < 0 else size for size in port.shape], kind)
