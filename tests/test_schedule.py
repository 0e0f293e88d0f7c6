"""The schedule: a valid order, no more memory, the same numbers, and sending beside computing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import inputs
import numpy as np
import pytest

from onnxmesh.compiler import api
from onnxmesh.compiler.options import CpStrategy, Options
from onnxmesh.models import catalogue
from onnxmesh.passes.schedule.schedule import best, candidates, depth_first, streams
from onnxmesh.passes.schedule.work import Work
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Collective, Instruction, Launch, Plan
from onnxmesh.runtime.session import Session


def stages(state: api.Compilation, *, schedule: bool) -> api.Compilation:
    """Run the pipeline, with the schedule or without."""
    for stage in api.PIPELINE:
        if schedule or stage.name != "schedule":
            stage.run(state)
    return state


@cache
def compiled(name: str, tp: int, cp: int, strategy: CpStrategy, schedule: bool) -> Plan:
    """A fixture's plan."""
    fixture = inputs.load(name)
    options = Options(Mesh.of(tp=tp, cp=cp), fixture.shapes(), {}, strategy, allow_replicated=True)
    plan = stages(api.Compilation(fixture.path, options), schedule=schedule).plan
    assert plan is not None
    return plan


def work(name: str, tp: int, cp: int, strategy: CpStrategy = "auto") -> Work:
    """What a scheduler sees of a model of the catalogue's small relatives."""
    state = api.Compilation(catalogue.build(name), Options(Mesh.of(tp=tp, cp=cp), cp_strategy=strategy))
    for stage in api.PIPELINE[: [stage.name for stage in api.PIPELINE].index("schedule")]:
        stage.run(state)
    return Work(state.loaded.graph)


def is_valid(order: Sequence[int], job: Work) -> bool:
    """Whether every node runs once, after what it reads."""
    at = {node: position for position, node in enumerate(order)}
    return sorted(order) == list(range(len(job.nodes))) and all(
        at[before] < at[node] for node in order for before in job.before[node]
    )


@pytest.mark.parametrize(("tp", "cp", "strategy"), [(2, 1, "auto"), (1, 4, "ring"), (2, 2, "allgather")])
def test_every_candidate_is_a_valid_order(tp: int, cp: int, strategy: CpStrategy) -> None:
    job = work("demo", tp, cp, strategy)
    orders = [depth_first(job), *candidates(job)]
    assert all(is_valid(order, job) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize(("tp", "cp", "strategy"), [(2, 1, "auto"), (1, 4, "ring"), (2, 2, "allgather")])
def test_the_chosen_order_is_fast_and_needs_hardly_more_memory(tp: int, cp: int, strategy: CpStrategy) -> None:
    job = work("demo", tp, cp, strategy)
    first, chosen = next(candidates(job)), best(job)
    assert job.peak(chosen) <= 1.05 * job.peak(first)
    assert job.time(chosen) <= 1.01 * job.time(first)
    assert best(work("demo", tp, cp, strategy)) == chosen


@pytest.mark.parametrize(("name", "tp", "cp", "strategy"), [
    ("llama_op18", 2, 1, "auto"),
    ("llama_op18", 1, 4, "ring"),
    ("flux_op18", 2, 2, "ulysses"),
    ("t5_op18", 2, 2, "ring"),
])  # fmt: skip
def test_results_are_the_same(name: str, tp: int, cp: int, strategy: CpStrategy) -> None:
    feeds = inputs.load(name).make_inputs()
    results = []
    for schedule in (False, True):
        with Session(compiled(name, tp, cp, strategy, schedule)) as session:
            results.append(session.run(None, feeds))
    for before, after in zip(*results):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("name", ["llama-8b", "flux"])
def test_a_ring_sends_the_next_keys_while_a_block_is_computed(name: str, cp: int, tmp_path: Path) -> None:
    path = catalogue.save(name, tmp_path / "m.onnx", layers=1, weights="none")
    options = Options(Mesh.of(cp=cp), cp_strategy="ring")
    plan = stages(api.Compilation(path, options), schedule=True).plan
    assert plan is not None
    program = plan.programs[0]
    items = program.instructions
    ancestors = reachable(items)
    shifts = [i for i, item in enumerate(items) if isinstance(item, Collective) and item.kind == "Shift"]
    blocks = [i for i, item in enumerate(items) if isinstance(item, Launch) and item.kernel == "AttentionBlock"]
    assert shifts and all(items[i].stream == 1 for i in shifts)
    for shift in shifts:
        beside = [block for block in blocks if set(items[shift].ins) & set(items[block].ins)]
        user = min(i for i, item in enumerate(items) if set(items[shift].outs) & set(item.ins))
        following = [block for block in blocks if shift < block < user]
        assert following, "a block is computed between a shift and the use of what it brings"
        for block in {*beside, *following}:
            assert shift not in ancestors[block] and block not in ancestors[shift]
        between = [i for i in range(shift + 1, user) if items[i].stream == 0]
        assert not any(shift in items[i].after for i in between), "nothing waits for a shift before it needs it"


def reachable(items: Sequence[Instruction]) -> list[set[int]]:
    """For every instruction all those that it waits for, directly or not."""
    result: list[set[int]] = []
    for item in items:
        result.append(set(item.after).union(*(result[i] for i in item.after)))
    return result


def test_only_what_overlaps_leaves_the_first_stream() -> None:
    job = work("demo", 2, 1)
    order = best(job)
    at = {node: i for i, node in enumerate(order)}
    for node, stream in streams(job, order).items():
        first = min((at[user] for user in job.users[node]), default=len(order))
        computed = [n for n in order[at[node] + 1 : first] if job.makes[n] and not job.sends[n]]
        assert stream == bool(computed)
