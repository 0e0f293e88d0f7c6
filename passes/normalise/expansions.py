"""Everything that is expanded while shapes are being bound: ops of domains beside ONNX's own."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.normalise import microsoft, preview

EXPANSIONS: dict[tuple[str, str], Callable[[ir.Node, Builder], None]] = {
    **microsoft.EXPANSIONS,
    **preview.EXPANSIONS,
}
"""By domain and op: what replaces the node through the builder."""
