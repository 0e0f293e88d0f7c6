"""The plan: one program for every rank, as plain data.

Every tensor of a program is a buffer with a rank's own (local) shape. Instructions run in list order on a
CPU; `after` names the instructions that one really waits for, so a backend with streams may overlap the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from onnxmesh.runtime.dtypes import dtype as to_dtype
from onnxmesh.runtime.loose import is_loose
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.notebook import Facts, Shown, mesh_text, ports
from onnxmesh.runtime.placement import Placement
from onnxmesh.runtime.report import Report

VERSION = 3

ROOTED = ("Broadcast", "ReduceTo", "GatherTo", "ScatterFrom")
"""Kinds of collectives that have a root. No pass makes them; a graph that was sharded elsewhere may hold them."""

KINDS = ("AllReduce", "ReduceScatter", "AllGather", "AllToAll", "Shift", *ROOTED)
"""Kinds of collectives."""

Spec = tuple[tuple[str, Placement], ...]
"""(axis, placement) in the order the axes apply; an axis that is not named is Replicate."""

Attributes = Mapping[str, Any]
"""JSON values only: bool, int, float, str, lists and objects of them."""

Recipe = Mapping[str, Any]
"""How a weight comes from the model, as JSON (see runtime/recipe.py)."""


@dataclass(frozen=True)
class Buffer:
    """A local tensor. dtype names are NumPy's or ml_dtypes' (`float32`, `bfloat16`, `float8_e4m3fn`, `bool`).

    kind `arena`: `offset` is its place in the arena in bytes. kind `view`: bytes of the buffer `source`, `offset` of
    them after its first; element i lies `sum(i * strides)` elements from there, an empty `strides` says row-major.
    kind `weight`: `source` is the index of the weight. kind `input`: `source` is the index of the graph input.

    kind `loose`: a slot outside of the arena for a value without a static tensor type. Its dtype, and that of an input
    which is such a value, is ONNX Runtime's word for the type (`seq(tensor(float))`); a dim that is not known is -1.
    """

    dtype: str
    shape: tuple[int, ...]
    kind: Literal["arena", "view", "weight", "input", "loose"]
    offset: int = 0
    source: int = -1
    strides: tuple[int, ...] = ()

    @property
    def is_loose(self) -> bool:
        """Whether it holds a value without a static tensor type (see onnxmesh.runtime.loose)."""
        return is_loose(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements that are planned: none of a loose value. Raises ValueError for an unknown dtype."""
        return 0 if self.is_loose else prod(self.shape) * to_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Port:
    """A graph input or output: its global view, its placement, and the buffer that holds the local view.

    dtype and shape of a loose value are those of its buffer.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: Spec
    buffer: int

    @property
    def is_loose(self) -> bool:
        """Whether it is a value without a static tensor type (see onnxmesh.runtime.loose)."""
        return is_loose(self.dtype)


@dataclass(frozen=True)
class Weight:
    """A constant of the program. `shape` is the global view after the recipe, before it is cut.

    `shards` maps the key of a coordinate (`all`, `tp0`, `cp1-tp3`: only axes that cut it) to the SHA-256 of
    the shard's bytes; it is empty in a plan without weights.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: Spec
    recipe: Recipe
    shards: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """Run a kernel. `node` names the ONNX node it comes from; `ins` may hold -1 for an absent optional input."""

    kernel: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    attrs: Attributes = field(default_factory=dict)
    node: str = ""
    stream: int = 0
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Control(Launch):
    """Control flow: `kernel` (If, Loop, Scan, SequenceMap) runs the named programs, each on one rank by itself.

    What a program reads besides its operands, weights included, are the last `captured` of `ins`, in the order of
    its last inputs. All ranks get the same operands, so they all go the same way.
    """

    captured: int = 0
    programs: Mapping[str, Program] = field(default_factory=dict)


@dataclass(frozen=True)
class Collective:
    """Send data along a mesh axis.

    kind: AllReduce(reduce), ReduceScatter(reduce, dim, segments), AllGather(dim, segments),
    AllToAll(split_dim, split_segments, concat_dim, concat_segments), Shift(offset); and with a root, a coordinate on
    the axis, Broadcast(root), ReduceTo(reduce, root), GatherTo(dim, root), ScatterFrom(dim, root), where ReduceTo and
    GatherTo give zeros to the other ranks. Segments are `[[size, copies], ...]` of the view that is whole on this axis.
    `reason` says who wanted it.

    Several inputs are sent together, in one launch of a library; each has an output, and attributes of its own where
    these are a list, `each`.
    """

    kind: str
    axis: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    attrs: Attributes = field(default_factory=dict)
    node: str = ""
    reason: str = ""
    stream: int = 0
    after: tuple[int, ...] = ()

    def attrs_of(self, number: int) -> Attributes:
        """The attributes for one of several inputs: those in the list `each`, or else the same for all."""
        each = self.attrs.get("each")
        return self.attrs if each is None else each[number]


Instruction = Launch | Collective


@dataclass(frozen=True)
class Program:
    """The instructions of one shape profile.

    `dims` are the dims it was bound to, `values` the inputs that it was bound to by value, as constant recipes.
    """

    dims: Mapping[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    buffers: tuple[Buffer, ...]
    instructions: tuple[Instruction, ...]
    arena_bytes: int
    values: Mapping[str, Recipe] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What `onnxmesh compile` makes, and all that a rank needs to know.

    `source` is where the weights are: a function that reads the model's initialisers by name, or the folder that the
    plan was loaded from. Neither it nor `report`, the report for people, is part of what a rank runs.
    """

    mesh: Mesh
    weights: tuple[Weight, ...]
    programs: tuple[Program, ...]
    producer: str = ""
    version: int = VERSION
    report: Report = field(default_factory=Report, compare=False)
    source: Any = field(default=None, compare=False)

    def save(
        self, folder: str | Path, *, weights: bool = True, progress: Callable[[int, int], None] | None = None
    ) -> Plan:
        """Write the plan to a folder, beside and then renamed; `weights=False` writes it without them.

        `progress` is told how many weights are written, of how many.

        Raises:
            PlanError: see onnxmesh.runtime.serialize.save.
        """
        from onnxmesh.runtime.serialize import save  # the types know nothing of files

        return save(self, folder, self.source if weights else None, self.report, progress)

    def _facts(self) -> tuple[str, Facts]:
        program = self.programs[0]
        facts = [("instructions", str(len(program.instructions))), ("weights", str(len(self.weights)))]
        return f"Plan for {mesh_text(self.mesh)}", [*facts, *ports(program)]
