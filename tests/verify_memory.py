"""A process that compares a run tensor by tensor and prints what that took at most: `python verify_memory.py [wrong]`.

Prints JSON: bytes that the run itself holds (all ranks' weights, inputs and arenas), and the process's highest
resident set above what it had before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxmesh
from onnxmesh.runtime import footprint
from onnxmesh.runtime.plan import Plan
from onnxmesh.verification.bug_report import keep_in
from onnxmesh.verification.each import Examination, examine
from onnxmesh.verification.memory import give_back_at_once
from onnxmesh.verification.model import Model

ROWS, WIDTH = 640, 768
"""Two rows of so many vectors: with the weights of two ranks, a live set of some 100 MB."""


def branches(rows: int, width: int, count: int) -> onnx.ModelProto:
    """`count` products of one tensor [2, rows, width] that are all alive before they are added in pairs."""
    rng = np.random.default_rng(0)
    weights = [(rng.standard_normal((width, width)) / width**0.5).astype(np.float32) for _ in range(count)]
    nodes, alive = [], []
    for i in range(count):
        nodes += [
            helper.make_node("MatMul", ["x", f"w{i}"], [f"product{i}"], name=f"multiply{i}"),
            helper.make_node("Tanh", [f"product{i}"], [f"branch{i}"], name=f"bend{i}"),
        ]
        alive.append(f"branch{i}")
    while len(alive) > 1:  # the first with the last, so that all are needed to the end
        a, b = alive.pop(0), alive.pop()
        name = f"{a}_{b.removeprefix('branch')}"
        nodes += [
            helper.make_node("Mul", [a, b], [f"times_{name}"], name=f"times_{name}"),
            helper.make_node("Softmax", [f"times_{name}"], [name], axis=-1, name=f"soft_{name}"),
        ]
        alive.append(name)
    shape = [2, rows, width]
    graph = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(alive[0], TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def main(arguments: Sequence[str]) -> None:
    """Measure."""
    give_back_at_once()
    rows = 64
    _measured(branches(rows, 64, 2), rows, 64, wrong=True)  # all that is imported and started once
    print(json.dumps(_measured(branches(ROWS, WIDTH, 10), ROWS, WIDTH, wrong="wrong" in arguments)))


def _measured(proto: onnx.ModelProto, rows: int, width: int, *, wrong: bool) -> dict[str, object]:
    from planted import planted, wrong_sign

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path, save_as_external_data=True, location="weights", size_threshold=1024)
        del proto
        plan = onnxmesh.compile(path, dp=2)
        feeds = {"x": np.random.default_rng(1).standard_normal((2, rows, width)).astype(np.float32)}
        model = Model(path)
        context = planted("Softmax", wrong_sign, {"dp": 1}) if wrong else nullcontext()
        with context:
            peak, found = _peak(lambda: examine(plan, model, feeds, keep=keep_in(folder)))
    names = [item.compared.name for item in found.differences]
    return {"live": _live(plan), "peak": peak, "compared": len(found.compared), "wrong": names}


def _live(plan: Plan) -> int:
    return plan.mesh.size * sum(footprint.by_kind(plan).values())


def _peak(work: Callable[[], Examination]) -> tuple[int, Examination]:
    """How far the resident set rises above what it is before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = work()
    return _status("VmHWM") - before, result


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(sys.argv[1:])
