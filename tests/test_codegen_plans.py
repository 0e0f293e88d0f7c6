"""Whole plans with generated kernels in place of the generic ones, on a CPU (see cuda_on_host.py)."""

from __future__ import annotations

import threading
from pathlib import Path

import cuda_on_host
import numpy as np
import pytest
import shares
from shares import TOLERANCE, Case, fixtures

from onnxmesh.runtime.cuda.codegen import compiling, launching, moving  # noqa: F401  (register)
from onnxmesh.runtime.cuda.launchers import Job, Workspace
from onnxmesh.runtime.engine import Engine, Step
from onnxmesh.runtime.plan import Instruction, Launch
from onnxmesh.runtime.session import Session

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="needs g++ to run CUDA kernels on a CPU")

LIBRARIES = frozenset("MatMul FusedMatMul Attention AttentionBlock Conv Einsum".split())
"""Ops of libraries, which have no generated kernel."""
PLANS = [
    ("flux_fp16", Case(cp=2, strategy="ulysses")),
    ("flux_op23", Case(cp=2, strategy="ring")),
    ("llama_bf16", Case()),
    ("llama_gqa2_op23", Case(tp=2)),
    ("mixtral_op23", Case(tp=2)),
    ("wan_op23", Case(cp=2, strategy="ring")),
]


@pytest.mark.parametrize(("name", "case"), [pytest.param(name, case, id=name) for name, case in PLANS])
def test_a_plan_gives_the_reference_with_generated_kernels(
    name: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All launches but those of libraries are generated, on the buffers of the plan, with their strides."""
    host, lock, generic, left = cuda_on_host.Host(), threading.Lock(), Engine._step, set()
    monkeypatch.setattr(compiling, "enqueue", host.enqueue)

    def step(engine: Engine, item: Instruction) -> Step:
        if not isinstance(item, Launch):
            return generic(engine, item)
        ins = tuple(engine.array(i) if i >= 0 else None for i in item.ins)
        outs = tuple(engine.array(i) for i in item.outs)
        never = (False,) * len(ins)
        with lock:
            launch = cuda_on_host.prepare(
                Job(item.kernel, item.attrs, ins, outs, never, engine._coordinate, Workspace(), item.node)
            )
        if launch is None:
            left.add(item.kernel)
            return generic(engine, item)
        return lambda: (launch(0), outs)[1]

    monkeypatch.setattr(Engine, "_step", step)
    plan, feeds = shares.plan_of(shares.compile_fixture(name, case)), fixtures.load(name).make_inputs()
    with Session(plan) as session:
        host.compile(tmp_path)
        outputs = dict(zip([port.name for port in session.get_outputs()], session.run(None, feeds)))
    assert left <= LIBRARIES
    for key, expected in shares.reference(name).items():
        assert shares.relative_error(outputs[key], expected) <= tolerance(name, expected)


def tolerance(name: str, expected: np.ndarray) -> float:
    kind = "float16" if "fp16" in name else "bfloat16" if "bf16" in name else expected.dtype.name
    return TOLERANCE.get(kind, 0)
