"""One file per family of operators: rules, costs, samples."""
