"""Builders of small and full-size ONNX graphs for demos, tests and benchmarks."""
