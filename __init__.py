"""onnxmesh: compile a plain ONNX file into a sharded engine for many devices."""
