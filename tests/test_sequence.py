"""Time over devices: the same numbers as on one, and what is sent is states, ends and keys, not tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from laws import collectives
from reading import B, copy, grain, pad, places, same, same_tree, stack, stream, tokens
from test_laws import name

import layers
from layers.conv import ShortConv
from layers.mlp import MLP
from layers.ops import chunk_select, test_time
from layers.ops import fast_weights as fw
from layers.ops.attention import attention
from layers.ops.chunk_select import Near, chunk_attention
from layers.ops.memory_forms import Rule, State
from layers.ops.place import on
from layers.ops.recurrence import recurrence
from layers.ops.test_time import Gate, test_time_memory
from models.lm import LM, Stage
from models.loss import score
from tpu.collectives import read as read_collectives
from training.experiment import Mesh
from training.layout import build_layout

test_time_memory.__test__ = test_time.__test__ = False  # they are no tests
T, H, K, V = 60, 4, 6, 10  # pieces of 15
# A document that goes on behind padding, also over an edge; starts within pieces and on an edge; an end of padding.
POS = np.stack([pad(places(T), (13, 17), (40, 42)), pad(places(T, 20, 30, 33), (55, 60))]).astype(np.int32)


@functools.cache
def four():
    """Tokens over four devices, heads over two. Not made on import: on a GPU this file is read and not run."""
    return build_layout(Mesh(data=1, sequence=4, model=2), B, T).mesh


def both(function, *arrays, mesh=None):
    """(results and slopes in all arrays, of one device; the same of tokens on four, heads on two; that program)"""
    mesh = mesh or four()
    rng = np.random.default_rng(9)
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda a: rng.normal(size=a.shape), jax.eval_shape(function, *arrays))

        def slopes(*arrays):
            def weighed(*arrays):
                out = function(*arrays)
                return sum(jax.tree.leaves(jax.tree.map(lambda y, w: jnp.sum(y * w), out, weights))), out

            return jax.value_and_grad(weighed, tuple(range(len(arrays))), has_aux=True)(*arrays)

        def spread(*arrays):
            with on(mesh):
                return slopes(*arrays)

        by_tokens = [jax.tree.map(lambda a: lies(a, mesh), tree) for tree in (arrays, jax.eval_shape(slopes, *arrays))]
        program = jax.jit(spread, in_shardings=by_tokens[0], out_shardings=by_tokens[1]).lower(*arrays).compile()
        return jax.jit(slopes)(*arrays), program(*jax.device_put(arrays, by_tokens[0])), program


def lies(a, mesh):
    """Rows, tokens and heads over devices, of what has tokens."""
    if a.shape[1:2] != (T,):
        return NamedSharding(mesh, P())
    rows = "data" if a.shape[0] % mesh.shape["data"] == 0 else None
    return NamedSharding(mesh, P(rows, "sequence", *({H: "model"}.get(n) for n in a.shape[2:])))


def sent(program) -> set[int]:
    """The sizes of axes of all that is sent. (A sum over groups of one device sends nothing.)"""
    told = [(shape, groups) for _, shape, groups in collectives(program.as_text())]
    return {n for shape, groups in told for n in shape if not groups or max(map(len, groups)) > 1}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


DECAYS = {"none": None, "a head": (B, T, H), "a channel": (B, T, H, K)}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("erases", [False, True], ids=["adds", "erases"])
def test_a_recurrence(decay, erases):
    q, k, w, state = normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, H, V), normal(3, B, H, K, V)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g = () if DECAYS[decay] is None else (-0.2 * np.abs(normal(4, *DECAYS[decay])),)

    def read(q, k, w, state, *g):
        return recurrence(q, k, w, 0.7 * k if erases else None, *g, state=state, pos=POS, chunk=8)

    want, got, program = both(read, q, k, w, state, *g)
    same_tree(got, want, "four pieces against one")
    assert not sent(program) & {T, T // 4}


def test_an_exclusive_read_with_a_bonus():
    q, k, w, bonus = normal(0, B, T, H, K), normal(1, B, T, H, K) / 3, normal(2, B, T, H, V), normal(3, H, K)

    def read(q, k, w, bonus):
        return (
            recurrence(q, k, w, 0.3 * k, read="exclusive", erase="undecayed", bonus_HK=None, chunk=8)[0]
            + (recurrence(q, k, w, read="exclusive", bonus_HK=bonus, chunk=8)[0])
        )

    want, got, _ = both(read, q, k, w, bonus)
    same_tree(got, want, "four pieces against one")


@pytest.mark.parametrize("taps, dilation", [(4, 1), (3, 3), (2, 17)], ids=["short", "dilated", "longer than a piece"])
def test_a_convolution(taps, dilation):
    conv = ShortConv("HK", taps=taps, dilation=dilation, H=H, K=K, rngs=nnx.Rngs(0))
    x, w, tail = normal(0, B, T, H, K), normal(1, taps, H, K), normal(2, B, (taps - 1) * dilation, H, K)

    def read(x, w, tail):
        twin = jax.tree.unflatten(jax.tree.structure(conv), [w])
        y, tail = twin(x, POS, tail)
        return jnp.where((POS >= 0)[..., None, None], y, 0), tail

    want, got, program = both(read, x, w, tail)
    same_tree(got, want, "four pieces against one")
    assert not sent(program) & {T, T // 4}


@pytest.mark.parametrize("G", [1, 2], ids=["one group of keys", "two"])
@pytest.mark.parametrize("window", [None, 2, 4, 14, 16, 21, 40])
@pytest.mark.parametrize("pos", [POS, np.stack([places(T), places(T, 20, 30, 33)])], ids=["padding", "none"])
def test_attention(pos, window, G):
    """Without padding what is near is all; where padding lies between, a window may reach further."""
    q, k, v = normal(0, B, T, H, K), normal(1, B, T, G, K), normal(2, B, T, G, V)
    time = np.where(pos >= 0, np.cumsum(pos >= 0, 1) - 1, -1).astype(np.int32)
    since = np.maximum.accumulate(np.where(pos == 0, time, 0), 1).astype(np.int32)
    read = functools.partial(attention, query_time=time, key_time=time, since=since, window=window)
    want, got, program = both(read, q, k, v)
    same_tree(got, want, "four pieces against one")
    near = window is not None and window < 40  # 40 reach into all pieces
    assert (" conditional(" in program.as_text()) == near
    assert ("collective-permute" in program.as_text()) == near


def test_a_window_beside_keys_that_are_always_seen():
    q, k, v = (normal(i, B, T, H, K) for i in range(3))
    free, known, told = normal(3, B, T, H, K), normal(4, B, 3, H, K), normal(5, B, 3, H, K)
    want, got, _ = both(lambda *a: attention(*a[:3], window=7, always=a[3:]), q, k, v, free, known, told)
    same_tree(got, want, "four pieces against one")


def test_heads_that_a_mesh_does_not_divide_stay_together():
    """Two devices on `model`: four heads would go apart, and their one group of keys would not."""
    q, k, v = normal(0, B, T, H, K), normal(1, B, T, 1, K), normal(2, B, T, 1, V)
    want, got, _ = both(lambda q, k, v: attention(q, k, v, window=9), q, k, v)
    same_tree(got, want, "four pieces against one")


def test_a_loss_that_is_taken_in_pieces():
    """Each device has a share of every piece, and what is sent has no tokens."""
    model = LM(W=52, D=8, stages=(Stage((MLP(),)),)).build(rngs=nnx.Rngs(0))
    labels = np.random.default_rng(1).integers(0, 52, (B, T)).astype(np.int32)
    shape, weights = jax.tree.structure(model), [np.asarray(w, np.float64) for w in jax.tree.leaves(model)]

    def read(hidden, *weights):
        # Five pieces of twelve, and forty on one device.
        scores = score(jax.tree.unflatten(shape, weights), hidden, labels, limit=156)
        return scores.nll, scores.squared_log_z

    want, got, program = both(read, normal(0, B, T, 8), *weights)
    same_tree(got, want, "four pieces against one")
    whole = jax.jit(lambda hidden: score(model, hidden, labels)[0])(normal(0, B, T, 8).astype(np.float32))
    np.testing.assert_allclose(want[0][1][0], whole, rtol=1e-4)
    assert sent(program) <= {1, B, 3, 8, 26, 52}  # rows, a share of a piece, widths, words
    assert "while" in program.as_text()


# Devices on data, sequence and model.
ORDERED = {"rows": (1, 2, 2), "heads": (2, 2, 2), "neither": (1, 4, 2), "data alone": (2, 1, 1)}


def ordered(axes):
    """(want, got, program) of four heads of a memory that has to be read in order, in chunks of 7 tokens."""
    mesh = build_layout(Mesh(axes[0], 1, *axes[1:]), 2 * B, T).mesh
    q, k, v, lr = normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, H, K), normal(3, B, T, H, 1) ** 2 / 20
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    first, last, scale = normal(4, H, K, 11) / 3, normal(5, H, 11, K) / 3, normal(6, H, K)
    state = State(*({"w0": normal(i, B, H, K, 11) / 3, "w1": normal(i, B, H, 11, K) / 3} for i in (7, 8, 9)))
    rule = Rule(fw.network("mlp", 2), fw.l2, chunk=7)

    def read(q, k, v, lr, first, last, scale, state):
        gates = {name: Gate(lr, -lr, -lr) for name in ("w0", "w1")}
        outer = {"scale": scale, "shift": scale}
        start = {"w0": first, "w1": last}
        return test_time_memory(rule, q, k, v, gates, (start, None), outer, pos=POS, state=state)

    return both(read, q, k, v, lr, first, last, scale, state, mesh=mesh)


@pytest.mark.parametrize("axes", ORDERED.values(), ids=list(ORDERED))
def test_a_memory_that_is_read_in_order(axes):
    """Rows over sequence, or else heads over sequence x model. Nothing is sent within loops, no slopes either."""
    want, got, program = ordered(axes)
    same_tree(got, want, "pieces against one")
    assert not sent_within_loops(program)
    kinds = {kind for kind, _, groups in collectives(program.as_text())}
    assert ("all-to-all" in kinds) == (axes in (ORDERED["rows"], ORDERED["heads"]))


def test_what_is_sent_within_loops_is_seen(monkeypatch):
    """Left to the partitioner, each chunk sends."""
    monkeypatch.setattr(test_time, "sizes", dict)
    want, got, program = ordered(ORDERED["data alone"])
    same_tree(got, want, "pieces against one")
    assert sent_within_loops(program)


def sent_within_loops(program) -> bool:
    """Whether a loop of a compiled program sends: one that turns several times, or as often as its rows ask for."""
    account = read_collectives(program.as_text(), [0] * 8)
    return account.uncounted > 0 or any(one.times > 1 for one in account.collectives)


@pytest.mark.parametrize("weight", ["product", "union", "gated"])
def test_chunks_that_queries_choose(weight, monkeypatch):
    """The text is sent; a device reads for its own queries, a block of five after the other."""
    N, G, F = 20, (1 if weight == "product" else H), (9 if weight == "product" else K)
    q, ask, summary = normal(0, B, T, H, K), normal(1, B, T, G, F), normal(2, B, N, G, F)
    text, content = [normal(3 + i, B, T, H, K) for i in range(4)], normal(7, B, N, H, K)
    last = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    first, upto = np.maximum(last - 4, 0), last // 3

    def read(q, ask, summary, content, *text):
        k, v, near_k, near_v = (a.swapaxes(1, 2) for a in text)
        how = {"weight": weight, "implementation": "chunked", "block": 5, "reach": 5, "content_BNHV": content}
        near = Near(near_k, near_v, first, last)
        found = chunk_attention(q, k, v, ask, summary, upto // 2, upto, chunk=3, top=2, near=near, **how)
        return [y for y in found if y is not None]

    want, got, program = both(read, q, ask, summary, content, *text)
    same_tree(got, want, "four pieces against one")
    assert not sent_within_loops(program)
    assert T in sent(program)
    if weight == "product":  # left to the partitioner, each block sends
        monkeypatch.setattr(chunk_select, "in_pieces", lambda T: False)
        assert sent_within_loops(both(read, q, ask, summary, content, *text)[2])


@pytest.mark.parametrize("heads", [3, 4])
def test_heads_or_rows_that_do_not_divide(heads):
    """Three heads over two devices, three rows over two: those stay together."""
    mesh = build_layout(Mesh(data=1, sequence=2, model=2), B, T).mesh
    rows = 3
    q, k, v, lr = (normal(i, rows, T, heads, 5) for i in range(4))
    weights = normal(4, heads, 5, 5) / 3

    def read(q, k, v, lr, weights):
        gates = {"w0": Gate(0.1 * jax.nn.sigmoid(lr[..., :1]))}
        return test_time_memory(
            Rule(fw.network("mlp", 1), fw.l2, chunk=7), q, k / 3, v, gates, ({"w0": weights}, None)
        )[0]

    want, got, _ = both(read, q, k, v, lr, weights, mesh=mesh)
    same_tree(got, want, "pieces against one")


def examples():
    """A layer with a recurrence and one with a window; `make test-slow` has all."""
    now = {"GatedDeltaNet", "Attention"}
    for cls in layers.discover():
        for config in cls.examples():
            marks = () if config == cls.examples()[0] and cls.__name__ in now else (pytest.mark.slow,)
            yield pytest.param(config, marks=marks, id=name(config))


@pytest.mark.parametrize("config", list(examples()))
def test_a_layer(config):
    """Rows, tokens and heads over two devices each: y and all slopes as on one, in double precision."""
    n = 2 * (grain(config) + 3)
    mesh = build_layout(Mesh(data=2, sequence=2, model=2), B, n).mesh
    said = tokens(np.stack([pad(places(n, n // 2 + 2), (7, 9), (n - 2, n)), places(n, 3, n // 2)]))
    live = (said.pos_BT >= 0)[..., None]
    x_BTD, dy_BTD = stream(n), np.where(live, stream(n, 1), 0)

    def slopes(layer, x_BTD, said):
        y_BTD, back = jax.vjp(lambda layer, x: layer(x, said).y_BTD, layer, x_BTD)
        return jnp.where(live, y_BTD, 0), back(dy_BTD)

    def spread(layer, x_BTD, said):
        with on(mesh):
            return slopes(layer, x_BTD, said)

    with jax.enable_x64(True):
        layer = copy(stack(config))
        by_tokens = NamedSharding(mesh, P("data", "sequence"))
        program = jax.jit(spread, in_shardings=(NamedSharding(mesh, P()), by_tokens, by_tokens))
        got, want = program(layer, x_BTD, said), jax.jit(slopes)(layer, x_BTD, said)
    same(got[0], want[0], "y")
    same_tree(got[1], want[1], "slopes")
