"""bind: sizes for the dynamic dims, then every value static and every shape computation gone."""

from __future__ import annotations

from typing import Any

import inputs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from evaluate import evaluate
from onnx import TensorProto, helper, numpy_helper

from onnxmesh.compiler.errors import ModelError
from onnxmesh.compiler.frontend import load
from onnxmesh.compiler.ir.loose import loose_type
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.graph.fold import LIMIT
from onnxmesh.passes.normalise.normalise import normalise

Dims = list[int | str | None]


def graph(
    text_nodes: list[onnx.NodeProto],
    given: dict[str, Dims],
    outputs: list[str],
    weights: dict[str, np.ndarray] | None = None,
    dtype: int = TensorProto.FLOAT,
) -> ir.Model:
    proto = helper.make_graph(
        text_nodes,
        "g",
        [helper.make_tensor_value_info(n, dtype, shape) for n, shape in given.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    return load(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def relu(shape: Dims, other: Dims | None = None) -> ir.Model:
    given = {"x": shape} if other is None else {"x": shape, "z": other}
    nodes = [helper.make_node("Relu", [n], [f"{n}_out"]) for n in given]
    return graph(nodes, given, [f"{n}_out" for n in given])


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def output_shape(model: ir.Model, index: int = 0) -> list[Any]:
    shape = model.graph.outputs[index].shape
    assert shape is not None
    return list(shape.dims)


def refused(model: ir.Model, shapes: dict[str, tuple[int, ...]], dims: dict[str, int]) -> str:
    with pytest.raises(ModelError) as caught:
        bind(model, shapes, dims)
    return str(caught.value)


# --- binding ------------------------------------------------------------------------------------------------


def test_a_dim_by_its_name_binds_every_input_that_has_it() -> None:
    model = bind(relu(["b", "s", 4], ["s"]), {}, {"b": 2, "s": 5})
    assert [output_shape(model, i) for i in (0, 1)] == [[2, 5, 4], [5]]


def test_a_shape_binds_the_names_in_it_elsewhere() -> None:
    model = bind(relu(["b", "s"], ["s", "b"]), {"x": (2, 5)}, {})
    assert output_shape(model, 1) == [5, 2]


def test_a_shape_binds_dims_without_names() -> None:
    assert output_shape(bind(relu([None, 4]), {"x": (3, 4)}, {})) == [3, 4]


def test_dims_may_be_expressions() -> None:
    model = bind(relu(["past + seq"], ["2*seq"]), {}, {"past": 12, "seq": 4})
    assert [output_shape(model, i) for i in (0, 1)] == [[16], [8]]


@pytest.mark.parametrize(
    ("shapes", "dims", "says"),
    [
        ({}, {}, ["dim 0 ('b') of input 'x'", "--dim b=...", "--shape x="]),
        ({}, {"b": 2}, ["dim 1 ('s') of input 'x'", "--dim s=..."]),
        ({}, {"b": 2, "q": 3}, ["no input of the model has a dim 'q'", "'b', 's'"]),
        ({"y": (2, 5, 4)}, {}, ["the model has no input 'y'", "'x'"]),
        ({"x": (2, 5)}, {}, ["input 'x' has 3 dims, [b, s, 4]", "given with 2"]),
        ({"x": (2, 5, 8)}, {}, ["dim 2 of input 'x' is 4 in the model, but 8", "2x5x8"]),
        ({"x": (2, 5, 4)}, {"s": 6}, ["dim 's' of input 'x' is 5", "--dim s=6"]),
        ({}, {"b": -1, "s": 2}, ["'b' cannot be -1"]),
    ],
)
def test_what_does_not_fit_is_said(shapes: dict, dims: dict, says: list[str]) -> None:
    text = refused(relu(["b", "s", 4]), shapes, dims)
    assert [s for s in says if s not in text] == []


def test_two_inputs_that_disagree_on_a_dim() -> None:
    text = refused(relu(["s"], ["s"]), {"x": (3,), "z": (4,)}, {})
    assert "'s' of input 'z' is 4" in text
    assert "the shape of input 'x' says 3" in text


def test_a_dim_without_a_name_asks_for_a_shape() -> None:
    text = refused(relu([None, 16]), {}, {})
    assert "without a name" in text
    assert "--shape x=1x16" in text


def test_inputs_that_do_not_fit_each_other_name_the_node() -> None:
    model = graph([helper.make_node("Add", ["x", "z"], ["y"], name="sum")], {"x": ["a"], "z": ["b"]}, ["y"])
    text = refused(model, {}, {"a": 3, "b": 4})
    assert "node 'sum' (Add) does not fit its inputs 'x' FLOAT[3], 'z' FLOAT[4]" in text


# --- folding ------------------------------------------------------------------------------------------------


def test_shape_arithmetic_folds_away() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["b"]),
        helper.make_node("Unsqueeze", ["b", "axis"], ["b1"]),
        helper.make_node("Concat", ["b1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    weights = {"zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1])}
    model = bind(graph(nodes, {"x": ["b", "s", 4]}, ["y"], weights), {}, {"b": 2, "s": 5})
    assert ops(model) == ["Reshape"]
    assert output_shape(model) == [2, 20]


def test_positions_fold_at_any_length_and_masks_stay_computed() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Squeeze", ["shape"], ["s"]),
        helper.make_node("Range", ["zero", "s", "one"], ["positions"]),
        helper.make_node("Unsqueeze", ["positions", "axis"], ["column"]),
        helper.make_node("LessOrEqual", ["positions", "column"], ["causal"]),
        helper.make_node("Where", ["causal", "x", "column_float"], ["y"]),
    ]
    weights = {
        "zero": np.array(0),
        "one": np.array(1),
        "axis": np.array([1]),
        "column_float": np.zeros((), np.float32),
    }
    model = bind(graph(nodes, {"x": ["s"]}, ["y"], weights), {}, {"s": 20_000})
    assert ops(model) == ["LessOrEqual", "Where"]
    assert model.graph.initializers["positions"].const_value.shape == (20_000,)


