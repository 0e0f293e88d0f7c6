"""How Sphinx builds these pages: sphinx-build -W docs build/site."""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / ".dev"))

project = "onnxmesh"
author = "the onnxmesh authors"
release = metadata.version("onnxmesh")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
"""Headings have the anchors that they have where the Markdown is read by itself."""

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_param = False

default_role = "code"

copybutton_prompt_text = "$ "
pygments_style = "friendly"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = "onnxmesh"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1d5fbf", "color-brand-content": "#1d5fbf"},
    "dark_css_variables": {"color-brand-primary": "#7db4ff", "color-brand-content": "#7db4ff"},
}
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False


PAGE = re.compile(r"(?<![`\[/\w])(?<!\]\()docs/([\w-]+)\.md(?!`)")
"""A page, as a file of the repository is named in plain text."""


def _linked(found: re.Match[str], link: str) -> str:
    return link if (Path(__file__).parent / f"{found[1]}.md").exists() else found[0]


def link_docstring(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Pages that a docstring names are links here."""
    lines[:] = [PAGE.sub(lambda found: _linked(found, f":doc:`{found[1]}`"), line) for line in lines]


def link_page(app: Any, name: str, source: list[str]) -> None:
    """Pages that another one names are links here, but in code."""
    up = "../" * name.count("/")
    prose = re.split(r"(^```.*?^```)", source[0], flags=re.MULTILINE | re.DOTALL)
    prose[::2] = [PAGE.sub(lambda found: _linked(found, f"[{found[1]}]({up}{found[1]}.md)"), p) for p in prose[::2]]
    source[0] = "".join(prose) + (_others(source[0]) if name == "index" else "")


def _others(index: str) -> str:
    """A last part of the navigation: pages beside the index that it does not name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.md"))
    left = [name for name in names if name != "index" and f"\n{name}\n" not in index]
    lines = ("", "```{toctree}", ":caption: More", ":hidden:", "", *left, "```", "")
    return "\n".join(lines) if left else ""


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", link_docstring)
    app.connect("source-read", link_page)
