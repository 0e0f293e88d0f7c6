"""Bad input through the command line: one error line, the documented exit code, nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import inputs
import numpy as np
import onnx
import pytest
from command import Command, Done, check_failure, compile_fixture, dims, names_in
from onnx import TensorProto, helper

from onnxmesh.runtime.plan import VERSION
from onnxmesh.runtime.shards import ShardWriter

MODEL = inputs.load("llama_op23")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the Llama fixture; tests copy it."""
    folder = tmp_path_factory.mktemp("plans") / "llama.plan"
    import onnxmesh

    onnxmesh.compile(MODEL.path, tp=2, cp=2, dims=MODEL.bindings()).save(folder)
    return folder


@pytest.fixture
def copy(plan: Path, tmp_path: Path) -> Path:
    """A plan that a test may spoil."""
    return Path(shutil.copytree(plan, tmp_path / "copy.plan"))


def compile_to(command: Command, model: Path, out: Path, *options: object) -> Done:
    """Compile into the empty folder `out`, and see that a failure leaves it empty."""
    out.mkdir()
    done = command("compile", model, "--tp", 2, "-o", out / "a.plan", *options)
    assert names_in(out) == []
    return done


# --- models -------------------------------------------------------------------------------------------------


def linear(path: Path, domain: str = "", **external: str) -> Path:
    """A model of one MatMul, its weight outside if an external location is given."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="the_node", domain=domain)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def test_no_such_model(command: Command, tmp_path: Path) -> None:
    check_failure(compile_to(command, tmp_path / "gone.onnx", tmp_path / "out"), 3, "gone.onnx")


@pytest.mark.parametrize("content", [b"", b"this is a text\n" * 100, os.urandom(4096), b"\x80\x04\x95" * 9])
def test_not_onnx(command: Command, tmp_path: Path, content: bytes) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(content)
    check_failure(compile_to(command, model, tmp_path / "out"), 3, "model.onnx")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_truncated(command: Command, tmp_path: Path, share: float) -> None:
    data = MODEL.path.read_bytes()
    model = tmp_path / "model.onnx"
    model.write_bytes(data[: int(len(data) * share)])
    check_failure(compile_to(command, model, tmp_path / "out", *dims("llama_op23")), 3)


def test_missing_external_data(command: Command, tmp_path: Path) -> None:
    model = linear(tmp_path / "model.onnx", location="weights.bin", length="64")
    check_failure(compile_to(command, model, tmp_path / "out", "--dim", "rows=2"), 3, "weights.bin", "'w'")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "link/weights.bin"])
def test_external_data_outside_of_the_folder(command: Command, tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    (folder / "link").symlink_to(tmp_path)
    model = linear(folder / "model.onnx", location=location, length="64")
    check_failure(compile_to(command, model, tmp_path / "out", "--dim", "rows=2"), 3, "outside")


def test_truncated_external_data(command: Command, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(63))
    model = linear(tmp_path / "model.onnx", location="weights.bin", length="64")
    check_failure(compile_to(command, model, tmp_path / "out", "--dim", "rows=2"), 3, "63")


def test_unbound_dim(command: Command, tmp_path: Path) -> None:
    done = compile_to(command, linear(tmp_path / "model.onnx"), tmp_path / "out")
    check_failure(done, 3, "rows", "--dim")


def test_unknown_domain(command: Command, tmp_path: Path) -> None:
    model = linear(tmp_path / "model.onnx", domain="com.example")
    check_failure(compile_to(command, model, tmp_path / "out", "--dim", "rows=2"), 3, "com.example", "the_node")


def test_a_dtype_that_an_op_does_not_take(command: Command, tmp_path: Path) -> None:
    seen, total = (onnx.helper.make_tensor_value_info(name, kind, [4]) for name, kind in (("seen", 9), ("total", 9)))
    axis = onnx.helper.make_tensor("axis", onnx.TensorProto.INT64, [], [0])
    node = onnx.helper.make_node("CumSum", ["seen", "axis"], ["total"])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "sums", [seen], [total], [axis])), tmp_path / "m.onnx"
    )
    check_failure(command("compile", tmp_path / "m.onnx", "--tp", 2), 3, "CumSum", "BOOL[4]")


def test_nothing_to_shard(command: Command, tmp_path: Path) -> None:
    model = linear(tmp_path / "model.onnx")
    done = command("compile", model, "--cp", 2, "--dim", "rows=2", "-o", tmp_path / "a.plan")
    check_failure(done, 4, "cp=2", "--allow-replicated")
    assert names_in(tmp_path) == ["model.onnx"]


# --- plans --------------------------------------------------------------------------------------------------


def run(command: Command, plan: Path, *options: object) -> Done:
    """Run a plan whose output must not come into being."""
    out = plan.parent / "out.npz"
    before = names_in(plan.parent)
    done = command("run", plan, "--outputs", out, *(options or ("--random-inputs", 0)))
    assert names_in(plan.parent) == before
    return done


def test_a_changed_byte_in_each_file(command: Command, copy: Path) -> None:
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    assert len(files) >= 4
    for path in files:
        data = path.read_bytes()
        for at in (0, 9, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            check_failure(run(command, copy), 5)
        path.write_bytes(data[:-1])
        check_failure(run(command, copy), 5)
        path.unlink()
        check_failure(run(command, copy), 5, path.name)
        path.write_bytes(data)
    assert command("run", copy, "--random-inputs", 0).code == 0


def test_a_newer_version(command: Command, copy: Path) -> None:
    text = (copy / "plan.json").read_text()
    assert text.count(f'"version":{VERSION}') == 1
    (copy / "plan.json").write_text(text.replace(f'"version":{VERSION}', f'"version":{VERSION + 1}'))
    check_failure(run(command, copy), 5, f"version {VERSION + 1}", "upgrade")
    check_failure(command("inspect", copy), 5, f"version {VERSION + 1}")


def test_not_a_plan(command: Command, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "gone"):
        check_failure(run(command, path), 5, "plan.json")
        check_failure(command("inspect", path), 5, "plan.json")


def test_the_output_is_not_a_plan(command: Command, tmp_path: Path) -> None:
    (tmp_path / "dear").mkdir()
    (tmp_path / "dear" / "letter.txt").write_text("Dear")
    done = command("compile", MODEL.path, *dims("llama_op23"), "--tp", 2, "-o", tmp_path / "dear")
    check_failure(done, 5, "not a plan")
    assert names_in(tmp_path) == ["dear", "dear/letter.txt"]


# --- inputs -------------------------------------------------------------------------------------------------

Spoil = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
SPOILED: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing": (lambda x: {k: v for k, v in x.items() if k != "input_ids"}, ("'input_ids' is missing",)),
    "unknown": (lambda x: {**x, "more": np.zeros(1)}, ("there is no input 'more'",)),
    "dtype": (lambda x: {**x, "input_ids": x["input_ids"].astype(np.int32)}, ("int64[2, 16]", "int32[2, 16]")),
    "shape": (lambda x: {**x, "input_ids": x["input_ids"][:, :-1]}, ("int64[2, 16]", "int64[2, 15]")),
    "rank": (lambda x: {**x, "input_ids": x["input_ids"][None]}, ("int64[2, 16]", "int64[1, 2, 16]")),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("io", ["all", "root"])
def test_wrong_inputs(command: Command, copy: Path, case: str, io: str) -> None:
    spoil, words = SPOILED[case]
    file = copy.parent / "x.npz"
    np.savez(file, **spoil(MODEL.make_inputs()))
    check_failure(run(command, copy, "--inputs", file, "--io", io), 7, *words)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04nonsense", b"text"])
def test_inputs_that_are_no_arrays(command: Command, copy: Path, content: bytes | None) -> None:
    file = copy.parent / "x.npz"
    if content is not None:
        file.write_bytes(content)
    check_failure(run(command, copy, "--inputs", file), 7, "x.npz")


def test_pickles_are_refused(command: Command, copy: Path) -> None:
    np.savez(copy.parent / "x.npz", input_ids=np.array([{}], dtype=object))
    check_failure(run(command, copy, "--inputs", copy.parent / "x.npz"), 7, "x.npz")


def test_unknown_device(command: Command, copy: Path) -> None:
    check_failure(run(command, copy, "--random-inputs", 0, "--device", "tpu"), 7, "tpu")


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile"],
        ["compile", "m.onnx", "--tp", "0"],
        ["compile", "m.onnx", "--tp", "65"],
        ["compile", "m.onnx", "--shape", "x"],
        ["compile", "m.onnx", "--shape", "x=1xa"],
        ["compile", "m.onnx", "--dim", "x=1x2"],
        ["compile", "m.onnx", "--cp-strategy", "rings"],
        ["run", "a.plan"],
        ["run", "a.plan", "--inputs", "x.npz", "--random-inputs", "1"],
        ["nothing"],
    ],
)
def test_usage(command: Command, arguments: list[str]) -> None:
    check_failure(command(*arguments), 2, "--help")


# --- the disk, and Ctrl-C -----------------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("victim", [(ShardWriter, "append"), (Path, "write_bytes"), (Path, "rename")])
def test_a_full_disk(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: tuple[type, str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(*victim, full)
    done = command("compile", MODEL.path, *dims("llama_op23"), "--tp", 2, "-o", out / "a.plan")
    check_failure(done, 5, "No space left")
    assert names_in(out) == []


def test_a_full_disk_keeps_the_older_plan(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = compile_fixture(command, "llama_op23", tmp_path / "a.plan", "--tp", 2)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path) if (tmp_path / name).is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", full)
        done = command("compile", MODEL.path, *dims("llama_op23"), "--tp", 4, "-o", target)
    check_failure(done, 5, "No space left")
    assert {n: (tmp_path / n).read_bytes() for n in names_in(tmp_path) if (tmp_path / n).is_file()} == before


@pytest.mark.parametrize("name", ["y.npz", "folder"])
def test_a_full_disk_under_the_outputs(
    command: Command, copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(np.lib.format, "write_array", full)
    done = command("run", copy, "--random-inputs", 0, "--outputs", copy.parent / name)
    check_failure(done, 7, "No space left")
    assert [entry for entry in names_in(copy.parent) if not entry.startswith("copy.plan")] in ([], ["folder"])


@pytest.mark.parametrize("where", ["recognise", "shard-tp", "lower", "write"])
def test_interrupted_anywhere(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from onnxmesh import cli

    def stop(text: str, err: bool = False) -> None:
        if text == f"compile: {where}":
            raise KeyboardInterrupt
        print(text, file=sys.stderr if err else sys.stdout)

    monkeypatch.setattr(cli.click, "echo", stop)
    done = command("compile", MODEL.path, *dims("llama_op23"), "--tp", 2, "-o", tmp_path / "a.plan")
    check_failure(done, 130, "interrupted")
    assert names_in(tmp_path) == []


def test_interrupted_while_weights_are_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        assert names_in(tmp_path)  # half a plan, beside
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "append", stop)
    done = command("compile", MODEL.path, *dims("llama_op23"), "--tp", 2, "-o", tmp_path / "a.plan")
    check_failure(done, 130, "interrupted")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_compile(tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["compile", inputs.load("flux_op23").path, *dims("flux_op23"), "--tp", 2, "--cp", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxmesh", *map(str, arguments), "-o", str(tmp_path / "a.plan")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),  # a job in the background inherits deaf ears
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line == "compile: shard-cp\n":
            process.send_signal(number)
    assert process.wait(60) == 128 + number
    if number == signal.SIGINT:
        check_failure(Done(130, "", "".join(lines)), 130, "interrupted")
    assert not any("Traceback" in line for line in lines)
    assert names_in(tmp_path) == []
