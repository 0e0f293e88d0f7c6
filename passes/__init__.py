"""The passes of the pipeline, in the order of `compiler.api.PIPELINE`."""
