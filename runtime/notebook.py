"""How objects show themselves: one line in a console, a small table in a notebook, without the data of weights."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from onnxmesh.runtime.mesh import Mesh

if TYPE_CHECKING:
    from onnxmesh.runtime.plan import Plan, Program

Facts = Sequence[tuple[str, str]]
"""Names and values."""
LONGEST = 160
"""Characters of a line; of a value in a table."""


class Shown:
    """An object that says what it is by `_facts`: a title, and what is known of it."""

    def _facts(self) -> tuple[str, Facts]:
        raise NotImplementedError

    def __repr__(self) -> str:
        title, facts = self._facts()
        said = ", ".join(f"{name} {value}" if name else value for name, value in facts)
        return f"<{_cut(f'{title}: {said}' if said else title)}>"

    def _repr_html_(self) -> str:
        """For IPython: see its rich display."""
        title, facts = self._facts()
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_cut(value))}</td></tr>" for name, value in facts)
        return f"<table><caption>{escape(_cut(title))}</caption>{rows}</table>"


class ShownSession(Shown):
    """A session: its plan, its device, and whether it is open."""

    plan: Plan
    _closed: bool
    _kind: str

    def _facts(self) -> tuple[str, Facts]:
        program, state = self.plan.programs[0], "closed" if self._closed else "open"
        title = f"Session of {mesh_text(self.plan.mesh)} on {self._kind}"
        return title, [("", state), *ports(program)]


def ports(program: Program) -> Facts:
    """The names of a program's inputs and outputs."""
    both = (("inputs", program.inputs), ("outputs", program.outputs))
    return [(what, " ".join(port.name for port in some)) for what, some in both]


def mesh_text(mesh: Mesh) -> str:
    """`cp=2 x tp=4`, or `one rank`."""
    return " x ".join(f"{axis}={ranks}" for axis, ranks in mesh.axes if ranks > 1) or "one rank"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
