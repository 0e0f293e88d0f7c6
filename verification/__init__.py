"""Verification tensor by tensor: a sharded run beside the model's own nodes, and what differs first (docs/verify.md)."""
