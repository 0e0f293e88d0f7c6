"""What one rank does for a benchmark: run the plan many times on its own device, and time every instruction.

The inputs lie on the device before the first run, and outputs stay there.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from onnxmesh.runtime import footprint, timeline
from onnxmesh.runtime import io as files
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.device import Device
from onnxmesh.runtime.engine import Engine
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.recipe import cut_spec

Json = dict[str, Any]
_PROFILED = 5
"""Runs of the profile; its times are their medians."""


@dataclass(frozen=True)
class Work:
    """What to do.

    Attributes:
        runs: timed runs.
        warmup: runs before them; a GPU captures its program in the second.
        inputs: an .npz file or a folder; without it they are random, from `seed`.
    """

    runs: int = 50
    warmup: int = 5
    inputs: str | None = None
    seed: int = 0

    def to_json(self) -> Json:
        """As JSON data, for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` made."""
        return cls(**value)


def measure(plan: Plan, engine: Engine, rank: Communicator, device: Device, work: Work) -> Json:
    """This rank's part of a benchmark, as JSON data; all ranks measure together.

    `latencies_us` are from the call to the end on the device, each run after a barrier; `back_to_back_us` is the mean
    of runs that are enqueued at once.

    Raises as Engine.run.
    """
    with device.scope():
        inputs = _inputs(plan, rank, device, work)
    with device.running(first=True):
        engine.run(inputs)
    for _ in range(work.warmup - 1):
        with device.running(first=True):
            engine.run_bound()
    latencies = [_once(engine, rank, device) for _ in range(work.runs)]
    together = _together(engine, rank, device, work.runs)
    _meet(rank, device)
    times = engine.profile(_PROFILED)
    return {
        "latencies_us": latencies,
        "back_to_back_us": together,
        "timeline": timeline.to_json(times),
        "memory": _memory(plan, engine),
        "allocated_bytes": _allocated(plan, engine, device),
        "graph": _graph(engine),
        "device": _device_name(device),
    }


def _inputs(plan: Plan, rank: Communicator, device: Device, work: Work) -> list[Any]:
    """This rank's pieces of the inputs, on its device."""
    ports = plan.programs[0].inputs
    arrays = files.read_inputs(work.inputs, ports) if work.inputs else files.random_inputs(plan, work.seed)
    coordinate = plan.mesh.coordinate(rank.rank)
    return [device.put(cut_spec(arrays[port.name], port.spec, plan.mesh, coordinate)) for port in ports]


def _once(engine: Engine, rank: Communicator, device: Device) -> float:
    _meet(rank, device)
    start = time.perf_counter()
    with device.running():
        engine.run_bound()
    return 1e6 * (time.perf_counter() - start)


def _together(engine: Engine, rank: Communicator, device: Device, runs: int) -> float:
    _meet(rank, device)
    start = time.perf_counter()
    with device.running(first=True):
        for _ in range(runs):
            engine.run_bound()
    return 1e6 * (time.perf_counter() - start) / runs


def _meet(rank: Communicator, device: Device) -> None:
    """Until all ranks are here, and idle."""
    with device.scope():
        rank.barrier()


def _memory(plan: Plan, engine: Engine) -> dict[str, int]:
    """Bytes by what they hold: as a GPU's engine counts them, or as the plan says."""
    count = getattr(engine, "memory", None)
    return dict(count()) if count is not None else footprint.by_kind(plan)


def _allocated(plan: Plan, engine: Engine, device: Device) -> int:
    """The most bytes that were held: what a session took from its GPU; on a host what the process took."""
    pool, memory = getattr(device, "pool", None), _memory(plan, engine)
    if pool is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with device.scope():  # a pool counts by device
        scratch, total = memory.pop("scratch", 0), int(pool.total_bytes())
    if total < sum(memory.values()):  # an arena that the GPUs map into each other is not of the pool
        total += memory["arena"]
    return total + scratch


def _graph(engine: Engine) -> Json | None:
    """How much of the program is in CUDA graphs; None on a host."""
    if not hasattr(engine, "captured"):
        return None
    return {
        "captured": bool(engine.captured),
        "not_captured": list(getattr(engine, "not_captured", ())),
        "generic": list(getattr(engine, "generic", ())),
    }


def _device_name(device: Device) -> str:
    if not hasattr(device, "pool"):
        return "cpu"
    from onnxmesh.runtime.cuda.device import import_cupy

    name = import_cupy().cuda.runtime.getDeviceProperties(import_cupy().cuda.runtime.getDevice())["name"]
    return str(name.decode() if isinstance(name, bytes) else name)
