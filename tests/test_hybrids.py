"""Layers of two branches: Lizard against its equations, B'MOJO-F against the attention that it is made of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from flax import nnx
from reading import QUICK, B, D, Said, cast, fresh, pad, places, pull, read, same, same_tree, stream, tokens

from layers.attention import Attention
from layers.bmojo import BMojoFading, Entries, definition
from layers.layer import Layer, LayerConfig, Out
from layers.linear import EPSILON, LinearAttention, hedgehog
from layers.lizard import Lizard
from layers.ops.attention import attention
from layers.ops.rope import rope

T = 29
SAID = tokens(np.stack([pad(places(T, 5, 20), (0, 2), (11, 14), (T - 2, T)), places(T, 19)]))


@dataclasses.dataclass(frozen=True)
class Same(LayerConfig):
    """Answers with what it is given."""

    def build(self, D, *, rngs):
        return SameLayer()


class SameLayer(Layer):
    def init_state(self, B, T):
        return ()

    def __call__(self, x_BTD, tokens, state=None):
        return Out(x_BTD, state)


class Told(SameLayer):
    """Answers with its Param, whatever it is given."""

    def __init__(self, f_TD):
        self.f = nnx.Param(f_TD, axes="TD")

    def __call__(self, x_BTD, tokens, state=None):
        return Out(jnp.broadcast_to(self.f[...][None], x_BTD.shape), state)


def built(config: LayerConfig, seed: int = 0):
    """In float64, each Param moved off its initial value."""
    layer = cast(config.build(D, rngs=nnx.Rngs(seed)), np.float64)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape), layer)


def like(config: LayerConfig, layer, **parts):
    """Another layer with the maps of `layer`."""
    other = config.build(D, rngs=nnx.Rngs(1))
    for name, part in ({"query": layer.query, "out": layer.out} | parts).items():
        setattr(other, name, part)
    return other


def live(y_BTD, said=SAID):
    return np.where((said.pos_BT >= 0)[..., None], y_BTD, 0)


def by_hand(layer, x_BTD, pos_BT):
    """Both branches of Lizard, each through the output map, token by token."""
    c, w = layer.config, lambda part: np.asarray(part.w[...])
    q, k, v = (np.einsum("BTD,DHK->BTHK", x_BTD, w(m)) for m in (layer.query, layer.key, layer.value))
    fq, fk = (np.einsum("BTHK,HKF->BTHF", a, w(m)) for a, m in ((q, layer.query_map), (k, layer.key_map)))
    fq, fk = (np.asarray(hedgehog(jnp.asarray(a))) for a in (fq, fk))
    keep_BT = 1 / (1 + np.exp(-x_BTD @ w(layer.gate))) if c.gate else np.ones_like(x_BTD[..., 0])
    q, k = (np.asarray(rope(jnp.asarray(a), jnp.asarray(pos_BT), c.rope_theta)) for a in (q, k))
    meta_H = np.logaddexp(0, np.asarray(layer.meta[...])).sum(-1) if c.meta else np.zeros(c.H)
    gate, anchor = np.zeros_like(v), np.zeros_like(v)
    for b, t, h in np.ndindex(v.shape[:3]):
        if pos_BT[b, t] < 0:
            continue
        start = np.flatnonzero(pos_BT[b, : t + 1] == 0)[-1]
        seen = [s for s in range(start, t + 1) if pos_BT[b, s] >= 0]
        weight = [np.prod([keep_BT[b, r] for r in seen if r > s]) * (fq[b, t, h] @ fk[b, s, h]) for s in seen]
        gate[b, t, h] = weight @ v[b, seen, h] / (np.sum(weight) + EPSILON)
        seen = seen[-c.window :]
        weight = np.exp(k[b, seen, h] @ q[b, t, h] / np.sqrt(q.shape[-1]))
        anchor[b, t, h] = weight @ v[b, seen, h] / (meta_H[h] + weight.sum())
    return (np.einsum("BTHV,HVD->BTD", y, w(layer.out)) for y in (gate, anchor))


@pytest.mark.parametrize("options", [{}, {"meta": 0, "gate": False}], ids=str)
def test_lizard_is_its_equations(options):
    layer = built(Lizard(H=2, K=8, F=12, window=6, chunk=8, **options))
    x_BTD = stream(T)
    with x64():
        gate, anchor = by_hand(layer, x_BTD, SAID.pos_BT)
        same(live(pull(layer, x_BTD, SAID, x_BTD)[0]), gate + np.asarray(layer.alpha[...]) * anchor, "y")
        layer.alpha = nnx.Param(np.zeros([]), axes="")
        same(live(pull(layer, x_BTD, SAID, x_BTD)[0]), gate, "y without the anchor")


def test_lizard_without_gate_and_meta_is_window_attention_and_linear_attention():
    layer = built(Lizard(H=2, K=8, F=12, window=6, meta=0, gate=False, chunk=8))
    maps = {"query_map": layer.query_map, "key_map": layer.key_map}
    linear = like(LinearAttention(H=2, K=8, V=8, feature_map="hedgehog", F=6), layer, **maps)
    linear.written.key, linear.written.value = layer.key, layer.value
    window = like(Attention(H=2, K=8, window=6), layer, key=layer.key, value=layer.value)
    with x64():
        y, y_linear, y_window = (live(pull(a, stream(T), SAID, stream(T))[0]) for a in (layer, linear, window))
    same(y, y_linear + np.asarray(layer.alpha[...]) * y_window, "y")


def test_a_denominator_with_nothing_more_is_a_softmax():
    """Σ t_j of 0 to the last digit, whose logarithm is infinite."""
    layer = built(Lizard(H=2, K=8, window=6, chunk=8))
    none = built(Lizard(H=2, K=8, window=6, chunk=8))
    layer.meta, none.meta = nnx.Param(np.full((2, 4), -1e4), axes="HS"), None
    with x64():
        y, d_layer, _ = pull(layer, stream(T), SAID, live(stream(T, 1)))
        same(live(y), live(pull(none, stream(T), SAID, stream(T))[0]), "y")
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(d_layer))


def test_the_initial_values_of_lizard():
    layer = Lizard(H=2).build(D, rngs=nnx.Rngs(0))
    assert layer.alpha[...] == 1 and layer.meta.shape == (2, 4) and not np.any(layer.meta[...])
    off = Lizard(H=2, meta=0, gate=False).build(D, rngs=nnx.Rngs(0))
    assert off.meta is None and off.gate is None


@pytest.mark.parametrize("G", [4, 2])
def test_an_identity_for_recurrence_doubles_the_window(G):
    layer = built(BMojoFading(Same(), H=4, G=G, K=8, window=4, rope_theta=None))
    wide = like(Attention(H=4, G=G, K=8, window=8, rope_theta=None), layer, key=layer.key, value=layer.value)
    with x64():
        (y, d, dx), (want, d_wide, dx_wide) = (pull(a, stream(T), SAID, live(stream(T, 1))) for a in (layer, wide))
    same(live(y), live(want), "y")
    same(dx, dx_wide, "gradient in x")
    for name in ("query", "key", "value", "out"):
        same_tree(getattr(d, name), getattr(d_wide, name), f"gradient in {name}")


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_token_6_reads_three_tokens_and_three_memories_before_them(implementation):
    layer = built(BMojoFading(Same(), H=2, K=8, window=3, implementation=implementation))
    layer.recurrent = Told(stream(10, 2)[0])
    dy_BTD = np.zeros((B, 10, D))
    dy_BTD[0, 6] = stream(1, 1)[0, 0]
    with x64():
        _, d_layer, dx_BTD = pull(layer, stream(10), tokens(np.stack([places(10)] * B)), dy_BTD)
    assert np.flatnonzero(np.asarray(dx_BTD)[0].any(-1)).tolist() == [4, 5, 6]
    assert np.flatnonzero(np.asarray(d_layer.recurrent.f[...]).any(-1)).tolist() == [1, 2, 3]


def test_one_softmax_is_two_merged_by_their_log_sums():
    w, time_BT = 5, np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    rng = np.random.default_rng(0)
    q_BTHK, k_BTHK, f_BTHK, v_BTHV, u_BTHV = (rng.standard_normal((B, T, 2, 8)) for _ in range(5))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def joint(q, *entries):
        return definition(q, Entries(*entries), time_BT, np.repeat([False, True], T), w)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def alone(q, k, v, time):
        return attention(q, k, v, query_time=time, key_time=time_BT, window=w)

    def mass(k, first):
        """The sum whose logarithm it would be."""
        ago = np.arange(T)[:, None] - np.arange(T)
        weight = np.exp(np.einsum("BTHK,BSHK->BTHS", q_BTHK, k) / np.sqrt(8))
        return np.where(((first <= ago) & (ago < first + w))[None, :, None], weight, 0).sum(-1)[..., None]

    with x64():
        both = (np.concatenate(pair, 1).swapaxes(1, 2) for pair in ((k_BTHK, f_BTHK), (v_BTHV, u_BTHV)))
        got = joint(q_BTHK, *both, np.concatenate([time_BT, time_BT], 1))
        near = np.asarray(alone(q_BTHK, k_BTHK, v_BTHV, time_BT))
        far = np.asarray(alone(q_BTHK, f_BTHK, u_BTHV, time_BT - w))
    near_mass, far_mass = mass(k_BTHK, 0), mass(f_BTHK, w)
    share = near_mass / (near_mass + far_mass)
    same(got, share * near + (1 - share) * far, "merged", 1e-14)


LONG = 300  # tokens: several blocks of queries and of keys
PACKED = tokens(
    np.stack([pad(places(LONG, 7, 150), (0, 3), (60, 95), (LONG - 9, LONG)), places(LONG, 130, 133)]),
)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_fast_form_is_the_definition(tied):
    config = BMojoFading(Same(), H=4, G=2, K=8, window=20, tied=tied, qk_norm=True)
    layer = built(config)
    x_BTD, dy_BTD = stream(LONG), live(stream(LONG, 1), PACKED)
    results = []
    with x64():
        for implementation in ("naive", "chunked"):
            layer.config = dataclasses.replace(config, implementation=implementation)
            y, d_layer, dx = pull(layer, x_BTD, PACKED, dy_BTD)
            results.append([live(y, PACKED), jax.tree.leaves(d_layer), dx])
        same_tree(results[1], results[0], "chunked against naive")
        state = cast(layer.init_state(B, LONG), np.float64)
        cut_y, _ = read(layer, x_BTD, PACKED, state, [150, 150])
    same(live(cut_y, PACKED), results[0][0], "two pieces of several blocks")


def test_long_texts_need_no_square_table():
    T = 4096
    layer = jax.eval_shape(lambda: BMojoFading(Same(), H=1, K=8, window=64).build(D, rngs=nnx.Rngs(0)))
    x_BTD, said = jax.ShapeDtypeStruct((1, T, D), jnp.float32), Said(*[jax.ShapeDtypeStruct((1, T), jnp.int32)] * 2)
    temporary = pull.lower(layer, x_BTD, said, x_BTD).compile().memory_analysis().temp_size_in_bytes
    assert temporary < T * T, f"{temporary} bytes, and a table of scores has {4 * T * T}"


def test_numbers_stay_small_however_many_documents_come():
    """Each start is 2 w numbers on; the state counts anew, and reads on as one that never did."""
    config = BMojoFading(Same(), H=2, K=8, window=4)
    layer = built(config)
    x_BTD, said = stream(4 * T), tokens(np.stack([np.arange(4 * T) % 5, np.arange(4 * T) % 29]))
    with x64():
        y_BTD, *_ = pull(layer, x_BTD, said, x_BTD)
        got_BTD, state = read(layer, x_BTD, said, fresh(layer, config), [T] * 4)
    same(got_BTD, y_BTD, "y")
    assert (state.time_B < 6 * 4).all() and (state.rings.time_BS < state.time_B[:, None]).all()


def sizes(config: LayerConfig) -> tuple[int, int]:
    """Parameters, and numbers in the state of a row."""
    layer = jax.eval_shape(lambda: config.build(D, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: layer.init_state(1, 1 << 20))
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (layer, state))


def test_sizes_are_those_stated():
    assert sizes(Lizard(H=2, K=8, F=12, window=6)) == (
        4 * D * 16 + 2 * 8 * 12 + D + 8 + 1,
        2 * 12 * 9 + 2 * 6 * 16 + 6 + 2,
    )
    assert sizes(BMojoFading(Same(), H=4, G=2, K=8, window=6)) == (2 * D * 8 * 6, 6 * 6 * 16 + 18 + 1)
    untied = BMojoFading(Same(), H=4, G=2, K=8, window=6, tied=False, qk_norm=True)
    assert sizes(untied)[0] == 2 * D * 8 * 6 + 2 * D * 8 * 2 + 3 * 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lizard(window=0), "Lizard.window is 0"),
        (lambda: Lizard(meta=-1), "Lizard.meta is -1: it must be at least 0"),
        (lambda: Lizard(F=7), "Lizard.F is 7.*even"),
        (lambda: Lizard(implementation="fast"), "Lizard.implementation is 'fast'.*naive"),  # type: ignore[arg-type]
        (lambda: Lizard(H=5).build(64, rngs=nnx.Rngs(0)), "Lizard.H is 5.*give K"),
        (lambda: Lizard(K=7).build(64, rngs=nnx.Rngs(0)), "Lizard.K is 7.*even"),
        (lambda: Lizard(K=7, rope_theta=None).build(64, rngs=nnx.Rngs(0)), "Lizard.K is 7.*F None.*even"),
        (lambda: BMojoFading(window=0), "BMojoFading.window is 0"),
        (lambda: BMojoFading(H=4, G=3), "BMojoFading.G is 3.*one of 1, 2, 4"),
        (lambda: BMojoFading(K=7).build(64, rngs=nnx.Rngs(0)), "BMojoFading.K is 7.*even"),
        (lambda: BMojoFading(implementation="scan"), "BMojoFading.implementation is 'scan'"),  # type: ignore[arg-type]
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
