"""Importing this registers every launcher."""

import onnxmesh.runtime.cuda.attention
import onnxmesh.runtime.cuda.codegen
import onnxmesh.runtime.cuda.einsum
import onnxmesh.runtime.cuda.gemm  # noqa: F401
