"""How much memory a plan takes on each rank's device, known before it runs."""

from __future__ import annotations

from math import prod

from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.exchange import staging_sizes
from onnxmesh.runtime.loose import is_loose
from onnxmesh.runtime.memory import WORKSPACE_BYTES, aligned
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.placement import local_shape
from onnxmesh.runtime.plan import Control, Plan, Port, Program, Weight


def local_bytes(tensor: Weight | Port, mesh: Mesh) -> int:
    """Bytes of one rank's piece of a weight, an input or an output; none of a loose value."""
    if is_loose(tensor.dtype):
        return 0
    shape = tensor.shape
    for axis, placement in tensor.spec:
        shape = local_shape(shape, placement, mesh.axis_size(axis))
    return prod(shape) * dtype(tensor.dtype).itemsize


def arena_bytes(program: Program) -> int:
    """Bytes of a program's arena, and of the arenas of the programs that its control flow holds."""
    held = (inner for item in program.instructions if isinstance(item, Control) for inner in item.programs.values())
    return program.arena_bytes + sum(map(arena_bytes, held))


def staging_bytes(program: Program, mesh: Mesh) -> int:
    """Bytes in which collectives pack and unpack on a GPU, where they cannot write into each other's memory."""
    return sum(map(aligned, staging_sizes(program, mesh).values()))


def by_kind(plan: Plan) -> dict[str, int]:
    """Bytes that a rank's session takes on a host, by what they hold."""
    program = plan.programs[0]
    return {
        "weights": sum(local_bytes(weight, plan.mesh) for weight in plan.weights),
        "arena": arena_bytes(program),
        "inputs": sum(local_bytes(port, plan.mesh) for port in program.inputs),
    }


def device_bytes(plan: Plan) -> int:
    """Bytes that a rank's session takes on a GPU: weights, inputs, arena, and the kernels' scratch at most.

    `staging_bytes` come on top where the GPUs do not reach each other's memory, and what CUDA and NCCL themselves need.
    """
    program = plan.programs[0]
    tensors: list[Weight | Port] = [*plan.weights, *program.inputs]
    held = sum(aligned(local_bytes(tensor, plan.mesh)) for tensor in tensors)
    return held + aligned(arena_bytes(program)) + WORKSPACE_BYTES
