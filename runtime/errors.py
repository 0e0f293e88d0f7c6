"""Errors of the runtime, and the base of every error that onnxmesh raises on purpose.

Exit codes of the command line, by class:

| code | class | meaning |
|---|---|---|
| 1 | (any other exception) | a defect of onnxmesh itself, or a file that cannot be read or written |
| 2 | click's usage errors | the command line is wrong |
| 3 | ModelError | the ONNX model cannot be read or is not valid |
| 4 | ShardingError | nothing could be sharded on an axis, or a pin cannot be met |
| 5 | PlanError | the plan is damaged, of another version, or does not fit |
| 6 | VerificationError | the sharded result differs from the reference |
| 7 | RunError | a rank failed or never arrived, or the inputs are wrong |
| 130 | KeyboardInterrupt | interrupted |
"""

from __future__ import annotations


class OnnxMeshError(Exception):
    """An error with one line for the user and, where there is one, a hint on what to do.

    Attributes:
        hint: a second line that says what to try, or an empty string.
        code: the stable code, such as `OM1203`, under which `onnxmesh explain` says more (docs/codes.md).
        exit_code: the exit status of the command line.
    """

    exit_code = 1
    code = ""

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code or type(self).code
        if self.code:
            self.add_note(f"onnxmesh explain {self.code}")

    def __str__(self) -> str:
        return f"{self.args[0]} (hint: {self.hint})" if self.hint else str(self.args[0])


class PlanError(OnnxMeshError):
    """The plan is damaged, of a newer version, or does not fit the mesh."""

    exit_code = 5


class RunError(OnnxMeshError):
    """A run failed: wrong inputs, a failing rank, a rank that never arrived."""

    exit_code = 7


class InvalidArgument(RunError):
    """An input or output name, dtype or shape that the plan does not declare."""
