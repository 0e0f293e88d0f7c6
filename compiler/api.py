"""The compiler's pipeline, as data, and the one function that runs it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

import onnxmesh.compiler.ops.table  # noqa: F401  (registers every rule)
from onnxmesh.compiler import annotate as sharding_specs
from onnxmesh.compiler import cost, frontend, imported
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.ir import printer, verify
from onnxmesh.compiler.ir.rule import Strategy
from onnxmesh.compiler.ir.view import views_of
from onnxmesh.compiler.layout import layout
from onnxmesh.compiler.lower import lower
from onnxmesh.compiler.modules import modules
from onnxmesh.compiler.options import CP_STRATEGIES, PRECISIONS, CpStrategy, Options, Precision
from onnxmesh.compiler.predict import Survey, survey
from onnxmesh.compiler.reason import Reason
from onnxmesh.compiler.report import build_report
from onnxmesh.compiler.sources import reader
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.bind.values import typed_values
from onnxmesh.passes.fuse.early_bias import early_bias
from onnxmesh.passes.fuse.fuse import fuse
from onnxmesh.passes.fuse.gather_first import gather_first
from onnxmesh.passes.fuse.merge_linears import merge_linears
from onnxmesh.passes.fuse.parts import parts
from onnxmesh.passes.fuse.repeat_last import repeat_last
from onnxmesh.passes.fuse.sink import sink
from onnxmesh.passes.fuse.view_first import view_first
from onnxmesh.passes.graph.match import Finding
from onnxmesh.passes.graph.provenance import decided
from onnxmesh.passes.graph.supported import check_supported
from onnxmesh.passes.normalise.normalise import SOURCES, normalise
from onnxmesh.passes.partition.partition import partition
from onnxmesh.passes.place.pins import Pin
from onnxmesh.passes.place.place import Placed, place
from onnxmesh.passes.place.worth import check_worth
from onnxmesh.passes.precision.precision import Stays, convert
from onnxmesh.passes.recognise.recognise import recognise
from onnxmesh.passes.schedule.group_collectives import group_collectives
from onnxmesh.passes.schedule.schedule import schedule
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.profile import load as load_profile
from onnxmesh.runtime.report import Report

ModelLike: TypeAlias = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model
Source: TypeAlias = ModelLike | Sequence[str | os.PathLike[str] | onnx.ModelProto | ir.Model]
"""A model, or one for each rank of a graph that was sharded elsewhere."""

Progress = Callable[[str], None]
"""Called with the name of every stage before it runs."""


@dataclass
class Compilation:
    """What the stages hand on."""

    source: Source
    options: Options
    model: ir.Model | None = None
    imported: imported.Imported | None = None
    pins: Sequence[Pin] = ()
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    tensors: Mapping[str, ir.TensorProtocol] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    stays: Sequence[Stays] | None = ()
    survey: Survey | None = None
    modules: Mapping[str, str] = field(default_factory=dict)
    placed: list[Placed] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    plan: Plan | None = None

    @property
    def loaded(self) -> ir.Model:
        """The model as the stages have made it so far."""
        assert self.model is not None
        return self.model

    def annotate(self, path: str | os.PathLike[str]) -> sharding_specs.Annotated:
        """Write the model as it was given, with the chosen placements as ONNX's annotations; says what is in them.

        Raises:
            ModelError: the model was sharded elsewhere, or the file cannot be written.
        """
        if self.imported is not None or isinstance(self.source, (list, tuple)):
            raise ModelError(
                "the model was sharded elsewhere: no placements were chosen that could be written", code="OM1407"
            )
        model = frontend.original(self.source)
        result = sharding_specs.annotate(model, self.placed, self.options.mesh)
        sharding_specs.save(model, path)
        return result


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline. `normal` says that the graph is in normal form after it."""

    name: str
    run: Callable[[Compilation], None]
    normal: bool = True


def _load(state: Compilation) -> None:
    if not isinstance(state.source, (list, tuple)):
        state.model = frontend.load(state.source)
        state.modules = modules(state.model.graph)
        _settle(state, {}, 1)
        return
    state.model, own = imported.together([frontend.load(model) for model in state.source])
    _settle(state, own, len(state.source))


def _settle(state: Compilation, own: Mapping[str, imported.Tensors], files: int) -> None:
    """Where the ranks of a graph that holds collectives are on the mesh."""
    options = state.options
    state.imported = imported.settled(state.loaded, options.mesh, own, files, options.own_inputs)
    if state.imported is not None:
        state.options = replace(options, mesh=state.imported.mesh)
    else:
        state.pins, state.findings = sharding_specs.pins(state.loaded, options.mesh)


