"""Ranks compare what they are about to run, and every one of them says what differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_session import MODEL, X, plan

from onnxmesh.runtime.agreement import agree, differences, plan_facts
from onnxmesh.runtime.comm import Communicator
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.session import Session
from onnxmesh.runtime.threads import run_ranks

MESH = Mesh.of(tp=2, cp=2)


def test_equal_ranks_agree() -> None:
    run_ranks(MESH, lambda comm: agree(comm, {"plan": "a"}), timeout=10)


def test_every_rank_names_what_differs_and_where() -> None:
    def body(comm: Communicator) -> str:
        facts = {"plan": "b" * 64 if comm.rank == 3 else "a" * 64, "CuPy": "14.2", "NCCL": str(comm.rank // 2)}
        with pytest.raises(PlanError) as caught:
            agree(comm, facts)
        return str(caught.value)

    for text in run_ranks(MESH, body, timeout=10):
        assert text == (
            "the ranks do not run the same: NCCL is 0 on ranks 0-1, 1 on ranks 2-3; "
            "plan is aaaaaaaaaaaa on ranks 0-2, bbbbbbbbbbbb on rank 3"
        )


def test_a_fact_that_a_rank_lacks_differs_too() -> None:
    assert differences([{"a": "1"}, {}, {"a": "1"}]) == "a is 1 on ranks 0, 2, none on rank 1"


def test_the_digest_is_that_of_the_whole_plan() -> None:
    one = plan_facts(plan())
    weights = tuple(replace(weight, shards={"tp0": "0" * 64, "tp1": "1" * 64}) for weight in plan().weights)
    assert plan_facts(plan()) == one
    assert plan_facts(replace(plan(), weights=weights))["plan"] != one["plan"]


def test_sessions_with_different_plans_do_not_start() -> None:
    def body(comm: Communicator) -> str:
        program = plan().programs[0]
        other = replace(plan(), programs=(replace(program, arena_bytes=2400),))
        with pytest.raises(PlanError, match=r"plan is .* on ranks 0, 2-3, .* on rank 1") as caught:
            Session(other if comm.rank == 1 else plan(), weights=MODEL.__getitem__, communicator=comm)
        return str(caught.value)

    assert len(set(run_ranks(MESH, body, timeout=10))) == 1


def test_sessions_that_differ_in_io_do_not_start() -> None:
    def body(comm: Communicator) -> None:
        io = "root" if comm.rank else "all"
        with pytest.raises(PlanError, match="io is all on rank 0, root on ranks 1-3"):
            Session(plan(), weights=MODEL.__getitem__, communicator=comm, io=io).run(None, {"x": X})  # type: ignore[arg-type]

    run_ranks(MESH, body, timeout=10)
