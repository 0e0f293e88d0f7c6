"""Generated CUDA kernels, run on the CPU (see cuda_on_host.py), give what the generic kernels give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import codegen_more_cases as more
import cuda_on_host
import numpy as np
import pytest
from codegen_cases import Case, elementwise_ops, expressions, of_samples

from onnxmesh.runtime.cuda.codegen import compiling, launching, moving, rows  # noqa: F401  (register)
from onnxmesh.runtime.cuda.codegen.operand import Source
from onnxmesh.runtime.cuda.launchers import _LAUNCHERS, Job, Launch, Workspace, prepare

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="needs g++ to run CUDA kernels on a CPU")

OURS = frozenset(op for op, found in _LAUNCHERS.items() if any("codegen" in function.__module__ for function in found))
"""The ops with a generated kernel."""


class Host:
    """Stands in for a GPU: launches are collected, compiled together, and then run."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self._library: cuda_on_host.Library | None = None

    def enqueue(self, source: Source, addresses: Sequence[int]) -> Launch:
        """As `compiling.enqueue`."""
        self.sources.append(source)

        def launch(stream: int) -> None:
            assert self._library is not None
            self._library.launch(source, addresses)

        return launch

    def compile(self, folder: Path) -> None:
        """Make what has been enqueued runnable."""
        self._library = cuda_on_host.compiled(self.sources, folder)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(compiling, "enqueue", host.enqueue)
    return host


def arrays(case: Case) -> tuple[tuple[np.ndarray | None, ...], tuple[np.ndarray, ...]]:
    return tuple(None if x is None else x.values for x in case.ins), tuple(x.values for x in case.outs)


def job(case: Case) -> Job:
    ins, outs = arrays(case)
    return Job(case.op, case.attrs, ins, outs, (False,) * len(ins), case.coordinate, Workspace())


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "samples": lambda: of_samples(OURS),
    "elementwise": elementwise_ops,
    "expressions": lambda: expressions(80),
    "norms": more.norms,
    "fused norms": more.fused_norms,
    "rotary": more.rotaries,
    "copies": more.copies,
    "indexed": more.indexed,
    "reductions": more.reductions,
    "merges": more.merges,
}
DECLINED = {
    "samples": {"ReduceMean", "LayerNormalization", "RMSNormalization", "Pad", "ReduceLogSumExp", "Acosh"},
}
"""Ops of which a group may hold cases that are left to the generic kernel."""


@pytest.mark.parametrize("group", GROUPS)
def test_generated_kernels_give_what_the_generic_ones_give(group: str, host: Host, tmp_path: Path) -> None:
    cases = list(GROUPS[group]())
    launches = [prepare(job(case)) for case in cases]
    left = [str(case) for case, launch in zip(cases, launches) if launch is None]
    assert [text for text in left if text.split()[0] not in DECLINED.get(group, ())] == []
    host.compile(tmp_path)
    for case, launch in zip(cases, launches):
        if launch is not None:
            launch(0)
            case.check([x.values for x in case.outs])
