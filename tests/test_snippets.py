"""Every command and snippet of README and docs runs (tests/snippets.py says how they are marked)."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import snippet_files
from command import Command
from snippets import COMMENTS, REASONS, ROOT, RUN, SHOWN, Snippet, arguments, commands, missing, pages, snippets

from onnxmesh.cli import cli
from onnxmesh.models.__main__ import main as write_model

PAGES = pages()
HERE = {f"needs {name}" for name in ("torch", "pandas") if importlib.util.find_spec(name) is not None}
"""Reasons that do not hold here."""
HAS_MPI = (shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))) is not None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, plans and inputs that the pages speak of."""
    folder = tmp_path_factory.mktemp("files")
    snippet_files.write(folder)
    return folder


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, with `onnxmesh` on the path."""
    target, programs = tmp_path / "work", tmp_path / "bin"
    shutil.copytree(files, target)
    programs.mkdir()
    for name, what in (("onnxmesh", " -m onnxmesh"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{what} "$@"\n')
        (programs / name).chmod(0o755)
    paths = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(paths))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # other processes would be started for a few candidates
    monkeypatch.chdir(target)
    return target


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Reader:
    """Runs a page's blocks one after another."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""
        self.saved: list[str] = []

    def read(self, snippet: Snippet) -> None:
        """Run a block, and compare what it prints with what is shown."""
        if "saved as" in snippet.comments:
            Path(snippet.comments["saved as"]).write_text(snippet.text + "\n")
            self.saved.append(snippet.comments["saved as"])
        elif "run by" in snippet.comments:
            Path("program.py").write_text(f"{snippet.comments.get('given', '')}\n{snippet.text}\n")
            if HAS_MPI or "mpirun" not in snippet.comments["run by"]:
                self.printed = self.shell(snippet, f"{snippet.comments['run by']} program.py")
        elif snippet.language == "python":
            self.printed = self.python(snippet)
        elif "printed" in snippet.comments:
            self.compare(snippet, snippet.text.splitlines(), self.printed)
        elif snippet.language in ("bash", "console"):
            exec(snippet.comments.get("given", ""), self.names)
            for command, shown in commands(snippet):
                if HAS_MPI or "mpirun" not in command:
                    self.saved = [name for name in self.saved if name not in command]
                    self.compare(snippet, shown, self.shell(snippet, command))

    def compare(self, snippet: Snippet, shown: list[str], printed: str) -> None:
        """Every line that is shown is printed."""
        lacking = missing(shown, printed)
        assert not lacking, f"{snippet.place}: {lacking!r} was not printed, but\n{printed}"

    def python(self, snippet: Snippet) -> str:
        """What a block prints; names stay for the next one."""
        out = io.StringIO()
        text = "\n" * (snippet.line - 1) + snippet.text
        with redirect_stdout(out):
            exec(snippet.comments.get("given", ""), self.names)
            exec(compile(text, str(ROOT / snippet.page), "exec"), self.names)
        return out.getvalue()

    def shell(self, snippet: Snippet, command: str) -> str:
        """What a command prints: onnxmesh in this process, anything else in a shell."""
        words = arguments(command)
        if words[:1] == ["onnxmesh"] and "--help" not in words:
            done = self.command(*words[1:])
            expected = {0, 1} if words[1] == "diff" else {0}
            assert done.code in expected, f"{snippet.place}: {command}\n{done.err}"
            return done.out
        if words[:3] == ["python", "-m", "onnxmesh.models"]:
            write_model(words[3:], standalone_mode=False)
            return ""
        if "port" in snippet.comments:
            command = command.replace(snippet.comments["port"], str(free_port()))
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, timeout=100
        )
        assert result.returncode == 0, f"{snippet.place}: {command}\n{result.stdout}{result.stderr}"
        return result.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if any(s.language in RUN for s in snippets(page))])
def test_the_snippets_of_a_page_run(page: str, folder: Path, command: Command) -> None:
    reader = Reader(command)
    for snippet in snippets(page):
        if "quoted from" in snippet.comments or (snippet.reason and snippet.reason not in HERE):
            continue
        begun = time.perf_counter()
        reader.read(snippet)
        print(f"{snippet.place}: {time.perf_counter() - begun:.2f} s")
    assert not reader.saved, f"no command runs {reader.saved}"


@pytest.mark.parametrize("page", PAGES)
def test_what_is_quoted_stands_there(page: str) -> None:
    for snippet in snippets(page):
        if "quoted from" in snippet.comments:
            text = (ROOT / snippet.comments["quoted from"]).read_text()
            assert all(part.strip("\n") in text for part in snippet.text.split("\n\n\n")), snippet.place


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_language_and_a_known_mark(page: str) -> None:
    for snippet in snippets(page):
        assert snippet.language in RUN + SHOWN, f"{snippet.place}: language {snippet.language!r}"
        assert snippet.reason in ("", *REASONS), f"{snippet.place}: not run: {snippet.reason}"
        assert set(snippet.comments) <= set(COMMENTS)


def test_a_missing_line_is_noticed() -> None:
    printed = "one  1.25 ms\ntwo\nthree 3"
    assert missing(["one ... ms", "...", "three 3"], printed) == ""
    assert missing(["two", "one ... ms"], printed) == "one ... ms"
    assert missing(["three"], printed) == "three"


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_text_are_of_the_command_line(page: str) -> None:
    """What a page advises (docs/codes.md) is not run, since its files are not there; but there are such options."""
    for snippet in snippets(page):
        for found in re.findall(r"^\$ (.*)$", snippet.text if snippet.language == "text" else "", re.MULTILINE):
            for command in re.split(r"&&|\|", found):
                words = re.sub(r"^(\s*\w+=\S+)+", "", command).split("#")[0].split()
                if words[:1] == ["onnxmesh"]:
                    cli.commands[words[1]].make_context(words[1], words[2:])
