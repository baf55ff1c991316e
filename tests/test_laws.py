"""Every law over every example of every layer that exists. Nothing is listed and nobody opts out."""

import dataclasses

import laws
import pytest

import layers
from layers.layer import LayerConfig


def name(config: LayerConfig) -> str:
    """The class, and the fields in which the example differs from the class's defaults."""
    fields = dataclasses.fields(config)
    changed = [f"{f.name}={getattr(config, f.name)}" for f in fields if getattr(config, f.name) != f.default]
    return f"{type(config).__name__}({','.join(changed)})"


EXAMPLES = [
    # One worker judges all laws of one example: the compiled functions are shared.
    pytest.param(config, id=name(config), marks=pytest.mark.xdist_group(name(config)))
    for cls in layers.discover()
    for config in cls.examples()
]


@pytest.mark.parametrize("judge", laws.LAWS.values(), ids=laws.LAWS.keys())
@pytest.mark.parametrize("config", EXAMPLES)
def test_law(config: LayerConfig, judge: laws.Law) -> None:
    judge(config)


def test_every_layer_has_an_example() -> None:
    classes = layers.discover()
    assert classes
    for cls in classes:
        examples = cls.examples()
        assert examples and all(type(example) is cls for example in examples), f"{cls.__name__} has no example"
        assert len(set(examples)) == len(examples), f"{cls.__name__} repeats an example"
