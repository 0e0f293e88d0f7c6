"""The mesh: coordinates, ranks and groups."""

from __future__ import annotations

import json

import pytest

from onnxmesh.runtime.mesh import Mesh

MESH = Mesh.of(dp=2, cp=3, tp=4)


def test_tp_is_innermost() -> None:
    assert [MESH.coordinate(rank)["tp"] for rank in range(5)] == [0, 1, 2, 3, 0]
    assert MESH.coordinate(4) == {"dp": 0, "cp": 1, "tp": 0}
    assert MESH.coordinate(12) == {"dp": 1, "cp": 0, "tp": 0}


def test_rank_and_coordinate_are_inverse() -> None:
    assert [MESH.rank(MESH.coordinate(rank)) for rank in range(MESH.size)] == list(range(24))


def test_axes_left_out_of_a_coordinate_are_zero() -> None:
    assert MESH.rank({"cp": 2}) == 8


def test_sizes() -> None:
    assert (MESH.size, MESH.axis_size("dp"), MESH.axis_size("cp"), MESH.axis_size("tp")) == (24, 2, 3, 4)


def test_the_order_and_completeness_of_the_axes_do_not_matter() -> None:
    assert Mesh((("tp", 4), ("cp", 2))) == Mesh((("dp", 1), ("cp", 2), ("tp", 4))) == Mesh.of(tp=4, cp=2)
    assert Mesh(()) == Mesh.of()


@pytest.mark.parametrize(
    ("rank", "axes", "group"),
    [
        (5, "tp", (4, 5, 6, 7)),
        (5, "cp", (1, 5, 9)),
        (5, "dp", (5, 17)),
        (5, ("dp", "cp"), (1, 5, 9, 13, 17, 21)),
        (5, ("cp", "dp"), (1, 5, 9, 13, 17, 21)),
        (5, ("dp", "cp", "tp"), tuple(range(24))),
        (5, (), (5,)),
    ],
)
def test_a_group_differs_only_along_its_axes(rank: int, axes: str | tuple[str, ...], group: tuple[int, ...]) -> None:
    assert MESH.group(rank, axes) == group


@pytest.mark.parametrize("axes", ["dp", "cp", "tp", ("cp", "tp"), ("dp", "tp"), ()])
def test_groups_hold_each_rank_once(axes: str | tuple[str, ...]) -> None:
    groups = MESH.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(24))
    assert all(MESH.group(rank, axes) == group for group in groups for rank in group)


def test_the_position_in_a_group_is_the_coordinate() -> None:
    for rank in range(MESH.size):
        assert MESH.group(rank, "cp").index(rank) == MESH.coordinate(rank)["cp"]


def test_json_round_trip() -> None:
    text = json.dumps(MESH.to_json())
    assert text == '{"dp": 2, "cp": 3, "tp": 4}'
    assert Mesh.from_json(json.loads(text)) == MESH


def test_it_prints_its_sizes() -> None:
    assert str(MESH) == "dp=2,cp=3,tp=4"


@pytest.mark.parametrize("size", [0, -1, 65, 2.0, True, "2"])
def test_a_size_is_a_whole_number_from_1_to_64(size: object) -> None:
    with pytest.raises(ValueError, match="mesh axis tp must be a whole number from 1 to 64"):
        Mesh.of(tp=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [[["tp", 2]], 4, None, {"tp": "2"}, {"pp": 2}, {1: 2}])
def test_json_that_is_no_mesh_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="mesh"):
        Mesh.from_json(value)


def test_what_is_not_in_the_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks 0 to 23, got 24"):
        MESH.coordinate(24)
    with pytest.raises(ValueError, match="no index 3 along cp"):
        MESH.rank({"cp": 3})
    with pytest.raises(ValueError, match="unknown mesh axis 'pp'"):
        MESH.group(0, "pp")
    with pytest.raises(ValueError, match="unknown mesh axis 'pp'"):
        MESH.axis_size("pp")
    with pytest.raises(ValueError, match="each axis once"):
        Mesh((("tp", 2), ("tp", 2)))
