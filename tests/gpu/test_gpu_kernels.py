"""The tests of the kernels once more, on a GPU: as prepared launches where there are, else the generic kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_kernels_attention
import test_kernels_onnx
import test_kernels_signal
from test_kernels_attention import *  # noqa: F403
from test_kernels_dtypes import *  # noqa: F403
from test_kernels_onnx import *  # noqa: F403
from test_kernels_signal import *  # noqa: F403

from onnxmesh.runtime.dtypes import is_for_hosts
from onnxmesh.runtime.kernels.registry import Call, find

_OTHER_BITS = {
    "test_fused_expressions_round_like_the_ops_alone": "on a GPU a chain may keep float32 inside (docs/fusion.md)",
}


@pytest.fixture(autouse=True)
def on_the_gpu(request: pytest.FixtureRequest, gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that the tests ask for gets CuPy arrays."""
    gpus(1)
    name = getattr(request.node, "originalname", request.node.name)
    if name in _OTHER_BITS:
        pytest.skip(_OTHER_BITS[name])
    import onnxmesh.runtime.cuda.kernels
    import onnxmesh.runtime.cuda.launch_all  # noqa: F401  (both register)
    from onnxmesh.runtime.cuda.device import CudaDevice
    from onnxmesh.runtime.cuda.launchers import Job, Workspace, prepare

    device = CudaDevice()

    def gpu_find(op: str) -> Callable[..., Any]:
        kernel = find(op, "cupy")

        def run(call: Call, *arrays: Any) -> Any:
            with device.scope():
                if any(is_for_hosts(x.dtype) for x in (*arrays, *call.outs) if x is not None):
                    pytest.skip("CuPy has no arrays of these dtypes")
                there = tuple(None if x is None else device.put(np.array(x)) for x in arrays)
                outs = tuple(device.xp.empty(out.shape, out.dtype) for out in call.outs)
                for out in outs:
                    out.view("u1").fill(0xFF) if out.size and out.ndim else out.fill(0)
                never = (False,) * len(there)
                attrs = {**call.attrs, "to": call.outs[0].dtype.name} if op == "Cast" else call.attrs  # as in plans
                launch = prepare(Job(op, attrs, there, outs, never, call.coordinate, Workspace()))
                if launch is not None:
                    launch(int(device.stream.ptr))
                    results = [device.get(x) for x in outs]
                    return results[0] if len(results) == 1 else tuple(results)
                result = kernel(Call(device.xp, call.attrs, call.outs, call.coordinate), *there)
                if isinstance(result, tuple):
                    return tuple(device.get(x) for x in result)
                return device.get(result)

        return run

    for module in (test_kernels_onnx, test_kernels_attention, test_kernels_signal):
        monkeypatch.setattr(module, "find", gpu_find)
