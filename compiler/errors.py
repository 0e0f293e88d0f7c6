"""Errors of the compiler."""

from __future__ import annotations

from onnxmesh.runtime.errors import OnnxMeshError


class ModelError(OnnxMeshError):
    """The ONNX model cannot be read, is not valid, or leaves a dim unbound."""

    exit_code = 3


class ShardingError(OnnxMeshError):
    """Nothing worth having could be sharded on an axis, or a pin cannot be met."""

    exit_code = 4


class VerificationError(OnnxMeshError):
    """The sharded result differs from the reference."""

    exit_code = 6


class CompilerDefect(OnnxMeshError):
    """A pass broke an invariant: a defect of onnxmesh, never of the model."""

    code = "OM9001"
