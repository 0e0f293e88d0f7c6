"""Exported models: what is recognised in each, and that it computes the same as ONNX Runtime."""

from __future__ import annotations

from collections import Counter

import inputs
import numpy as np
import onnx
import onnxruntime
import pytest
from evaluate import evaluate
from recognition import assert_ordered

from onnxmesh.compiler.frontend import load
from onnxmesh.passes.bind.bind import bind
from onnxmesh.passes.normalise.normalise import normalise
from onnxmesh.passes.recognise.recognise import recognise

LLAMA = {"Attention": 2, "RMSNormalization": 5, "Rotary": 4, "Swish": 2}
FLUX = {"Attention": 4, "RMSNormalization": 12, "LayerNormalization": 11, "Rotary": 8, "Gelu": 6, "Swish": 4}
GPT = {"Attention": 2, "LayerNormalization": 5, "Gelu": 2}
GOLDEN = {
    "bert": GPT,
    "bloom": GPT | {"LayerNormalization": 6},
    "clip": {"Attention": 4, "LayerNormalization": 11, "Swish": 4},
    "deberta": GPT,
    "falcon": GPT | {"LayerNormalization": 3, "Rotary": 4},
    "flux": FLUX,
    "flux2": {"Attention": 3, "RMSNormalization": 8, "LayerNormalization": 7, "Rotary": 6, "Swish": 7},
    "flux_text": FLUX | {"Attention": 2, "RMSNormalization": 6, "LayerNormalization": 6, "Rotary": 4, "Gelu": 3},
    "gemma2": {"Attention": 2, "RMSNormalization": 9, "Rotary": 4, "Gelu": 2},
    "gpt2": GPT,
    "gpt_neox": GPT | {"Rotary": 4},
    "gpt_oss": LLAMA | {"Attention": 0, "AttentionBlock": 2},
    "llama": LLAMA,
    "llama_decode": LLAMA,
    "llama_gqa2": LLAMA,
    "llama_grow": LLAMA,
    "llama_h6": LLAMA,
    "llama_kv": LLAMA,
    "ltx": {"Attention": 4, "RMSNormalization": 12, "LayerNormalization": 1, "Rotary": 4, "Gelu": 3, "Swish": 2},
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "mlp": {"LayerNormalization": 2, "Gelu": 2},
    "phi3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"RMSNormalization": 9},
    "sd3": {"Attention": 3, "RMSNormalization": 10, "LayerNormalization": 8, "Gelu": 3, "Swish": 3},
    "swin": {"Attention": 4, "LayerNormalization": 11, "Gelu": 4},
    "t5": {"Attention": 6, "RMSNormalization": 12, "Gelu": 4},
    "vit": GPT,
    "wan": {
        "Attention": 4, "RMSNormalization": 8, "LayerNormalization": 7, "Rotary": 4, "Gelu": 3, "Swish": 2,
    },
    "whisper": {"Attention": 6, "LayerNormalization": 12, "Gelu": 6},
}  # fmt: skip
LEFT = {"mixtral": {"Softmax": 2}, "gpt_oss": {"Softmax": 2, "Sigmoid": 2}, "bert": {"Tanh": 1}, "gemma2": {"Tanh": 1}}
"""What belongs to no pattern: routers, a pooler, a cap on logits; the part of the weight that a sink leaves."""
ANCHORS = ("Softmax", "Erf", "Tanh", "Sigmoid", "Sqrt")
TOLERANCE = {"float16": 8e-3, "bfloat16": 6e-2}
"""Of the largest number of an output; half precision is rounded at other places."""


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("name", inputs.names())
def test_fixture(name: str, odd: bool) -> None:
    fixture = inputs.load(name)
    if odd and not fixture.odd:
        pytest.skip("all its dims are fixed")
    model, findings = recognise(normalise(bind(load(str(fixture.path)), fixture.shapes(odd), {})))
    assert_ordered(model.graph)
    assert [f for f in findings if not f.found] == []
    if fixture.model in GOLDEN:
        ops = Counter(node.op_type for node in model.graph)
        assert {op: ops[op] for op in GOLDEN[fixture.model]} == GOLDEN[fixture.model]
        assert {op: ops[op] for op in ANCHORS if ops[op]} == LEFT.get(fixture.model, {})
    if fixture.runs_in_ort:
        values = fixture.make_inputs(seed=3, odd=odd)
        found, wanted = evaluate(model, values), reference(fixture, values)
        tolerance = TOLERANCE.get(fixture.dtype, 1e-5)
        for output, array in wanted.items():
            scale = max(1.0, np.abs(array).max())
            np.testing.assert_allclose(found[output], array, rtol=0, atol=scale * tolerance, err_msg=output)


def reference(fixture: inputs.Fixture, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(fixture.path), options, providers=["CPUExecutionProvider"])
    return dict(zip(fixture.outputs, session.run(None, values)))


def test_every_model_has_its_golden_line() -> None:
    assert {inputs.load(name).model for name in inputs.names()} <= set(GOLDEN)


def test_heads_of_keys_are_those_of_the_model() -> None:
    """Keys and values that were repeated for the heads of the queries are no more."""
    for name in inputs.names():
        fixture = inputs.load(name)
        model, _ = recognise(normalise(bind(load(onnx.load(fixture.path)), fixture.shapes(), {})))
        shapes = [n.inputs[i].shape for n in model.graph if n.op_type == "Attention" for i in (0, 1, 2)]
        heads = {int(shape[1]) for shape in shapes}
        assert heads <= {fixture.heads, fixture.kv_heads}, name
        assert not heads or fixture.kv_heads in heads, name
