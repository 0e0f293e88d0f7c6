"""Run a plan once, as `onnxmesh run` does: all ranks from this process, or this process as one rank of a job."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np

from onnxmesh.runtime import io as files
from onnxmesh.runtime.comm import Communicator, PeerFailed
from onnxmesh.runtime.errors import OnnxMeshError, PlanError, RunError
from onnxmesh.runtime.loading import LoadReport, plain_read
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import Replicate
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.random_weights import RANDOM
from onnxmesh.runtime.recipe import Fetch
from onnxmesh.runtime.rendezvous import World, find_place
from onnxmesh.runtime.serialize import load
from onnxmesh.runtime.session import Session, parse_device

if TYPE_CHECKING:
    from onnxmesh.runtime.nccl import NcclGroups

LOADING = 300.0
"""Seconds that ranks may take to get ready after each other; one that dies is noticed at once."""
Made = TypeVar("Made")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        inputs: an .npz file or a folder; without it they are random, from `seed`.
        outputs: an .npz file or a folder; without it nothing is written.
        weights: the ONNX file, or another plan's folder, that the weights are read from; else the plan's own.
        random_weights: make small random weights instead.
        graph: whether GPUs capture the program in a CUDA graph.
        repeat: how many times to run.
        plain_read: whether to measure how fast the files of the weights can be read.
    """

    plan: str
    inputs: str | None = None
    seed: int = 0
    outputs: str | None = None
    weights: str | None = None
    io: Literal["all", "root"] = "all"
    timeout: float = 60.0
    device: str = "cpu"
    random_weights: bool = False
    graph: bool = True
    repeat: int = 1
    plain_read: bool = False


@dataclass(frozen=True)
class Result:
    """What came of it, as one rank or the whole process sees it.

    Attributes:
        load_seconds: until all was ready to run.
        run_seconds: of every run.
        load: bytes of weights, and how fast they were loaded.
    """

    rank: int
    ranks: int
    outputs: Mapping[str, np.ndarray]
    load_seconds: float
    run_seconds: Sequence[float]
    load: LoadReport


def run(request: Request) -> Result:
    """Run a plan, once or as often as asked, and write its outputs.

    As a rank of a job all ranks call this. What goes wrong while they get ready is reported by the first rank
    that it happened to; the others leave with its exit code.

    Raises:
        PlanError: the plan is damaged, or its mesh is not that of the job.
        InvalidArgument: the inputs are not those of the plan.
        RunError: a rank failed, or did not arrive in time; or the outputs cannot be written.
    """
    job = find_job(request.device, request.timeout)
    return _run_local(request) if job is None else _run_rank(request, job)


def find_job(device: str, timeout: float) -> Job | None:
    """The job of which this process is a rank, as its launcher says; None if it is on its own.

    Raises:
        RunError: there is no such device, the other ranks cannot be met, or MPI cannot be used.
    """
    if parse_device(device)[0] == "cuda":
        place = find_place()
        return None if place is None else _GpuJob(World(place, timeout))
    return _MpiJob() if launched() else None


def launched() -> bool:
    """Whether an MPI launcher started this process as one of several."""
    sizes = [os.environ[name] for name in _SIZES if name in os.environ]
    return any(size.isdigit() and int(size) > 1 for size in sizes) if sizes else "PMIX_RANK" in os.environ


def weights_source(path: str | Path) -> Fetch | Path:
    """Where `--weights` leads: the folder of a plan, or a reader of an ONNX file."""
    if (Path(path) / "plan.json").is_file():
        return Path(path)
    from onnxmesh.runtime.onnx_weights import onnx_fetch

    return onnx_fetch(path)


def _run_local(request: Request) -> Result:
    start = time.perf_counter()
    plan = load(request.plan)
    with _session(request, plan, None) as session:
        feeds = session.check(_feeds(request, plan))
        ready = time.perf_counter()
        outputs, seconds = _repeat(request, plan, session, feeds)
    _write(request, outputs)
    report = _beside_plain_read(request, plan, session.load_report, range(plan.mesh.size))
    return Result(0, plan.mesh.size, outputs, ready - start, seconds, report)


