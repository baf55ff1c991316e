"""The laws are judged by what they catch: each broken layer fails the laws it should, and no law is idle."""

import broken_layers
import laws
import pytest

import layers

CASES = [
    pytest.param(
        broken, name, id=f"{type(broken).__name__}-{name}", marks=pytest.mark.xdist_group(type(broken).__name__)
    )
    for broken, names in broken_layers.BROKEN.items()
    for name in names
]


@pytest.mark.xdist_group("Healthy")
@pytest.mark.parametrize("name", laws.LAWS)
def test_healthy_layer_keeps(name: str) -> None:
    laws.LAWS[name](broken_layers.Healthy())


@pytest.mark.parametrize(("broken", "name"), CASES)
def test_broken_layer_fails(broken: broken_layers.Healthy, name: str) -> None:
    with pytest.raises(AssertionError):
        laws.LAWS[name](broken)


def test_no_law_is_idle() -> None:
    caught = {name for names in broken_layers.BROKEN.values() for name in names}
    assert caught == set(laws.LAWS)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", [{0, 1}, {2, 3}]),
        ("replica_groups=[2,2]<=[4], to_apply=%add", [{0, 1}, {2, 3}]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", [{0, 2}, {1, 3}]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2] {'axis_0'}, to_apply=%add", [{0, 2}, {1, 3}]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2] {'axis_2'}, to_apply=%add", [{0, 1}, {2, 3}]),
        ("source_target_pairs={{0,2},{2,0}}, to_apply=%add", []),
    ],
)
def test_groups_of_devices_are_read_from_a_program(written: str, groups: list[set[int]]) -> None:
    assert laws.groups_of(written) == groups


def test_broken_layers_are_never_discovered() -> None:
    assert not {cls.__name__ for cls in layers.discover()} & {type(broken).__name__ for broken in broken_layers.BROKEN}
