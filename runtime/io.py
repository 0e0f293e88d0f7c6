"""Arrays in files for the command line: .npz, folders of .npy, and folders of .pb as ONNX keeps its test data.

NumPy's files know no bfloat16 and float8: there an array is stored as raw items of the same size, and read back as
what the plan declares.
"""

from __future__ import annotations

import errno
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from onnxmesh.runtime.dtypes import dtype, wider
from onnxmesh.runtime.errors import InvalidArgument, RunError
from onnxmesh.runtime.loose import from_files, to_files
from onnxmesh.runtime.plan import Plan, Port

Arrays = dict[str, np.ndarray]


def read_inputs(path: str | Path, ports: Sequence[Port]) -> Arrays:
    """The arrays in `path` by name, those of the declared inputs with the declared dtype.

    A sequence is NAME.0, NAME.1, ...; an optional input that is not there is nothing.

    In a folder an input is `NAME.npy`, `NAME.pb` or, by position, `input_0.npy`, `input_0.pb`; a .pb may also carry
    the name itself.

    Raises:
        InvalidArgument: there is no such file, or it holds no arrays.
    """
    path = Path(path)
    if path.is_dir():
        found = _read_folder(path, ports)
    elif path.suffix == ".npz":
        found = _read_npz(path)
    else:
        raise InvalidArgument(
            f"'{path}' is not a readable input" if path.exists() else f"there is no file '{path}'",
            hint="give an .npz file, or a folder of .npy or .pb files",
            code="OM5005",
        )
    declared = {port.name: port for port in ports}
    values = from_files(found, [port for port in ports if port.is_loose])
    return {name: _typed(x, declared[name]) if name in declared else x for name, x in values.items()}


def random_inputs(plan: Plan, seed: int) -> Arrays:
    """Inputs for a trial, the same for the same seed: floats are normal, integers look up any row of their table
    (the report says how many there are), other integers are 0 or 1."""
    rng = np.random.default_rng(seed)
    below = {entry["name"]: entry.get("below") for entry in plan.report.get("inputs", ())}
    return {port.name: _random(port, below.get(port.name) or 2, rng) for port in plan.programs[0].inputs}


def write_outputs(path: str | Path, arrays: Mapping[str, Any], *, proto: bool = False) -> None:
    """Write arrays to an .npz file, or to a folder as .npy or (`proto`) .pb; whole or not at all.

    A sequence is one .pb, or else NAME.0, NAME.1, ...; an optional value that is not there is an empty .pb, or nothing.

    Raises:
        RunError: the disk is full, or the path cannot be written.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with _beside(path) as work:
                _write_npz(work, to_files(arrays))
        else:
            path.mkdir(parents=True, exist_ok=True)
            _write_folder(path, arrays if proto else to_files(arrays), proto)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space, or choose another disk" if full else ""
        raise RunError(f"'{path}' cannot be written: {error.strerror or error}", hint=hint, code="OM5010") from error


def is_proto_folder(path: str | Path | None) -> bool:
    """Whether a folder keeps its arrays as .pb files."""
    return path is not None and Path(path).is_dir() and any(Path(path).glob("*.pb"))


def _random(port: Port, below: int, rng: np.random.Generator) -> np.ndarray:
    if port.is_loose:
        raise InvalidArgument(
            f"there are no random inputs for '{port.name}', a {port.dtype}", hint="give --inputs", code="OM5006"
        )
    kind = dtype(port.dtype)
    if kind == np.bool_ or np.issubdtype(wider(kind), np.integer):
        return rng.integers(0, 2 if kind == np.bool_ else below, port.shape).astype(kind)
    return rng.standard_normal(port.shape).astype(kind)


def _typed(array: np.ndarray, port: Port) -> np.ndarray:
    """Raw items as the declared dtype, where they are of its size."""
    if port.is_loose:
        return array
    kind = dtype(port.dtype)
    return array.view(kind) if array.dtype.kind == "V" and array.dtype.itemsize == kind.itemsize else array


# --- reading ------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InvalidArgument(f"'{path}' is not an .npz file", code="OM5005")
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InvalidArgument(f"there is no file '{path}'", code="OM5005") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidArgument(f"'{path}' cannot be read: {error}", code="OM5005") from error


def _read_folder(folder: Path, ports: Sequence[Port]) -> Arrays:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".npy", ".pb"))
    if not files and ports:
        raise InvalidArgument(f"'{folder}' holds no .npy and no .pb files", code="OM5005")
    named = {_file_name(port.name): port.name for port in ports}
    named |= {f"input_{i}": port.name for i, port in enumerate(ports) if f"input_{i}" not in named}
    types = {port.name: port.dtype for port in ports}
    found = {}
    for file in files:
        name = named.get(file.stem, file.stem)
        own, array = _read_pb(file, types.get(name, "")) if file.suffix == ".pb" else ("", _read_npy(file))
        found[own if own in types else name] = array
    return found


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise InvalidArgument(f"'{path}' cannot be read: {error}", code="OM5005") from error


def _read_pb(path: Path, kind: str) -> tuple[str, Any]:
    """The name and the value in a file, of an input of the type `kind`: a sequence, an optional value, or a tensor."""
    import onnx
    from onnx import numpy_helper

    outer = kind.partition("(")[0]
    proto: Any = {"seq": onnx.SequenceProto, "optional": onnx.OptionalProto}.get(outer, onnx.TensorProto)
    read: Any = {"seq": numpy_helper.to_list, "optional": numpy_helper.to_optional}.get(outer, numpy_helper.to_array)
    try:
        message = proto.FromString(path.read_bytes())
        return message.name, read(message)
    except Exception as error:  # protobuf's own errors share no base class
        raise InvalidArgument(f"'{path}' cannot be read as a {proto.__name__}: {error}", code="OM5005") from error


# --- writing ------------------------------------------------------------------------------------------------


def _file_name(name: str) -> str:
    """A tensor's name as the name of a file."""
    return re.sub(r'[/\\:*?"<>|]', "_", name)


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As np.savez, which takes no array called `file`."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, _storable(array), allow_pickle=False)


def _write_folder(folder: Path, arrays: Mapping[str, Any], proto: bool) -> None:
    for index, (name, array) in enumerate(arrays.items()):
        target = folder / (f"output_{index}.pb" if proto else f"{_file_name(name)}.npy")
        with _beside(target) as work:
            if proto:
                work.write_bytes(_proto(name, array))
            else:
                with work.open("wb") as file:
                    np.lib.format.write_array(file, _storable(array), allow_pickle=False)


def _proto(name: str, value: Any) -> bytes:
    from onnx import numpy_helper

    write: Any = numpy_helper.from_list if isinstance(value, list) else numpy_helper.from_array
    write = numpy_helper.from_optional if value is None else write
    return bytes(write(value, name).SerializeToString())


def _storable(array: np.ndarray) -> np.ndarray:
    """The array, or raw items of the same size where NumPy's files have no word for its dtype."""
    return array.view(f"V{array.dtype.itemsize}") if array.dtype.isbuiltin == 2 else array


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A file next to `target` that takes its place at the end, and is gone if that fails."""
    work = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        yield work
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)
