"""Importing this registers every launcher."""

from onnxmesh.runtime.cuda import attention, codegen, einsum, gemm  # noqa: F401
