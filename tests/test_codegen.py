"""Generated CUDA kernels, run on the CPU (see cuda_on_host.py), give what the generic kernels give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import codegen_more_cases as more
import cuda_on_host
import numpy as np
import pytest
from codegen_cases import Case, elementwise_ops, expressions, of_samples
from cuda_on_host import Host, prepare

from onnxmesh.runtime.cuda.codegen import compiling, launching, moving, rows  # noqa: F401  (register)
from onnxmesh.runtime.cuda.codegen.copy import copies, strided_copy
from onnxmesh.runtime.cuda.codegen.operand import Operand
from onnxmesh.runtime.cuda.launchers import _LAUNCHERS, Job, Launch, Workspace
from onnxmesh.runtime.dtypes import dtype

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="needs g++ to run CUDA kernels on a CPU")

BF16 = "bfloat16"
OURS = frozenset(op for op in _LAUNCHERS if cuda_on_host.generated(op))
"""The ops with a generated kernel."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(compiling, "enqueue", host.enqueue)
    return host


def arrays(case: Case) -> tuple[tuple[np.ndarray | None, ...], tuple[np.ndarray, ...]]:
    return tuple(None if x is None else x.values for x in case.ins), tuple(x.values for x in case.outs)


def job(case: Case) -> Job:
    ins, outs = arrays(case)
    return Job(case.op, case.attrs, ins, outs, (False,) * len(ins), case.coordinate, Workspace())


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "samples": lambda: of_samples(OURS),
    "elementwise": elementwise_ops,
    "expressions": lambda: expressions(80),
    "norms": more.norms,
    "fused norms": more.fused_norms,
    "rotary": more.rotaries,
    "copies": more.copies,
    "indexed": more.indexed,
    "reductions": more.reductions,
    "merges": more.merges,
    "selections": more.selections,
}
DECLINED = {
    "samples": {"ReduceMean", "LayerNormalization", "RMSNormalization", "Pad", "ReduceLogSumExp", "Acosh"},
}
"""Ops of which a group may hold cases that are left to the generic kernel."""


@pytest.mark.parametrize("group", GROUPS)
def test_generated_kernels_give_what_the_generic_ones_give(group: str, host: Host, tmp_path: Path) -> None:
    cases = list(GROUPS[group]())
    launches = [prepare(job(case)) for case in cases]
    left = [str(case) for case, launch in zip(cases, launches) if launch is None]
    assert [text for text in left if text.split()[0] not in DECLINED.get(group, ())] == []
    host.compile(tmp_path)
    for case, launch in zip(cases, launches):
        if launch is not None:
            launch(0)
            case.check([x.values for x in case.outs])


def run(host: Host, launches: Sequence[Launch], folder: Path) -> None:
    host.compile(folder)
    for launch in launches:
        launch(0)


def test_pairs_of_any_shapes_are_copied_in_one_launch(host: Host, tmp_path: Path) -> None:
    make = more.Make(0)
    x = make("bfloat16", 4, 6, 32).values
    parts = [make("bfloat16", 3, 5, how="odd rows").values, make("float32", 40, 30).values, x[:0]]
    y, targets = np.zeros_like(x), [np.zeros_like(part) for part in parts]
    turned = np.zeros((30, 40), np.float32)
    pairs = [*((x[i], y[3 - i]) for i in range(4)), *zip(parts, targets), (parts[1].T, turned)]
    launch = strided_copy(pairs)
    assert len(host.sources) == 1
    run(host, [launch], tmp_path)
    assert np.array_equal(y, x[::-1])
    assert all(np.array_equal(part, target) for part, target in zip(parts, targets))
    assert np.array_equal(turned, parts[1].T)


def test_more_pairs_than_a_launch_takes_are_copied_in_several(host: Host, tmp_path: Path) -> None:
    x = np.arange(200 * 8, dtype=np.int32).reshape(200, 8)
    y = np.zeros_like(x)
    run(host, [strided_copy([(x[i], y[i]) for i in range(200)])], tmp_path)
    assert len(host.sources) > 1
    assert np.array_equal(x, y)


