"""The model builders: the exporter's own graphs, valid, deterministic, of the sizes they are named for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxmesh.models.bert import bert
from onnxmesh.models.catalogue import CATALOGUE, build, save
from onnxmesh.models.flux import flux
from onnxmesh.models.gpt2 import gpt2
from onnxmesh.models.llama import llama
from onnxmesh.models.wan import wan
from onnxmesh.models.weights import InlineWeights

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = {"batch": 2, "seq": 16}
Builder = Callable[..., onnx.ModelProto]

# The sizes of the exported models in the fixtures.
TINY: dict[str, tuple[Builder, dict[str, Any]]] = {
    "llama": (
        llama,
        {"layers": 2, "hidden": 64, "heads": 8, "kv_heads": 4, "intermediate": 96, "vocab": 96},
    ),
    "bert": (
        bert,
        {"layers": 2, "hidden": 64, "heads": 8, "intermediate": 96, "vocab": 96, "positions": 32},
    ),
    "gpt2": (
        gpt2,
        {"layers": 2, "hidden": 64, "heads": 8, "intermediate": 96, "vocab": 96, "positions": 32},
    ),
    "flux": (
        flux,
        {
            "double": 2, "single": 2, "heads": 4, "head_dim": 8, "text": 8, "image": 16, "channels": 8,
            "text_width": 24, "pooled_width": 16, "axes": (4, 2, 2), "batch": 2,
        },
    ),
    "wan": (
        wan,
        {
            "layers": 2, "heads": 4, "head_dim": 12, "intermediate": 64, "frames": 2, "height": 8, "width": 8,
            "text": 8, "text_width": 24, "channels": 4, "time_width": 32, "positions": 16, "batch": 2,
        },
    ),
}  # fmt: skip
LANGUAGE = ("llama", "bert", "gpt2")


def tiny(model: str, **changes: Any) -> onnx.ModelProto:
    builder, settings = TINY[model]
    return builder(**settings, **changes)


def inputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Random inputs by name, with the open dims bound to TOKENS."""
    rng = np.random.default_rng(0)
    arrays = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or TOKENS[d.dim_param] for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if value.name == "attention_mask":
            array = np.ones(shape)
            array[0, 11:] = 0
        elif value.name == "position_ids":
            array = np.broadcast_to(np.arange(shape[1]), shape)
        else:
            array = rng.integers(0, 96, shape) if dtype == np.int64 else rng.uniform(-1.0, 1.0, shape)
        arrays[value.name] = array.astype(dtype)
    return arrays


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = feeds or inputs(model)
    outputs: list[np.ndarray] = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    return outputs


def structure(model: onnx.ModelProto) -> Counter[int]:
    """Every node as a hash of its operator, attributes and whole ancestry, free of names and of order.

    An initialiser counts by its type and shape, and by its value where it is a number or a small shape.
    """
    known: dict[str, int] = {"": 0}
    for value in model.graph.input:
        known[value.name] = hash((value.name, value.type.tensor_type.elem_type))
    for tensor in model.graph.initializer:
        small = np.prod(tensor.dims) <= (8 if tensor.data_type == onnx.TensorProto.INT64 else 1)
        array = numpy_helper.to_array(tensor).astype(np.float64).ravel() if small else np.zeros(0)
        known[tensor.name] = hash((tensor.data_type, *tensor.dims, *array.round(7).tolist()))
    nodes = []
    for node in model.graph.node:
        attributes = sorted((a.name, str(helper.get_attribute_value(a))) for a in node.attribute)
        nodes.append(hash((node.op_type, *attributes, *(known[i] for i in node.input))))
        known.update((name, hash((nodes[-1], i))) for i, name in enumerate(node.output))
    return Counter(nodes)


@pytest.mark.parametrize(
    ("fixture", "changes"),
    [
        ("llama_op18", {"opset": 18}),
        ("llama_op23", {}),
        ("llama_fp16", {"dtype": "float16"}),
        ("llama_bf16", {"dtype": "bfloat16"}),
        ("bert_op18", {"opset": 18}),
        ("bert_op23", {}),
        ("gpt2_op18", {"opset": 18, "eager": True}),
        ("gpt2_op23", {}),
        ("flux_op18", {"opset": 18}),
        ("flux_op23", {}),
        ("flux_fp16", {"dtype": "float16"}),
        ("wan_op18", {"opset": 18}),
        ("wan_op23", {}),
    ],
)
def test_builds_the_graph_that_the_exporter_writes(fixture: str, changes: dict[str, Any]) -> None:
    path = FIXTURES / f"{fixture}.onnx"
    exported = onnx.load(path)
    built = tiny(fixture.split("_")[0], **changes)
    assert structure(built) == structure(exported)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("model", TINY)
