"""Graphs that tools write with com.microsoft ops: sharded they give what ONNX Runtime gives, and as much is shared."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import genai
import numpy as np
import onnx
import onnxruntime
import pytest
import shares
from microsoft_cases import run
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from shares import Case, fixtures

from onnxmesh.compiler.api import Compilation, compile_model
from onnxmesh.compiler.options import Options
from onnxmesh.runtime.session import Session

MESHES = (Case(tp=2), *(Case(cp=2, strategy=strategy) for strategy in shares.STRATEGIES), Case(dp=2))


def compiled(model: onnx.ModelProto, case: Case, sizes: dict[str, int], **choices: bool) -> Compilation:
    return compile_model(model, Options(case.mesh, {}, sizes, case.strategy, **choices))


def assert_same(state: Compilation, feeds: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert state.plan is not None
    with Session(state.plan) as session:
        found = session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()})
        names = [port.name for port in session.get_outputs()]
    assert names == list(expected)
    for name, ours in zip(names, found):
        assert shares.relative_error(ours, expected[name]) <= shares.TOLERANCE["float32"], name


# --- what ONNX Runtime's transformer optimiser makes of the fixtures ----------------------------------------

KINDS = {"bert_ts17": "bert", "gpt2_ts17": "gpt2", "llama_op18": "gpt2", "vit_ts17": "vit", "whisper_op18": "bart"}
FUSED = {
    "bert_ts17": {"EmbedLayerNormalization", "Attention", "SkipLayerNormalization", "BiasGelu"},
    "gpt2_ts17": {"SkipLayerNormalization", "FastGelu"},
    "llama_op18": {"SkipSimplifiedLayerNormalization"},
    "vit_ts17": {"SkipLayerNormalization", "BiasGelu"},
    "whisper_op18": {"SkipLayerNormalization", "Gelu", "BiasGelu"},
}


@cache
def optimised(name: str) -> onnx.ModelProto:
    logging.disable(logging.WARNING)
    fixture = fixtures.load(name)
    options = FusionOptions(KINDS[name])
    hidden = {"bert": 64}.get(fixture.model, 0)
    heads = fixture.heads if hidden else 0
    return optimize_model(
        str(fixture.path), KINDS[name], heads, hidden, optimization_options=options, opt_level=0
    ).model


@cache
def wanted(name: str) -> dict[str, np.ndarray]:
    model, feeds = optimised(name), fixtures.load(name).make_inputs()
    return run(model, {i.name: feeds[i.name] for i in model.graph.input})


@pytest.mark.parametrize("name", KINDS)
def test_the_optimiser_fuses(name: str) -> None:
    """Else what follows would show nothing."""
    assert {n.op_type for n in optimised(name).graph.node if n.domain == "com.microsoft"} == FUSED[name]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("case", MESHES[:-1], ids=lambda case: case.name)
def test_an_optimised_graph_is_shared_as_the_plain_one(name: str, case: Case) -> None:
    fixture = fixtures.load(name)
    state = compiled(optimised(name), case, fixture.bindings())
    assert_same(state, fixture.make_inputs(), wanted(name))
    plain = shares.compile_fixture(name, case)
    (ours,), (theirs,) = (list(map(shares.shares, s.placed)) for s in (state, plain))
    assert ours.flops_per_rank <= theirs.flops_per_rank + 0.01
    assert ours.weights_per_rank <= theirs.weights_per_rank + 0.01
    assert len(shares.collectives(shares.plan_of(state))) <= len(shares.collectives(shares.plan_of(plain)))


def test_what_onnxruntime_itself_fuses(tmp_path: Path) -> None:
    """Its graph optimiser writes fused matmuls, gelus and norms of its own."""
    fixture, path = fixtures.load("gemma2_op18"), tmp_path / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(path), 4
    onnxruntime.InferenceSession(str(fixture.path), options)
    model = onnx.load(path)
    assert any(node.domain == "com.microsoft" for node in model.graph.node)
    for case in MESHES[:2]:
        assert_same(compiled(model, case, fixture.bindings()), fixture.make_inputs(), shares.reference(fixture.name))


# --- decoders for ONNX Runtime GenAI ------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """New tokens behind a cache: of a length that grows with them, or of a buffer."""

    name: str
    batch: int
    seq: int
    past: int
    total: int
    filled: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "seq": self.seq, "past": self.past, "total": self.total}

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return genai.feeds(self.batch, self.seq, self.past, self.total, list(self.filled))


STEPS = [
    Step("prompt", 2, 16, 0, 16, (16, 16)),
    Step("prompt into a buffer", 2, 16, 24, 16, (16, 16)),
    Step("token behind a cache that grows", 2, 1, 15, 16, (16, 16)),
    Step("tokens behind a cache", 1, 4, 12, 16, (16,)),
    Step("token into a buffer", 2, 1, 16, 16, (9, 16)),
    Step("token into a buffer, a mask of its length", 1, 1, 16, 16, (7,)),
]


def filled(step: Step, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs with zeros where a cache is not filled."""
    for name, array in outputs.items():
        if name.startswith("present"):
            for row, count in enumerate(step.filled):
                array[row, :, count:] = 0
    return outputs


