"""Choosing placements on one axis: classes, candidates, roles, the integer program."""
