"""normalise: each op in normal form computes what ONNX says, and nothing needs numbers from an input any more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import inputs
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from evaluate import evaluate
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.frontend import load
from onnxmesh.compiler.ir import recipe as recipes
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.graph.fold import LIMIT
from onnxmesh.passes.normalise.normalise import SOURCES, normalise

RNG = np.random.default_rng(0)
ONNX_ONLY = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Slice", "Split", "Pad", "Trilu", "Tile", "Gemm"}
ONNX_ONLY |= {"CumSum", "TopK", "Range", "ConstantOfShape", "Constant", "Shape", "Size", "Attention", "RotaryEmbedding"}
ONNX_ONLY |= {f"Reduce{r}" for r in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare")}


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(
    nodes: list[onnx.NodeProto],
    given: dict[str, np.ndarray],
    outputs: list[str],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def normal_form(proto: onnx.ModelProto) -> ir.Model:
    return normalise(bind(load(proto), {}, {}))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def attributes(model: ir.Model, op: str) -> dict[str, Any]:
    node = next(n for n in model.graph if n.op_type == op)
    return {a.name: a.value for a in node.attributes.values()}


@dataclass(frozen=True)
class Case:
    """One node: float inputs are given when it runs, integer arrays are initialisers."""

    op: str
    inputs: list[np.ndarray | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 18
    becomes: list[str] | None = None
    given: tuple[int, ...] = ()

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, a.shape)) for a in self.inputs if a is not None)
        return f"{self.op}{self.opset}-{shapes}-{self.attributes}"

    def is_given(self, index: int, array: np.ndarray) -> bool:
        return array.dtype not in (np.int64,) or index in self.given

    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" if a is not None else "" for i, a in enumerate(self.inputs)]
        arrays = [(i, n, a) for i, (n, a) in enumerate(zip(names, self.inputs)) if a is not None]
        outputs = [f"y{i}" for i in range(self.outputs)]
        proto = build(
            [helper.make_node(self.op, names, outputs, name="n", **self.attributes)],
            {n: a for i, n, a in arrays if self.is_given(i, a)},
            outputs,
            {n: a for i, n, a in arrays if not self.is_given(i, a)},
            self.opset,
        )
        typed = onnx.shape_inference.infer_shapes(proto)
        for output, found in zip(proto.graph.output, typed.graph.output):
            output.type.tensor_type.elem_type = found.type.tensor_type.elem_type
        return proto

    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{i}": a for i, a in enumerate(self.inputs) if a is not None and self.is_given(i, a)}


def n(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


LOWEST = np.iinfo(np.int64).min
X = floats(2, 3, 4)

VIEWS = [
    Case("Reshape", [X, n(0, -1)], becomes=["Reshape"]),
    Case("Flatten", [X], {"axis": -1}, becomes=["Reshape"]),
    Case("Squeeze", [floats(1, 3, 1), n(-1)], becomes=["Reshape"]),
    Case("Squeeze", [floats(1, 3, 1)], becomes=["Reshape"]),
    Case("Unsqueeze", [X, n(0, -1)], becomes=["Reshape"]),
    Case("Expand", [floats(3, 1), n(2, 1, 4)], becomes=["Expand"]),
    Case("Tile", [floats(1, 3), n(4, 1)], becomes=["Expand"]),
    Case("Tile", [X, n(1, 2, 3)], becomes=["Tile"]),
    Case("Transpose", [X], becomes=["Transpose"]),
    Case("Slice", [X, n(1), n(3), n(1)], becomes=["Slice"]),
    Case("Slice", [X, n(-2), n(2**62), n(-1)], becomes=["Slice"]),
    Case("Slice", [X, n(-1, 0), n(LOWEST, 4), n(1, 2), n(-1, 2)], becomes=["Slice"]),
    Case("Slice", [X, n(3), n(0), n(-1), n(-2)], becomes=["Slice"]),
    Case("Slice", [X, n(0, 1), n(2, 3)], becomes=["Slice"]),
    Case("Split", [floats(2, 7), n(2, 4, 1)], {"axis": -1}, 3, becomes=["Split"]),
    Case("Split", [floats(7, 2)], {"num_outputs": 3}, 3, becomes=["Split"]),
    Case("Pad", [X, n(0, 1, 0, 2, 0, 1)], becomes=["Pad"]),
    Case("Pad", [X, n(1, 2), np.float32(7).reshape(()), n(-1)], becomes=["Pad"], opset=19),
    Case("Pad", [X, n(0, 1, 1, 0, 1, 1)], {"mode": "reflect"}, becomes=["Pad"]),
    Case("Trilu", [floats(4, 4)], becomes=["Trilu"]),
    Case("Trilu", [floats(2, 3, 5), n(-1).reshape(())], {"upper": 0}, becomes=["Trilu"]),
]
ALONG_AXES = [
    *(Case(f"Reduce{r}", [np.abs(X) + 0.5, n(-1, 0)]) for r in ("Mean", "Max", "Prod", "L1", "L2", "LogSum")),
    *(Case(f"Reduce{r}", [X], {"keepdims": 0}) for r in ("Sum", "Min", "LogSumExp", "SumSquare")),
    Case("ReduceMean", [X], {"axes": [-2], "keepdims": 0}, opset=17),
    Case("ReduceSum", [X], {"noop_with_empty_axes": 1}, becomes=["Identity"]),
    Case("ReduceMax", [floats()], becomes=["Identity"]),
    Case("ReduceSumSquare", [floats()], becomes=["Mul"]),
    Case("CumSum", [X, n(-1).reshape(())], {"exclusive": 1, "reverse": 1}, becomes=["CumSum"]),
    Case("CumProd", [X, n(-1).reshape(())], {"exclusive": 1}, opset=26, becomes=["CumProd"]),
    *(
        Case(f"Reduce{r}", [floats(2, 0, 3), n(1)], becomes=["Expand"])
        for r in ("Sum", "Prod", "Max", "Min", "LogSumExp")
    ),
    Case("TopK", [X, n(2)], {"axis": 1, "largest": 0}, 2, becomes=["TopK"]),
    Case("DFT", [floats(2, 5, 1), n(8).reshape(()), n(-2).reshape(())], opset=20, becomes=["DFT"]),
    Case("DFT", [floats(2, 5, 2)], {"onesided": 1, "inverse": 1}, opset=20, becomes=["DFT"]),
    Case("DFT", [floats(5, 2, 2)], {"axis": 0}, opset=17, becomes=["DFT"]),
    Case("STFT", [floats(2, 21, 1), n(3).reshape(()), floats(8)], opset=17, becomes=["STFT"]),
    Case("STFT", [floats(2, 21, 1), n(3).reshape(()), None, n(6).reshape(())], opset=17, becomes=["STFT"]),
    Case("Softmax", [X], {}, opset=13, becomes=["Softmax"]),
    Case("LogSoftmax", [X], {"axis": 1}, opset=13),
    Case("ArgMax", [X], {"axis": -1, "keepdims": 0}),
    Case("LayerNormalization", [X, floats(4), floats(4)]),
    Case("Concat", [X, X], {"axis": -2}),
    Case("Gather", [X, n(2, 0)], {"axis": -2}, becomes=["Gather"]),
    Case("Gather", [X, n(-1).reshape(())], {"axis": -1}, becomes=["Slice", "Reshape"]),
    Case("Gather", [X, n(-2, -1)], {"axis": 2}, becomes=["Slice"]),
    Case("Gather", [X, n(0)], {"axis": 1}, becomes=["Gather"]),
]
ARITHMETIC = [
    Case("Gemm", [floats(2, 3), floats(3, 4)], becomes=["MatMul"]),
    Case("Gemm", [floats(2, 3), floats(3, 4), floats(4)], becomes=["MatMul", "Add"]),
    Case("Gemm", [floats(2, 3), floats(3, 4), floats()], {"beta": 0.0}, becomes=["MatMul"]),
    Case(
        "Gemm",
        [floats(3, 2), floats(4, 3), floats(2, 1)],
        {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0},
        becomes=["Transpose", "Transpose", "MatMul", "Mul", "Mul", "Add"],
    ),
    Case("Einsum", [floats(2, 3), floats(3, 4)], {"equation": "ca, ab"}, becomes=["Einsum"]),
    Case("Einsum", [floats(5, 2, 2)], {"equation": "...ii"}, becomes=["Einsum"]),
    Case("SwiGLU", [X, X + 1], {"alpha": 1.5}, opset=28, becomes=["Swish", "Mul"]),
    Case("CastLike", [X, np.array(1, np.float64)], opset=19, becomes=["Cast"]),
    Case("GroupNormalization", [floats(2, 6, 4), floats(6), floats(6)], {"num_groups": 3}, opset=21),
    Case("Dropout", [X], {}, 1, becomes=["Identity"]),
]

Q, K, V = floats(2, 4, 5, 8), floats(2, 2, 7, 8), floats(2, 2, 7, 6)
PAST = [floats(2, 2, 3, 8), floats(2, 2, 3, 6)]
SEES = RNG.random((2, 1, 5, 7)) < 0.6
SEES[0, 0, 2] = False
FLAT = [floats(2, 5, 32), floats(2, 7, 16), floats(2, 7, 12)]
HEADS = {"q_num_heads": 4, "kv_num_heads": 2}
LOW = np.where(SEES, np.float32(0), np.float32(-np.inf))

ATTENTION = [
    Case("Attention", [Q, K, V], opset=23, becomes=["Attention"]),
    Case("Attention", [Q, K, V], {"scale": 0.5, "softcap": 3.0}, opset=23),
    Case("Attention", FLAT, HEADS, opset=23),
    Case("Attention", [Q, K, V, SEES], opset=23, becomes=["Attention"]),
    Case("Attention", [Q, K, V, SEES[0, 0]], opset=23, becomes=["Reshape", "Attention"]),
    Case("Attention", [Q, K, V, SEES[0, 0, 0]], opset=23),
    Case("Attention", [Q, K, V, floats(4, 1, 7)], opset=23),
    Case("Attention", [Q, K, V, LOW], opset=23),
    Case("Attention", [Q, K, V], {"is_causal": 1}, opset=23, becomes=["Attention"]),
    Case("Attention", [Q, K, V, SEES], {"is_causal": 1}, opset=23),
    Case("Attention", [Q, K, V, SEES, *PAST], {"is_causal": 1}, 3, 23),
    Case("Attention", [*FLAT, None, *PAST], {"is_causal": 1, **HEADS}, 3, 23),
    Case("Attention", [Q, K, V, floats(2, 4, 5, 10), *PAST], {}, 3, 23),
    Case("Attention", [Q, K, V, SEES[:, :, :, :4]], opset=24),
    Case("Attention", [Q, K, V, LOW[:, :, :, :4]], opset=24),
    Case("Attention", [Q, K, V, None, None, None, n(7, 5)], {"is_causal": 1}, opset=24, given=(6,)),
    Case("Attention", [Q, K, V, LOW, None, None, n(7, 4)], {}, opset=24, given=(6,)),
    Case("Attention", [Q, K, V, SEES, None, None, n(6, 3)], {"is_causal": 1}, opset=24, given=(6,)),
    Case("Attention", [Q, K, V], {"left_window_size": 2, "right_window_size": 1}, opset=25),
    Case("Attention", [Q, K, V, SEES, *PAST], {"left_window_size": 2, "is_causal": 1}, 3, 25),
    Case("Attention", [Q, K, V, LOW, None, None, n(7, 6)], {"left_window_size": 3}, opset=25, given=(6,)),
]
POSITIONS = RNG.integers(0, 16, (2, 5))
ROTARY = [
    Case("RotaryEmbedding", [Q, floats(16, 4), floats(16, 4), POSITIONS], opset=23, given=(3,)),
    Case("RotaryEmbedding", [Q, floats(16, 4), floats(16, 4), POSITIONS], {"interleaved": 1}, opset=23),
    Case("RotaryEmbedding", [Q, floats(2, 5, 4), floats(2, 5, 4)], opset=23, becomes=["Reshape", "Reshape", "Rotary"]),
    Case("RotaryEmbedding", [Q, floats(16, 2), floats(16, 2), POSITIONS], {"rotary_embedding_dim": 4}, opset=23),
    Case("RotaryEmbedding", [floats(2, 5, 32), floats(2, 5, 4), floats(2, 5, 4)], {"num_heads": 4}, opset=23),
    Case(
        "RotaryEmbedding",
        [floats(2, 5, 32), floats(16, 2), floats(16, 2), POSITIONS],
        {"num_heads": 4, "rotary_embedding_dim": 4, "interleaved": 1},
        opset=23,
    ),
]


@pytest.mark.parametrize("case", VIEWS + ALONG_AXES + ARITHMETIC + ATTENTION + ROTARY, ids=str)
def test_an_op_computes_what_onnx_says(case: Case) -> None:
    proto = case.model()
    model = normal_form(proto)
    expected = ReferenceEvaluator(proto).run(None, case.feeds())
    found = evaluate(model, case.feeds())
    for output, wanted in zip(proto.graph.output, expected):
        np.testing.assert_allclose(found[output.name], wanted, rtol=1e-5, atol=1e-5)
    if case.becomes is not None:
        assert ops(model) == case.becomes
    assert [n for n in model.graph if not n.domain and n.op_type in ONNX_ONLY] == []


@pytest.mark.parametrize("case", [c for c in ATTENTION + ROTARY if c.opset == 23], ids=str)
def test_onnxruntime_agrees_with_the_reference(case: Case) -> None:
    """Above all on rows that see nothing: they are zero."""
    try:
        session = onnxruntime.InferenceSession(case.model().SerializeToString())
        expected = session.run(None, case.feeds())
    except (ort_errors.NotImplemented, ort_errors.Fail) as error:
        pytest.skip(f"ONNX Runtime does not run it: {error}")
    found = evaluate(normal_form(case.model()), case.feeds())
    for output, wanted in zip(session.get_outputs(), expected):
        np.testing.assert_allclose(found[output.name], wanted, rtol=1e-4, atol=1e-5)


def test_causal_attention_says_so_with_positions() -> None:
    model = normal_form(Case("Attention", [Q, K, V, None, *PAST], {"is_causal": 1}, 3, 23).model())
    node = next(n for n in model.graph if n.op_type == "Attention")
    queries, keys = (v.const_value.numpy() for v in node.inputs[4:6])
    np.testing.assert_array_equal(queries, np.arange(3, 8))
    np.testing.assert_array_equal(keys, np.arange(10))


# --- attributes ---------------------------------------------------------------------------------------------


def test_bounds_are_attributes_counted_from_the_front() -> None:
    model = normal_form(Case("Slice", [X, n(-1, 0), n(LOWEST, 4), n(-2, 2), n(-1, 2)]).model())
    assert attributes(model, "Slice") == {"axes": (1, 2), "starts": (2, 0), "steps": (-1, 2)}
    model = normal_form(Case("ReduceMean", [X, n(-1, 0)]).model())
    assert attributes(model, "ReduceMean") == {"axes": (0, 2), "keepdims": 1}
    model = normal_form(Case("Softmax", [X], opset=13).model())
    assert attributes(model, "Softmax") == {"axis": 2}


def test_numbers_that_depend_on_data_name_the_input() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["axis"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["x", "axis"], ["y"], name="sum"),
    ]
    with pytest.raises(ModelError, match=r"input 1 of node 'sum' \(CumSum\), 'axis', must be known"):
        normal_form(build(nodes, {"x": floats(1)}, ["y"]))


def test_a_sequence_longer_than_the_table_of_positions_is_refused() -> None:
    fixture = inputs.load("gpt2_op18")
    with pytest.raises(ModelError, match=r"reads row 4095 of .*, which has 32"):
        normalise(bind(load(fixture.path), {}, {"batch": 1, "seq": 4096}))


# --- what disappears ----------------------------------------------------------------------------------------


def test_nodes_that_do_nothing_disappear_and_outputs_keep_their_names() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 1, 2]),
        helper.make_node("Reshape", ["d", "shape"], ["e"]),
        helper.make_node("Dropout", ["e"], ["y"]),
    ]
    model = normal_form(build(nodes, {"x": X}, ["y"], {"shape": n(2, 3, 4)}))
    assert ops(model) == ["Relu"]
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_pieces_that_are_joined_again_were_never_cut() -> None:
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "axes"], ["a"]),
        helper.make_node("Slice", ["x", "one", "end", "axes"], ["b"]),
        helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
        helper.make_node("Split", ["c"], ["d", "e"], axis=2, num_outputs=2),
        helper.make_node("Concat", ["d", "e"], ["f"], axis=2),
        helper.make_node("Concat", ["e", "d"], ["g"], axis=2),
        *(helper.make_node("Relu", [name], [f"y_{name}"]) for name in ("f", "g")),
    ]
    numbers = {"zero": n(0), "one": n(1), "end": n(3), "axes": n(1)}
    x = floats(2, 3, 4)
    model = normal_form(build(nodes, {"x": x}, ["y_f", "y_g"], numbers))
    assert sorted(ops(model)) == ["Concat", "Relu", "Relu", "Split"]
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y_f"], np.maximum(x, 0))


def test_numbers_that_change_nothing_disappear() -> None:
    nodes = [
        helper.make_node("Mul", ["one", "x"], ["a"]),
        helper.make_node("Sub", ["a", "zero"], ["b"]),
        helper.make_node("Sub", ["zero", "b"], ["c"]),
        helper.make_node("Add", ["c", "zeros"], ["y"]),
    ]
    weights = {"one": np.ones(1), "zero": np.zeros(()), "zeros": np.zeros((5, 1, 1, 1))}
    model = normal_form(build(nodes, {"x": X}, ["y"], {k: v.astype(np.float32) for k, v in weights.items()}))
    assert ops(model) == ["Sub", "Add"]


def test_an_output_that_is_an_input_a_weight_or_another_output_is_an_identity() -> None:
    nodes = [helper.make_node("Identity", [source], [f"{source}_out"]) for source in ("x", "w", "r")]
    nodes.insert(0, helper.make_node("Relu", ["x"], ["r"]))
    model = normal_form(build(nodes, {"x": X}, ["r", "x_out", "w_out", "r_out"], {"w": floats(3)}))
    assert sorted(ops(model)) == ["Identity", "Identity", "Identity", "Relu"]
    found = evaluate(model, {"x": X})
    np.testing.assert_array_equal(found["x_out"], X)
    np.testing.assert_array_equal(found["r_out"], np.maximum(X, 0))


def test_what_is_computed_twice_is_computed_once() -> None:
    nodes = [helper.make_node("Relu", ["x"], [f"r{i}"]) for i in range(2)]
    nodes += [helper.make_node("Reshape", [f"r{i}", f"s{i}"], [f"v{i}"]) for i in range(2)]
    nodes += [helper.make_node("Exp", [f"v{i}"], [f"y{i}"]) for i in range(2)]
    model = normal_form(build(nodes, {"x": X}, ["y0", "y1"], {"s0": n(6, 4), "s1": n(3, 8)}))
    assert sorted(ops(model)) == ["Exp", "Exp", "Relu", "Reshape", "Reshape"]


def test_what_nobody_uses_is_gone() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("MatMul", ["x", "w"], ["unused"])]
    model = normal_form(build(nodes, {"x": X}, ["y"], {"w": floats(4, 4)}))
    assert ops(model) == ["Relu"]
    assert list(model.graph.initializers) == []


# --- recipes ------------------------------------------------------------------------------------------------

WIDE = floats(256, 300)
STEPS: dict[str, list[onnx.NodeProto]] = {
    "transpose": [helper.make_node("Transpose", ["w"], ["v"])],
    "two transposes": [
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("Transpose", ["t"], ["u"]),
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("Identity", ["u"], ["v"]),
    ],
    "reshape": [helper.make_node("Reshape", ["w", "shape"], ["v"])],
    "cast": [
        helper.make_node("Cast", ["w"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["v"], to=TensorProto.FLOAT),
    ],
    "slice": [helper.make_node("Slice", ["w", "start", "end", "axis"], ["v"])],
    "split": [helper.make_node("Split", ["w"], ["v", "v2", "v3"], axis=1, num_outputs=3)],
    "concat": [helper.make_node("Concat", ["w", "w"], ["v"], axis=1)],
    "pad": [helper.make_node("Pad", ["w", "pads"], ["v"])],
    "mul": [helper.make_node("Mul", ["half", "w"], ["v"])],
    "rows": [helper.make_node("Gather", ["w", "rows"], ["v"])],
    "chain": [
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("Split", ["t"], ["q", "k", "z"], axis=0, num_outputs=3),
        helper.make_node("Concat", ["k", "q"], ["c"], axis=0),
        helper.make_node("Unsqueeze", ["c", "axis"], ["v"]),
    ],
}
NUMBERS = {
    "shape": n(300, 256),
    "start": n(100),
    "end": n(250),
    "axis": n(1),
    "pads": n(1, 0, 0, 2),
    "half": np.array(0.5, np.float32),
    "rows": np.arange(10, 200),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_weight_that_is_only_moved_becomes_a_recipe(step: str) -> None:
    nodes = [*STEPS[step], helper.make_node("Add", ["x", "v"], ["y"])]
    proto = build(nodes, {"x": floats(1)}, ["y"], {"w": WIDE, **NUMBERS})
    model = normal_form(proto)
    assert ops(model) == ["Add"]
    weight = next(n for n in model.graph).inputs[1]
    assert weight is not None
    expected = ReferenceEvaluator(proto).run(None, {"x": np.zeros(1, np.float32)})[0]
    np.testing.assert_array_equal(evaluate(model, {"x": np.zeros(1, np.float32)})["y"], expected)
    np.testing.assert_array_equal(weight.const_value.numpy(), expected)
    recipe = recipes.get(weight)
    assert (set(recipes.sources(recipe)) if recipe else {weight.name}) == {"w"}
    assert set(model.graph.meta[SOURCES]) == ({"w"} if recipe else set())


def test_two_transposes_are_the_weight_itself() -> None:
    assert recipes.transpose(recipes.transpose(recipes.source("w"), [1, 0]), [1, 0]) == recipes.source("w")


def test_the_weight_of_a_linear_layer_is_a_transposed_source() -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    model = normal_form(build([node], {"x": floats(2, 8)}, ["y"], {"w": floats(4, 8), "b": floats(4)}))
    assert ops(model) == ["MatMul", "Add"]
    weight = next(n for n in model.graph).inputs[1]
    assert weight is not None
    assert recipes.get(weight) == {"op": "transpose", "perm": [1, 0], "of": {"op": "source", "name": "w"}}


# --- exported models ----------------------------------------------------------------------------------------

EXPORTS = [(name, odd) for name in inputs.names() for odd in (False, True) if not odd or inputs.load(name).odd]


@pytest.mark.parametrize(("name", "odd"), EXPORTS)
def test_an_exported_model_computes_what_onnxruntime_computes(name: str, odd: bool) -> None:
    fixture = inputs.load(name)
    model = normalise(bind(load(fixture.path), {}, fixture.bindings(odd)))
    assert_normal(model)
    feeds = fixture.make_inputs(1, odd)
    found = evaluate(model, feeds)
    if not fixture.runs_in_ort:
        return
    session = onnxruntime.InferenceSession(str(fixture.path))
    tolerance = {"float16": 2e-2}.get(fixture.dtype, 1e-4)
    for output, wanted in zip(session.get_outputs(), session.run(None, feeds)):
        scale = float(np.nanmax(np.abs(wanted))) if wanted.size else 1.0
        np.testing.assert_allclose(found[output.name], wanted, rtol=tolerance, atol=tolerance * scale)


def assert_normal(model: ir.Model) -> None:
    """The promises of docs/dialect.md."""
    graph = model.graph
    seen = {id(v) for v in [*graph.inputs, *graph.initializers.values()]}
    for node in graph:
        assert node.domain in ("", "onnxmesh")
        assert node.domain or node.op_type not in ONNX_ONLY, node
        assert all(v is None or id(v) in seen for v in node.inputs), f"{node} comes before its input"
        assert not node.inputs or node.inputs[-1] is not None
        seen |= {id(v) for v in node.outputs}
        assert all(v.shape is not None and v.shape.is_static() and v.dtype for v in node.outputs if v.uses())
    for value in graph.initializers.values():
        assert value.uses() or value.is_graph_output()
        assert value.shape is not None
        tensor = value.const_value
        made = value.meta.get("folded") and tensor is not None and value.shape.rank() != 1
        assert not made or tensor.nbytes <= LIMIT
