"""Reasons that the report gives for what was not done: words for people, and a stable code."""

from __future__ import annotations


class Reason(str):
    """Words, with the code under which `onnxmesh explain` says more (docs/codes.md)."""

    __slots__ = ("code",)
    code: str

    def __new__(cls, words: str, code: str) -> Reason:
        made = super().__new__(cls, words)
        made.code = code
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.code


def code_of(words: str) -> str:
    """The code of a reason; empty for words without one."""
    return words.code if isinstance(words, Reason) else ""
