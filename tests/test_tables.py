"""Tables trained row by row: each row of a batch by an Adam of its own, all others left alone, however layers run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from layers.engram import Engram
from layers.hashes import addresses
from layers.layer import Layer, LayerConfig, Out, Tokens
from layers.mlp import MLP
from layers.ops.tables import Table, asked, lookup
from layers.product_keys import ProductKeyMemory
from models.lm import LM, Stage
from models.over_encoding import OverEncoding
from models.parameters import Spec, flatten
from training.data import DataConfig
from training.experiment import AdamW, Experiment, Mesh, Schedule, Train
from training.flops import _inside
from training.layout import build_layout
from training.optimizer import build_optimizer
from training.run import load_model, prepare
from training.settings import ConfigError
from training.step import DeviceBatch, init_state, train_step

B, T, W, D = 4, 5, 30, 8
ENGRAM = Engram(W=W, H=1, K=4, rows=40, conv=0)
MODEL = LM(W=W, D=D, stages=(Stage((ENGRAM, MLP(F=8)), repeats=2), Stage((ENGRAM,))), tied=True)
NAMES = "stages.0.layers.0.table", "stages.1.layers.0.table"
SCHEDULE = Schedule(warmup=3, shape="constant")
CLIP = 0.05
LAZY = AdamW(lr=1e-2, b1=0.8, b2=0.9, eps=1e-3, lazy_tables=True, schedule=SCHEDULE)


def batch(seed: int, words: int = W) -> DeviceBatch:
    """A document that starts within a row, padding, and places that nothing asks for."""
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, words, (2, B, T)).astype(np.int32)
    pos = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    pos[1, 2:] -= 2
    pos[2, 3:] = -1
    return DeviceBatch(ids, pos, np.where((pos < 0) | (rng.random((B, T)) < 0.2), -100, labels).astype(np.int32))


@functools.cache
def job(optimizer=LAZY, scan="never", remat="none", **changes):
    """(structure, state, step), with numpy arrays."""
    model = dataclasses.replace(MODEL, scan_layers=scan, remat=remat)
    experiment = Experiment("A test.", model, DataConfig(T=T, B=B), optimizer, Train(clip=CLIP, **changes))
    params, structure = flatten(jax.jit(lambda: model.build(rngs=nnx.Rngs(0)))())
    built = build_optimizer(optimizer, 50, CLIP, structure.specs)
    step = jax.jit(train_step(experiment, structure, built, np.ones(W, np.int32), None))
    return structure, jax.tree.map(np.asarray, init_state(experiment, params, built)), step


def run(steps=4, **changes):
    """States after 0, 1, ... steps, and what they said."""
    _, state, step = job(**changes)
    states, said = [state], []
    for seed in range(steps):
        state, metrics = jax.tree.map(np.asarray, step(state, batch(seed)))
        states.append(state)
        said.append(metrics)
    return states, said


ADDRESSES = jax.jit(functools.partial(addresses, ENGRAM))


def rows_of(seed: int) -> set[int]:
    """Rows that a batch asks for, padding aside: the layers here have the same hashes."""
    said = batch(seed)
    rows = np.asarray(ADDRESSES(Tokens(said.ids_BT, said.pos_BT))[0])
    return set(rows[said.pos_BT >= 0].ravel().tolist())


@functools.cache
def slopes_of():
    """(parameters, batch) -> the usual gradients, of a step that differentiates the tables themselves."""
    from models.loss import score_tokens

    structure, *_ = job()

    def loss(params, said):
        s, _ = score_tokens(structure.module(params), Tokens(said.ids_BT, said.pos_BT), said.labels_BT)
        return jnp.sum(s.nll) / jnp.sum(s.asked)

    return jax.jit(jax.grad(loss))


def judge(states):
    """Adam by rows as a loop in double precision, over the gradients at the parameters that the states hold."""
    rate = [LAZY.lr * LAZY.table_lr * min((step + 1) / 4, 1) for step in range(9)]
    tables = {name: states[0]["params"][name].astype(np.float64) for name in NAMES}
    m, v = ({name: np.zeros_like(table) for name, table in tables.items()} for _ in range(2))
    times = {name: np.zeros(table.shape[:-1], int) for name, table in tables.items()}
    for step, state in enumerate(states[:-1]):
        g = {name: np.asarray(slopes_of()(state["params"], batch(step))[name], np.float64) for name in NAMES}
        norm = np.sqrt(sum(np.square(a).sum() for a in g.values()))
        assert norm > CLIP
        for name, table in tables.items():
            for repeat in range(len(table)):
                for row in rows_of(step):
                    at, slope = (repeat, row), g[name][repeat, row] * CLIP / norm
                    times[name][at] += 1
                    m[name][at] = LAZY.b1 * m[name][at] + (1 - LAZY.b1) * slope
                    v[name][at] = LAZY.b2 * v[name][at] + (1 - LAZY.b2) * slope**2
                    first = m[name][at] / (1 - LAZY.b1 ** times[name][at])
                    second = v[name][at] / (1 - LAZY.b2 ** times[name][at])
                    table[at] -= rate[step] * first / (np.sqrt(second) + LAZY.eps)
    return tables, m, v, times


def test_each_row_has_an_adam_of_its_own():
    states, _ = run()
    tables, m, v, times = judge(states)
    end = states[-1]
    for name in NAMES:
        moved = tables[name] - states[0]["params"][name]
        assert np.abs(moved).max() > 0.02 and times[name].max() > 1 and (times[name] == 1).any()
        np.testing.assert_array_equal(end["tables"]["times"][name], times[name])
        np.testing.assert_allclose(end["params"][name], tables[name], rtol=0, atol=1e-6)
        np.testing.assert_allclose(end["tables"]["mu"][name], m[name], rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(end["tables"]["nu"][name], v[name], rtol=1e-4, atol=1e-10)


def test_other_rows_stay_bit_for_bit():
    states, _ = run()
    for step, (before, after) in enumerate(zip(states[:-1], states[1:], strict=True)):
        seen = rows_of(step)
        other = [row for row in range(before["params"][NAMES[0]].shape[1]) if row not in seen]
        assert len(other) > 20
        for name in NAMES:
            for group in (("params",), ("tables", "mu"), ("tables", "nu"), ("tables", "times")):
                old, new = (functools.reduce(lambda tree, key: tree[key], group, s)[name] for s in (before, after))
                np.testing.assert_array_equal(new[:, other], old[:, other])
                assert (new[:, sorted(seen)] != old[:, sorted(seen)]).mean() > 0.6, (name, group)


@pytest.mark.slow
def test_rows_that_are_always_asked_for_have_the_usual_adam():
    """One word, a row of the batch whole: each step asks for the same rows, and the others have no gradient."""
    usual = dataclasses.replace(LAZY, lazy_tables=False)
    ends = []
    for optimizer in (LAZY, usual):
        _, state, step = job(optimizer)
        for seed in range(3):
            state, said = step(state, batch(seed, words=1))
        ends.append(jax.tree.map(np.asarray, (state["params"], said["loss"], said["grad_norm"])))
    for name, value in ends[0][0].items():
        np.testing.assert_allclose(value, ends[1][0][name], rtol=0, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(ends[0][1:], ends[1][1:], rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"scan": "always"}, marks=pytest.mark.slow),
        pytest.param({"accumulate": 2}, marks=pytest.mark.slow),
        {"scan": "always", "remat": "block", "accumulate": 2},
    ],
    ids=["scanned", "in parts", "all"],
)
def test_however_layers_are_run(changes):
    (plain, said), (other, other_said) = run(2), run(2, **changes)
    for group in ("params", "tables"):
        for got, want in zip(jax.tree.leaves(other[-1][group]), jax.tree.leaves(plain[-1][group]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(other_said[-1][name], said[-1][name], rtol=1e-5)


def test_a_step_that_is_not_finite_changes_no_row():
    _, state, step = job()
    broken = state["params"] | {"norm.w": np.full_like(state["params"]["norm.w"], np.inf)}
    after, said = jax.tree.map(np.asarray, step(state | {"params": broken}, batch(0)))
    assert said["bad"] == 1
    for group in ("params", "tables"):
        kept = (state | {"params": broken})[group]
        jax.tree.map(np.testing.assert_array_equal, after[group], kept)


def test_nothing_is_as_large_as_a_table():
    """Of a step in donated buffers: XLA's temporary memory, and its operations, do not know the table's size."""
    sizes = {}
    for lazy, rows in ((True, 1000), (True, 100_000), (False, 100_000)):
        engram = dataclasses.replace(ENGRAM, rows=rows)
        model = LM(W=W, D=D, stages=(Stage((engram,), repeats=2),), tied=True)
        experiment = Experiment("A test.", model, DataConfig(T=T, B=B), train=Train(clip=CLIP))
        _, structure = flatten(jax.eval_shape(lambda model=model: model.build(rngs=nnx.Rngs(0))))
        built = build_optimizer(dataclasses.replace(LAZY, lazy_tables=lazy), 50, CLIP, structure.specs)
        params = {name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for name, s in structure.specs.items()}
        state = jax.eval_shape(lambda p, e=experiment, b=built: init_state(e, p, b), params)
        step = train_step(experiment, structure, built, np.ones(W, np.int32), None)
        said = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch(0)))
        memory = jax.jit(step, donate_argnums=0).lower(state, said).compile().memory_analysis()
        sizes[lazy, rows] = memory.temp_size_in_bytes
    assert abs(sizes[True, 100_000] - sizes[True, 1000]) < 10_000
    assert sizes[False, 100_000] > 2 * 200_000 * 4 * 4  # what the usual step needs, so that the measure is one


def test_averages_leave_the_tables_out():
    _, state, step = job(ema=0.5)
    after, _ = jax.eval_shape(step, state, batch(0))
    for held in (state, after):
        assert held["ema"].keys() == held["params"].keys() - set(NAMES) and "embed" in held["ema"]


@pytest.mark.slow
def test_a_lazy_run_goes_on_bit_for_bit(tmp_path):
    engram = Engram(H=1, K=4, rows=50, conv=0)
    changes = {
        "model": LM(W=257, D=8, stages=(Stage((engram,)),), tied=True),
        "optimizer": AdamW(lazy_tables=True, schedule=Schedule(warmup=2, shape="constant")),
        "train__ema": 0.5,
        "train__eval_every": 0,
    }
    whole = tiny.trained(tmp_path, "whole", train__steps=6, **changes)
    tiny.trained(tmp_path, "cut", train__steps=3, **changes)
    cut = tiny.trained(tmp_path, "cut", train__steps=6, **changes)
    assert tiny.arrays(cut) == tiny.arrays(whole)
    model, *_ = load_model(tmp_path / "cut")
    assert {name: np.asarray(x).tobytes() for name, x in flatten(model)[0].items()} == tiny.arrays(whole)


def test_a_lookup_by_hand():
    table = jnp.arange(12.0).reshape(2, 3, 2)
    rows = jnp.asarray([[2, 0], [5, 1]])
    want = np.asarray(table)[1, [[2, 0], [2, 1]]]
    np.testing.assert_array_equal(lookup(table[1], rows), want)
    lent = Table(table, jnp.int32(1), jnp.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(lookup(lent, rows), want + np.arange(8.0).reshape(2, 2, 2))
    slopes = jax.grad(lambda lent: jnp.sum(lookup(lent, rows) ** 2), allow_int=True)(lent)
    assert not slopes.array.any()
    np.testing.assert_array_equal(slopes.slots_NK, 2 * (want.reshape(4, 2) + np.arange(8.0).reshape(4, 2)))
    np.testing.assert_array_equal(asked(rows, jnp.asarray([0, -1])), [[2, 0], [-1, -1]])


@dataclasses.dataclass(frozen=True)
class Silent(LayerConfig):
    def build(self, D: int, *, rngs: nnx.Rngs) -> "SilentLayer":
        return SilentLayer(D)


class SilentLayer(Layer):
    def __init__(self, D: int):
        self.table = nnx.Param(jnp.ones([8, D]), axes="WK", decay=False, table=True)

    def __call__(self, x_BTD, tokens, state=None):
        return Out(lookup(self.table[...], tokens.ids_BT), state)


def test_a_layer_that_does_not_say_its_rows_is_named():
    model = LM(W=W, D=D, stages=(Stage((Silent(),)),))
    experiment = Experiment("A test.", model, DataConfig(T=T, B=B), LAZY)
    params, structure = flatten(model.build(rngs=nnx.Rngs(0)))
    built = build_optimizer(LAZY, 50, CLIP, structure.specs)
    step = train_step(experiment, structure, built, np.ones(W, np.int32), None)
    with pytest.raises(ValueError, match='0.layers.0 does not say which rows it reads: give its aux "rows/table"'):
        jax.eval_shape(step, init_state(experiment, params, built), batch(0))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in (j for value in equation.params.values() for j in _inside(value)):
            yield from equations(inner)


def test_a_lookup_on_the_host():
    """A step's look-up: what was fetched is on the device, the table is not."""
    table = np.random.default_rng(0).normal(size=(2, 30, 4)).astype(np.float32)
    layout = build_layout(Mesh(data=1, tables="host"), B, T)
    spec = Spec((2, 30, 4), "LWK", False, False, "", True)
    spread, lies = layout.spread({"t": spec})["t"], layout.params({"t": spec})["t"]
    assert spread.host and lies.memory_kind == "pinned_host"
    rows, slots = np.asarray([[3, 50, 0]], np.int32), np.ones([3, 4], np.float32)

    def fetch(table, rows, slots):
        return lookup(Table(table, jnp.int32(1), slots, spread), rows)

    found = jax.jit(fetch, in_shardings=(lies, layout.batch, layout.replicated))(
        jax.device_put(table, lies), rows, slots
    )
    assert found.sharding.memory_kind == "device"
    np.testing.assert_array_equal(found, table[1, [[3, 29, 0]]] + 1)