def _bind(state: Compilation) -> None:
    state.values = typed_values(state.loaded.graph, state.options.values)
    state.model = bind(state.loaded, state.options.shapes, state.options.dims, state.values)


def _normalise(state: Compilation) -> None:
    state.model = normalise(state.loaded)
    graph = state.model.graph
    own = {name: value.const_value for name, value in graph.initializers.items() if value.const_value is not None}
    state.tensors = {**own, **graph.meta[SOURCES]}


def _recognise(state: Compilation) -> None:
    state.model, findings = recognise(state.loaded)
    state.findings += findings
    check_supported(state.model.graph)


def _precision(state: Compilation) -> None:
    """The model in the precision that is asked for, and what one device would take for it."""
    if state.options.precision != "model":
        state.stays = convert(state.loaded.graph, state.options.precision, state.tensors)
    alone, _ = fuse(sink(merge_linears(state.loaded.clone())))
    state.survey = survey(state.loaded.graph, layout(alone).graph)


def _shard(axis: str, state: Compilation) -> None:
    """Place, reshard and partition on one axis."""
    ranks, options = state.options.mesh.axis_size(axis), state.options
    if state.imported is not None and axis in imported.AXES:
        if axis == "tp":
            state.findings += imported.localise(state.loaded, state.imported)
            state.tensors = {**state.tensors, **imported.sources(state.imported)}
        return
    if ranks == 1:
        return
    strategy, shard_outputs = options.cp_strategy, options.shard_outputs
    placed = place(state.loaded.graph, axis, ranks, cp_strategy=strategy, shard_outputs=shard_outputs, pins=state.pins)
    first = sum(len(earlier.decisions) for earlier in state.placed)
    for node, number in placed.decision_of.items():
        decided(node, first + number)
    state.placed.append(placed)
    unmet = dict.fromkeys(placed.pinned.unmet)
    state.findings += [
        Finding(sharding_specs.PATTERN, node, False, Reason(f"on {axis}: {reason}", "OM2303")) for node, reason in unmet
    ]
    if not options.allow_replicated:
        check_worth(placed, options.cp_strategy)
    state.model = partition(state.loaded, axis, ranks, placed.strategies, shard_outputs=options.shard_outputs)


def _merge(state: Compilation) -> None:
    state.model = merge_linears(early_bias(view_first(repeat_last(parts(state.loaded)))))


def _fuse(state: Compilation) -> None:
    state.model, findings = fuse(sink(state.loaded))
    state.findings += findings


def _layout(state: Compilation) -> None:
    state.model = layout(gather_first(state.loaded))


def _schedule(state: Compilation) -> None:
    state.model = schedule(state.loaded)


def _group(state: Compilation) -> None:
    state.model = group_collectives(state.loaded)


def _lower(state: Compilation) -> None:
    producer = f"onnxmesh {metadata.version('onnxmesh')}"
    plan = lower(state.loaded.graph, state.options.mesh, state.options.dims, producer, state.values)
    assert state.survey is not None
    graph = state.loaded.graph
    report = build_report(
        plan, graph, state.survey, state.placed, state.findings, state.options, state.stays, state.modules
    )
    state.plan = replace(plan, source=reader(state.tensors), report=Report(report))


PIPELINE: tuple[Stage, ...] = (
    Stage("load", _load, normal=False),
    Stage("bind", _bind, normal=False),
    Stage("normalise", _normalise),
    Stage("recognise", _recognise),
    Stage("precision", _precision),
    Stage("shard-dp", partial(_shard, "dp")),
    Stage("shard-cp", partial(_shard, "cp")),
    Stage("shard-tp", partial(_shard, "tp")),
    Stage("merge", _merge),
    Stage("fuse", _fuse),
    Stage("layout", _layout),
    Stage("schedule", _schedule),
    Stage("group", _group),
    Stage("lower", _lower),
)
FIRST_OF_MESH = next(number for number, stage in enumerate(PIPELINE) if stage.name == "shard-dp")
"""What comes before is the same for every mesh."""
_SHARDED = next(number for number, stage in enumerate(PIPELINE) if stage.name == "merge")