def assert_step(state: Compilation, step: Step, model: onnx.ModelProto) -> None:
    assert state.plan is not None
    expected = filled(step, run(model, step.feeds))
    with Session(state.plan) as session:
        found = session.run(None, step.feeds)
        ours = filled(step, dict(zip([port.name for port in session.get_outputs()], map(np.array, found))))
    assert set(ours) == set(expected)
    for name, array in expected.items():
        assert shares.relative_error(ours[name], array) <= shares.TOLERANCE["float32"], name


@cache
def decoder(**choices: bool | int) -> onnx.ModelProto:
    return genai.decoder(**choices)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("choices", [{}, {"packed": True}, {"experts": True, "window": 5}], ids=str)
def test_a_decoder_on_tp(step: Step, choices: dict[str, bool | int]) -> None:
    """Caches stay where their heads are, as they come in again."""
    model = decoder(**choices)
    state = compiled(model, Case(tp=2), step.sizes, shard_outputs=True)
    assert_step(state, step, model)
    (found,) = map(shares.shares, state.placed)
    most = 0.57 if "packed" in choices else 0.51  # keys and values of such a size may be made on both ranks
    assert found.weights_per_rank <= most
    assert found.flops_per_rank <= most


WAYS = [
    *((step, strategy) for step in (STEPS[0], STEPS[3]) for strategy in shares.STRATEGIES),
    *((step, "auto") for step in STEPS[1:]),
]


@pytest.mark.parametrize(("step", "strategy"), WAYS, ids=lambda way: getattr(way, "name", way))
def test_a_decoder_on_cp(step: Step, strategy: shares.CpStrategy) -> None:
    """The prompt's rows are shared; behind a cache the keys of one token are."""
    state = compiled(decoder(), Case(cp=2, strategy=strategy), step.sizes)
    assert_step(state, step, decoder())
    (found,) = map(shares.shares, state.placed)
    assert step.seq == 1 or found.flops_per_rank <= 0.55


@pytest.mark.parametrize("count", [3, 9, 15])
def test_one_plan_serves_every_length_of_a_buffer(count: int) -> None:
    """How much is filled is data: the plan does not know."""
    shape = Step("any", 1, 1, 16, 16, (1,))
    step = Step("this", 1, 1, 16, 16, (count,))
    for case in (Case(tp=2), Case(cp=2)):
        assert_step(compiled(decoder(), case, shape.sizes), step, decoder())


def test_the_decoder_is_one_of_the_builder() -> None:
    count = Counter(node.op_type for node in decoder().graph.node if node.domain == "com.microsoft")
    assert count == {"GroupQueryAttention": 2, "SkipSimplifiedLayerNormalization": 4, "QuickGelu": 2}
