"""Parsing of what the command line's options are given."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from onnxmesh.compiler.options import Options

F = TypeVar("F", bound=Callable[..., Any])
Named = tuple[str, tuple[int, ...]]


VIEWS = ("tensors", "collectives", "memory", "weights", "patterns", "passes", "instructions")
"""Of `inspect --what`; inspection.views has what they show."""


class _Sizes(click.ParamType):
    """`NAME=1x4096`."""

    name = "NAME=1x4096"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Named:
        name, equals, sizes = str(value).rpartition("=")
        parts = sizes.split("x") if sizes else []
        if not name or not equals or not all(part.isdigit() for part in parts):
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        return name, tuple(map(int, parts))


class _Size(_Sizes):
    """`NAME=4096`."""

    name = "NAME=4096"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Named:
        name, sizes = super().convert(value, param, ctx)
        if len(sizes) != 1:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        return name, sizes


class _Value(click.ParamType):
    """`NAME=[1, 2]`, as JSON, or `NAME=@FILE.npy`."""

    name = "NAME=[1,2]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, equals, text = str(value).partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        try:
            return name, _read_array(text[1:]) if text.startswith("@") else json.loads(text)
        except ValueError:
            self.fail(f"{text!r} is neither JSON, as [1, 2], nor @FILE.npy", param, ctx)


def _read_array(path: str) -> Any:
    import numpy as np

    return np.load(path, allow_pickle=False)


def mesh_options(function: F) -> F:
    """The options that `compile` and `verify` share; they become one argument `options`."""
    ranks = click.IntRange(1, 64)
    decorators = [
        click.option("--tp", type=ranks, default=1, show_default=True, help="Ranks of tensor parallelism."),
        click.option("--cp", type=ranks, default=1, show_default=True, help="Ranks of context parallelism."),
        click.option("--dp", type=ranks, default=1, show_default=True, help="Ranks of data parallelism."),
        click.option(
            "--cp-strategy",
            type=click.Choice(["auto", "allgather", "ulysses", "ring"]),
            default="auto",
            show_default=True,
            help="How self-attention runs on the cp axis; auto lets the predicted times choose.",
        ),
        click.option("--shape", "shapes", type=_Sizes(), multiple=True, help="The shape of an input."),
        click.option("--dim", "dims", type=_Size(), multiple=True, help="The size of a named dim."),
        click.option("--value", "values", type=_Value(), multiple=True, help="An input as a constant; or =@FILE.npy."),
        click.option("--shard-outputs", is_flag=True, help="Leave outputs sharded, not whole on every rank."),
        click.option("--allow-replicated", is_flag=True, help="Accept an axis on which nothing was sharded."),
        click.option("--profile", type=click.Path(), help="The device profile to compile for (doctor --profile)."),
        click.option(
            "--precision",
            type=click.Choice(["model", "bf16", "fp16"]),
            default="model",
            show_default=True,
            help="What a float32 model computes in; model leaves it as it is.",
        ),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


class _Bytes(click.ParamType):
    """`80G`, `512M`, or bytes."""

    name = "80G"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip().upper().removesuffix("B").removesuffix("I")
        try:
            number = float(text[:-1] if text[-1:] in _UNITS else text)
        except ValueError:
            number = 0.0
        if number <= 0:
            self.fail(f"{value!r} is no amount of memory, as 80G", param, ctx)
        return number * _UNITS.get(text[-1:], 1)


_UNITS = {unit: 1 << shift for unit, shift in (("K", 10), ("M", 20), ("G", 30), ("T", 40))}


def choice_options(function: F) -> F:
    """The options of what chooses a mesh."""
    memory = click.option("--memory-per-rank", "memory", type=_Bytes(), help="What a rank's GPU has, as 80G.")
    ranks = click.option("--ranks", type=click.IntRange(1, 64), help="The ranks to divide among dp, cp and tp.")
    return ranks(memory(function))


def options(given: dict[str, Any]) -> Options:
    from onnxmesh.compiler.options import Options
    from onnxmesh.runtime.mesh import Mesh
    from onnxmesh.runtime.profile import load

    return Options(
        Mesh.of(tp=given["tp"], cp=given["cp"], dp=given["dp"]),
        dict(given["shapes"]),
        {name: sizes[0] for name, sizes in given["dims"]},
        given["cp_strategy"],
        given["shard_outputs"],
        given["allow_replicated"],
        load(given["profile"]) if given.get("profile") else None,
        given.get("precision", "model"),
        dict(given.get("values", ())),
        given.get("own_inputs", ()),
    )


def _set_tf32(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given:
        os.environ["ONNXMESH_TF32"] = "1"  # processes of ranks inherit it


tf32 = click.option(
    "--tf32",
    is_flag=True,
    expose_value=False,
    callback=_set_tf32,
    help="Multiply float32 in TF32 on GPUs: faster, factors of 10 bits.",
)
verbose = click.option("-v", "--verbose", is_flag=True, help="Seconds of every pass; tracebacks.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
