"""Ops of com.microsoft on two ranks: what ONNX Runtime gives, with their batch shared where they have one."""

from __future__ import annotations

import pytest
import test_microsoft
import test_microsoft_attention
from microsoft_cases import Case, assert_close
from test_microsoft_attention import filled

from onnxmesh.compiler.api import compile_model
from onnxmesh.compiler.options import Options
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.session import Session

CASES = [*test_microsoft.CASES, *test_microsoft_attention.CASES]
WHOLE = {
    *("trilu", "grid", "pad", "range", "range by steps", "embedding", "no nan", "a packed batch"),
    *("gqa decode", "gqa decode, known", "gqa three steps", "gqa decode in a window", "gqa steps, softcap, sink"),
    *("gqa 8 bits", "gqa 8 bits by channel"),
}
"""Cases of one sequence or of none: there is nothing for data parallelism to share."""


WAYS = [(case, "dp") for case in CASES] + [(case, "tp") for case in CASES if case.known]


@pytest.mark.parametrize(("case", "axis"), WAYS, ids=lambda way: getattr(way, "name", way))
def test_two_ranks_give_what_one_gives(case: Case, axis: str) -> None:
    state = compile_model(case.model(), Options(Mesh.of(**{axis: 2}), allow_replicated=True))
    assert state.plan is not None
    with Session(state.plan) as session:
        found = session.run(None, case.feeds())
        outputs = dict(zip([port.name for port in session.get_outputs()], found))
    assert_close(filled(case, outputs), filled(case, case.expected()))
    if axis == "dp":
        divided = {s.factor for placed in state.placed for s in placed.strategies.values()} - {"replicate"}
        assert bool(divided) == (case.name not in WHOLE)
