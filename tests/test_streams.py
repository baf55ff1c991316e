"""Residual streams: hyper-connections and Engram's branches against plain loops, one model however it is run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import x64
from flax import nnx
from reading import cast, places, same
from test_lm import Mean

from layers.engram import Engram
from layers.layer import Tokens
from layers.mlp import MLP
from layers.ops import ngram
from layers.prefix import PrefixLinearAttention
from layers.product_keys import ProductKeyMemory
from models.lm import LM, Stage
from models.parameters import flatten, is_variable
from models.streams import HyperConnection, sinkhorn, write
from training.experiment import Mesh, Muon, Schedule
from training.layout import build_layout
from training.log import read
from training.summary import parameter_count

B, T, W, D, G = 2, 7, 40, 16, 3  # D: that of Mean
LOOKED_UP = Engram(W=W, N=2, H=1, K=4, rows=20, conv=2, streams=G)
STAGES = (Stage((Mean(), LOOKED_UP, MLP(F=12)), repeats=2),)
CONFIG = LM(W=W, D=D, stages=STAGES, scan_layers="never", streams=G)
TOKENS = Tokens(
    np.random.default_rng(0).integers(0, W, (B, T)).astype(np.int32),
    np.stack([np.arange(T), places(T, 4)]).astype(np.int32),
)
LABELS = np.random.default_rng(1).integers(0, W, (B, T))
pytestmark = pytest.mark.xdist_group("streams")  # compiled programs are shared
HYPER = pytest.mark.parametrize("hyper", ["mhc", "hc"])


def structure_of(config):
    return flatten(jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))[1]


def moved(module, seed=0):
    """In float64, each Param moved off its initial value."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape), cast(module, np.float64))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Hyper-connections


def met(connection, x_GD, y_D):
    """What a layer reads of one token's streams, and the streams after it has said y, equation by equation."""
    w, bias = np.asarray(connection.w[...]), np.asarray(connection.bias[...])
    scales = [float(s[...]) for s in (connection.read_scale, connection.write_scale, connection.keep_scale)]
    reading, writing, keeping = np.zeros(G), np.zeros(G), np.zeros((G, G))
    norm = lambda v: v / np.sqrt(np.mean(v**2) + connection.eps)  # noqa: E731
    if connection.hyper == "mhc":
        said = norm(np.concatenate(list(x_GD))) @ w
        for g in range(G):
            reading[g] = sigmoid(scales[0] * said[g] + bias[g])
            writing[g] = 2 * sigmoid(scales[1] * said[G + g] + bias[G + g])
            for h in range(G):
                keeping[g, h] = np.exp(scales[2] * said[2 * G + g * G + h] + bias[2 * G + g * G + h])
        for _ in range(20):
            for h in range(G):
                keeping[:, h] /= keeping[:, h].sum()
            for g in range(G):
                keeping[g] /= keeping[g].sum()
    else:
        for g in range(G):
            said = np.tanh(norm(x_GD[g]) @ w)  # of stream g: how it is read, written to, and kept by each h
            reading[g] = scales[0] * said[0] + bias[g]
            writing[g] = scales[1] * said[1] + bias[G + g]
            for h in range(G):
                keeping[h, g] = scales[2] * said[2 + h] + bias[2 * G + h * G + g]
    z_D = sum(reading[g] * x_GD[g] for g in range(G))
    return z_D, np.stack([sum(keeping[g, h] * x_GD[h] for h in range(G)) + writing[g] * y_D for g in range(G)])


