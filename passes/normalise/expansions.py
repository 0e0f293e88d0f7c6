"""Everything that is expanded while shapes are being bound: ops of domains beside ONNX's own, and quantised ones."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.passes.graph.build import Expansion
from onnxmesh.passes.normalise import classical, collectives, preview, quantised
from onnxmesh.passes.normalise.gradient import gradient
from onnxmesh.passes.normalise.microsoft import table as microsoft

EXPANSIONS: dict[tuple[str, str], Expansion] = {
    **classical.EXPANSIONS,
    **microsoft.EXPANSIONS,
    **preview.EXPANSIONS,
    **quantised.EXPANSIONS,
    ("ai.onnx.preview.training", "Gradient"): gradient,
}
"""By domain and op."""


def expansion_of(node: ir.Node) -> Expansion | None:
    """What expands a node, if anything does."""
    if node.domain == classical.DOMAIN and not classical.is_numeric(node):
        return None
    return EXPANSIONS.get((node.domain, node.op_type), collectives.SETTLED.get(node.op_type))
