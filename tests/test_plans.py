"""Plans are good, not only right: two blocks of real width, compiled without weights, send what the best hand would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import shares
from shares import STRATEGIES, Case

from onnxmesh.compiler.api import Compilation, compile_model
from onnxmesh.compiler.options import Options
from onnxmesh.models.catalogue import save
from onnxmesh.passes.graph.provenance import origin as label
from onnxmesh.passes.place.roles import ATTENTION
from onnxmesh.runtime.placement import local_shape
from onnxmesh.runtime.plan import Collective, Plan

BLOCKS = 2
HALVES = 2 * BLOCKS
ENDS = 3  # gathers that the embedding and the outputs may add
MOST_PER_RANK = 0.27
LANGUAGE: dict[str, dict[str, Any]] = {"llama-8b": {}, "bert-large": {}, "gpt2-xl": {"heads": 32}}
DIFFUSION = {"flux": 2 * BLOCKS, "wan-14b": BLOCKS}  # self-attentions
PRODUCTS = ("MatMul", "Conv", "Attention", "Einsum")


@cache
def compiled(model: str, case: Case) -> Compilation:
    """Two blocks of each kind at the model's real width."""
    with TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model.onnx", BLOCKS, "none", **LANGUAGE.get(model, {}))
        return compile_model(str(path), Options(case.mesh, cp_strategy=case.strategy))


def tensor_parallel(model: str) -> Plan:
    return shares.plan_of(compiled(model, Case(tp=4)))


def kinds(plan: Plan) -> Counter[str]:
    return Counter(item.kind for item in shares.collectives(plan))


# --- tensor parallel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", LANGUAGE)
def test_every_linear_weight_is_sharded_on_tp(model: str) -> None:
    found = shares.shares(compiled(model, Case(tp=4)).placed[0])
    assert found.weights == 1.0
    assert found.weights_per_rank <= MOST_PER_RANK
    assert found.flops == pytest.approx(1.0)


@pytest.mark.parametrize("model", LANGUAGE)
def test_a_rank_stores_its_part_of_the_matrices(model: str) -> None:
    """Counted in the plan itself, the embeddings with them."""
    plan = tensor_parallel(model)
    matrices = [w for w in plan.weights if len(w.shape) == 2 and min(w.shape) > 512]
    whole = sum(prod(w.shape) for w in matrices)
    ours = sum(prod(local_shape(w.shape, p, 4)) for w in matrices for _, p in w.spec)
    assert ours <= MOST_PER_RANK * whole


@pytest.mark.parametrize("model", LANGUAGE)
def test_a_half_block_reduces_once_and_gathers_once(model: str) -> None:
    sent = kinds(tensor_parallel(model))
    assert sent["AllReduce"] + sent["ReduceScatter"] == HALVES
    assert sent["AllGather"] <= sent["ReduceScatter"] + ENDS
    assert set(sent) <= {"AllReduce", "ReduceScatter", "AllGather"}


