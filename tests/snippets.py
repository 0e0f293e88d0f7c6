"""The fenced code of README and docs: what it is, how it is marked, and how it is run.

A block of bash, console or python is run as it stands, the blocks of a page in order and in one folder. Comments in
the Markdown right before a block say what a reader need not see:

| comment | meaning |
|---|---|
| `not run: REASON` | one of REASONS |
| `quoted from: PATH` | the block stands in that file of the repository, word for word |
| `given: CODE` | python that runs before the block |
| `run by: COMMAND` | the block is a program, and COMMAND runs it |
| `saved as: NAME` | the block is a file of that name, which a later command runs |
| `port: NUMBER` | a free one stands in for it |
| `printed` | a text block: what the python block before it prints |

Where a console block or a printed one shows output, its lines must come in that order; `...` stands for anything.

`python tests/snippets.py` counts.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

REASONS = ("needs a GPU", "needs torch", "needs pandas", "needs Slurm", "installs packages", "takes minutes")
"""Why a block is not run here. Where torch or pandas is installed, those that need it are."""

RUN = ("bash", "console", "python")
SHOWN = ("text", "json", "yaml", "toml", "svg", "{eval-rst}", "{toctree}", "{click}")
COMMENTS = ("not run", "quoted from", "given", "run by", "saved as", "port", "printed")

_BLOCK = re.compile(
    r"(?P<comments>(?:^ *<!--.*?-->\s*\n)*)^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!--\s*([\w ]+?)(?::\s*(.*?))?\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """A fenced block.

    Attributes:
        line: of the page, where its code begins.
        comments: by kind, of those before it.
    """

    page: str
    line: int
    language: str
    text: str
    comments: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why it is not run; empty if it is."""
        return self.comments.get("not run", "")

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README and all pages of docs."""
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


def snippets(page: str) -> list[Snippet]:
    """The blocks of a page."""
    text = (ROOT / page).read_text()
    found = []
    for match in _BLOCK.finditer(text):
        comments = {kind: value or "" for kind, value in _COMMENT.findall(match["comments"]) if kind in COMMENTS}
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["text"].splitlines())
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Snippet(page, line, match["language"].split(" ")[0].strip(), code, comments))
    return found


def commands(snippet: Snippet) -> Iterator[tuple[str, list[str]]]:
    """The commands of a bash or console block in order, each with the lines of output that are shown for it."""
    if snippet.language == "bash":
        lines = _logical(snippet.text.splitlines())
        if any(line.rstrip().endswith("&") or line.startswith((" ", "for ", "while ")) for line in lines):
            yield snippet.text, []
        else:
            yield from ((line, []) for line in lines if line.split("#")[0].strip())
        return
    command, shown = "", list[str]()
    for line in _logical(snippet.text.splitlines()):
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        else:
            shown.append(line)
    if command:
        yield command, shown


def _logical(lines: Sequence[str]) -> list[str]:
    """Lines that end in a backslash together with the next one."""
    return re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()


def arguments(command: str) -> list[str]:
    """The words of a plain command; empty for one that needs a shell."""
    if re.search(r"[|&;<>$`]", command.split(" #")[0]):
        return []
    words = shlex.split(command, comments=True)
    return [] if re.match(r"\w+=", words[0]) else words


def missing(shown: Sequence[str], printed: str) -> str:
    """The first line of `shown` that does not come, in order, among what was printed; empty if all do."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    at = 0
    for line in shown:
        words = " ".join(line.split())
        if words in ("", "..."):
            continue
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in words.split("...")))
        while at < len(lines) and not pattern.fullmatch(lines[at]):
            at += 1
        if at == len(lines):
            return line
        at += 1
    return ""


def count() -> Counter[str]:
    """Blocks by what becomes of them."""
    found: Counter[str] = Counter()
    for page in pages():
        for snippet in snippets(page):
            if snippet.language in RUN:
                found["quoted" if "quoted from" in snippet.comments else snippet.reason or "run"] += 1
    return found


if __name__ == "__main__":
    for outcome, number in count().most_common():
        print(f"{number:4} {outcome}")
