"""Blocks that repeat, the flow of data between instructions, and what the page is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import inputs
import numpy as np
import pytest

import onnxmesh
from onnxmesh.inspection import page as pages
from onnxmesh.inspection.blocks import Steps, folds, numbered
from onnxmesh.inspection.dataflow import Dataflow, alive
from onnxmesh.inspection.page_data import page_data
from onnxmesh.models.catalogue import CATALOGUE

ASSETS = Path(pages.__file__).parent / "page_assets"


def chain(modules: Sequence[str], signatures: Sequence[str] | None = None) -> Steps:
    """Instructions of which each reads from the one before."""
    return Steps(modules, signatures or ["op"] * len(modules), [[at - 1] if at else [] for at in range(len(modules))])


@pytest.mark.parametrize(
    ("path", "level", "expected"),
    [
        ("model.layers.3.mlp", 0, ("model.layers", 3)),
        ("transformer.h_12.attn", 0, ("transformer.h", 12)),
        ("encoder.block3", 0, ("encoder.block", 3)),
        ("layers.1.blocks.2.norm", 1, ("layers.1.blocks", 2)),
        ("model.norm", 0, None),
        ("", 0, None),
        ("layers.1", 1, None),
    ],
)
def test_numbers_in_module_paths(path: str, level: int, expected: tuple[str, int] | None) -> None:
    assert numbered(path, level) == expected


def test_blocks_alike_are_one_fold() -> None:
    (fold,) = folds(chain(["embed", *[f"layers.{i}.{part}" for i in range(4) for part in "abc"], "head"]))
    assert [block.name for block in fold.blocks] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert fold.blocks[1].instructions == (4, 5, 6)


def test_a_block_that_differs_is_a_fold_of_its_own() -> None:
    modules = [f"layers.{i}.{part}" for i in range(4) for part in "abc"]
    found = folds(chain(modules, ["other", *["op"] * 11]))
    assert [len(fold.blocks) for fold in found] == [1, 3]


def test_what_has_no_module_belongs_to_where_its_inputs_come_from() -> None:
    modules = ["", *[f"layers.{i}.a" if part != 1 else "" for i in range(3) for part in range(3)], "head", ""]
    (fold,) = folds(chain(modules))
    assert [block.instructions for block in fold.blocks] == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]


def test_blocks_within_blocks() -> None:
    modules = [f"layers.{i}.blocks.{j}.{part}" for i in range(2) for j in range(3) for part in "abc"]
    (fold,) = folds(chain(modules))
    assert [len(block.folds[0].blocks) for block in fold.blocks] == [3, 3]


def test_without_modules_what_repeats_is_found() -> None:
    body = ["norm", "product", "send", "add"]
    (fold,) = folds(chain([""] * 22, ["start", *body * 5, "end"]))
    assert [block.instructions for block in fold.blocks] == [tuple(range(1 + 4 * i, 5 + 4 * i)) for i in range(5)]


def test_nothing_that_repeats() -> None:
    assert folds(chain([""] * 6, list("abcdef"))) == ()
    assert folds(chain([])) == ()


def test_layers_of_a_model_fold_whatever_the_mesh() -> None:
    model = CATALOGUE["demo"].build(8)
    for options in ({"tp": 2}, {"cp": 2, "cp_strategy": "ring"}, {"dp": 2}, {}):
        data = page_data(onnxmesh.compile(model, **options), "plan")  # type: ignore[arg-type]
        assert max(len(fold["blocks"]) for fold in data["folds"]) >= 6
        assert len(data["folds"]) <= 3


@pytest.mark.parametrize("name", ["llama_op23", "flux_op23", "t5_op18", "gpt_oss_op23"])
def test_sources_are_what_instructions_wait_for(name: str) -> None:
    fixture = inputs.load(name)
    program = onnxmesh.compile(fixture.path, dims=fixture.bindings(), tp=2, allow_replicated=True).programs[0]
    for item, sources in zip(program.instructions, Dataflow(program).sources):
        assert {made for each in sources for made in each} <= set(item.after)


@pytest.mark.parametrize("name", ["llama_op23", "flux_op23", "swin_op23"])
def test_what_lives_fits_the_arena(name: str) -> None:
    fixture = inputs.load(name)
    program = onnxmesh.compile(fixture.path, dims=fixture.bindings(), tp=2, allow_replicated=True).programs[0]
    lives, count = Dataflow(program).lives(), len(program.instructions)
    held = alive(lives, count)
    assert 0 < max(held) <= program.arena_bytes
    taken = np.zeros((count, program.arena_bytes), np.int8)
    for life in lives:
        taken[life.first : life.last + 1, life.offset : life.offset + life.bytes] += 1
    assert taken.max() == 1
    assert taken.sum(axis=1).tolist() == held


def test_a_plan_without_a_report_has_a_page(tmp_path: Path) -> None:
    from dataclasses import replace

    plan = replace(onnxmesh.compile(CATALOGUE["demo"].build(2), tp=2), report={})
    data = page_data(plan, "old")
    assert len(data["instructions"]) == len(plan.programs[0].instructions)


def test_the_page_needs_nothing_else() -> None:
    text = pages.page(page_data(onnxmesh.compile(CATALOGUE["demo"].build(2), tp=2), "plan"))
    assert not re.search(r"""<(script|img|iframe|link)[^>]*\s(src|href)=""", text)
    assert "default-src 'none'" in text
    assert len(text) < 1_000_000


def test_what_ships_is_what_the_notice_says() -> None:
    notice = (ASSETS / "THIRD_PARTY.md").read_text()
    assert "v7.9.2" in (ASSETS / "d3.min.js").read_text()[:100]
    assert '"1.1.8"' in (ASSETS / "dagre.min.js").read_text()
    for library in pages.LIBRARIES:
        assert f"`{library}`" in notice
    files = {path.name for path in ASSETS.iterdir()}
    assert files == {*pages.LIBRARIES, *pages.SCRIPTS, "page.html", "page.css", "THIRD_PARTY.md"}


def test_no_script_is_long() -> None:
    own = [ASSETS / name for name in (*pages.SCRIPTS, "page.css", "page.html")]
    assert all(len(path.read_text().splitlines()) <= 500 for path in own)


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [":root", ':root[data-theme="dark"]'])
def test_colours_can_be_read(theme: str) -> None:
    text = (ASSETS / "page.css").read_text()
    colours = dict(re.findall(r"(--[\w-]+): (#\w{6})", text[text.index(f"{theme} {{") :].partition("}")[0]))
    placements = ("whole", "partial", "cut-0", "cut-1", "cut-2", "cut-3")
    pairs = [
        *(("--ink", ground) for ground in ("--page", "--surface", "--raised", "--sunken")),
        *((ink, "--surface") for ink in ("--soft", "--faint", "--accent", "--bad", "--good")),
        *((f"--{name}", f"--{name}-soft") for name in placements),
        ("--send-ink", "--send"),
    ]
    assert {pair: ratio for pair in pairs if (ratio := contrast(colours[pair[0]], colours[pair[1]])) < 4.5} == {}
