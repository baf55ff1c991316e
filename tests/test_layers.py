"""Each layer is the one of its paper: sizes, initial values, and its output against the equations, in NumPy."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from flax import nnx

from layers.conv import ShortConv
from layers.decay import MambaDecay
from layers.deltanet import DeltaNet
from layers.gated_deltanet import GatedDeltaNet
from layers.gla import GLA
from layers.kda import KDA
from layers.layer import LayerConfig, Tokens
from layers.linear import MAPS, LinearAttention, hedgehog, taylor
from layers.mamba2 import Mamba2
from layers.mlp import MLP
from layers.norm import RMSNorm, l2_norm
from layers.ops.rope import rope
from layers.retention import Retention

FAMILY = (MLP, LinearAttention, Retention, GLA, Mamba2, DeltaNet, GatedDeltaNet, KDA)
d = 2048

# parameters exactly; the same in units of D²; floats of the memories; inputs that the convolutions see, 4 deep
SIZES = [
    (LinearAttention(H=4), d, 4 * d**2, 4.00, 4 * 512 * (512 + 1), 0),
    (LinearAttention(H=4, normaliser=False), d, 4 * d**2 + 512, 4.00, 1_048_576, 0),
    (LinearAttention(H=16, feature_map="taylor"), 1792, 2 * 256 * 1792 + 2 * 1792**2, 2.29, 16 * 153 * 113, 0),
    (LinearAttention(H=16, feature_map="hedgehog"), d, 4 * d**2 + 2 * 16 * 128 * 64, 4.06, 16 * 128 * 129, 0),
    (Retention(H=8), d, 8 * d**2 + 512, 8.00, 1_048_576, 0),
    (GLA(H=4), d, 4 * d**2 + 16 * d + 17 * 1024 + 512, 4.01, 524_288, 0),
    (Mamba2(), d, 6 * d**2 + (256 + 64) * d + 5 * (2 * d + 256) + 3 * 64 + 2 * d, 6.16, 524_288, 17_408),
    (DeltaNet(H=16), d, 4 * d**2 + 16 * d + 4 * 3 * d + 128, 4.01, 262_144, 24_576),
    (GatedDeltaNet(H=6), d, 6 * d**2 + 2 * 6 * d + 4 * 3 * d + 2 * 6 + 512, 6.01, 786_432, 24_576),
    (
        KDA(H=16),
        d,
        4 * d**2 + 2 * 128 * (d + d) + 16 * d + 4 * 3 * d + (16 + d) + d + 128,
        4.26,
        262_144,
        24_576,
    ),
    (MLP(), d, 3 * d * 5504, 8.06, 0, 0),
    (MLP(F=100), d, 3 * d * 100, 0.15, 0, 0),
]


@pytest.mark.parametrize("config, D, parameters, squares, memory, seen", SIZES, ids=lambda x: str(x)[:40])
def test_sizes_at_the_scale_of_the_papers(config, D, parameters, squares, memory, seen):
    layer = jax.eval_shape(lambda: config.build(D, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(layer))
    assert count == parameters
    assert round(count / D**2, 2) == pytest.approx(squares, abs=0.011)
    state = jax.eval_shape(lambda: layer.init_state(3, 1 << 20))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    tails = sum(leaf.size for leaf in jax.tree.leaves(state.tails)) if state else 0
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) - tails == 3 * memory
    assert tails == 3 * seen * 3 // 4  # three inputs are kept, the fourth is the one that comes


def built(config: LayerConfig, D: int = 64, seed: int = 0) -> Any:
    """The layer, its initial values drawn in one compiled program."""
    return jax.jit(lambda: config.build(D, rngs=nnx.Rngs(seed)))()


def test_sizes_follow_the_options():
    def shapes(config):
        layer = jax.eval_shape(lambda: config.build(64, rngs=nnx.Rngs(0)))
        return {path: p.shape for path, p in nnx.to_flat_state(nnx.state(layer))}

    grouped = shapes(GatedDeltaNet(H=4, G=2, K=8, V=16))
    assert grouped["query", "w"] == grouped["written", "key", "w"] == (64, 2, 8)
    assert grouped["written", "value", "w"] == (64, 4, 16)
    assert grouped["decay", "A_log"] == (4,) and grouped["written", "step", "w"] == (64, 4)
    assert not any("gate" in path for path in shapes(GatedDeltaNet(gate=False)))
    assert shapes(DeltaNet(gate=True))["gate", "w"] == (64, 4, 16)
    assert not any("convs" in path for path in shapes(DeltaNet(conv=0)))
    assert shapes(GLA(conv=3))["convs", "convs", 2, "w"] == (3, 4, 16)
    mamba = shapes(Mamba2(V=16, K=8, G=2))
    assert mamba["key", "w"] == (64, 2, 8) and mamba["convs", "convs", 2, "b"] == (8, 16) and mamba["skip",] == (8,)
    kda = shapes(KDA(R=6))
    assert kda["written", "decay", "down", "w"] == (64, 6) and kda["gate", "up", "b"] == (4, 16)
    assert ("written", "decay", "up", "b") not in kda


@pytest.mark.parametrize("config", [c for cls in FAMILY for c in cls.examples()], ids=str)
def test_parameters_say_what_they_are(config):
    layer = jax.eval_shape(lambda: config.build(64, rngs=nnx.Rngs(0)))
    for path, p in nnx.to_flat_state(nnx.state(layer)):
        facts = p.get_metadata()
        assert len(facts["axes"]) == len(p.shape) and p.dtype == jnp.float32
        matrix = path[-1] == "w" and path[0] != "norm"
        assert facts.get("decay", True) == matrix, path
        assert facts.get("residual", False) == (path[0] in ("out", "down")), path


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GLA(H=0), "GLA.H is 0"),
        (lambda: GLA(H=5).build(64, rngs=nnx.Rngs(0)), "GLA.H is 5.*give K, or use one of 1, 2, 4, 8"),
        (lambda: GLA(temperature=0.0), "GLA.temperature is 0.0"),
        (lambda: Retention(norm_eps=0.0), "Retention.norm_eps is 0.0: it must be above 0"),
        (lambda: Retention(H=5, K=4).build(64, rngs=nnx.Rngs(0)), "Retention.H is 5.*give V"),
        (lambda: Retention(K=3).build(64, rngs=nnx.Rngs(0)), "Retention.K is 3.*even"),
        (lambda: LinearAttention(feature_map="cosine"), "feature_map is 'cosine'.*taylor"),  # type: ignore[arg-type]
        (lambda: LinearAttention(feature_map="identity"), "normaliser is True.*set normaliser False"),
        (lambda: LinearAttention(F=8), "F is 8.*hedgehog"),
        (lambda: Mamba2(V=48).build(64, rngs=nnx.Rngs(0)), "Mamba2.V is 48.*128"),
        (lambda: Mamba2(G=3, V=16).build(64, rngs=nnx.Rngs(0)), "Mamba2.G is 3.*8 heads"),
        (lambda: DeltaNet(conv=1), "DeltaNet.conv is 1.*0 .*at least 2"),
        (lambda: GatedDeltaNet(H=4, G=3), "GatedDeltaNet.G is 3.*one of 1, 2, 4"),
        (lambda: GatedDeltaNet(H=5).build(64, rngs=nnx.Rngs(0)), "GatedDeltaNet.H is 5.*3/4"),
        (lambda: KDA(bound=-6.0), "KDA.bound is -6.0"),
        (lambda: KDA(bound=0.0), "KDA.bound is 0.0"),
        (lambda: MLP(F=0), "MLP.F is 0"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_decays_begin_where_the_papers_put_them():
    gate = MambaDecay("HK", H=400, K=50, rngs=nnx.Rngs(1))
    log_decay, step = gate(jnp.zeros([1, 1, 400, 50]))
    assert 1e-3 * 0.999 <= float(step.min()) and float(step.max()) <= 0.1 * 1.001
    middle = np.quantile(np.log(np.asarray(step)), [0.25, 0.5, 0.75])  # log-uniform between 1e-3 and 0.1
    np.testing.assert_allclose(middle, np.log(1e-3) + np.log(100) * np.array([0.25, 0.5, 0.75]), atol=0.06)
    A = np.exp(np.asarray(gate.A_log[...]))
    assert A.min() >= 0.999 and A.max() <= 16.001 and abs(A.mean() - 8.5) < 0.7
    np.testing.assert_allclose(log_decay[0, 0], -A[:, None] * np.asarray(step[0, 0]), rtol=1e-6)

    from_zero = np.exp(np.asarray(built(GatedDeltaNet(H=192), 256).decay.A_log[...]))
    assert 1e-3 * 0.999 <= from_zero.min() < 0.5 and abs(from_zero.mean() - 8) < 1.2

    bounded = MambaDecay("HK", H=4, K=50, bound=-5.0, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(bounded.A_log[...], 0)
    extremes, _ = bounded(jnp.asarray([-1e4, 1e4]).reshape(1, 2, 1, 1) * jnp.ones([1, 1, 4, 50]))
    np.testing.assert_allclose(extremes[0, :, 0, 0], [0, -5], atol=1e-6)

    x_BTD = jax.random.normal(jax.random.key(0), (4, 64, 64))
    out = jax.jit(lambda layer, x, tokens: layer(x, tokens))(built(GLA(H=2)), x_BTD, places(4, 64))
    assert 0.5 ** (1 / 16) - 0.02 < float(out.aux["decay"]) < 0.5 ** (1 / 16) + 0.02


def test_projections_and_filters_begin_at_unit_scale():
    conv = ShortConv("HK", H=50, K=40, bias=True, rngs=nnx.Rngs(0))
    w = np.asarray(conv.w[...])
    assert np.abs(w).max() <= 0.5 and abs(w.std() - 1 / np.sqrt(12)) < 0.01  # U(±1/sqrt(4))
    assert conv.b is not None and not conv.b[...].any()
    layer = built(KDA(H=4, K=32, V=32))
    assert abs(np.asarray(layer.query.w[...]).std() * np.sqrt(64) - 1) < 0.05
    assert abs(np.asarray(layer.written.decay.up.w[...]).std() * np.sqrt(32) - 1) < 0.05
    assert abs(np.asarray(layer.out.w[...]).std() * np.sqrt(4 * 32) - 1) < 0.05
    assert layer.gate.up.b is not None and not layer.gate.up.b[...].any()
    hedgehogs = built(LinearAttention(H=4, K=32, V=8, feature_map="hedgehog"))
    assert hedgehogs.key_map is not None and hedgehogs.query_map is not None
    assert abs(np.asarray(hedgehogs.key_map.w[...]).std() * np.sqrt(32) - 1) < 0.05
    assert not np.array_equal(hedgehogs.key_map.w[...], hedgehogs.query_map.w[...])


def places(B: int, T: int) -> Tokens:
    pos_BT = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (B, 1))
    return Tokens(jnp.zeros_like(pos_BT), pos_BT)


def test_norms_by_hand():
    x = jnp.asarray([[3.0, 4.0]])
    norm = RMSNorm(2, axes="V", eps=0.0)
    norm.w[...] = jnp.asarray([1.0, 2.0])
    np.testing.assert_allclose(norm(x), np.array([[3, 8]]) / np.sqrt(12.5), rtol=1e-6)
    gate = jnp.asarray([[0.0, 1.0]])
    silu = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(norm(x, gate), np.array([[0, 8 * silu]]) / np.sqrt(12.5), rtol=1e-6)
    sigmoid = RMSNorm(2, eps=0.0, activation=jax.nn.sigmoid)
    np.testing.assert_allclose(sigmoid(x, gate), np.array([[1.5, 4 * silu]]) / np.sqrt(12.5), rtol=1e-6)
    np.testing.assert_allclose(l2_norm(x), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(l2_norm(jnp.zeros([1, 3])), 0)
    np.testing.assert_allclose(
        RMSNorm(1)(jnp.asarray([[1e-3]])), [[1e-3 / np.sqrt(2e-6)]], rtol=1e-5
    )  # eps in the root


def test_norms_keep_their_statistics_wide():
    x = jnp.full([1, 4096], 300.0, jnp.bfloat16)  # in bfloat16 the sum of squares would stall near 2^24
    assert RMSNorm(4096)(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(RMSNorm(4096)(x).astype(jnp.float32), 1, rtol=1e-2)
    np.testing.assert_allclose(l2_norm(x).astype(jnp.float32), 1 / 64, rtol=1e-2)


def test_rope_turns_pairs_and_sees_only_distance(float64):
    pos_BT = jnp.asarray([[0, 1, 5, -3]], jnp.int32)
    x = jnp.tile(jnp.asarray([1.0, 0.0], jnp.float64).reshape(1, 1, 1, 2), (1, 4, 1, 1))
    np.testing.assert_allclose(rope(x, pos_BT)[0, :, 0], [[np.cos(p), np.sin(p)] for p in (0, 1, 5, 0)], atol=1e-12)
    # K = 4: channels (0, 2) turn by pos, (1, 3) by pos / sqrt(theta)
    y = rope(jnp.ones([1, 4, 1, 4], jnp.float64), pos_BT, theta=100.0)[0, 2, 0]
    a, b = 5.0, 0.5
    expected = [np.cos(a) - np.sin(a), np.cos(b) - np.sin(b), np.cos(a) + np.sin(a), np.cos(b) + np.sin(b)]
    np.testing.assert_allclose(y, expected, atol=1e-12)
    q, k = (jax.random.normal(key, (1, 4, 2, 8), jnp.float64) for key in jax.random.split(jax.random.key(0)))

    def scores(shift):
        place = jnp.arange(4, dtype=jnp.int32)[None] + shift
        return jnp.einsum("BTHK,BSHK->BHTS", rope(q, place), rope(k, place))

    np.testing.assert_allclose(scores(0), scores(777), atol=1e-9)
    assert rope(q.astype(jnp.bfloat16), pos_BT).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="K is 3"):
        rope(jnp.ones([1, 1, 1, 3]), jnp.zeros([1, 1], jnp.int32))


def filtered(x, w, pos, tail):
    """The short convolution token by token: padding is not there, a start empties the tail."""
    y, tail = np.zeros_like(x), tail.copy()
    for b, t in np.ndindex(*pos.shape):
        if pos[b, t] >= 0:
            before = tail[b] * (pos[b, t] > 0)
            seen = np.concatenate([before, x[b, t][None]])
            y[b, t], tail[b] = np.sum(seen * w[::-1], 0), seen[1:]
    return y, tail


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("T", [1, 2, 11])
def test_short_convolution_skips_padding_and_forgets(taps, T):
    random = np.random.default_rng(T)
    conv = ShortConv("HK", H=2, K=3, taps=taps, rngs=nnx.Rngs(0))
    apply = jax.jit(lambda x, pos, tail: conv(x, pos, tail))
    w, interior = np.asarray(conv.w[...]), 0
    for padding, starts in [(0.0, 0.0), (0.0, 0.3), (0.4, 0.0), (0.4, 0.2)] * 4:
        pos = np.empty([3, T], np.int32)
        for b in range(3):
            place = int(random.integers(0, 4))
            for t in range(T):
                kind = random.random()
                place = 0 if kind > 1 - starts else place
                pos[b, t] = -1 if kind < padding else place
                place += int(kind >= padding)
        interior += int(np.any((pos[:, :-1] < 0) & (pos[:, 1:] > 0)))
        x, tail = (random.standard_normal([3, n, 2, 3]).astype(np.float32) for n in (T, taps - 1))
        y, new = apply(x, pos, tail)
        expected, last = filtered(x, w, pos, tail)
        np.testing.assert_allclose(np.where((pos >= 0)[..., None, None], y, 0), expected, atol=1e-6)
        np.testing.assert_array_equal(new, last)
    assert interior or T < 3  # both paths were taken


def test_short_convolution_has_exact_gradients_through_padding():
    conv = ShortConv("D", D=2, rngs=nnx.Rngs(0), bias=True, activation=jax.nn.silu)
    pos = jnp.asarray([[3, -1, 4, -1, -1, 5, 0, -1, 1]], jnp.int32)
    kept = jnp.asarray([i for i in range(9) if pos[0, i] >= 0])
    x, tail = jax.random.normal(jax.random.key(0), (1, 9, 2)), jax.random.normal(jax.random.key(1), (1, 3, 2))

    def loss(conv, x, tail, pos, kept):
        y, new = conv(x, pos, tail)
        return jnp.sum(jnp.sin(y[:, kept])) + jnp.sum(new**2)

    pull = jax.jit(jax.grad(loss, (0, 1, 2)))
    padded = pull(conv, x, tail, pos, kept)
    dense = pull(conv, x[:, kept], tail, pos[:, kept], jnp.arange(5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), (padded[0], padded[2]), (dense[0], dense[2]))
    np.testing.assert_allclose(padded[1][:, kept], dense[1], atol=1e-6)
    np.testing.assert_array_equal(padded[1][pos < 0], 0)


@pytest.mark.parametrize("K", [1, 4, 5, 16])
def test_taylor_features_are_the_second_order_of_exp(K, float64):
    q, k = (jax.random.normal(key, (7, K), jnp.float64) for key in jax.random.split(jax.random.key(K)))
    assert taylor(q).shape[-1] == 1 + K + K * (K + 1) // 2
    s = np.sum(np.asarray(q) * np.asarray(k), -1) / np.sqrt(K)
    np.testing.assert_allclose(np.sum(taylor(q) * taylor(k), -1), 1 + s + s**2 / 2, rtol=1e-12)


def test_feature_maps_by_hand():
    x = jnp.asarray([[-1.0, 0.0, 2.0]])
    np.testing.assert_allclose(MAPS["elu"](x), [[np.exp(-1), 1, 3]], rtol=1e-6)
    np.testing.assert_array_equal(MAPS["relu"](x), [[0, 0, 2]])
    np.testing.assert_array_equal(MAPS["identity"](x), x)
    both = np.asarray(hedgehog(x))
    e = np.exp([-1, 0, 2])
    np.testing.assert_allclose(both[0, :3], e / e.sum(), rtol=1e-6)
    np.testing.assert_allclose(both[0, 3:], (1 / e) / (1 / e).sum(), rtol=1e-6)
    np.testing.assert_allclose(np.sum(both, -1), 2, rtol=1e-6)
    assert float(hedgehog(x * 100).min()) == np.float32(1e-12)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, eps=1e-6):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def remembered(q, k, v, keep=None, beta=None):
    """y_t = S_t^T q_t with S_t = (I - beta k k^T) keep S + (beta or 1) k v^T, token by token."""
    B, T, H, K = q.shape
    S, y = np.zeros([B, H, K, v.shape[-1]]), np.zeros(v.shape)
    keep = np.ones([B, T, H, 1]) if keep is None else keep.reshape(B, T, H, -1)
    for t in range(T):
        S = keep[:, t, :, :, None] * S
        write = v[:, t]
        if beta is not None:
            write = beta[:, t, :, None] * (write - np.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + k[:, t, :, :, None] * write[:, :, None]
        y[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return y


class Weights:
    """The parameters of a layer as float64 NumPy arrays, and its projections and convolutions."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __getitem__(self, path):
        node = self.layer
        for name in path.split("."):
            node = getattr(node, name)
        return np.asarray(node[...], np.float64)

    def project(self, *names):
        """x through the maps of these names, one after the other."""
        y = self.x
        for name in names:
            y = np.tensordot(y, self[name + ".w"], 1)
            if operator.attrgetter(name)(self.layer).b is not None:
                y = y + self[name + ".b"]
        return y

    def streams(self):
        """Query, key, value after their convolutions, before any activation."""
        told = "written." if hasattr(self.layer, "written") else ""
        ys = [self.project(name) for name in ("query", told + "key", told + "value")]
        for i, conv in enumerate(self.layer.convs.convs):
            pos = np.tile(np.arange(1, self.x.shape[1] + 1), (self.x.shape[0], 1))
            w = np.asarray(conv.w[...], np.float64)
            ys[i], _ = filtered(ys[i], w, pos, np.zeros([self.x.shape[0], len(w) - 1, *ys[i].shape[2:]]))
            if conv.b is not None:
                ys[i] = ys[i] + np.asarray(conv.b[...], np.float64)
        return ys

    def out(self, y):
        return np.einsum("bthv,hvd->btd", y, self["out.w"])


