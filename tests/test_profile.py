"""Device profiles: times grow with the work, fits find the constants again, files are checked."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import Any

import inputs
import numpy as np
import pytest

import onnxmesh
import onnxmesh.compiler.ops.table
from onnxmesh.compiler import cost
from onnxmesh.compiler.ir.rule import OpView
from onnxmesh.runtime import profile_fit
from onnxmesh.runtime.cuda.measure import ATTENTIONS, GEMMS
from onnxmesh.runtime.errors import InvalidArgument
from onnxmesh.runtime.profile import COLLECTIVES, Attention, Curve, DeviceProfile, Gemm, load

H200 = DeviceProfile(
    name="H200",
    processors=132,
    gemm={"bfloat16": Gemm(795e6, 3.4e6, 2.5), "float32": Gemm(48e6, 3.4e6, 2.5)},
    attention={"bfloat16": Attention(690e6, 640e6, 2.5e6, 4.0)},
    memory=Curve.through({48e3: 2.0, 6e6: 3.0, 600e6: 150.0}),
    links={kind: {4: Curve.through({16e3: 7.0, 1e6: 12.0, 64e6: 230.0})} for kind in COLLECTIVES},
)
"""Numbers like those of one H200 host."""


def view(op: str, ins: list[tuple[int, ...] | None], outs: list[tuple[int, ...]], dtype: str = "bfloat16") -> OpView:
    return OpView(
        op, tuple(ins), tuple(outs), (dtype,) * len(ins), (dtype,) * len(outs), (False,) * len(ins), (), 1
    )  # fmt: skip


# --- curves ---------------------------------------------------------------------------------------------------


def test_a_curve_is_level_before_its_first_point_and_goes_straight_on_after_its_last() -> None:
    curve = Curve.through({10: 5.0, 20: 7.0, 40: 15.0})
    assert [curve(x) for x in (0, 10, 15, 20, 30, 40)] == [5, 5, 6, 7, 11, 15]
    assert curve(80) > curve(40)
    assert Curve.line(3.0, 2.0)(10) == pytest.approx(8.0)


def test_a_curve_never_falls_whatever_the_noise() -> None:
    curve = Curve.through({10: 5.0, 20: 4.0, 40: 9.0})
    assert [time for _, time in curve.points] == [5, 5, 9]


def test_one_point_is_enough() -> None:
    assert Curve.through({10: 5.0})(5) == Curve.through({10: 5.0})(500) == 5


# --- kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [cost.GENERIC, H200], ids=lambda device: device.name)
def test_a_larger_product_never_takes_less_time(device: DeviceProfile) -> None:
    for dim in range(3):
        times = []
        for power in range(14):
            m, n, k = (2**power if i == dim else 1024 for i in range(3))
            times.append(cost.execution(view("MatMul", [(m, k), (k, n)], [(m, n)]), device))
        assert times == sorted(times)


def test_a_product_is_near_what_such_a_gpu_was_seen_to_take() -> None:
    seen = {(8192, 8192, 8192): 794, (4608, 12288, 3072): 745, (576, 12288, 3072): 635, (576, 3072, 12288): 687}
    for (m, n, k), rate in seen.items():
        time = cost.execution(view("MatMul", [(m, k), (k, n)], [(m, n)]), H200)
        assert 2 * m * n * k / time / 1e6 == pytest.approx(rate, rel=0.12)


def test_one_row_takes_as_long_as_its_weights_take_to_read() -> None:
    time = cost.execution(view("MatMul", [(1, 8192), (8192, 8192)], [(1, 8192)]), H200)
    assert time == pytest.approx(2.5 + 2 * 8192 * 8192 / 3.4e6, rel=0.01)


def test_rows_of_a_batch_that_share_a_matrix_are_one_product() -> None:
    together = view("MatMul", [(1, 4, 128, 256), (256, 512)], [(1, 4, 128, 512)])
    assert cost.execution(together, H200) == cost.execution(
        view("MatMul", [(512, 256), (256, 512)], [(512, 512)]), H200
    )


@pytest.mark.parametrize(("heads", "s", "t", "seen"), [(24, 4608, 4608, 415), (24, 2112, 16896, 820)])
def test_attention_is_near_what_such_a_gpu_was_seen_to_take(heads: int, s: int, t: int, seen: float) -> None:
    ins: list[tuple[int, ...] | None] = [(1, heads, s, 128), (1, heads, t, 128), (1, heads, t, 128)]
    assert cost.execution(view("Attention", ins, [(1, heads, s, 128)]), H200) == pytest.approx(seen, rel=0.1)


def test_causal_attention_takes_about_half() -> None:
    ins: list[tuple[int, ...] | None] = [(1, 32, 8192, 128), (1, 8, 8192, 128), (1, 8, 8192, 128)]
    full = cost.execution(view("Attention", ins, [(1, 32, 8192, 128)]), H200)
    causal = cost.execution(view("Attention", [*ins, None, (8192,), (8192,)], [(1, 32, 8192, 128)]), H200)
    assert 0.45 < causal / full < 0.65


def test_everything_else_is_bytes_on_the_curve_of_memory() -> None:
    time = cost.execution(view("Add", [(1000, 1000), (1000, 1000)], [(1000, 1000)]), H200)
    assert time == H200.memory(6e6)


def test_renaming_bytes_takes_no_time() -> None:
    assert cost.execution(view("Reshape", [(4, 4)], [(16,)]), H200) == 0


# --- collectives ----------------------------------------------------------------------------------------------


def test_ranks_that_were_not_measured_are_those_nearest() -> None:
    links = {kind: {2: Curve.line(1, 1), 8: Curve.line(2, 1)} for kind in COLLECTIVES}
    device = DeviceProfile("x", 1, H200.gemm, H200.attention, H200.memory, links)
    assert [device.link("Shift", ranks).alpha for ranks in (2, 3, 5, 6, 8, 16)] == [1, 1, 2, 2, 2, 2]


def test_bytes_sent() -> None:
    assert cost.sent("AllReduce", 800, 800, 4) == 1200
    assert cost.sent("AllGather", 200, 800, 4) == 600
    assert cost.sent("ReduceScatter", 800, 200, 4) == 600
    assert cost.sent("AllToAll", 800, 800, 4) == 600
    assert cost.sent("Shift", 800, 800, 4) == 800


# --- fits -----------------------------------------------------------------------------------------------------


def noise(rng: np.random.Generator) -> float:
    return exp(0.03 * rng.standard_normal())


def gemm_rows(truth: Gemm, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = [{"dtype": "bfloat16", "m": m, "n": n, "k": k} for m, n, k in GEMMS["bfloat16"]]
    return [
        {**r, "us": truth(1, r["m"], r["n"], r["k"], profile_fit.gemm_bytes(r), 132) * noise(rng)} for r in rows
    ]  # fmt: skip


def attention_rows(truth: Attention, rng: np.random.Generator) -> list[dict[str, Any]]:
    names = ("heads", "kv_heads", "s", "t", "d", "causal")
    rows = [{"dtype": "bfloat16", **dict(zip(names, shape))} for shape in ATTENTIONS["bfloat16"]]
    return [
        {
            **r,
            "us": noise(rng)
            * truth(
                r["heads"], r["s"], r["t"], 2 * r["d"], causal=r["causal"],
                nbytes=profile_fit.attention_bytes(r), processors=132,
            ),
        }
        for r in rows
    ]  # fmt: skip


def test_a_fit_finds_the_constants_of_products_again() -> None:
    truth, rng = Gemm(800e6, 3.3e6, 2.4), np.random.default_rng(0)
    found = profile_fit.fit_gemm(gemm_rows(truth, rng), 132)
    assert vars(found) == pytest.approx(vars(truth), rel=0.08)


def test_a_fit_finds_the_constants_of_attention_again() -> None:
    truth, rng = Attention(680e6, 610e6, 2.4e6, 4.0), np.random.default_rng(0)
    found = profile_fit.fit_attention(attention_rows(truth, rng), 132)
    assert vars(found) == pytest.approx(vars(truth), rel=0.15)


def test_one_bad_row_does_not_spoil_a_fit() -> None:
    truth, rng = Gemm(800e6, 3.3e6, 2.4), np.random.default_rng(0)
    rows = gemm_rows(truth, rng)
    rows[4]["us"] *= 3
    assert profile_fit.fit_gemm(rows, 132).rate == pytest.approx(truth.rate, rel=0.1)


def test_a_profile_is_made_of_measured_rows() -> None:
    rng = np.random.default_rng(0)
    rows = {
        "gemm": gemm_rows(H200.gemm["bfloat16"], rng),
        "attention": attention_rows(H200.attention["bfloat16"], rng),
        "memory": [{"bytes": 6e3, "us": 2.0}, {"bytes": 6e8, "us": 150.0}],
        "collectives": [
            {"kind": kind, "ranks": ranks, "sent": sent, "us": 8 + sent / 0.3e6}
            for kind in COLLECTIVES
            for ranks in (2, 4)
            for sent in (1e4, 1e6, 1e8)
        ],
        "contention": 1.1,
    }
    found = profile_fit.fit("H200", 132, rows, {"date": "2026-01-01"})
    assert found.link("AllToAll", 4)(3e6) == pytest.approx(18, rel=0.01)
    assert found.launch == 2.0
    assert found.contention == 1.1
    alone = profile_fit.fit("H200", 132, {**rows, "collectives": [], "contention": 1.0}, {})
    assert alone.link("AllReduce", 8)(1e6) > 0


# --- files ----------------------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(H200.to_json()))
    assert load(path) == H200


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"gemm": {}},
        {"gemm": {"bfloat16": {"rate": -1, "bandwidth": 1, "overhead": 1}}},
        {"memory": [[2, 5], [1, 6]]},
        {"memory": [[1, 5], [2, 4]]},
        {"links": {}},
        {"contention": None},
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**H200.to_json(), **change}))
    with pytest.raises(InvalidArgument, match="not a device profile"):
        load(path)


def test_the_default_profile_loads() -> None:
    found = cost.default()
    assert found.processors > 0
    assert {"bfloat16", "float32"} <= set(found.gemm)
    assert all(found.link(kind, ranks)(1e6) > 0 for kind in COLLECTIVES for ranks in (2, 4, 8))


def test_a_compile_predicts_for_the_profile_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fixture = tmp_path / "h200.json", inputs.load("llama_op23")
    path.write_text(json.dumps({**H200.to_json(), "name": "mine"}))
    given = onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings(), profile=path)
    assert given.report["time"]["device"] == "mine"
    usual = onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings())
    assert usual.report["time"]["device"] == cost.default().name
    monkeypatch.setenv(cost.VARIABLE, str(path))
    assert onnxmesh.compile(fixture.path, tp=2, dims=fixture.bindings()) == given
    with pytest.raises(InvalidArgument, match="nowhere"):
        onnxmesh.compile(fixture.path, dims=fixture.bindings(), profile="nowhere.json")