@pytest.mark.slow
@pytest.mark.parametrize("scan", ["never", "always"])
def test_tables_on_the_host_are_the_same_run(tmp_path, scan):
    """Rows are fetched from there and written back there; tables, moments and counts never leave it, resumed or not.

    One table has repeats, the other, of the embedding, has none.
    """
    engram, ngrams = Engram(H=1, K=4, rows=150, conv=0), OverEncoding(H=1, K=4, rows=250)
    stages = (Stage((engram,), repeats=2),)
    changes = {
        "model": LM(W=257, D=8, stages=stages, tied=True, scan_layers=scan, ngrams=ngrams),
        "optimizer": AdamW(lazy_tables=True, schedule=Schedule(warmup=2, shape="constant")),
        "train__eval_every": 0,
    }
    device = tiny.trained(tmp_path, "device", train__steps=4, **changes)
    changes["mesh"] = Mesh(data=1, tables="host")
    tiny.trained(tmp_path, "host", train__steps=2, **changes)
    host = tiny.trained(tmp_path, "host", train__steps=4, **changes)
    assert host["evaluation"]["loss"] == pytest.approx(device["evaluation"]["loss"], rel=1e-6)
    for name, bits in tiny.arrays(device).items():
        here, there = (np.frombuffer(b, np.float32) for b in (tiny.arrays(host)[name], bits))
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-6)
    job = prepare(tiny.experiment(tmp_path, train__steps=4, **changes))
    state, _ = job.step(job.init(), job.dataset.batch(0, 0))
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(state)]
    for name, leaf in leaves:
        assert leaf.sharding.memory_kind == ("pinned_host" if name.endswith("table']") else "device"), name
    assert sum(name.endswith("table']") for name, _ in leaves) == 2 * 4
    rows = {leaf.shape[-2] for name, leaf in leaves if name.endswith("table']") and leaf.shape[-1] == 4}
    program = jax.make_jaxpr(job.step)(state, job.dataset.batch(0, 0)).jaxpr
    sent = [v.aval.shape for e in equations(program) if e.primitive.name == "device_put" for v in e.outvars]
    assert len(rows) == 2 and len(sent) > 12 and not any(rows & {*shape} for shape in sent)


