"""Every law over every example of every layer that exists. Nothing is listed and nobody opts out.

`make test` judges the first example of each layer by all laws, and its other examples by those that share what is
compiled for them anyway; `make test-slow` has the rest, and 4,096 tokens.
"""

import dataclasses
from typing import Any

import laws
import pytest

import layers
from layers.layer import LayerConfig

# Each compiles programs of its own, which no other law needs.
COSTLY = {
    "finite_gradients",
    "bfloat16_stays_close",
    "implementations_agree",
    "transforms_change_nothing",
    "a_mesh_changes_nothing",
}


def name(config: LayerConfig) -> str:
    """The class, and the fields in which the example differs from the class's defaults."""
    fields = dataclasses.fields(config)
    changed = [(f.name, getattr(config, f.name)) for f in fields if getattr(config, f.name) != f.default]
    said = [f"{field}={name(value) if isinstance(value, LayerConfig) else value}" for field, value in changed]
    return f"{type(config).__name__}({','.join(said)})"


def judged(config: LayerConfig, law: str, first: bool) -> Any:
    # One worker judges all laws of one example: the compiled functions are shared.
    marks = [pytest.mark.xdist_group(name(config))]
    if law in COSTLY and not first:
        marks.append(pytest.mark.slow)
    return pytest.param(config, law, id=f"{name(config)}-{law}", marks=marks)


EXAMPLES = [(config, i == 0) for cls in layers.discover() for i, config in enumerate(cls.examples())]


@pytest.mark.parametrize(
    ("config", "law"), [judged(config, law, first) for config, first in EXAMPLES for law in laws.LAWS]
)
def test_law(config: LayerConfig, law: str) -> None:
    laws.LAWS[law](config)


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(config, id=name(config)) for config, _ in EXAMPLES])
def test_gradients_of_4096_tokens(config: LayerConfig) -> None:
    laws.finite_gradients(config, laws.LONG)


def test_every_layer_has_an_example() -> None:
    classes = layers.discover()
    assert classes
    for cls in classes:
        examples = cls.examples()
        assert examples and all(type(example) is cls for example in examples), f"{cls.__name__} has no example"
        assert len(set(examples)) == len(examples), f"{cls.__name__} repeats an example"
