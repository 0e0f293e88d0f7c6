"""Ops of ONNX Runtime's domain `com.microsoft`, expanded to ONNX ops, one table for all of them.

Expansions run while shapes are being bound, since ONNX's shape inference knows nothing of these ops. docs/microsoft.md
lists them all.
"""

from __future__ import annotations

from onnxmesh.passes.graph.build import Expansion
from onnxmesh.passes.normalise.microsoft.activations import ACTIVATION_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.attention import ATTENTION_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.bnb import BNB_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.generation import GENERATION_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.moe import MOE_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.norms import NORM_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.plain import PLAIN_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.products import PRODUCT_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.quantised import QUANTISED_EXPANSIONS
from onnxmesh.passes.normalise.microsoft.state import STATE_EXPANSIONS

DOMAIN = "com.microsoft"

EXPANSIONS: dict[tuple[str, str], Expansion] = {
    (DOMAIN, op): expansion
    for op, expansion in {
        **ACTIVATION_EXPANSIONS,
        **NORM_EXPANSIONS,
        **PRODUCT_EXPANSIONS,
        **MOE_EXPANSIONS,
        **PLAIN_EXPANSIONS,
        **ATTENTION_EXPANSIONS,
        **QUANTISED_EXPANSIONS,
        **BNB_EXPANSIONS,
        **STATE_EXPANSIONS,
        **GENERATION_EXPANSIONS,
    }.items()
}
