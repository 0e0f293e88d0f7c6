"""The command line, from a model to outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import inputs
import ml_dtypes
import numpy as np
import onnx
import pytest
from command import Command, check_failure, compile_fixture, dims, names_in
from onnx import numpy_helper

from onnxmesh.runtime import io
from onnxmesh.runtime.plan import Port
from onnxmesh.runtime.serialize import load

LLAMA = inputs.load("llama_op23")


def outputs_of(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as found:
        return dict(found)


# --- compile and inspect ------------------------------------------------------------------------------------


def test_compile_prints_the_report(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("compile", LLAMA.path, *dims("llama_op23"), "--tp", 2, "--cp", 2)
    assert done.code == 0, done.err
    assert "Mesh cp=2 x tp=2: 4 ranks" in done.out
    assert done.out.endswith("llama_op23.plan: 4 ranks\n")
    assert done.err.splitlines()[0] == "compile: load"
    assert names_in(tmp_path)[0] == "llama_op23.plan"


def test_quiet_json_and_verbose(command: Command, tmp_path: Path) -> None:
    target = compile_fixture(command, "llama_op23", tmp_path / "a.plan", "--tp", 2)
    done = command("compile", LLAMA.path, *dims("llama_op23"), "--tp", 2, "--json", "-v", "-o", target)
    assert done.json == json.loads((target / "report.json").read_text()) == load(target).report
    assert "shard-tp" in done.err
    assert " s\n" in done.err
    assert command("inspect", target, "--json").json == done.json


def test_inspect_fits_a_terminal(command: Command, tmp_path: Path) -> None:
    for name, options in (("flux_op23", ["--cp", 2, "--tp", 2]), ("llama_h6_op23", ["--tp", 4])):
        target = compile_fixture(command, name, tmp_path / f"{name}.plan", *options)
        for full in ([], ["--all"]):
            done = command("inspect", target, *full)
            assert done.code == 0
            assert max(map(len, done.out.splitlines())) <= 100
            assert "AllReduce" in done.out
        for title in ("Sharded, axis by axis", "Collectives", "Computed by every rank", "Inputs", "Weights"):
            assert title in done.out


def test_dump(command: Command, tmp_path: Path) -> None:
    compile_fixture(command, "mlp_op18", tmp_path / "a.plan", "--tp", 2, "--dump", tmp_path / "dump")
    dumped = names_in(tmp_path / "dump")
    assert dumped[0] == "00-load.txt"
    assert dumped[-1].endswith("lower.txt")
    assert all((tmp_path / "dump" / name).stat().st_size for name in dumped)


def test_shapes_bind_like_dims(command: Command, tmp_path: Path) -> None:
    shapes = [f"--shape={k}={'x'.join(map(str, v))}" for k, v in LLAMA.shapes().items()]
    done = command("compile", LLAMA.path, *shapes, "--tp", 2, "-q", "-o", tmp_path / "a.plan")
    assert done.code == 0, done.err
    by_dim = load(compile_fixture(command, "llama_op23", tmp_path / "b.plan", "--tp", 2))
    assert load(tmp_path / "a.plan").programs[0].instructions == by_dim.programs[0].instructions


# --- run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama on four ranks."""
    import onnxmesh

    folder = tmp_path_factory.mktemp("plans") / "llama.plan"
    onnxmesh.compile(LLAMA.path, tp=2, cp=2, dims=LLAMA.bindings()).save(folder)
    return folder


def test_run_from_files(command: Command, plan: Path, tmp_path: Path) -> None:
    feeds = LLAMA.make_inputs()
    np.savez(tmp_path / "x.npz", **feeds)
    for folder in ("npy", "pb"):
        (tmp_path / folder).mkdir()
    for i, (name, array) in enumerate(feeds.items()):
        np.save(tmp_path / "npy" / f"{name}.npy", array)
        (tmp_path / "pb" / f"input_{i}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
    first = command("run", plan, "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz")
    assert first.code == 0, first.err
    assert first.out.startswith("logits: float32[2, 16, 96]\n4 ranks: loaded in ")
    assert command("run", plan, "-q", "--inputs", tmp_path / "npy", "--outputs", tmp_path / "out").out == ""
    command("run", plan, "--inputs", tmp_path / "pb", "--outputs", tmp_path / "out", "--io", "root")
    expected = outputs_of(tmp_path / "y.npz")["logits"]
    assert names_in(tmp_path / "out") == ["logits.npy", "output_0.pb"]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "logits.npy"), expected)
    tensor = onnx.load_tensor(tmp_path / "out" / "output_0.pb")
    assert tensor.name == "logits"
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)


def test_random_inputs_depend_on_the_seed_alone(command: Command, plan: Path, tmp_path: Path) -> None:
    found = []
    for i, seed in enumerate((3, 3, 4)):
        assert command("run", plan, "--random-inputs", seed, "--outputs", tmp_path / f"{i}.npz").code == 0
        found.append(outputs_of(tmp_path / f"{i}.npz")["logits"])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_random_indices_reach_every_row(plan: Path) -> None:
    feeds = io.random_inputs(load(plan), 0)
    assert 2 < feeds["input_ids"].max() < 96
    assert set(np.unique(feeds["attention_mask"])) <= {0, 1}


