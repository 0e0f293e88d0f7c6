"""Stand-ins for external data that was not carried along: files of zeros that take no disk.

python benchmarks/gpu/holes.py MODEL.onnx...
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx


def dig(model: Path) -> None:
    """Write beside `model` the files of its external data that are missing, each of the right size."""
    needed: dict[str, int] = {}
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            at = {entry.key: entry.value for entry in tensor.external_data}
            end = int(at.get("offset", 0)) + int(at["length"])
            needed[at["location"]] = max(needed.get(at["location"], 0), end)
    for location, size in needed.items():
        path = model.parent / location
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        dig(Path(name))
