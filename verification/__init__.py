"""Verification tensor by tensor: a run beside the model's own nodes, and what differs first (docs/verify.md)."""