@HYPER
def test_connections_by_hand(hyper):
    """And the slopes, some of which are written by hand, along a few ways to move everything."""
    connection = moved(HyperConnection(G, D, 1, hyper, eps=1e-6))
    rng = np.random.default_rng(1)
    x_BTGD, y_BTD = rng.standard_normal((B, T, G, D)), rng.standard_normal((B, T, D))
    answer = rng.standard_normal((B, T, D)), rng.standard_normal((B, T, G, D))

    def run(connection, x, y):
        z, paths = connection(x)
        return z, write(x, y, paths)

    @jax.jit
    def both(*given):
        said, back = jax.vjp(run, *given)
        return said, back(answer)

    def by_hand(connection, x, y):
        said = [met(connection, x[place], y[place]) for place in np.ndindex(B, T)]
        return [np.stack(part).reshape(B, T, *part[0].shape) for part in zip(*said, strict=True)]

    given = connection, x_BTGD, y_BTD
    with x64():
        (z_BTD, new_BTGD), slopes = jax.device_get(both(*given))
    want_z, want_new = by_hand(*given)
    same(z_BTD, want_z, "what is read", 1e-12)
    same(new_BTGD, want_new, "the streams", 1e-12)
    for _ in range(3):
        way = jax.tree.map(lambda a: rng.standard_normal(a.shape), given)
        ends = [by_hand(*jax.tree.map(lambda a, d, e=e: a + e * d, given, way)) for e in (1e-5, -1e-5)]
        rise = sum(np.sum((up - down) * a) for up, down, a in zip(*ends, answer, strict=True)) / 2e-5
        found = sum(np.sum(a * d) for a, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(way), strict=True))
        assert found == pytest.approx(rise, rel=1e-6)


