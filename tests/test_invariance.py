"""What is decided depends on the computation alone: not on names, metadata, the order of nodes, or the process."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import shares
from shares import TOLERANCE, Case, fixtures

from onnxmesh.compiler.api import Compilation, compile_model
from onnxmesh.compiler.options import Options
from onnxmesh.runtime.placement import text
from onnxmesh.runtime.session import Session

DISGUISED = [
    pytest.param(name, case, id=f"{name}-{case.name.replace(' ', '-')}")
    for name, case in [
        ("llama_op18", Case(tp=4)),
        ("llama_op23", Case(tp=2, cp=2)),
        ("llama_kv_op23", Case(tp=2)),
        ("bert_ts17", Case(tp=2, cp=2)),
        ("bert_op18", Case(cp=2, strategy="ulysses")),
        ("gpt2_op23", Case(tp=4)),
        ("t5_op18", Case(tp=2, cp=2)),
        ("vit_op23", Case(cp=4, strategy="ring")),
        ("wan_op18", Case(tp=2, cp=2)),
        ("flux_op23", Case(cp=4, strategy="allgather")),
        ("flux_op18", Case(tp=4)),
    ]
]


@pytest.mark.parametrize(("name", "case"), DISGUISED)
@pytest.mark.parametrize("seed", [1, 2])
def test_names_metadata_and_order_change_nothing(name: str, case: Case, seed: int) -> None:
    fixture = fixtures.load(name)
    model = onnx.load(fixture.path)
    strange = disguised(model, random.Random(seed))
    plain = shares.compile_fixture(name, case)
    other = compile_model(strange, Options(case.mesh, shapes_of(model, strange, name), cp_strategy=case.strategy))
    assert decisions(other) == decisions(plain)
    assert shares.counts(shares.plan_of(other)) == shares.counts(shares.plan_of(plain))
    assert error_of(other, name) <= TOLERANCE[fixture.dtype]


def shapes_of(model: onnx.ModelProto, strange: onnx.ModelProto, name: str) -> dict[str, tuple[int, ...]]:
    """The sizes of the inputs by their new names."""
    sizes = fixtures.load(name).shapes()
    return {new.name: sizes[old.name] for old, new in zip(model.graph.input, strange.graph.input)}


def decisions(state: Compilation) -> list[Counter[tuple[object, ...]]]:
    """Of every axis: how many nodes of an op and a shape have which placements."""
    return [
        Counter(
            (view.op, view.ins, view.outs, *(text(p, placed.ranks) for p in strategy.ins + strategy.outs))
            for view, strategy in ((placed.views[node], strategy) for node, strategy in placed.strategies.items())
        )
        for placed in state.placed
    ]


def error_of(state: Compilation, name: str) -> float:
    """The largest relative error, with inputs and outputs by position."""
    plan = shares.plan_of(state)
    feeds, expected = fixtures.load(name).make_inputs(), list(shares.reference(name).values())
    with Session(plan) as session:
        ours = session.run(None, dict(zip([port.name for port in session.get_inputs()], feeds.values())))
    return max(shares.relative_error(a, b) for a, b in zip(ours, expected, strict=True))


# --- disguises ----------------------------------------------------------------------------------------------


def disguised(model: onnx.ModelProto, rng: random.Random) -> onnx.ModelProto:
    """The same computation under other names, without metadata, in another order."""
    strange = onnx.ModelProto()
    strange.CopyFrom(model)
    strip(strange)
    rename(strange.graph, rng)
    nodes = shuffled(list(strange.graph.node), rng)
    del strange.graph.node[:]
    strange.graph.node.extend(nodes)
    initialisers = list(strange.graph.initializer)
    rng.shuffle(initialisers)
    del strange.graph.initializer[:]
    strange.graph.initializer.extend(initialisers)
    onnx.checker.check_model(strange)
    return strange


def strip(model: onnx.ModelProto) -> None:
    """Remove what says where a model comes from."""
    model.producer_name = model.producer_version = model.doc_string = model.domain = ""
    del model.metadata_props[:]
    graph = model.graph
    del graph.metadata_props[:], graph.value_info[:], graph.quantization_annotation[:]
    graph.doc_string = ""
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def rename(graph: onnx.GraphProto, rng: random.Random) -> None:
    """Random names for the graph, its dims, nodes, values and initialisers."""
    assert not any(a.HasField("g") for node in graph.node for a in node.attribute), "subgraphs are not renamed"
    values = {name: f"v{rng.getrandbits(48):x}" for name in names_of(graph)} | {"": ""}
    dims: dict[str, str] = {}
    for node in graph.node:
        node.name = f"n{rng.getrandbits(48):x}"
        node.input[:] = [values[name] for name in node.input]
        node.output[:] = [values[name] for name in node.output]
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.name = values[item.name]
    for port in (*graph.input, *graph.output):
        for dim in port.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dims.setdefault(dim.dim_param, f"d{rng.getrandbits(48):x}")
    graph.name = "g"


def names_of(graph: onnx.GraphProto) -> list[str]:
    found = [item.name for item in (*graph.input, *graph.initializer)]
    found += [name for node in graph.node for name in node.output if name]
    return list(dict.fromkeys(found))


def shuffled(nodes: list[onnx.NodeProto], rng: random.Random) -> list[onnx.NodeProto]:
    """The nodes in a random order in which every value is made before it is used."""
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    waiting = {i: {makers[name] for name in node.input if name in makers} for i, node in enumerate(nodes)}
    order: list[onnx.NodeProto] = []
    while waiting:
        ready = sorted(i for i, sources in waiting.items() if not sources)
        chosen = rng.choice(ready)
        order.append(nodes[chosen])
        del waiting[chosen]
        for sources in waiting.values():
            sources.discard(chosen)
    return order


def test_the_disguise_is_one() -> None:
    """Names and order really differ, and the reference's outputs do not."""
    model = onnx.load(fixtures.load("bert_op18").path)
    strange = disguised(model, random.Random(1))
    assert not set(names_of(model.graph)) & set(names_of(strange.graph))
    assert [n.op_type for n in model.graph.node] != [n.op_type for n in strange.graph.node]
    assert Counter(n.op_type for n in model.graph.node) == Counter(n.op_type for n in strange.graph.node)


