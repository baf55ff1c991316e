"""Momentum balanced over rows and columns, against its definition as a loop over rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.engram import Engram
from models.lm import LM, Stage
from models.parameters import flatten
from training.experiment import AdamW, Muon, Schedule
from training.optimizer import build_optimizer
from training.sinkhorn import balance

W, K = 40, 6


def judge(u, turns=11):
    """[W, K] in double precision, a row or a column at a time."""
    u = np.array(u, np.float64)
    norms = np.array([np.sqrt((row**2).sum()) for row in u])
    for r in range(len(u)):
        if norms[r] <= 1e-3 * norms.mean():
            u[r] = 0
    for turn in range(turns):
        for line in u if turn % 2 == 0 else u.T:
            size = np.sqrt((line**2).sum())
            if size > 0:
                line /= size
    return u


def table(seed, rows=W):
    """Rows of sizes from 1e-5 to 1, one of zeros, and a column that stands out."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(rows, K)) * 10 ** np.linspace(-5, 0, rows)[:, None] * np.array([1, 1, 1, 1, 1, 20.0])
    u[7] = 0
    return u


def test_rows_and_columns_after_each_turn():
    u = table(0)
    kept = judge(u).any(1)
    assert 0.3 < kept.mean() < 0.8 and not kept[7]
    with jax.enable_x64(True):
        for turns in (0, 1, 2, 5, 11):
            got = np.asarray(balance(jnp.asarray(u), turns))
            np.testing.assert_allclose(got, judge(u, turns), rtol=1e-10, atol=1e-14)
            assert not got[~kept].any()
            rows, columns = np.linalg.norm(got, axis=1)[kept], np.linalg.norm(got, axis=0)
            if turns % 2:
                np.testing.assert_allclose(rows, 1, rtol=1e-12)
            elif turns:
                np.testing.assert_allclose(columns, 1, rtol=1e-12)
        np.testing.assert_allclose(columns, np.sqrt(kept.sum() / K), rtol=0.05)  # no channel has more than another
        assert np.ptp(np.linalg.norm(balance(jnp.asarray(u), 1), axis=0)) > 1  # as they do where turns are few
        stacked = balance(jnp.stack([jnp.asarray(u), jnp.asarray(table(1))]))
        np.testing.assert_allclose(stacked[1], judge(table(1)), rtol=1e-10, atol=1e-14)
        assert not balance(jnp.zeros([W, K])).any()


@pytest.mark.parametrize("config", [AdamW, Muon])
def test_three_steps_with_momentum(config):
    """Of a table in a model: at table_lr times the rate of all else, with one buffer, the rest with Adam's two."""
    model = LM(W=50, D=16, stages=(Stage((Engram(W=50, H=1, K=K, rows=20, conv=0),)),), tied=True)
    params, structure = flatten(model.build(rngs=nnx.Rngs(0)))
    name = "stages.0.layers.0.table"
    rows = params[name].shape[1]
    constant = Schedule(warmup=0, shape="constant")
    optimizer = build_optimizer(config(lr=0.01, tables="sinkhorn", schedule=constant), 10, None, structure.specs)
    state = jax.jit(optimizer.init)(params)
    assert len([a for a in jax.tree.leaves(state) if a.shape == params[name].shape]) == 1
    update, m = jax.jit(optimizer.update), np.zeros([rows, K])
    for step in range(3):
        g = table(step, rows)
        grads = {n: jnp.ones_like(p) for n, p in params.items()} | {name: jnp.asarray(g, jnp.float32)[None]}
        updates, state = update(grads, state, params)
        m = 0.95 * m + g
        want = -0.18 * 5 * 0.01 * np.sqrt(K) * judge(g + 0.95 * m)
        np.testing.assert_allclose(updates[name][0], want, rtol=1e-3, atol=1e-6)
    moved = np.asarray(updates[name][0])
    np.testing.assert_allclose(np.sqrt((moved[moved.any(1)] ** 2).mean(1)), 0.18 * 0.05, rtol=1e-4)


def test_what_cannot_be_lazy_is_named():
    with pytest.raises(ValueError, match="Muon.lazy_tables is True and Muon.tables 'sinkhorn'") as error:
        Muon(lazy_tables=True, tables="sinkhorn")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="AdamW.tables is 'sgd': it must be one of adam, sinkhorn"):
        AdamW(tables="sgd")  # type: ignore[arg-type]