def linear_attention(c, w):
    q, k, v = w.streams()
    if c.conv:
        q, k, v = silu(q), silu(k), silu(v)
    if c.feature_map == "hedgehog":
        q, k = (np.einsum("bthk,hkf->bthf", a, w[name + ".w"]) for a, name in ((q, "query_map"), (k, "key_map")))
    scores = np.einsum("bthk,bshk->bhts", q, k)
    if c.feature_map == "taylor":
        s = scores / np.sqrt(q.shape[-1])
        scores = 1 + s + s**2 / 2
    elif c.feature_map != "identity":
        softmax = lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True)  # noqa: E731
        feature = {
            "elu": lambda a: np.where(a > 0, a + 1, np.exp(a)),
            "relu": lambda a: np.maximum(a, 0),
            "hedgehog": lambda a: np.concatenate([softmax(a), softmax(-a)], -1),
        }[c.feature_map]
        scores = np.einsum("bthk,bshk->bhts", feature(q), feature(k))
    scores = np.tril(scores)
    if c.normaliser:
        return w.out(np.einsum("bhts,bshv->bthv", scores / (scores.sum(-1, keepdims=True) + 1e-6), v))
    y = np.einsum("bhts,bshv->bthv", scores, v) / np.sqrt(q.shape[-1])
    return w.out(rms(y) * w["norm.w"])


