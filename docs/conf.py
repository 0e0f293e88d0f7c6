"""How Sphinx builds these pages: sphinx-build -W docs build/site."""

import sys
from importlib import metadata
from pathlib import Path

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
napoleon_use_param = True
napoleon_custom_sections = []

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
html_copy_source = False