@pytest.mark.parametrize(("rows", "left"), [(100, []), (10_000, ["Mul"])])
def test_only_small_constants_are_computed(rows: int, left: list[str]) -> None:
    nodes = [helper.make_node("Mul", ["w", "w"], ["w2"]), helper.make_node("Add", ["x", "w2"], ["y"])]
    model = bind(graph(nodes, {"x": [4]}, ["y"], {"w": np.ones((rows, 4), np.float32)}), {}, {})
    assert (rows * 16 > LIMIT) == bool(left)
    assert ops(model) == [*left, "Add"]


def test_a_corner_of_a_large_mask_is_taken() -> None:
    """Older GPT-2 exports hold one causal mask for the longest sequence."""
    mask = np.tril(np.ones((1024, 1024), np.uint8))
    nodes = [
        helper.make_node("Slice", ["mask", "start", "end", "axes"], ["corner"]),
        helper.make_node("Cast", ["corner"], ["seen"], to=TensorProto.BOOL),
        helper.make_node("Where", ["seen", "x", "low"], ["y"]),
    ]
    numbers = {"start": np.array([0, 0]), "end": np.array([4, 4]), "axes": np.array([0, 1])}
    weights = {"mask": mask, "low": np.array(-1e9, np.float32), **numbers}
    model = bind(graph(nodes, {"x": [4, 4]}, ["y"], weights), {}, {})
    assert ops(model) == ["Where"]
    np.testing.assert_array_equal(model.graph.initializers["seen"].const_value.numpy(), mask[:4, :4].astype(bool))


