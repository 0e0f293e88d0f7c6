"""The runtime: knows plans, and nothing of the compiler."""
