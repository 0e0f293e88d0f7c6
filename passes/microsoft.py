"""Ops of ONNX Runtime's domain `com.microsoft`, expanded to ONNX ops and the normal form's Attention and Rotary."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxmesh.passes.build import Builder

Expansion = Callable[[ir.Node, Builder], None]
EXPANSIONS: dict[tuple[str, str], Expansion] = {}