def test_half_precision_is_rounded_at_casts_and_at_the_end_only(host: Host, tmp_path: Path) -> None:
    x = np.array([1, 1 + 2**-7, 3, 300], dtype(BF16))
    y = np.array([2**-9, 2**-9, 1 / 3, 0.6], dtype(BF16))
    twice, once = np.zeros_like(x), np.zeros_like(x)
    added = ["Add", ["Add", 0, 1], 1]
    rounded = [
        "Add",
        ["Cast", {"to": BF16}, ["Add", ["Cast", {"to": "float32"}, 0], ["Cast", {"to": "float32"}, 1]]],
        1,
    ]
    launches = [fused([x, y], once, added), fused([x, y], twice, rounded)]
    run(host, launches, tmp_path)
    a, b = x.astype(np.float32), y.astype(np.float32)
    assert np.array_equal(once, (a + b + b).astype(x.dtype))
    assert np.array_equal(twice, ((a + b).astype(x.dtype).astype(np.float32) + b).astype(x.dtype))


def fused(ins: Sequence[np.ndarray], out: np.ndarray, expr: list) -> Launch:
    launch = prepare(Job("Fused", {"expr": expr}, tuple(ins), (out,), (False,) * len(ins), {}, Workspace()))
    assert launch is not None
    return launch


def test_rows_too_long_for_registers_are_read_again(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_KEPT", 0)
    cases = list(more.fused_norms())[:6] + [case for case in more.norms() if case.ins[0].shape[-1] in (80, 515)]
    launches = [prepare(job(case)) for case in cases]
    assert not any("kept" in source.code for source in host.sources)
    run(host, [launch for launch in launches if launch is not None], tmp_path)
    for case in cases:
        case.check([x.values for x in case.outs])


def test_wide_vectors_are_used_where_memory_allows(host: Host) -> None:
    x = more.Make(0)(BF16, 64, 128)
    for how, count in (("plain", 8), ("padded rows", 8), ("one off", 1), ("odd rows", 1), ("every second", 1)):
        prepare(job(more.case("Neg", [x], how=how)))
        assert "get<bf16, 8>" in host.sources[-1].code
        assert (f"t[{count}]" in host.sources[-1].code) and (count == 8 or "t[8]" not in host.sources[-1].code)


def test_what_no_kernel_takes_is_declined(host: Host) -> None:
    make = more.Make(0)
    cases = [
        more.case("Mean", [make("int32", 4), make("int32", 4)]),
        more.case("Pad", [make("float32", 4)], [(np.dtype("float32"), (6,))], pads=[1, 1], mode="reflect"),
        more.case("Softmax", [make("int32", 4, 4)]),
        more.case("LayerNormalization", [make("float32", 4, 4)], [(np.dtype("float32"), n) for n in ((4, 4), (4, 1))]),
    ]
    assert [prepare(job(case)) for case in cases] == [None] * len(cases)


def test_nothing_is_launched_for_empty_arrays(host: Host) -> None:
    make = more.Make(0)
    for case in (more.case("Neg", [make("float32", 0, 4)]), more.case("Identity", [make("float32", 0, 4)])):
        launch = prepare(job(case))
        assert launch is not None
        launch(0)
    assert host.sources == []


def test_offsets_beyond_32_bits_are_counted_in_64() -> None:
    far = Operand(np.dtype("float32"), (4, 64), (2**30, 1))
    near = Operand(np.dtype("float32"), (4, 64), (64, 1))
    assert "(int64)c" in copies([(far, near)]).code
    assert "(int64)c" not in copies([(near, near)]).code


def test_equal_instructions_are_one_kernel(host: Host) -> None:
    make = more.Make(0)
    for _ in range(2):
        prepare(job(more.case("Add", [make("float32", 3, 8), make("float32", 8)])))
    assert len({source.name for source in host.sources}) == 1
