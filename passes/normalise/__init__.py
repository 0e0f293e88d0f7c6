"""To normal form (docs/dialect.md): fewer ops, whose meaning hangs on no input that holds numbers."""