def test_tiny_models_are_valid_and_give_finite_outputs(model: str, opset: int) -> None:
    built = tiny(model, opset=opset)
    onnx.checker.check_model(built, full_check=True)
    for output in run(built):
        assert np.isfinite(output).all()
        assert output.std() > 0.05


@pytest.mark.parametrize("model", TINY)
def test_opsets_agree(model: str) -> None:
    new, old = tiny(model, opset=23), tiny(model, opset=18)
    for a, b in zip(run(new), run(old, inputs(new)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("model", LANGUAGE)
def test_fixed_dims_compute_the_same_as_open_ones(model: str, opset: int) -> None:
    fixed = tiny(model, opset=opset, **TOKENS)
    assert "Shape" not in {n.op_type for n in fixed.graph.node}
    onnx.checker.check_model(fixed, full_check=True)
    for a, b in zip(run(fixed), run(tiny(model, opset=opset)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 23])
def test_llama_without_a_mask_is_causal(opset: int) -> None:
    masked = tiny("llama", opset=opset)
    feeds = inputs(masked)
    feeds["attention_mask"][:] = 1
    plain = tiny("llama", opset=opset, attention_mask=False)
    np.testing.assert_allclose(run(plain, feeds)[0], run(masked, feeds)[0], rtol=1e-4, atol=1e-5)


def test_gpt2_eager_attention_agrees_with_the_operator() -> None:
    operator, eager = tiny("gpt2"), tiny("gpt2", eager=True)
    np.testing.assert_allclose(run(operator)[0], run(eager)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["llama", "flux", "wan"])
def test_half_precision_stays_near_single(model: str) -> None:
    single, half = tiny(model), tiny(model, dtype="float16")
    onnx.checker.check_model(half, full_check=True)
    feeds = inputs(single)
    types = {v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in half.graph.input}
    low = run(half, {name: array.astype(types[name]) for name, array in feeds.items()})[0].astype(np.float32)
    high = run(single, feeds)[0]
    assert np.abs(low - high).max() < 0.1 * np.abs(high).max()


@pytest.mark.parametrize("model", TINY)
def test_two_builds_give_equal_bytes(model: str) -> None:
    first, second, other = (tiny(model, weights=InlineWeights(seed)).SerializeToString() for seed in (1, 1, 2))
    assert first == second != other


def test_weights_are_neither_zeros_nor_ones() -> None:
    for model in TINY:
        for tensor in tiny(model).graph.initializer:
            if "." in tensor.name:
                assert numpy_helper.to_array(tensor).std() > 0.05, tensor.name


@pytest.mark.parametrize(
    ("name", "billions", "nodes"),
    [("llama-70b", 70.6, 3458), ("flux", 11.9, 4963), ("wan-14b", 14.3, 4031)],
)
def test_full_structures_take_no_disk(tmp_path: Path, name: str, billions: float, nodes: int) -> None:
    path = save(name, tmp_path / "model.onnx", weights="none")
    data = (tmp_path / "model.onnx.data").stat()
    if sys.platform == "linux":
        assert data.st_blocks * 512 < 64 * 1024
    assert data.st_size / 2e9 == pytest.approx(billions, rel=0.01)
    assert path.stat().st_size < 2e6
    assert len(onnx.load(path, load_external_data=False).graph.node) == nodes


def test_eight_gib_is_eight_gib(tmp_path: Path) -> None:
    save("eight-gib", tmp_path / "model.onnx", weights="none")
    assert (tmp_path / "model.onnx.data").stat().st_size == pytest.approx(8 * 2**30, rel=1e-3)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("name", CATALOGUE)
def test_two_blocks_of_real_width_are_valid(tmp_path: Path, name: str, opset: int) -> None:
    path = save(name, tmp_path / "model.onnx", layers=2, weights="none", opset=opset)
    onnx.checker.check_model(path)
    onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)


def test_the_demo_runs() -> None:
    assert np.isfinite(run(build("demo"))[0]).all()


def test_streamed_weights(tmp_path: Path) -> None:
    """A layer wide enough that its matrices repeat a block, while its norms have numbers of their own."""
    settings: dict[str, Any] = {
        "layers": 1, "hidden": 512, "heads": 8, "kv_heads": 4, "intermediate": 768, "vocab": 256, "seq": 8,
        "weights": "streamed",
    }  # fmt: skip
    path, again = tmp_path / "m.onnx", tmp_path / "again.onnx"
    for where in (path, again):
        save("llama-8b", where, **settings)
    assert (tmp_path / "m.onnx.data").read_bytes() == (tmp_path / "again.onnx.data").read_bytes()
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    gate, up = (tensors[f"model.layers.0.mlp.{n}_proj.weight"].astype(np.float32) for n in ("gate", "up"))
    assert gate.std() == pytest.approx(1.6 / 512**0.5, rel=0.02)
    assert not np.array_equal(gate, up)
    assert tensors["model.norm.weight"].astype(np.float32).mean() == pytest.approx(1.0, abs=0.1)
