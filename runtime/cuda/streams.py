"""The order of a program's tasks on two streams: computation on the first, what runs beside it on the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.launchers import Launch
from onnxmesh.runtime.plan import Instruction


@dataclass(eq=False)
class Task:
    """A prepared instruction.

    Attributes:
        obstacle: why no CUDA graph can hold it; empty if one can.
        waits: the tasks of the other stream that it follows.
        event: recorded behind it, where a task of the other stream waits for it.
    """

    index: int
    item: Instruction
    launch: Launch
    obstacle: str = ""
    waits: list[Task] = field(default_factory=list)
    event: Any = None


class Streams:
    """A session's stream, and one beside it for collectives under way.

    Args:
        first: the stream of computation.
        apart: whether there is to be a second one; else all runs on the first.
    """

    def __init__(self, first: Any, *, apart: bool = True) -> None:
        self.first = first
        self.current: Task | None = None
        self._apart = apart
        self._second: Any = None
        self._edge = import_cupy().cuda.Event(disable_timing=True)

    def of(self, task: Task) -> Any:
        """The stream of a task."""
        return self._beside() if self._apart and task.item.stream else self.first

    def order(self, tasks: Sequence[Task]) -> None:
        """Note what waits for what across the streams: of each other stream's tasks the last one is enough."""
        for task in tasks:
            other = [i for i in task.item.after if self.of(tasks[i]) is not self.of(task)]
            task.waits = [tasks[max(other)]] if other else []
            for before in task.waits:
                before.event = before.event or import_cupy().cuda.Event(disable_timing=True)

    def run(self, tasks: Sequence[Task], launch: Callable[[Task, int], None]) -> None:
        """Enqueue tasks in their order. They follow what is on the first stream, and it follows all of them."""
        inside = set(tasks)
        apart = any(self.of(task) is not self.first for task in tasks)
        if apart:
            self._edge.record(self.first)
            self._second.wait_event(self._edge)
        for task in tasks:
            self.current = task
            stream = self.of(task)
            for before in task.waits:
                if before in inside:
                    stream.wait_event(before.event)
            with stream:
                launch(task, int(stream.ptr))
            if task.event is not None:
                task.event.record(stream)
        if apart:
            self._edge.record(self._second)
            self.first.wait_event(self._edge)

    def _beside(self) -> Any:
        """The second stream; of a higher priority, so that what is sent does not queue behind computation."""
        if self._second is None:
            self._second = import_cupy().cuda.Stream(non_blocking=True, priority=-1)
        return self._second
