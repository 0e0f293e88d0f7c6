"""The pages: in the navigation, with links that lead somewhere and pictures that are those of their script."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from snippets import ROOT, pages

DOCS = ROOT / "docs"
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_TREE = re.compile(r"^```\{toctree\}\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_the_navigation_names_pages_once() -> None:
    """Pages beside the index that it does not name come last; those in folders are all named."""
    listed = ["index"]
    for path in DOCS.rglob("*.md"):
        for tree in _TREE.finditer(path.read_text()):
            names = [line for line in tree["body"].splitlines() if line and not line.startswith(":")]
            listed += [str((path.parent / name).relative_to(DOCS)) for name in names]
    there = [page.removeprefix("docs/").removesuffix(".md") for page in pages()[1:]]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(there)
    assert {name for name in there if "/" in name} <= set(listed)


def test_the_pictures_are_those_of_their_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "pictures"))
    import draw

    draw.main(tmp_path)
    del sys.modules["draw"]
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (DOCS / "pictures").glob("*.svg")}
    for name, text in drawn.items():
        used = any(f"pictures/{name}" in (ROOT / page).read_text() for page in pages())
        assert used, name
        assert "prefers-color-scheme: dark" in text
