"""The test suite of the standard (onnx.backend.test), run by its own runner over onnxmesh.backend."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

from onnxmesh.backend.interface import prepare
from onnxmesh.backend.processes import spread
from onnxmesh.backend.rep import Rep
from onnxmesh.compiler.errors import ModelError
from onnxmesh.runtime.plan import Plan

KINDS = {
    "OnnxBackendNodeModelTest": "node",
    "OnnxBackendSimpleModelTest": "simple",
    "OnnxBackendPyTorchConvertedModelTest": "pytorch-converted",
    "OnnxBackendPyTorchOperatorModelTest": "pytorch-operator",
    "OnnxBackendRealModelTest": "light",
}
"""The runner's classes of tests, and how we call them; the real models that onnx brings are the light ones."""

Status = Literal["native", "hosted", "folded", "fallback", "failed", "unsupported"]
PASSED: tuple[Status, ...] = ("native", "hosted", "folded", "fallback")
_SUFFIX = "_cpu"
_LONGEST = 240


@dataclass(frozen=True)
class Outcome:
    """What one test showed.

    Attributes:
        kind: one of the values of `KINDS`.
        domain: of the model's nodes: `ai.onnx`, or the other one that it uses.
        status: passed, `native`ly, `hosted` (a kernel of ours ran on the host beside a GPU), `folded` (nothing was left
            to run), or by the `fallback` to onnx.reference; or `failed`, or refused as `unsupported`.
        ops: those that the fallback computed.
        reason: of a failure.
    """

    name: str
    kind: str
    domain: str
    status: Status
    ops: tuple[str, ...] = ()
    reason: str = ""


def names() -> dict[str, str]:
    """The kind of every test by its name, in the order of kinds and names."""
    return {name: kind for name, (kind, _) in _tests().items()}


def run(wanted: Iterable[str], device: str = "CPU", processes: int | None = None) -> list[Outcome]:
    """Run tests on a device (see `supports_device`) in several processes; the outcomes are in the order of `wanted`."""
    listed = list(wanted)
    processes = min(processes or os.cpu_count() or 1, max(len(listed), 1))
    if processes == 1:
        return [run_one(name, device) for name in listed]
    _tests()  # the processes inherit them
    return spread(partial(run_one, device=device), listed, processes, _died)


def run_one(name: str, device: str = "CPU") -> Outcome:
    """Run one test."""
    kind, test = _tests()[name]
    with _quiet(), _BACKEND.on(device) as seen:
        try:
            test(None)
        except (Exception, unittest.SkipTest) as error:
            status: Status = "unsupported" if isinstance(error, ModelError) else "failed"
            return Outcome(name, kind, seen.domain, status, reason=_reason(error))
    ops = tuple(sorted({op for run in seen.runs for op in fallback_ops(run.plan)}))
    return Outcome(name, kind, seen.domain, "fallback" if ops else _way(seen.runs), ops)


def _way(runs: Sequence[Run]) -> Status:
    """How a test passed that needed no fallback."""
    if any(run.on_host for run in runs):
        return "hosted"
    left = any(program.instructions for run in runs for program in run.plan.programs)
    return "native" if left or not runs else "folded"


def runs(name: str) -> list[Run]:
    """What a test runs on one rank; the runs that end well, whatever the test then thinks of their outputs."""
    _, test = _tests()[name]
    with _quiet(), _BACKEND.on("CPU") as seen, contextlib.suppress(Exception, unittest.SkipTest):
        test(None)
    return seen.runs


def _died(name: str, code: int | None) -> Outcome:
    return Outcome(name, names()[name], "", "failed", reason=f"its process ended with exit code {code}")


def fallback_ops(plan: Plan) -> list[str]:
    """The ops of a plan that onnx.reference computes."""
    return sorted({str(entry["op"]) for entry in plan.report.get("fallback", ())})


# --- the runner and its backend -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a model, and what it gave."""

    rep: Rep
    plan: Plan
    inputs: Any
    outputs: tuple[Any, ...]
    on_host: Sequence[str] = ()


@dataclass
class _Seen:
    """What the running test asked for."""

    device: str
    domain: str = ""
    runs: list[Run] = field(default_factory=list)


class _Recorder:
    """A prepared model that keeps its runs."""

    def __init__(self, rep: Rep, runs: list[Run]) -> None:
        self._rep, self._runs = rep, runs

    def run(self, inputs: Any) -> tuple[Any, ...]:
        outputs = self._rep.run(inputs)
        assert self._rep.plan is not None
        self._runs.append(Run(self._rep, self._rep.plan, inputs, outputs, self._rep.on_host))
        return outputs


class _Backend:
    """onnxmesh.backend as the runner is given it, on a device that the runner has no name for."""

    def __init__(self) -> None:
        self._seen = _Seen("CPU")
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def on(self, device: str) -> Iterator[_Seen]:
        """Prepare models for `device`, and close them afterwards."""
        self._seen = _Seen(device)
        with self._stack:
            yield self._seen

    def prepare(self, model: Any, _: str, **__: Any) -> _Recorder:
        self._seen.domain = _domain(model)
        return _Recorder(self._stack.enter_context(prepare(model, self._seen.device)), self._seen.runs)

    def is_compatible(self, _: Any) -> bool:
        return True  # what is not says why when it is prepared

    def supports_device(self, device: str) -> bool:
        return device == "CPU"


_BACKEND = _Backend()


@cache
def _tests() -> dict[str, tuple[str, Callable[[None], None]]]:
    """Kind and function of every test by its name."""
    import onnx.backend.test

    with _quiet():
        classes = onnx.backend.test.BackendTest(_BACKEND).test_cases
    return {
        name.removesuffix(_SUFFIX): (kind, vars(classes[title])[name])
        for title, kind in KINDS.items()
        for name in sorted(vars(classes[title]))
        if name.startswith("test_") and name.endswith(_SUFFIX)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, nothing printed, and what the runner writes goes to a folder that does not stay."""
    with tempfile.TemporaryDirectory(prefix="onnxmesh-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, os.environ["ONNX_MODELS"] = os.environ.get("ONNX_MODELS"), folder
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            del os.environ["ONNX_MODELS"]
            if before is not None:
                os.environ["ONNX_MODELS"] = before


def _domain(model: Any) -> str:
    domains = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    return min(domains, default="ai.onnx")


def _reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    if not isinstance(error, ModelError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
