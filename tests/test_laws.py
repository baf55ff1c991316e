"""Every law over every example of every layer that exists. Nothing is listed and nobody opts out.

`make test` judges one example of each layer's code; of layers that are made of layers it asks whether any cut of time
gives the same, which says that they are causal too, and whether the state keeps its shape. `make test-slow` has the
rest: other examples, all laws of layers made of layers, 4,096 tokens.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import laws
import pytest
from flax import nnx
from reading import D, fields

import layers
from layers.layer import LayerConfig

OF_COMPOSITES = {"any_cut_of_time", "state_keeps_its_shape"}


def name(config: LayerConfig) -> str:
    """The class, and the fields in which the example differs from the class's defaults."""
    changed = [
        (f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default
    ]
    said = [f"{field}={name(value) if isinstance(value, LayerConfig) else value}" for field, value in changed]
    return f"{type(config).__name__}({','.join(said)})"


def examples() -> Iterator[Any]:
    """Each example with each law; slow but for the first of code that no other has, which may be inherited."""
    known = set()
    for cls in sorted(layers.discover(), key=lambda cls: len(cls.__mro__)):
        for config in cls.examples():
            first = cls.build not in known
            known.add(cls.build)
            made_of_layers = any(isinstance(value, LayerConfig) for _, value in fields(config))
            for law in laws.LAWS:
                now = first and (law in OF_COMPOSITES or not made_of_layers)
                # One worker judges all laws of one example: the compiled functions are shared.
                marks = [pytest.mark.xdist_group(name(config)), *([] if now else [pytest.mark.slow])]
                yield pytest.param(config, law, id=f"{name(config)}-{law}", marks=marks)


@pytest.mark.parametrize(("config", "law"), list(examples()))
def test_law(config: LayerConfig, law: str) -> None:
    laws.LAWS[law](config)


@pytest.mark.slow
@pytest.mark.parametrize("config", [config for cls in layers.discover() for config in cls.examples()], ids=name)
def test_gradients_of_4096_tokens(config: LayerConfig) -> None:
    laws.finite_gradients(config, laws.LONG)


def test_every_layer_has_an_example() -> None:
    classes = layers.discover()
    assert classes
    for cls in classes:
        examples = cls.examples()
        assert examples and all(type(example) is cls for example in examples), f"{cls.__name__} has no example"
        assert len(set(examples)) == len(examples), f"{cls.__name__} repeats an example"
        for example in examples:
            jax.eval_shape(lambda example=example: example.build(D, rngs=nnx.Rngs(params=0)))
