"""The house: imports run one way, files stay small, the package is what the folders say."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
OUTSIDE = {"tests", "benchmarks", "docs", ".dev", ".ci", ".venv", "build"}

LAYERS = (
    {"onnxmesh.cli", "onnxmesh.__main__"},
    {"onnxmesh.cli_options"},
    {"onnxmesh.models", "onnxmesh.backend"},
    {"onnxmesh.inspection", "onnxmesh.verification"},
    {"onnxmesh.compiler.verification", "onnxmesh.compiler.choose_text"},
    {"onnxmesh.compiler.choose"},
    {"onnxmesh.compiler.api"},
    {"onnxmesh.compiler.report", "onnxmesh.compiler.report_text"},
    {"onnxmesh.compiler.report_origins"},
    {"onnxmesh.compiler.predict"},
    {
        "onnxmesh.compiler.frontend",
        "onnxmesh.compiler.annotate",
        "onnxmesh.compiler.imported",
        "onnxmesh.compiler.modules",
        "onnxmesh.compiler.sources",
        "onnxmesh.compiler.layout",
        "onnxmesh.compiler.moves",
        "onnxmesh.compiler.old_scans",
        "onnxmesh.compiler.oldest",
        "onnxmesh.compiler.strides",
        "onnxmesh.compiler.trace",
        "onnxmesh.compiler.lower",
        "onnxmesh.compiler.memory",
        "onnxmesh.passes",
    },
    {"onnxmesh.compiler.cost"},
    {"onnxmesh.compiler.ops"},
    {"onnxmesh.compiler.ir"},
    {"onnxmesh.compiler.options", "onnxmesh.compiler.errors"},
    {"onnxmesh.compiler"},
    {"onnxmesh.runtime"},
    {"onnxmesh"},
)
"""From the top down: a module imports from its own layer and from those below."""


def modules() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {}
    for package in PACKAGE:
        folder = ROOT / Path(*package.split(".")[1:])
        for path in sorted(folder.glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = modules()


def layer(module: str) -> int:
    """The number of a module's layer: of its longest prefix in LAYERS."""
    prefixes = {name: i for i, names in enumerate(LAYERS) for name in names}
    while module not in prefixes:
        module = module.rpartition(".")[0]
    return prefixes[module]


def imports(path: Path, *, late: bool = True) -> Iterator[str]:
    """The modules of the package that a file imports: not for types alone, and inside functions only if `late`."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING")
        or (isinstance(node, ast.FunctionDef) and not late)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onnxmesh":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "onnxmesh")


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    upward = [name for name in imports(MODULES[module]) if layer(name) < layer(module)]
    assert not upward


STAGES = ("graph", "normalise", "bind", "recognise", "precision", "place", "partition", "fuse", "schedule")
"""The folders of passes: each builds on those before it."""


def test_a_stage_of_passes_builds_on_those_before_it() -> None:
    for module, path in MODULES.items():
        stage = module.removeprefix("onnxmesh.passes.").partition(".")[0]
        if module.startswith("onnxmesh.passes."):
            used = {name.split(".")[2] for name in imports(path) if name.startswith("onnxmesh.passes.")}
            assert used <= {*STAGES[: STAGES.index(stage) + 1]}, module


def test_modules_form_no_cycles() -> None:
    graph = {module: set(imports(path, late=False)) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for name in sorted(graph.get(module, ())):
                visit(name, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_runtime_imports_nothing_of_the_compiler() -> None:
    for module, path in MODULES.items():
        if module.startswith("onnxmesh.runtime"):
            assert all(name == "onnxmesh" or name.startswith("onnxmesh.runtime") for name in imports(path)), module


def test_the_package_list_is_what_the_folders_say() -> None:
    folders = {path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py")}
    inside = {folder for folder in folders if not folder.parts or folder.parts[0] not in OUTSIDE}
    inside = {folder for folder in inside if not any(part.startswith(".") for part in folder.parts)}
    assert sorted(".".join(("onnxmesh", *folder.parts)) for folder in inside) == sorted(PACKAGE)


def test_no_file_is_long() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    files = [ROOT / name for name in listed.stdout.split()] or list(MODULES.values())
    lengths = {str(path): len(path.read_text().splitlines()) for path in files if path.exists()}
    assert {path: count for path, count in lengths.items() if count > 500} == {}


def test_compiler_init_holds_only_its_docstring() -> None:
    body = ast.parse((ROOT / "compiler" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
