"""Generation: what a decoder writes is what the whole model says, at a cost that does not grow."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from flax import nnx

from layers.attention import Attention
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import Tokens
from layers.mlp import MLP
from models.decode import Decoder, Sampling, draw, generate
from models.generate import prompt_ids
from models.lm import LM, Stage
from models.parameters import flatten

W = 33
BOUNDED = LM(W=W, D=16, stages=(Stage((GatedDeltaNet(H=2, K=4, V=8, chunk=4), Attention(H=2, window=5), MLP(F=24))),))
GLOBAL = LM(W=W, D=16, stages=(Stage((Attention(H=2, G=1), MLP(F=24))),), tied=True)
PROMPTS = [[7, 3, 11, 20, 5, 8, 1, 30, 2, 9, 4], [6], [12, 0, 17, 17, 32, 1]]
GREEDY = Sampling(temperature=0)
LENGTH = 24


@functools.cache
def structure_and_params(config):
    """Weights that say something: a head, and layers that weigh as much as the words they read."""
    with jax.enable_x64(False):
        structure = flatten(jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))[1]
        rng = np.random.default_rng(0)
        params = {}
        for name, spec in structure.specs.items():
            fan_in = np.prod([n for letter, n in zip(spec.axes, spec.shape, strict=True) if letter in spec.fan_in])
            params[name] = (rng.normal(size=spec.shape) / np.sqrt(fan_in)).astype(np.float32)
        params["embed"] *= 0.25 if config.tied else 1.0
    return structure, params


@functools.cache
def decoder(config):
    structure, params = structure_and_params(config)
    # On a device of their own, as a checkpoint's are: calls with and without such arrays are compiled apart.
    return Decoder(structure.module(jax.device_put(params, jax.devices()[0])), piece=4, burst=4)


@functools.cache
def whole(config):
    """ids [LENGTH] -> float64 logits [LENGTH, W] of the model that reads them all at once."""
    structure, params = structure_and_params(config)
    params = {name: value.astype(np.float64) for name, value in params.items()}
    run = jax.jit(lambda params, tokens: structure.module(params)(tokens).y_BTD[0])

    def logits(ids):
        padded = np.zeros([1, LENGTH], np.int32)
        padded[0, : len(ids)] = ids
        with x64():
            return np.asarray(run(params, Tokens(padded, np.arange(LENGTH, dtype=np.int32)[None])))

    return logits


def decode(config, prompts, steps, sampling=GREEDY, **options):
    return np.concatenate(list(decoder(config).generate(prompts, steps, sampling, **options)), 1)


@pytest.mark.parametrize("config", [BOUNDED, GLOBAL], ids=["bounded", "global"])
def test_prompts_of_different_lengths_each_get_the_likeliest_words_of_the_whole_model(config):
    words = decode(config, PROMPTS, 13)
    assert words.shape == (3, 13) and words.dtype == np.int32
    for prompt, said in zip(PROMPTS, words, strict=True):
        logits = whole(config)([*prompt, *said])[len(prompt) - 1 : len(prompt) + 12]
        second, first = np.sort(logits, -1)[:, -2:].T
        assert (first - second).min() > 1e-4  # no ties: the path is the only one
        np.testing.assert_array_equal(said, logits.argmax(-1))
    assert len(set(words.ravel().tolist())) > 3


@pytest.mark.parametrize("config", [BOUNDED, GLOBAL], ids=["bounded", "global"])
def test_pieces_and_steps_say_what_the_whole_says(config):
    structure, params = structure_and_params(config)
    params = {name: value.astype(np.float64) for name, value in params.items()}
    ids = np.random.default_rng(1).integers(0, W, LENGTH).astype(np.int32)
    pos = np.arange(LENGTH, dtype=np.int32)
    with x64():
        model = structure.module(params).unstacked()
        empty = jax.jit(lambda: model.init_state(1, LENGTH))()
        state = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, empty)
        read = jax.jit(lambda tokens, state: model(tokens, state)[:2])
        said, start = [], 0
        for size in (4, 4, 4, *[1] * 12):
            cut = slice(start, start + size)
            logits, state = read(Tokens(ids[None, cut], pos[None, cut]), state)
            said.append(np.asarray(logits[0]))
            start += size
    np.testing.assert_allclose(np.concatenate(said), whole(config)(ids), rtol=1e-9, atol=1e-9)


def test_nothing_is_compiled_twice_and_greedy_words_do_not_depend_on_the_seed():
    ready = decoder(BOUNDED)
    first = decode(BOUNDED, PROMPTS, 13)
    sizes = [f._cache_size() for f in (ready._empty, ready._read, ready._write)]
    longer = [PROMPTS[0] * 3, PROMPTS[1], PROMPTS[2] * 2]
    other = decode(BOUNDED, longer, 6)
    assert [f._cache_size() for f in (ready._empty, ready._read, ready._write)] == sizes == [1, 1, 1]
    np.testing.assert_array_equal(decode(BOUNDED, PROMPTS, 13, seed=5), first)
    np.testing.assert_array_equal(decode(BOUNDED, PROMPTS, 2), first[:, :2])
    np.testing.assert_array_equal(other[1], first[1, :6])
    assert [len(part[0]) for part in ready.generate(PROMPTS, 6, GREEDY)] == [4, 2]


def test_sampling_is_a_function_of_the_seed():
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.95)
    first, again, other = (decode(BOUNDED, PROMPTS, 8, sampling, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, decode(BOUNDED, PROMPTS, 8))


def test_a_bounded_memory_stays_as_large_as_it_is():
    ready = decoder(BOUNDED)

    def burst(capacity):
        state = jax.eval_shape(lambda: ready.model.init_state(3, capacity))
        logits, place = jax.ShapeDtypeStruct((3, W), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = ready._write.lower(ready._leaves, state, logits, place, key, GREEDY).compile()
        memory = compiled.memory_analysis()
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert memory.alias_size_in_bytes >= held  # the state is written over, not copied
        return held, memory.temp_size_in_bytes, memory.argument_size_in_bytes

    assert burst(64) == burst(4096)
    unbounded = decoder(GLOBAL).model
    grown = [jax.eval_shape(lambda n=n: unbounded.init_state(1, n)) for n in (64, 4096)]
    small, large = (sum(leaf.size for leaf in jax.tree.leaves(state)) for state in grown)
    assert large > 60 * small  # attention without a window does grow


# The draw

LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2]))


DRAWN = [
    (Sampling(temperature=1.0), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (Sampling(temperature=0.5), np.array([16, 0.25, 9, 0.25, 4]) / 29.5),
    (Sampling(temperature=1.0, top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
    (Sampling(temperature=1.0, top_k=50), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (Sampling(temperature=1.0, top_p=0.75), [4 / 9, 0, 3 / 9, 0, 2 / 9]),  # 0.2 crosses 0.75: still in
    (Sampling(temperature=1.0, top_p=0.65), [4 / 7, 0, 3 / 7, 0, 0]),
    (Sampling(temperature=1.0, top_p=1.0), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (Sampling(temperature=1.0, top_k=3, top_p=0.5), [4 / 7, 0, 3 / 7, 0, 0]),  # 4/9 of three words is below 0.5
    (Sampling(temperature=1.0, top_k=1), [1, 0, 0, 0, 0]),
    (Sampling(temperature=1.0, top_p=1e-6), [1, 0, 0, 0, 0]),
    (Sampling(temperature=0), [1, 0, 0, 0, 0]),
]


def test_words_are_drawn_as_often_as_they_should():
    logits = jnp.asarray(np.tile(LOGITS, (4000, 1)), jnp.float32)
    words = jax.jit(lambda logits: [draw(logits, jax.random.key(0), sampling) for sampling, _ in DRAWN])(logits)
    for found, (sampling, expected) in zip(words, DRAWN, strict=True):
        assert found.dtype == jnp.int32
        frequencies = np.bincount(np.asarray(found), minlength=5) / 4000
        np.testing.assert_allclose(frequencies, expected, atol=0.03, err_msg=str(sampling))
        assert not frequencies[np.asarray(expected) == 0].any()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1: it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_impossible_sampling(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "a prompt is empty"),
        ([[1], []], {}, "a prompt is empty: give each at least one token"),
        ([[1, W]], {}, f"a prompt holds the id {W}: the model knows 0 to {W - 1}"),
        ([[-1]], {}, "a prompt holds the id -1"),
        ([[1, 2, 3]], {"steps": 0}, "steps is 0"),
        ([[1, 2, 3]], {"steps": 8, "capacity": 10}, "capacity is 10, .* 8 steps need 11 tokens"),
    ],
)
def test_impossible_generation(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        next(decoder(BOUNDED).generate(prompts, **{"steps": 4} | options))


def test_impossible_decoders():
    model = decoder(BOUNDED).model
    for sizes in ({"piece": 0}, {"burst": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Decoder(model, **sizes)


def test_a_piece_longer_than_the_memory_is_read():
    structure, params = structure_and_params(GLOBAL)
    ready = Decoder(structure.module(params), piece=32, burst=4)
    words = np.concatenate(list(ready.generate(PROMPTS[2:], 6, GREEDY, capacity=12)), 1)
    np.testing.assert_array_equal(words, decode(GLOBAL, PROMPTS, 6)[2:])


def test_bfloat16_generates():
    structure, params = structure_and_params(dataclasses.replace(BOUNDED, dtype="bfloat16"))
    ready = Decoder(structure.module(params), piece=4, burst=4)
    state = jax.eval_shape(lambda: ready.model.init_state(3, 16))
    ids = jnp.zeros((3, 4), jnp.int32)
    after, logits = jax.eval_shape(ready._read_piece, ready._leaves, state, Tokens(ids, ids))
    assert after == state and logits.dtype == jnp.float32
    out = jax.eval_shape(
        functools.partial(ready._write_burst, sampling=GREEDY),
        ready._leaves,
        state,
        logits,
        ids[:, 0],
        jax.random.key(0),
    )
    assert out[0] == state and out[1] == logits and out[-1].shape == (3, 4)


def test_all_new_words_at_once():
    config = LM(W=W, D=16, stages=(Stage((MLP(F=8),)),))
    structure, params = structure_and_params(config)
    words = generate(structure.module(params), PROMPTS, 5, GREEDY)
    assert words.shape == (3, 5)
    np.testing.assert_array_equal(words[1], whole(config)([6, *words[1]]).argmax(-1)[:5])


def test_a_prompt_is_read_once_or_twice():
    data = SimpleNamespace(doc_start=256, encode=lambda text: np.array(list(text.encode()), np.int32))
    assert prompt_ids(data, "ab") == [256, 97, 98] and prompt_ids(data, "ab", twice=True) == [256, 97, 98, 97, 98]
    data.doc_start = None
    assert prompt_ids(data, "ab", twice=True) == [97, 98, 97, 98] and prompt_ids(data, "") == []
