"""Generated kernels on a GPU give what the generic ones give: a part of the cases of tests/test_codegen.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

MOST = 16
"""Cases of a group: NVRTC needs 0.1 s for each that is not in its cache yet."""
GROUPS = [
    *("samples", "elementwise", "expressions", "norms", "fused norms"),
    *("rotary", "copies", "indexed", "reductions", "merges", "selections"),
]


@pytest.fixture(autouse=True)
def gpu(gpus: Any) -> None:
    gpus(1)


@pytest.mark.parametrize("group", GROUPS)
def test_generated_kernels_give_what_the_generic_ones_give(group: str) -> None:
    import cupy
    import test_codegen

    from onnxmesh.runtime.cuda.launchers import Job, Workspace, prepare

    cases = list(test_codegen.GROUPS[group]())
    stream = cupy.cuda.Stream(non_blocking=True)
    for case in cases[:: -(-len(cases) // MOST)]:
        with stream:
            ins = tuple(None if x is None else x.view(cupy.asarray(x.buffer), cupy) for x in case.ins)
            outs = tuple(x.view(cupy.asarray(x.buffer), cupy) for x in case.outs)
            launch = prepare(Job(case.op, case.attrs, ins, outs, (False,) * len(ins), case.coordinate, Workspace()))
            if launch is not None:
                launch(stream.ptr)
                case.check([_host(x, cupy) for x in outs])


def _host(array: Any, cupy: Any) -> np.ndarray:
    return np.asarray(cupy.asnumpy(array))


def test_a_launch_is_captured_and_several_pairs_are_one_launch() -> None:
    import cupy

    from onnxmesh.runtime.cuda.codegen.copy import strided_copy

    source = cupy.arange(2 * 6 * 16, dtype="f4").reshape(2, 6, 16)
    target = cupy.zeros((6, 2, 16), "f4")
    launch = strided_copy([(source[i], target[:, i]) for i in range(2)])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        launch(stream.ptr)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    assert cupy.array_equal(target, source.transpose(1, 0, 2))
