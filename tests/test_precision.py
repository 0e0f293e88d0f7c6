"""--precision: a float32 model in half precision, what of it stays float32, and why."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import shares
from lockstep import run
from net import Net
from shares import Case, fixtures

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import references

import onnxmesh
from onnxmesh.compiler.api import Compilation, compile_model
from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.ir.verify import verify
from onnxmesh.compiler.options import HALVES, Options, Precision
from onnxmesh.compiler.verification import HALF, default_tolerance
from onnxmesh.passes.precision.precision import convert
from onnxmesh.passes.precision.rules import LONG
from onnxmesh.runtime.mesh import Mesh

ONE = Case()
MODELS = ("bert_op18", "gpt2_op18", "llama_op23", "flux_op18", "vit_op18", "t5_op18", "whisper_op18", "mixtral_op18")
BADLY_CONDITIONED = ("flux_op18", "t5_op18")
"""Where weights that are off by bfloat16's rounding cost nearly the tolerance, or more, without any plan of ours."""


def compiled(name: str, precision: Precision, case: Case = ONE) -> Compilation:
    """A fixture in half precision."""
    fixture = fixtures.load(name)
    options = Options(case.mesh, {}, fixture.bindings(), case.strategy, precision=precision)
    return compile_model(str(fixture.path), options)


# --- whole models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [ONE, Case(tp=2)], ids=["one", "tp2"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_nearly_the_same(name: str, precision: Precision, case: Case, tmp_path: Path) -> None:
    plan = shares.plan_of(compiled(name, precision, case))
    if precision == "fp16":
        allowed = 0.4 * HALF
    elif name in BADLY_CONDITIONED:
        allowed = 1.5 * references.sensitivity(tmp_path, name, plan, "bfloat16")
    else:
        allowed = HALF
    assert shares.worst_error(plan, name) <= allowed
    assert default_tolerance(plan) == HALF


