"""Devices as onnx.backend names them."""

from __future__ import annotations

from dataclasses import dataclass

from onnxmesh.runtime.errors import InvalidArgument

MOST_RANKS = 64


@dataclass(frozen=True)
class Target:
    """What a device's name stands for: `session` is Session's device, `ranks` the size of the tp axis."""

    session: str
    ranks: int = 1


def parse(device: str) -> Target:
    """`CPU` and `CPU:1` are one rank, `CPU:4` four ranks of tensor parallelism; `CUDA:1` is one rank on GPU 1.

    Raises:
        InvalidArgument: it is none of these.
    """
    kind, colon, number = device.partition(":")
    if colon and not number.isdigit():
        kind = ""
    if kind == "CPU" and 1 <= int(number or 1) <= MOST_RANKS:
        return Target("cpu", int(number or 1))
    if kind == "CUDA":
        return Target(f"cuda:{number}" if number else "cuda")
    raise InvalidArgument(
        f"unknown device {device!r}",
        hint=f"CPU, CPU:RANKS (up to {MOST_RANKS}), CUDA, or CUDA:NUMBER of a GPU",
        code="OM5008",
    )


def is_present(target: Target) -> bool:
    """Whether this host has it."""
    if target.session == "cpu":
        return True
    try:
        from onnxmesh.runtime.cuda.device import device_count

        return int(target.session.partition(":")[2] or 0) < device_count()
    except Exception:  # no CuPy, no driver, no GPU
        return False
