"""Run the command line inside the test's process, and check what every failure must look like."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import pytest

from onnxmesh import cli


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output."""
        return json.loads(self.out)


Command = Callable[..., Done]
_ERROR = re.compile(r"error(\[OM\d{4}\])?: ")


def make_command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("run", plan, ...)` runs `onnxmesh run PLAN ...`."""

    def command(*arguments: object) -> Done:
        capsys.readouterr()
        code = cli._run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return command


def dims(name: str, odd: bool = False) -> list[str]:
    """The --dim options of a fixture."""
    return [f"--dim={dim}={size}" for dim, size in inputs.load(name).bindings(odd).items()]


def compile_fixture(command: Command, name: str, target: Path, *options: object) -> Path:
    """A plan of a fixture."""
    done = command("compile", inputs.load(name).path, *dims(name), "-q", "-o", target, *options)
    assert done.code == 0, done.err
    assert done.out == ""
    return target


def check_failure(done: Done, code: int, *words: str) -> None:
    """One error line, with a code where onnxmesh refuses; no traceback; the exit code."""
    lines = [line for line in done.err.splitlines() if line and not line.startswith("compile: ")]
    errors = [line for line in lines if _ERROR.match(line)]
    assert done.code == code, done
    assert len(errors) == 1, done.err
    assert ("error[" in done.err) == (code in range(3, 8)), done.err
    assert all(_ERROR.match(line) or line.startswith("hint: ") for line in lines), done.err
    for word in words:
        assert word in done.err, done.err


def names_in(folder: Path) -> Sequence[str]:
    """Everything in a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
