"""Every stored shard matters: whoever changes one changes an output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import shares
from shares import Case, fixtures

from onnxmesh.runtime.engine import Engine
from onnxmesh.runtime.plan import Plan
from onnxmesh.runtime.recipe import cut_spec
from onnxmesh.runtime.serialize import read_weights
from onnxmesh.runtime.threads import ThreadRanks
from onnxmesh.runtime.validate import shard_key

NOTICEABLE = 1e-6
"""Of the norm of an output. What cancels leaves rounding alone."""

HUGE = 1e30

Outputs = list[np.ndarray]


class Ranks:
    """A plan on local ranks, whose shards can be changed."""

    def __init__(self, plan: Plan, feeds: dict[str, np.ndarray]) -> None:
        self.plan, self.program, mesh = plan, plan.programs[0], plan.mesh
        coordinates = [mesh.coordinate(rank) for rank in range(mesh.size)]
        keys = [[(weight.name, shard_key(weight.spec, mesh, at)) for weight in plan.weights] for at in coordinates]
        stored = read_weights(plan.source, plan, coordinates)
        self.shards = {key: np.array(shard) for row, own in zip(keys, stored) for key, shard in zip(row, own)}
        self.threads = ThreadRanks(mesh, 30.0)
        self.engines = [
            Engine(self.program, [self.shards[key] for key in row], self.threads.communicator(rank))
            for rank, row in enumerate(keys)
        ]
        self.inputs = [
            [cut_spec(feeds[port.name], port.spec, mesh, at) for port in self.program.inputs] for at in coordinates
        ]

    def run(self) -> Outputs:
        """What every rank has of every output, one after the other."""
        self.threads.run(lambda comm: self.engines[comm.rank].run(self.inputs[comm.rank]))
        return [
            np.array(engine.array(port.buffer), np.float64) for engine in self.engines for port in self.program.outputs
        ]

    def close(self) -> None:
        """End the ranks' threads."""
        self.threads.close()


# Shards that provably cannot matter, by the end of their weight's name, and why.
IMMATERIAL: dict[str, dict[str, str]] = {
    "vit_op23": {"k_proj.bias": "adds q . b to all scores of a query alike, which softmax takes away again"},
}
FIXTURES = ("llama_op23", "llama_kv_op23", "qwen2_op18", "bert_op23", "gpt2_op18", "t5_op23", "vit_op23", "wan_op23")


@pytest.mark.parametrize("name", FIXTURES)
def test_changing_any_one_shard_changes_an_output(name: str) -> None:
    """Of numbers; positions and index tables are left alone, since others need not exist."""
    ranks = Ranks(shares.plan_of(shares.compile_fixture(name, Case(tp=2, cp=2))), fixtures.load(name).make_inputs())
    try:
        dead = {weight for (weight, _), effect in effects(ranks) if effect <= NOTICEABLE}
    finally:
        ranks.close()
    reasons = IMMATERIAL.get(name, {})
    assert {weight for weight in dead if not weight.endswith(tuple(reasons))} == set()
    assert all(any(weight.endswith(end) for weight in dead) for end in reasons), "a reason that nothing needs"


def effects(ranks: Ranks) -> Iterator[tuple[tuple[str, str], float]]:
    """Every (weight, shard) with how much an output changes when that shard does."""
    expected = ranks.run()
    for key, shard in ranks.shards.items():
        if is_float(shard):
            kept = shard.copy()
            shard[...] = changed(kept)
            yield key, difference(ranks.run(), expected)
            shard[...] = kept


def is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or "float" in array.dtype.name


def changed(array: np.ndarray) -> np.ndarray:
    """Other numbers of like size; what hides masked scores by being huge no longer does."""
    noise = np.random.default_rng(1).standard_normal(array.shape)
    wide = array.astype(np.float64)
    return np.where(np.abs(wide) > HUGE, 0.0, wide * 1.5 + 0.25 * noise).astype(array.dtype)


def difference(ours: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest relative difference of any output on any rank."""
    return max(shares.relative_error(a, b) for a, b in zip(ours, expected))