def test_what_the_host_cannot_is_named(tmp_path):
    with pytest.raises(ValueError, match="mesh.tables is 'host', .* set optimizer.lazy_tables to True"):
        tiny.experiment(tmp_path, mesh=Mesh(data=1, tables="host"))
    with pytest.raises(ValueError, match="mesh.tables is 'host', for a mesh of one device, and this has 8"):
        build_layout(Mesh(data=8, tables="host"), 8, 8)


PRODUCT_KEYS = ProductKeyMemory(H=2, keys=6, top=3, K=4)


@functools.cache
def first_step(lazy: bool):
    """(parameters before, after a first step) of two blocks of product keys."""
    model = LM(W=W, D=D, stages=(Stage((PRODUCT_KEYS,), repeats=2),), tied=True)
    optimizer = AdamW(lr=1e-2, lazy_tables=lazy, schedule=SCHEDULE)
    experiment = Experiment("A test.", model, DataConfig(T=T, B=B), optimizer, Train(clip=CLIP))
    params, structure = flatten(jax.jit(lambda: model.build(rngs=nnx.Rngs(0)))())
    built = build_optimizer(optimizer, 50, CLIP, structure.specs)
    step = jax.jit(train_step(experiment, structure, built, np.ones(W, np.int32), None))
    state, _ = step(init_state(experiment, params, built), batch(0))
    return jax.tree.map(np.asarray, (params, state["params"]))


def test_addresses_that_depend_on_the_stream_are_trained_by_rows_too():
    """Adam's first step is the usual one for the rows of the batch, and no row that rests has moved in either."""
    (before, lazy), (_, dense) = first_step(True), first_step(False)
    for name, want in dense.items():
        np.testing.assert_allclose(lazy[name], want, rtol=2e-4, atol=2e-6, err_msg=name)
    moved = np.abs(lazy["stages.0.layers.0.values"] - before["stages.0.layers.0.values"]).max(-1) > 0
    assert 0 < moved.sum() < moved.size


def test_a_table_of_several_layers_is_not_trained_by_rows(tmp_path):
    """One line, before anything is trained."""
    model = LM(W=257, D=8, stages=(Stage((dataclasses.replace(PRODUCT_KEYS, shared=True),), repeats=2),), tied=True)
    with pytest.raises(ConfigError, match=r"^optimizer.lazy_tables: stages.0.layers.0.values is shared .*shared=False"):
        prepare(tiny.experiment(tmp_path, model=model, optimizer=LAZY))
