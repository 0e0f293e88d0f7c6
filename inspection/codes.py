"""Stable codes: what each refusal, replication, missed pattern and warning means, and what to do.

The pages are data, in codes.toml. `python -m onnxmesh.inspection.codes` writes docs/codes.md.
"""

from __future__ import annotations

import difflib
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from onnxmesh.runtime.text import WIDTH

AREAS: Mapping[str, str] = {
    "OM1": "The model",
    "OM2": "Placement",
    "OM3": "Patterns nearly found",
    "OM4": "The plan",
    "OM5": "Running",
    "OM6": "Verifying",
    "OM9": "Defects",
}
"""By the first digit."""
MOST = 8
"""Suggestions."""


@dataclass(frozen=True)
class Code:
    """A page.

    Attributes:
        code: such as `OM1203`; it never gets another meaning.
        title: in a few words.
        meaning, cause, action: what it means, why it happens, what to do about it.
        example: a message, commands or Python.
    """

    code: str
    title: str
    meaning: str
    cause: str
    action: str
    example: str


@cache
def codes() -> Mapping[str, Code]:
    """All pages, in the order of their codes."""
    found = tomllib.loads(files("onnxmesh.inspection").joinpath("codes.toml").read_text())
    return {code: Code(code, **{name: text.strip() for name, text in page.items()}) for code, page in found.items()}


def find(code: str) -> Code | None:
    """The page of a code, however it is written: `om1203`, `1203`."""
    digits = code.strip().upper().removeprefix("OM")
    return codes().get(f"OM{digits}")


def near(code: str) -> list[str]:
    """Codes with the same digits or nearly so; for a word, those whose titles hold it."""
    wanted = code.strip().upper().removeprefix("OM")
    if not wanted.isdigit():
        return [page.code for page in codes().values() if wanted.lower() in page.title.lower()][:MOST]
    mixed = [known for known in codes() if sorted(known[2:]) == sorted(wanted)]
    return [*mixed, *difflib.get_close_matches(f"OM{wanted}", set(codes()) - set(mixed), cutoff=0.8)][:MOST]


def page_text(page: Code) -> str:
    """A page for a terminal."""
    parts = [f"{page.code}: {page.title}", _wrap(page.meaning)]
    parts += [_wrap(f"{name}: {text}") for name, text in (("Why", page.cause), ("What to do", page.action))]
    return "\n\n".join([*parts, textwrap.indent(page.example, "    ")])


def list_text() -> str:
    """All codes and their titles, by area."""
    return "\n\n".join(
        "\n".join([area, *(f"  {page.code}  {page.title}" for page in codes().values() if page.code.startswith(start))])
        for start, area in AREAS.items()
    )


def document() -> str:
    """All pages as Markdown: docs/codes.md."""
    lines = [
        "# Codes",
        "",
        "Every refusal, replicated node, missed pattern and warning has a code. `onnxmesh explain OM1203` prints the",
        "page of one, `onnxmesh explain` lists them all; in Python it is the `code` of an error. A code never gets",
        "another meaning. This page is made by `python -m onnxmesh.inspection.codes`.",
    ]
    for start, area in AREAS.items():
        lines += ["", f"## {area}"]
        for page in codes().values():
            if page.code.startswith(start):
                lines += _markdown(page)
    return "\n".join(lines) + "\n"


def _markdown(page: Code) -> list[str]:
    said = [_wrap(page.meaning), _wrap(f"**Why:** {page.cause}"), _wrap(f"**What to do:** {page.action}")]
    body = [line for part in said for line in ("", part)]
    return ["", f"### {page.code}: {page.title}", *body, "", "```text", page.example, "```"]


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(document(), end="")
