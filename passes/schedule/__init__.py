"""The order in which a rank runs its nodes, and what it sends together."""
