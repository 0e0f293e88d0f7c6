"""The smallest part of a model that still fails: for a bug report that others can run.

It begins with the nodes between the first wrong tensor and the tensors before it. If those alone do not fail on the
same mesh, as they may be placed or fused otherwise alone, more of what is before them is added. Then the first value
within that fails is taken for the end, and every value before it, the last first, becomes an input for a trial: what
made it goes if the rest still fails. (Small integers of one dim say shapes: they are left to what makes them.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from onnxmesh.compiler.api import compile_model
from onnxmesh.compiler.errors import VerificationError
from onnxmesh.compiler.options import Options
from onnxmesh.runtime.errors import OnnxMeshError
from onnxmesh.runtime.io import write_outputs
from onnxmesh.runtime.plan import Plan
from onnxmesh.verification.each import Difference, Examination, examine
from onnxmesh.verification.model import Arrays, Model, Segment, value_info
from onnxmesh.verification.oracle import Oracle

LARGEST = 1 << 31
"""Bytes: files of more cannot hold their weights."""


@dataclass(frozen=True)
class Reduced:
    """A part of the model that fails by itself."""

    proto: onnx.ModelProto
    inputs: Arrays
    difference: Difference
    trials: int

    @property
    def nodes(self) -> int:
        """How many nodes it has."""
        return len(self.proto.graph.node)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model, and beside it its inputs, `NAME.npz`, whose path is returned."""
        target = Path(path)
        onnx.save(self.proto, target)
        beside = target.with_suffix(".npz")
        write_outputs(beside, self.inputs)
        return beside


def options_of(plan: Plan) -> Options:
    """What compiles a part of a model as a plan was; what is too small to shard is allowed to be whole."""
    asked = plan.report["options"]
    precision = plan.report["precision"]["asked"]
    return Options(plan.mesh, cp_strategy=asked["cp_strategy"], precision=precision, allow_replicated=True)


def reduce(model: Model, options: Options, feeds: Arrays, difference: Difference) -> Reduced:
    """The smallest part around the first difference (with its arrays) that still fails at `options`.

    Raises VerificationError if no part fails by itself, the whole model neither.
    """
    trial = _Trial(model, options)
    target = difference.compared.name
    recorded = {name.removeprefix("input."): x for name, x in difference.arrays.items() if name.startswith("input.")}
    recorded[target] = difference.arrays["reference"]
    if trial.fails(difference.check.segment, recorded):
        base, values = difference.check.segment, dict(recorded)
    else:
        base, values = _grown(model, trial, feeds, difference.check.segment, recorded[target])
    values |= _interior(model, base, values)
    known = set(base.inputs)
    names = [name for name in _names(model, base) if values[name].dtype.kind not in "iu" or values[name].ndim > 1]
    target = next((name for name in names if trial.fails(model.segment([name], known), values)), target)
    for name in reversed(names[: names.index(target)] if target in names else names):
        smaller = model.segment([target], {*known, name})
        if len(smaller.nodes) < len(model.segment([target], known).nodes) and trial.fails(smaller, values):
            known.add(name)
    return trial.reduced(model.segment([target], known), values)


def _grown(
    model: Model, trial: _Trial, feeds: Arrays, segment: Segment, expected: np.ndarray
) -> tuple[Segment, dict[str, np.ndarray]]:
    """The segment with more of what is before it, until it fails."""
    nodes = set(segment.nodes)
    (target,) = segment.outputs
    everything = model.segment([target], ())
    while len(nodes) < len(everything.nodes):
        first = min(nodes)
        earlier = [number for number in everything.nodes if number < first]
        nodes |= set(earlier[-max(1, len(nodes)) :]) or set(everything.nodes)
        known = {str(name) for number in everything.nodes if number not in nodes for name in model.node(number).output}
        grown = model.segment([target], known)
        values = {name: np.asarray(feeds[name]) for name in grown.inputs if name in feeds}
        missing = [name for name in grown.inputs if name not in values]
        if missing:
            values |= Oracle(model).run(model.segment(missing, ()), feeds)
        values[target] = expected
        if trial.fails(grown, values):
            return grown, values
    raise VerificationError(
        "no part of the model fails by itself", hint="the tensors that were saved show the error", code="OM6106"
    )


def _names(model: Model, segment: Segment) -> list[str]:
    """The values within a segment, in the model's order."""
    names = [str(name) for number in segment.nodes for name in model.node(number).output if name]
    return [name for name in names if name not in segment.outputs]


def _interior(model: Model, segment: Segment, values: Arrays) -> dict[str, np.ndarray]:
    """The values within a segment."""
    names = _names(model, segment)
    return Oracle(model).run(replace(segment, outputs=tuple(names)), values) if names else {}


class _Trial:
    """Compiles parts of a model and compares their tensors."""

    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options = model, options
        self.count = 0

    def fails(self, segment: Segment, values: Arrays) -> bool:
        """Whether a part fails by itself. What does not compile or run does not."""
        try:
            return bool(self._examined(segment, values)[1].differences)
        except (OnnxMeshError, ValueError):
            return False

    def reduced(self, segment: Segment, values: Arrays) -> Reduced:
        """The part as it is handed on."""
        proto, found = self._examined(segment, values)
        inputs = {name: np.asarray(values[name]) for name in segment.inputs}
        return Reduced(proto, inputs, found.differences[0], self.count)

    def _examined(self, segment: Segment, values: Arrays) -> tuple[onnx.ModelProto, Examination]:
        self.count += 1
        weights = {name: self.model.weight(name) for name in segment.weights}
        proto = self.model.proto(segment, values, weights, LARGEST)
        proto.graph.output[0].CopyFrom(value_info(segment.outputs[0], values[segment.outputs[0]]))
        compilation = compile_model(proto, self.options)
        assert compilation.plan is not None
        return proto, examine(compilation.plan, Model(proto), {name: values[name] for name in segment.inputs})
