"""Generated CUDA kernels (docs/codegen.md). Importing this registers their launchers."""

from onnxmesh.runtime.cuda.codegen import launching, moving  # noqa: F401
