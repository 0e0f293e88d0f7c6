"""Expressions as C++: the steps of a fused op computed on the elements of one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxmesh.runtime.cuda.codegen.formulas import SHARP, Use, formula, number
from onnxmesh.runtime.cuda.codegen.operand import Operand, Unsuited, computed, stored
from onnxmesh.runtime.cuda.codegen.tiles import Access, loop
from onnxmesh.runtime.dtypes import dtype, is_narrow
from onnxmesh.runtime.kernels.fused import LITERAL, Step, result_dtype

ROTARY = "Rotary"


class Program:
    """The steps of an expression over operands, with every value's dtype. Values count as in `Step.operands`.

    Raises Unsuited for dtypes that a kernel cannot compute.
    """

    def __init__(self, steps: Sequence[Step], inputs: Sequence[Operand | None]) -> None:
        self.inputs, self.steps = list(inputs), [_explicit(step, inputs) for step in steps]
        self.dtypes: list[Any] = [None if x is None else x.dtype for x in inputs]
        self.shapes: list[tuple[int, ...]] = [() if x is None else x.shape for x in inputs]
        self.readers = [0] * (len(inputs) + len(steps))
        for step in self.steps:
            given = [i for i in step.operands if i is not None]
            kinds = [self.dtypes[i] for i in given]
            self.dtypes.append(dtype(step.attrs["dtype"]) if step.op == LITERAL else self._dtype(step, kinds))
            self.shapes.append(np.broadcast_shapes(*(self.shapes[i] for i in given if not self._is_table(step, i))))
            computed(self.dtypes[-1])
            for i in given:
                self.readers[i] += 1

    def step(self, value: int) -> Step:
        """The step that makes a value that is not an input."""
        return self.steps[value - len(self.inputs)]

    def is_input(self, value: int) -> bool:
        """Whether the value is an input."""
        return value < len(self.inputs)

    @property
    def rotary(self) -> Step | None:
        """Its Rotary, if it has one."""
        return next((step for step in self.steps if step.op == ROTARY), None)

    def _dtype(self, step: Step, kinds: list[Any]) -> Any:
        return kinds[0] if step.op == ROTARY else result_dtype(step.op, step.attrs, kinds)

    def inputs_of(self, value: int, without: int) -> set[int]:
        """The inputs from which a value is computed, but for those only of the value `without`."""
        if value == without:
            return set()
        if self.is_input(value):
            return {value}
        return {
            i for operand in self.step(value).operands if operand is not None for i in self.inputs_of(operand, without)
        }

    @staticmethod
    def _is_table(step: Step, value: int) -> bool:
        """Whether the operand does not broadcast with the others: a Rotary's table."""
        return step.op == ROTARY and value != step.operands[0]


def _explicit(step: Step, inputs: Sequence[Operand | None]) -> Step:
    """A cast to the dtype of an input as a cast to that dtype."""
    if step.op != "CastLike":
        return step
    x, like = step.operands
    operand = inputs[like] if like is not None and like < len(inputs) else None
    if operand is None:
        raise Unsuited("a cast to the dtype of a part")
    return Step("Cast", {"to": operand.dtype.name}, (x,))


