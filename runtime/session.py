"""Sessions: run a plan as onnxruntime.InferenceSession runs a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from onnxmesh.runtime.collectives import all_gather
from onnxmesh.runtime.comm import Array, Communicator
from onnxmesh.runtime.device import Device, HostDevice
from onnxmesh.runtime.dtypes import dtype, ort_type
from onnxmesh.runtime.engine import Engine, Hook
from onnxmesh.runtime.errors import InvalidArgument, PlanError, RunError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Partial, Replicate, Shard, join
from onnxmesh.runtime.plan import Plan, Port, Spec
from onnxmesh.runtime.recipe import Fetch, cut_spec
from onnxmesh.runtime.serialize import load, read_weights
from onnxmesh.runtime.threads import ThreadRanks
from onnxmesh.runtime.validate import validate

if TYPE_CHECKING:
    from onnxmesh.runtime.cuda.ranks import ProcessRanks

Feeds = Mapping[str, Any]


@dataclass(frozen=True)
class NodeArg:
    """An input or output: its name, its global shape, and its type as ONNX Runtime writes it."""

    name: str
    shape: list[int]
    type: str


class Session:
    """A plan, ready to run. Use it in a `with`, or close it.

    Without a communicator all ranks run as threads of this process or, on GPUs, as processes that it starts, one for
    each GPU. With one (MPI, NCCL) this process is one rank, and loads only its own shards; all ranks then call `run`
    together.

    Args:
        plan: a plan, or the folder of one.
        device: `cpu`, `cuda`, or as one rank `cuda:1`.
        weights: where the weights are, if not in the plan's folder: a plan's folder, or a function that reads the
            model's initialisers by name. A plan knows where it came from.
        communicator: this process's rank.
        timeout: how many seconds ranks wait for each other at a collective.
        io: `all`: every rank is given the inputs. `root`: only rank 0 is, and only there are outputs.
        hooks: gives for a rank what is to be called after every instruction.

    Raises:
        PlanError: the plan is damaged, or does not fit the communicator's mesh.
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
    ) -> None:
        kind, index = parse_device(device)
        if io not in ("all", "root"):
            raise InvalidArgument(f"io is 'all' or 'root', not {io!r}")
        self.plan = _checked_plan(plan) if isinstance(plan, Plan) else load(plan)
        self.io = io
        self._program = self.plan.programs[0]
        self._communicator = communicator
        self._closed = False
        mesh = self.plan.mesh
        if communicator is not None and communicator.mesh != mesh:
            raise PlanError(f"the plan is for the mesh {mesh}, the ranks form {communicator.mesh}")
        source = self._source(plan, weights)
        self._threads: ThreadRanks | None = None
        self._processes: ProcessRanks | None = None
        self._engines: dict[int, Engine] = {}
        if kind == "cuda" and communicator is None:
            communicator = self._use_gpus(source, timeout)
            if communicator is None:
                return
        self._device = _cuda_device(index, communicator) if kind == "cuda" else HostDevice()
        ranks = range(mesh.size) if communicator is None else [communicator.rank]
        shards = read_weights(source, self.plan, [mesh.coordinate(r) for r in ranks])
        self._threads = ThreadRanks(mesh, timeout) if communicator is None else None
        self._engines = {
            rank: self._device.engine(self._program, own, self._reach(rank), hooks(rank) if hooks else None)
            for rank, own in zip(ranks, shards)
        }

    def get_inputs(self) -> list[NodeArg]:
        """The inputs, in the order of the model's."""
        return [_node_arg(port) for port in self._program.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """The outputs, in the order of the model's."""
        return [_node_arg(port) for port in self._program.outputs]

    def run(self, output_names: Sequence[str] | None, feeds: Feeds | None = None) -> list[np.ndarray]:
        """The named outputs (None: all) for the inputs `feeds`, by name, each whole (its global view).

        As one rank of several processes an output that the plan leaves sharded is this rank's shard, unless `io` is
        `root`; and then ranks other than 0 give no inputs and get an empty list.

        Raises:
            InvalidArgument: a missing or unknown name, a wrong dtype or shape.
            RunError: a rank failed or did not arrive in time.
        """
        if self._closed:
            raise RunError("the session is closed")
        outputs = self._outputs(output_names)
        if self._communicator is not None:
            return self._run_rank(self._communicator, feeds, outputs)
        arrays = self.check(feeds)
        if self._processes is not None:
            return self._processes.run([port.name for port in outputs], arrays)
        assert self._threads is not None
        if self.io == "root":
            return self._threads.run(lambda comm: self._exchange(comm, arrays, outputs))[0]
        self._threads.run(lambda comm: self._compute(comm, arrays, outputs))
        return [self._joined(port) for port in outputs]

    def check(self, feeds: Feeds | None) -> dict[str, np.ndarray]:
        """The inputs as arrays, checked as `run` checks them.

        Raises:
            InvalidArgument: a missing or unknown name, a wrong dtype or shape.
        """
        feeds, ports = feeds or {}, {port.name: port for port in self._program.inputs}
        unknown = [name for name in feeds if name not in ports]
        if unknown:
            raise InvalidArgument(f"there is no input {unknown[0]!r}: the inputs are {', '.join(ports)}")
        missing = [name for name in ports if name not in feeds]
        if missing:
            raise InvalidArgument(f"input {missing[0]!r} is missing: the inputs are {', '.join(ports)}")
        return {name: _checked(port, feeds[name]) for name, port in ports.items()}

    def measure(self, work: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """What every rank that is this session's measures (see onnxmesh.runtime.bench_rank), by rank.

        Raises:
            InvalidArgument: the inputs that `work` names are not the plan's.
            RunError: a rank failed or did not arrive in time.
        """
        from onnxmesh.runtime import bench_rank

        if self._processes is not None:
            return dict(enumerate(self._processes.call({"measure": dict(work)})))
        given = bench_rank.Work.from_json(work)

        def measure(comm: Communicator) -> dict[str, Any]:
            return bench_rank.measure(self.plan, self._engines[comm.rank], comm, self._device, given)

        if self._threads is not None:
            return dict(enumerate(self._threads.run(measure)))
        assert self._communicator is not None
        return {self._communicator.rank: measure(self._communicator)}

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

    def _source(self, plan: Plan | str | Path, weights: Fetch | str | Path | None) -> Fetch | str | Path:
        if weights is not None:
            return weights
        if not isinstance(plan, Plan):
            return plan
        if plan.source is not None:
            return plan.source
        if self.plan.weights:
            raise PlanError("a plan that is not in a folder has no weights", hint="pass weights=")
        return _no_weights

    def _use_gpus(self, source: Fetch | str | Path, timeout: float) -> Communicator | None:
        """The communicator of this process if it is to be the only rank; else it starts a process for every rank."""
        from onnxmesh.runtime.cuda.ranks import ProcessRanks
        from onnxmesh.runtime.nccl import NcclCommunicator

        if self.plan.mesh.size == 1:
            self._communicator = NcclCommunicator(self.plan.mesh)
            return self._communicator
        self._processes = ProcessRanks(self.plan, source, timeout)
        return None

    def _reach(self, rank: int) -> Communicator:
        if self._communicator is not None:
            return self._communicator
        assert self._threads is not None
        return self._threads.communicator(rank)

    def _run_rank(self, comm: Communicator, feeds: Feeds | None, outputs: Sequence[Port]) -> list[np.ndarray]:
        """One process of several: its failure ends the others."""
        try:
            given = self.io == "all" or comm.rank == 0
            arrays = self.check(feeds) if given else {}
            with self._device.scope():
                if self.io == "root":
                    return self._exchange(comm, arrays, outputs)
                return [self._device.get(x) for x in self._compute(comm, arrays, outputs)]
        except BaseException as error:
            comm.abort(error)
            raise

    def _exchange(self, comm: Communicator, arrays: Feeds, outputs: Sequence[Port]) -> list[np.ndarray]:
        """`io="root"`: inputs come from rank 0, outputs go there."""
        everyone = tuple(range(comm.mesh.size))
        received = {}
        for port in self._program.inputs:
            x = arrays[port.name] if comm.rank == 0 else np.empty(port.shape, dtype(port.dtype))
            received[port.name] = comm.broadcast(self._device.put(x), everyone)
        results = self._compute(comm, received, outputs)
        whole = [_gathered(x, port.spec, comm, self._device.xp) for x, port in zip(results, outputs)]
        return [self._device.get(x) for x in whole] if comm.rank == 0 else []

    def _compute(self, comm: Communicator, arrays: Feeds, outputs: Sequence[Port]) -> list[Array]:
        """This rank's views of the outputs, in the engine's memory."""
        coordinate = comm.mesh.coordinate(comm.rank)
        inputs = [cut_spec(arrays[port.name], port.spec, comm.mesh, coordinate) for port in self._program.inputs]
        engine = self._engines[comm.rank]
        engine.run(inputs)
        return [engine.array(port.buffer) for port in outputs]

    def _joined(self, port: Port) -> np.ndarray:
        """An output's global view, from the memory of all ranks' engines."""
        pieces = {rank: engine.array(port.buffer) for rank, engine in self._engines.items()}
        return np.array(_join_spec(pieces, 0, port.spec, self.plan.mesh))

    def _outputs(self, names: Sequence[str] | None) -> list[Port]:
        ports = {port.name: port for port in self._program.outputs}
        for name in names or ():
            if name not in ports:
                raise InvalidArgument(f"there is no output {name!r}: the outputs are {', '.join(ports)}")
        return [ports[name] for name in names] if names is not None else list(ports.values())


def _checked_plan(plan: Plan) -> Plan:
    validate(plan)
    return plan


def parse_device(device: str) -> tuple[str, int | None]:
    """(`cpu` or `cuda`, which GPU of this process if it says so). Raises RunError for any other."""
    kind, colon, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdigit())):
        raise RunError(f"unknown device {device!r}", hint='use device="cpu" or device="cuda"')
    return kind, int(index) if colon else None


