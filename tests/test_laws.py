"""Every law over every example of every layer that exists. Nothing is listed and nobody opts out.

`make test` judges every example by the laws that share what is compiled for it anyway, and one example of each layer's
code by all laws; `make test-slow` has the rest: other examples, layers made of layers, 4,096 tokens.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import laws
import pytest
from reading import fields

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
    changed = [
        (f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default
    ]
    said = [f"{field}={name(value) if isinstance(value, LayerConfig) else value}" for field, value in changed]
    return f"{type(config).__name__}({','.join(said)})"


def judged(config: LayerConfig, law: str, first: bool) -> Any:
    # One worker judges all laws of one example: the compiled functions are shared.
    marks = [pytest.mark.xdist_group(name(config))]
    if law in COSTLY and not first:
        marks.append(pytest.mark.slow)
    return pytest.param(config, law, id=f"{name(config)}-{law}", marks=marks)


def examples() -> Iterator[tuple[LayerConfig, bool]]:
    """Each, and whether it is the first of code that no other config has: neither by inheriting it nor inside."""
    known = set()
    for cls in sorted(layers.discover(), key=lambda cls: len(cls.__mro__)):
        for config in cls.examples():
            made_of_layers = any(isinstance(value, LayerConfig) for _, value in fields(config))
            yield config, cls.build not in known and not made_of_layers
            known.add(cls.build)


EXAMPLES = list(examples())


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