def retention(c, w):
    q, k, v = w.streams()
    if c.conv:
        q, k, v = silu(q), silu(k), silu(v)
    B, T, H, K = q.shape
    angle = np.arange(T)[:, None] * c.theta ** (-np.arange(0, K, 2) / K)
    turn = np.exp(1j * angle)[None, :, None]
    q, k = (a[..., : K // 2] + 1j * a[..., K // 2 :] for a in (q, k))
    q, k = (np.concatenate([(a * turn).real, (a * turn).imag], -1) for a in (q, k))
    keep = np.broadcast_to(1 - 2.0 ** (-5 - np.arange(H)), (B, T, H))
    return w.out(rms(remembered(q / np.sqrt(K), k, v, keep), c.norm_eps) * w["norm.w"] * silu(w.project("gate")))


def gla(c, w):
    q, k, v = w.streams()
    if c.conv:
        q, k, v = silu(q), silu(k), silu(v)
    keep = sigmoid(w.project("written.decay.down", "written.decay.up")) ** (1 / c.temperature)
    y = remembered(q / np.sqrt(q.shape[-1]), k, v, keep)
    return w.out(rms(y, c.norm_eps) * w["norm.w"] * silu(w.project("gate")))


def mamba2(c, w):
    q, k, v = map(silu, w.streams())
    step = np.log1p(np.exp(w.project("step") + w["decay.dt_bias"]))
    keep = np.exp(-np.exp(w["decay.A_log"]) * step)
    H = v.shape[2]
    group = np.arange(H) // (H // c.G)
    y = remembered(q[:, :, group], k[:, :, group], v * step[..., None], keep) + w["skip"][:, None] * v
    y = y * silu(w.project("gate"))
    grouped = rms(y.reshape(*y.shape[:2], c.G, -1), 1e-5).reshape(y.shape)
    return w.out(grouped * w["norm"])


def deltanet(c, w):
    q, k, v = map(silu, w.streams())
    beta = (2 if c.negative_eigenvalues else 1) * sigmoid(w.project("written.beta"))
    y = rms(remembered(unit(q) / np.sqrt(q.shape[-1]), unit(k), v, beta=beta)) * w["norm.w"]
    return w.out(y * silu(w.project("gate")) if c.gate else y)


def gated_deltanet(c, w):
    q, k, v = map(silu, w.streams())
    group = np.arange(c.H) // (c.H // (c.G or c.H))
    beta = (2 if c.negative_eigenvalues else 1) * sigmoid(w.project("written.beta"))
    keep = np.exp(-np.exp(w["decay.A_log"]) * np.log1p(np.exp(w.project("written.step") + w["decay.dt_bias"])))
    y = remembered(unit(q)[:, :, group] / np.sqrt(q.shape[-1]), unit(k)[:, :, group], v, keep, beta)
    y = rms(y) * w["norm.w"]
    return w.out(y * silu(w.project("gate")) if c.gate else y)


def kda(c, w):
    q, k, v = map(silu, w.streams())
    beta = (2 if c.negative_eigenvalues else 1) * sigmoid(w.project("written.beta"))
    a, A = w.project("written.decay.down", "written.decay.up") + w["decay.dt_bias"], np.exp(w["decay.A_log"])[:, None]
    log_decay = -A * np.log1p(np.exp(a)) if c.bound is None else c.bound * sigmoid(A * a)
    y = remembered(unit(q) / np.sqrt(q.shape[-1]), unit(k), v, np.exp(log_decay), beta)
    return w.out(rms(y) * w["norm.w"] * sigmoid(w.project("gate.down", "gate.up")))


def mlp(c, w):
    return (silu(w.project("gate")) * w.project("up")) @ w["down.w"]


EQUATIONS: dict[type[LayerConfig], Callable[..., np.ndarray]] = {
    LinearAttention: linear_attention,
    Retention: retention,
    GLA: gla,
    Mamba2: mamba2,
    DeltaNet: deltanet,
    GatedDeltaNet: gated_deltanet,
    KDA: kda,
    MLP: mlp,
}


@pytest.mark.parametrize("config", [c for cls in EQUATIONS for c in cls.examples()], ids=str)
def test_layer_equals_its_equations(config: LayerConfig):
    layer = built(config)
    random = np.random.default_rng(0)
    shaken = [a + 0.3 * random.standard_normal(a.shape).astype(np.float32) for a in jax.tree.leaves(layer)]
    layer = jax.tree.unflatten(jax.tree.structure(layer), shaken)  # no norm weight 1, no bias 0
    x = random.standard_normal([2, 7, 64])
    with x64():
        y = jax.jit(lambda layer, x, tokens: layer(x, tokens).y_BTD)(layer, jnp.asarray(x), places(2, 7))
        assert y.dtype == jnp.float64
    expected = EQUATIONS[type(config)](config, Weights(layer, x))
    np.testing.assert_allclose(y, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
