"""Tables that devices share: looked up without ever being sent, also where their rows lie on the axis of the batch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from laws import collectives
from test_layout import B, Noise, T, W

from layers.engram import Engram
from layers.mlp import MLP
from layers.ops.tables import Spread, Table, lookup
from models.lm import LM, Stage
from models.parameters import Spec
from training.experiment import AdamW, Experiment, Mesh, Schedule
from training.layout import build_layout
from training.run import prepare

ROWS, K = 8 * 11, 3  # fewer than a batch asks for: the partitioner would rather send the table, as is seen below
MESHES = {
    "fsdp": (Mesh(fsdp=8), ("fsdp",)),
    "both": (Mesh(data=2, fsdp=2, model=2), ("fsdp", "model")),
    "model": (Mesh(data=4, model=2), ("model",)),
    "beside tokens": (Mesh(fsdp=4, sequence=2), ("fsdp",)),
}


def table_shaped(program, rows, width):
    """The kinds of collectives of a table [.., rows, width], or of a part of one that devices share."""
    parts = {(rows // n, width) for n in (1, 2, 4, 8)}
    return [kind for kind, sent, _ in collectives(program.as_text()) if parts & set(itertools.pairwise(sent))]


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "of a stage"])
@pytest.mark.parametrize("name", MESHES)
def test_a_lookup_of_shared_rows(name, stacked):
    """Values and slopes of the plain look-up, of rows that occur often or nowhere; nothing sent is a table's."""
    layout, axes = build_layout(MESHES[name][0], B, T), MESHES[name][1]
    rng = np.random.default_rng(0)
    shape = (2, ROWS, K) if stacked else (ROWS, K)
    table, weights = rng.normal(size=shape).astype(np.float32), rng.normal(size=(B, T, 2, K)).astype(np.float32)
    rows = rng.integers(-2, ROWS + 2, (B, T, 2)).astype(np.int32)
    rows[:, 0] = 7
    spread = Spread(layout.mesh, axes)

    def value(table, rows, weights, spread):
        lent = Table(table, jnp.int32(1) if stacked else None, None, spread)
        found = lookup(lent, rows)
        return jnp.sum(found * weights), found

    def both(spread, table, rows, weights):
        (_, found), slopes = jax.value_and_grad(functools.partial(value, spread=spread), has_aux=True)(
            table, rows, weights
        )
        return found, slopes

    want = jax.jit(functools.partial(both, None))(table, np.clip(rows, 0, ROWS - 1), weights)
    lies = NamedSharding(layout.mesh, P(*[None] * (len(shape) - 2), axes, None))
    placed = {"in_shardings": (lies, layout.batch, layout.batch), "out_shardings": (layout.batch, lies)}
    program = jax.jit(functools.partial(both, spread), **placed).lower(table, rows, weights).compile()
    # Replicas of the rows, for other parts of the batch, have a gradient each: their sum is all that may be sent.
    assert table_shaped(program, ROWS, K) == ["all-reduce"] * (name != "fsdp")
    if name == "fsdp":
        plain = jax.jit(functools.partial(both, None), **placed).lower(table, rows, weights).compile()
        assert "all-gather" in table_shaped(plain, ROWS, K)
    found, slopes = program(*jax.device_put((table, rows, weights), placed["in_shardings"]))
    np.testing.assert_array_equal(found, want[0])
    np.testing.assert_allclose(slopes, want[1], rtol=1e-5, atol=1e-6)


ENGRAM = Engram(W=W, H=1, K=4, rows=50, conv=0)
MODEL = LM(W=W, D=16, stages=(Stage((ENGRAM, MLP(F=8)), repeats=2),), tied=True)
TABLE = "stages.0.layers.0.table"


@functools.cache
def trained(name, lazy):
    adam = AdamW(lr=1e-2, eps=1e-2, lazy_tables=lazy, schedule=Schedule(warmup=0, shape="constant"))
    mesh = Mesh(data=1) if name == "one" else MESHES[name][0]
    job = prepare(Experiment("A test.", MODEL, Noise(), adam, mesh=mesh))
    state, said = job.init(), []
    for step in range(2):
        state, metrics = job.step(state, job.dataset.batch(0, step))
        said.append(float(metrics["grad_norm"]))
    return job, state, said


@pytest.mark.parametrize("lazy", [pytest.param(False, marks=pytest.mark.slow), True], ids=["dense", "lazy"])
def test_a_step_sends_no_table(lazy):
    """Row by row or whole: each device updates its own rows; the same run as on one device."""
    job, state, said = trained("fsdp", lazy)
    rows = state["params"][TABLE].shape[1]
    for array in [state["params"][TABLE], *(a for a in jax.tree.leaves(state) if a.shape[:2] == (2, rows))]:
        assert array.sharding.shard_shape(array.shape)[1] == rows // 8
    for step, arguments in (
        (job.step, (state, job.dataset.batch(0, 0))),
        (job.evaluate, (state["params"], job.dataset.batch(0, 0))),
    ):
        assert not table_shaped(step.lower(*arguments).compile(), rows, ENGRAM.K)
    _, alone, alone_said = trained("one", lazy)
    np.testing.assert_allclose(said, alone_said, rtol=1e-5)
    for name, value in alone["params"].items():
        np.testing.assert_allclose(state["params"][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_where_rows_lie():
    spec = Spec((2, 256, 4), "LWK", False, False, "", True)
    for mesh, axes in MESHES.values():
        layout = build_layout(mesh, B, T)
        assert layout.spec(spec) == P(None, axes, None)
        assert layout.spread({"t": spec}) == {"t": Spread(layout.mesh, axes)}
    assert build_layout(Mesh(data=8), B, T).spec(spec) == P(None, None, None)
    odd = spec._replace(shape=(2, 255, 4))
    assert build_layout(MESHES["fsdp"][0], B, T).report({"t": odd}) == [
        "t lies whole over mesh.fsdp, 2,040 parameters: W = 255 does not divide over 8 devices; "
        "choose a multiple of 8, or another mesh.fsdp"
    ]
    half = spec._replace(shape=(2, 6, 4))
    layout = build_layout(MESHES["both"][0], B, T)
    assert layout.spec(half) == P(None, ("model",), None)
    (line,) = layout.report({"t": half})
    sizes = layout.mesh.shape["fsdp"] * layout.mesh.shape["model"]
    assert f"over mesh.fsdp x mesh.model, 48 parameters: W = 6 does not divide over {sizes} devices; " in line
