"""The models and inputs under the names that README and docs use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxmesh.compiler.api import compile_model
from onnxmesh.compiler.options import Options
from onnxmesh.models import catalogue
from onnxmesh.runtime.mesh import Mesh

SEQ, WIDTH, WIDE, VOCAB = 4096, 16, 32, 64
SIZES: dict[str, Any] = {"hidden": WIDTH, "heads": 4, "kv_heads": 2, "intermediate": WIDE, "vocab": VOCAB}
PLAIN: dict[str, Any] = {"attention_mask": False, "position_ids": False, "opset": 21}
"""With input_ids as the only input."""


def write(folder: Path) -> None:
    """What every page begins with: a model whose dims are open, and inputs for it."""
    catalogue.save("demo", folder / "model.onnx", 1, batch="batch", seq="seq", **SIZES, **PLAIN)
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, SEQ))
    np.savez(folder / "x.npz", input_ids=ids)


def static(path: str, batch: int = 2, seq: int = 64) -> None:
    """A model whose dims are numbers."""
    catalogue.save("demo", path, 1, batch=batch, seq=seq, **SIZES, **PLAIN)


def annotated(path: str, tp: int, cp: int) -> None:
    """Such a model with placements for a mesh in ONNX's own form."""
    static("plain.onnx")
    compile_model("plain.onnx", Options(Mesh.of(tp=tp, cp=cp))).annotate(path)


def sharded_elsewhere() -> None:
    """whole.onnx; what a tool might make of it for two ranks: rank0.onnx, rank1.onnx, and one file: sharded.onnx."""
    random = np.random.default_rng(0)
    up, down = random.standard_normal((2, WIDTH, WIDE)).astype(np.float32) / 4
    _linears("whole.onnx", up, down.T, ranks=1)
    for rank in range(2):
        mine = slice(rank * WIDE // 2, (rank + 1) * WIDE // 2)
        _linears(f"rank{rank}.onnx", up[:, mine], down.T[mine], ranks=2)
    _linears("sharded.onnx", up, down.T, ranks=2)


def _linears(path: str, up: np.ndarray, down: np.ndarray, ranks: int) -> None:
    """relu(x @ up) @ down, summed over the ranks by TensorRT's collective."""
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"], "up"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "down"], ["partial" if ranks > 1 else "y"], "down"),
    ]
    if ranks > 1:
        attributes = {"collective_operation": "all_reduce", "reduce_op": "sum", "root": -1, "nb_rank": ranks}
        nodes.append(helper.make_node("DistCollective", ["partial"], ["y"], "sum", **attributes))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (8, WIDTH)) for name in ("x", "y")]
    weights = [numpy_helper.from_array(np.ascontiguousarray(w), n) for n, w in (("up", up), ("down", down))]
    graph = helper.make_graph(nodes, "mlp", ports[:1], ports[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def fixture(name: str, path: str) -> None:
    """An exported model, unless the page has just exported it."""
    if not Path(path).exists():
        Path(path).write_bytes((Path(__file__).parent / "fixtures" / name).read_bytes())