def test_a_padding_mask_that_is_gathered_in_order_is_reshaped() -> None:
    """At any length: the indices are looked at, not kept."""
    batch, length = 2, 30_000
    nodes = [
        helper.make_node("Shape", ["x"], ["pair"]),
        helper.make_node("Split", ["pair"], ["b", "s"], axis=0, num_outputs=2),
        *(helper.make_node("Squeeze", [n], [f"{n}0"]) for n in "bs"),
        *(helper.make_node("Range", ["zero", f"{n}0", "one"], [f"{n}_range"]) for n in "bs"),
        helper.make_node("Unsqueeze", ["b_range", "b_axes"], ["b_column"]),
        helper.make_node("Unsqueeze", ["s_range", "s_axes"], ["s_row"]),
        helper.make_node("Concat", ["b", "s", "ones"], ["sizes"], axis=0),
        helper.make_node("Expand", ["b_column", "sizes"], ["b_index"]),
        helper.make_node("Expand", ["s_row", "sizes"], ["s_index"]),
        helper.make_node("Concat", ["b_index", "s_index"], ["indices"], axis=-1),
        helper.make_node("GatherND", ["x", "indices"], ["g"]),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    weights = {"zero": np.array(0), "one": np.array(1), "ones": np.array([1]), "b_axes": np.array([1, 2])}
    weights["s_axes"] = np.array([0, 2])
    model = bind(graph(nodes, {"x": ["b", "s"]}, ["y"], weights), {}, {"b": batch, "s": length})
    assert [n for n in ops(model) if n in ("Reshape", "GatherND", "Relu")] == ["Reshape", "Relu"]
    assert output_shape(model) == [batch, length]


def test_the_branch_that_is_taken_is_inlined() -> None:
    def branch(op: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["x"], ["out"])], op, [], [output])

    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=1),
        helper.make_node("Equal", ["shape", "one"], ["is_one"]),
        helper.make_node("If", ["is_one"], ["y"], then_branch=branch("Relu"), else_branch=branch("Exp")),
    ]
    for size, taken in ((1, "Relu"), (3, "Exp")):
        model = bind(graph(nodes, {"x": [2, "s"]}, ["y"], {"one": np.array([1])}), {}, {"s": size})
        assert ops(model) == [taken]
        assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize("keepdims", [0, 1])
def test_sequences_of_tensors_are_taken_apart(keepdims: int) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["pieces"], axis=1, keepdims=keepdims),
        *(helper.make_node("SequenceAt", ["pieces", f"at{i}"], [f"p{i}"]) for i in range(2)),
        helper.make_node("SequenceConstruct", ["p1", "p0"], ["swapped"]),
        helper.make_node("ConcatFromSequence", ["swapped"], ["y"], axis=1, new_axis=1 - keepdims),
    ]
    weights = {"at0": np.array(0), "at1": np.array(-1)}
    model = bind(graph(nodes, {"x": ["b", 3, 4]}, ["y"], weights), {}, {"b": 2})
    assert output_shape(model) == [2, 2, 4]
    assert [op for op in ops(model) if "Sequence" in op] == ["Loose.SplitToSequence", "Loose.SequenceConstruct"]
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(evaluate(normalise(model), {"x": x})["y"], x[:, [2, 0]])


def test_a_shape_that_depends_on_data_makes_a_loose_value() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["y"], to=1)]
    model = bind(graph(nodes, {"x": [4]}, ["y"]), {}, {})
    assert ops(model) == ["Loose.NonZero", "Loose.Cast"]
    found = loose_type(model.graph.outputs[0])
    assert found is not None
    assert (found.text, found.shape) == ("tensor(float)", (1, -1))


def test_an_op_with_sizes_that_are_data_keeps_its_form() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("Expand", ["x", "sizes"], ["y"], name="grow"),
    ]
    assert ops(bind(graph(nodes, {"x": [1]}, ["y"]), {}, {})) == ["Cast", "Loose.Expand"]


def test_ops_that_onnx_has_no_shape_function_for() -> None:
    model = graph([helper.make_node("MeanVarianceNormalization", ["x"], ["y"])], {"x": ["b", 3, 4, 4]}, ["y"])
    assert output_shape(bind(model, {}, {"b": 2})) == [2, 3, 4, 4]


@pytest.mark.parametrize("name", inputs.names())
def test_every_value_of_an_exported_model_is_static(name: str) -> None:
    fixture = inputs.load(name)
    model = bind(load(fixture.path), {}, fixture.bindings())
    for node in model.graph:
        for value in node.outputs:
            assert not value.name or (value.shape is not None and value.shape.is_static()), (node, value)
            assert not value.name or value.dtype is not None
    assert not {"Shape", "Constant", "Range", "ConstantOfShape", "Size"} & set(ops(model))
