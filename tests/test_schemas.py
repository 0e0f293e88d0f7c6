"""The JSON Schemas: they are valid, what is written fits them, and they leave out nothing that is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inputs
import onnx
import pytest
from command import Command, compile_fixture, dims

import onnxmesh
from onnxmesh.compiler import choose, report
from onnxmesh.inspection import difference
from onnxmesh.inspection.schema import NAMES, schema
from onnxmesh.runtime import bench, plan

jsonschema = pytest.importorskip("jsonschema")

VERSIONS = {
    "plan": ("version", plan.VERSION),
    "report": ("format", report.FORMAT),
    "bench": ("format", bench.FORMAT),
    "estimate": ("format", choose.FORMAT),
    "diff": ("format", difference.FORMAT),
}
DOCUMENT = Path(__file__).parents[1] / "docs" / "schemas.md"


def closed(part: Any) -> Any:
    """The schema with no room for other fields than its own."""
    if isinstance(part, list):
        return [closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    made = {name: closed(item) for name, item in part.items()}
    return {**made, "additionalProperties": False} if "properties" in part and "type" in part else made


CHECKS = {name: jsonschema.Draft202012Validator(closed(schema(name))) for name in NAMES}


def check(name: str, value: Any) -> None:
    errors = [f"{error.json_path}: {error.message[:200]}" for error in CHECKS[name].iter_errors(value)]
    assert errors == []


def objects(part: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(part, dict):
        if "properties" in part and "type" in part:
            yield path, part
        for name, item in part.items():
            yield from objects(item, f"{path}/{name}")
    elif isinstance(part, list):
        for index, item in enumerate(part):
            yield from objects(item, f"{path}/{index}")


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one_and_has_its_version(name: str) -> None:
    found = schema(name)
    jsonschema.Draft202012Validator.check_schema(found)
    field, number = VERSIONS[name]
    assert found["$id"] == f"urn:onnxmesh:{name}:{number}"
    assert found["properties"][field] == {"const": number} | {
        key: value for key, value in found["properties"][field].items() if key == "description"
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_document_names_the_schema_and_its_version(name: str) -> None:
    field, number = VERSIONS[name]
    (row,) = (line for line in DOCUMENT.read_text().splitlines() if f"schemas/{name}.json" in line)
    assert f"`{field}`: {number} |" in row


@pytest.mark.parametrize("name", ["report", "bench"])
def test_every_field_is_described(name: str) -> None:
    bare = [
        f"{path}/{field}"
        for path, part in objects(schema(name))
        for field, below in part["properties"].items()
        if "description" not in below and below.get("type") in ("string", "integer", "number", "boolean")
    ]
    assert bare == []


def test_there_is_no_other_schema() -> None:
    with pytest.raises(KeyError, match="plan, report"):
        schema("trace")


PLANS: list[tuple[str, dict[str, Any]]] = [
    ("llama_op23", {"tp": 2, "cp": 2, "dp": 2}),
    ("llama_h6_op18", {"tp": 4, "cp": 2}),
    ("llama_decode_op23", {"tp": 2}),
    ("flux_op23", {"cp": 2, "cp_strategy": "ulysses"}),
    ("flux_op18", {"cp": 4, "cp_strategy": "ring", "shard_outputs": True}),
    ("bert_ts17", {"tp": 2}),
    ("whisper_op18", {"tp": 2}),
    ("mixtral_op18", {"tp": 2, "precision": "bf16"}),
    ("mlp_op18", {"tp": 64, "allow_replicated": True}),
    ("gpt2_op18", {}),
]


@pytest.mark.parametrize(("name", "options"), PLANS)
def test_plans_fit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    fixture = inputs.load(name)
    made = onnxmesh.compile(fixture.path, dims=fixture.bindings(), **options)
    made.save(tmp_path / "a.plan", weights=name == "mlp_op18")
    check("plan", json.loads((tmp_path / "a.plan" / "plan.json").read_text()))
    check("report", json.loads((tmp_path / "a.plan" / "report.json").read_text()))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("(float[4] x, int64[1] axes) => (float[N] y) {y = ReduceSum(x, axes)}", {"values": {"axes": [0]}}),
        ("(string[2] a, string[2] b) => (string[2] y) {y = StringConcat(a, b)}", {}),
        ("(float[4] x) => (int64[1, N] y) {y = NonZero(x)}", {}),
        (
            "(bool c, float[4] x) => (float[4] y) {y = If(c) <"
            "then_branch = g1 () => (float[4] t) {t = Relu(x)}, else_branch = g2 () => (float[4] e) {e = Neg(x)}>}",
            {},
        ),
    ],
    ids=["bound", "text", "loose", "control"],
)
def test_plans_of_all_that_is_unusual_fit(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 20]> g {model}')
    onnxmesh.compile(proto, **options).save(tmp_path / "a.plan", weights=False)
    check("plan", json.loads((tmp_path / "a.plan" / "plan.json").read_text()))
    check("report", json.loads((tmp_path / "a.plan" / "report.json").read_text()))


def test_benchmarks_fit(command: Command, tmp_path: Path) -> None:
    folder = compile_fixture(command, "mlp_op18", tmp_path / "mlp.plan", "--tp", 2)
    check("bench", command("bench", folder, "--runs", 2, "--warmup", 1, "--json", "-").json)


def test_estimates_fit(command: Command) -> None:
    done = command("estimate", inputs.load("mlp_op18").path, *dims("mlp_op18"), "--ranks", 8, "--json")
    check("estimate", done.json)
    assert any(item["reason"] for item in done.json["estimates"])


def test_differences_fit(command: Command, tmp_path: Path) -> None:
    one = compile_fixture(command, "llama_op23", tmp_path / "1.plan")
    two = compile_fixture(command, "llama_op23", tmp_path / "2.plan", "--tp", 2, "--cp", 2)
    for other in (one, two):
        check("diff", command("diff", one, other, "--json").json)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    field, number = VERSIONS[name]
    assert any(error.json_path == f"$.{field}" for error in CHECKS[name].iter_errors({field: number + 1}))


def test_a_report_with_a_wrong_field_is_refused() -> None:
    fixture = inputs.load("mlp_op18")
    made = onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings()).report
    for path, value in ((("ranks",), "two"), (("rank", "weight_bytes"), -1), (("weights", 0, "extra"), 1)):
        wrong: Any = copy.deepcopy(json.loads(json.dumps(made)))
        part = wrong
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = value
        assert list(CHECKS["report"].iter_errors(wrong)), path
