"""Looking at plans: what they do, how two of them differ."""
