"""A small decoder as the model builder of ONNX Runtime GenAI writes them: com.microsoft ops over a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

LAYERS, HEADS, GROUPS, WIDTH, INNER, VOCAB, POSITIONS = 2, 4, 2, 16, 96, 64, 32
HIDDEN, EXPERTS = HEADS * WIDTH, 4

FLOAT, INT64, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32


class Graph:
    """Nodes and weights under names that are made up as they come."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def op(
        self, op: str, *inputs: str, outputs: int = 1, domain: str = "com.microsoft", **attributes: Any
    ) -> list[str]:
        name = f"/{op}_{len(self.nodes)}"
        names = [f"{name}/output_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name, domain=domain, **attributes))
        return names

    def onnx(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.op(op, *inputs, domain="", **attributes)[0]

    def array(self, array: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def random(self, *shape: int) -> str:
        scale = 1.5 / np.sqrt(shape[-2]) if len(shape) > 1 else 1.0
        return self.array((self._random.standard_normal(shape) * scale).astype(np.float32))

    def linear(self, x: str, rows: int, columns: int) -> str:
        return self.onnx("MatMul", x, self.random(rows, columns))


def decoder(*, packed: bool = False, experts: bool = False, window: int = -1) -> onnx.ModelProto:
    """Token ids, a mask of all tokens so far, and a cache, to logits and the cache with the new tokens."""
    g = Graph()
    one = g.array(np.array([1], np.int64))
    total = g.onnx("Gather", g.onnx("Shape", "attention_mask"), g.array(np.array(1, np.int64)), axis=0)
    lengths = [
        g.onnx("Cast", g.onnx("Sub", g.onnx("ReduceSum", "attention_mask", one, keepdims=0), one), to=INT32),
        g.onnx("Cast", total, to=INT32),
    ]
    angles = np.outer(np.arange(POSITIONS), 1e4 ** (-np.arange(0, WIDTH, 2) / WIDTH))
    tables = [g.array(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    inputs, outputs = (
        [_value("input_ids", INT64, "batch", "seq"), _value("attention_mask", INT64, "batch", "total")],
        [],
    )
    total_sum = g.onnx("Gather", g.random(VOCAB, HIDDEN), "input_ids")
    x = g.op("SimplifiedLayerNormalization", total_sum, g.random(HIDDEN), domain="", axis=-1, epsilon=1e-6)[0]
    for layer in range(LAYERS):
        caches = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        inputs += [_value(name, FLOAT, "batch", GROUPS, "past", WIDTH) for name in caches]
        y, *present = g.op(
            "GroupQueryAttention", *_projections(g, x, packed), *caches, *lengths, *tables, outputs=3, num_heads=HEADS,
            kv_num_heads=GROUPS, do_rotary=1, local_window_size=window, scale=WIDTH**-0.5,
        )  # fmt: skip
        for name, kind in zip(present, ("key", "value")):
            g.nodes[-1].output[1 + (kind == "value")] = f"present.{layer}.{kind}"
            outputs.append(_value(f"present.{layer}.{kind}", FLOAT, "batch", GROUPS, "total", WIDTH))
            assert name
        x, total_sum = _norm(g, total_sum, g.linear(y, HIDDEN, HIDDEN))
        x, total_sum = _norm(g, total_sum, _experts(g, x) if experts else _layers(g, x))
    g.nodes.append(helper.make_node("MatMul", [x, g.random(HIDDEN, VOCAB)], ["logits"]))
    graph = helper.make_graph(
        g.nodes, "decoder", inputs, [_value("logits", FLOAT, "batch", "seq", VOCAB), *outputs], g.weights
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _value(name: str, dtype: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _projections(g: Graph, x: str, packed: bool) -> list[str]:
    if packed:
        return [g.linear(x, HIDDEN, (HEADS + 2 * GROUPS) * WIDTH), "", ""]
    return [g.linear(x, HIDDEN, heads * WIDTH) for heads in (HEADS, GROUPS, GROUPS)]


def _norm(g: Graph, x: str, skip: str) -> tuple[str, str]:
    """The normalised sum, and the sum."""
    made = g.op("SkipSimplifiedLayerNormalization", x, skip, g.random(HIDDEN), outputs=4, epsilon=1e-6)
    for i in (1, 2):
        g.nodes[-1].output[i] = ""
    return made[0], made[3]


def _layers(g: Graph, x: str) -> str:
    gate, up = (g.linear(x, HIDDEN, INNER) for _ in range(2))
    act = g.op("QuickGelu", gate, alpha=1.0)[0]
    return g.linear(g.onnx("Mul", act, up), INNER, HIDDEN)


def _experts(g: Graph, x: str) -> str:
    rows = g.array(np.array([-1, EXPERTS], np.int64))
    router = g.onnx("Reshape", g.linear(x, HIDDEN, EXPERTS), rows)
    weights = [g.random(EXPERTS, 2 * INNER, HIDDEN), "", g.random(EXPERTS, HIDDEN, INNER)]
    return g.op(
        "MoE", x, router, *weights, k=2, normalize_routing_weights=1, activation_type="swiglu", swiglu_fusion=1
    )[0]


def feeds(batch: int, seq: int, past: int, total: int, filled: list[int]) -> dict[str, np.ndarray]:
    """Inputs for `seq` new tokens a sequence; `filled`: how many keys each has with them, of `total` in the mask."""
    random = np.random.default_rng(1)
    made: dict[str, np.ndarray] = {
        "input_ids": random.integers(0, VOCAB, (batch, seq)),
        "attention_mask": (np.arange(total) < np.array(filled)[:, None]).astype(np.int64),
    }
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            cache = random.standard_normal((batch, GROUPS, past, WIDTH)).astype(np.float32)
            made[f"past_key_values.{layer}.{kind}"] = cache
    return made
