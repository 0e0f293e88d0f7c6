"""The plan's folder: `plan.json`, `report.json` and `weights/*.safetensors`, one file per shard key.

No byte of a folder is trusted: plan.json has a digest over itself and holds the report's; the header of a weight
file must be the one that follows from the plan, and every shard has its SHA-256 in the plan.
"""

from __future__ import annotations

import errno
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxmesh.runtime import planjson
from onnxmesh.runtime.dtypes import dtype
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.plan import Plan, Weight
from onnxmesh.runtime.recipe import Fetch, cut_spec, evaluate
from onnxmesh.runtime.report import Report
from onnxmesh.runtime.shards import Entry, ShardFile, ShardWriter, digest, header
from onnxmesh.runtime.validate import shard_key, validate, weight_entry

_PLAN, _REPORT, _WEIGHTS = "plan.json", "report.json", "weights"


def save(
    plan: Plan,
    folder: str | Path,
    fetch: Fetch | None = None,
    report: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Write `plan` to `folder` and return it with the hashes of its shards.

    `fetch` reads the model's initialisers; without it the plan is written without weights. One tensor is in
    memory at a time. The folder appears whole or not at all; an older plan there is replaced. `progress` is told how
    many weights are written, of how many.

    Raises:
        PlanError: the plan does not fit together, a weight differs from its declaration, the disk is full, or
            `folder` exists and is not a plan.
    """
    validate(plan)
    target = Path(folder)
    _check_target(target)
    content = json.dumps(planjson.plain(report or {}), indent=1, sort_keys=True).encode()
    with _disk_errors(target), _beside(target) as work:
        shards = _write_weights(plan, work / _WEIGHTS, fetch, progress) if fetch else [{} for _ in plan.weights]
        done = replace(plan, weights=tuple(replace(w, shards=s) for w, s in zip(plan.weights, shards)))
        (work / _REPORT).write_bytes(content)
        (work / _PLAN).write_bytes(planjson.text(done, hashlib.sha256(content).hexdigest()))
        _replace(work, target)
    return done


def load(folder: str | Path) -> Plan:
    """The plan in `folder`, checked. Weights are read by `load_weights`.

    Raises:
        PlanError: no plan, a newer version, a changed byte, or parts that do not fit together.
    """
    path = Path(folder)
    plan, report_digest = planjson.parse(_read(path / _PLAN))
    validate(plan)
    report = _read(path / _REPORT)
    if hashlib.sha256(report).hexdigest() != report_digest:
        raise PlanError(f"{path / _REPORT} is damaged: its digest does not match", code="OM4002")
    return replace(plan, source=path, report=Report(json.loads(report)))


def load_weights(folder: str | Path, plan: Plan, coordinate: Mapping[str, int]) -> list[np.ndarray]:
    """The shards of the rank at `coordinate`, in the order of `plan.weights`. Other ranks' files stay shut.

    Raises:
        PlanError: the plan was saved without weights, or a file is missing or changed; names shard and file.
    """
    return read_weights(folder, plan, [coordinate])[0]


def read_weights(
    source: Fetch | str | Path, plan: Plan, coordinates: Sequence[Mapping[str, int]]
) -> list[list[np.ndarray]]:
    """The shards of the ranks at `coordinates`, each in the order of `plan.weights`.

    They come from a plan's folder, or from the model by a function that reads its initialisers. Ranks that hold
    the same shard share one array.

    Raises:
        PlanError: as `load_weights`; or the model's weights are not those that the plan was made from.
    """
    keys = [[shard_key(weight.spec, plan.mesh, at) for weight in plan.weights] for at in coordinates]
    wanted = [set(column) for column in zip(*keys)] if plan.weights else []
    if isinstance(source, str | Path):
        shards = _load_shards(Path(source), _hashed(Path(source), plan), wanted)
    else:
        shards = [_make_shards(plan, weight, source, some) for weight, some in zip(plan.weights, wanted)]
    return [[shards[index][key] for index, key in enumerate(own)] for own in keys]


@dataclass(frozen=True)
class StoredShard:
    """A shard in an open file: what it holds, and the SHA-256 that its bytes must have."""

    weight: Weight
    key: str
    file: ShardFile

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.file.entries[self.weight.name].nbytes

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with its bytes from byte `start` on. Threads may do so at once."""
        self.file.read_into(self.weight.name, view, start)

    def check(self, sha256: str) -> None:
        """Raise PlanError unless this is the SHA-256 of its bytes."""
        if sha256 != self.weight.shards.get(self.key):
            raise PlanError(
                f"shard {self.key} of weight {self.weight.name!r} in {self.file.path} is damaged", code="OM4002"
            )


@contextmanager
def stored_shards(folder: str | Path, plan: Plan, coordinate: Mapping[str, int]) -> Iterator[list[StoredShard]]:
    """Where the shards of the rank at `coordinate` are, in the order of `plan.weights`; closed after the block.

    Raises PlanError as `load_weights`, except that the bytes are not read and so not checked.
    """
    hashed = _hashed(Path(folder), plan)
    with ExitStack() as stack:
        keys = [shard_key(weight.spec, plan.mesh, coordinate) for weight in hashed.weights]
        files = {key: stack.enter_context(_open_shards(Path(folder), hashed, key)) for key in sorted(set(keys))}
        yield [StoredShard(weight, key, files[key]) for weight, key in zip(hashed.weights, keys)]


def made_shards(fetch: Fetch, plan: Plan, coordinate: Mapping[str, int]) -> Iterator[np.ndarray]:
    """The shards of the rank at `coordinate` from the model's initialisers, one at a time.

    Raises PlanError as `read_weights`.
    """
    for weight in plan.weights:
        key = shard_key(weight.spec, plan.mesh, coordinate)
        yield _make_shards(plan, weight, fetch, {key})[key]


def _hashed(folder: Path, plan: Plan) -> Plan:
    """`plan` with hashes: its own, or those of the plan in `folder`, which must declare the same weights."""
    if all(weight.shards for weight in plan.weights):
        return plan
    found = load(folder)
    if found.mesh != plan.mesh or list(map(_declared, found.weights)) != list(map(_declared, plan.weights)):
        raise PlanError(f"{folder} holds the weights of another plan", code="OM4102")
    return replace(plan, weights=found.weights)


def _declared(weight: Weight) -> tuple[object, ...]:
    recipe = planjson.canonical(planjson.plain(weight.recipe))
    return weight.name, weight.dtype, weight.shape, weight.spec, recipe


def _load_shards(folder: Path, plan: Plan, wanted: Sequence[Set[str]]) -> list[dict[str, np.ndarray]]:
    """The wanted shards of every weight, file by file."""
    shards: list[dict[str, np.ndarray]] = [{} for _ in plan.weights]
    for key in sorted(set().union(*wanted)):
        with _open_shards(folder, plan, key) as file:
            for index, weight in enumerate(plan.weights):
                if key in wanted[index]:
                    shards[index][key] = _read_shard(file, weight, key)
    return shards


def _make_shards(plan: Plan, weight: Weight, fetch: Fetch, wanted: Set[str]) -> dict[str, np.ndarray]:
    """The wanted shards of a weight, from its recipe."""
    value, shards = _value(weight, fetch), {}
    for piece in _pieces(weight, plan):
        if piece.key in wanted:
            shard = _own(cut_spec(value, weight.spec, plan.mesh, piece.coordinate), value)
            if weight.shards and digest(shard) != weight.shards[piece.key]:
                raise PlanError(f"weight {weight.name!r} differs from the one that was compiled", code="OM4102")
            shards[piece.key] = shard
    return shards


def _own(shard: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The shard in row-major memory that keeps nothing more alive than itself."""
    if shard.nbytes < value.nbytes or not shard.flags.c_contiguous:
        return np.array(shard, order="C")
    return shard


def _value(weight: Weight, fetch: Fetch) -> np.ndarray:
    """The weight's global value, as the plan declares it."""
    value = evaluate(weight.recipe, fetch)
    if (value.dtype.name, value.shape) != (weight.dtype, weight.shape):
        raise PlanError(
            f"weight {weight.name!r}: the model gives {value.dtype.name}{list(value.shape)}, "
            f"the plan says {weight.dtype}{list(weight.shape)}",
            code="OM4102",
        )
    return value


@dataclass(frozen=True)
class _Piece:
    """One shard of a weight: its key, and a coordinate that holds it."""

    key: str
    coordinate: Mapping[str, int]


def _pieces(weight: Weight, plan: Plan) -> list[_Piece]:
    coordinates = [plan.mesh.coordinate(rank) for rank in range(plan.mesh.size)]
    first: dict[str, Mapping[str, int]] = {}
    for coordinate in coordinates:
        first.setdefault(shard_key(weight.spec, plan.mesh, coordinate), coordinate)
    return [_Piece(key, coordinate) for key, coordinate in first.items()]


def _entries(plan: Plan, key: str, pieces: Mapping[str, list[_Piece]] | None = None) -> list[Entry]:
    """What the file of `key` holds."""
    pieces = pieces or {weight.name: _pieces(weight, plan) for weight in plan.weights}
    return [
        Entry(weight.name, *weight_entry(weight, plan.mesh))
        for weight in plan.weights
        if any(piece.key == key for piece in pieces[weight.name])
    ]


def _write_weights(
    plan: Plan, folder: Path, fetch: Fetch, progress: Callable[[int, int], None] | None
) -> list[dict[str, str]]:
    """Write every weight's shards; their hashes by key, in the order of the weights."""
    folder.mkdir()
    pieces = {weight.name: _pieces(weight, plan) for weight in plan.weights}
    keys = sorted({piece.key for some in pieces.values() for piece in some})
    writers = {key: ShardWriter(_file(folder, key), _entries(plan, key, pieces)) for key in keys}
    hashes = []
    for weight in plan.weights:
        value = _value(weight, fetch)
        hashes.append(
            {
                piece.key: writers[piece.key].append(
                    weight.name, cut_spec(value, weight.spec, plan.mesh, piece.coordinate)
                )
                for piece in pieces[weight.name]
            }
        )
        del value
        if progress is not None:
            progress(len(hashes), len(plan.weights))
    for writer in writers.values():
        writer.close()
    return hashes


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


@contextmanager
def _open_shards(folder: Path, plan: Plan, key: str) -> Iterator[ShardFile]:
    path = _file(folder / _WEIGHTS, key)
    if not path.exists():
        raise PlanError(f"{path} is missing", hint="was the plan saved without weights? pass the model", code="OM4104")
    with ShardFile(path) as file:
        if file.header != header(_entries(plan, key)):
            raise PlanError(f"{path} is damaged: its header is not the plan's", code="OM4002")
        yield file


def _read_shard(file: ShardFile, weight: Weight, key: str) -> np.ndarray:
    array = file.read(weight.name).view(dtype(weight.dtype))
    StoredShard(weight, key, file).check(digest(array))
    return array


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PlanError(
            f"{path} cannot be read: {error.strerror}", hint="is it a plan's folder?", code="OM4001"
        ) from error


def _check_target(target: Path) -> None:
    """Refuse to replace what is not a plan."""
    if target.is_symlink() or (target.exists() and not (target / _PLAN).is_file()):
        if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
            return
        raise PlanError(f"{target} exists and is not a plan", hint="choose another name, or remove it", code="OM4010")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, gone afterwards whatever happens."""
    work = _temporary(target)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}"


def _replace(work: Path, target: Path) -> None:
    """Put `work` in the place of `target`; at no time is there half a plan."""
    old = _temporary(target)
    try:
        if target.exists():
            target.rename(old)
        work.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """OSErrors as PlanErrors; a full disk with a hint."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space, or choose a folder on another disk" if full else ""
        raise PlanError(f"{target} cannot be written: {error.strerror or error}", hint=hint, code="OM4011") from error
