"""Importing this registers every launcher."""

from onnxmesh.runtime.cuda import attention, codegen, gemm  # noqa: F401
