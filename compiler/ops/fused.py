"""Fused ops of a rank's graph: no axis is applied after fusion, so that only their cost is told here."""

from __future__ import annotations

from onnxmesh.compiler.ir.rule import register
from onnxmesh.compiler.ops.matmul import matmul_flops

register("FusedMatMul", flops=matmul_flops)
register("FusedNorm")
