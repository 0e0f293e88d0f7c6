"""When every instruction of a program starts and ends on the GPU.

The program is captured in a graph together with event records (cudaEventRecordExternal), so that what is measured is
the GPU and not the speed at which Python launches. Where cuda-bindings is missing, or the program cannot be captured,
events are recorded between single launches, and short kernels look longer than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.streams import Streams, Task
from onnxmesh.runtime.engine import InstructionTime

Enqueue = Callable[[Task, int], None]


def profile(
    streams: Streams, tasks: Sequence[Task], launch: Enqueue, synchronize: Callable[[], None], repeat: int
) -> list[InstructionTime]:
    """The median over `repeat` runs, in microseconds from the start of the run. All ranks profile together."""
    cupy = import_cupy()
    cudart = _bindings() if not any(task.obstacle for task in tasks) else None
    begin, *events = (cupy.cuda.Event() for _ in range(2 * len(tasks) + 1))

    def record(event: Any, stream: int) -> None:
        if cudart is None:
            cupy.cuda.runtime.eventRecord(event.ptr, stream)
            return
        (status,) = cudart.cudaEventRecordWithFlags(event.ptr, stream, cudart.cudaEventRecordExternal)
        if int(status):
            raise RuntimeError(f"cudaEventRecordWithFlags: {status}")

    def timed(task: Task, stream: int) -> None:
        record(events[2 * task.index], stream)
        launch(task, stream)
        record(events[2 * task.index + 1], stream)

    def run() -> None:
        record(begin, int(streams.first.ptr))
        streams.run(tasks, timed)

    graph = None
    if cudart is not None:
        synchronize()
        streams.first.begin_capture()
        run()
        graph = streams.first.end_capture()
    times = np.zeros((repeat, 2 * len(tasks)))
    for turn in range(-1, repeat):  # the first turn warms up
        if graph is not None:
            graph.launch(streams.first)
        else:
            run()
        synchronize()
        if turn >= 0:
            times[turn] = [1000 * cupy.cuda.get_elapsed_time(begin, event) for event in events]
    middle = np.median(times, axis=0)
    return [
        InstructionTime(task.index, float(middle[2 * i]), float(middle[2 * i + 1]), task.item.stream)
        for i, task in enumerate(tasks)
    ]


def _bindings() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    return runtime
