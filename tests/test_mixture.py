"""Mixtures of memories: three ways to read are one, over every base; what a token does not go to, it does not touch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import QUICK, B, D, Said, apply, cast, pad, places, pull, same, same_tree, stream, tokens

from layers import test_time
from layers.deltanet import DeltaNet
from layers.gated_deltanet import GatedDeltaNet
from layers.gla import GLA
from layers.kda import KDA
from layers.layer import LayerConfig
from layers.linear import LinearAttention
from layers.mixture import MixtureOfMemories
from layers.momentum_deltanet import MomentumDeltaNet
from layers.ops import routing
from layers.retention import Retention
from layers.titans import Titans

BASES: tuple[LayerConfig, ...] = (
    LinearAttention(H=2, K=6, V=8, chunk=8),
    GLA(H=2, K=6, V=8, conv=3, chunk=8),
    DeltaNet(H=2, K=6, V=8, chunk=8),
    GatedDeltaNet(H=2, G=1, K=6, V=8, chunk=8),
    KDA(H=2, K=6, V=8, R=4, chunk=8),
    MomentumDeltaNet(H=2, K=6, V=8, chunk=8),
    test_time.TestTimeMemory(H=2, K=6, depth=1, norm=False, exact=True, chunk=8),
    Titans(H=2, K=6, F=8, chunk=4),
)
T = 37
SAID = tokens(np.stack([pad(places(T, 5, 20), (0, 2), (11, 14), (T - 2, T)), places(T, 19)]))


def built(config: LayerConfig, seed: int = 0):
    """In float64, each Param moved off its initial value."""
    layer = cast(config.build(D, rngs=nnx.Rngs(seed)), np.float64)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape), layer)


def read_by(layer, name: str):
    """The same parameters, read by another implementation."""
    config = dataclasses.replace(layer.config, implementation=name)
    structure = jax.tree.structure(jax.eval_shape(lambda: config.build(D, rngs=nnx.Rngs(0))))
    return jax.tree.unflatten(structure, jax.tree.leaves(layer))


def live(y_BTD, said=SAID):
    return np.where((said.pos_BT >= 0)[..., None], y_BTD, 0)


@pytest.mark.parametrize(
    "base",
    [b if type(b) is GatedDeltaNet else pytest.param(b, marks=pytest.mark.slow) for b in BASES],
    ids=lambda base: type(base).__name__,
)
@pytest.mark.parametrize(
    "how",
    [
        {"M": 4, "top": 2},
        pytest.param({"M": 3, "top": 1, "shared": False}, marks=pytest.mark.slow),
        pytest.param({"M": 3, "top": 3}, marks=pytest.mark.slow),
        # Not of all its memories: those of one projection then answer alike, and the router's slopes are exactly 0.
        pytest.param({"M": 4, "top": 2, "projections": "one"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_stream_is_the_definition(base, how):
    with jax.enable_x64(True):
        layer = built(MixtureOfMemories(base, **how))
        x_BTD, dy_BTD = stream(T), live(stream(T, 1))
        naive, fast = ([*pull(read_by(layer, name), x_BTD, SAID, dy_BTD)] for name in ("naive", "chunked"))
    for result in (naive, fast):
        result[0] = live(result[0])
        result[1] = jax.tree.leaves(result[1])
    same_tree(fast, naive, f"{type(base).__name__}: stream against every memory over all tokens")


@pytest.mark.slow
def test_one_memory_is_its_base():
    """M = 1; and any number that all tokens go to, with the same maps: the weights add up to one."""
    base = GatedDeltaNet(H=2, K=6, V=8, chunk=8)
    with jax.enable_x64(True):
        layer = built(MixtureOfMemories(base, M=3, top=3, shared=False, projections="one"))
        want, *_ = pull(layer.base, stream(T), SAID, stream(T, 1))
        same(live(pull(layer, stream(T), SAID, stream(T, 1))[0]), live(want), "three memories of the same maps")

        layer = built(MixtureOfMemories(base, M=1, top=1, shared=False))
        alone = built(base)
        alone.query, alone.convs, alone.decay = layer.base.query, layer.base.convs, layer.base.decay
        alone.gate, alone.norm, alone.out = layer.base.gate, layer.base.norm, layer.base.out
        alone.written = jax.tree.map(lambda a: a[0], layer.each)
        want, *_ = pull(alone, stream(T), SAID, stream(T, 1))
        same(live(pull(layer, stream(T), SAID, stream(T, 1))[0]), live(want), "one memory")


def test_a_step_changes_only_the_memories_that_the_token_goes_to():
    config = MixtureOfMemories(GatedDeltaNet(H=2, K=6, V=8, chunk=8), M=4, top=2)
    layer = config.build(D, rngs=nnx.Rngs(0))
    x_BTD, said = stream(20).astype(np.float32), tokens(np.stack([places(20)] * B))
    _, state = apply(layer, x_BTD[:, :19], Said(*(a[:, :19] for a in said)), layer.init_state(B, 32))
    _, after = apply(layer, x_BTD[:, 19:], Said(*(a[:, 19:] for a in said)), state)
    p = jax.nn.softmax(layer.router(jnp.asarray(x_BTD))[:, 19], -1)
    went = np.argsort(np.argsort(-np.asarray(p), -1), -1) < 2  # [B, M]
    np.testing.assert_array_equal(np.asarray(after.count_BM) - np.asarray(state.count_BM), went)
    for new, old in zip(jax.tree.leaves(after.memories), jax.tree.leaves(state.memories), strict=True):
        changed = (np.asarray(new) != np.asarray(old)).any(axis=tuple(range(2, new.ndim)))
        np.testing.assert_array_equal(changed, went)


def test_the_router_learns_through_weights_and_balance():
    """One memory at a time has weight 1, whatever p: without the balance loss the router has no gradient."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def slope(layer, weight):
        def objective(layer):
            out = layer(jnp.asarray(stream(T), jnp.float32), SAID)
            return jnp.sum(out.y_BTD) + weight * out.aux["loss/balance"]

        return jnp.abs(jax.grad(objective)(layer).router.w[...]).max()

    one, two = (
        MixtureOfMemories(LinearAttention(H=2, K=6, V=8), M=3, top=top, balance=1.0).build(D, rngs=nnx.Rngs(0))
        for top in (1, 2)
    )
    assert slope(one, 0.0) == 0 and slope(one, 1.0) > 1e-3 and slope(two, 0.0) > 1e-3


