"""Searches for tokens around a whole decoder: `com.microsoft` has ops for them, which are refused."""

from __future__ import annotations

import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.graph.build import Builder, Expansion
from onnxmesh.passes.graph.infer import label

GENERATION = ("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch")


def refuse_generation(node: ir.Node, _: Builder) -> None:
    """Loops over a whole decoder.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        f"{label(node)} searches for tokens around a whole decoder, which is not supported",
        hint="compile the decoder that it holds, with its cache as inputs and outputs, and search outside",
        code="OM1303",
    )


GENERATION_EXPANSIONS: dict[str, Expansion] = dict.fromkeys(GENERATION, refuse_generation)
