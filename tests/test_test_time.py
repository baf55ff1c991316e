"""Test-time memory: the dual and the materialised form against the definition, in float64, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memories import NETWORKS, RETENTIONS, SLOPES, B, Case, H, K, close, documents, judge

from layers.ops import chunk_loop, chunk_tables, memory_forms
from layers.ops import fast_weights as fw
from layers.ops.memory_forms import State, dual, exact, form_of, materialised, summed
from layers.ops.recurrence import recurrence
from layers.ops.test_time import Gate, test_time_memory
from layers.test_time import TestTimeMemory, rule_of

test_time_memory.__test__ = TestTimeMemory.__test__ = False  # they are no tests
FAST = ("mlp", "l2"), ("swiglu", "l2"), ("deep", "dot"), ("linear", "huber_norm"), ("linear", "l3_held")
judging = pytest.mark.xdist_group("judging")  # one worker: the small programs of their operations are shared


@judging
@pytest.mark.parametrize(
    ("network", "slope"),
    [
        # Each network and each kind of bias in every run, each pair in `make test-slow`.
        pytest.param(n, s, marks=[] if (n, s) in FAST else pytest.mark.slow)
        for n in NETWORKS
        for s in SLOPES
    ],
)
def test_a_chunk_is_its_tokens(float64, network, slope):
    """Every network with every bias, in both forms; gradients of each network and of each bias."""
    judge([dual, materialised], slopes=network == "linear" or slope == "l2", network=network, slope=slope)


@judging
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"momentum": False}, marks=pytest.mark.slow),
        pytest.param({"keep": False}, marks=pytest.mark.slow),
        {"momentum": False, "keep": False},
        {"width": "outputs"},
        {"read": "pre"},
        {"average": True},
    ],
    ids=str,
)
def test_every_learner(float64, options):
    judge([dual, materialised], **options)


@judging
@pytest.mark.parametrize(
    ("retention", "step"),
    [
        # Each retention and each step in every run, each pair in `make test-slow`.
        pytest.param(r, s, marks=pytest.mark.slow if r and s else [], id=f"{r}-{'orthogonal' if s else 'plain'}")
        for r in (None, *RETENTIONS)
        for s in (None, fw.newton_schulz)
    ],
)
def test_every_retention(float64, retention, step):
    judge([materialised], 1e-8, retention is None or step is None, retention=RETENTIONS.get(retention), step=step)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"average": True, "read": "pre"},
        {"chunk": 1, "momentum": False, "retention": RETENTIONS["elastic"]},
        {"momentum": False, "slope": "l3_held"},
    ],
    ids=["dual", "average", "materialised", "held"],
)
def test_chunks_of_documents_are_the_definition(float64, options):
    """Packed documents, starts on and off the grid, a row that goes on in mid-chunk, padding; with gradients."""
    case, pos = Case(23, **{"chunk": 4} | options), documents(23)
    close(case.graded(pos, implementation="chunked"), case.graded(pos, implementation="naive"))


def test_the_form_is_the_cheapest_that_serves():
    rule = Case(4).rule
    for change, form in (
        ({}, dual),
        ({"average": True}, dual),
        ({"retention": RETENTIONS["kl"]}, materialised),
        ({"step": fw.newton_schulz}, materialised),
        ({"exact": "l2"}, exact),
        ({"whole": 8, "step": fw.newton_schulz}, summed),
    ):
        assert form_of(rule._replace(**change)) is form


@pytest.mark.parametrize("options", [{}, {"average": True}], ids=str)
def test_any_cut_of_time(float64, options):
    """Whole, ragged, one by one: the same y and the same state, from a state that another row left."""
    T = 29
    case, pos = Case(T, chunk=4, **options), documents(T)
    _, warm = case.call(
        case.arrays, jnp.maximum(documents(T), 0)[:, :3] * 0 + jnp.arange(3, dtype=jnp.int32)[None], cut=slice(0, 3)
    )
    call = jax.jit(lambda arrays, pos, state: case.call(arrays, pos, state))
    whole, end = call(case.arrays, pos, warm)

    @functools.partial(jax.jit, static_argnums=3)
    def piece(start, state, arrays, n):
        timed = {name: arrays[name] for name in ("q", "k", "v", "gates", "threshold")} | {"pos": pos}
        cut = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, n, 1), timed)
        return case.call(arrays | cut, cut["pos"], state)

    for cuts in ([0, 7, 14, 21, 22, 29], range(T + 1)):
        state, ys = warm, []
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            y, state = piece(a, state, case.arrays, b - a)
            ys.append(y)
        y = jnp.concatenate(ys, 1)
        live = (np.asarray(pos) >= 0)[..., None, None]
        close([jnp.where(live, y, 0), state], [jnp.where(live, whole, 0), end])


@pytest.mark.parametrize("few", [64, 1], ids=["every state kept", "some kept"])
def test_any_number_of_chunks(float64, monkeypatch, few):
    """One program for rows of one chunk and of three times as many as there is room for; gradients too."""
    monkeypatch.setattr(chunk_loop, "FEW", few)
    T = 60
    case = Case(T, "linear", chunk=16)
    runs = [jax.jit(lambda pos, form=form: case.graded(pos, implementation=form)) for form in ("chunked", "naive")]
    for length in (60, 17, 2):
        pos = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) % length, (B, T))
        close(*(run(pos) for run in runs), 1e-9)


def test_what_is_recomputed_changes_nothing(float64):
    """Nor does a state that nobody wants."""
    case = Case(64, chunk=1, momentum=False)
    (y, _), grads = case.graded(None, weigh_state=0.0, remat=False)
    (got, state), got_grads = case.graded(None, weigh_state=0.0, wanted=False)
    assert state is None
    close([got, got_grads], [y, grads])
    with pytest.raises(ValueError, match="say `chunks`"):
        case.call(case.arrays, jnp.zeros((B, 64), jnp.int32), remat=False)


def test_linear_memories_are_the_house_s_recurrences(float64):
    """Online L2 descent is the delta rule that erases before the decay; the dot loss is linear attention at any C."""
    T = 20
    pos = documents(T)
    for slope, chunk in (("l2", 1), ("dot", 4)):
        case = Case(T, "linear", slope, chunk=chunk, momentum=False)
        a, gate = case.arrays, case.arrays["gates"]["w0"]
        zero = a | {"start": jax.tree.map(jnp.zeros_like, a["start"])}
        y, state = case.call(zero, pos)
        want, memory = recurrence(
            *(a["q"], a["k"], gate.lr * a["v"], gate.lr * a["k"] if slope == "l2" else None, gate.log_keep[..., 0]),
            state=jnp.zeros((B, H, K, K)),
            pos=pos,
            erase="undecayed",
        )
        live = (np.asarray(pos) >= 0)[..., None, None]
        close([jnp.where(live, y, 0), state.weights["w0"]], [jnp.where(live, want, 0), memory])


@pytest.mark.parametrize("slope", ["l2", "l3", "dot"])
def test_slopes_are_of_the_losses_they_name(float64, slope):
    losses = {
        "l2": lambda y, v: jnp.sum((y - v) ** 2) / 2,
        "l3": lambda y, v: jnp.sum(jnp.abs(y - v) ** 3),
        "dot": lambda y, v: -jnp.sum(y * v),
    }
    y, v = np.random.default_rng(0).normal(size=(2, 1, 50)) * 3
    close(SLOPES[slope](y, v, None), jax.grad(losses[slope])(y, v), 1e-2 if slope == "l3" else 1e-12)


def test_a_large_error_does_not_steepen_the_slope(float64):
    """|.|^p held at errors of 1 is the printed slope up to there; beyond, the slope is of degree 1 in the error."""
    held, v = functools.partial(fw.lp, 3.0, largest=1.0), jnp.zeros((1, 7))
    small = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 7)))
    np.testing.assert_array_equal(held(small, v), fw.lp(3.0, small, v))
    large = 20 * small / jnp.abs(small).max()
    close(held(2 * large, v), 2 * held(large, v), 1e-3)
    close(held(large, v), fw.lp(3.0, large, v) / 20)
    for y, slope in ((small, held), (large, held), (large, functools.partial(fw.lp, 3.0))):
        curvature = jnp.abs(jnp.linalg.eigvals(jax.jacobian(lambda y, slope=slope: slope(y, v)[0])(y)[:, 0])).max()
        assert (curvature < 6.01) == (slope is held)  # p (p - 1): what lr_max counts with
    np.testing.assert_array_equal(fw.lp(2.0, large, v, largest=1.0), fw.lp(2.0, large, v))


@pytest.mark.parametrize("error_max", [1.0, 4.0, None])
def test_steps_of_the_largest_size_bear_any_error(float64, error_max):
    """One key with a value far off, at the largest lr of the config: error and slope in the past both fall.

    As the loss is printed (None) the first step overshoots, and each further one more so.
    """
    T, far = 64, 40.0
    config = TestTimeMemory(
        H=1, depth=1, norm=False, loss="lp", error_max=error_max, momentum=False, keep=False, chunk=8
    )
    k = jnp.broadcast_to(jnp.eye(K)[0], (1, T, 1, K))
    gate = Gate(jnp.full((1, T, 1, 1), config.largest_step))

    def error(w0):
        y, _ = test_time_memory(rule_of(config), k, k, jnp.full_like(k, far), {"w0": gate}, ({"w0": w0}, None))
        return jnp.max(jnp.abs(y[0, -1] - far)), y

    (left, y), slope = jax.jit(jax.value_and_grad(error, has_aux=True))(jnp.zeros((1, K, K)))
    if error_max is None:
        assert jnp.abs(y).max() > 1e6 and jnp.abs(slope).max() > 1e3
    else:
        assert left < far / 10 and jnp.abs(y).max() < far + 1e-6 and jnp.abs(slope).sum() < 1


def test_huber_is_l2_within_its_threshold_and_bounded_beyond(float64):
    y, v = np.random.default_rng(0).normal(size=(2, 7, 5))
    far, near = jnp.full((7, 1), 1e9), jnp.full((7, 1), 0.1)
    for slope in (fw.huber_norm, fw.huber_coord, fw.huber_mix):
        close(slope(y, v, far), y - v)
    assert (jnp.linalg.norm(fw.huber_norm(y, v, near), axis=-1) <= 0.1 + 1e-12).all()
    assert (jnp.abs(fw.huber_coord(y, v, near)) <= 0.1).all() and (jnp.abs(fw.huber_mix(y, v, near)) <= 0.1).all()


def test_retentions_by_their_definitions(float64):
    """A simplex; the mirror map is the slope of half the squared norm; the printed one shrinks as A grows."""
    A = np.random.default_rng(0).normal(size=(6, 4))
    close(fw.kl(2.0, A).sum(0), np.full(4, 2.0))
    close(fw.lq_mirror(4.0, A), jax.grad(lambda A: jnp.sum(A**4) ** 0.5 / 2)(A), 1e-5)
    close(fw.lq_printed(4.0, 2 * A), fw.lq_printed(4.0, A) / 2, 1e-5)
    close(fw.elastic(0.5, A), np.sign(A) * np.maximum(np.abs(A) - 0.5, 0))
    singular = jnp.linalg.svd(fw.newton_schulz(A), compute_uv=False)
    assert (0.6 < singular).all() and (singular < 1.3).all()


def test_maps_and_steps_at_their_limits():
    """Weights so large or so small that a fourth power of them leaves float32; a step of nothing has slopes."""
    A = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    for retention, degree, size in ((fw.lq_mirror, 1, 1e15), (fw.lq_mirror, 1, 1e-4), (fw.lq_printed, -1, 1e15)):
        value, slope = jax.value_and_grad(lambda A, f=retention: jnp.sum(f(4.0, A) ** 2) ** 0.5)(size * A)
        usual = jnp.sum(retention(4.0, A) ** 2) ** 0.5
        np.testing.assert_allclose(value, usual * size**degree, rtol=2e-2)
        assert jnp.isfinite(slope).all() and (slope != 0).any()
    for size in (1e-4, 0.0):  # where the printed map, of degree -1, has no bound of its own
        slope = jax.grad(lambda A: jnp.sum(fw.lq_printed(4.0, A) * A))(size * A)
        assert jnp.abs(slope).max() < 1e6
    slope = jax.grad(lambda S: jnp.sum(fw.newton_schulz(S) * A))(jnp.zeros_like(A))
    assert jnp.isfinite(slope).all()


def late(gate, pre):
    return chunk_tables.fading(gate, True)


def forgetful(gate, pre):
    return chunk_tables.fading(gate, pre)._replace(past=None)


@pytest.mark.parametrize("broken", [late, forgetful])
def test_a_broken_table_is_seen(float64, monkeypatch, broken):
    """Reads one step late; leaves out the momentum with which the chunk began."""
    monkeypatch.setattr(memory_forms, "fading", broken)
    with pytest.raises(AssertionError):
        judge([dual])


def test_a_chunk_is_not_a_token(float64):
    """With C > 1 another function than online descent: further from it, in proportion, the larger the steps are."""
    distance = {}
    for scale in (1 / 64, 1 / 128, 1 / 256):
        ys = []
        for chunk in (1, 8):
            case = Case(32, chunk=chunk)
            gates = {name: gate._replace(lr=gate.lr * scale) for name, gate in case.arrays["gates"].items()}
            ys.append(case.call(case.arrays | {"gates": gates}, None)[0])
        distance[scale] = float(jnp.linalg.norm(ys[0] - ys[1]))
    large, half, quarter = distance.values()
    assert large > 1e-3
    assert 1.8 < large / half < 4.5 and 1.8 < half / quarter < 4.5


def test_a_document_starts_where_it_is_told():
    """Weights and momentum of the start are those of every document."""
    case = Case(4, chunk=2)
    start = case.arrays["start"], jax.tree.map(jnp.ones_like, case.arrays["start"])
    x = {name: case.arrays[name].astype(jnp.float32) for name in "qkv"}
    y, state = test_time_memory(
        case.rule, x["q"], x["k"], x["v"], case.arrays["gates"], start, case.arrays["outer"], pos=jnp.full((B, 4), -1)
    )
    assert isinstance(state, State) and y.shape == (B, 4, H, K)
    for name, w in case.arrays["start"].items():
        np.testing.assert_array_equal(state.weights[name][1], w)
        assert (state.momentum[name] == 1).all()


def test_a_learner_that_diverges_stays_finite():
    """Steps a hundred times too long, in float32: the error grows with every chunk, and so would the weights."""
    case = Case(96, "linear", chunk=4)
    far = {"w0": case.arrays["gates"]["w0"]._replace(lr=jnp.full((B, 96, H, 1), 50.0))}
    case.arrays = jax.tree.map(lambda a: a.astype(jnp.float32), case.arrays | {"gates": far})
    for implementation in ("naive", "chunked"):
        (y, state), grads = case.graded(None, implementation=implementation)
        assert jnp.abs(y).max() > 1e6  # it did diverge
        assert all(jnp.isfinite(a).all() for a in jax.tree.leaves((y, state, grads)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fast"}, "choose naive, chunked or auto"),
        ({"row": jnp.ones((H, 4))}, "average"),
        ({"state": State({}, None, None)}, "`pos`"),
    ],
)
def test_bad_calls(change, message):
    case = Case(4, chunk=4)
    with pytest.raises(ValueError, match=message):
        test_time_memory(
            case.rule, *(case.arrays[n] for n in "qkv"), case.arrays["gates"], (case.arrays["start"], None), **change
        )
