"""Codes: every refusal and every reason in the report has one, each has a page, and `explain` prints it."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inputs
import pytest
from command import Command, check_failure

import onnxmesh
from onnxmesh.compiler import errors as compiling
from onnxmesh.compiler.reason import Reason, code_of
from onnxmesh.inspection import codes
from onnxmesh.runtime import comm
from onnxmesh.runtime import errors as running
from onnxmesh.runtime.errors import OnnxMeshError

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "codes.md"
KINDS = {
    name: kind
    for module in (running, compiling, comm)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, OnnxMeshError)
}
"""All classes of errors, by name."""


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("compiler", "passes", "runtime", "inspection", "verification", "backend", "models"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def made(*names: str) -> Iterator[tuple[str, ast.Call]]:
    """Where the package makes an object of these classes."""
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_the_package_defines_its_errors_where_this_test_looks() -> None:
    bases = {"OnnxMeshError", *KINDS}
    found = {
        node.name
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in bases for b in node.bases)
    }
    assert found == set(KINDS) - {"OnnxMeshError"}


def test_every_error_that_is_raised_has_a_code() -> None:
    """Say `code="OM...."` where it is made, with a page in inspection/codes.toml; some classes have one themselves."""
    bare = [
        f"{where}: {node.func.id}"  # type: ignore[attr-defined]
        for where, node in made(*KINDS)
        if not KINDS[node.func.id].code and not any(keyword.arg == "code" for keyword in node.keywords)  # type: ignore[attr-defined]
    ]
    assert bare == []


def test_every_reason_has_a_code() -> None:
    assert all(len(node.args) == 2 for _, node in made("Reason"))
    assert all([keyword.arg for keyword in node.keywords] == ["code"] for _, node in made("Miss"))


def used() -> set[str]:
    """The codes that the source names, as whole texts."""
    return {
        node.value
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"OM\d{4}", node.value)
    }


def test_every_code_has_a_page_and_every_page_is_used() -> None:
    assert used() == set(codes.codes())


def test_no_code_repeats() -> None:
    """TOML refuses a table twice; two codes must not say the same, either."""
    pages = codes.codes().values()
    tomllib.loads((ROOT / "inspection" / "codes.toml").read_text())
    assert len({page.title for page in pages}) == len({page.meaning for page in pages}) == len(pages)


def test_pages_are_whole_and_in_order() -> None:
    pages = list(codes.codes().values())
    assert [page.code for page in pages] == sorted(page.code for page in pages)
    for page in pages:
        assert all(vars(page).values()), page.code
        assert page.title[0].isupper() and not page.title.endswith("."), page.code
        assert page.code[:3] in codes.AREAS
        assert all(text.endswith(".") for text in (page.meaning, page.cause, page.action)), page.code
        named = re.findall(r"error\[(OM\d{4})\]", page.example)
        assert set(named) <= {page.code}


def test_the_document_holds_the_same_pages() -> None:
    assert DOCUMENT.read_text() == codes.document(), "python -m onnxmesh.inspection.codes > docs/codes.md"


def test_an_error_carries_its_code() -> None:
    error = OnnxMeshError("no", code="OM1203")
    assert (error.code, error.__notes__) == ("OM1203", ["onnxmesh explain OM1203"])
    assert str(error) == "no"
    assert comm.PeerFailed(1, "gone").code == "OM5101"


def test_a_reason_is_its_words_and_a_code() -> None:
    reason = Reason("too small", "OM2110")
    assert reason == "too small"
    assert code_of(reason) == "OM2110"
    assert code_of("too small") == ""


def test_the_command_line_prints_the_code(command: Command) -> None:
    fixture = inputs.load("llama_op23")
    done = command("compile", fixture.path, "--tp", 2)
    check_failure(done, 3, "has no size")
    assert done.err.splitlines()[-2].startswith("error[OM1203]: ")
    assert command("explain", "OM1203").out.startswith("OM1203: A dim has no size\n")


@pytest.mark.parametrize("code", ["OM1203", "om1203", "1203"])
def test_explain_takes_a_code_however_it_is_written(command: Command, code: str) -> None:
    done = command("explain", code)
    assert done.code == 0
    for part in ("OM1203: A dim has no size", "Why: ", "What to do: ", "--dim"):
        assert part in done.out


def test_explain_lists_all_codes(command: Command) -> None:
    done = command("explain")
    assert re.findall(r"OM\d{4}", done.out) == list(codes.codes())
    assert [page["code"] for page in command("explain", "--json").json] == list(codes.codes())


def test_explain_suggests_what_was_meant(command: Command) -> None:
    check_failure(command("explain", "OM1230"), 2, "OM1203")
    check_failure(command("explain", "attention"), 2, "OM3101", "OM2102")
    check_failure(command("explain", "zebra"), 2, "there is no code 'zebra'")


def test_explain_as_json(command: Command) -> None:
    page = command("explain", "OM2110", "--json").json
    assert page["title"] == "Replicated: cheaper than to cut it"


SECTIONS = ("replicated", "uneven", "fallback", "warnings")


def coded(report: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for section in SECTIONS:
        yield from ((section, entry) for entry in report[section])
    yield from (("kept", entry) for entry in report["precision"]["kept"])
    yield from (("patterns", entry) for entry in report["patterns"] if not entry["found"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama_h6_op18", {"tp": 4}),
        ("flux_op23", {"cp": 2, "dp": 2}),
        ("bert_ts17", {"tp": 2}),
        ("mixtral_op18", {"tp": 2, "precision": "bf16"}),
    ],
)
def test_all_that_the_report_excuses_has_a_code(name: str, options: dict[str, Any]) -> None:
    fixture = inputs.load(name)
    report = onnxmesh.compile(fixture.path, dims=fixture.bindings(), allow_replicated=True, **options).report
    entries = list(coded(report))
    assert entries
    for section, entry in entries:
        assert entry["code"] in codes.codes(), (section, entry)
    assert all(entry["code"] == "" for entry in report["patterns"] if entry["found"])
    json.dumps(dict(report))
