"""Choosing a mesh: every division of so many ranks, compiled without weights and compared by its prediction."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from onnxmesh.compiler import api
from onnxmesh.compiler.errors import ModelError, ShardingError
from onnxmesh.compiler.options import CP_STRATEGIES, CpStrategy, Options, Precision
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.notebook import Facts, Shown
from onnxmesh.runtime.profile import load as load_profile
from onnxmesh.runtime.text import micros, size

FORMAT = 1
SHOWN = 8
"""Estimates that a console or a notebook shows."""

Told = Callable[[int, int], None]
"""Called with how many candidates are done, and how many there are."""


@dataclass(frozen=True)
class Candidate:
    """A mesh, and how self-attention runs on its cp axis (`auto` where there is none)."""

    mesh: Mesh
    cp_strategy: CpStrategy = "auto"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `onnxmesh.compile` that ask for it."""
        return {**dict(self.mesh.axes), "cp_strategy": self.cp_strategy}

    def __str__(self) -> str:
        axes = " x ".join(f"{axis}={ranks}" for axis, ranks in self.mesh.axes if ranks > 1)
        return f"{axes or '1 rank'}{'' if self.cp_strategy == 'auto' else f' {self.cp_strategy}'}"


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """What a candidate is predicted to take; only `reason` where it cannot be compiled.

    Attributes:
        reason: why it is out of the question; empty if it is not.
        total_us, compute_us, communication_us, hidden_us: predicted microseconds of a run; hidden is what of
            communication runs beside computation.
        device_bytes: of memory on each rank's GPU.
        bytes_sent: by one rank in a run.
        weight_share, flops_share: a rank's, of the whole model.
        replicated: how many nodes every rank computes whole.
    """

    candidate: Candidate
    reason: str = ""
    total_us: float = float("inf")
    compute_us: float = 0.0
    communication_us: float = 0.0
    hidden_us: float = 0.0
    device_bytes: int = 0
    bytes_sent: int = 0
    weight_share: float = 1.0
    flops_share: float = 1.0
    replicated: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON data; the times are missing where it cannot be compiled."""
        axes = dict(self.candidate.mesh.axes)
        head = {"mesh": axes, "cp_strategy": self.candidate.cp_strategy, "reason": self.reason}
        if self.total_us == float("inf"):
            return head
        return head | {name: value for name, value in vars(self).items() if name not in ("candidate", "reason")}

    def _facts(self) -> tuple[str, Facts]:
        return f"Estimate of {self.candidate}", [("", self._text)]

    @property
    def _text(self) -> str:
        return self.reason or f"{micros(self.total_us)}, {size(self.device_bytes)} a rank"


@dataclass(frozen=True, repr=False)
class Choice(Shown):
    """Candidates compared.

    Attributes:
        ranks: how many there are to divide.
        alone: one rank.
        estimates: the best first; those that are out of the question come last.
    """

    ranks: int
    alone: Estimate
    estimates: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate:
        """The fastest of those that can be.

        Raises:
            ShardingError: there is none.
        """
        if not self.estimates or self.estimates[0].reason:
            reasons = "; ".join(f"{item.candidate}: {item.reason}" for item in self.estimates)
            raise ShardingError(
                f"no division of {self.ranks} ranks will do: {reasons or 'there is none'}",
                hint="give each rank more memory, or take another number of ranks",
                code="OM2004",
            )
        return self.estimates[0]

    @property
    def warning(self) -> str:
        """Where one rank is predicted to be no slower than all of them; else empty."""
        best = self.estimates[0] if self.estimates else self.alone
        if best is self.alone or best.reason or self.alone.reason or best.total_us < self.alone.total_us:
            return ""
        return (
            f"{self.ranks} ranks are predicted slower than one: {best.total_us:.0f} us as {best.candidate} against "
            f"{self.alone.total_us:.0f} us"
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        found = [item.to_json() for item in self.estimates]
        return {
            "format": FORMAT,
            "ranks": self.ranks,
            "one_rank": self.alone.to_json(),
            "estimates": found,
            "warning": self.warning,
        }

    def _facts(self) -> tuple[str, Facts]:
        shown = self.estimates[:SHOWN]
        return f"Choice for {self.ranks} ranks", [(str(item.candidate), item._text) for item in shown]


def candidates(ranks: int) -> Iterator[Candidate]:
    """Every way to write `ranks` as dp x cp x tp, with every strategy on cp; one for a single rank."""
    for tp in _divisors(ranks):
        for cp in _divisors(ranks // tp):
            mesh = Mesh.of(tp=tp, cp=cp, dp=ranks // tp // cp)
            strategies: tuple[CpStrategy, ...] = CP_STRATEGIES[1:] if cp > 1 else ("auto",)
            yield from (Candidate(mesh, strategy) for strategy in strategies)


def estimate(
    model: api.Source,
    ranks: int,
    *,
    memory_per_rank: float | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    values: Mapping[str, Any] | None = None,
    cp_strategy: CpStrategy = "auto",
    profile: str | os.PathLike[str] | None = None,
    precision: Precision = "model",
    jobs: int = 1,
) -> Choice:
    """Compare every division of `ranks` into dp x cp x tp by its predicted time; nothing is written::

        choice = onnxmesh.estimate("model.onnx", ranks=8)
        plan = onnxmesh.compile("model.onnx", **choice.best.candidate.arguments)

    Args:
        memory_per_rank: bytes that a rank's GPU has; a division that needs more is out of the question.
        cp_strategy: the only one tried on cp, unless it is `auto`.
        jobs: processes, for a model in a file. They are spawned, so the main program must be one that can be imported.
        shapes, dims, values, profile, precision: as of `onnxmesh.compile`.

    Raises:
        ModelError: the model cannot be read, is not valid, leaves a dim unbound, or was sharded by another tool.
    """
    device = None if profile is None else load_profile(profile)
    options = Options(
        Mesh.of(), shapes or {}, dims or {}, cp_strategy, profile=device, precision=precision, values=values or {}
    )
    return compare(model, options, ranks, memory=memory_per_rank, jobs=jobs)


def compare(
    model: api.Source,
    options: Options,
    ranks: int,
    *,
    memory: float | None = None,
    jobs: int = 1,
    told: Told | None = None,
) -> Choice:
    """As `estimate`, with the options of a compile, of which the mesh is not looked at.

    Args:
        told: called whenever a candidate is done.
    """
    begun = api.begin(model, replace(options, mesh=Mesh.of()))
    if begun.imported is not None:
        raise ModelError(
            "the model holds collectives: its division is given", hint="compile it as it is", code="OM1407"
        )
    if ranks == 1:
        alone = _estimated(begun, Candidate(Mesh.of()), memory)
        return Choice(ranks, alone, (alone,))
    wanted = [c for c in candidates(ranks) if options.cp_strategy in ("auto", c.cp_strategy) or c.cp_strategy == "auto"]
    alone = _estimated(begun, Candidate(Mesh.of()), memory)
    if min(jobs, len(wanted)) > 1 and isinstance(model, str | os.PathLike):
        found = _beside(model, begun.options, wanted, memory, min(jobs, len(wanted)), told)
    else:
        found = _in_turn(begun, wanted, memory, told)
    place = {candidate: number for number, candidate in enumerate(wanted)}
    found.sort(key=lambda item: (bool(item.reason), item.total_us, place.get(item.candidate, 0)))
    return Choice(ranks, alone, tuple(found))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _in_turn(
    begun: api.Compilation, wanted: Sequence[Candidate], memory: float | None, told: Told | None
) -> list[Estimate]:
    found = []
    for candidate in wanted:
        found.append(_estimated(begun, candidate, memory))
        if told is not None:
            told(len(found), len(wanted))
    return found


def _estimated(begun: api.Compilation, candidate: Candidate, memory: float | None) -> Estimate:
    options = replace(begun.options, mesh=candidate.mesh, cp_strategy=candidate.cp_strategy)
    try:
        plan = api.finish(begun, options).plan
    except ShardingError as error:
        return Estimate(candidate, str(error.args[0]))
    assert plan is not None
    time, rank = plan.report["time"], plan.report["rank"]
    needed, reason = int(rank["device_bytes"]), ""
    if memory is not None and needed > memory:
        reason = f"a rank needs {size(needed)}, it has {size(memory)}"
    return Estimate(
        candidate,
        reason,
        time["total_us"],
        time["compute_us"],
        time["communication_us"],
        time["hidden_us"],
        needed,
        sum(item["bytes"] for item in plan.report["collectives"]),
        rank["weight_share"],
        rank["flops_share"],
        len(plan.report["replicated"]),
    )


# --- in other processes -------------------------------------------------------------------------------------

_BEGUN: list[api.Compilation] = []
"""What a helping process began with."""


def _beside(
    model: str | os.PathLike[str],
    options: Options,
    wanted: Sequence[Candidate],
    memory: float | None,
    jobs: int,
    told: Told | None,
) -> list[Estimate]:
    """The estimates, in the order in which they were done. Each process reads the model once."""
    found = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (model, options)) as pool:
        # Those with most to solve first.
        futures: list[Future[Estimate]] = [
            pool.submit(_help, candidate, memory) for candidate in sorted(wanted, key=_axes, reverse=True)
        ]
        for future in as_completed(futures):
            found.append(future.result())
            if told is not None:
                told(len(found), len(wanted))
    return found


def _axes(candidate: Candidate) -> int:
    return sum(ranks > 1 for _, ranks in candidate.mesh.axes)


def _begin(model: api.Source, options: Options) -> None:
    _BEGUN.append(api.begin(model, options))


def _help(candidate: Candidate, memory: float | None) -> Estimate:
    return _estimated(_BEGUN[0], candidate, memory)