@pytest.mark.parametrize("name", BADLY_CONDITIONED)
def test_an_error_is_rounding_if_three_more_bits_make_it_eight_times_smaller(name: str) -> None:
    bf16, fp16 = (shares.worst_error(shares.plan_of(compiled(name, p)), name) for p in ("bf16", "fp16"))
    assert 4 < bf16 / fp16 < 16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_and_what_is_sent_are_half(precision: Precision) -> None:
    plan = shares.plan_of(compiled("gpt2_op18", precision, Case(tp=2)))
    whole = shares.plan_of(compiled("gpt2_op18", "model", Case(tp=2)))
    assert {weight.dtype for weight in plan.weights if len(weight.shape) > 1} == {HALVES[precision]}
    sent = [(entry["kind"], entry["dtype"], entry["bytes"]) for entry in plan.report["collectives"]]
    before = [(entry["kind"], entry["dtype"], entry["bytes"]) for entry in whole.report["collectives"]]
    assert sent == [(kind, HALVES[precision], nbytes // 2) for kind, _, nbytes in before]


def test_inputs_and_outputs_stay_as_declared() -> None:
    program = shares.plan_of(compiled("flux_op18", "bf16")).programs[0]
    assert {port.dtype for port in (*program.inputs, *program.outputs)} == {"float32"}


def test_a_saved_plan_holds_half_weights(tmp_path: Path) -> None:
    plan = shares.plan_of(compiled("bert_op18", "bf16"))
    plan.save(tmp_path / "bert.plan")
    loaded = onnxmesh.load(tmp_path / "bert.plan")
    assert shares.worst_error(loaded, "bert_op18") <= HALF
    size = sum(path.stat().st_size for path in (tmp_path / "bert.plan" / "weights").iterdir())
    assert size < fixtures.load("bert_op18").path.stat().st_size * 0.6


def test_a_model_in_half_precision_is_left_as_it_is() -> None:
    ours, plain = compiled("llama_fp16", "bf16"), compiled("llama_fp16", "model")
    assert ours.stays is None
    assert shares.plan_of(ours).programs == shares.plan_of(plain).programs


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ModelError, match="unknown precision 'int8'"):
        onnxmesh.compile(fixtures.load("mlp_op18").path, precision="int8")  # type: ignore[arg-type]


STAYS = {
    "bert_op18": {},
    "gpt2_op18": {},
    "vit_op18": {},
    "llama_op23": {"Cast": 1, "Mul": 1, "Cos": 1, "Sin": 1, "Reshape": 2},
    "mixtral_op18": {"MatMul": 2, "Softmax": 2, "TopK": 2},
    "t5_op18": {"Where": 1},
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_float32(name: str) -> None:
    stays = compiled(name, "bf16").stays
    assert stays is not None
    assert Counter(item.op for item in stays) == STAYS[name]
    assert all(item.reason and item.node for item in stays)


@pytest.mark.parametrize(("name", "most"), [("bert_op18", 3), ("gpt2_op18", 2), ("llama_op23", 6), ("flux_op18", 22)])
def test_casts_stand_at_the_border_and_not_in_blocks(name: str, most: int) -> None:
    graph = compiled(name, "bf16").loaded.graph
    fused = (node.attributes["expr"].as_string() for node in graph if "expr" in node.attributes)
    assert sum(node.op_type == "Cast" for node in graph) + sum(text.count('"Cast"') for text in fused) <= most


# --- rules --------------------------------------------------------------------------------------------------


def converted(net: Net, precision: str, *outputs: ir.Value) -> dict[str, str]:
    """Convert the graph; the nodes that stay float32 with their reasons."""
    net.graph.outputs.extend(outputs)
    stays = convert(net.graph, precision, {})
    verify(net.graph, "precision")
    assert stays is not None
    return {item.node: item.reason for item in stays}


def results(net: Net, *feeds: Any) -> list[np.ndarray]:
    """The outputs for these inputs, in the order of the graph's."""
    given: dict[ir.Value, list[np.ndarray]] = {}
    for value, numbers in zip(net.graph.inputs, feeds, strict=True):
        assert value.dtype is not None
        given[value] = [np.asarray(numbers, value.dtype.numpy())]
    for value in net.graph.initializers.values():
        assert value.const_value is not None
        given[value] = [value.const_value.numpy()]
    values = run(net.graph, given, Mesh.of())
    return [values[value][0] for value in net.graph.outputs]


def ops(net: Net) -> Counter[str]:
    """How often each op stands in the graph."""
    return Counter(node.op_type for node in net.graph)


def test_a_value_is_cast_once_and_outputs_keep_name_and_dtype() -> None:
    net = Net()
    x = net.input(4, 8)
    a, b = net.op("Relu", x), net.op("Neg", x)
    assert converted(net, "bf16", a, b) == {}
    assert ops(net) == {"Cast": 3, "Relu": 1, "Neg": 1}
    assert [(value.name, value.dtype) for value in net.graph.outputs] == [
        ("relu0", ir.DataType.FLOAT),
        ("neg1", ir.DataType.FLOAT),
    ]


def test_a_value_that_is_read_in_both_types_is_cast_in_one_direction_only() -> None:
    net = Net()
    x = net.op("Relu", net.input(4, 8))
    y = net.op("Exp", x)
    reasons = converted(net, "bf16", x, y)
    assert set(reasons) == {"exp1"}
    assert ops(net)["Cast"] == 2  # of the input; of the Relu's result, for Exp and for the output


def test_what_only_a_kept_node_reads_stays_with_it() -> None:
    net = Net()
    x = net.op("Relu", net.input(4, 8))
    y = net.op("Log", net.op("Add", net.op("Exp", net.op("Mul", x, net.number(3.0))), net.number(1.0)))
    reasons = converted(net, "bf16", net.op("Tanh", x), net.op("Neg", y))
    assert set(reasons) == {"mul1", "exp2", "add3", "log4", "neg6"}
    assert reasons["mul1"].startswith("goes into Exp exp2: ")
    assert reasons["neg6"].startswith("computed of Log log4: ")


def test_angles_stay_back_to_the_positions() -> None:
    net = Net()
    positions = net.op("Cast", net.input(8, 1, dtype=np.int64), dtype=np.float32, to=ir.DataType.FLOAT.value)
    angles = net.op("MatMul", positions, net.number(0.5, 1, 4), shape=(8, 4))
    table = net.op("Concat", net.op("Cos", angles), net.op("Sin", angles), shape=(8, 8), axis=-1)
    reasons = converted(net, "bf16", net.op("Mul", net.op("Relu", net.input(8, 8)), table))
    assert set(reasons) == {"cast0", "matmul1", "cos2", "sin3", "concat4"}


def test_an_activation_in_a_sine_does_not_hold_the_model_in_float32() -> None:
    net = Net()
    x = net.op("Relu", net.input(4, 8))
    y = net.op("Add", net.op("MatMul", x, net.number(0.5, 8, 8), shape=(4, 8)), x)
    out = net.op("Add", net.op("Sin", y), y)
    assert set(converted(net, "bf16", out)) == {"sin3"}


@pytest.mark.parametrize(("count", "stays"), [(LONG, False), (LONG + 1, True)])
def test_long_sums_stay(count: int, stays: bool) -> None:
    net = Net()
    x = net.op("Relu", net.input(4, count))
    mean = net.op("ReduceMean", net.op("Mul", x, x), shape=(4, 1), axes=[1], keepdims=1)
    reasons = converted(net, "bf16", net.op("Div", x, net.op("Sqrt", mean)))
    assert set(reasons) == ({"mul1", "reducemean2", "sqrt3"} if stays else set())


def test_a_router_stays_and_the_experts_do_not() -> None:
    net = Net()
    x = net.op("Relu", net.input(4, 8))
    scores = net.op("Softmax", net.op("MatMul", x, net.number(0.5, 8, 6), shape=(4, 6)))
    node = ir.node("TopK", [scores], {"k": 2, "axis": -1}, num_outputs=2, name="topk")
    for value, dtype in zip(node.outputs, (ir.DataType.FLOAT, ir.DataType.INT64)):
        value.shape, value.dtype, value.name = ir.Shape((4, 2)), dtype, f"{dtype.name}_of_topk"
    net.graph.append(node)
    expert = net.op("MatMul", x, net.number(0.5, 8, 2), shape=(4, 2))
    out = net.op("Mul", expert, node.outputs[0])
    assert set(converted(net, "bf16", out, node.outputs[1])) == {"matmul1", "softmax2", "topk"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_least_number_of_a_mask_stays_finite_and_infinity_infinite(precision: str) -> None:
    net = Net()
    x = net.op("Relu", net.input(3))
    least, infinite = net.number(float(np.finfo(np.float32).min)), net.number(-np.inf)
    where = net.op("Where", net.op("Cast", net.input(3, dtype=bool), dtype=bool, to=ir.DataType.BOOL.value), x, least)
    other = net.op("Add", x, infinite)
    product = net.op("Mul", x, least)
    reasons = converted(net, precision, where, other, net.op("Relu", net.op("Add", x, product)))
    assert set(reasons) == {"mul4"}
    chosen, added, multiplied = results(net, [1, 0.5, 0], [1, 0, 0])
    assert chosen[0] == 1 and np.isfinite(chosen).all() and chosen[1] < -6e4
    assert np.isneginf(added).all()
    assert np.isfinite(multiplied).all()


def test_small_numbers_that_would_vanish_stay_where_they_are_used() -> None:
    net = Net()
    x = net.op("Relu", net.input(3))
    out = net.op("Div", net.number(1.0), net.op("Add", x, net.number(1e-9)))
    assert set(converted(net, "fp16", out, net.op("Neg", x))) == {"add1", "div2"}


def test_the_mask_of_an_attention_stays_float32() -> None:
    for precision in ("bf16", "fp16"):
        net = Net()
        q = net.op("Relu", net.input(1, 2, 4, 8))
        seen = net.input(1, 1, 4, 4)
        mask = net.op("Mul", net.op("Sub", net.number(1.0), seen), net.number(float(np.finfo(np.float32).min)))
        out = net.op("Attention", q, q, q, mask, shape=(1, 2, 4, 8), scale=1.0)
        reasons = converted(net, precision, out)
        assert set(reasons) == {"sub1", "mul2"}
        attention = next(node for node in net.graph if node.op_type == "Attention")
        assert attention.inputs[3] is not None and attention.inputs[3].dtype == ir.DataType.FLOAT
        visible = np.ones((1, 1, 4, 4))
        visible[..., 2, :] = 0
        values = np.arange(64).reshape(1, 2, 4, 8) / 16
        attended = results(net, values, visible)[0]
        np.testing.assert_allclose(attended[:, :, 2], values.mean(axis=2), rtol=1e-2)  # it sees all alike