def _repeat(
    request: Request, plan: Plan, session: Session, feeds: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The outputs, and the seconds of every run."""
    seconds = []
    for _ in range(request.repeat):
        start = time.perf_counter()
        outputs = _named(plan, session.run(None, feeds))
        seconds.append(time.perf_counter() - start)
    return outputs, seconds


def _beside_plain_read(request: Request, plan: Plan, report: LoadReport, ranks: Sequence[int]) -> LoadReport:
    """The report with the speed of a plain read, if that is asked for and there are files."""
    folder = weights_source(request.weights) if request.weights else plan.source
    if not request.plain_read or request.random_weights or not isinstance(folder, Path):
        return report
    return report.beside(plain_read(folder, plan, [plan.mesh.coordinate(rank) for rank in ranks]))


def _run_rank(request: Request, job: Job) -> Result:
    try:
        return _run_as(request, job)
    finally:
        job.close()


def _run_as(request: Request, job: Job) -> Result:
    start = time.perf_counter()

    def make(plan: Plan, communicator: Communicator) -> tuple[Session, dict[str, np.ndarray]]:
        session = _session(request, plan, communicator)
        given = request.io == "all" or job.rank == 0
        return session, session.check(_feeds(request, plan)) if given else {}

    with as_rank(job, request.plan, request.timeout, make) as (plan, (session, feeds)):
        ready, error = time.perf_counter(), None
        outputs, seconds = _repeat(request, plan, session, feeds)
        try:
            _write_rank(request, plan, outputs, job.rank)
        except Exception as caught:
            error = caught
        agree(job, error)
        report = session.load_report
        session.close()
    report = _beside_plain_read(request, plan, report, [job.rank])
    return Result(job.rank, job.size, outputs, ready - start, seconds, report)


@contextmanager
def as_rank(
    job: Job, path: str, timeout: float, make: Callable[[Plan, Communicator], Made]
) -> Iterator[tuple[Plan, Made]]:
    """A plan, and what `make` makes of it as one rank of a job; within, the rank attends to the others.

    All ranks come through together or not at all: see `agree`.
    """
    error: Exception | None = None
    try:
        plan = load(path)
        check_size(plan.mesh, job)
        communicator = job.communicator(plan.mesh, timeout)
    except Exception as caught:
        error = caught
    agree(job, error)
    with job.attend():
        try:
            made = make(plan, communicator)
        except Exception as caught:
            error = caught
        agree(job, error, LOADING)
        yield plan, made
        communicator.close()


def _session(request: Request, plan: Plan, communicator: Communicator | None) -> Session:
    source = RANDOM if request.random_weights else weights_source(request.weights) if request.weights else None
    return Session(
        plan,
        request.device,
        weights=source,
        communicator=communicator,
        timeout=request.timeout,
        io=request.io,
        graph=request.graph,
    )


def _feeds(request: Request, plan: Plan) -> Mapping[str, np.ndarray]:
    if request.inputs is None:
        return files.random_inputs(plan, request.seed)
    return files.read_inputs(request.inputs, plan.programs[0].inputs)


def _named(plan: Plan, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {port.name: array for port, array in zip(plan.programs[0].outputs, arrays)}


def _write(request: Request, outputs: Mapping[str, np.ndarray], path: str | None = None) -> None:
    target = path or request.outputs
    if target is not None:
        files.write_outputs(target, outputs, proto=files.is_proto_folder(request.inputs))


def _write_rank(request: Request, plan: Plan, outputs: Mapping[str, np.ndarray], rank: int) -> None:
    """Rank 0 writes what is whole. With `io="all"` sharded outputs are each rank's own: `Y.rank3.npz`."""
    sharded = any(not isinstance(p, Replicate) for port in plan.programs[0].outputs for _, p in port.spec)
    if request.outputs is not None and sharded and request.io == "all":
        path = Path(request.outputs)
        _write(request, outputs, str(path.with_name(f"{path.stem}.rank{rank}{path.suffix}")))
    elif rank == 0:
        _write(request, outputs)


# --- jobs of several processes --------------------------------------------------------------------------------


class Job(Protocol):
    """The ranks of a job before they have a communicator."""

    rank: int
    size: int
    launcher: str

    def allgather(self, value: Any, within: float = 0.0) -> list[Any]:
        """Every rank's value (JSON data), by rank; `within` so many seconds, or the timeout, where that is known."""
        ...

    def communicator(self, mesh: Mesh, timeout: float) -> Communicator:
        """This rank's communicator; all ranks make theirs together."""
        ...

    def attend(self) -> AbstractContextManager[None]:
        """Within it this process works on what all ranks do together, and ends with them."""
        ...

    def close(self) -> None:
        """Leave the job."""
        ...


class _MpiJob(Job):
    launcher = "MPI"

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library was found
            raise RunError(
                f"MPI is not available: {error}", hint="pip install 'onnxmesh[mpi]'", code="OM5109"
            ) from error
        self._world: Any = MPI.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size

    def allgather(self, value: Any, within: float = 0.0) -> list[Any]:
        return list(self._world.allgather(value))

    def communicator(self, mesh: Mesh, timeout: float) -> Communicator:
        from onnxmesh.runtime.mpi import MpiCommunicator

        return MpiCommunicator(mesh, timeout)

    def attend(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        return None


class _GpuJob(Job):
    launcher = "the launcher"

    def __init__(self, world: World) -> None:
        self._world = world
        self._groups: NcclGroups | None = None
        self.rank, self.size = world.rank, world.size

    def allgather(self, value: Any, within: float = 0.0) -> list[Any]:
        return self._world.allgather(value, within)

    def communicator(self, mesh: Mesh, timeout: float) -> Communicator:
        from onnxmesh.runtime.nccl import NcclCommunicator

        communicator = NcclCommunicator(mesh, self._world)
        self._groups = communicator.groups
        return communicator

    def attend(self) -> AbstractContextManager[None]:
        return nullcontext() if self._groups is None else self._groups.attend()

    def close(self) -> None:
        self._world.close()


def check_size(mesh: Mesh, job: Job) -> None:
    """Raise PlanError unless the job has as many ranks as the plan's mesh."""
    if mesh.size != job.size:
        raise PlanError(
            f"the plan is for the mesh {mesh} of {mesh.size} ranks, but {job.launcher} started {job.size}",
            hint=f"start {mesh.size}, as with mpirun -n {mesh.size}",
            code="OM4201",
        )


def agree(job: Job, error: Exception | None, within: float = 0.0) -> None:
    """Go on only if all ranks can. The first rank with an error raises it; the others leave with its exit code."""
    if isinstance(error, PeerFailed):  # that rank says it, too
        raise error
    try:
        codes = job.allgather(0 if error is None else getattr(error, "exit_code", 1), within)
    except RunError:
        if error is not None:
            raise error from None
        raise
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return
    if error is None or job.rank != failed[0]:
        raise SystemExit(codes[failed[0]])
    if len(failed) < len(codes) and isinstance(error, OnnxMeshError):
        error.args = (f"rank {job.rank}: {error.args[0]}", *error.args[1:])
    raise error
