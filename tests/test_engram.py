"""Engram: the public demo's hashes to the last bit, its gate and filter by hand, a table with its own optimiser."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from laws import collectives
from reading import B, D, apply, pad, places, stream, tokens

from layers.conv import ShortConv
from layers.engram import Engram
from layers.layer import Tokens
from layers.mlp import MLP
from layers.ops import ngram
from models.lm import LM, Stage
from models.parameters import flatten
from training.checkpoint import CheckpointError
from training.experiment import AdamW, Muon, Schedule
from training.optimizer import build_optimizer

# Golden values: computed with the public demo's rules in int64 (NumPy 2.5).
PRIMES = ((11, 13), (17, 19))


def test_rows_by_hand():
    config = Engram(W=50, N=3, H=2, rows=(10, 16), multipliers=(3, 5, 7))
    assert config.hashes().primes == PRIMES
    layer = config.build(D, rngs=nnx.Rngs(0))
    rows_BTR, last_BN = layer.addresses(Tokens(jnp.asarray([[10, 25, 32]]), jnp.asarray([[0, 1, 2]])))
    golden = [[8, 4, 13, 11], [0, 4, 2, 7], [7, 3, 6, 15]]
    np.testing.assert_array_equal(rows_BTR[0], np.asarray(golden) + [0, 11, 24, 41])  # each hash has rows of its own
    np.testing.assert_array_equal(last_BN, [[25, 32]])


def test_primes_are_taken_once():
    assert ngram.primes((10, 12), 2, (0, 1)) == {0: PRIMES, 1: ((23, 29), (31, 37))}
    demo = ngram.primes((646_400,) * 2, 8, (1, 15))
    assert demo[1][0] == (646403, 646411, 646421, 646423, 646433, 646453, 646519, 646523)
    assert [sum(map(sum, demo[layer])) for layer in (1, 15)] == [10_344_164, 10_348_242]


def test_multipliers_are_the_demos():
    assert ngram.multipliers(0, 1, 3, 1000) == (7593627661414631, 479593001838623, 3563315849468963)
    assert ngram.multipliers(0, 1, 3, 99092) == (76632096046245, 4839876093313, 35959672319349)
    for words in (257, 1 << 20):
        assert all(a % 2 and a * (words - 1) < 2**63 for a in ngram.multipliers(5, 3, 4, words))


@pytest.mark.parametrize("rows", [50, 1 << 14, 8_388_000])
def test_32_bits_give_the_numbers_of_64(rows):
    rng = np.random.default_rng(rows)
    drawn, primes = ngram.multipliers(0, 1, 3, 1 << 20), ngram.primes((rows, rows), 2, (0,))[0]
    ids_NBT = rng.integers(0, 1 << 20, (3, 2, 500)).astype(np.int32)
    ids_NBT[:, 0, :2] = [[0, (1 << 20) - 1]] * 3
    want = ngram.rows_on_host(ids_NBT, drawn, primes)
    np.testing.assert_array_equal(jax.jit(lambda ids: ngram.rows(ids, drawn, primes))(ids_NBT), want)
    turned = ngram.rows_on_host(ids_NBT[::-1], drawn, primes)
    assert (turned != want).mean() > 0.9  # which came first matters


def test_texts_of_one_meaning_share_an_id():
    texts = ["Apple", " apple", "APPLE", "Café", "cafe", "\t\n", " ", "  ", "ﬁ", "fi", "\x1c", "", "ΟΔΟΣ", "οδοσ"]
    same = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 6]
    np.testing.assert_array_equal(ngram.canonical(texts), same)
    broken = ngram.canonical(["\ufffd", "\ufffd", "a"], ["<0x80>", "<0x81>", "a"])
    np.testing.assert_array_equal(broken, [0, 1, 2])


def test_canonical_ids_come_from_a_file(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(50) // 2)
    config = Engram(W=50, H=2, K=4, rows=50, canonical=str(path), pad=7, multipliers=(3, 5, 7))
    assert config.hashes().pad == 3 and re.fullmatch("[0-9a-f]{64}", config.constants()["canonical"])
    layer = config.build(D, rngs=nnx.Rngs(0))
    said = tokens(np.stack([places(6)] * 2))
    other = Tokens(said.ids_BT ^ 1, said.pos_BT)  # the other one of each pair
    np.testing.assert_array_equal(layer.addresses(said)[0], layer.addresses(other)[0])
    wide = Engram(W=50, H=2, K=4, rows=50, canonical=str(path))
    assert wide.hashes().multipliers == ngram.multipliers(0, 0, 3, 25)  # as large as 25 meanings allow


def test_the_gate_by_hand():
    """D 2, e = h = (1, 1), W_K = 1, W_V = diag(2, 3): s = sqrt 2."""
    for gate, share in (("signed_sqrt", 0.766599), ("plain", 0.804430)):
        layer = Engram(W=50, N=2, H=1, K=2, rows=20, gate=gate, conv=4).build(2, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
        layer.key.w[...], layer.value.w[...] = jnp.eye(2), jnp.diag(jnp.asarray([2.0, 3.0]))
        layer.table[...] = jnp.ones_like(layer.table[...])
        one = Tokens(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
        y = layer(jnp.ones((1, 1, 2)), one).y_BTD
        np.testing.assert_allclose(y[0, 0], [2 * share, 3 * share], rtol=1e-5)  # the filter starts as zeros
    four = Engram(W=50, N=2, H=1, K=4, rows=20, conv=0).build(4, rngs=nnx.Rngs(0))
    four.key.w[...] = jnp.eye(4)
    for sign, share in ((1, 0.804430), (-1, 0.195570)):  # s = ±2
        _, gate = four.fuse(sign * jnp.ones((1, 1, 4)), jnp.ones((1, 1, 4)))
        assert float(gate) == pytest.approx(share, rel=1e-5)
    _, gate = four.fuse(jnp.zeros((1, 1, 4)), jnp.ones((1, 1, 4)))
    assert float(gate) == 0.5


def test_taps_are_apart():
    conv = ShortConv("D", D=1, taps=4, dilation=3, rngs=nnx.Rngs(0))
    conv.w[...] = jnp.asarray([4.0, 3.0, 2.0, 1.0])[:, None]  # the current token first
    x = jnp.zeros((1, 14, 1)).at[0, 2].set(1)
    pos = jnp.arange(14, dtype=jnp.int32)[None]
    y, tail = conv(x, pos)
    assert {int(t): float(y[0, t, 0]) for t in np.flatnonzero(y)} == {2: 4, 5: 3, 8: 2, 11: 1}
    assert tail.shape == (1, 9, 1)


def test_padding_and_documents_do_not_reach_into_ngrams():
    layer = Engram(W=50, H=2, K=4, rows=50).build(D, rngs=nnx.Rngs(0))
    T = 20
    packed = tokens(np.stack([pad(places(T, 7), (0, 2), (4, 5)), places(T)]))
    rows = np.asarray(layer.addresses(packed)[0])[0]
    row, ids = packed.pos_BT[0], packed.ids_BT[0]
    for start in np.flatnonzero(row == 0):
        after = np.flatnonzero((np.arange(T) > start) & (row == 0))
        end = after[0] if len(after) else T
        where = np.array([t for t in range(start, end) if row[t] >= 0])
        alone = Tokens(jnp.asarray(ids[where])[None], jnp.arange(len(where), dtype=jnp.int32)[None])
        np.testing.assert_array_equal(rows[where], layer.addresses(alone)[0][0])


def test_an_empty_table_says_nothing():
    layer = Engram(W=50, H=2, K=4, rows=50).build(D, rngs=nnx.Rngs(0))
    layer.table[...] = jnp.zeros_like(layer.table[...])
    said = tokens(np.stack([places(9)] * B))
    y, _ = apply(layer, stream(9).astype(np.float32), said, None)
    assert not y.any()
    start = Engram(W=50, H=2, K=4, rows=50, identity=True).build(D, rngs=nnx.Rngs(0))
    y, _ = apply(start, stream(9).astype(np.float32), said, None)
    assert not y.any()


@pytest.mark.parametrize("config", [AdamW, Muon])
def test_tables_have_a_group_of_their_own(config):
    """Adam's first step is its rate, in the sign of the gradient: five times for tables, which do not decay."""
    model = LM(W=50, D=16, stages=(Stage((Engram(W=50, H=1, K=4, rows=20), MLP())),))
    params, structure = flatten(model.build(rngs=nnx.Rngs(0)))
    table = "stages.0.layers.0.table"
    assert [name for name, spec in structure.specs.items() if spec.table] == [table]
    constant = Schedule(warmup=0, shape="constant")
    optimizer = build_optimizer(config(lr=0.01, schedule=constant), 10, 1.0, structure.specs)
    grads = {name: jnp.full_like(p, 1e-3 if name == table else 1.0) for name, p in params.items()}
    update, begin = jax.jit(optimizer.update), jax.jit(optimizer.init)(params)
    updates, state = update(grads, begin, params)
    np.testing.assert_allclose(updates[table], -0.05, rtol=1e-3)
    rest = updates["norm.w"]
    np.testing.assert_allclose(rest, -0.01, rtol=1e-3)
    still = {name: jnp.zeros_like(p) for name, p in params.items()}
    updates, _ = update(still, begin, params)
    assert not updates[table].any() and updates["embed"].any()
    # The table's gradient, of norm below 1, is not scaled down with the rest.
    moments = [a for a in jax.tree.leaves(state) if getattr(a, "shape", ()) == params[table].shape]
    np.testing.assert_allclose(moments[0], 0.1 * 1e-3, rtol=1e-5)
    assert float(optax.tree.norm(grads)) > 10


