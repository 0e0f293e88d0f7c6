"""Layout: what only renames bytes is no instruction, no number changes by it, and what takes no strides gets none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lockstep
import numpy as np
import onnx_ir as ir
import pytest
from net import Net

from onnxmesh.compiler.api import compile_model
from onnxmesh.compiler.layout import layout, place_of
from onnxmesh.compiler.lower import lower
from onnxmesh.compiler.options import CpStrategy, Options
from onnxmesh.models import catalogue
from onnxmesh.passes.fuse.gather_first import gather_first
from onnxmesh.passes.graph.build import add_constant
from onnxmesh.runtime.engine import Engine
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Launch, Program
from onnxmesh.runtime.validate import validate

MOVES = {"Reshape", "Identity", "Transpose", "Slice", "Split", "Expand", "Concat"}
B, S, H, D = 2, 3, 4, 8
WIDTH = H * D


@dataclass(frozen=True)
class Laid:
    """A graph that was laid out and lowered."""

    graph: ir.Graph
    program: Program

    @property
    def kernels(self) -> list[str]:
        return [item.kernel for item in self.program.instructions if isinstance(item, Launch)]

    @property
    def moves(self) -> list[str]:
        return [kernel for kernel in self.kernels if kernel in MOVES]

    def at(self, kernel: str, number: int = 0) -> int:
        """The index of the instruction of that kernel."""
        return [i for i, name in enumerate(self.kernels) if name == kernel][number]


def laid(net: Net, *outputs: ir.Value) -> Laid:
    """The program of a graph; run on one rank, it gives just the numbers of the graph."""
    graph = net.graph
    graph.outputs.extend(outputs)
    known = lockstep.run(graph, net.feeds, Mesh.of())
    expected = [known[value][0] for value in outputs]
    layout(ir.Model(graph, ir_version=10))
    plan = lower(graph, Mesh.of(), {}, "test")
    validate(plan)
    weights = [net.feeds[value][0] for value in graph.initializers.values()]
    for _ in range(2):
        found = Engine(plan.programs[0], weights).run([net.feeds[value][0] for value in graph.inputs])
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.flags.c_contiguous
            np.testing.assert_array_equal(ours, theirs)
    return Laid(graph, plan.programs[0])


def heads(net: Net, x: ir.Value, size: int = S) -> ir.Value:
    """[b, s, h * d] as [b, h, s, d]."""
    split = net.op("Reshape", x, shape=(B, size, H, D))
    return net.op("Transpose", split, perm=[0, 2, 1, 3], shape=(B, H, size, D))


def together(net: Net, x: ir.Value, size: int = S) -> ir.Value:
    """[b, h, s, d] as [b, s, h * d]."""
    back = net.op("Transpose", x, perm=[0, 2, 1, 3], shape=(B, size, H, D))
    return net.op("Reshape", back, shape=(B, size, WIDTH))


def linear(net: Net, x: ir.Value, columns: int = WIDTH) -> ir.Value:
    """x times a matrix."""
    rows = x.shape
    assert rows is not None
    weight = net.input(int(rows[-1]), columns)  # type: ignore[call-overload]
    return net.op("MatMul", x, weight, shape=(*rows.numpy()[:-1], columns))


def split(net: Net, x: ir.Value, count: int) -> list[ir.Value]:
    """`count` equal pieces along the last dim."""
    assert x.shape is not None
    *rows, columns = x.shape.numpy()
    node = ir.node("Split", [x], {"axis": len(rows)}, num_outputs=count, name=f"split{len(net.graph)}")
    for number, value in enumerate(node.outputs):
        value.name, value.shape, value.dtype = f"{node.name}-{number}", ir.Shape((*rows, columns // count)), x.dtype
    net.graph.append(node)
    return list(node.outputs)


# --- views --------------------------------------------------------------------------------------------------


def test_nothing_moves_around_an_attention() -> None:
    """Queries, keys and values are read with strides, and the result is written in the order of its reader."""
    net = Net()
    x = net.input(B, S, WIDTH)
    q, k, v = (heads(net, linear(net, x)) for _ in range(3))
    out = together(net, net.op("Attention", q, k, v, shape=(B, H, S, D)))
    assert laid(net, linear(net, out)).kernels == ["MatMul"] * 3 + ["Attention", "MatMul"]


def test_pieces_of_a_joined_product_are_views() -> None:
    net = Net()
    q, k, v = (heads(net, piece) for piece in split(net, linear(net, net.input(B, S, WIDTH), 3 * WIDTH), 3))
    out = together(net, net.op("Attention", q, k, v, shape=(B, H, S, D)))
    assert laid(net, linear(net, out)).moves == []


def test_inputs_and_weights_are_viewed_too() -> None:
    net = Net()
    x, scale = net.input(S, WIDTH), net.number(2.0, 1, 1)
    part = net.op("Slice", x, axes=[0], starts=[1], steps=[1], shape=(1, WIDTH))
    whole = net.op("Expand", scale, shape=(1, WIDTH))
    assert laid(net, net.op("Mul", part, whole)).kernels == ["Mul"]


def test_an_expand_is_a_stride_of_zero_but_no_reshape_sees_through_it() -> None:
    net = Net()
    x = net.op("Neg", net.input(S, 1))
    twice = net.op("Expand", x, shape=(S, 4))
    result = laid(net, net.op("Add", twice, net.input(S, 4)), net.op("Neg", net.op("Reshape", twice, shape=(S * 4,))))
    assert result.moves == ["Expand"]
    net = Net()
    twice = net.op("Expand", net.op("Neg", net.input(S, 1)), shape=(S, 4))
    assert laid(net, net.op("Add", twice, net.input(S, 4))).moves == []


def test_a_product_reads_a_transposed_operand_and_elementwise_ops_do_not() -> None:
    def turned(net: Net) -> ir.Value:
        return net.op("Transpose", net.op("Neg", net.input(B, S, D)), perm=[0, 2, 1], shape=(B, D, S))

    net = Net()
    left = net.op("Neg", net.input(B, 4, D))
    assert laid(net, net.op("MatMul", left, turned(net), shape=(B, 4, S))).moves == []
    net = Net()
    assert laid(net, net.op("Neg", turned(net))).moves == ["Transpose"]


def test_one_row_or_column_picked_by_a_constant_is_a_view() -> None:
    net = Net()
    x = net.op("Neg", net.input(S, 3))
    index = add_constant(net.graph, np.array(-1), "last")
    net.feeds[index] = [np.array(-1)]
    column = net.op("Gather", x, index, axis=1, shape=(S,))
    rows = net.op("Gather", net.op("Reshape", x, shape=(3, S)), index, axis=0, shape=(S,))
    table = net.op("Mul", net.op("Reshape", column, shape=(S, 1)), net.input(1, 4))
    assert laid(net, table, net.op("Abs", rows)).kernels == ["Neg", "Mul", "Abs"]


def test_steps_along_the_last_dim_are_copied() -> None:
    net = Net()
    x = net.op("Neg", net.input(S, 8))
    every = net.op("Slice", x, axes=[1], starts=[1], steps=[2], shape=(S, 4))
    rows = net.op("Slice", x, axes=[0], starts=[0], steps=[2], shape=(2, 8))
    assert laid(net, net.op("Abs", every), net.op("Abs", rows)).moves == ["Slice"]


def test_a_slice_from_the_end_is_copied() -> None:
    net = Net()
    back = net.op("Slice", net.op("Neg", net.input(S, 8)), axes=[0], starts=[S - 1], steps=[-1], shape=(S, 8))
    assert laid(net, net.op("Abs", back)).moves == ["Slice"]


def test_one_piece_of_a_split_is_copied_if_only_its_reader_takes_no_strides() -> None:
    net = Net()
    first, second = split(net, net.op("Neg", net.input(S, 8)), 2)
    result = laid(net, net.op("Abs", first), net.op("CumSum", second, axis=0))
    assert sorted(result.kernels) == ["Abs", "Concat", "CumSum", "Neg"]


@pytest.mark.parametrize(("start", "moves"), [(4, []), (2, ["Slice"])])
def test_products_read_rows_that_begin_at_16_bytes(start: int, moves: list[str]) -> None:
    net = Net()
    x = net.op("Neg", net.input(S, 16))
    part = net.op("Slice", x, axes=[1], starts=[start], steps=[1], shape=(S, 8))
    assert laid(net, linear(net, part, 8)).moves == moves


# --- outputs ------------------------------------------------------------------------------------------------


def test_an_output_is_row_major_memory_of_the_engine() -> None:
    net = Net()
    x = net.input(S, 8)
    own = net.op("Slice", x, axes=[0], starts=[1], steps=[1], shape=(1, 8))
    turned = net.op("Transpose", net.op("Neg", x), perm=[1, 0], shape=(8, S))
    rows = net.op("Slice", net.op("Abs", x), axes=[0], starts=[1], steps=[1], shape=(2, 8))
    assert sorted(laid(net, own, turned, rows).moves) == ["Slice", "Transpose"]


# --- parts of a Concat --------------------------------------------------------------------------------------


def test_the_parts_of_a_concat_are_written_in_place() -> None:
    net = Net()
    x = net.input(B, S, WIDTH)
    attention = net.op("Attention", *(heads(net, linear(net, x)) for _ in range(3)), shape=(B, H, S, D))
    both = net.op("Concat", together(net, attention), net.op("Gelu", x), axis=2, shape=(B, S, 2 * WIDTH))
    result = laid(net, linear(net, both))
    assert result.moves == []
    assert place_of(attention).base is both


def test_a_concat_of_a_concat_is_one_memory() -> None:
    net = Net()
    parts = [net.op("Neg", net.input(2, 4)) for _ in range(3)]
    inner = net.op("Concat", *parts[:2], axis=0, shape=(4, 4))
    outer = net.op("Concat", inner, net.op("Reshape", parts[2], shape=(2, 4)), axis=0, shape=(6, 4))
    result = laid(net, net.op("Abs", outer), net.op("Exp", inner))
    assert result.moves == []
    assert {place_of(part).base for part in parts} == {outer}


def test_one_part_that_cannot_be_written_in_place_is_copied() -> None:
    """Inputs, outputs, and parts that are wanted in two places."""
    net = Net()
    x, y = net.input(2, 8), net.op("Neg", net.input(1, 8))
    assert laid(net, net.op("Abs", net.op("Concat", x, y, axis=0, shape=(3, 8)))).kernels.count("Concat") == 1
    net = Net()
    y = net.op("Neg", net.input(1, 8))
    assert laid(net, net.op("Abs", net.op("Concat", y, y, axis=0, shape=(2, 8)))).moves == ["Concat"]
    net = Net()
    x, y = net.op("Neg", net.input(2, 8)), net.op("Abs", net.input(2, 8))
    first = net.op("Concat", x, y, axis=1, shape=(2, 16))
    second = net.op("Concat", y, net.op("Exp", x), axis=1, shape=(2, 16))
    assert laid(net, net.op("Abs", first), net.op("Abs", second), y).moves == ["Concat"] * 2


def test_a_concat_of_which_more_would_be_copied_stays_as_it_is() -> None:
    net = Net()
    parts = [net.input(2, 8), net.input(2, 8), net.op("Neg", net.input(2, 8))]
    assert laid(net, net.op("Abs", net.op("Concat", *parts, axis=0, shape=(6, 8)))).moves == ["Concat"]


def test_neighbouring_parts_of_one_memory_need_no_concat() -> None:
    net = Net()
    x = net.op("Neg", net.input(4, 8))
    parts = [net.op("Slice", x, axes=[0], starts=[i], steps=[1], shape=(2, 8)) for i in (0, 2)]
    assert laid(net, net.op("Abs", net.op("Concat", *parts, axis=0, shape=(4, 8)))).moves == []
    net = Net()
    x = net.op("Neg", net.input(4, 8))
    parts = [net.op("Slice", x, axes=[0], starts=[i], steps=[1], shape=(2, 8)) for i in (2, 0)]
    assert laid(net, net.op("Abs", net.op("Concat", *parts, axis=0, shape=(4, 8)))).moves == ["Concat"]


def test_equal_pieces_of_two_products_are_one_piece_of_both() -> None:
    """Text and image: the products are written side by side, and so their values are neighbours."""
    net = Net()
    text, image = (split(net, linear(net, net.input(1, size, WIDTH), 3 * WIDTH), 3) for size in (3, 5))
    pairs = [(text[0], image[0]), (net.op("Neg", text[1]), net.op("Neg", image[1])), (text[2], image[2])]
    joined = [net.op("Concat", *pair, axis=1, shape=(1, 8, WIDTH)) for pair in pairs]
    q, k, v = (
        net.op("Transpose", net.op("Reshape", x, shape=(1, 8, H, D)), perm=[0, 2, 1, 3], shape=(1, H, 8, D))
        for x in joined
    )
    out = net.op("Attention", q, k, v, shape=(1, H, 8, D))
    assert laid(net, net.op("Abs", out)).moves == []
    assert place_of(q).base is place_of(v).base and place_of(k).base is joined[1]


def test_what_is_a_copy_in_any_case_is_made_in_its_place() -> None:
    """A table of angles, each twice: Expand and Reshape write two parts of a Concat."""
    net = Net()
    tables = [
        net.op("Reshape", net.op("Expand", net.op(op, net.input(S, 4, 1)), shape=(S, 4, 2)), shape=(S, 8))
        for op in ("Sin", "Cos")
    ]
    assert laid(net, net.op("Abs", net.op("Concat", *tables, axis=1, shape=(S, 16)))).moves == ["Expand"] * 2


def test_what_takes_no_strides_writes_and_reads_row_major_memory() -> None:
    def joined(axis: int) -> list[str]:
        net = Net()
        parts = [net.op("CumSum", net.input(4, 8), axis=0) for _ in range(2)]
        shape = (8, 8) if axis == 0 else (4, 16)
        return laid(net, net.op("Abs", net.op("Concat", *parts, axis=axis, shape=shape))).moves

    assert joined(axis=0) == []
    assert joined(axis=1) == ["Concat"]


# --- order and memory ---------------------------------------------------------------------------------------


def test_readers_wait_for_who_wrote_what_they_read() -> None:
    net = Net()
    x, y = net.op("Neg", net.input(2, 8)), net.op("Abs", net.input(2, 8))
    both = net.op("Exp", net.op("Concat", x, y, axis=1, shape=(2, 16)))
    result = laid(net, both, net.op("Sin", x))
    items = result.program.instructions
    writers = {result.at("Neg"), result.at("Abs")}
    assert writers <= set(items[result.at("Exp")].after)
    assert result.at("Neg") in items[result.at("Sin")].after and result.at("Abs") not in items[result.at("Sin")].after


@pytest.mark.parametrize("seed", range(30))
def test_any_graph_of_moves_gives_its_numbers(seed: int) -> None:
    """Random chains of moving ops and others, over one arena."""
    rng = np.random.default_rng(seed)
    net = Net()
    values = [net.op("Neg", net.input(2, 4, 4)) for _ in range(2)]
    for _ in range(14):
        x = values[int(rng.integers(max(0, len(values) - 5), len(values)))]
        assert x.shape is not None
        values.append(step(net, x, tuple(x.shape.numpy()), values, rng))
    sinks = [value for value in values if not value.uses()]
    laid(net, *dict.fromkeys([*sinks, values[len(values) // 2]]))


def step(net: Net, x: ir.Value, shape: tuple[int, ...], values: list[ir.Value], rng: np.random.Generator) -> ir.Value:
    """One more node."""
    axis = int(rng.integers(len(shape)))
    match rng.choice(["Transpose", "Reshape", "Slice", "Concat", "Expand", "Abs", "Cos", "CumSum", "Concat", "MatMul"]):
        case "Transpose":
            perm = rng.permutation(len(shape)).tolist()
            return net.op("Transpose", x, perm=perm, shape=[shape[p] for p in perm])
        case "Reshape":
            flat = int(np.prod(shape))
            return net.op("Reshape", x, shape=[(flat,), (2, flat // 2), shape][int(rng.integers(3))])
        case "Slice" if shape[axis] > 1:
            size = shape[axis] // 2
            smaller = [size if i == axis else n for i, n in enumerate(shape)]
            return net.op("Slice", x, axes=[axis], starts=[size], steps=[1], shape=smaller)
        case "Concat":
            same = [v for v in values if v.shape is not None and tuple(v.shape.numpy()) == shape]
            parts = [x, *(same[int(rng.integers(len(same)))] for _ in range(int(rng.integers(1, 3))))]
            longer = [len(parts) * n if i == axis else n for i, n in enumerate(shape)]
            return net.op("Concat", *parts, axis=axis, shape=longer)
        case "Expand":
            return net.op("Expand", x, shape=(2, *shape)) if np.prod(shape) < 500 else net.op("Neg", x)
        case "MatMul" if len(shape) > 1:
            return net.op("MatMul", x, net.input(shape[-1], 4), shape=(*shape[:-1], 4))
        case "CumSum":
            return net.op("CumSum", x, axis=axis)
        case op:
            return net.op("Cos" if op == "Cos" else "Abs", x)


# --- whole models -------------------------------------------------------------------------------------------


def test_keys_are_gathered_before_they_are_transposed() -> None:
    """Then the pieces of the ranks arrive where they belong."""
    net = Net()
    k = net.op("Neg", net.input(1, S, H, D))
    turned = net.op("Transpose", k, perm=[0, 2, 1, 3], shape=(1, H, S, D))
    attrs: dict[str, Any] = {"axis": "cp", "ranks": 2, "dim": 2, "segments": [2 * S, 1]}
    whole = net.op("AllGather", turned, shape=(1, H, 2 * S, D), **attrs)
    net.graph.outputs.append(net.op("Neg", whole))
    gather_first(ir.Model(net.graph, ir_version=10))
    assert [node.op_type for node in net.graph] == ["Neg", "AllGather", "Transpose", "Neg"]
    assert net.graph[1].attributes.get_int("dim", -1) == 1
    assert place_of(net.graph[2].outputs[0]).window.shape == (1, H, 2 * S, D)


@cache
def moves_of(model: str, tp: int, cp: int, strategy: CpStrategy) -> Counter[str]:
    """The copies of activations that one rank makes in two blocks; not those of tables, which are made once."""
    sizes = {"double": 1, "single": 1} if model == "flux" else {"layers": 2}
    with TemporaryDirectory() as folder:
        path = catalogue.save(model, Path(folder) / "m.onnx", weights="none", **sizes)
        plan = compile_model(str(path), Options(Mesh.of(tp=tp, cp=cp), cp_strategy=strategy)).plan
    assert plan is not None
    program = plan.programs[0]
    found = Counter[str]()
    for item in program.instructions:
        if isinstance(item, Launch) and item.kernel in MOVES:
            out = program.buffers[item.outs[0]]
            found[item.kernel] += len(out.shape) > 2 and out.dtype == "bfloat16"
    return +found


@pytest.mark.parametrize(("model", "tp", "cp", "strategy", "copies"), [
    ("flux", 1, 1, "auto", {}),
    ("flux", 2, 1, "auto", {}),
    ("flux", 1, 2, "ulysses", {}),
    ("flux", 1, 2, "allgather", {"Concat": 2}),  # values, which are sent from row-major memory
    ("flux", 1, 2, "ring", {"Concat": 1, "Transpose": 1}),
    ("llama-8b", 1, 1, "auto", {}),
    ("llama-8b", 2, 1, "auto", {}),
    ("llama-8b", 1, 2, "ulysses", {}),
    ("llama-8b", 1, 2, "allgather", {"Concat": 2}),
    ("llama-8b", 1, 2, "ring", {"Transpose": 2}),
])  # fmt: skip
def test_the_copies_that_remain(model: str, tp: int, cp: int, strategy: CpStrategy, copies: dict[str, int]) -> None:
    assert moves_of(model, tp, cp, strategy) == copies
