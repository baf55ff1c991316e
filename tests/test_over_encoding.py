"""Over-encoding: an average by hand, documents and padding that n-grams do not cross, decoding by the last few ids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from reading import pad, places, tokens

from configs import engram, over_encoding
from layers.layer import Tokens
from layers.mlp import MLP
from layers.ops import ngram
from models.lm import LM, Stage
from models.over_encoding import OverEncoder, OverEncoding
from models.parameters import flatten
from training.checkpoint import CheckpointError
from training.experiment import AdamW

W, D, T = 50, 16, 12
NGRAMS = OverEncoding(W=W, N=3, H=2, K=4, rows=40, pad=3)


@pytest.mark.parametrize("average", ["mean", "root"])
def test_the_average_by_hand(average):
    encoder = dataclasses.replace(NGRAMS, average=average).build(D, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, W, T).astype(np.int32)
    x_TD = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)
    drawn = ngram.multipliers(0, 0, 3, W)
    primes = ngram.primes((40, 40), 2, (0,))[0]
    table, w = np.asarray(encoder.table[...]), np.asarray(encoder.out.w[...]).reshape(4, 4, D)
    want = x_TD.copy()
    for t in range(T):
        back = [int(ids[t - i]) if t >= i else 3 for i in range(3)]
        first, part = 0, 0
        for order in (2, 3):
            mix = 0
            for i in range(order):
                mix ^= back[i] * drawn[i]
            for p in primes[order - 2]:
                want[t] += table[first + mix % p] @ w[part]
                first, part = first + p, part + 1
    want /= 5 if average == "mean" else 5**0.5
    said = Tokens(jnp.asarray(ids)[None], jnp.arange(T, dtype=jnp.int32)[None])
    got = jax.jit(OverEncoder.__call__)(encoder, x_TD[None], said).y_BTD[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_ngrams_end_with_their_document():
    """A row of documents with padding between and inside: each reads as it does alone, and padding touches no row."""
    encoder = NGRAMS.build(D, rngs=nnx.Rngs(0))
    packed = tokens(np.stack([pad(places(20, 7), (0, 2), (4, 5)), places(20)]))
    x_BTD = np.zeros([2, 20, D], np.float32)
    encode = jax.jit(OverEncoder.__call__)
    out = encode(encoder, x_BTD, packed)
    pos, ids = packed.pos_BT[0], packed.ids_BT[0]
    assert (np.asarray(out.aux["rows/table"])[packed.pos_BT < 0] == -1).all()
    starts = np.flatnonzero(pos == 0)
    assert len(starts) == 2
    for start, end in zip(starts, [*starts[1:], 20], strict=True):
        where = [t for t in range(start, end) if pos[t] >= 0]
        alone = Tokens(jnp.asarray(ids[where])[None], jnp.arange(len(where), dtype=jnp.int32)[None])
        np.testing.assert_array_equal(encode(encoder, x_BTD[:1, : len(where)], alone).y_BTD[0], out.y_BTD[0, where])


def test_any_cut_of_time():
    """Whole, in pieces, one by one: the same logits and last ids; a state has them after those of the layers."""
    model = LM(W=W, D=D, stages=(Stage((MLP(F=8),), repeats=2),), tied=True, ngrams=NGRAMS).build(rngs=nnx.Rngs(0))
    said = tokens(np.stack([pad(places(T, 5), (0, 1), (7, 9)), places(T, 3)]))
    read = jax.jit(lambda said, state: model(said, state)[:2])
    train = jax.jit(lambda said: model(said).y_BTD)
    empty = model.init_state(2, T)
    assert empty[-1].shape == (2, 2) and (np.asarray(empty[-1]) == 3).all()
    whole, end = read(said, empty)
    valid = said.pos_BT >= 0
    np.testing.assert_allclose(train(said)[valid], whole[valid], rtol=1e-5, atol=1e-5)
    for pieces in ([5, 1, 6], [1] * T):
        state, parts, done = empty, [], 0
        for n in pieces:
            piece = Tokens(*(jnp.asarray(a[:, done : done + n]) for a in said))
            y, state = read(piece, state)
            parts.append(y)
            done += n
        np.testing.assert_allclose(np.concatenate(parts, 1)[valid], whole[valid], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(state[-1], end[-1])
    apart = jax.jit(lambda said, state: model.unstacked()(said, state).y_BTD)(said, empty)
    np.testing.assert_allclose(apart[valid], whole[valid], rtol=1e-5, atol=1e-5)


def test_the_twins_have_equal_tables():
    tables, primes = [], []
    for config in (engram.config, over_encoding.config):
        specs = flatten(jax.eval_shape(lambda c=config: c.model.build(rngs=nnx.Rngs(0))))[1].specs
        tables.append(sum(np.prod(spec.shape) for spec in specs.values() if spec.table))
        holders = (config.model.ngrams, *(layer for stage in config.model.stages for layer in stage.pattern))
        known = [h.constants()["primes"] for h in holders if h is not None and h.constants()]
        primes.append(sorted(p for layer in known for order in layer for p in order))
    assert tables[0] == tables[1] > 3_000_000 and primes[0] == primes[1]
    for config in (engram.config, over_encoding.config):  # but for what they are twins in
        assert (config.data, config.optimizer, config.train) == (
            engram.config.data,
            engram.config.optimizer,
            engram.config.train,
        )


def test_a_run_with_ngrams_resumes_and_knows_its_hashes(tmp_path, monkeypatch):
    changes = {
        "model": LM(W=257, D=8, stages=(Stage((MLP(F=8),)),), tied=True, ngrams=OverEncoding(H=1, K=4, rows=50)),
        "optimizer": AdamW(lazy_tables=True),
        "train__eval_every": 0,
    }
    run = tiny.trained(tmp_path, "run", train__steps=3, **changes)
    params, structure = flatten(run["model"])
    assert [name for name, spec in structure.specs.items() if spec.table] == ["ngrams.table"]
    first = changes["model"].build(rngs=nnx.Rngs(params=jax.random.key(0, impl="threefry2x32"))).ngrams.table[...]
    moved = (np.asarray(params["ngrams.table"]) != np.asarray(first)).any(1)
    assert 0.2 < moved.mean() < 1
    monkeypatch.setattr(OverEncoding, "constants", lambda self: {"multipliers": [1, 3, 5]})
    with pytest.raises(CheckpointError, match=r"model.ngrams: \w+ = .*would be read at other rows"):
        tiny.trained(tmp_path, "run", train__steps=4, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OverEncoding(N=1), "OverEncoding.N is 1"),
        (lambda: OverEncoding(rows=1), "OverEncoding.rows is 1"),
        (lambda: OverEncoding(average="sum"), "OverEncoding.average is 'sum': it must be one of mean, root"),
        (lambda: OverEncoding(pad=257), "OverEncoding.pad is 257: it must be an id below W = 257"),
        (
            lambda: LM(W=60, D=8, stages=(Stage((MLP(),)),), ngrams=NGRAMS),
            "OverEncoding.W is 50: it must be the model's",
        ),
    ],
)
def test_bad_ngrams_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