def test_weights_from_the_model(command: Command, plan: Path, tmp_path: Path) -> None:
    bare = compile_fixture(command, "llama_op23", tmp_path / "a.plan", "--tp", 2, "--cp", 2, "--no-weights")
    assert names_in(bare) == ["plan.json", "report.json"]
    check_failure(command("run", bare, "--random-inputs", 0), 5, "weights")
    for i, source in enumerate((LLAMA.path, plan)):
        done = command("run", bare, "--random-inputs", 0, "--weights", source, "--outputs", tmp_path / f"{i}.npz")
        assert done.code == 0, done.err
    check_failure(command("run", bare, "--random-inputs", 0, "--weights", inputs.load("gpt2_op18").path), 5)
    np.testing.assert_array_equal(outputs_of(tmp_path / "0.npz")["logits"], outputs_of(tmp_path / "1.npz")["logits"])


def test_tf32_is_asked_for_in_the_environment(command: Command, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the processes of ranks hear of it."""
    for arguments in (("run", plan, "--random-inputs", 0), ("bench", plan, "--runs", 1, "--warmup", 1)):
        monkeypatch.setenv("ONNXMESH_TF32", "0")
        assert command(*arguments).code == 0
        assert os.environ["ONNXMESH_TF32"] == "0"
        assert command(*arguments, "--tf32").code == 0
        assert os.environ["ONNXMESH_TF32"] == "1"


def test_dtypes_that_numpy_files_do_not_know(tmp_path: Path) -> None:
    arrays = {"a/b": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "file": np.ones(2, np.float16)}
    ports = [Port(name, x.dtype.name, x.shape, (), 0) for name, x in arrays.items()]
    for target in (tmp_path / "x.npz", tmp_path / "folder"):
        io.write_outputs(target, arrays)
        found = io.read_inputs(target, ports)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_a_rank_that_runs_knows_nothing_of_the_compiler(plan: Path) -> None:
    program = f"""
import sys
from onnxmesh import cli
assert cli._run(["run", {str(plan)!r}, "--random-inputs", "1"]) == 0
heavy = ("onnxmesh.compiler", "onnxmesh.passes", "onnx", "onnx_ir", "onnxruntime", "scipy", "networkx", "rich")
print([m for m in sys.modules if m.startswith(tuple(h + "." for h in heavy)) or m in heavy])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- verify and demo ----------------------------------------------------------------------------------------


def test_verify(command: Command, plan: Path, tmp_path: Path) -> None:
    done = command("verify", LLAMA.path, *dims("llama_op23"), "--tp", 4)
    assert done.code == 0, done.err
    assert "agrees" in done.out
    assert "ONNX Runtime" in done.out
    np.savez(tmp_path / "x.npz", **LLAMA.make_inputs())
    assert command("verify", LLAMA.path, "--plan", plan, "--inputs", tmp_path / "x.npz").code == 0
    bare = compile_fixture(command, "llama_op23", tmp_path / "a.plan", "--tp", 2, "--no-weights")
    assert command("verify", LLAMA.path, "--plan", bare, "-q").out == ""


def test_verify_sees_a_difference(command: Command, plan: Path, tmp_path: Path) -> None:
    model = onnx.load(LLAMA.path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("norm.weight"):
            array = numpy_helper.to_array(tensor).copy()
            array[0] *= 1.1
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "other.onnx")
    check_failure(command("verify", tmp_path / "other.onnx", "--plan", plan), 6, "1 of 1 outputs differ", "'logits'")
    check_failure(command("verify", LLAMA.path, "--plan", plan, "--tolerance", 1e-12), 6, "allowed 1e-12")


def test_demo(command: Command, tmp_path: Path) -> None:
    start = time.monotonic()
    done = command("demo", "--keep", tmp_path)
    assert done.code == 0, done.err
    assert time.monotonic() - start < 60
    for words in ("tp=2", "cp  ", "AllReduce", "agrees", "ONNX Runtime"):
        assert words in done.out
    assert max(map(len, done.out.splitlines())) <= 100
    assert {"demo.onnx", "demo.plan"} <= set(names_in(tmp_path))


# --- the rest -----------------------------------------------------------------------------------------------


def test_help_is_fast() -> None:
    program = "import time; s = time.time(); from onnxmesh import cli; cli._run(['--help']); print(time.time() - s)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 0.5
    for name in ("compile", "run", "verify", "inspect", "demo"):
        assert name in done.stdout


def test_version(command: Command) -> None:
    assert metadata.version("onnxmesh") in command("--version").out


def test_a_defect_has_one_line(command: Command, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxmesh.runtime import launch

    def broken(_: object) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr(launch, "run", broken)
    check_failure(command("run", plan, "--random-inputs", 0), 1, "KeyError", "defect", "-v")
    assert "Traceback" in command("run", plan, "--random-inputs", 0, "-v").err


def test_exit_codes_are_documented() -> None:
    from onnxmesh.compiler.errors import ModelError, ShardingError, VerificationError
    from onnxmesh.runtime import errors

    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    for kind in (ModelError, ShardingError, errors.PlanError, VerificationError, errors.RunError):
        row = f"| {kind.exit_code} | {kind.__name__} |"
        assert row in (errors.__doc__ or "")
        assert f"| {kind.exit_code} |" in page
