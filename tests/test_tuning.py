"""Which candidate is chosen, and how choices are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from onnxmesh.runtime.cuda import tuning
from onnxmesh.runtime.cuda.tuning import Candidate, Choices

DURATIONS = {"slow": 3.0, "fast": 1.0, "near": 1.1}


def candidate(name: str) -> Candidate:
    """One that only has a name."""
    return Candidate(name, lambda workspace, stream: None)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Without a GPU: durations are known; the names that were timed, time for time."""
    timed: list[list[str]] = []

    def durations(candidates: Sequence[Candidate], *, warm: bool = True) -> dict[int, float]:
        timed.append([one.name for one in candidates])
        return {i: DURATIONS[one.name] for i, one in enumerate(candidates) if one.name in DURATIONS}

    choices = Choices(tmp_path / "gpu.json")
    monkeypatch.setattr(tuning, "timed", durations)
    monkeypatch.setattr(tuning, "_choices", lambda device: choices)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0)))
    monkeypatch.setattr(tuning, "import_cupy", lambda: cupy)
    monkeypatch.delenv("ONNXMESH_TUNE", raising=False)
    return timed


def choose(problem: str, *names: str, revive: Callable[[str], Candidate | None] = candidate) -> str | None:
    """The name of the chosen one."""
    found = tuning.choose(problem, lambda: [candidate(name) for name in names], revive)
    return None if found is None else found.name


def test_the_fastest_is_chosen_and_those_near_it_are_timed_again(runs: list[list[str]]) -> None:
    assert choose("p", "slow", "near", "fast") == "fast"
    assert runs[0] == ["slow", "near", "fast"]
    assert all(names == ["near", "fast"] for names in runs[1:]) and len(runs) > 2


def test_a_problem_is_timed_once(runs: list[list[str]]) -> None:
    choose("p", "slow", "fast")
    runs.clear()
    assert choose("p", "slow", "fast") == "fast"
    assert choose("q", "slow", "fast") == "fast"
    assert [names for names in runs if "slow" in names] == [["slow", "fast"]]


def test_what_fails_is_not_chosen(runs: list[list[str]]) -> None:
    assert choose("p", "broken", "slow") == "slow"
    assert choose("q", "broken", "broken") is None
    assert choose("r") is None


def test_a_choice_that_cannot_be_had_any_more_is_made_again(runs: list[list[str]]) -> None:
    choose("p", "fast", "near")
    assert choose("p", "slow", "near", revive=lambda name: None) == "near"


def test_tuning_can_be_turned_off(runs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXMESH_TUNE", "0")
    assert choose("p", "slow", "fast") == "slow"
    assert not runs


# --- the file -----------------------------------------------------------------------------------------------


def test_another_process_finds_the_choice(tmp_path: Path) -> None:
    first, second = Choices(tmp_path / "a" / "gpu.json"), Choices(tmp_path / "a" / "gpu.json")
    assert second.get("p") is None
    with first.alone():
        first.put("p", "fast")
    assert second.get("p") == "fast"
    with second.alone():
        second.put("q", "near")
    assert (first.get("p"), first.get("q")) == ("fast", "near")
    assert [path.name for path in (tmp_path / "a").iterdir() if "lock" not in path.name] == ["gpu.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"format": 0, "choices": {"p": "x"}}', '{"format": 1}', '{"format": 1, "choices": {"p": 7}}'],
)
def test_a_file_of_another_kind_counts_as_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    choices = Choices(path)
    assert choices.get("p") is None
    choices.put("p", "fast")
    assert json.loads(path.read_text())["choices"] == {"p": "fast"}


def test_where_nothing_can_be_written_choices_last_as_long_as_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file" / "gpu.json")
    with choices.alone():
        choices.put("p", "fast")
    assert choices.get("p") == "fast"


def test_processes_tune_one_after_the_other(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from onnxmesh.runtime.cuda.tuning import Choices
choices = Choices(Path(sys.argv[1]))
with choices.alone():
    if choices.get("p") is None:
        time.sleep(0.2)
        choices.put("p", sys.argv[2])
print(choices.get("p"))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "gpu.json")]
    several = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)]
    assert len({process.communicate(timeout=60)[0] for process in several}) == 1


def test_the_folder_can_be_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONNXMESH_CACHE", str(tmp_path))
    assert tuning.folder() == tmp_path
    monkeypatch.delenv("ONNXMESH_CACHE")
    assert tuning.folder() == Path.home() / ".cache" / "onnxmesh"