def test_balance_and_load_by_hand():
    """Two tokens, three memories, one each: p = (.5, .3, .2) and (.2, .6, .2); padding beside them does not count."""
    layer = MixtureOfMemories(GLA(H=2, K=6, V=8), M=3, top=1, balance=1.0).build(D, rngs=nnx.Rngs(0))
    p_BTM = jnp.asarray([[[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]]])
    pos_BT = jnp.asarray([[0, 1, -1]])
    chosen = jnp.stack(routing.largest(p_BTM, 1), 2) & (pos_BT >= 0)[..., None, None]
    said = layer._said(p_BTM, chosen.astype(jnp.int32), pos_BT)
    assert said["loss/balance"] == pytest.approx(3 * (0.5 * 0.35 + 0.5 * 0.45))
    assert said["load"] == pytest.approx(1.5)
    log = np.log
    entropy = -(0.5 * log(0.5) + 0.3 * log(0.3) + 0.2 * log(0.2) + 0.4 * log(0.2) + 0.6 * log(0.6)) / 2 / log(3)
    assert said["entropy"] == pytest.approx(entropy)
    of_mean = -(0.35 * log(0.35) + 0.45 * log(0.45) + 0.2 * log(0.2)) / log(3)
    assert said["specialisation"] == pytest.approx(of_mean - entropy, abs=1e-6)


@functools.partial(jax.jit, static_argnums=3)
def _routed(p_BTM, pos_BT, count_BM, top):
    """(what each token goes to, where that lies, the stream)"""
    chosen = jnp.stack(routing.largest(p_BTM, top), 2) & (pos_BT >= 0)[..., None, None]
    at = routing.places(chosen.astype(jnp.int32), pos_BT, count_BM)
    return chosen, at, routing.stream(chosen.astype(jnp.int32), at.place_BTM)


@settings(max_examples=9, deadline=None, database=None, derandomize=True)
@given(st.sampled_from([(1, 1), (4, 1), (4, 3)]), st.sampled_from([1, 12]), st.integers(0, 99))
def test_streams_hold_each_pair_once_in_order(sizes: tuple[int, int], T: int, seed: int):
    (M, top), rng = sizes, np.random.default_rng(seed)
    pos_BT = np.stack([pad(places(T, *rng.integers(0, T, 2)), (3, 4)), places(T)])
    p_BTM = rng.random((2, T, M)).round(1)  # with ties
    count_BM = jnp.asarray(rng.integers(0, 5, (2, M)), jnp.int32)
    chosen, at, made = jax.device_get(_routed(jnp.asarray(p_BTM), jnp.asarray(pos_BT, jnp.int32), count_BM, top))
    for row in range(2):
        slot, held = 0, np.asarray(count_BM)[row].copy()
        place = np.full((T, M), -1)
        for t in range(T):
            held = np.zeros(M, int) if pos_BT[row, t] == 0 else held
            for m in np.flatnonzero(chosen[row, t].any(0)):
                place[t, m] = held[m]
                held[m] += 1
        np.testing.assert_array_equal(at.place_BTM[row], place)
        np.testing.assert_array_equal(at.count_BM[row], held)
        for m in range(M):
            assert made.first_BM[row, m] == slot
            for t in range(T):
                for i in np.flatnonzero(chosen[row, t, :, m]):
                    assert made.pair_BS[row, slot] == t * top + i and made.slot_BTk[row, t, i] == slot
                    assert made.pos_BS[row, slot] == place[t, m]
                    slot += 1
        assert (made.pair_BS[row, slot:] == T * top).all() and (made.pos_BS[row, slot:] == -1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureOfMemories(M=2, top=3), "MixtureOfMemories.top is 3: it must be at most M = 2"),
        (lambda: MixtureOfMemories(M=0), "MixtureOfMemories.M is 0"),
        (lambda: MixtureOfMemories(balance=-1.0), "MixtureOfMemories.balance is -1.0"),
        (lambda: MixtureOfMemories(Titans(persistent=4)), "MixtureOfMemories.base has persistent tokens"),
        (lambda: MixtureOfMemories(Retention()).build(64, rngs=nnx.Rngs(0)), "base is Retention.*use LinearAttention"),
    ],
)
def test_bad_mixtures_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
