"""Binding dims and folding constants: every shape becomes known."""