def compile_model(
    model: Source,
    options: Options,
    *,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Compilation:
    """Run the pipeline; the result holds the plan and what every stage found.

    Args:
        dump: a folder that gets the printed graph after each stage.
        progress: called with each stage's name before it runs.

    Raises:
        ModelError: the model cannot be read, is not valid, or leaves a dim unbound.
        ShardingError: nothing worth having can be sharded on an axis.
    """
    if options.cp_strategy not in CP_STRATEGIES:
        raise ModelError(
            f"unknown cp strategy {options.cp_strategy!r}", hint=f"one of {', '.join(CP_STRATEGIES)}", code="OM1101"
        )
    if options.precision not in PRECISIONS:
        raise ModelError(
            f"unknown precision {options.precision!r}", hint=f"one of {', '.join(PRECISIONS)}", code="OM1102"
        )
    state = Compilation(model, options)
    _run(state, PIPELINE, dump, progress)
    return state


def begin(model: Source, options: Options) -> Compilation:
    """The stages that no mesh matters to; `finish` compiles the result for one mesh after another.

    Raises:
        ModelError: as `compile_model`.
    """
    state = Compilation(model, options)
    _run(state, PIPELINE[:FIRST_OF_MESH])
    return state


def finish(begun: Compilation, options: Options) -> Compilation:
    """The other stages, on a copy: `options` may differ from those it was begun with in mesh and strategy.

    Raises:
        ShardingError: as `compile_model`.
    """
    state = replace(begun, options=options, model=begun.loaded.clone(), placed=[])
    state.findings, state.seconds = list(begun.findings), dict(begun.seconds)
    _run(state, PIPELINE[FIRST_OF_MESH:])
    return state


def forced(begun: Compilation, axis: str, ranks: int, strategies: Mapping[ir.Node, Strategy]) -> Compilation:
    """The other stages for one axis, on which every node of `begun` has the given strategy: none is chosen."""
    graph = begun.loaded.graph
    options = replace(begun.options, mesh=Mesh.of(**{axis: ranks}))
    placed = Placed(axis, ranks, strategies, views_of(graph, ranks))
    model = partition(begun.loaded, axis, ranks, strategies, shard_outputs=options.shard_outputs)
    state = replace(begun, options=options, model=model, findings=list(begun.findings), placed=[placed])
    _run(state, PIPELINE[_SHARDED:])
    return state


def _run(
    state: Compilation,
    stages: Sequence[Stage],
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> None:
    with cost.on(state.options.profile):
        for number, stage in enumerate(stages):
            if progress is not None:
                progress(stage.name)
            start = time.perf_counter()
            stage.run(state)
            if stage.normal:
                verify.verify(state.loaded.graph, stage.name)
            state.seconds[stage.name] = time.perf_counter() - start
            if dump is not None:
                _dump(Path(dump), number, stage.name, state.loaded.graph)


def compile(
    model: Source,
    *,
    tp: int = 1,
    cp: int = 1,
    dp: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    values: Mapping[str, Any] | None = None,
    cp_strategy: CpStrategy = "auto",
    shard_outputs: bool = False,
    allow_replicated: bool = False,
    profile: str | os.PathLike[str] | None = None,
    precision: Precision = "model",
    annotate: str | os.PathLike[str] | None = None,
    own_inputs: Sequence[str] = (),
) -> Plan:
    """Compile an ONNX model to a plan for `dp * cp * tp` ranks.

    Args:
        model: a path, the bytes of a file, a ModelProto or an onnx_ir model; it needs no hints. A list of them is
            what another tool has made for each rank (docs/imported.md).
        tp, cp, dp: ranks of tensor, context and data parallelism, 1 to 64 each.
        shapes: input name -> sizes; binds dynamic dims.
        dims: dim name -> size; binds dynamic dims.
        values: input name -> value (an array of the input's dtype, or numbers); the input becomes a constant, as one
            that decides shapes must (axes, sizes, counts), and runs are not given it.
        cp_strategy: how self-attention runs on the cp axis: allgather, ulysses, ring, or auto.
        shard_outputs: leave outputs sharded instead of whole on every rank.
        allow_replicated: accept an axis on which nothing worth having was sharded.
        profile: the file of a device profile to compile for, as `onnxmesh doctor --profile` writes it.
        precision: what a float32 model computes in: bf16, fp16, or model, which leaves it as it is.
        annotate: a file for the model with the chosen placements as ONNX's annotations (docs/imported.md).
        own_inputs: of a graph that was sharded elsewhere, the inputs of which every rank is given its own piece, as
            its part of a cache; they are fed one after another along dim 0.

    Raises:
        InvalidArgument: the profile cannot be read.
        ModelError: the model cannot be read, is not valid, or leaves a dim unbound.
        ShardingError: nothing worth having can be sharded on an axis.
    """
    device = None if profile is None else load_profile(profile)
    mesh = Mesh.of(tp=tp, cp=cp, dp=dp)
    options = Options(
        mesh,
        shapes or {},
        dims or {},
        cp_strategy,
        shard_outputs,
        allow_replicated,
        device,
        precision,
        values or {},
        own_inputs,
    )
    compilation = compile_model(model, options)
    if annotate is not None:
        compilation.annotate(annotate)
    assert compilation.plan is not None
    return compilation.plan


def _dump(folder: Path, number: int, name: str, graph: ir.Graph) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:02d}-{name}.txt").write_text(printer.graph_text(graph))
