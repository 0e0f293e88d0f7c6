"""Whether every op that is left can be computed: the answer comes when compiling, not when running."""

from __future__ import annotations

import onnx_ir as ir

import onnxmesh.runtime.kernels  # noqa: F401  (registers every kernel)
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.ir.loose import BODIES, onnx_op
from onnxmesh.passes.graph.infer import label
from onnxmesh.runtime.kernels import registry
from onnxmesh.runtime.plan import KINDS


def check_supported(graph: ir.Graph) -> None:
    """Raise ModelError, naming the node, where no kernel computes an op."""
    known = registry.names() | set(KINDS)
    for node in graph:
        if node.op_type not in known and BODIES not in node.meta and onnx_op(node) == node.op_type:
            raise ModelError(
                f"{label(node)} cannot be computed: there is no kernel for {node.op_type}",
                hint="export the model without that op",
                code="OM1301",
            )
