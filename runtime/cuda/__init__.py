"""The GPU: one device per rank, through CuPy, NCCL and cuBLASLt. Nothing here is imported unless it is asked for."""