def test_a_table_that_devices_share_is_never_gathered():
    """Rows over `model`, batch over `data`: neither pass sends anything as large as the table, or as its shard."""
    layer = Engram(W=50, H=2, K=4, rows=3000).build(D, rngs=nnx.Rngs(0))
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda a: jax.device_put(a, whole), layer)
    placed.table[...] = jax.device_put(layer.table[...], NamedSharding(mesh, PartitionSpec("model", None)))
    said, x_BTD = tokens(np.stack([places(9)] * B)), stream(9).astype(np.float32)
    by_rows = NamedSharding(mesh, PartitionSpec("data"))

    def slopes(layer, x_BTD, said):
        return jax.grad(lambda layer: jnp.sum(jnp.square(layer(x_BTD, said).y_BTD)))(layer)

    arguments = placed, *jax.device_put((x_BTD, said), by_rows)
    as_placed = jax.tree.map(lambda a: a.sharding, placed)  # as a training step hands parameters on
    program = jax.jit(slopes, out_shardings=as_placed).lower(*arguments).compile()
    rows = layer.table[...].shape[0]
    columns = [{0, 2}, {1, 3}]  # devices that hold the same rows
    for kind, shape, groups in collectives(program.as_text()):
        assert rows not in shape, f"{kind} of the table"
        if rows // 2 in shape:  # the sum of the gradient's shards over the batch is all that may be of that size
            assert kind == "all-reduce" and all(any(g <= c for c in columns) for g in groups), (kind, shape, groups)
    want = jax.jit(slopes)(layer, x_BTD, said)
    for got, wanted in zip(jax.tree.leaves(program(*arguments)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_other_hashes_is_refused(tmp_path, monkeypatch):
    """As when another NumPy draws other multipliers: the config is the same, the rows would not be."""
    model = LM(W=257, D=16, stages=(Stage((Engram(H=1, K=4, rows=50), MLP())),))
    known = model.stages[0].pattern[0].constants()
    assert json.loads(json.dumps(known)) == known  # what comes back from a checkpoint equals what is computed
    tiny.trained(tmp_path, "run", model=model, train__steps=4, train__eval_every=0)
    monkeypatch.setattr(Engram, "constants", lambda self: {"multipliers": [1, 3, 5]})
    message = r"model.stages.0.pattern.0: \w+ = .*would be read at other rows"
    with pytest.raises(CheckpointError, match=message) as caught:
        tiny.trained(tmp_path, "run", model=model, train__steps=6)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Engram(N=1), "Engram.N is 1"),
        (lambda: Engram(conv=1), "Engram.conv is 1"),
        (lambda: Engram(W=1 << 21), "Engram.W is 2097152: hashes are exact up to 1048576 words"),
        (lambda: Engram(pad=300), "Engram.pad is 300: it must be an id below W = 257"),
        (lambda: Engram(layer=2), r"Engram.layers is \(0,\): it must hold layer = 2"),
        (lambda: Engram(rows=(10, 10, 10)), "Engram.rows is .*give one number, or 2 for N = 3"),
        (lambda: Engram(rows=1 << 24), "Engram.rows is 16777216"),
        (lambda: Engram(multipliers=(3, 5)), "Engram.multipliers are 2: they must be N = 3"),
        (lambda: Engram(canonical="nowhere.npy").build(64, rngs=nnx.Rngs(0)), "Engram.canonical is 'nowhere.npy'"),
        (lambda: LM(W=60, D=16, stages=(Stage((Engram(W=50),)),)), "Engram.W is 50: it must be the model's, LM.W = 60"),
        (lambda: dataclasses.replace(AdamW(), table_lr=0.0), "AdamW.table_lr is 0.0"),
    ],
)
def test_bad_engrams_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
