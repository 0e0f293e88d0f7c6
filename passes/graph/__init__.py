"""Working on graphs: building nodes, shapes and dtypes, matching, common subexpressions."""
