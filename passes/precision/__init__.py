"""Half precision for a float32 model (docs/precision.md)."""
