"""What graphs of models outside the fixtures taught: small graphs with what once went wrong in them."""

from __future__ import annotations

import numpy as np
import pytest
from recognition import Arrays, check, normal, parsed, reference

from onnxmesh.compiler.api import Compilation, compile_model
from onnxmesh.compiler.options import CpStrategy, Options
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.session import Session


def agreed(
    body: str,
    inputs: Arrays,
    constants: Arrays,
    *,
    opset: int = 18,
    cp_strategy: CpStrategy = "auto",
    **ranks: int,
) -> Compilation:
    """The compilation of a graph whose plan gives what ONNX Runtime gives."""
    proto = parsed(body, inputs, constants, opset=opset)
    compiled = compile_model(proto, Options(Mesh.of(**ranks), cp_strategy=cp_strategy))
    assert compiled.plan is not None
    with Session(compiled.plan, timeout=30) as session:
        (found,) = session.run(None, dict(inputs))
    wanted = reference(proto, inputs)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))
    return compiled


def axis(compiled: Compilation) -> dict[str, float]:
    """What the report says of the only axis."""
    assert compiled.plan is not None
    (found,) = compiled.plan.report["axes"]
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_fused_modulation_is_cut_in_all_its_pieces(ranks: int) -> None:
    body = """
        m = MatMul (c, w)
        shift, scale, gate = Split <axis = 2, num_outputs = 3> (m)
        scaled = Mul (x, scale)
        shifted = Add (scaled, shift)
        up = MatMul (shifted, w_up)
        act = Relu (up)
        down = MatMul (act, w_down)
        gated = Mul (gate, down)
        y = Add (x, gated)
    """
    constants = {"w": normal(16, 96), "w_up": normal(32, 64), "w_down": normal(64, 32)}
    compiled = agreed(body, {"x": normal(2, 8, 32), "c": normal(2, 1, 16)}, constants, tp=ranks)
    assert axis(compiled)["linear_weight_bytes_per_rank"] == pytest.approx(1 / ranks)


def test_rows_picked_by_gather_nd_are_those_of_a_table() -> None:
    """Experts' weights, one matrix a token: cut on their own dims, as every weight is."""
    body = """
        up_rows = GatherND (up, chosen)
        down_rows = GatherND (down, chosen)
        h = MatMul (up_rows, x)
        act = Relu (h)
        y = MatMul (down_rows, act)
    """
    constants = {"up": normal(4, 64, 32), "down": normal(4, 32, 64)}
    chosen = np.arange(6)[:, None] % 4
    compiled = agreed(body, {"x": normal(6, 32, 1), "chosen": chosen}, constants, tp=2)
    assert axis(compiled)["flops_per_rank"] == pytest.approx(0.5)
    assert axis(compiled)["weight_bytes_sharded"] == 1
    assert axis(compiled)["collectives"] == 1


@pytest.mark.parametrize("first", [0, 2, 5])
def test_an_overwritten_range_is_a_concat(first: int) -> None:
    body = """
        x_t = Transpose <perm = [1, 0, 2]> (x)
        written = ScatterND (x_t, rows, part)
        back = Transpose <perm = [1, 0, 2]> (written)
        y = Relu (back)
    """
    rows = np.arange(first, first + 3)[:, None]
    inputs = {"x": normal(2, 8, 4), "part": normal(3, 2, 4)}
    assert "ScatterND" not in check(body, inputs, {"rows": rows}).ops


def test_an_overwritten_box_is_a_concat_along_its_one_short_dim() -> None:
    body = "y = ScatterND (x, at, part)"
    at = np.stack(np.meshgrid(np.arange(2), np.arange(3, 7), np.arange(4), indexing="ij"), axis=-1)
    inputs = {"x": normal(2, 8, 4), "part": normal(2, 4, 4)}
    assert check(body, inputs, {"at": at}).ops["Concat"] == 1
    shuffled = np.ascontiguousarray(at[:, ::-1])
    assert check(body, inputs, {"at": shuffled}).ops["ScatterND"] == 1
