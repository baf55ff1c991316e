"""The laws are judged by what they catch: each broken layer fails the laws it should, and no law is idle."""

import broken_layers
import laws
import pytest

import layers

CASES = [
    pytest.param(broken, name, id=f"{broken.__name__}-{name}", marks=pytest.mark.xdist_group(broken.__name__))
    for broken, names in broken_layers.BROKEN.items()
    for name in names
]


@pytest.mark.xdist_group("Healthy")
@pytest.mark.parametrize("name", laws.LAWS)
def test_healthy_layer_keeps(name: str) -> None:
    laws.LAWS[name](broken_layers.Healthy())


@pytest.mark.parametrize(("broken", "name"), CASES)
def test_broken_layer_fails(broken: type[broken_layers.Healthy], name: str) -> None:
    with pytest.raises(AssertionError):
        laws.LAWS[name](broken())


def test_no_law_is_idle() -> None:
    caught = {name for names in broken_layers.BROKEN.values() for name in names}
    assert caught == set(laws.LAWS)


def test_broken_layers_are_never_discovered() -> None:
    assert not {cls.__name__ for cls in layers.discover()} & {cls.__name__ for cls in broken_layers.BROKEN}
