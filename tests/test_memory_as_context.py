"""Memory as context: no option leaks, and attention sees what the docstring says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.layer import Tokens
from layers.memory_as_context import MemoryAsContext
from layers.memory_as_gate import Combine
from layers.test_time import TestTimeMemory
from layers.titans import Titans

TestTimeMemory.__test__ = False  # it is no test

T, D, L = 14, 16, 4
OPTIONS = [
    {"context": context, "write": write, "readout": readout}
    for context in (None, 3)
    for write in ("attn_out", "input")
    for readout in ("token", "segment")
]
USUAL = (0, 7)  # each word of each option; `make test-slow` has every combination


@pytest.mark.parametrize(
    "options", [pytest.param(o, id=str(o), marks=[] if i in USUAL else pytest.mark.slow) for i, o in enumerate(OPTIONS)]
)
def test_no_token_sees_a_later_one(float64, options):
    """The Jacobian is exactly zero above its diagonal, and reaches back beyond the segment."""
    config = MemoryAsContext(Titans(H=2, K=4, F=6, chunk=2), H=2, segment=L, persistent=2, **options)
    layer = jax.tree.map(lambda a: a.astype(jnp.float64), config.build(D, rngs=nnx.Rngs(0)))
    said = Tokens(jnp.zeros((1, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None])
    x = jax.random.normal(jax.random.key(1), (1, T, D), jnp.float64)

    @jax.jit
    def moved(layer, x, dy):
        return jax.vjp(lambda x: layer(x, said).y_BTD, x)[1](dy)[0][0]

    pushes = np.zeros((T, 1, T, D))
    pushes[np.arange(T), 0, np.arange(T)] = np.random.default_rng(2).normal(size=(T, D))
    influence = np.stack([np.abs(np.asarray(moved(layer, x, dy))).max(-1) for dy in pushes])
    assert not np.triu(influence, 1).any()
    assert (np.diagonal(influence) > 1e-6).all()
    assert (influence[2 * L :, :L] > 1e-12).all()


def test_how_two_streams_are_combined():
    """Rows of unit mean square, so that the norms change nothing; both norms have weights of their own."""
    y, m = np.array([[[1.0, -1.0]]]), np.array([[[-1.0, 1.0]]])
    share = 1 / (1 + np.exp(-3 * m))
    for how, want in (
        ("sigmoid", 2 * y * share),
        ("silu", 2 * y * 3 * m * share),
        ("convex", share * 2 * y + (1 - share) * 3 * m),
    ):
        combine = Combine(how, 2)
        combine.norm_y.w[...], combine.norm_m.w[...] = jnp.full(2, 2.0), jnp.full(2, 3.0)
        np.testing.assert_allclose(combine(jnp.asarray(y), jnp.asarray(m)), want, rtol=1e-5)


def test_what_cannot_be():
    for change, message in (
        ({"write": "x"}, "MemoryAsContext.write is 'x': it must be one of attn_out, input"),
        ({"readout": "x"}, "MemoryAsContext.readout"),
        ({"combine": "x"}, "MemoryAsContext.combine is 'x': it must be one of sigmoid"),
        ({"segment": 0}, "MemoryAsContext.segment"),
        ({"persistent": -1}, "MemoryAsContext.persistent"),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryAsContext(**change)


def test_a_memory_that_steps_once_a_chunk(float64):
    """Its work is cut in smaller blocks than its chunk: a segment holds several, and none is lost."""
    memory = TestTimeMemory(H=2, K=4, F=6, chunk=4 * 128, update="chunk", keep=False)
    config = MemoryAsContext(memory, H=2, segment=300, persistent=1)
    x = jax.random.normal(jax.random.key(1), (1, 310, D), jnp.float64)
    said = Tokens(jnp.zeros((1, 310), jnp.int32), jnp.arange(310, dtype=jnp.int32)[None])
    build = functools.partial(config.build, D, rngs=nnx.Rngs(0))
    layer = jax.tree.map(lambda a: a.astype(jnp.float64), build())
    read = jax.jit(lambda layer, x: layer(x, said, jax.tree.map(jnp.asarray, layer.init_state(1, 310))))
    whole = read(layer, x)
    naive = jax.tree.unflatten(
        jax.tree.structure(dataclasses.replace(config, implementation="naive").build(D, rngs=nnx.Rngs(0))),
        jax.tree.leaves(layer),
    )
    want = read(naive, x)
    np.testing.assert_allclose(whole.y_BTD, want.y_BTD, rtol=1e-5, atol=1e-7)
    for got, expected in zip(jax.tree.leaves(whole.state.memory), jax.tree.leaves(want.state.memory), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [OPTIONS[i] for i in USUAL], ids=str)
def test_short_rows_are_read_as_long_ones(float64, options):
    """Rows shorter than a segment, trained on, take no room for one: y and gradients are those of a state's call."""
    config = MemoryAsContext(Titans(H=2, K=4, F=6, chunk=4), H=2, segment=64, persistent=2, **options)
    layer = jax.tree.map(lambda a: a.astype(jnp.float64), config.build(D, rngs=nnx.Rngs(0)))
    pos = jnp.array([[*range(11), -1, -1, 0, 1, 2, 3, 4, 5, 6], [-1, *range(19)]], jnp.int32)
    said = Tokens(jnp.zeros(pos.shape, jnp.int32), pos)
    x = jax.random.normal(jax.random.key(1), (*pos.shape, D), jnp.float64)

    def total(layer, x, state):
        y = layer(x, said, state).y_BTD
        return jnp.sum(jnp.where((pos >= 0)[..., None], jnp.sin(y), 0))

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    fresh = jax.tree.map(lambda a: a.astype(jnp.float64), layer.init_state(2, pos.shape[1]))
    (value, slopes), (whole, expected) = both(layer, x, None), both(layer, x, fresh)
    np.testing.assert_allclose(value, whole, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)