def test_what_is_kept_is_doubly_stochastic():
    """Also of logits that leave a row, a column or all but one number nothing; with gradients."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(6, 1, 4, 4)) * np.array([0, 1, 3, 0, 0, 300])[:, None, None, None]
    logits[3, :, 1], logits[4, :, :, 2] = -500, -500
    keep = np.asarray(jax.jit(sinkhorn)(logits.astype(np.float32)))[:, 0]
    slopes = np.asarray(jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(sinkhorn(a)))))(logits.astype(np.float32)))
    assert np.isfinite(keep).all() and np.isfinite(slopes).all() and (keep >= 0).all()
    np.testing.assert_allclose(keep.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(keep[:5].sum(-2), 1, rtol=1e-2)
    assert np.ptp(keep[2]) > 0.1


@HYPER
def test_streams_start_as_the_ordinary_network(hyper):
    """The same parameters besides, the same function; and slopes that tell streams apart, or they never would part."""
    config = LM(W=W, D=D, stages=(Stage((Mean(), MLP(F=12)), repeats=2),), norm_eps=1e-30, scan_layers="always")
    several = dataclasses.replace(config, streams=4, hyper=hyper)
    params = jax.jit(lambda: [flatten(c.build(rngs=nnx.Rngs(0)))[0] for c in (config, several)])()
    params = [{name: np.asarray(a, np.float64) for name, a in each.items()} for each in params]
    assert [name for name in params[1] if name not in params[0]] == [n for n in params[1] if ".connections." in n]
    for name, a in params[0].items():
        np.testing.assert_array_equal(params[1][name], a)
    firsts = params[1]["stages.0.connections.0.bias"][:, :4], params[1]["stages.0.connections.1.bias"][:, :4]
    assert np.argmax(firsts, -1).tolist() == [[0, 2], [1, 3]]  # layers 0, 2 and 1, 3

    def spoken(config, params):
        h = structure_of(config).module(params).hidden(TOKENS).y_BTD
        return jnp.sum(jnp.sin(3 * h)), h

    with x64():
        (_, one), _ = jax.jit(lambda p: (spoken(config, p), None))(params[0])
        slopes, four = jax.jit(jax.grad(functools.partial(spoken, several), has_aux=True))(params[1])
    same(four, one, "hidden", 1e-11)
    written = np.asarray(slopes["stages.0.connections.1.bias"])[0, 4:8]
    assert np.ptp(written) > 1e-3 * np.abs(written).max() > 0


@pytest.mark.slow
def test_regions_and_shared_tables_start_so_too():
    """Read ahead, at few places, with a table that all repeats share."""
    shared = ProductKeyMemory(H=1, keys=4, top=2, K=4, V=8, shared=True)
    pattern = (PrefixLinearAttention(H=2, K=4, V=8, chunk=8, feature_map="elu"), shared)
    config = LM(W=W, D=D, stages=(Stage(pattern, repeats=2),), norm_eps=1e-30, scan_layers="always")
    region, at_BN = np.arange(T)[None] < np.array([[3], [2]]), np.array([[6, 3], [0, 5]], np.int32)

    def spoken(config):
        model = cast(config.build(rngs=nnx.Rngs(0)), np.float64)
        read = jax.jit(lambda model: model.hidden(TOKENS, at_BN=at_BN, prefix_BT=region).y_BTD)
        assert any(v.get_metadata().get("shared") for v in jax.tree.leaves(model, is_leaf=is_variable))
        with x64():
            return np.asarray(read(model))

    same(spoken(dataclasses.replace(config, streams=2)), spoken(config), "hidden", 1e-9)


# Engram


def looked_up(layer, x_BTGD, said):
    """Engram of several streams, from hash to filter: arXiv 2601.07372, eq. 1-6."""
    c, streams = layer.config, layer.config.streams
    table, key, value, taps = (np.asarray(a[...]) for a in (layer.table, layer.key.w, layer.value.w, layer.conv.w))
    norms = [np.asarray(n.w[...]).reshape(streams, -1) for n in (layer.query_norm, layer.key_norm, layer.norm)]
    width = x_BTGD.shape[-1]
    drawn, primes = ngram.multipliers(c.seed, c.layer, c.N, c.W), ngram.primes((c.rows,) * (c.N - 1), c.H, c.layers)
    v, y = np.zeros_like(x_BTGD), np.zeros_like(x_BTGD)
    norm = lambda a: a / np.sqrt(np.mean(a**2) + 1e-6)  # noqa: E731
    for b, t in np.ndindex(said.pos_BT.shape):
        pos, e, first = said.pos_BT[b, t], [], 0
        for order in range(2, c.N + 1):
            mix = 0
            for i in range(order):
                mix ^= (int(said.ids_BT[b, t - i]) if pos >= i else c.pad) * drawn[i]
            for p in primes[c.layer][order - 2]:
                e.append(table[first + mix % p])
                first += p
        e = np.concatenate(e)
        for g in range(streams):
            k_D = e @ key[:, g * width : (g + 1) * width]
            s = norm(x_BTGD[b, t, g]) * norms[0][g] @ (norm(k_D) * norms[1][g]) / np.sqrt(width)
            s = np.sign(s) * np.sqrt(max(abs(s), 1e-6)) if c.gate == "signed_sqrt" else s
            v[b, t, g] = sigmoid(s) * (e @ value)
    for b, t, g in np.ndindex(v.shape[:3]):
        filtered = 0
        for j in range(c.conv):
            if said.pos_BT[b, t] >= j * c.N:
                filtered += taps[j, g * width : (g + 1) * width] * norm(v[b, t - j * c.N, g]) * norms[2][g]
        y[b, t, g] = v[b, t, g] + filtered * sigmoid(filtered)
    return y


@pytest.mark.parametrize("gate", ["signed_sqrt", "plain"])
def test_engram_of_several_streams_by_hand(gate):
    config = Engram(W=W, N=3, H=2, K=4, rows=30, conv=3, pad=3, streams=G, gate=gate)
    layer, long = moved(config.build(G * D, rngs=nnx.Rngs(0))), 17
    said = Tokens(
        np.random.default_rng(3).integers(0, W, (B, long)).astype(np.int32),
        np.stack([places(long, 5), places(long)]).astype(np.int32),
    )
    x_BTGD = np.random.default_rng(4).standard_normal((B, long, G, D))
    with x64():
        got = jax.jit(lambda layer, x: layer(x, said).y_BTD)(layer, x_BTGD.reshape(B, long, G * D))
    same(got, looked_up(layer, x_BTGD, said).reshape(got.shape), "y", 1e-11)
    one = flatten(dataclasses.replace(config, streams=1).build(D, rngs=nnx.Rngs(0)))[0]
    many = flatten(layer)[0]
    assert one.keys() == many.keys() and one["value.w"].shape == many["value.w"].shape == (16, D)
    assert one["table"].shape == many["table"].shape and many["key.w"].shape == (16, G * D)


# The model


@functools.cache
def params64():
    params = jax.jit(lambda: flatten(CONFIG.build(rngs=nnx.Rngs(0)))[0])()
    rng = np.random.default_rng(5)
    return {name: np.asarray(a, np.float64) + 0.2 * rng.standard_normal(a.shape) for name, a in params.items()}


@functools.cache
def program(unstacked=False, hyper="mhc", **changes):
    """(logits, gradients); (logits, state) of pieces; places: compiled where they are asked for."""
    structure = structure_of(dataclasses.replace(CONFIG, hyper=hyper, **changes))

    def model_of(params):
        model = structure.module(params)
        return model.unstacked() if unstacked else model

    def train(params, tokens):
        def objective(params):
            logits = model_of(params)(tokens).y_BTD
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[..., None], -1)), logits

        return jax.grad(objective, has_aux=True)(params)[::-1]

    empty = jax.eval_shape(lambda p: model_of(p).init_state(B, T), params64())
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), empty)
    return jax.jit(train), jax.jit(lambda p, tokens, state: model_of(p)(tokens, state)[:2]), state


VARIANTS = {"scanned": {"scan_layers": "always", "remat": "block"}, "apart": {"unstacked": True}}


@pytest.mark.parametrize("name", ["scanned", pytest.param("apart", marks=pytest.mark.slow)])
def test_one_model_however_it_is_run(name):
    with x64():
        logits, slopes = jax.tree.map(np.asarray, program()[0](params64(), TOKENS))
        found, found_slopes = program(**VARIANTS[name])[0](params64(), TOKENS)
    same(found, logits, "logits", 1e-10)
    assert found_slopes.keys() == slopes.keys()
    for path, slope in slopes.items():
        assert np.abs(slope).max() > 0, path
        same(found_slopes[path], slope, path, 1e-8)


def test_any_cut_of_time_and_no_token_ahead():
    train, go_on, empty = program()
    with x64():
        whole = np.asarray(train(params64(), TOKENS)[0])
        state, said, start = empty, [], 0
        for n in (3, 1, 3):
            piece = Tokens(*(a[:, start : start + n] for a in TOKENS))
            logits, state = go_on(params64(), piece, state)
            said, start = [*said, logits], start + n
        same(np.concatenate(said, 1), whole, "logits of pieces", 1e-5)  # states are float32
        other = TOKENS.ids_BT.copy()
        other[:, 5:] = (other[:, 5:] + 1) % W
        changed = np.asarray(train(params64(), Tokens(other, TOKENS.pos_BT))[0])
    same(changed[:, :5], whole[:, :5], "logits before a change", 1e-14)
    assert np.abs(changed[:, 5:] - whole[:, 5:]).max() > 1e-3


def test_places_and_a_layer_that_is_left_out():
    """Few places alone, whether the last layer that mixes reads streams or a mix; a skipped layer writes nothing."""
    at_BN = np.array([[6, 1], [0, 3]], np.int32)
    structure = structure_of(CONFIG)
    mixed = structure_of(dataclasses.replace(CONFIG, stages=(Stage((LOOKED_UP, Mean(), MLP(F=12))),)))
    silent = params64() | {"stages.0.layers.1.value.w": np.zeros_like(params64()["stages.0.layers.1.value.w"])}

    @jax.jit
    def run(params, silent):
        ask = lambda p, **options: structure.module(p).hidden(TOKENS, **options).y_BTD  # noqa: E731
        rng = np.random.default_rng(7)
        other = mixed.module({name: rng.normal(size=spec.shape) * 0.3 for name, spec in mixed.specs.items()})
        return (
            (ask(params, skip=("0.*.1",), at_BN=at_BN), ask(silent)),
            (other.hidden(TOKENS, at_BN=at_BN).y_BTD, other.hidden(TOKENS).y_BTD),
        )

    with x64():
        for few, whole in run(params64(), silent):
            same(few, np.take_along_axis(np.asarray(whole), at_BN[..., None], 1), "hidden at places", 1e-12)


def test_one_stream_has_no_connections():
    names = structure_of(LM(W=W, D=D, stages=(Stage((Mean(), MLP(F=12))),))).specs.keys()
    assert names == {
        *("embed", "head", "norm.w", "stages.0.norms.0.w", "stages.0.norms.1.w"),
        *(f"stages.0.layers.{name}.w" for name in ("0.value", "0.out", "1.gate", "1.up", "1.down")),
    }


@HYPER
def test_parameters_of_connections(hyper):
    specs = structure_of(dataclasses.replace(CONFIG, hyper=hyper)).specs
    of = {name: spec for name, spec in specs.items() if ".connections." in name}
    each = G * D * (2 * G + G * G) if hyper == "mhc" else D * (2 + G)
    assert parameter_count(of) == 4 * (each + 2 * G + G * G + 3)  # the Engram of either repeat has none
    assert all(spec.decay == name.endswith(".w") for name, spec in of.items())  # 2409.19606, section 4
    for name, spec in of.items():  # no device holds a part of the streams
        layout = build_layout(Mesh(data=2, model=2), 2, 8, jax.devices()[:4])
        assert len(spec.axes) == len(spec.shape) and not any(layout.spec(spec)), name


def test_descent_learns():
    train, params, losses = program()[0], params64(), []
    for _ in range(12):
        with x64():
            logits, slopes = jax.device_get(train(params, TOKENS))
        chosen = np.take_along_axis(logits, LABELS[..., None], -1)[..., 0]
        losses.append(np.mean(np.log(np.exp(logits).sum(-1)) - chosen))
        params = {name: a - 0.2 * slopes[name] for name, a in params.items()}
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
@HYPER
def test_a_run_learns(hyper, tmp_path):
    stages = (Stage((Engram(H=1, K=4, rows=50, conv=0, streams=2), MLP(F=16), MLP(F=16))),)
    muon = Muon(lr=1e-2, schedule=Schedule(warmup=5, shape="constant"))
    model = LM(W=257, D=16, stages=stages, streams=2, hyper=hyper)
    trained = tiny.trained(tmp_path, "run", model=model, optimizer=muon, train__steps=15, train__eval_every=0)
    losses = [line["loss"] for line in read(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    first = HyperConnection(2, 16, 1, hyper, eps=1e-6).bias[...]
    found = flatten(trained["model"])[0]["stages.0.connections.1.bias"]
    assert found.shape == (1, 8) and np.abs(np.asarray(found)[0] - first).max() > 1e-3


@pytest.mark.slow
def test_a_mesh_changes_nothing(tmp_path):
    stages = (Stage((Engram(H=2, K=4, rows=50, streams=2), MLP(F=16)), repeats=2),)
    losses = []
    for name, mesh in (("one", Mesh(data=1)), ("four", Mesh(data=1, fsdp=2, model=2))):
        model = LM(W=257, D=16, stages=stages, streams=2)
        tiny.trained(tmp_path, name, model=model, mesh=mesh, train__steps=6, train__eval_every=0)
        losses.append([line["loss"] for line in read(tmp_path / name) if "loss" in line])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LM(W=W, D=D, stages=STAGES, streams=2), "Engram.streams is 3: .* LM.streams = 2, or 1 to read a mix"),
        (lambda: LM(W=W, D=D, stages=STAGES), "Engram.streams is 3: it must be the model's, LM.streams = 1"),
        (lambda: LM(W=W, D=D, stages=STAGES, streams=0), "LM.streams is 0: it must be at least 1"),
        (lambda: LM(W=W, D=D, stages=STAGES, streams=3, hyper="none"), "LM.hyper is 'none': .* one of mhc, hc"),
        (lambda: Engram(streams=0), "Engram.streams is 0: it must be at least 1"),
        (
            lambda: LOOKED_UP.build(64, rngs=nnx.Rngs(0)),
            "Engram.streams is 3, which does not divide .*, 64: use one of",
        ),
    ],
)
def test_impossible_streams_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
