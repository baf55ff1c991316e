"""Every config in configs/ loads, says what it is, and builds the model that it states."""

import dataclasses
import functools
import re
import runpy

import jax
import pods
import pytest
from flax import nnx

from models.parameters import flatten
from tpu import topology
from training import settings
from training.data import Text
from training.experiment import Experiment, Schedule
from training.summary import parameter_count
from training.tokenizer import open_tokenizer

FILES = settings.config_files()


@functools.cache
def config_of(name):
    return settings.load(FILES[name])


def test_there_are_configs():
    assert {"quickstart"} <= FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_config_says_what_it_is(name):
    config = config_of(name)
    assert isinstance(config, Experiment)
    assert settings.describe(FILES[name]) == config.description and config.description
    assert settings.locate(name) == FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_a_config_states_its_parameters(name):
    config = config_of(name)
    _, structure = flatten(jax.eval_shape(lambda: config.model.build(rngs=nnx.Rngs(0))))
    assert config.parameters == parameter_count(structure.specs)


SIZED = sorted(name for name, path in FILES.items() if "\nsizes = " in path.read_text())


@pytest.mark.parametrize("name", SIZED)
def test_sizes_state_their_parameters_too_and_a_pod_that_they_fit(name):
    """A name like 340M is near the count, of all or beside tables: papers count otherwise, and two in one have more."""
    found = re.findall(r"@([\d.]+[MB])", FILES[name].read_text().split("\n")[0])
    sizes = list(runpy.run_path(str(FILES[name]))["sizes"])
    assert {found[0], found[-1]} == {sizes[0], sizes[-1]}
    for size in sizes:
        config = settings.load(FILES[name], size)
        shapes = jax.eval_shape(lambda config=config: config.model.build(rngs=nnx.Rngs(0)))
        params, structure = flatten(shapes)
        specs = structure.specs
        assert config.parameters == parameter_count(specs)
        assert config.pod, f"{name}@{size} states no pod"
        pod = topology.read(config.pod)
        needed = pods.estimate(config, params, structure, pod.chips * pod.chip.devices)
        assert needed < pods.ROOM * pod.chip.usable * 2**30, f"{name}@{size} has no room on {config.pod}"
        beside = parameter_count({name: spec for name, spec in specs.items() if not spec.table})
        said = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
        assert any(0.7 < count / said < 1.7 for count in (beside, config.parameters))
        assert size in config.description
    with pytest.raises(settings.ConfigError, match=f"{name}@2B: .* has no size '2B': it has {', '.join(sizes)}$"):
        settings.load(FILES[name], "2B")


def shapes_of(name, size):
    model = settings.load(FILES[name], size).model
    return flatten(jax.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))))[1].specs


def test_counts_that_were_published():
    """Llama-3-8B has 8,030,261,248 parameters; Engram's tables 5.7B and 18.5B; MoBA's models no vocabulary."""
    llama = 8_030_261_248
    keys_and_values = 2 * 4096 * (4096 - 1024)  # of each head, where Llama has 8 groups
    of_lizard = 2 * 32 * 128 * 64 + 4096 + 32 * 4 + 1  # maps, gate, t, alpha
    assert parameter_count(shapes_of("lizard", "8B")) == llama + 32 * (keys_and_values + of_lizard)
    for size, billions in (("9.6B", 5.7), ("22B", 18.5)):
        specs = shapes_of("engram", size)
        tables = parameter_count({name: spec for name, spec in specs.items() if spec.table})
        assert abs(tables / (billions * 1e9) - 1) < 0.02
        assert abs((parameter_count(specs) - tables) / 3.8e9 - 1) < 0.01  # what the paper's models activate
    for size in ("568M", "822M", "1.1B", "1.5B", "2.1B"):
        config = settings.load(FILES["chunk_attention"], size)
        count = config.parameters - 2 * config.model.W * config.model.D
        assert abs(count / (float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]) - 1) < 0.06


def test_a_config_without_sizes_says_so():
    with pytest.raises(settings.ConfigError, match="has no size '1B': it has none"):
        settings.load(FILES["quickstart"], "1B")


@pytest.mark.parametrize("name", FILES)
def test_a_config_has_room_for_its_words(name):
    config = config_of(name)
    data = config.data
    words = open_tokenizer(data.tokenizer).words if isinstance(data, Text) else data.build().words
    assert config.model.W >= words


@pytest.mark.parametrize("name", FILES)
def test_a_config_is_written_and_read_again(name, tmp_path):
    config, path = config_of(name), tmp_path / "config.py"
    path.write_text(settings.render(config))
    again = settings.load(path)
    assert again == config and type(again) is type(config)
    assert settings.describe(path) == config.description
    assert settings.differences(config, again) == settings.changes(settings.render(config), config) == []
    assert settings.locate(str(tmp_path)) == path


def test_differences_are_named_by_field():
    config = config_of("quickstart")
    layer = config.model.stages[0].pattern[0]
    changed = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            stages=(
                dataclasses.replace(
                    config.model.stages[0],
                    pattern=(dataclasses.replace(layer, H=layer.H + 1), *config.model.stages[0].pattern[1:]),
                ),
            ),
        ),
        train=dataclasses.replace(config.train, steps=config.train.steps + 1),
        optimizer=dataclasses.replace(config.optimizer, schedule=Schedule(warmup=7)),
    )
    found = {field: (old, new) for field, old, new in settings.differences(config, changed)}
    told = {field: (old, new) for field, old, new in settings.changes(settings.render(config), changed)}
    assert told == {field: (repr(old), repr(new)) for field, (old, new) in found.items()}
    assert found["model.stages.0.pattern.0.H"] == (layer.H, layer.H + 1)
    assert found["train.steps"] == (config.train.steps, config.train.steps + 1)
    assert found["optimizer.schedule.warmup"] == (config.optimizer.schedule.warmup, 7)
    assert all(
        field.startswith(("model.stages.0.pattern.0.H", "train.steps", "optimizer.schedule.")) for field in found
    )
    shorter = dataclasses.replace(config, model=dataclasses.replace(config.model, stages=config.model.stages * 2))
    assert [field for field, _, _ in settings.differences(config, shorter)] == ["model.stages"]
    assert [field for field, _, _ in settings.changes(settings.render(config), shorter)] == ["model.stages"]


def test_fields_that_an_older_text_lacks_or_still_has():
    config = config_of("quickstart")
    older = re.sub(r"\bseed=\d+", "luck=7", settings.render(config))
    assert settings.changes(older, config) == [("train.luck", "7", "no field any more")]
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=3))
    assert settings.changes(older, other)[0] == ("train.seed", "0", "3")
    with pytest.raises(ValueError, match="not the text of a config"):
        settings.changes("[" * 50_000, config)


def test_a_config_that_is_not_there():
    with pytest.raises(settings.ConfigError, match="no config 'quickstar': did you mean quickstart?"):
        settings.locate("quickstar")
