"""What a user can ask of a compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.profile import DeviceProfile

CpStrategy = Literal["auto", "allgather", "ulysses", "ring"]
CP_STRATEGIES: tuple[CpStrategy, ...] = ("auto", "allgather", "ulysses", "ring")
Precision = Literal["model", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("model", "bf16", "fp16")
HALVES = {"bf16": "bfloat16", "fp16": "float16"}
"""The dtypes of the precisions other than the model's own."""


@dataclass(frozen=True)
class Options:
    """Options of one compile.

    Attributes:
        mesh: sizes of the axes dp, cp and tp.
        shapes: input name -> sizes; binds dynamic dims.
        dims: dim name -> size; binds dynamic dims.
        values: input name -> value; the input becomes a constant.
        cp_strategy: how self-attention runs on the cp axis; `auto` lets the costs choose.
        shard_outputs: leave graph outputs as the program has them, instead of whole on every rank.
        allow_replicated: accept an axis on which nothing worth having was sharded.
        profile: the device to compile for; None: that of ONNXMESH_PROFILE, or the one that comes with the package.
        precision: what a float32 model computes in; `model` leaves it as it is.
        own_inputs: of a graph that was sharded elsewhere, the inputs of which every rank is given its own.
    """

    mesh: Mesh
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    cp_strategy: CpStrategy = "auto"
    shard_outputs: bool = False
    allow_replicated: bool = False
    profile: DeviceProfile | None = None
    precision: Precision = "model"
    values: Mapping[str, Any] = field(default_factory=dict)
    own_inputs: Sequence[str] = ()