def _cuda_device(index: int | None, communicator: Communicator | None) -> Device:
    """The GPU of this rank: as many as there are on a host, in the order of the ranks on it."""
    from onnxmesh.runtime.cuda.device import CudaDevice
    from onnxmesh.runtime.nccl import NcclCommunicator

    if not isinstance(communicator, NcclCommunicator):
        raise RunError("ranks on GPUs need an NcclCommunicator")
    own = communicator.groups.world.local_rank if index is None else index
    return CudaDevice(own, communicator.groups)


def _no_weights(name: str) -> np.ndarray:
    raise PlanError(f"the plan needs no weights, but {name!r} was asked for")


def _node_arg(port: Port) -> NodeArg:
    return NodeArg(port.name, list(port.shape), ort_type(port.dtype))


def _checked(port: Port, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype != dtype(port.dtype) or array.shape != port.shape:
        raise InvalidArgument(
            f"input {port.name!r}: expected {port.dtype}{list(port.shape)}, got {array.dtype.name}{list(array.shape)}"
        )
    return array


def _join_spec(pieces: Mapping[int, np.ndarray], rank: int, spec: Spec, mesh: Mesh) -> np.ndarray:
    """The global tensor from the pieces by rank: undoes the cuts, the last axis's first."""
    if not spec:
        return pieces[rank]
    (axis, placement), rest = spec[0], spec[1:]
    if isinstance(placement, Replicate):
        return _join_spec(pieces, rank, rest, mesh)
    parts = [_join_spec(pieces, other, rest, mesh) for other in mesh.group(rank, axis)]
    return join(parts, placement, np)


def _gathered(x: Array, spec: Spec, comm: Communicator, xp: Any) -> Array:
    """The same by sending: every rank gets the global tensor."""
    for axis, placement in reversed(spec):
        if isinstance(placement, Shard):
            x = all_gather(x, axis, placement, comm, xp)
        elif isinstance(placement, Partial):
            x = comm.all_reduce(x, axis, placement.op)
    return x
