"""Fusion: what becomes one op, that no number changes by it, and why something does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import inputs
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from net import Net

from onnxmesh.compiler import api
from onnxmesh.compiler.options import CpStrategy, Options
from onnxmesh.passes.fuse.fuse import fuse
from onnxmesh.passes.graph.match import Finding
from onnxmesh.runtime.errors import PlanError
from onnxmesh.runtime.kernels.fused import steps
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.session import Session

ROWS, WIDTH = (2, 3), 8


def fused(net: Net, *outputs: ir.Value) -> Fused:
    """The graph after fusion; the numbers must not have changed."""
    count, findings = len(net.graph), list[Finding]()
    return Fused(net.after(lambda model: findings.extend(fuse(model)[1]), *outputs), findings, count)


@dataclass(frozen=True)
class Fused:
    """A graph after fusion, what was found, and how many nodes there were."""

    graph: ir.Graph
    findings: list[Finding]
    count: int

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.graph]

    @property
    def expressions(self) -> list[Any]:
        return [json.loads(n.attributes["expr"].as_string()) for n in self.graph if "expr" in n.attributes]

    @property
    def misses(self) -> list[str]:
        return [f.reason for f in self.findings if not f.found]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_chain_rounds_as_its_ops_alone(dtype: Any) -> None:
    net = Net(dtype)
    x, scale, shift = net.input(*ROWS, WIDTH), net.input(2, 1, WIDTH), net.input(WIDTH)
    more = net.op("Add", scale, net.number(1.0))
    result = fused(net, net.op("Gelu", net.op("Add", net.op("Mul", x, more), shift), approximate="tanh"))
    assert result.ops == ["Fused"] and not result.graph.initializers
    one = [np.dtype(dtype).name, 1.0]
    assert result.expressions == [["Gelu", {"approximate": "tanh"}, ["Add", ["Mul", 0, ["Add", 1, one]], 2]]]


def test_casts_conditions_and_absent_operands() -> None:
    net = Net()
    x = net.input(*ROWS, WIDTH)
    half = net.op("Cast", x, to=int(ir.DataType.FLOAT16), dtype=np.float16)
    back = net.op("Cast", net.op("Sigmoid", half, dtype=np.float16), to=1)
    clipped = net.op("Clip", back, None, net.number(0.6))
    large = net.op("Greater", x, net.number(float("-inf"), 1), dtype=np.bool_)
    result = fused(net, net.op("Where", net.op("Not", large, dtype=np.bool_), x, clipped))
    assert result.ops == ["Fused"]
    wide = ["Cast", {"to": "float32"}, ["Sigmoid", ["Cast", {"to": "float16"}, 0]]]
    expected = ["Where", ["Not", ["Greater", 0, ["float32", "-inf"]]], 0, ["Clip", wide, None, None]]
    expected[3][3] = ["float32", float(np.float32(0.6))]  # type: ignore[index]
    assert result.expressions == [expected]


def test_a_part_that_is_used_twice_is_computed_once() -> None:
    net = Net()
    x = net.op("Exp", net.input(WIDTH))
    result = fused(net, net.op("Mul", net.op("Add", x, net.number(1.0)), net.op("Sqrt", x)))
    assert result.ops == ["Fused"]
    assert [s.op for s in steps("Fused", json.dumps(result.expressions[0]), 1)].count("Exp") == 1


def test_expressions_stay_small() -> None:
    net = Net()
    value = net.input(WIDTH)
    for _ in range(12):
        value = net.op("Mul", value, net.op("Tanh", value))
    result = fused(net, value)
    assert set(result.ops) <= {"Fused", "Tanh"} and 1 < len(result.ops) < 12
    assert all(len(json.dumps(e)) < 1000 for e in result.expressions)


def test_a_number_that_widens_the_shape_stays_an_input() -> None:
    net = Net()
    result = fused(net, net.op("Neg", net.op("Add", net.input(WIDTH), net.number(1.0, 1, 1))))
    assert result.expressions == [["Neg", ["Add", 0, 1]]]


def test_what_others_read_stays() -> None:
    net = Net()
    x = net.op("Exp", net.input(WIDTH))
    result = fused(net, net.op("Neg", x), net.op("Softmax", x, axis=-1))
    assert sorted(result.ops) == ["Exp", "Neg", "Softmax"] and result.misses == ["others read its value"]
    net = Net()
    x = net.op("Exp", net.input(WIDTH))
    result = fused(net, x, net.op("Neg", x))
    assert sorted(result.ops) == ["Exp", "Neg"] and result.misses == ["its value is an output"]


def test_what_takes_no_longer_to_read_is_computed_by_every_reader() -> None:
    net = Net()
    angles = net.op("Mul", net.op("Add", net.input(3, 1), net.number(1.0)), net.input(WIDTH))
    result = fused(net, net.op("Cos", angles), net.op("Neg", net.op("Sin", angles)))
    product = ["Mul", ["Add", 0, ["float32", 1.0]], 1]
    assert result.expressions == [["Cos", product], ["Neg", ["Sin", product]]] and len(result.ops) == 2


def test_a_shared_value_is_computed_again_where_its_readers_are() -> None:
    net = Net()
    x = net.op("Exp", net.input(WIDTH))
    y = net.op("Sqrt", x)
    result = fused(net, net.op("Neg", y), net.op("Abs", y), net.op("Tanh", x))
    root = ["Sqrt", ["Exp", 0]]
    assert sorted(result.expressions) == [["Abs", root], ["Neg", root], ["Tanh", ["Exp", 0]]]


@pytest.mark.parametrize("case", ["bytes", "rows"])
def test_what_is_dear_is_computed_once(case: str) -> None:
    net = Net()
    rows = 1 if case == "rows" else 1 << 12
    x = net.op("Exp", net.input(WIDTH)) if case == "rows" else net.op("Add", *(net.input(rows, WIDTH) for _ in "ab"))
    outs = [net.op(op, x, net.input(2, rows, WIDTH)) for op in ("Mul", "Sub")]
    assert sorted(fused(net, *outs).ops) == sorted([x.producer().op_type, "Mul", "Sub"])  # type: ignore[union-attr]


def linear(net: Net, x: ir.Value, n: int = WIDTH) -> ir.Value:
    """A product with a weight."""
    return net.op("MatMul", x, net.input(x.shape[-1], n), shape=(*x.shape[:-1], n))  # type: ignore[index]


def test_epilogues_of_a_product() -> None:
    net = Net()
    x = net.input(*ROWS, WIDTH)
    hidden = net.op("Gelu", net.op("Add", net.input(16), linear(net, x, 16)))
    result = fused(net, net.op("Add", x, net.op("Add", linear(net, hidden), net.input(WIDTH))))
    assert result.ops == ["FusedMatMul", "FusedMatMul"]
    assert result.expressions == [["Gelu", ["Add", 2, ["MatMul", 0, 1]]], ["Add", 2, ["Add", ["MatMul", 0, 1], 3]]]
    assert [f.reason for f in result.findings] == ["MatMul Add Gelu", "MatMul Add Add"]


def test_a_gate_takes_the_swish_and_the_residual_goes_to_the_product() -> None:
    net = Net()
    x = net.input(*ROWS, WIDTH)
    gated = net.op("Mul", net.op("Swish", linear(net, x)), linear(net, x))
    result = fused(net, net.op("Add", linear(net, gated), x))
    assert sorted(result.ops) == ["Fused", "FusedMatMul", "MatMul", "MatMul"]
    assert ["Mul", ["Swish", 0], 1] in result.expressions


def test_a_collective_before_the_residual_and_the_norm_is_reported() -> None:
    net = Net()
    x = net.input(*ROWS, WIDTH)
    total = net.op("AllReduce", linear(net, x), axis="tp", ranks=1, reduce="sum")
    result = fused(net, net.op("RMSNormalization", net.op("Add", total, x), net.input(WIDTH), axis=-1))
    assert result.ops == ["MatMul", "AllReduce", "FusedNorm"]
    assert result.misses == [
        "an AllReduce stands before what would be its epilogue",
        "an AllReduce is an instruction of its own",
    ]


def test_a_norm_with_residual_and_modulation() -> None:
    net = Net(ml_dtypes.bfloat16)
    x, y, gate, scale = (net.input(*ROWS, WIDTH), net.input(*ROWS, WIDTH), net.input(2, 1, WIDTH), net.input(WIDTH))
    stream = net.op("Add", x, net.op("Mul", gate, y))
    norm = net.op("LayerNormalization", stream, net.input(WIDTH), axis=-1, epsilon=1e-6)
    modulated = net.op("Mul", norm, net.op("Add", scale, net.number(1.0)))
    result = fused(net, modulated, net.op("Transpose", stream, perm=[1, 0, 2], shape=(3, 2, WIDTH)))
    assert result.ops == ["FusedNorm", "Transpose"]
    assert len(result.graph.node(0).outputs) == 2


def test_a_norm_whose_modulation_needs_its_input() -> None:
    net = Net()
    stream = net.op("Add", net.input(*ROWS, WIDTH), net.input(*ROWS, WIDTH))
    scale = linear(net, stream)
    norm = net.op("RMSNormalization", stream, net.input(WIDTH), axis=-1)
    result = fused(net, net.op("Mul", norm, scale))
    assert result.ops == ["Add", "MatMul", "FusedNorm"]
    assert "what is added after it may depend on its input" in result.misses


def rotary(net: Net, x: ir.Value, interleaved: int, *, last: int = WIDTH) -> ir.Value:
    """x [..., 8] in float32 and back, turned by tables [3, last]."""
    wide = net.op("Cast", x, to=1, dtype=np.float32)
    tables = (net.input(3, last, dtype=np.float32) for _ in range(2))
    turned = net.op("Rotary", wide, *tables, interleaved=interleaved, dtype=np.float32, shape=tuple(x.shape or ()))
    return net.op("Cast", turned, to=int(ir.DataType.BFLOAT16))


@pytest.mark.parametrize(("interleaved", "last"), [(0, WIDTH), (1, WIDTH // 2)])
def test_a_rotary_joins_the_casts_around_it(interleaved: int, last: int) -> None:
    net = Net(ml_dtypes.bfloat16)
    result = fused(net, rotary(net, net.op("Exp", net.input(*ROWS, WIDTH)), interleaved, last=last))
    turned = ["Rotary", {"interleaved": interleaved}, ["Cast", {"to": "float32"}, ["Exp", 0]], 1, 2]
    assert result.expressions == [["Cast", {"to": "bfloat16"}, turned]]


def test_a_rotary_joins_the_norm_before_it() -> None:
    net = Net(ml_dtypes.bfloat16)
    norm = net.op("RMSNormalization", net.input(*ROWS, WIDTH), net.input(WIDTH), axis=-1)
    result = fused(net, rotary(net, norm, 1))
    assert result.ops == ["FusedNorm"]
    assert [f.reason for f in result.findings] == ["RMSNormalization Cast Rotary Cast"]


def test_a_rotary_needs_whole_rows_of_the_norm_before_it() -> None:
    net = Net(ml_dtypes.bfloat16)
    norm = net.op("RMSNormalization", net.input(*ROWS, WIDTH), net.input(3, WIDTH), axis=1)
    assert fused(net, rotary(net, norm, 1)).ops == ["FusedNorm", "Fused"]


def test_an_expression_holds_one_rotary_of_tables_in_memory() -> None:
    net = Net()
    x, cos, sin = net.input(*ROWS, WIDTH), net.op("Cos", net.input(3, WIDTH)), net.op("Sin", net.input(3, WIDTH))
    turned = net.op("Rotary", x, cos, sin, interleaved=0)
    twice = net.op("Rotary", net.op("Neg", turned), cos, net.input(3, WIDTH), interleaved=0)
    assert fused(net, twice).ops == ["Cos", "Sin", "Rotary", "Fused"]


def test_a_rotary_does_not_join_a_larger_result_or_stand_before_a_norm() -> None:
    net = Net()
    turned = net.op("Rotary", net.input(3, WIDTH), net.input(WIDTH), net.input(WIDTH), interleaved=0)
    assert fused(net, net.op("Add", net.input(*ROWS, WIDTH), net.op("Neg", turned))).ops == ["Rotary", "Fused"]
    net = Net()
    turned = net.op("Rotary", net.input(3, WIDTH), net.input(WIDTH), net.input(WIDTH), interleaved=0)
    norm = net.op("RMSNormalization", net.op("Neg", turned), net.input(WIDTH), axis=-1)
    assert fused(net, norm).ops == ["Rotary", "FusedNorm"]


@pytest.mark.parametrize(
    ("kind", "expr"),
    [
        ("Fused", ["Rotary", ["Rotary", 0, 1, 2], 1, 2]),
        ("Fused", ["Rotary", 0, ["Cos", 1], 2]),
        ("Fused", ["Rotary", 0, 1]),
        ("FusedNorm", ["RMSNormalization", ["Neg", ["Rotary", 0, 1, 2]], 3]),
        ("FusedMatMul", ["Rotary", ["MatMul", 0, 1], 2, 3]),
    ],
)
def test_expressions_with_another_rotary_are_refused(kind: str, expr: Any) -> None:
    with pytest.raises(PlanError):
        steps(kind, json.dumps(expr), 4)


SWEEP: list[tuple[str, Mapping[str, int], CpStrategy]] = [
    (name, mesh, strategy)
    for name in ("bert_op18", "flux_op23", "gpt2_ts17", "llama_bf16", "sd3_op18", "t5_op18", "whisper_op18")
    for mesh, strategy in (({"tp": 2}, "auto"), ({"cp": 2}, "ring"), ({"tp": 2, "cp": 2}, "auto"))
]  # type: ignore[assignment]


@pytest.mark.parametrize(("name", "mesh", "strategy"), SWEEP)
def test_exported_models_compute_the_same_bits(name: str, mesh: Mapping[str, int], strategy: CpStrategy) -> None:
    fixture = inputs.load(name)
    results, counts = [], []
    for skipped in (("fuse", "schedule"), ()):
        options = Options(Mesh.of(**mesh), fixture.shapes(), {}, strategy, allow_replicated=True)
        state = api.Compilation(fixture.path, options)
        for stage in api.PIPELINE:
            if stage.name not in skipped:
                stage.run(state)
        assert state.plan is not None
        with Session(state.plan) as session:
            results.append(session.run(None, fixture.make_inputs()))
        counts.append(len(state.plan.programs[0].instructions))
    for before, after in zip(*results):
        np.testing.assert_array_equal(before, after)
    assert counts[1] < counts[0]