class Scope:
    """Lines of C++ in which values of a program are computed once, when they are asked for.

    Args:
        width: elements of a thread.
        access: where an input lies.
        partners: for a Rotary, the pairs (first, second) of elements.
    """

    def __init__(
        self,
        program: Program,
        width: int,
        access: Callable[[int], Access],
        partners: Sequence[tuple[int, int]] = (),
        prefix: str = "v",
    ) -> None:
        self.lines: list[str] = []
        self._program, self._width, self._access, self._partners = program, width, access, partners
        self._known: dict[int, tuple[str, int]] = {}
        self._prefix = prefix

    def define(self, value: int, name: str, width: int) -> None:
        """A value that is in the array `name` of so many elements already."""
        self._known[value] = name, width

    def value(self, value: int) -> tuple[str, int]:
        """(array, how many values it holds: `width`, or 1 where all elements are one)."""
        if value not in self._known:
            self._known[value] = self._input(value) if self._program.is_input(value) else self._step(value)
        return self._known[value]

    def at(self, value: int, element: str) -> str:
        """An element of a value."""
        name, width = self.value(value)
        return f"{name}[{element if width > 1 else 0}]"

    def _input(self, value: int) -> tuple[str, int]:
        access, name = self._access(value), f"{self._prefix}{value}"
        self.lines += access.load(name)
        return name, access.width

    def _step(self, value: int) -> tuple[str, int]:
        step, name = self._program.step(value), f"{self._prefix}{value}"
        kind = computed(self._program.dtypes[value])
        if step.op == LITERAL:
            exact = np.asarray(step.attrs["value"]).astype(self._program.dtypes[value])
            self.lines.append(f"const {kind} {name}[1] = {{{number(exact.item(), kind)}}};")
            return name, 1
        if step.op == ROTARY:
            return self._rotary(step, name, kind)
        given = [i for i in step.operands if i is not None]
        width = max((self.value(i)[1] for i in given), default=1)
        dtypes = [None if i is None else self._program.dtypes[i] for i in step.operands]
        reads = {i: self._read(i, step, dtypes, value) for i in given}
        texts = [None if i is None else reads[i] for i in step.operands]
        use = Use(step.attrs, texts, dtypes, self._program.dtypes[value])
        text = self._squared(step) or formula(step.op, use)
        if step.op == "Cast" and is_narrow(use.result) and not self._program.readers[value]:
            text = f"(float){reads[given[0]]}"  # the store rounds
        self.lines.append(f"{kind} {name}[{width}];")
        self.lines.append(loop(width, f"{name}[e] = ({kind}){text};"))
        return name, width

    def _read(self, value: int, step: Step, dtypes: Sequence[Any], result: int) -> str:
        """An operand at element `e`, rounded where the op jumps, or goes on with more digits than there are."""
        text, kind = self.at(value, "e"), self._program.dtypes[value]
        casts = step.op in ("Cast", "CastLike") and not is_narrow(self._program.dtypes[result])
        if is_narrow(kind) and (step.op in SHARP or casts) and self._is_unrounded(value):
            return f"rounded<{stored(kind)}>({text})"
        return text

    def _is_unrounded(self, value: int) -> bool:
        return not self._program.is_input(value) and self._program.step(value).op not in ("Cast", LITERAL)

    def _squared(self, step: Step) -> str | None:
        """x to the power of 2 or 3, or None."""
        if step.op != "Pow":
            return None
        x, y = step.operands
        assert x is not None and y is not None
        if self._program.is_input(y) or self._program.step(y).op != LITERAL:
            return None
        power = self._program.step(y).attrs["value"]
        if power not in (2, 3) or computed(self._program.dtypes[x]) not in ("float", "double"):
            return None
        return f"({' * '.join([self.at(x, 'e')] * int(power))})"

    def _rotary(self, step: Step, name: str, kind: str) -> tuple[str, int]:
        x, cos, sin = step.operands
        assert x is not None and cos is not None and sin is not None
        self.value(x), self.value(cos), self.value(sin)
        self.lines.append(f"{kind} {name}[{self._width}];")
        for first, second in self._partners:
            a, b = self.at(x, str(first)), self.at(x, str(second))
            c, s = (self.at(table, str(first)) for table in (cos, sin))
            self.lines.append(f"{name}[{first}] = {a} * ({kind}){c} - {b} * ({kind}){s};")
            c, s = (self.at(table, str(second)) for table in (cos, sin))
            self.lines.append(f"{name}[{second}] = {b} * ({kind}){c} + {a} * ({kind}){s};")
        return name, self._width


def program_of(op: str, attrs: Mapping[str, Any], inputs: Sequence[Operand | None]) -> Program:
    """One op by itself."""
    return Program([Step(op, attrs, tuple(None if x is None else i for i, x in enumerate(inputs)))], inputs)