def test_the_fused_weight_of_gpt2_is_used_where_it_lies() -> None:
    """Nothing of the width of queries, keys and values together is sent."""
    plan = tensor_parallel("gpt2-xl")
    widths = {size for item in shares.collectives(plan) for b in item.ins + item.outs for size in buffer(plan, b)}
    assert not widths & {3 * 1600, 3 * 1600 // 4}
    fused = [weight for weight in plan.weights if weight.shape == (1600, 3 * 1600)]
    assert len(fused) == BLOCKS
    assert {tuple(s.size for s in placement.segments) for w in fused for _, placement in w.spec} == {(1600,) * 3}  # type: ignore[union-attr]


def buffer(plan: Plan, index: int) -> tuple[int, ...]:
    return plan.programs[0].buffers[index].shape


# --- context parallel ---------------------------------------------------------------------------------------

CONTEXT = [pytest.param(model, strategy, id=f"{model}-{strategy}") for model in DIFFUSION for strategy in STRATEGIES]


@pytest.mark.parametrize(("model", "strategy"), CONTEXT)
def test_everything_outside_self_attention_is_local(model: str, strategy: str) -> None:
    """But for the gather of the output, and of the keys and values of a text."""
    state = context_parallel(model, strategy)
    output = shares.plan_of(state).programs[0].outputs[0].name
    rest: Counter[str] = Counter()
    for item in outside(state):
        nodes = wanted_by(item)
        rest.update(dict.fromkeys(nodes, len(item.ins) // len(nodes)))
    assert set(rest) - set(cross_attentions(state)) <= {f"node_{output}"}
    assert rest[f"node_{output}"] == 1
    assert all(rest[node] <= 2 for node in cross_attentions(state))


@pytest.mark.parametrize(("model", "strategy"), CONTEXT)
def test_a_self_attention_sends_what_its_strategy_says(model: str, strategy: str) -> None:
    state = context_parallel(model, strategy)
    inside = Counter(item.kind for item in shares.collectives(shares.plan_of(state)))
    inside -= Counter(item.kind for item in outside(state))
    most = {"allgather": {"AllGather": 2}, "ulysses": {"AllToAll": 4}, "ring": {"Shift": 2 * 3}}[strategy]
    assert set(inside) == set(most)
    assert all(inside[kind] <= DIFFUSION[model] * number for kind, number in most.items())


@pytest.mark.parametrize(("model", "strategy"), CONTEXT)
def test_what_is_sent_for_attention_is_sent_at_it(model: str, strategy: str) -> None:
    """Between a collective and the attention that wanted it there is no other product."""
    state = context_parallel(model, strategy)
    plan, away = shares.plan_of(state), set(map(id, outside(state)))
    flow = Flow(plan)
    for item in shares.collectives(plan):
        if id(item) not in away:
            assert "Attention" in {flow.following(item), flow.preceding(item)} or wanted_by(item) <= {
                *attentions(state)
            }


@pytest.mark.parametrize("model", DIFFUSION)
def test_cp_divides_all_work_and_no_weight(model: str) -> None:
    found = shares.shares(context_parallel(model, "allgather").placed[0])
    assert found.flops > 0.99
    assert found.flops_per_rank < 0.26
    assert found.weights == 0.0


def context_parallel(model: str, strategy: str) -> Compilation:
    return compiled(model, next(Case(cp=4, strategy=s) for s in STRATEGIES if s == strategy))


def attentions(state: Compilation) -> list[str]:
    return [label(node) for node, view in state.placed[0].views.items() if view.op in ATTENTION]


def cross_attentions(state: Compilation) -> list[str]:
    ours = {label(node) for node in state.placed[0].self_attention}
    return [name for name in attentions(state) if name not in ours]


def wanted_by(item: Collective) -> set[str]:
    """The nodes that wanted a collective; one instruction may send for several."""
    return set(item.node.split("+"))


def outside(state: Compilation) -> list[Collective]:
    """The collectives that are not a self-attention's: gathers for a cross-attention, or of an output."""
    plan = shares.plan_of(state)
    output = plan.programs[0].outputs[0].name
    cross = set(cross_attentions(state))
    return [
        item for item in shares.collectives(plan) if cross >= wanted_by(item) or item.reason.startswith(f"{output}: ")
    ]


class Flow:
    """A program as a graph: what makes each buffer and what uses it."""

    def __init__(self, plan: Plan) -> None:
        self.buffers = plan.programs[0].buffers
        self.instructions = plan.programs[0].instructions

    def following(self, item: Any) -> str:
        """The products next after an instruction, if they are one kind."""
        return "|".join(sorted(set(self._next(set(map(self.root, item.outs)), forward=True))))

    def preceding(self, item: Any) -> str:
        """The products last before an instruction, if they are one kind."""
        return "|".join(sorted(set(self._next(set(map(self.root, item.ins)), forward=False))))

    def root(self, index: int) -> int:
        """The buffer that a view is of."""
        while index >= 0 and self.buffers[index].kind == "view":
            index = self.buffers[index].source
        return index

    def _next(self, live: set[int], forward: bool) -> Iterator[str]:
        for item in self.instructions if forward else reversed(self.instructions):
            near, far = (item.ins, item.outs) if forward else (item.outs, item.ins)
            if not live & set(map(self.root, near)):
                continue
            product = "" if isinstance(item, Collective) else product_of(item.kernel)
            if product:
                yield product
            else:
                live |= set(map(self.root, far))


def product_of(kernel: str) -> str:
    """The kind of product that a kernel is, or nothing."""
    return next((kind for kind in PRODUCTS if kind in kernel), "")
