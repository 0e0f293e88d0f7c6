"""Decomposed patterns become the semantic ops of the normal form; every hit and every near miss is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from onnxmesh.passes.graph.match import Editor, Finding
from onnxmesh.passes.recognise.activations import recognise_activations
from onnxmesh.passes.recognise.attention import recognise_attention, refine_attention
from onnxmesh.passes.recognise.half_tables import halve_tables
from onnxmesh.passes.recognise.norms import recognise_norms
from onnxmesh.passes.recognise.rotary import recognise_rotary
from onnxmesh.passes.recognise.softmax import recognise_softmax

__all__ = ["PATTERNS", "Finding", "recognise"]

PATTERNS: tuple[Callable[[Editor], Iterator[Finding]], ...] = (
    recognise_norms,
    recognise_activations,
    recognise_rotary,
    recognise_softmax,
    refine_attention,
    recognise_attention,
)
"""In this order: attention needs its softmax, and an Attention of the model is refined before others are made."""


def recognise(model: ir.Model) -> tuple[ir.Model, list[Finding]]:
    """Replace the patterns in a model in normal form, in place. Nothing matches on names."""
    graph = model.graph
    editor = Editor(graph)
    findings = [finding for pattern in PATTERNS for finding in pattern(editor)]
    halve_tables(editor)
    _finish(graph)
    return model, findings


def _finish(graph: ir.Graph) -> None:
    """Restore the topological order, and remove the initialisers without users that the graph has now."""
    graph.sort()
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