# --- equal bytes --------------------------------------------------------------------------------------------

SAVED = {
    "llama_op18": Case(tp=2, cp=2),
    "flux_text_op23": Case(tp=4),
    "t5_op23": Case(tp=2, cp=2),
    "wan_op23": Case(cp=2, strategy="ulysses"),
}

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_invariance
test_invariance.save_all(Path(sys.argv[2]))
"""


def save_all(folder: Path) -> None:
    """Compile and save the plans of SAVED."""
    for name, case in SAVED.items():
        shares.plan_of(shares.compile_fixture(name, case)).save(folder / name)


def digests(folder: Path) -> dict[str, str]:
    """The hash of every file, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("plans")
    save_all(folder)
    return digests(folder)


@pytest.mark.parametrize("seed", ["0", "1", "20240229"])
def test_another_hash_seed_gives_equal_bytes(seed: str, tmp_path: Path, expected: dict[str, str]) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, timeout=240)
    assert digests(tmp_path) == expected
    assert sum(path.endswith("plan.json") for path in expected) == len(SAVED)


def test_two_compiles_give_equal_bytes(tmp_path: Path, expected: dict[str, str]) -> None:
    save_all(tmp_path)
    assert digests(tmp_path) == expected


def test_a_changed_weight_changes_the_bytes(tmp_path: Path, expected: dict[str, str]) -> None:
    """The digests see what they should."""
    name, case = next(iter(SAVED.items()))
    model = onnx.load(fixtures.load(name).path)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT)
    numbers = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(numbers * 2, numbers.dtype), tensor.name))
    options = Options(case.mesh, {}, fixtures.load(name).bindings(), case.strategy)
    shares.plan_of(compile_model(model, options)).save(tmp_path / name)
    ours = digests(tmp_path)
    changed = {path for path in ours if ours[path] != expected[path]}
    assert f"{name}/plan.json" in changed
    assert any("weights" in path for path in changed)
