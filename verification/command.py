"""The body of `onnxmesh verify` where more is asked than the outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from onnxmesh.compiler.verification import Verification
from onnxmesh.runtime import launch
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.serialize import load
from onnxmesh.verification.bug_report import keep_in, save, to_json
from onnxmesh.verification.each import Examination, examine
from onnxmesh.verification.memory import give_back_at_once
from onnxmesh.verification.model import Model
from onnxmesh.verification.pairs import Run, compare_runs
from onnxmesh.verification.reduce import options_of, reduce
from onnxmesh.verification.replay import suspects
from onnxmesh.verification.text import examination


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        plan: of `model`, on disk or just compiled.
        weights: where the plan's are, if not where it came from.
        each: compare every tensor.
        other: a second plan, to compare the first with.
        reduced: a file for the smallest part of the model that fails.
        folder: for what a bug report needs of the first difference.
    """

    plan: Plan
    model: str
    feeds: Mapping[str, np.ndarray]
    weights: Any = None
    device: str = "cpu"
    each: bool = False
    other: str | None = None
    reduced: str | None = None
    folder: str | None = None
    tolerance: float | None = None
    quiet: bool = False
    as_json: bool = False

    @property
    def is_pair(self) -> bool:
        """Whether two runs are compared with each other, not one with the model."""
        return self.other is not None or self.device != "cpu"


def compare_pair(request: Request) -> Verification:
    """Compare two plans, or one on GPUs with itself on the host's ranks."""
    other = request.plan if request.other is None else load(request.other)
    stored = all(weight.shards for weight in other.weights)
    weights = request.weights if request.other is None or stored else launch.weights_source(request.model)
    name = "the same plan on the host" if request.other is None else str(request.other)
    return compare_runs(
        Run(request.plan, request.weights, request.device),
        Run(other, weights, name=name),
        request.feeds,
        model=Model(request.model) if request.each else None,
        tolerance=request.tolerance,
    )


def compare_each(request: Request) -> Examination:
    """Compare every tensor, print what was found, and write what was asked for."""
    give_back_at_once()
    model = Model(request.model)
    folder = request.folder or f"{Path(request.model).stem}.wrong"
    result = examine(request.plan, model, request.feeds, weights=request.weights, keep=keep_in(folder))
    first = result.differences[0] if result.differences else None
    saved = None
    if first is not None:
        check = first.check
        result.suspects = suspects(request.plan, request.feeds, check.tensor, check.anchors.values(), request.weights)
        saved = save(first, model, result.suspects, folder)
    if request.as_json:
        found = [to_json(item, result.suspects if item is first else ()) for item in result.differences]
        reasons = dict(result.reasons)
        data = {"compared": len(result.compared), "skipped": reasons, "float64": result.exact, "differences": found}
        click.echo(json.dumps(data, indent=1))
    elif not request.quiet:
        _print(examination(result, model, saved))
    if request.reduced is not None:
        _reduce(request, model, result)
    return result


def _print(what: Any) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=False).print(what)


def _reduce(request: Request, model: Model, result: Examination) -> None:
    if not result.differences:
        click.echo("nothing is wrong: there is nothing to reduce", err=True)
        return
    found = reduce(model, options_of(request.plan), request.feeds, result.differences[0])
    assert request.reduced is not None
    inputs = found.save(request.reduced)
    mesh = " ".join(f"--{axis} {size}" for axis, size in request.plan.mesh.axes if size > 1)
    if not request.quiet and not request.as_json:
        command = f"onnxmesh verify {request.reduced} {mesh} --inputs {inputs} --allow-replicated --each"
        click.echo(f"\nreduced to {found.nodes} of {len(model)} nodes, in {found.trials} trials:\n  {command}")
