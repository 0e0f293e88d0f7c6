"""Ops of ONNX Runtime's domain `com.microsoft`: a module for each family of them, and the table of all."""
